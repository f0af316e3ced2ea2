"""A patching experiment, from validated arguments to the table of effects."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.effects.collector import Collector, measured_places, provenance
from featpatch.effects.table import Effects
from featpatch.engine.executor import Executor, Shards
from featpatch.engine.journal import Book, ClosedBook, Journal, beside, to_resume
from featpatch.engine.patches import BaseRun, Block
from featpatch.engine.path import PatchPath, choose_path
from featpatch.engine.ray import executor_of
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.sweep import Sweep, announcing, free_memory, row_budget, row_bytes
from featpatch.errors import FeatpatchError, FeatpatchWarning, check_numbers, counted
from featpatch.files import as_path
from featpatch.metrics import METRIC, Measures, Metrics, check_gap
from featpatch.model.lens import Lens
from featpatch.model.transport import packed, unpacked
from featpatch.nodes import DIRECTIONS, Direction, check_directions
from featpatch.pairs.pair import Positions, Wanted, lengths_if_pooled, spans_of
from featpatch.pairs.pairs import Pairs, check_counterfactual, check_pairs
from featpatch.patching.changes import Part
from featpatch.patching.noise import Noise, over_draws
from featpatch.patching.runs import KEPT, KEPT_SHARE, Contrast, PairRuns, Runner, check_labelled, chunks, combined, readings_of


class Options(TypedDict, total=False):
    """The keyword arguments of `Study.of` that rankings have in common, as in `rank_features`."""

    positions: Positions
    directions: Sequence[Direction]
    metric: Metrics | Measures
    batch_rows: int | None
    noise: Noise | None


NOT_COMPARED = ("metric", "tags", "versions", "finished", "sites", "places", "tokens", "lengths")
"""The entries of metadata that a journal does not compare: those that may differ, and those that follow from others."""

Survey = tuple[NDArray[np.float64], NDArray[np.float64], int]
"""The metrics of clean runs and of corrupted runs, `[pairs, metrics]` each, and the number of patches per direction."""


@dataclass(frozen=True)
class Study:
    """A validated patching experiment.

    Attributes:
        lens: the model.
        parts: the nodes that are patched.
        pairs: the clean and corrupted prompts.
        directions: the directions of patching.
        measures: the metrics that are measured.
        metadata: everything that the results depend on, and their provenance.
        path: the kind of forward pass that runs patches, chosen and checked.
        rows: the number of rows in one forward pass.
        memory: the estimated peak memory of such a pass, in bytes.
        runner: runs the pairs, and keeps their runs.
        arguments: the other arguments of `of`, with which workers make the same study.
    """

    lens: Lens
    parts: Sequence[Part]
    pairs: Pairs
    directions: tuple[Direction, ...]
    measures: Measures
    metadata: Mapping[str, Any]
    path: PatchPath
    rows: int
    memory: int
    runner: Runner
    arguments: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        lens: Lens,
        parts: Sequence[Part],
        about: Mapping[str, Any],
        pairs: Pairs,
        contrast: Contrast | None = None,
        *,
        positions: Positions = "all",
        directions: Sequence[Direction] = DIRECTIONS,
        metric: Metrics | Measures = METRIC,
        batch_rows: int | None = None,
        noise: Noise | None = None,
    ) -> "Study":
        """Make a study, after checking everything that can be checked without a sweep.

        Args:
            lens: the model.
            parts: the nodes that are patched.
            about: metadata about the parts, to store with the results.
            pairs: the clean and corrupted prompts.
            contrast: the choice of base and source runs; None for those of the pairs.
            positions, directions, metric, batch_rows, noise: as in `rank_features`.

        Raises:
            FeatpatchError: the input is unusable.
        """
        measures, chosen = Measures.of(metric), check_directions(directions)
        if noise is not None and not isinstance(noise, Noise):
            raise FeatpatchError(f"noise={noise!r}: expected an fp.Noise, such as fp.Noise(['subject'])")
        check_numbers(1, batch_rows=1 if batch_rows is None else batch_rows)
        alone = noise is not None or contrast is not None
        known = check_pairs(pairs, by_label=True) if alone else check_counterfactual(pairs, by_label=True)
        readings = readings_of(measures, known, lens)
        wanted = spans_of(pairs, positions)
        if not alone and lens.causal and not {"nodes", "route"} & set(about) and positions != "each":  # these say so themselves
            _warn_of_the_unchanged(pairs, wanted)
        hooks = sorted({hook for part in parts for hook in part.hooks})
        layers = sorted({layer for part in parts for layer in part.layers})
        room = min(KEPT, int(KEPT_SHARE * min(map(free_memory, lens.devices))))
        runner = Runner(lens, pairs, hooks, layers, wanted, readings, contrast, noise, room)
        check_labelled(runner)
        probes = _longest_and_shortest(runner)
        path = choose_path(lens, probes, list(dict.fromkeys(patched for part in parts for patched in part.patched)))
        columns = max(
            len(measures.columns(reading.correct, reading.wrong) or range(lens.d_vocab))
            for of_pair in readings.values()
            for reading in of_pair
        )
        longest = max(len(run.tokens) for run in probes)
        rows = row_budget(lens, longest, columns) if batch_rows is None else int(batch_rows)
        memory = rows * row_bytes(lens, longest, columns)
        complete = [site for part in parts if part.complete for site in part.sites]
        about_study = {**about, **lengths_if_pooled(list(pairs), positions)}
        metadata = _metadata(about_study, runner, measures, chosen, positions, complete)
        options = Options(positions=positions, directions=chosen, metric=metric, batch_rows=batch_rows, noise=noise)
        arguments = {"about": about, "contrast": contrast, **options}
        return cls(lens, parts, pairs, chosen, measures, metadata, path, rows, memory, runner, arguments)

    def run(self, journal: str | Path | None, *, progress: bool, executor: Any = None) -> Effects:
        """Run the sweep over all pairs and return the effects; after Ctrl-C, those that are finished, with a warning.

        Args:
            journal: a file to which finished batches are written.
            progress: whether to show a progress bar.
            executor: where forward passes run, see `executor_of`; in this process by default.

        Raises:
            FeatpatchError: the gap is near zero, a metric becomes NaN, or the journal belongs to another sweep.
        """
        try:
            effects, noise = self._run(journal, progress=progress, executor=executor), self.runner.noise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"no row is finished yet; {to_resume(journal)}") from None
        if effects.metadata.get("finished") is False:
            done = f"{counted(len(effects), 'row')} over {len(effects.clean)} of {counted(len(self.pairs), 'pair')}"
            draws = effects.metadata.get("noise", {}).get("draws", 1)
            done += "" if noise is None else f" and {draws} of {counted(noise.draws, 'draw')}"
            warnings.warn(f"interrupted: the table holds {done}; {to_resume(journal)}", FeatpatchWarning, stacklevel=3)
        return effects

    def _run(self, journal: str | Path | None, *, progress: bool, executor: Any = None) -> Effects:
        """Run the sweep like `run`, without a warning."""
        noise = self.runner.noise
        if noise is not None and noise.draws > 1:
            draw = partial(self._draw, journal=journal, executor=executor, progress=progress)
            return over_draws(noise, draw, self.metadata)
        survey = self._survey()
        if self.metadata["unit"] == "gap":
            for name, of_clean, of_corrupted in zip(self.measures.names, survey[0].T, survey[1].T, strict=True):
                check_gap(name, of_clean, of_corrupted)
        return self._swept(survey, journal, executor, progress=progress)

    def _draw(self, noise: Noise, number: int, journal: str | Path | None, executor: Any, *, progress: bool) -> Effects:
        """Run the sweep with one draw of noise; a journal of a draw after the first has its number at the end of the name."""
        arguments = {**self.arguments, "noise": noise, "directions": self.directions}
        path = beside(journal, f".{number}" if number else "")
        study = Study.of(self.lens, self.parts, pairs=self.pairs, **arguments)
        return study.run_block(path, progress=progress, executor=executor)

    def run_block(self, journal: str | Path | None, *, progress: bool, executor: Any = None) -> Effects:
        """Run one block of a larger set of pairs, without checking that it has a gap; see `run`."""
        return self._swept(self._survey(), journal, executor, progress=progress)

    def _swept(self, survey: Survey, journal: str | Path | None, executor: Any, *, progress: bool) -> Effects:
        elsewhere = None if executor is None else executor_of(executor)
        clean, corrupted, patches = survey
        book = None if elsewhere is None else Book(self.rows)
        if journal is not None:
            subject = {key: value for key, value in self.metadata.items() if key not in NOT_COMPARED}
            book = Journal.open(as_path(journal), subject, [*clean.ravel().tolist(), *corrupted.ravel().tolist()], self.rows)
        with closing(book) if isinstance(book, Journal) else nullcontext():
            if progress and book is not None and book.values:
                done, total = book.values // len(self.measures.parts), patches * len(self.directions)
                tqdm.write(f"resuming: {str(journal)!r} has {done:,} of {total:,} patches", file=sys.stderr)
            if elsewhere is not None and book is not None:
                book = self._run_elsewhere(elsewhere, book, patches, progress=progress)
            return self._collected(survey, book, progress=progress)

    def _collected(self, survey: Survey, book: Book | None, *, progress: bool) -> Effects:
        """Run the batches that the book lacks and collect the values of all; after Ctrl-C, of those that are finished."""
        clean, corrupted, patches = survey
        collector = Collector(self.measures.names)
        finished: list[int] = []
        begun: list[int] = []
        try:
            with tqdm(
                total=patches * len(self.directions), unit="patch", desc="patching", disable=not progress, smoothing=0
            ) as bar:
                sweep = Sweep(self.path, self.measures, book.rows if book else self.rows, book, announcing(bar))
                for begun in chunks(self.pairs):
                    for part in self.parts:
                        self._patch(sweep, begun, part, collector)
                    finished += begun
        except KeyboardInterrupt:
            gathered = collector.effects(clean, corrupted, {**self.metadata, "finished": False})
            gathered = gathered.of_pairs(finished) if finished else gathered.of_pairs(begun).known()
            if not len(gathered):
                raise
            return gathered
        return collector.effects(clean, corrupted, self.metadata)

    def complete(self, *, progress: bool) -> Effects:
        """Run the sweep over all pairs for a caller that needs all of them; Ctrl-C raises KeyboardInterrupt."""
        effects = self._run(None, progress=progress)
        if not effects.finished:
            raise KeyboardInterrupt
        return effects

    def work(self) -> Iterator[list[list[Block]]]:
        """Yield the patches of some pairs that run together, by pair, for each part of each such group of pairs."""
        for together in chunks(self.pairs):
            for part in self.parts:
                yield self._blocks(self.runner.run(together), part)

    @property
    def fast(self) -> bool:
        """Whether featpatch's own fast forward pass is used instead of the model's."""
        return isinstance(self.path, SuffixPath)

    def _run_elsewhere(self, executor: Executor, book: Book, patches: int, *, progress: bool) -> Book:
        """Run all batches with an executor and return the book of their values; after Ctrl-C, of those that are finished."""
        shards = len(list(chunks(self.pairs))) * len(self.parts)
        total = patches * len(self.directions)
        with tqdm(total=total, unit="patch", desc="starting workers", disable=not progress, smoothing=0) as bar:

            def done(finished: int) -> None:
                bar.set_description("patching on workers", refresh=False)
                bar.update(finished)

            try:
                others = {**self.arguments, "directions": self.directions, "batch_rows": book.rows}
                arguments = packed((self.lens, self.parts, self.pairs, others))
                executor.run(partial(_in_worker, arguments), shards, book, done)
            except KeyboardInterrupt:
                return ClosedBook(book.rows, book.finished)
        return book

    def shards(self) -> Shards:
        """Divide the study into shards: each is one part of it for one group of pairs that run together."""

        def blocks(together: list[int], part: Part) -> list[Block]:
            return [*chain(*self._blocks(self.runner.run(together), part))]

        sweep = Sweep(self.path, self.measures, self.rows)
        return Shards(sweep, [partial(blocks, together, part) for together in chunks(self.pairs) for part in self.parts])

    def _blocks(self, runs: list[PairRuns], part: Part) -> list[list[Block]]:
        """Return the patches of a part in the directions of the study, for each of some pairs."""
        wanted = {base for run in runs for direction in self.directions for base in run.bases[direction]}
        return [[block for block in of_pair if block.run in wanted] for of_pair in part.blocks(runs)]

    def _patch(self, sweep: Sweep, together: list[int], part: Part, collector: Collector) -> None:
        """Run all patches of a part for some pairs; values that an interruption leaves out stay NaN."""
        runs = self._prepared(together)
        blocks, metrics = self._blocks(runs, part), len(self.measures.parts)
        values = {block: torch.full((len(block), metrics), torch.nan, dtype=torch.float64) for block in chain(*blocks)}
        try:
            sweep.fill([*values], [*values.values()])
        finally:
            for index, run, of_pair in zip(together, runs, blocks, strict=True):
                for nodes, some in groupby(of_pair, key=lambda block: block.nodes):
                    of_base = {block.run: values[block] for block in some}
                    measured = {
                        direction: self._combined(index, torch.stack([of_base[base] for base in run.bases[direction]]))
                        for direction in self.directions
                    }
                    collector.add(index, nodes, measured)

    def _prepared(self, together: list[int]) -> list[PairRuns]:
        """Run some pairs and prepare them for the engine, always together, so that rounding is the same each time."""
        runs = self.runner.run(together)
        self.path.prepare([base for direction in DIRECTIONS for run in runs for base in run.bases[direction]])
        return runs

    def _combined(self, pair: int, values: torch.Tensor) -> NDArray[np.float64]:
        return combined(self.measures, self.pairs[pair], values).numpy()

    def _survey(self) -> Survey:
        """Measure the metrics of clean and of corrupted runs, and count the patches; see `Survey`."""
        sweep = Sweep(self.path, self.measures, self.rows)
        base: dict[Direction, NDArray[np.float64]]
        base = {direction: np.zeros((len(self.pairs), len(self.measures.names))) for direction in DIRECTIONS}
        patches = 0
        for group in chunks(self.pairs):
            prepared = self._prepared(group)
            for direction, values in base.items():
                runs = [run.bases[direction] for run in prepared]
                measured = sweep.baselines([run for of_pair in runs for run in of_pair]).split(
                    [len(of_pair) for of_pair in runs]
                )
                for index, of_pair in zip(group, measured, strict=True):
                    values[index] = self._combined(index, of_pair[:, None])
            patches += sum(
                part.count(run) * len(self.runner.readings[index])
                for index, run in zip(group, prepared, strict=True)
                for part in self.parts
            )
        return base["noising"], base["denoising"], patches


def _in_worker(arguments: bytes) -> Shards:
    """Make the study again in a worker's process, from pickled arguments, and return its shards; it keeps no runs."""
    lens, parts, pairs, others = unpacked(arguments)
    study = Study.of(lens, parts, pairs=pairs, **others)
    study.runner.room = 0
    return study.shards()


