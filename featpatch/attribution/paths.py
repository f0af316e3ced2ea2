"""Estimate the effects of paths: the gradient at the receiver times how the sender's change affects the receiver.

    estimate(S -> R) = (dm/dR in the model) . (dR/dS along the route) . (S_source - S_base)

(Marks et al. 2024, arXiv 2403.19647; Syed et al. 2023, arXiv 2310.10348.) If the path is the residual stream alone, dR/dS is
the derivative of the receiver's own norm and weights; components that the route recomputes add theirs. One backward pass
through a layer per receiver serves all senders.

With g = dm/dy at the activation that a receiver writes, the weights of the activation that it reads are chosen so that their
product with a change of that activation is the change of the metric. They derive from g for a whole activation, from g of one
head for a head, and from (d_j . g) for a feature.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.attribution.components import ComponentEstimator
from featpatch.attribution.estimates import Estimates, Estimator, collected
from featpatch.attribution.features import FeatureEstimator
from featpatch.attribution.gradients import LOCAL, Gradients, PairGradients
from featpatch.effects.collector import provenance
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.metrics import check_gap
from featpatch.model.backward import LIVE, RULES, modified
from featpatch.model.gradients import pull
from featpatch.model.lens import Lens
from featpatch.nodes import LOGITS, Direction, Edge, Node, check_reached, check_senders
from featpatch.pairs.pair import spans, spans_of
from featpatch.pairs.pairs import check_counterfactual
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any, digests
from featpatch.sae.nodes import CODED, check_nodes, names_of, owner_of
from featpatch.sites import ROUTES, Route


@dataclass(frozen=True)
class Receiving:
    """A receiver of paths whose effects are estimated.

    Attributes:
        node: the node.
        reads: the hook point that the receiver reads.
        writes: the hook point at which the gradient of the metric is needed.
        dictionary: the dictionary of a feature; None for other nodes.
    """

    node: Node
    reads: str
    writes: str
    dictionary: Dictionary | None = None

    @classmethod
    def of(cls, lens: Lens, node: Node, found: Sequence[Dictionary]) -> "Receiving":
        """Return the receiver for a node; raise a FeatpatchError if paths into the node can't be estimated."""
        if node == LOGITS:
            last = sites.resid_post(lens.n_layers - 1)
            return cls(node, last, last)
        owner = owner_of(node, found)
        if owner is not None and node.kind == "feature" and owner.behaviour.linear:
            return cls(node, owner.reads, owner.writes, owner)
        site = lens.site(node.site)
        whole = node.kind == "activation" and sites.entry(site) is not None
        head = node.kind == "head" and sites.is_component(site, "q", "k", "v", "z")
        if not whole and not head:
            raise FeatpatchError(
                f"receiver {str(node)!r}: expected, for estimates, a feature of {names_of(found)} with a linear decoder, a "
                "head at hook_q, hook_k, hook_v or hook_z, a whole activation, or 'logits'"
            )
        return cls(node, site, site)

    def weights(self, of_pair: PairGradients, direction: Direction) -> torch.Tensor:
        """Return the weights of the activation at `reads`, `[pos, ...]`; 0 at positions where the receiver isn't patched."""
        gradient = of_pair.gradients[direction][self.writes][0]
        position = self.node.position
        if self.node != LOGITS and position != "all":
            here = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
            here[spans(of_pair.pair, [position])[position]] = True
            gradient = gradient * here.reshape(-1, *[1] * (gradient.dim() - 1))
        if self.node.kind == "head":
            one = torch.zeros_like(gradient)
            one[:, self.node.index] = gradient[:, self.node.index]
            return one
        return gradient if self.dictionary is None else self._of_feature(of_pair, direction, gradient)

    def _of_feature(self, of_pair: PairGradients, direction: Direction, gradient: torch.Tensor) -> torch.Tensor:
        """Backpropagate the gradient through the feature's direction and the SAE's encoder."""
        dictionary, read = self.dictionary, of_pair.activations[direction][self.reads]
        assert dictionary is not None
        assert self.node.index is not None
        unit = dictionary.directions(torch.tensor([self.node.index]))[0]
        along = gradient.flatten(1).to(torch.float64) @ unit.to(gradient.device, torch.float64)
        if dictionary.behaviour.scaled:
            along = along * dictionary.gains(of_pair.split(dictionary)[direction]).to(along)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = read.detach().clone().requires_grad_()
            value = dictionary.codec.encode(leaf[None].flatten(2)).features[0, :, self.node.index]
            (found,) = torch.autograd.grad((value * along.clone().to(value)).sum(), leaf)
        return found


