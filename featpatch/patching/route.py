"""Senders and receivers of paths, and the propagation of changes between them.

This is the first pass of path patching (Wang et al. 2022, Goldowsky-Dill et al. 2023): a sender is changed, the components
between it and the receiver are frozen at their values in the base run or recomputed, as the route says (`sites.ROUTES`), and
what then reaches the receiver is read. Norms are recomputed.

A receiver's new value is recorded in the first pass and patched into the base run in the second, so features that are inactive
in the base run can be receivers too. A query, key or value acts through its head's z, as in `components`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.engine.patches import Block
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens, added
from featpatch.nodes import LOGITS, Direction, Node
from featpatch.patching.changes import Part, blocks_of
from featpatch.patching.components import HeadPart, WholePart
from featpatch.patching.features import FeaturePart
from featpatch.patching.runs import PairRuns, Run
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.nodes import names_of, owner_of
from featpatch.sites import Route

Place = tuple[int, str]
"""A place in the residual stream: a layer, and `"pre"` (before its attention) or `"mid"` (between attention and MLP)."""


@dataclass(frozen=True)
class Stream:
    """Changes of the residual stream of one base run, one row per change, as they propagate downstream.

    Attributes:
        lens: the model.
        base: activations of the base run at every `resid_pre` and `attn_out` that the changes pass.
        tokens: token ids of the base run, `[pos]`.
        route: which components are recomputed; the others are frozen.
        entering: the place at which each change enters the residual stream.
        changes: the changes `[rows, pos, d_model]` where they enter, all on one device.
    """

    lens: Lens
    base: Run
    tokens: torch.Tensor
    route: Route
    entering: tuple[Place, ...]
    changes: Float[torch.Tensor, "rows pos d"]
    _at: dict[Place, torch.Tensor] = field(default_factory=dict, init=False)
    _read: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def reached(self, place: Place) -> Bool[torch.Tensor, " rows"]:
        """Return a mask of the changes that enter at the place or before it."""
        return torch.tensor([sites.order(entry) <= sites.order(place) for entry in self.entering])

    def at(self, place: Place) -> Float[torch.Tensor, "rows pos d"]:
        """Return how much each row changes the residual stream at a place; 0 for rows that enter later."""
        if self.route == "direct":
            return self.changes * self.reached(place).to(self.changes)[:, None, None]
        if place not in self._at:
            here = torch.tensor([entry == place for entry in self.entering]).to(self.changes)
            self._at[place] = self._below(place) + self.changes * here[:, None, None]
        return self._at[place]

    def read(self, hook: str) -> Float[torch.Tensor, "rows_and_base pos ..."]:
        """Return the activation at a hook point that reads the changed residual stream: first the base run's, then each row's.

        Attention in the hook point's own layer is part of the route if the hook point comes after it. The values of the last
        call are kept, because receivers often share a hook point.
        """
        if hook not in self._read:
            values = self._run_upto(hook)
            self._read.clear()
            self._read[hook] = values
        return self._read[hook]

    def _run_upto(self, hook: str) -> torch.Tensor:
        place = sites.seen_at(hook)
        change = torch.cat([torch.zeros_like(self.changes[:1]), self.at(place)])
        if sites.is_stream(hook):
            return added(self.base.at(hook), change)
        layer, attended = place[0], place[1] == "mid"
        below = torch.cat([torch.zeros_like(self.changes[:1]), self.at((layer, "pre"))]) if attended else change
        attention = sites.component(layer, "attn_out")
        put = {attention: added(self.base.at(attention), change - below)} if attended else {}
        return self.lens.through(layer, added(self.base.at(sites.resid_pre(layer)), below), self.tokens, hook, put)

    def _below(self, place: Place) -> torch.Tensor:
        """Return the change that arrives from the place before, with that of the component in between if it is recomputed."""
        layer, where = place
        before, name = ((layer, "pre"), "attn_out") if where == "mid" else ((layer - 1, "mid"), "mlp_out")
        if sites.order(place) <= min(map(sites.order, self.entering)):
            return torch.zeros_like(self.changes)
        change, component = self.at(before), sites.component(before[0], name)
        absent = name == "mlp_out" and self.lens.attention_only
        if name not in sites.ROUTES[self.route] or absent or not bool(self.reached(before).any()):
            return change
        outputs = self.read(component)
        return change + (outputs[1:] - outputs[0]).to(change.device)


@dataclass(frozen=True, eq=False)
class Receiver(ABC):
    """A node that reads the residual stream.

    Attributes:
        node: the node.
        reads: the hook points from which the receiver's new value is computed.
        writes: the hook point at which the receiver's change is patched.
    """

    node: Node
    reads: tuple[str, ...]
    writes: str

    @property
    def place(self) -> Place:
        """The last place in the residual stream that the receiver depends on."""
        return max((sites.seen_at(hook) for hook in self.reads), key=sites.order)

    def sees(self, site: str) -> bool:
        """Return whether the receiver reads what is written at a hook point."""
        return any(sites.reaches(site, hook) for hook in self.reads)

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations in the base run the receiver needs."""
        layers = {sites.layer_of(hook) for hook in self.reads if not sites.is_stream(hook)}
        return {*self.reads, self.writes, *map(sites.resid_pre, layers)}

    @abstractmethod
    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of the flat activation at `writes` for some changes of the residual stream, `[rows, pos, d]`.

        Args:
            stream: the changes of the residual stream.
            rows: the rows of `stream.read` to use; row 0 is the base run.
            where: mask `[pos]` of the positions at which the receiver takes its new value.
        """


class WholeReceiver(Receiver):
    """A whole activation: an MLP's output, a layer's attention output, the residual stream or, after the last layer, logits."""

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of the activation."""
        values = stream.read(self.writes).flatten(2)
        return (values[rows] - values[0]) * where[:, None].to(values)