def _warn_of_the_unchanged(pairs: Pairs, wanted: Sequence[Wanted]) -> None:
    """Warn of labels, and of indices if nothing else was asked for, that are before the first difference in every pair."""
    places = {at: [max(pair.places(at)) for pair in pairs] for at in wanted[0] if at != "all"}
    starts = [pair.first_difference for pair in pairs]
    early = [at for at, of in places.items() if all(a == b < start for (a, b), start in zip(of, starts, strict=True))]
    for at in [at for at in early if isinstance(at, str)] or early[: len(early) == len(wanted[0])]:
        warnings.warn(
            f"{'label' if isinstance(at, str) else 'token index'} {at!r} has no rows, because it is before the first "
            f"difference in every pair: in pair 0 it is at position {places[at][0][0]} and the prompts differ from position "
            f"{starts[0]} on (positions count from 0 and include the BOS token)",
            FeatpatchWarning,
            stacklevel=5,
        )


def _metadata(
    about: Mapping[str, Any],
    runner: Runner,
    measures: Measures,
    directions: Sequence[Direction],
    positions: Positions,
    complete: Sequence[str],
) -> dict[str, Any]:
    """Return everything that the results depend on, and their provenance."""
    return {
        "metric": measures.names[0],
        "metrics": list(measures.names),
        "directions": sorted(directions),
        **measured_places(runner.lens, runner.pairs, positions, runner.wanted, complete),
        **provenance(runner.lens, runner.pairs),
        "unit": "gap" if runner.noise is not None or runner.pairs.has_counterfactual else "metric",
        **about,
        **({} if runner.contrast is None else runner.contrast.about()),
        **({} if runner.noise is None else {"noise": runner.noise.about()}),
        "finished": True,
    }


def _longest_and_shortest(runner: Runner) -> list[BaseRun]:
    """Return the base runs with the most and with the fewest tokens, or a single one if the numbers are equal."""
    groups = list(chunks(runner.pairs))
    longest = max(groups, key=lambda group: max(max(each.lengths) for index in group for each in runner.readings[index]))
    shortest = min(groups, key=lambda group: min(runner.pairs[group[0]].lengths))
    some = [run for group in (longest, shortest) for run in runner.run(group)]
    bases = [base for run in some for direction in DIRECTIONS for base in run.bases[direction]]
    by_length = {len(run.tokens): run for run in reversed(bases)}
    return [by_length[length] for length in dict.fromkeys((max(by_length), min(by_length)))]
