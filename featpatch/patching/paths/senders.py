"""Senders of paths: nodes that write to the residual stream, and the changes that they make there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.engine import Deltas
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, added
from featpatch.patch import Direction, Node
from featpatch.patching.component_parts import HeadPart, WholePart
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.paths.route import Place, Route, Stream
from featpatch.patching.study import Part
from featpatch.patching.study.run import Run
from featpatch.patching.study.runs import PairRuns
from featpatch.patching.study.swaps import Swaps


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
            FeatpatchError: if a node has another kind or hook point, or its dictionary is not among those given.
        """
        by_name = {dictionary.name: dictionary for dictionary in found}
        parts: dict[tuple[str, str], Part] = {}
        for node in nodes:
            site = by_name[node.sae].writes if node.sae in by_name else lens.site(node.site)
            if site != node.site or sites.entry(site) is None:
                raise FeatpatchError(
                    f"sender {str(node)!r} does not write to the stream: expected a feature or error of {sorted(by_name)}, a "
                    "head at hook_z, or a whole activation such as hook_mlp_out"
                )
            if node.kind in ("feature", "error", "all_features") and node.sae in by_name:
                parts["sae", node.sae] = FeaturePart([by_name[node.sae]], frozenset(n for n in nodes if n.sae == node.sae))
            elif node.kind == "activation":
                parts["whole", site] = WholePart([site])
            elif node.kind == "head" and sites.is_component(site, "z"):
                parts["heads", site] = HeadPart(lens, sites.layer_of(site), "z")
            else:
                raise FeatpatchError(
                    f"sender {str(node)!r}: expected a feature or error with the name of its SAE, of {sorted(by_name)}, "
                    "a head at hook_z, or a whole activation"
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

    def swaps(self, run: PairRuns) -> list[Swaps]:
        """Return the swaps of the senders that differ between the runs of a pair."""
        wanted = frozenset(self.nodes)
        swaps = [swap.keep(wanted) for part in self.parts for swap in part.swaps([run])[0]]
        return [swap for swap in swaps if swap.nodes]

    def streams(self, run: PairRuns, route: Route) -> tuple[list[Node], dict[Direction, Stream]]:
        """Return the senders that differ between the runs of a pair, and their changes of the residual stream by direction."""
        swaps = self.swaps(run)
        nodes = [node for swap in swaps for node in swap.nodes]
        entering: list[Place] = []
        for swap in swaps:
            entering += [place for place in [sites.comes_in(swap.site)] if place] * len(swap.nodes)
        streams = {}
        for way, (base, _) in run.ways.items():
            tokens = run.bases[way][0].tokens
            changes = [self._on_stream(swap.site, dense(swap.deltas[way], len(tokens)), base, tokens) for swap in swaps]
            changes = [change.to(self.lens.device) for change in changes]
            empty = torch.zeros(0, len(tokens), self.lens.d_model, device=self.lens.device)
            streams[way] = Stream(self.lens, base, tokens, route, tuple(entering), torch.cat(changes) if changes else empty)
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


def dense(deltas: Deltas, length: int) -> torch.Tensor:
    """Return the changes of all patches as one dense tensor `[patches, pos, d]`."""
    values = deltas.values()
    result = values.new_zeros(len(deltas), length, values.shape[-1])
    result[deltas.patch.to(values.device), deltas.position.to(values.device)] = values
    return result
