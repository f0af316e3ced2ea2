"""Senders and receivers of a model, and the edges between them in the order of the forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise, product

import numpy as np
from numpy.typing import NDArray

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING
from featpatch.circuits.graph import Graph
from featpatch.circuits.mediators import Mediators, Place
from featpatch.circuits.regions import Regions
from featpatch.model.projections import INSIDE
from featpatch.nodes import LOGITS, Edge, Node


@dataclass(eq=False, repr=False)
class EdgeLayout(Graph):
    """The edges between a model's components and mediators.

    Attributes:
        mediators: the mediators, by place.
        regions: the regions of the prompts; an edge in each of them is an item of its own.
    """

    mediators: Mapping[Place, Mediators] = field(default_factory=dict)
    regions: Regions = field(default_factory=Regions)

    def __post_init__(self) -> None:
        self.lens.shapes(sites.component(layer, name) for layer in range(self.lens.n_layers) for name in (*INSIDE, "z"))
        self._layout = self._lay_out()
        self._edges = [
            Edge.of(replace(sender, position=region), replace(receiver, position=region)) if self.regions.given
            else Edge.of(sender, receiver)
            for receiver, sent in self._layout.items() for sender in sent for region in self.regions.names
        ]  # fmt: skip
        self.items = tuple(self._edges)
        self._starts, start = dict[Node, int](), 0
        for receiver, sent in self._layout.items():
            self._starts[receiver], start = start, start + len(sent) * len(self.regions.names)

    def receivers(self) -> list[Node]:
        """Return the receivers in the order of the forward pass."""
        return list(self._layout)

    def senders(self, receiver: Node) -> list[Node]:
        """Return the senders of a receiver, in the order of the forward pass."""
        return list(self._layout[receiver])

    def components(self) -> list[tuple[Node, ...]]:
        """Return the embedding, the heads of each layer, the MLPs, and the mediators of each place."""
        found: dict[tuple[str, str], dict[Node, None]] = {}
        for sender in (sender for sent in self._layout.values() for sender in sent):
            found.setdefault((sender.site, sender.sae), {})[sender] = None
        return [tuple(group) for group in found.values()]

    @property
    def candidates(self) -> tuple[Node, ...]:
        """The features and errors that are mediators."""
        return tuple(node for group in self.mediators.values() for node in group.named)

    def _lay_out(self) -> dict[Node, tuple[Node, ...]]:
        """Map each receiver to its senders, in the order of the forward pass."""
        found: dict[Node, tuple[Node, ...]] = {}

        def through(place: Place, sent: tuple[Node, ...]) -> tuple[Node, ...]:
            if place not in self.mediators:
                return sent
            found.update(dict.fromkeys(self.mediators[place].nodes, sent))
            return self.mediators[place].nodes

        sent: tuple[Node, ...] = (EMBEDDING,)
        for layer in range(self.lens.n_layers):
            sent = through((layer, "pre"), sent)
            for name in INSIDE:
                found |= dict.fromkeys(self._heads_at(layer, name), sent)
            heads = through((layer, "attn"), through((layer, "z"), tuple(self._heads_at(layer, "z"))))
            mid = through((layer, "mid"), (*sent, *heads))
            if not self.lens.attention_only:
                mlp = self._mlp(layer)
                found |= dict.fromkeys(mlp, sent if self.lens.parallel else mid)
                mid = (*mid, *mlp)
            sent = mid
        return found | {LOGITS: through((self.lens.n_layers, "pre"), sent)}

    def _heads_at(self, layer: int, name: str) -> list[Node]:
        return [Node(sites.component(layer, name), "head", head) for head in range(self.heads(layer, name))]

    def _mlp(self, layer: int) -> tuple[Node, ...]:
        group = self.mediators.get((layer, "mlp"))
        return group.nodes if group else (Node(sites.component(layer, "mlp_out"), "activation"),)

    def heads(self, layer: int, name: str) -> int:
        """Return the number of heads at a hook point of a layer's attention."""
        return self.lens.heads(sites.component(layer, name))

    def depth(self, receiver: Node) -> tuple[int, str]:
        """Return the layer and the place in it at which a receiver reads the residual stream."""
        if receiver == LOGITS:
            return self.lens.n_layers, "pre"
        layer, place = sites.seen_at(receiver.site)
        return layer, "pre" if self.lens.parallel else place

    def users(self, receiver: Node) -> list[Node]:
        """Return the heads that use a query, key or value, or the receiver itself.

        Several heads may share keys and values, and a key or value in one region is used by heads in all regions.
        """
        if receiver.kind != "head" or not sites.is_component(receiver.site, *INSIDE):
            return [receiver]
        layer, name = sites.layer_of(receiver.site), receiver.site[-1]
        shared, first = self.heads(layer, "z") // self.heads(layer, name), int(receiver.index or 0)
        positions = [receiver.position] if name == "q" else self.regions.names
        heads = range(first * shared, (first + 1) * shared)
        return [Node(sites.component(layer, "z"), "head", head, position) for position, head in product(positions, heads)]

    def pruned(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return masks without edges whose sender is not reached from the embedding, or whose receiver can't reach the logits.

        These are the edges that EAP-IG's `Graph.prune` removes. A head is reached through any of its query, key and value.
        """
        ends = [edge.receiver for edge in self._edges if edge.receiver.site == LOGITS.site]
        number = {node: n for n, node in enumerate(dict.fromkeys([*(edge.sender for edge in self._edges), *ends]))}
        senders = np.array([number[edge.sender] for edge in self._edges])
        starts = [next(of_receiver)[0] for _, of_receiver in groupby(enumerate(self._edges), key=lambda item: item[1].receiver)]
        parts = [(slice(*ends), [number[user] for user in self.users(self._edges[ends[0]].receiver) if user in number])
                 for ends in pairwise([*starts, len(self._edges)])]  # fmt: skip
        reached, leads = (np.zeros((len(masks), len(number)), dtype=bool) for _ in range(2))
        reached[:, [n for node, n in number.items() if node.site == sites.EMBEDDING]] = True
        leads[:, [number[node] for node in ends]] = True
        for part, users in parts:
            reached[:, users] |= (masks[:, part] & reached[:, senders[part]]).any(1, keepdims=True)
        for part, users in reversed(parts):
            leads[:, senders[part]] |= masks[:, part] & leads[:, users].any(1, keepdims=True)
        found = masks & reached[:, senders]
        for part, users in parts:
            found[:, part] &= leads[:, users].any(1, keepdims=True)
        return found

    def edge_counts(self, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the number of edges of each circuit."""
        return masks.sum(1).astype(np.float64)