@dataclass(frozen=True, eq=False)
class CodeReceiver(Receiver):
    """A feature of a dictionary, or the dictionary's error term."""

    dictionary: Dictionary

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return what the feature's new value adds along its direction, or how the error changes."""
        read = stream.read(self.dictionary.reads)
        if self.node.index is None:
            error = self.dictionary.split({self.dictionary.reads: read, self.writes: stream.read(self.writes)}).error
            return (error[rows] - error[0]) * where[:, None].to(error)
        written = stream.base.at(self.writes)[None]
        split = self.dictionary.split({self.writes: written.expand(len(read), *written.shape[1:]), self.dictionary.reads: read})
        feature = torch.tensor([self.node.index])
        value = split.features[rows, :, self.node.index] - split.features[0, :, self.node.index]
        if self.dictionary.behaviour.scaled:
            value = value * self.dictionary.gains(stream.base.split(self.dictionary, 0))
        return (value * where.to(value))[..., None] * self.dictionary.directions(feature)[0]


@dataclass(frozen=True, eq=False)
class HeadReceiver(Receiver):
    """An attention head: its query, key or value or, at `hook_z`, all three together."""

    lens: Lens
    head: int

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of z of the heads that use the value; for a key or value, at all positions that attend to it.

        Several heads use a shared key or value, and all heads do if one norm covers the queries or keys of all (OLMo 2).
        """
        (hook,) = self.reads
        values = torch.cat([stream.read(hook)[:1], stream.read(hook)[rows]])
        changed = values[:1].repeat(len(values), *[1] * (values.dim() - 1))
        at = where.nonzero()[:, 0].to(values.device)
        changed[:, at, self.head] = values[:, at, self.head]
        if hook == self.writes:
            z = changed
        else:
            layer = sites.layer_of(hook)
            z = self.lens.through(
                layer, stream.base.at(sites.resid_pre(layer))[None], stream.tokens, self.writes, {hook: changed}
            )
        return (z[1:] - z[:1]).flatten(2)


def receiver_of(lens: Lens, node: Node, found: Sequence[Dictionary]) -> Receiver:
    """Return the receiver for a node.

    Raises:
        FeatpatchError: no path can end at the node, or its dictionary is not among those given.
    """
    if node == LOGITS:
        last = sites.resid_post(lens.n_layers - 1)
        return WholeReceiver(node, (last,), last)
    owner = owner_of(node, found)
    if owner is not None and node.kind in ("feature", "error"):
        if node.kind == "feature" and not owner.behaviour.linear:
            raise FeatpatchError(
                f"receiver {str(node)!r}: expected a feature of a dictionary with a linear decoder; leave this receiver out"
            )
        both = tuple(dict.fromkeys((owner.reads, owner.writes)))
        return CodeReceiver(node, (owner.reads,) if node.kind == "feature" else both, owner.writes, owner)
    site = lens.site(node.site)
    z = sites.component(sites.layer_of(site), "z")
    if node.kind == "activation" and sites.entry(site) is not None:
        return WholeReceiver(node, (site,), site)
    if node.kind == "head" and (site == z or sites.is_component(site, "q", "k", "v")) and node.index is not None:
        return HeadReceiver(node, (site,), z, lens, node.index)
    raise FeatpatchError(
        f"receiver {str(node)!r}: expected a feature or error of {names_of(found)}, a head at hook_q, hook_k, hook_v "
        "or hook_z, a whole activation such as hook_mlp_out, or 'logits'"
    )


@dataclass(frozen=True, eq=False)
class Senders:
    """Nodes that write to the residual stream.

    Attributes:
        lens: the model.
        nodes: the nodes.
        parts: the parts of a study that cover the nodes.
    """

    lens: Lens
    nodes: Sequence[Node]
    parts: Sequence[Part]

    @classmethod
    def of(cls, lens: Lens, nodes: Sequence[Node], found: Sequence[Dictionary]) -> "Senders":
        """Make senders of nodes: features and errors of these dictionaries, heads (at `hook_z`) and whole activations.

        Raises:
            FeatpatchError: a node has another kind or hook point, or its dictionary is not among those given.
        """
        by_name = {dictionary.name: dictionary for dictionary in found}
        parts: dict[tuple[str, str], Part] = {}
        for node in nodes:
            site = by_name[node.sae].writes if node.sae in by_name else lens.site(node.site)
            if site != node.site or sites.entry(site) is None:
                raise FeatpatchError(
                    f"sender {str(node)!r} does not write to the residual stream: expected a feature or error of "
                    f"{names_of(found)}, a head at hook_z, or a whole activation such as hook_mlp_out"
                )
            if node.kind in ("feature", "error", "all_features") and node.sae in by_name:
                parts["sae", node.sae] = FeaturePart([by_name[node.sae]], frozenset(n for n in nodes if n.sae == node.sae))
            elif node.kind == "activation":
                parts["whole", site] = WholePart([site])
            elif node.kind == "head" and sites.is_component(site, "z"):
                parts["heads", site] = HeadPart(lens, sites.layer_of(site), "z")
            else:
                raise FeatpatchError(
                    f"sender {str(node)!r}: expected a feature or error of {names_of(found)} with the SAE's name in the "
                    "node, a head at hook_z, or a whole activation"
                )
        return cls(lens, nodes, list(parts.values()))

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations the senders need."""
        return {hook for part in self.parts for hook in part.hooks}

    @property
    def lowest(self) -> int:
        """The first layer that a change of a sender enters."""
        return min(place[0] for site in {node.site for node in self.nodes} if (place := sites.entry(site)))

    def blocks(self, run: PairRuns) -> list[Block]:
        """Return patches of the senders that differ between the runs of a pair."""
        return blocks_of(self.parts, run, self.nodes)

    def streams(self, run: PairRuns, route: Route) -> tuple[list[Node], dict[Direction, Stream]]:
        """Return the senders that differ between the runs of a pair, and their changes of the residual stream by direction."""
        blocks, streams = self.blocks(run), {}
        nodes: list[Node] = []
        for way, (base, _) in run.ways.items():
            patched = run.bases[way][0]
            tokens, sent = patched.tokens, [block for block in blocks if block.run is patched]
            nodes = [node for block in sent for node in block.nodes]
            changes: list[torch.Tensor] = []
            entering: list[Place] = []
            for block in sent:
                ((site, deltas),) = block.deltas.items()  # a sender writes at one hook point
                entering += [place for place in [sites.comes_in(site)] if place] * len(block)
                changes.append(self._on_stream(site, deltas.dense(len(tokens)), base, tokens).to(self.lens.device))
            if not changes:
                changes = [torch.zeros(0, len(tokens), self.lens.d_model, device=self.lens.device)]
            streams[way] = Stream(self.lens, base, tokens, route, tuple(entering), torch.cat(changes))
        return nodes, streams

    def _on_stream(self, site: str, change: torch.Tensor, base: Run, tokens: torch.Tensor) -> torch.Tensor:
        """Turn a change of heads' z into the change of what attention adds to the residual stream; return others unchanged."""
        if not sites.is_component(site, "z"):
            return change
        layer, z = sites.layer_of(site), base.at(site)
        rows = torch.cat([torch.zeros_like(change[:1]), change])
        resid, attention = base.at(sites.resid_pre(layer))[None], sites.component(layer, "attn_out")
        outputs = self.lens.through(layer, resid, tokens, attention, {site: added(z.flatten(1), rows)})
        return outputs[1:] - outputs[0]
