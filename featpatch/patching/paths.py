"""Studies of paths from senders to receivers, as patches of the receivers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from typing_extensions import Unpack

from featpatch import sites
from featpatch.effects.table import Effects
from featpatch.engine.patches import Block, Deltas
from featpatch.metrics import METRIC, SEQUENCES, Measures
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Edge, Node, check_reached, check_senders
from featpatch.pairs.pair import spans
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.changes import Part, as_blocks
from featpatch.patching.route import Receiver, Senders, receiver_of
from featpatch.patching.runs import PairRuns
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import dictionaries_if_any, digests
from featpatch.sae.nodes import check_nodes
from featpatch.sites import Route


@dataclass(frozen=True, eq=False)
class EdgePart(Part):
    """The paths from senders to the receivers downstream of them.

    Attributes:
        lens: the model.
        senders: the senders.
        receivers: the receivers.
        route: which components between sender and receiver are recomputed.
        only: the edges that are patched; None for all.
    """

    lens: Lens
    senders: Senders
    receivers: Sequence[Receiver]
    route: Route
    only: frozenset[Edge] | None = None

    @property
    def hooks(self) -> set[str]:
        """The hook points that senders and receivers need, and those that the layers between them need."""
        highest = max(receiver.place[0] for receiver in self.receivers)
        names = ("resid_pre", "attn_out")
        layers = range(self.senders.lowest, min(highest, self.lens.n_layers - 1) + 1)
        between = {sites.component(layer, name) for layer in [max(0, self.senders.lowest - 1), *layers] for name in names}
        return {*self.senders.hooks, *(hook for r in self.receivers for hook in r.hooks), *between & set(self.lens.hook_points)}

    @property
    def sites(self) -> list[str]:
        """The hook points that are patched, which are those of the receivers."""
        return list(dict.fromkeys(receiver.writes for receiver in self.receivers))

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair by receiver."""
        return [self._of_pair(run) for run in runs]

    def count(self, run: PairRuns) -> int:
        """Return the number of edges whose sender differs between the runs."""
        differing = {node for block in self.senders.blocks(run) for node in block.nodes}
        return sum(sender in differing for of_receiver in self.edges.values() for sender in of_receiver)

    @cached_property
    def edges(self) -> dict[Node, dict[Node, Edge]]:
        """The edges that are patched if their sender differs, by receiver and sender."""
        edges: dict[Node, dict[Node, Edge]] = {receiver.node: {} for receiver in self.receivers}
        for receiver in self.receivers:
            sees = {site for site in {node.site for node in self.senders.nodes} if receiver.sees(site)}
            for sender in self.senders.nodes:
                edge = Edge.of(sender, receiver.node)
                if sender.site in sees and sender != receiver.node and (self.only is None or edge in self.only):
                    edges[receiver.node][sender] = edge
        return edges

    def _of_pair(self, run: PairRuns) -> list[Block]:
        nodes, streams = self.senders.streams(run, self.route)
        blocks = []
        for receiver in self.receivers:
            edges = self.edges[receiver.node]
            rows = [row for row, node in enumerate(nodes, 1) if node in edges]
            if rows:
                where = self._where(run, receiver)
                changes = {way: receiver.change(stream, torch.tensor(rows), where) for way, stream in streams.items()}
                deltas = {way: [_deltas(change, run.first)] for way, change in changes.items()}
                blocks += as_blocks(run, tuple(edges[nodes[row - 1]] for row in rows), {receiver.writes: deltas})
        return blocks

    def _where(self, run: PairRuns, receiver: Receiver) -> torch.Tensor:
        """Return a mask `[pos]` of the positions at which the receiver is patched."""
        position, where = receiver.node.position, torch.zeros(len(run.pair), dtype=torch.bool)
        where[slice(None) if position == "all" else spans(run.pair, [position])[position]] = True
        return where


def _deltas(change: torch.Tensor, first: int) -> Deltas:
    """Return one patch per row, after setting changes before position `first` to 0."""
    change[:, :first] = 0
    return Deltas.nonzero(change)


Nodes = Effects | Sequence[Node | str]
"""Nodes, or a table of effects whose rows are the nodes; receivers may include `"logits"`."""


def path_study(
    model: Any,
    pairs: Pairs,
    saes: Any,
    senders: Nodes,
    receivers: Nodes,
    route: Route,
    only: frozenset[Edge] | None = None,
    **options: Unpack[Options],
) -> tuple[Study, EdgePart]:
    """Return the validated experiment of `rank_paths` and the part with its edges, or with `only` some of them."""
    check_pairs(pairs)
    sites.check_route(route)
    because = "for paths, because mediators are frozen in the prompt but not in an answer that follows it"
    Measures.of(options.get("metric", METRIC), SEQUENCES, because)
    lens = wrap(model)
    lens.check_unhooked()
    found = dictionaries_if_any(lens, saes)
    sending, receiving = (check_nodes(lens, n, found, name) for n, name in ((senders, "senders"), (receivers, "receivers")))
    check_senders(sending)
    part = EdgePart(lens, Senders.of(lens, sending, found), [receiver_of(lens, node, found) for node in receiving], route, only)
    check_reached(any(part.edges.values()))
    about = {"saes": digests(found), "route": route, "senders": list(map(str, sending)), "receivers": list(map(str, receiving))}
    asked: Options = {**options, "positions": list(dict.fromkeys(node.position for node in sending))}
    return Study.of(lens, [part], about, pairs, **asked), part
