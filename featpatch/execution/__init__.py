"""Where the forward passes of a sweep run: here, or on the workers of a distributed engine. Knows no model.

On one machine `executor="ray"` is all there is to do: a Ray with as many workers as there are processors is started and ends
with the sweep. Worth it where a sweep takes minutes: a worker takes about five seconds to start. Processors that torch uses
already by its threads are not gained twice; each worker has one thread per processor that it is given (`fp.Ray(cpus=...)`).
A Ray that is started here sends no usage statistics to its makers, whatever its own settings say. A cluster that is joined, or
a Ray that this process is connected to already, does as whoever started it wanted: `ray disable-usage-stats` turns them off.

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