def estimate_paths(
    gradients: Gradients,
    saes: Any,
    senders: Effects | Sequence[Node | str],
    receivers: Effects | Sequence[Node | str],
    route: Route,
    directions: Sequence[Direction],
    *,
    progress: bool,
) -> Effects:
    """Estimate by gradients what `rank_paths` measures exactly; it describes the arguments.

    The cost is two forward and backward passes per pair, and a backward pass of one layer per receiver; additional senders
    cost nothing. A receiver that is inactive in the base run has no gradient, so its paths are estimated as 0.

    Raises:
        FeatpatchError: the input is unusable, or the gradients are not those of one point, the base run.
    """
    source, pairs, lens = gradients, gradients.pairs, gradients.lens
    found = dictionaries_if_any(lens, saes)
    sites.check_route(route)
    if source.method not in LOCAL:
        raise FeatpatchError(
            f"method={source.method!r} for paths: expected 'exact' or one of {', '.join(LOCAL)}; the other methods estimate "
            "features and components only"
        )
    lens.check_unhooked()
    sending, ends = (check_nodes(lens, n, found, name) for n, name in ((senders, "senders"), (receivers, "receivers")))
    check_senders(sending)
    receiving = [Receiving.of(lens, node, found) for node in ends]
    check_reached(any(sites.reaches(node.site, r.reads) and node != r.node for node in sending for r in receiving))
    check_counterfactual(pairs)
    ways, estimators = source.check_directions(directions), _estimators(lens, sending, found)
    wanted = spans_of(pairs, list(dict.fromkeys(node.position for node in sending)))
    inside = [sites.resid_pre(layer) for layer in range(lens.n_layers)]
    inside += [sites.component(layer, "attn_out") for layer in range(lens.n_layers)]
    reads = [hook for each in estimators for hook in (*each.reads, *each.sites)] + [r.reads for r in receiving] + inside
    clean, corrupted = np.zeros((2, len(pairs), 1))
    wanted_senders = frozenset(sending)
    changes: dict[int, dict[Direction, dict[Node, float]]] = {}
    with tqdm(total=len(pairs), unit="pair", desc="estimating", disable=not progress) as bar:
        for of_pair in source.of(list(dict.fromkeys(reads)), list(dict.fromkeys(r.writes for r in receiving))):
            index = of_pair.index
            clean[index], corrupted[index] = of_pair.values["noising"], of_pair.values["denoising"]
            changes[index] = {}
            for way in ways:
                wanted_sites = [site for each in estimators for site in each.sites]
                with modified(lens, RULES.get(source.method, LIVE)):
                    pulled = _Pulled(lens, of_pair, way, receiving, route).at(wanted_sites)
                through = replace(of_pair, gradients={way: pulled})
                found_by = [each.estimates(through, way, wanted[index]) for each in estimators]
                changes[index][way] = _by_edge(found_by, wanted_senders, receiving)
            bar.update()
    check_gap(source.measure.name, clean[:, 0], corrupted[:, 0])
    metadata = {
        "metric": source.measure.name, "method": source.method, "directions": sorted(ways), "unit": "gap", "route": route,
        "unsigned": False, "positions": list(wanted[0]), "saes": digests(found), **provenance(lens, pairs),
    }  # fmt: skip
    return collected(source.measure.name, clean, corrupted, changes, metadata, unsigned=False)


def _by_edge(found: Sequence[Estimates], senders: Collection[Node], receiving: Sequence[Receiving]) -> dict[Node, float]:
    """Return the estimated change of each path from a sender to a receiver downstream, one variant per receiver."""
    return {
        Edge.of(sender, receiver.node): float(value)
        for estimates in found
        for sender, column in zip(estimates.nodes, estimates.changes.unbind(1), strict=True)
        if sender in senders
        for receiver, value in zip(receiving, column, strict=True)
        if sites.reaches(sender.site, receiver.reads) and sender != receiver.node
    }


