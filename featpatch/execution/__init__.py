"""Run the forward passes of a sweep in this process or on the workers of a distributed engine, without knowing the model.

On one machine, `executor="ray"` is enough: it starts a Ray with as many workers as there are processors, which ends with the
sweep. It pays off if a sweep takes minutes, because a worker takes about five seconds to start. Processors that torch's threads
already use are not gained twice; each worker has one thread per processor that it is given (`fp.Ray(cpus=...)`).

A Ray that featpatch starts sends no usage statistics to Ray's makers, whatever its own settings are. For a cluster, or a Ray
that this process is already connected to, whoever started it decides: `ray disable-usage-stats` turns them off.

On several machines, with the same Python, featpatch, torch and sae-lens on each:

    ray start --head --port=6379                           on the first, or in the first job of a cluster
    ray start --address=first:6379                         on each of the others
    featpatch rank ... --executor ray --address auto       on any of them; from outside --address ray://first:10001
    ray stop                                               on each, at the end

In Python `fp.rank_features(..., executor=fp.Ray(address="auto", workers=16, gpus=1), journal="sweep.journal")`;
`rank_components`, `rank_paths`, `ablate` and `stream_features` take the same argument. A model on a GPU goes to the GPU that
Ray gives the worker.

What to expect:

- The pairs are run, and the SAEs encode, on every worker that takes part in a shard (pairs that run together, part by part);
  the batches of patches, which are nearly all of the time, are each run once, by whoever is free.
- Model, SAEs and metric travel to each worker once, packed by cloudpickle between processes of the same run; nothing of this is
  written to a file. A metric of your own must be importable there, or be defined in the script or notebook itself.
- Results come back batch by batch, into the journal of the process that called. The table is made there, from the same batches
  as in a serial run, so it has the same rows; values are those of a serial run up to the rounding of another number of threads
  (<!-- claim: python benchmarks/workers.py -->below 1e-5 of a logit in float32 on the shipped model<!-- /claim -->, 1e-12
  in the tests' float64).
- A worker that dies (killed, out of memory, its node lost) is replaced and its batch run again, up to three times for the same
  batch. The process that called may die too: with a journal the same call goes on from there, on workers or without.
- Ctrl-C ends the workers and returns what is finished, as in a serial run.
"""

from featpatch.execution.choosing import EXECUTORS, executor_of
from featpatch.execution.executor import Batch, Executor, Shards
from featpatch.execution.executors.ray import Ray

__all__ = ["EXECUTORS", "Batch", "Executor", "Ray", "Shards", "executor_of"]
