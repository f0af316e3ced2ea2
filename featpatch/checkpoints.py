"""The trained model, SAEs, transcoders and prompt pairs that are shipped with the package, verified by their digests.

They are ordinary folders of Hugging Face, sae-lens and circuit-tracer, in `checkpoints/` next to the package in the
repository, and inside the package after installation from a wheel.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featpatch.errors import FeatpatchError, check_numbers, closest, is_integer
from featpatch.loading import Loaded, load
from featpatch.pairs.fields import NEEDED, checked, pairs_of
from featpatch.pairs.files import Rows, json_lines
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import plain_tokenizer
from featpatch.sae.loading import load_sae
from featpatch.tasks import TASKS


@dataclass(frozen=True, repr=False)
class Demo(Loaded):
    """A small GPT-2 trained on indirect objects, facts, years and reviews, with its SAEs.

    Attributes:
        model: the model, a TransformerBridge.
        saes: the SAEs as sae-lens objects, in the order of their hook points.
        folder: the folder of the checkpoints.

    `transcoders`, `clt` and `crosscoder` are further dictionaries of the same model, which are loaded when they are first used.

    Examples:
        >>> model, saes = demo
        >>> len(saes)
        8
    """

    folder: Path

    @cached_property
    def transcoders(self) -> list[Any]:
        """The transcoders of the four MLPs as sae-lens objects, from the lowest layer up; that of layer 0 is also in `saes`.

        Examples:
            >>> [transcoder.cfg.metadata.hook_name_out for transcoder in demo.transcoders]
            ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out', 'blocks.2.hook_mlp_out', 'blocks.3.hook_mlp_out']
        """
        lowest = next(sae for sae in self.saes if sae.cfg.metadata.hook_name_out)
        return [lowest, *(load_sae(path, device=self._device) for path in sorted((self.folder / "transcoders").iterdir()))]

    @cached_property
    def clt(self) -> Any:
        """A cross-layer transcoder of the MLPs, whose features write to the MLP of their layer and to all above.

        Examples:
            >>> demo.clt
            CrossLayerTranscoder of 4 x 512 features, blocks.0.mlp.hook_in to 3 -> blocks.0.hook_mlp_out to 3
            >>> few = demo.pairs(n=2)
            >>> effects = fp.rank_features(demo.model, demo.clt, few, positions=["S2"], progress=False)
        """
        return load_sae(self.folder / "clt", device=self._device, dtype="float32")

    @cached_property
    def crosscoder(self) -> Any:
        """A crosscoder, whose features read and write the residual stream before each layer and after the last one.

        Examples:
            >>> demo.crosscoder
            Crosscoder of 2048 features, blocks.0.hook_resid_pre to 3
            >>> len(demo.crosscoder.hook_out)
            5
        """
        return load_sae(self.folder / "crosscoder", device=self._device, dtype="float32")

    @property
    def _device(self) -> str:
        return str(self.saes[0].W_dec.device)

    def pairs(self, task: str = "ioi", *, n: int = 32, seed: int = 0) -> Pairs:
        """Draw `n` pairs of a task without repetition from the shipped pairs, none of which the model was trained on.

        Their tags say how they were made: task, template and corruption; for ioi also gift and order, for sentiment also
        verdict.

        Args:
            task: `"ioi"`, `"capitals"`, `"greater_than"` or `"sentiment"`.
            n: the number of pairs.
            seed: the seed of the random draw.

        Raises:
            FeatpatchError: the task is unknown, or there are fewer than `n` pairs.

        Examples:
            >>> pairs = demo.pairs("capitals", n=4)
            >>> sorted(pairs[0].labels)
            ['end', 'subject']
        """
        check_numbers(0, seed=seed)
        if task not in TASKS:
            raise FeatpatchError(f"task {task!r} is unknown: expected one of {', '.join(TASKS)}{closest(task, list(TASKS))}")
        shipped = json_lines(self.folder / "pairs" / f"{task}.jsonl", NEEDED)
        if not is_integer(n) or not 0 < n <= len(shipped.values):
            raise FeatpatchError(
                f"n={n!r} pairs of {task!r}: expected an integer from 1 to {len(shipped.values)}, the pairs that are shipped "
                f"and that the model was not trained on; fp.tasks.{task}(demo.model, n=...) draws more"
            )
        chosen = random.Random(int(seed)).sample(range(len(shipped.values)), int(n))
        rows = Rows([shipped.where[row] for row in chosen], [shipped.values[row] for row in chosen])
        return Pairs(pairs_of(self.model, rows, checked, None, None, False), plain_tokenizer(self.model))

    def text(self) -> list[str]:
        """Return documents that the model was not trained on, for example to describe features with `fp.max_activating`.

        Examples:
            >>> len(demo.text()) > 100
            True
        """
        return (self.folder / "text" / "held_out.txt").read_text(encoding="utf-8").splitlines()


def folder() -> Path:
    """Return the folder of the shipped checkpoints.

    Raises:
        FeatpatchError: there is none.
    """
    here = Path(__file__).parent
    for candidate in (here / "_checkpoints", here.parent / "checkpoints"):
        if (candidate / "digests.json").is_file():
            return candidate
    raise FeatpatchError(
        f"there are no checkpoints in {here / '_checkpoints'} or in {here.parent / 'checkpoints'}: expected the folder that "
        "ships with featpatch; reinstall featpatch, or rebuild the folder with `python -m examples.train_demo`"
    )


def verify(root: Path) -> None:
    """Raise a FeatpatchError unless every file is there and has the digest that was recorded when it was made."""
    for name, expected in json.loads((root / "digests.json").read_text(encoding="utf-8")).items():
        path = root / name
        if not path.is_file():
            raise FeatpatchError(
                f"checkpoint file {str(path)!r} is missing: expected every file that ships with featpatch; restore it (git "
                "checkout checkpoints, or reinstall)"
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise FeatpatchError(
                f"checkpoint file {str(path)!r} has SHA-256 {found[:12]}...: expected {expected[:12]}...; the file is "
                "damaged, restore it (git checkout checkpoints, or reinstall)"
            )


def load_demo(*, device: str = "cpu", progress: bool = True) -> Demo:
    """Load the shipped model with its SAEs, offline and after verifying the digests of all files.

    Args:
        device: the device of the model and the SAEs.
        progress: whether to show the progress bars of the libraries that load them.

    Returns:
        The model, its SAEs, and methods that draw prompt pairs and texts for them. Transcoders, a cross-layer transcoder and a
        crosscoder of the same model are its attributes `transcoders`, `clt` and `crosscoder`.

    Raises:
        FeatpatchError: a checkpoint is missing or damaged.

    Examples:
        >>> demo = fp.load_demo(progress=False)
        >>> demo.model.cfg.n_layers
        4
        >>> demo.saes[0].cfg.metadata.hook_name
        'blocks.0.hook_resid_pre'
    """
    root = folder()
    verify(root)
    saes = [path for path in sorted((root / "saes").iterdir()) if path.is_dir()]
    loaded = load(root / "model", saes, device=device, check=False, progress=progress)
    return Demo(loaded.model, loaded.saes, None, root)
