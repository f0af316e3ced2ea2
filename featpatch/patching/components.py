"""Studies of components: heads, their queries, keys, values and patterns, MLPs, neurons and the residual stream.

A head's output z is added to the residual stream through W_O, so it is patched at `hook_z`. A query, key, value or row of the
attention pattern acts only through z. Its layer is therefore run alone with the value exchanged, and the resulting change is
patched at `hook_z`: the effect is the same, and the rest of the model can be resumed quickly from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from typing_extensions import Unpack

from featpatch.components import ARROW, check_components_and_layers
from featpatch.engine.patches import Block, Deltas
from featpatch.errors import FeatpatchError
from featpatch.model.lens import ROWS, Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Direction, Node, Position
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.changes import (
    Part,
    Patches,
    as_blocks,
    count_whole,
    feature_patches,
    whole_change,
    whole_patches,
    with_directions,
)
from featpatch.patching.features import DictionaryPart
from featpatch.patching.runs import PairRuns
from featpatch.patching.study import Options, Study
from featpatch.sae.baselines import identity, neurons
from featpatch.sae.dictionary import dictionaries
from featpatch.sites import WHOLE, component


@dataclass(frozen=True, eq=False)
class WholePart(Part):
    """The whole activations at some hook points.

    Attributes:
        whole: the hook points.
    """

    whole: Sequence[str]

    @property
    def hooks(self) -> set[str]:
        """The hook points that are patched."""
        return set(self.whole)

    @property
    def sites(self) -> list[str]:
        """The hook points that are patched."""
        return list(self.whole)

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair by hook point."""
        return [[block for site in self.whole for block in as_blocks(run, *self._patches(run, site))] for run in runs]

    @staticmethod
    def _patches(run: PairRuns, site: str) -> Patches:
        return whole_patches(run.wanted, site, "activation", {site: whole_change(site, run.ways, run.first)})

    def count(self, run: PairRuns) -> int:
        """Return the number of hook points and positions at which the runs differ."""
        return sum(count_whole({site: whole_change(site, run.ways, run.first)}, run.wanted) for site in self.whole)


