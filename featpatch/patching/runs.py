"""Runs of a few pairs of equal length: the activations of their prompts, and base and source of each direction.

If the prompts of a pair are patched label by label, only their labelled tokens are compared. These are numbered as places,
which are the same in both runs: place i is the token `tokens[i]` of each.

The corrupted run may also be the clean prompt with Gaussian noise on the embeddings, as in causal tracing (Meng et al. 2022,
arXiv 2202.05262).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from hashlib import sha256
from math import inf
from typing import Any, TypeVar

import torch

from featpatch import sites
from featpatch.engine.patches import BaseRun, Deltas
from featpatch.errors import FeatpatchError, check_numbers, is_integer, is_number
from featpatch.model.lens import Lens
from featpatch.nodes import DIRECTIONS, Direction, Position
from featpatch.pairs.pair import Pair, Wanted
from featpatch.pairs.pairs import Pairs
from featpatch.patching.changes import Contrast, Labelled, Run, Swap, Ways
from featpatch.patching.readings import Reading


@dataclass(frozen=True)
class Noise:
    """Noise on the embeddings of some tokens of the clean prompt, which then serves as the corrupted run.

    This is the corruption of causal tracing (Meng et al. 2022, arXiv 2202.05262). The corrupted prompts of the pairs are not
    run; the answers are still those of the pairs.

    Attributes:
        positions: labels or indices of the tokens that get noise.
        scale: standard deviation of the noise, as a multiple of the standard deviation of the embeddings of the prompt's
            tokens over all coordinates.
        seed: the seed of the noise, which is drawn anew for each pair.
        draws: the number of draws, with the seeds `seed`, `seed + 1` and so on, over which metric values are averaged. The cost
            grows with it, and so does precision: a single draw can be far off, and 10 are advisable for numbers to report.
            `effects.spread` holds the standard deviation of pooled effects over draws.

    Examples:
        >>> noise = fp.Noise(["S2"], scale=3.0)
        >>> noisy = fp.rank_features(model, saes, pairs, positions=["S2"], noise=noise, progress=False)
        >>> noisy.metadata["noise"]["positions"]
        ['S2']
    """

    positions: Sequence[Position]
    scale: float = 3.0
    seed: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        check_numbers(1, draws=self.draws)
        check_numbers(0, seed=self.seed)
        several = isinstance(self.positions, Sequence) and not isinstance(self.positions, str) and len(self.positions)
        known = several and all(isinstance(position, str) or is_integer(position) for position in self.positions)
        if not known or not is_number(self.scale) or not 0 < self.scale < inf:
            raise FeatpatchError(
                f"Noise(positions={self.positions!r}, scale={self.scale!r}): expected positions as a list of at least one "
                "label or index, and a finite scale above 0, e.g. Noise(['subject'], scale=3)"
            )
        plain = tuple(position if isinstance(position, str) else int(position) for position in self.positions)
        for name, value in (("positions", plain), ("scale", float(self.scale)), ("seed", int(self.seed))):
            object.__setattr__(self, name, value)  # NumPy's numbers can't be saved

    def at(self, pair: Pair) -> list[int]:
        """Return the token positions that get noise in a pair.

        Raises:
            FeatpatchError: if the pair has no such label or index.
        """
        return sorted({p for position in self.positions for p in pair.positions(position)})

    def about(self) -> dict[str, Any]:
        """Return metadata to store with the results."""
        about = {"positions": list(self.positions), "scale": self.scale, "seed": self.seed}
        return about if self.draws == 1 else {**about, "draws": self.draws}

    @contextmanager
    def added(self, lens: Lens, pairs: Sequence[Pair]) -> Iterator[None]:
        """Context manager in which a call of the model with one prompt of each pair gets the noise of these pairs."""

        def add(embedded: torch.Tensor) -> torch.Tensor:
            noisy = embedded.clone()
            for row, pair in enumerate(pairs):
                at = self.at(pair)
                size = self.scale * float(embedded[row, : len(pair)].double().std())
                noise = torch.randn(len(at), embedded.shape[-1], generator=self._generator(pair), dtype=torch.float64)
                noisy[row, at] += (size * noise).to(embedded)
            return noisy

        with lens.edit(sites.EMBEDDING, add):
            yield

    def _generator(self, pair: Pair) -> torch.Generator:
        """Return the random generator of a pair, which does not depend on the other pairs."""
        digest = sha256(repr((self.seed, pair.clean)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


CLEAN_FIRST = DIRECTIONS[::-1]
"""The order of runs: clean first, because what the lens learns from the first run of a model must not come from a noisy run."""

TOKENS_AT_ONCE = 512
"""The largest number of tokens in a forward pass that several pairs share."""

KEPT, KEPT_SHARE = 2**30, 1 / 8
"""The largest number of bytes of runs kept for reuse, and the largest share of the free memory."""

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class PairRuns:
    """Both runs of one pair.

    Attributes:
        pair: the pair.
        first: the first position (or place) at which the runs can differ.
        wanted: the positions (or places) at which nodes are patched.
        ways: base and source by direction.
        bases: the base run for the engine, by direction, for each reading.
        found: results that the parts of the study have computed from the runs, by part.
    """

    pair: Pair
    first: int
    wanted: Wanted
    ways: Ways
    bases: Mapping[Direction, Sequence[BaseRun]]
    found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def deltas(self, swap: Swap, direction: Direction, reading: int) -> dict[str, Deltas]:
        """Return the deltas of a swap for a reading, by hook point, at token positions of the base run."""
        found, base = swap.at(direction, reading), self.ways[direction][0]
        if swap.by_token or not isinstance(base, Labelled):
            return found
        return {site: replace(deltas, position=base.tokens[deltas.position]) for site, deltas in found.items()}

    def tokens(self, direction: Direction, span: Sequence[int]) -> list[int]:
        """Return the token positions of the base run at some positions (or places)."""
        base = self.ways[direction][0]
        return base.tokens[list(span)].tolist() if isinstance(base, Labelled) else list(span)

    def once(self, part: Any, find: Callable[[], Found]) -> Found:
        """Return the result that a part computes from the runs; `find` is called only the first time."""
        if part not in self.found:
            self.found[part] = find()
        return self.found[part]


def chunks(pairs: Pairs) -> Iterator[list[int]]:
    """Yield the indices of pairs that run together."""
    return pairs.chunks(TOKENS_AT_ONCE)


@dataclass(frozen=True)
class Runner:
    """The settings with which pairs are run.

    Attributes:
        lens: the model.
        pairs: all pairs of the study.
        hooks: the hook points whose activations are kept.
        layers: the layers in which patches are made.
        wanted: the positions at which nodes are patched, by pair.
        readings: the readings of the metric, by pair.
        contrast: the choice of base and source runs.
        noise: the noise on the embeddings of the clean prompts that replaces the corrupted prompts, if any.
    """

    lens: Lens
    pairs: Pairs
    hooks: Sequence[str]
    layers: Sequence[int]
    wanted: Sequence[Wanted]
    readings: Mapping[int, Sequence[Reading]]
    contrast: Contrast
    noise: Noise | None

    @torch.no_grad()
    def run(self, some: tuple[int, ...]) -> list[PairRuns]:
        """Run the clean and the corrupted prompts of some equally long pairs."""
        read = {direction: self._read(direction, some, (), self.hooks) for direction in CLEAN_FIRST}
        return [
            self._pair(
                index,
                {way: Run({hook: values[slot] for hook, values in kept.items()}) for way, (kept, _) in read.items()},
                {way: {layer: values[slot] for layer, values in entries.items()} for way, (_, entries) in read.items()},
            )
            for slot, index in enumerate(some)
        ]

    def _pair(
        self, index: int, kept: Mapping[Direction, Run], entries: Mapping[Direction, Mapping[int, torch.Tensor]]
    ) -> PairRuns:
        pair = self.pairs[index]
        first = pair.first_difference if self.noise is None else min(self.noise.at(pair))
        first = 0 if self.contrast.everywhere or not self.lens.causal else first
        bases: dict[Direction, list[BaseRun]] = {direction: [] for direction in CLEAN_FIRST}
        for number, reading in enumerate(self.readings[index]):
            for direction in bases:
                resid = entries[direction]
                if reading.continuation:
                    _, longer = self._read(direction, (index,), reading.continuation, [])
                    resid = {layer: values[0] for layer, values in longer.items()}
                base = BaseRun(
                    name=f"pair {index} {direction}{f' reading {number}' if number else ''}",
                    tokens=torch.tensor(self._prompt(direction, pair) + reading.continuation),
                    resid=resid,
                    answer=self._answer(direction, pair) + len(reading.continuation),
                    correct=reading.correct,
                    wrong=reading.wrong,
                    clean=bases["noising"][number] if direction == "denoising" else None,
                )
                bases[direction].append(base)
        wanted = self.wanted[index]
        if self.labelled(pair):
            first, wanted, kept = self._places(pair, wanted, kept)
        return PairRuns(pair, first, wanted, self.contrast.ways(index, kept["noising"], kept["denoising"]), bases)

    def labelled(self, pair: Pair) -> bool:
        """Return whether the two runs of a pair correspond only at its labels."""
        return pair.by_label and self.noise is None and not self.contrast.everywhere

    def _places(self, pair: Pair, wanted: Wanted, kept: Mapping[Direction, Run]) -> tuple[int, Wanted, Mapping[Direction, Run]]:
        """Return the first place at which the runs can differ, the wanted places, and the runs at these places."""
        every = sorted({place for label in wanted for place in pair.places(str(label))})
        same = [(one, other) for one, other in every if one == other < pair.first_difference and self.lens.causal]
        places = same + [place for place in every if place not in same]
        number = {place: index for index, place in enumerate(places)}
        found = {label: [number[place] for place in pair.places(str(label))] for label in wanted}
        clean, corrupted = torch.tensor(places).T
        tokens = {"noising": clean, "denoising": corrupted}
        return len(same), found, {way: Labelled(run.activations, tokens[way]) for way, run in kept.items()}

    def _read(
        self, direction: Direction, some: tuple[int, ...], continuation: tuple[int, ...], hooks: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Run a direction's base prompts; return activations `[pairs, pos, ...]` by hook point, and layer inputs by layer."""
        tokens = torch.tensor([self._prompt(direction, self.pairs[index]) + continuation for index in some])
        if direction == "noising" or self.noise is None:
            return self.lens.read_entering(tokens, hooks, self.layers)
        with self.noise.added(self.lens, [self.pairs[index] for index in some]):
            return self.lens.read_entering(tokens, hooks, self.layers)

    def _answer(self, direction: Direction, pair: Pair) -> int:
        """Return the position at which a base run is read; prompts that are patched by label are read at their ends."""
        return len(self._prompt(direction, pair)) - 1 if pair.by_label else pair.answer_position

    def _prompt(self, direction: Direction, pair: Pair) -> tuple[int, ...]:
        return pair.corrupted if direction == "denoising" and self.noise is None else pair.clean