def _estimators(lens: Lens, senders: Sequence[Node], found: Sequence[Dictionary]) -> list[Estimator]:
    """Return estimators that cover the senders; raise a FeatpatchError if a node can't be a sender."""
    estimators: dict[tuple[str, str], Estimator] = {}
    for node in senders:
        owner = owner_of(node, found)
        site = lens.site(node.site)
        if owner is not None and node.kind in CODED:
            estimators["sae", owner.name] = FeatureEstimator(owner)
        elif node.kind == "head" and sites.is_component(site, "z"):
            estimators["heads", site] = ComponentEstimator(site, site, "z")
        elif node.kind == "activation" and sites.entry(site) is not None:
            estimators["whole", site] = ComponentEstimator(site, site, "mlp_out")
        else:
            raise FeatpatchError(
                f"sender {str(node)!r}: expected a feature or error of {names_of(found)}, a head at hook_z, or a whole "
                "activation"
            )
    return list(estimators.values())


@dataclass(frozen=True)
class _Pulled:
    """Gradients of the metric through each receiver with respect to the residual stream upstream, in one run.

    Attributes:
        lens: the model.
        of_pair: activations and gradients of the pair.
        way: the direction that patches the run.
        receiving: the receivers.
        route: which components are recomputed; the others are frozen.
    """

    lens: Lens
    of_pair: PairGradients
    way: Direction
    receiving: Sequence[Receiving]
    route: Route

    def at(self, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the gradients `[receivers, pos, ...]` at hook points that write to the residual stream."""
        stream = self._by_place()
        found = {}
        for site in wanted:
            place = sites.comes_in(site)
            assert place is not None
            gradient = stream[place]
            if sites.is_component(site, "z"):
                layer = place[0]
                z = self._rows(self._activation(site))
                _, inner = self._pull(layer, sites.component(layer, "attn_out"), gradient, {site: z})
                gradient = inner[site]
            found[site] = gradient
        return found

    def _by_place(self) -> dict[tuple[int, str], torch.Tensor]:
        """Return the gradients at every place in the residual stream, all on the device of the first layer's input."""
        zero = torch.zeros_like(self._rows(self._activation(sites.resid_pre(0))))
        stream: dict[tuple[int, str], torch.Tensor] = {}
        now = zero
        for layer in range(self.lens.n_layers, -1, -1):
            if layer < self.lens.n_layers:
                middle, entering = now, now
                if "mlp_out" in ROUTES[self.route] and not self.lens.attention_only:
                    gradient, inner = self._behind(layer, sites.component(layer, "mlp_out"), now)
                    middle, entering = now + inner, now + gradient
                for hook, weights in self._read_at((layer, "mid")).items():
                    gradient, inner = (weights, weights) if sites.is_stream(hook) else self._behind(layer, hook, weights)
                    middle, entering = middle + inner, entering + gradient
                if "attn_out" in ROUTES[self.route]:
                    entering = entering + self._pull(layer, sites.component(layer, "attn_out"), middle, {})[0]
                stream[layer, "mid"], now = middle, entering
            for hook, weights in self._read_at((layer, "pre")).items():
                now = now + (weights if sites.is_stream(hook) else self._pull(layer, hook, weights, {})[0])
            stream[layer, "pre"] = now
        return stream

    def _read_at(self, place: tuple[int, str]) -> dict[str, torch.Tensor]:
        """Return the weights of the receivers that read at a place, by hook point; rows of other receivers are 0."""
        found: dict[str, torch.Tensor] = {}
        for row, receiver in enumerate(self.receiving):
            if sites.seen_at(receiver.reads) == place:
                weights = receiver.weights(self.of_pair, self.way).to(self._home)
                if receiver.reads not in found:
                    found[receiver.reads] = weights.new_zeros(len(self.receiving), *weights.shape)
                found[receiver.reads][row] = weights
        return found

    def _behind(self, layer: int, hook: str, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradients with respect to a layer's input and to its attention output, for a hook point after attention.

        Attention is frozen.
        """
        name = sites.component(layer, "attn_out")
        gradient, inner = self._pull(layer, hook, weights, {name: self._rows(self._activation(name))})
        return gradient, inner[name]

    def _pull(
        self, layer: int, hook: str, weights: torch.Tensor, put: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        resid = self._rows(self._activation(sites.resid_pre(layer)))
        tokens = torch.tensor(self.of_pair.tokens(self.way)).expand(len(resid), -1)
        gradient, inner = pull(self.lens, layer, resid, tokens, hook, weights, put)
        return gradient.to(self._home), {name: value.to(self._home) for name, value in inner.items()}

    @property
    def _home(self) -> torch.device:
        return self._activation(sites.resid_pre(0)).device

    def _activation(self, hook: str) -> torch.Tensor:
        return self.of_pair.activations[self.way][hook]

    def _rows(self, activation: torch.Tensor) -> torch.Tensor:
        return activation.expand(len(self.receiving), *activation.shape)