@dataclass(frozen=True)
class Exchange:
    """A value of one attention head that is exchanged at some positions.

    Attributes:
        node: the node that names the value.
        span: the positions at which it is exchanged.
        head: the index of the head.
        source: for an entry of the attention pattern, the attended positions; otherwise None.
    """

    node: Node
    span: Sequence[int]
    head: int
    source: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class HeadPart(Part):
    """The attention heads of one layer at one hook point.

    Attributes:
        lens: the model.
        layer: the layer.
        name: the hook point, as one of `sites.COMPONENTS` inside attention.
    """

    lens: Lens
    layer: int
    name: str

    @property
    def hooks(self) -> set[str]:
        """The hook point of the values, and `hook_z`, at which the changes are added."""
        return {self._z, self._read}

    @property
    def sites(self) -> list[str]:
        """The hook point that is patched, `hook_z`."""
        return [self._z]

    def count(self, run: PairRuns) -> int:
        """Return the number of heads and positions at which the runs differ."""
        return len(list(self._exchanges(run)))

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair."""
        return [self._of_pair(run) for run in runs]

    def _of_pair(self, run: PairRuns) -> list[Block]:
        exchanges = list(self._exchanges(run))
        if not exchanges:
            return []
        longer = self._seen_later and any(len(base.tokens) > len(run.pair) for base in run.bases["noising"])
        deltas = {
            way: [self._deltas(run, exchanges, way, reading) for reading in range(len(run.bases[way]) if longer else 1)]
            for way in run.ways
        }
        return as_blocks(run, tuple(exchange.node for exchange in exchanges), {self._z: deltas}, by_token=True)

    @property
    def _z(self) -> str:
        return component(self.layer, "z")

    @property
    def _read(self) -> str:
        """The hook point that is read; z for `hook_result`, which is z times W_O."""
        return self._z if self.name == "result" else component(self.layer, self.name)

    @property
    def _inside(self) -> bool:
        return self._read != self._z

    def _exchanges(self, run: PairRuns) -> Iterator[Exchange]:
        """Yield an exchange for every head and requested position at which the runs differ."""
        differs = self._differing(run)
        site = component(self.layer, self.name)
        for head in range(differs.shape[1]):
            for position, span in run.wanted.items():
                for name, source, at in self._places(run, position, span):
                    rows = differs[at, head]
                    if bool((rows if source is None else rows[:, source]).any()):
                        yield Exchange(Node(site, "head", head, name), at, head, source)

    def _places(
        self, run: PairRuns, position: Position, span: list[int]
    ) -> Iterator[tuple[Position, list[int] | None, list[int]]]:
        """Yield the name, attended positions (None if not a pattern entry) and token positions of each node at a position."""
        if self.name != "pattern_entry":
            yield position, None, span
            return
        for name, sources in run.wanted.items():
            yield f"{position}{ARROW}{name}", sources, span

    def _differing(self, run: PairRuns) -> Bool[torch.Tensor, "pos heads ..."]:
        """Return a mask `[pos, heads]` of where base and source differ; for pattern entries `[pos, heads, attended pos]`."""
        base, source = next(iter(run.ways.values()))
        differs = self._by_position(source.at(self._read)) != self._by_position(base.at(self._read))
        differs[: run.first] = False
        return (differs if self.name == "pattern_entry" else differs.any(-1)).cpu()

    def _by_position(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of a run as `[pos, heads, ...]`; patterns, whose heads come first, are transposed."""
        return values.transpose(0, 1) if self.name.startswith("pattern") else values

    def _deltas(self, run: PairRuns, exchanges: list[Exchange], way: Direction, reading: int) -> Deltas:
        """Return how each exchange changes `hook_z` in the prompt of a reading."""
        size = max(1, ROWS // len(run.bases[way][reading].tokens))
        parts = [exchanges[start : start + size] for start in range(0, len(exchanges), size)]
        return Deltas.joined([Deltas.nonzero(self._changes(run, part, way, reading)) for part in parts])

    def _changes(
        self, run: PairRuns, exchanges: list[Exchange], way: Direction, reading: int
    ) -> Float[torch.Tensor, "rows pos width"]:
        """Return how each exchange changes `hook_z`, flat; exactly 0 where the exchange cannot change it."""
        exchanged = self._exchanged(run, way, exchanges)
        if not self._inside:
            before, after = run.ways[way][0].activations[self._z], exchanged
        else:
            before = self._z_with(run, way, reading, run.ways[way][0].activations[self._read][None])[0]
            after = self._z_with(run, way, reading, exchanged)
        places = [
            (row, at, head)
            for row, exchange in enumerate(exchanges)
            for at in self._reach(run.tokens(way, exchange.span), len(before))
            for head in self._readers(exchange.head)
        ]
        reach = torch.zeros(len(exchanges), *before.shape[:2], dtype=torch.bool, device=before.device)
        reach[tuple(torch.tensor(places).T.to(before.device))] = True
        return ((after - before) * reach[..., None]).flatten(2)

    def _z_with(self, run: PairRuns, way: Direction, reading: int, values: torch.Tensor) -> torch.Tensor:
        """Run a layer of a base run with these values of the prompt in its attention; return z `[rows, pos, heads, d_head]`."""
        base = run.bases[way][reading]
        resid = base.resid[self.layer].expand(len(values), -1, -1)

        def put(activation: torch.Tensor) -> torch.Tensor:
            if activation.shape == values.shape:
                return values
            return torch.cat([values, activation[:, values.shape[1] :]], dim=1)

        with self.lens.edit(self._read, put):
            return self.lens.through(self.layer, resid, base.tokens, self._z)

    def _exchanged(self, run: PairRuns, way: Direction, exchanges: list[Exchange]) -> torch.Tensor:
        """Return the base run's activation with the values of each exchange, one row per exchange."""
        base, source = run.ways[way]
        new = self._by_position(source.at(self._read))
        values = self._by_position(base.activations[self._read]).repeat(len(exchanges), *[1] * new.ndim)
        places = [
            (row, token, place, exchange.head, *end)
            for row, exchange in enumerate(exchanges)
            for place, token in zip(exchange.span, run.tokens(way, exchange.span), strict=True)
            for end in ([()] if exchange.source is None else [(attended,) for attended in exchange.source])
        ]
        row, token, place, head, *attended = torch.tensor(places).T.to(new.device)
        into, of = (row, token, head, *attended), (place, head, *attended)
        values[into] = new[of]
        return values.transpose(1, 2) if self.name.startswith("pattern") else values

    @property
    def _seen_later(self) -> bool:
        """Whether other positions use the values, which is so for keys and values but not for queries and patterns."""
        return self.name in ("k", "v")

    def _reach(self, span: Sequence[int], length: int) -> Sequence[int]:
        """Return the positions at which z can change: those of the exchange or, for keys and values, all that see them."""
        if not self._seen_later:
            return span
        return range(min(span) if self.lens.causal else 0, length)

    def _readers(self, head: int) -> list[int]:
        """Return the heads that use a query, key or value: several if keys and values are shared."""
        return list(range(head * self._shared, (head + 1) * self._shared)) if self._seen_later else [head]

    @property
    def _shared(self) -> int:
        """The number of heads that share one key and value."""
        return self.lens.heads(self._z) // self.lens.heads(self._read)


@dataclass(frozen=True, eq=False)
class NeuronPart(DictionaryPart):
    """Each neuron of an MLP, as a feature of a dictionary of neurons."""

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair by requested position."""
        found = with_directions([self.difference(run) for run in runs])
        return [
            [block for patches in feature_patches(each, run.wanted, self._naming) for block in as_blocks(run, *patches)]
            for each, run in zip(found, runs, strict=True)
        ]

    def count(self, run: PairRuns) -> int:
        """Return the number of neurons and requested positions at which the runs differ."""
        base, source = (both.at(self.dictionary.reads) for both in next(iter(run.ways.values())))
        differs = base != source
        differs[: run.first] = False
        return sum(int(differs[span].any(0).sum()) for span in run.wanted.values())

    def _naming(self, neuron: int, position: Position) -> Node:
        return Node(self.dictionary.reads, "neuron", neuron, position)


def component_study(
    model: Any, pairs: Pairs, sites: str | Sequence[str], layers: Sequence[int] | None, **options: Unpack[Options]
) -> Study:
    """Return the validated experiment that `rank_components` runs with these arguments."""
    check_pairs(pairs, by_label=True, model=model)
    lens = wrap(model)
    parts, about = component_parts(lens, sites, layers, options.get("positions", "all"))
    labelled = next((index for index, pair in enumerate(pairs) if pair.by_label and options.get("noise") is None), None)
    patterns = [name for name in about["components"] if name.startswith("pattern")]
    if labelled is not None and patterns:
        raise FeatpatchError(
            f"sites={patterns} with pair {labelled}, which is patched label by label: expected prompts of equal length, "
            "because a pattern has an entry for every token; use 'q', 'k', 'v' or 'z'"
        )
    return Study.of(lens, parts, about, pairs, **options)


def component_parts(
    lens: Lens, sites: str | Sequence[str], layers: Sequence[int] | None, positions: Positions
) -> tuple[list[Part], dict[str, Any]]:
    """Return the parts of a study that cover these components, and the metadata to store with the results.

    Raises:
        FeatpatchError: a component or layer is unknown or absent from the model, or pattern entries are asked for at several
            positions together.
    """
    names, chosen = check_components_and_layers(sites, layers, positions, lens.n_layers)
    whole = [lens.site(component(layer, name)) for name in names if name in WHOLE for layer in chosen]
    parts: list[Part] = [WholePart(whole)] if whole else []
    for name in names:
        for layer in chosen:
            if name == "neurons":
                parts.append(neuron_part(lens, layer))
            elif name not in WHOLE:
                lens.site(component(layer, "z" if name == "result" else name))
                parts.append(HeadPart(lens, layer, name))
    return parts, {"components": names, "layers": chosen}


def neuron_part(lens: Lens, layer: int) -> NeuronPart:
    """Return the neurons of a layer, with W_out as decoder or, if the MLP's output is not that, as coordinates (slower)."""
    try:
        made = neurons(lens.model, layer)
    except FeatpatchError:
        made = identity(lens.model, component(layer, "neurons"))
    return NeuronPart(dictionaries(lens, made)[0])
