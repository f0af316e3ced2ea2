"""A sweep over features from the checked input to the table of effects."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import metrics
from featpatch.effects import Collector, Effects, check_gap
from featpatch.engine import Journal, Sweep, choose_path, row_budget
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, dictionaries, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction
from featpatch.patching.runs import PairRuns, chunks, run_pairs
from featpatch.patching.swaps import Directions, Positions, Wanted, count_swaps, spans


@dataclass(frozen=True)
class Study:
    """What is asked, checked.

    Attributes:
        wanted: the positions to swap at, by pair.
        sweep: the engine, ready to run.
    """

    lens: Lens
    found: list[Dictionary]
    pairs: Pairs
    positions: Positions
    directions: tuple[Direction, ...]
    wanted: Sequence[Wanted]
    sweep: Sweep

    @classmethod
    def of(
        cls,
        model: Any,
        saes: Any,
        pairs: Pairs,
        *,
        positions: Positions,
        directions: Sequence[Direction],
        metric: str | Metric,
        batch_rows: int | None,
    ) -> "Study":
        """Checks everything that can be checked without a sweep.

        Raises:
            FeatpatchError: unusable input.
        """
        measure = metrics.find(metric)
        if not directions or not set(directions) <= set(DIRECTIONS):
            raise FeatpatchError(f"directions={tuple(directions)}: expected 'denoising', 'noising' or both")
        if batch_rows is not None and batch_rows < 1:
            raise FeatpatchError(f"batch_rows={batch_rows}: expected 1 or more, or None to choose by the memory at hand")
        wanted = [spans(pair, positions) for pair in pairs]
        lens = wrap(model)
        found = dictionaries(lens, saes)
        _check_answers(pairs, lens.d_vocab)
        longest = max(range(len(pairs)), key=lambda index: len(pairs[index]))
        probe = run_pairs(lens, pairs, [longest], found)[0]
        path = choose_path(lens, [probe.bases["denoising"]], list(dict.fromkeys(d.writes for d in found)))
        rows = batch_rows or row_budget(lens, len(pairs[longest]))
        chosen = tuple(direction for direction in DIRECTIONS if direction in directions)
        return cls(lens, found, pairs, positions, chosen, wanted, Sweep(path, measure, rows))

    def run(self, journal: Path | None, *, progress: bool) -> Effects:
        """The sweep over all pairs; after Ctrl-C what is finished.

        Raises:
            FeatpatchError: a gap near zero, NaN on the way, a journal of another sweep.
        """
        runs = lru_cache(maxsize=1)(self._runs)
        metadata = self._metadata()
        clean, corrupted, patches = self._survey(runs)
        check_gap(clean, corrupted)
        if journal is not None:
            subject = {key: metadata[key] for key in ("metric", "directions", "positions", "pairs", "model", "saes")}
            self.sweep.journal = Journal.open(journal, subject, self.sweep.rows)
            self.sweep.rows = self.sweep.journal.rows
        collector = Collector()
        finished: list[int] = []
        try:
            with tqdm(
                total=patches * len(self.directions), unit="patch", desc="patching", disable=not progress, smoothing=0
            ) as bar:
                self.sweep.done = bar.update
                for some in chunks(self.pairs):
                    self._patch(tuple(some), runs(tuple(some)), collector)
                    finished += some
        except KeyboardInterrupt:
            metadata["finished"] = False
        effects = collector.effects(clean, corrupted, metadata)
        return effects.of_pairs(finished) if finished else effects

    def _patch(self, some: tuple[int, ...], runs: list[PairRuns], collector: Collector) -> None:
        """Every patch of some pairs; what an interruption leaves out stays NaN."""
        probed = {d.name: Directions.of(d, [run.differences[d.name] for run in runs]) for d in self.found}
        swaps = [run.swaps(self.wanted[index], self.found, probed) for run, index in zip(runs, some, strict=True)]
        values = {
            direction: [
                [torch.full((len(swap.nodes),), torch.nan, dtype=torch.float64) for swap in of_pair] for of_pair in swaps
            ]
            for direction in self.directions
        }
        blocks, into = [], []
        for direction in self.directions:
            for run, of_pair, columns in zip(runs, swaps, values[direction], strict=True):
                blocks += run.blocks(of_pair, direction)
                into += columns
        try:
            self.sweep.fill(blocks, into)
        finally:
            for slot, (index, of_pair) in enumerate(zip(some, swaps, strict=True)):
                for number, swap in enumerate(of_pair):
                    of_swap = {direction: values[direction][slot][number].numpy() for direction in self.directions}
                    collector.add(index, swap.nodes, of_swap)

    def _survey(self, runs: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """The metric of the clean and of the corrupted runs, `[pairs]` each, and the number of patches to one direction."""
        clean, corrupted, patches = np.zeros(len(self.pairs)), np.zeros(len(self.pairs)), 0
        for some in chunks(self.pairs):
            together: list[PairRuns] = runs(tuple(some))
            clean[some] = self.sweep.baselines([run.bases["noising"] for run in together])
            corrupted[some] = self.sweep.baselines([run.bases["denoising"] for run in together])
            for index, run in zip(some, together, strict=True):
                wanted = self.wanted[index]
                patches += sum(count_swaps(difference, wanted) for difference in run.differences.values())
                patches += sum(bool(whole[span].any()) for whole in run.activations.values() for span in wanted.values())
        return clean, corrupted, patches

    def _runs(self, some: tuple[int, ...]) -> list[PairRuns]:
        return run_pairs(self.lens, self.pairs, some, self.found)

    def _metadata(self) -> dict[str, Any]:
        return {
            "metric": self.sweep.measure.name,
            "directions": sorted(self.directions),
            "positions": self.positions if isinstance(self.positions, str) else list(self.positions),
            "pairs": self.pairs.digest(),
            "model": {"name": str(self.lens.model.cfg.model_name), "sha256": self.lens.digest()},
            "saes": {dictionary.name: dictionary.digest() for dictionary in self.found},
            "versions": {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")},
            "finished": True,
        }


def _check_answers(pairs: Pairs, d_vocab: int) -> None:
    for index, pair in enumerate(pairs):
        if max(*pair.correct, *pair.wrong) >= d_vocab:
            raise FeatpatchError(
                f"pair {index}: answers {pair.correct}, {pair.wrong} are outside the model's vocabulary of {d_vocab} tokens: "
                "expected ids of the model's own tokenizer"
            )
