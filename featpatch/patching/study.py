"""A sweep over features from the checked input to the table of effects."""

from collections.abc import Callable, Iterator, Sequence
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
from featpatch.engine import Block, Journal, PatchPath, SuffixPath, Sweep, choose_path, row_budget, row_bytes
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, dictionaries, wrap
from featpatch.metrics import Measure, Metric
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction
from featpatch.patching.runs import PairRuns, chunks, run_pairs
from featpatch.patching.swaps import Directions, Positions, Swaps, Wanted, count_swaps, spans, whole_swaps


@dataclass(frozen=True)
class Study:
    """What is asked, checked.

    Attributes:
        wanted: the positions to swap at, by pair.
        path: the way to run patches, chosen and checked.
        rows: rows of one forward pass.
        memory: bytes that such a pass takes at its peak, estimated.
        runs: both runs of some pairs; the latest are kept.
    """

    lens: Lens
    found: list[Dictionary]
    pairs: Pairs
    positions: Positions
    directions: tuple[Direction, ...]
    wanted: Sequence[Wanted]
    measure: Measure
    path: PatchPath
    rows: int
    memory: int
    runs: Callable[[tuple[int, ...]], list[PairRuns]]

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
        if not isinstance(pairs, Pairs):
            raise FeatpatchError(
                f"pairs is a {type(pairs).__name__}: expected Pairs, e.g. from Pairs.from_prompts or Pairs(tuple)"
            )
        lens = wrap(model)
        check_tokens(pairs, lens)
        wanted = [spans(pair, positions) for pair in pairs]
        found = dictionaries(lens, saes)
        runs = lru_cache(maxsize=1)(lambda some: run_pairs(lens, pairs, some, found))
        ends = sorted(chunks(pairs), key=lambda some: len(pairs[some[0]]))
        probes = {len(pairs[some[0]]): runs(tuple(some))[0].bases["denoising"] for some in (ends[-1], ends[0])}
        path = choose_path(lens, list(probes.values()), list(dict.fromkeys(d.writes for d in found)))
        columns = max(len(measure.columns(pair.correct, pair.wrong) or range(lens.d_vocab)) for pair in pairs)
        rows = batch_rows or row_budget(lens, max(probes), columns)
        memory = rows * row_bytes(lens, max(probes), columns)
        chosen = tuple(direction for direction in DIRECTIONS if direction in directions)
        return cls(lens, found, pairs, positions, chosen, wanted, measure, path, rows, memory, runs)

    def run(self, journal: Path | None, *, progress: bool) -> Effects:
        """The sweep over all pairs; after Ctrl-C what is finished.

        Raises:
            FeatpatchError: a gap near zero, NaN on the way, a journal of another sweep.
        """
        metadata = self._metadata()
        clean, corrupted, patches = self._survey()
        check_gap(clean, corrupted)
        book = None
        if journal is not None:
            subject = {key: metadata[key] for key in ("metric", "directions", "positions", "pairs", "model", "saes")}
            book = Journal.open(journal, subject, [*clean.tolist(), *corrupted.tolist()], self.rows)
        collector = Collector()
        finished: list[int] = []
        try:
            with tqdm(
                total=patches * len(self.directions), unit="patch", desc="patching", disable=not progress, smoothing=0
            ) as bar:
                sweep = Sweep(self.path, self.measure, book.rows if book else self.rows, book, bar.update)
                for some in chunks(self.pairs):
                    self._patch(sweep, some, collector)
                    finished += some
        except KeyboardInterrupt:
            metadata["finished"] = False
            part = collector.effects(clean, corrupted, metadata)
            part = part.of_pairs(finished) if finished else part.known()
            if not len(part):
                raise
            return part
        return collector.effects(clean, corrupted, metadata)

    def work(self) -> Iterator[list[Block]]:
        """All patches, the pairs that run together at a time."""
        for some in chunks(self.pairs):
            runs = self.runs(tuple(some))
            swaps = self._swaps(some, runs)
            yield self._blocks(runs, swaps)

    @property
    def fast(self) -> bool:
        """Whether our own forward pass is taken."""
        return isinstance(self.path, SuffixPath)

    def _swaps(self, some: list[int], runs: list[PairRuns]) -> list[list[Swaps]]:
        probed = {d.name: Directions.of(d, [run.differences[d.name] for run in runs]) for d in self.found}
        return [run.swaps(self.wanted[index], self.found, probed) for run, index in zip(runs, some, strict=True)]

    def _blocks(self, runs: list[PairRuns], swaps: list[list[Swaps]]) -> list[Block]:
        """Direction by direction, pair by pair, swap by swap."""
        each = [(direction, *both) for direction in self.directions for both in zip(runs, swaps, strict=True)]
        return [block for direction, run, of_pair in each for block in run.blocks(of_pair, direction)]

    def _patch(self, sweep: Sweep, some: list[int], collector: Collector) -> None:
        """Every patch of some pairs; what an interruption leaves out stays NaN."""
        runs = self.runs(tuple(some))
        swaps = self._swaps(some, runs)
        values = {
            direction: [torch.full((len(swap.nodes),), torch.nan, dtype=torch.float64) for of_pair in swaps for swap in of_pair]
            for direction in self.directions
        }
        try:
            sweep.fill(self._blocks(runs, swaps), [column for columns in values.values() for column in columns])
        finally:
            columns = {direction: iter(of_direction) for direction, of_direction in values.items()}
            for index, of_pair in zip(some, swaps, strict=True):
                for swap in of_pair:
                    collector.add(index, swap.nodes, {direction: next(column).numpy() for direction, column in columns.items()})

    def _survey(self) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """The metric of the clean and of the corrupted runs, `[pairs]` each, and the number of patches to one direction."""
        sweep = Sweep(self.path, self.measure, self.rows)
        clean, corrupted, patches = np.zeros(len(self.pairs)), np.zeros(len(self.pairs)), 0
        for some in chunks(self.pairs):
            together = self.runs(tuple(some))
            clean[some] = sweep.baselines([run.bases["noising"] for run in together])
            corrupted[some] = sweep.baselines([run.bases["denoising"] for run in together])
            for index, run in zip(some, together, strict=True):
                wanted = self.wanted[index]
                patches += sum(count_swaps(difference, wanted) for difference in run.differences.values())
                patches += sum(
                    len(whole_swaps(site, "activation", whole, wanted).nodes) for site, whole in run.activations.items()
                )
        return clean, corrupted, patches

    def _metadata(self) -> dict[str, Any]:
        tags = {"tags": [dict(pair.tags) for pair in self.pairs]} if any(pair.tags for pair in self.pairs) else {}
        return {
            "metric": self.measure.name,
            "directions": sorted(self.directions),
            "positions": self.positions if isinstance(self.positions, str) else [*self.wanted[0]],
            "pairs": self.pairs.digest(),
            **tags,
            "model": {"name": str(self.lens.model.cfg.model_name), "sha256": self.lens.digest()},
            "saes": {dictionary.name: dictionary.digest() for dictionary in self.found},
            "versions": {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")},
            "finished": True,
        }


def check_tokens(pairs: Pairs, lens: Lens) -> None:
    """Refuses tokens and answers that the model doesn't know, and prompts that are too long for it.

    Raises:
        FeatpatchError: one of these.
    """
    inputs, context = lens.d_vocab_in, lens.n_ctx
    for index, pair in enumerate(pairs):
        answers, tokens = (*pair.correct, *pair.wrong), (*pair.clean, *pair.corrupted)
        if not 0 <= min(answers) <= max(answers) < lens.d_vocab:
            raise FeatpatchError(
                f"pair {index}: answers {pair.correct}, {pair.wrong} are outside the model's vocabulary of {lens.d_vocab} "
                "tokens: expected ids of the model's own tokenizer"
            )
        if not 0 <= min(tokens) <= max(tokens) < inputs:
            raise FeatpatchError(
                f"pair {index} has token ids from {min(tokens)} to {max(tokens)}: expected 0 to {inputs - 1}, ids of "
                "the model's own tokenizer"
            )
        if context is not None and len(pair) > context:
            raise FeatpatchError(f"pair {index} has {len(pair)} tokens: expected at most {context}, the model's context")
