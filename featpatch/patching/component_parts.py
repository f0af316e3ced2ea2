"""Components as parts of a study: whole sites, heads, what is inside attention, neurons.

A head's z adds to the stream through W_O, so that a change of it is a change at `hook_z`. A query, a key, a value or a row of
the pattern acts through its head's z alone: the block is run by itself with the value exchanged, and what comes out at `hook_z`
is patched there (the same patch, at a site from which the rest of the model is run fast).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool

from featpatch import sites
from featpatch.engine import Deltas
from featpatch.lens import Dictionary, Lens
from featpatch.patch import Direction, Node, Position
from featpatch.patching.difference import Difference, whole_change
from featpatch.patching.part import Part, count_whole
from featpatch.patching.run import Run
from featpatch.patching.runs import PairRuns
from featpatch.patching.swaps import Directions, Swaps, feature_swaps, whole_swaps

ROWS = 4096
"""Positions that go through one block together."""


@dataclass(frozen=True, eq=False)
class WholePart(Part):
    """Whole activations."""

    whole: Sequence[str]

    @property
    def hooks(self) -> set[str]:
        """The sites themselves."""
        return set(self.whole)

    @property
    def sites(self) -> list[str]:
        """The sites themselves."""
        return list(self.whole)

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """Site by site."""
        return [
            [whole_swaps(site, "activation", whole_change(site, run.ways, run.first), run.wanted) for site in self.whole]
            for run in runs
        ]

    def count(self, run: PairRuns) -> int:
        """As many as sites and positions that differ."""
        return sum(count_whole(whole_change(site, run.ways, run.first), run.wanted) for site in self.whole)


@dataclass(frozen=True)
class Exchange:
    """One value inside attention that is exchanged: those of a head at some positions."""

    node: Node
    span: Sequence[int]
    head: int
    source: int | None = None


@dataclass(frozen=True, eq=False)
class HeadPart(Part):
    """What attention heads hold at one hook of a block, head by head.

    Attributes:
        name: one of `sites.COMPONENTS` inside attention.
    """

    lens: Lens
    layer: int
    name: str

    @property
    def hooks(self) -> set[str]:
        """Its own, and `hook_z`, at which its changes are added."""
        return {self._z, self._read}

    @property
    def sites(self) -> list[str]:
        """`hook_z` alone."""
        return [self._z]

    def count(self, run: PairRuns) -> int:
        """As many as heads and positions that differ."""
        return len(list(self._exchanges(run)))

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """One for each pair."""
        exchanges = [list(self._exchanges(run)) for run in runs]
        changed: dict[Direction, list[list[torch.Tensor]]] = {
            way: [self._changed(run, of_pair, way) for run, of_pair in zip(runs, exchanges, strict=True)]
            for way in runs[0].ways
        }
        found: list[list[Swaps]] = []
        for slot, of_pair in enumerate(exchanges):
            nodes, deltas = tuple(exchange.node for exchange in of_pair), {way: values[slot] for way, values in changed.items()}
            found.append([Swaps(self._z, nodes, {way: _deltas(of_way) for way, of_way in deltas.items()})] if nodes else [])
        return found

    @property
    def _z(self) -> str:
        return sites.component(self.layer, "z")

    @property
    def _read(self) -> str:
        """`hook_result` is z through W_O, so that it is enough to read z."""
        return self._z if self.name == "result" else sites.component(self.layer, self.name)

    @property
    def _inside(self) -> bool:
        return self._read != self._z

    def _exchanges(self, run: PairRuns) -> Iterator[Exchange]:
        """Every head and requested position at which something differs."""
        differs = self._differing(run)
        site = sites.component(self.layer, self.name)
        for head in range(differs.shape[1]):
            for position, span in run.wanted.items():
                for name, source, at in self._places(run, position, span):
                    rows = differs[at, head]
                    if bool((rows if source is None else rows[:, source]).any()):
                        yield Exchange(Node(site, "head", head, name), at, head, source)

    def _places(self, run: PairRuns, position: Position, span: list[int]) -> Iterator[tuple[Position, int | None, list[int]]]:
        """The position itself, or, for entries of the pattern, itself with every source position."""
        if self.name != "pattern_entry":
            yield position, None, span
            return
        for name, sources in run.wanted.items():
            for source in sources:
                yield f"{position} <- {name}", source, span

    def _differing(self, run: PairRuns) -> Bool[torch.Tensor, "pos heads ..."]:
        """Where base and source differ; for patterns by source position too, else in any coordinate."""
        base, source = next(iter(run.ways.values()))
        differs = self._by_position(source) != self._by_position(base)
        differs[: run.first] = False
        return (differs if self.name == "pattern_entry" else differs.any(-1)).cpu()

    def _by_position(self, run: Run) -> torch.Tensor:
        """`[pos, heads, ...]`; a pattern has its heads first."""
        values = run.at(self._read)
        return values.transpose(0, 1) if self.name.startswith("pattern") else values

    def _changed(self, run: PairRuns, exchanges: list[Exchange], way: Direction) -> list[torch.Tensor]:
        """How z `[pos, heads x d_head]` changes with each exchange."""
        base, source = run.ways[way]
        if not self._inside:
            change = source.at(self._z) - base.at(self._z)
            return [_at(change, exchange.span, [exchange.head]) for exchange in exchanges]
        found: list[torch.Tensor] = []
        for some in _portions(exchanges, ROWS // len(run.pair)):
            z = self._z_with(run, way, torch.stack([self._exchanged(base, source, exchange) for exchange in some]))
            for exchange, of_patch in zip(some, z, strict=True):
                found.append(_at(of_patch - base.at(self._z), self._reach(run, exchange), self._readers(exchange.head)))
        return found

    def _z_with(self, run: PairRuns, way: Direction, values: torch.Tensor) -> torch.Tensor:
        """`hook_z` of the base run's block `[rows, pos, heads, d_head]` with these values at the hook inside it."""
        base = run.bases[way][0]
        resid = base.resid[self.layer].expand(len(values), -1, -1)
        tokens = base.tokens.expand(len(values), -1)
        with self.lens.edit(self._read, lambda activation: values):
            return self.lens.through(self.layer, resid, tokens, self._z)

    def _exchanged(self, base: Run, source: Run, exchange: Exchange) -> torch.Tensor:
        """The base run's activation with the exchanged values."""
        values, new = (run.at(self._read) for run in (base, source))
        mask = torch.zeros_like(values, dtype=torch.bool)
        by_position = mask.transpose(0, 1) if self.name.startswith("pattern") else mask
        where = by_position[:, exchange.head]
        if exchange.source is None:
            where[exchange.span] = True
        else:
            where[exchange.span, exchange.source] = True
        return torch.where(mask, new, values)

    def _reach(self, run: PairRuns, exchange: Exchange) -> Sequence[int]:
        """Where z can change: at the positions themselves, for keys and values at those that see them too."""
        if self.name not in ("k", "v"):
            return exchange.span
        return range(min(exchange.span) if self.lens.causal else 0, len(run.pair))

    def _readers(self, head: int) -> list[int]:
        """The heads that use a head of this hook: several where keys and values are shared."""
        if self.name not in ("k", "v"):
            return [head]
        return list(range(head * self._shared, (head + 1) * self._shared))

    @cached_property
    def _shared(self) -> int:
        """Heads that share one key and value."""
        activations = self.lens.read(torch.zeros(1, 1, dtype=torch.long), [self._z, self._read])
        return activations[self._z].shape[2] // activations[self._read].shape[2]