@dataclass
class Kept:
    """A cache of runs and of everything computed from them, limited by memory.

    The first groups of pairs are kept, because every sweep goes through all groups in the same order; the latest group is kept
    too.

    Attributes:
        run: a function that runs some pairs.
        traced: the largest number of bytes that the engine keeps per token of a run.
        room: the number of bytes that may still be kept, in addition to the latest group.
    """

    run: Callable[[tuple[int, ...]], list[PairRuns]]
    traced: int
    room: int
    _kept: dict[tuple[int, ...], list[PairRuns]] = field(default_factory=dict, init=False)
    _latest: tuple[int, ...] | None = field(default=None, init=False)

    def __call__(self, some: tuple[int, ...]) -> list[PairRuns]:
        """Return the runs of some pairs, from the cache if they are there."""
        if some not in self._kept:
            if self._latest is not None:
                size = self._size(self._kept[self._latest])  # measured now, because results computed from the runs count too
                if size > self.room:
                    del self._kept[self._latest]
                else:
                    self.room -= size
            self._latest, self._kept[some] = some, self.run(some)
        return self._kept[some]

    def _size(self, runs: Sequence[PairRuns]) -> int:
        tokens = sum(len(base.tokens) for run in runs for bases in run.bases.values() for base in bases)
        return held(runs) + self.traced * tokens


def held(what: Any) -> int:
    """Return the bytes of all tensors in nested dataclasses and containers."""
    if isinstance(what, torch.Tensor):
        return what.nbytes
    if isinstance(what, Mapping):
        what = what.values()
    elif is_dataclass(what):
        what = vars(what).values()
    elif not isinstance(what, (list, tuple)):
        return 0
    return sum(map(held, what))
