"""All paths from some senders to some receivers, as a part of a study."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from featpatch import sites
from featpatch.engine import Deltas
from featpatch.lens import Lens
from featpatch.pairs.spans import spans
from featpatch.patch import Edge, Node
from featpatch.patching.paths.receivers import Receiver
from featpatch.patching.paths.route import Route
from featpatch.patching.paths.senders import Senders
from featpatch.patching.study import Part
from featpatch.patching.study.runs import PairRuns
from featpatch.patching.study.swaps import Swaps


@dataclass(frozen=True, eq=False)
class EdgePart(Part):
    """The paths from senders to the receivers downstream of them.

    Attributes:
        lens: the model.
        senders: the senders.
        receivers: the receivers.
        route: which components between sender and receiver are frozen.
        only: the edges that are patched; None for all.
    """

    lens: Lens
    senders: Senders
    receivers: Sequence[Receiver]
    route: Route
    only: frozenset[Edge] | None = None

    @property
    def hooks(self) -> set[str]:
        """The hook points that senders and receivers need, and those of the components that are frozen between them."""
        highest = max(receiver.place[0] for receiver in self.receivers)
        names = ("resid_pre", "attn_out")
        blocks = range(self.senders.lowest, min(highest, self.lens.n_layers - 1) + 1)
        between = {sites.component(layer, name) for layer in [max(0, self.senders.lowest - 1), *blocks] for name in names}
        return {*self.senders.hooks, *(hook for r in self.receivers for hook in r.hooks), *between & set(self.lens.hook_points)}

    @property
    def sites(self) -> list[str]:
        """The hook points that are patched, which are those of the receivers."""
        return list(dict.fromkeys(receiver.writes for receiver in self.receivers))

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """Return the swaps of each pair, one per receiver."""
        return [run.once(self, partial(self._of_pair, run)) for run in runs]

    def count(self, run: PairRuns) -> int:
        """Return the number of edges whose sender differs between the runs."""
        differing = {node for swap in self.senders.swaps(run) for node in swap.nodes}
        return sum(sender in differing for of_receiver in self.edges.values() for sender in of_receiver)

    @cached_property
    def edges(self) -> dict[Node, dict[Node, Edge]]:
        """All edges that are patched if their sender differs, by receiver and sender."""
        edges: dict[Node, dict[Node, Edge]] = {receiver.node: {} for receiver in self.receivers}
        for receiver in self.receivers:
            sees = {site for site in {node.site for node in self.senders.nodes} if receiver.sees(site)}
            for sender in self.senders.nodes:
                edge = Edge.of(sender, receiver.node)
                if sender.site in sees and sender != receiver.node and (self.only is None or edge in self.only):
                    edges[receiver.node][sender] = edge
        return edges

    def _of_pair(self, run: PairRuns) -> list[Swaps]:
        nodes, streams = self.senders.streams(run, self.route)
        swaps = []
        for receiver in self.receivers:
            edges = self.edges[receiver.node]
            rows = [row for row, node in enumerate(nodes, 1) if node in edges]
            if rows:
                where = self._where(run, receiver)
                changes = {way: receiver.change(stream, torch.tensor(rows), where) for way, stream in streams.items()}
                deltas = {way: _deltas(change, run.first) for way, change in changes.items()}
                swaps.append(Swaps(receiver.writes, tuple(edges[nodes[row - 1]] for row in rows), deltas))
        return swaps

    def _where(self, run: PairRuns, receiver: Receiver) -> torch.Tensor:
        """Return a mask `[pos]` of the positions at which the receiver is patched."""
        position, where = receiver.node.position, torch.zeros(len(run.pair), dtype=torch.bool)
        where[slice(None) if position == "all" else spans(run.pair, [position])[position]] = True
        return where


def _deltas(change: torch.Tensor, first: int) -> Deltas:
    """Return one patch per row, after setting changes before position `first` to 0."""
    change[:, :first] = 0
    patch, position = (change != 0).any(2).nonzero(as_tuple=True)
    return Deltas.explicit(patch.cpu(), position.cpu(), change[patch, position], len(change))