@dataclass(frozen=True, eq=False)
class NeuronPart(Part):
    """Every neuron of an MLP alone, by a dictionary whose features they are."""

    dictionary: Dictionary

    @property
    def hooks(self) -> set[str]:
        """Those that the dictionary reads and writes."""
        return {self.dictionary.reads, self.dictionary.writes}

    @property
    def sites(self) -> list[str]:
        """The one that it writes."""
        return [self.dictionary.writes]

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """Position by position."""
        found = [Difference.of(self.dictionary, run.ways, run.first) for run in runs]
        directions = Directions.of(self.dictionary, found)
        return [
            feature_swaps(difference, run.wanted, directions, self.dictionary.writes, self._naming)
            for run, difference in zip(runs, found, strict=True)
        ]

    def count(self, run: PairRuns) -> int:
        """As many as neurons and positions that differ."""
        base, source = (both.at(self.dictionary.reads) for both in next(iter(run.ways.values())))
        differs = base != source
        differs[: run.first] = False
        return sum(int(differs[span].any(0).sum()) for span in run.wanted.values())

    def _naming(self, neuron: int, position: Position) -> Node:
        return Node(self.dictionary.reads, "neuron", neuron, position)


def _at(change: torch.Tensor, positions: Sequence[int], heads: Sequence[int]) -> torch.Tensor:
    """The change `[pos, heads, d_head]` at these positions and heads alone, flat."""
    kept = torch.zeros_like(change)
    at = torch.tensor(list(positions), device=change.device)[:, None], torch.tensor(list(heads), device=change.device)
    kept[at] = change[at]
    return kept.flatten(1)


def _deltas(changes: list[torch.Tensor]) -> Deltas:
    """One patch for each change, of the positions at which it isn't 0."""
    where = [(change != 0).any(1).nonzero()[:, 0] for change in changes]
    patch = torch.arange(len(changes)).repeat_interleave(torch.tensor([len(rows) for rows in where]))
    values = torch.cat([change[rows] for change, rows in zip(changes, where, strict=True)])
    return Deltas.explicit(patch, torch.cat(where).cpu(), values, len(changes))


def _portions(exchanges: list[Exchange], size: int) -> Iterator[list[Exchange]]:
    for start in range(0, len(exchanges), max(1, size)):
        yield exchanges[start : start + max(1, size)]
