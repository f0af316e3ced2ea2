"""The graph of edges between the components of a model, in which each receiver's input is the sum of its senders' outputs.

Senders are the embedding, heads and MLPs; receivers are a head's query, key or value, MLPs and the logits. Mediators (see
`Mediators`), which are named features, errors and the rest of a dictionary, are both. An edge that is kept carries the sender's
output in this run, which upstream ablations may have changed; an ablated edge carries the sender's ablation value (Conmy et al.
2023, arXiv 2304.14997). Norms are recomputed for each receiver. The metric is differentiable with respect to how far each edge
is kept, and its gradient at the whole model is edge attribution patching (Syed et al. 2023, arXiv 2310.10348).

If a norm follows attention (Gemma 2 and 3, OLMo 2), a head's output is what goes into the norm, and the norm too is recomputed
for each receiver: a receiver reads norm(sum of heads, each kept or ablated, + bias). This is how EAP-IG evaluates circuits; its
estimates leave that norm out. So all edges of a head ablated are the head ablated, and an edge is a direct path. A norm after
an MLP is a part of the MLP.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import groupby, pairwise, product
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING, ESTIMATED_AT_ONCE, INSIDE, Point, sender_hooks, summed_scores
from featpatch.circuits.graph import Graph, announcing
from featpatch.circuits.mediators import Mediators, Place
from featpatch.circuits.regions import Regions
from featpatch.errors import FeatpatchError
from featpatch.model.layer import Norm
from featpatch.model.stack import AttentionOutput, Projections, attention_outputs, projections_of
from featpatch.nodes import LOGITS, Edge, Node
from featpatch.pairs.pairs import Pairs
from featpatch.patching.ablation import Everywhere
from featpatch.patching.paths import EdgePart
from featpatch.patching.readings import AtAnswer
from featpatch.patching.route import Senders, receiver_of
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import Dictionary

Written = dict[Node, torch.Tensor]
"""The output of each sender, `[circuits, pairs, pos, d_model]`."""

TOLERANCE = 1e-3
"""The largest allowed difference between the sum of the model's parts and the model's own run, as a share of the metric's size.
It allows for rounding in float32."""

PATCHED_AT_ONCE = 80
"""The largest number of tokens of pairs whose edges are patched together, unless a single prompt is longer."""


@dataclass(frozen=True, eq=False)
class _Run:
    """A forward pass in which the inputs of receivers are put together from the outputs of senders.

    Attributes:
        tokens: token ids, `[pairs, pos]`.
        where: masks of the positions of the named nodes of mediators, by place.
        ablated: how far each edge is ablated, 0 to 1, `[circuits, items]`; None for an unpatched run.
        outside: the ablation values of senders.
        written: the outputs of senders in this run.
        projections: the projections of each layer's attention; None if heads go through the model.
        regions: the number of the region of each token, `[pairs, pos]`; None if edges are not told apart by position.
        in_front: what goes into the norm after attention, `[circuits, pairs, pos, d_model]`, by layer with such a norm.
        put: the outputs of senders that are set to given values.
        changes: the changes that ablated edges make, if these are not the ablation values minus the outputs in this run.
    """

    tokens: torch.Tensor
    where: Mapping[Place, torch.Tensor]
    ablated: torch.Tensor | None = None
    outside: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    written: Written = field(default_factory=dict)
    projections: Sequence[Projections] | None = None
    regions: torch.Tensor | None = None
    in_front: dict[int, torch.Tensor] = field(default_factory=dict)
    put: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    changes: Mapping[Node, torch.Tensor] = field(default_factory=dict)

    def note(self, written: Written) -> Written:
        """Store outputs of senders in the run, after setting those that are given, and return them."""
        written = {node: self.put[node].to(x).expand_as(x) if node in self.put else x for node, x in written.items()}
        self.written.update(written)
        return written

    def change(self, node: Node, output: torch.Tensor) -> torch.Tensor:
        """Return what an ablated edge adds to the input of its receiver."""
        return self.changes[node].to(output).expand_as(output) if self.changes else self.outside[node].to(output) - output


@dataclass(eq=False)
class EdgeGraph(Graph):
    """The graph of all edges between a model's components and mediators.

    Attributes:
        mediators: the mediators, by place.
        regions: the regions at which edges are told apart.
    """

    mediators: Mapping[Place, Mediators] = field(default_factory=dict)
    regions: Regions = field(default_factory=Regions)
    _outside: dict[int, Written] = field(default_factory=dict, init=False, repr=False)
    _where: dict[int, Mapping[Place, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)
    _bias: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

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

    def check(self) -> None:
        """Check the pairs as in `Graph.check`, and that the model's parts add up to the model.

        Raises:
            FeatpatchError: if they do not, because of an unusual layer or quantised weights, or a dictionary's nodes can't be
                ablated in this way.
        """
        for place, group in self.mediators.items():
            if place[1] == "z" and self._outputs[place[0]] is None:
                raise FeatpatchError(
                    f"{group.dictionary.name} writes to {group.dictionary.writes}, and W_O of that layer can't be read or does "
                    "not give what attention adds, so its features have no direction in the residual stream: expected readable "
                    "weights of the standard form; leave its nodes out"
                )
            if isinstance(self.ablation, Everywhere) and group.dictionary.behaviour.scaled:
                raise FeatpatchError(
                    f"to={self.to!r} with {group.dictionary.name}, which scales features by the size of the activation at each "
                    "token: expected to='corrupted' or 'resample' for edges, because zeros have no size, and the mean of a "
                    "feature is not that of what it writes"
                )
        super().check()
        found, size = self.values([self.items])[0], np.abs(self.empty if self.reads_clean else self.whole).max()
        if not np.abs(found - self.whole).max() <= TOLERANCE * size:
            expected = "heads whose sum, with or without a norm after it, and MLPs that are added to the residual stream"
            if self.lens.quantised:
                expected = (
                    f"weights that are not quantised (these are: {self.lens.quantised}), since quantised weights round each "
                    "head and the sum of heads differently; load the model without quantization_config"
                )
            raise FeatpatchError(
                f"the metric is {found.mean():.6g} when the model's parts are added up and {self.whole.mean():.6g} in the "
                f"model: expected {expected}; or find a circuit with over='nodes'"
            )

    def receivers(self) -> list[Node]:
        """Return the receivers in the order of the forward pass."""
        return list(self._layout)

    def senders(self, receiver: Node) -> list[Node]:
        """Return the senders that a receiver sees, in the order of the forward pass."""
        return list(self._layout[receiver])

    def _lay_out(self) -> dict[Node, tuple[Node, ...]]:
        """Map each receiver to the senders that it sees."""
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

    @property
    def candidates(self) -> tuple[Node, ...]:
        """The features and errors that are mediators."""
        return tuple(node for group in self.mediators.values() for node in group.named)

    def rows_of_one(self) -> int:
        """Return the largest number of rows that are needed at once: one per head of a layer plus one, or one per mediator."""
        heads = [1 + self.heads(layer, "z") for layer in range(self.lens.n_layers)]
        return max([*heads, *(len(group.nodes) for group in self.mediators.values())])

    def alone(self, *, progress: bool = False) -> NDArray[np.float64]:
        """Measure the metric of each pair with only one edge ablated, `[items, pairs]`.

        An edge that is ablated by itself to values of the corrupted run is a path that is patched without any component in
        between, so the patches are those of `rank_paths` with `route="direct"`: they run from the receiver's layer on, and
        many share a forward pass. Other edges are measured in whole passes.
        """
        as_paths = self.to == "corrupted" and not self.mediators and not self.regions.given and isinstance(self.read, AtAnswer)
        if not as_paths or (self.normed and self._projections is None):
            return super().alone(progress=progress)
        found = np.zeros((len(self.items), len(self.pairs)))
        blocks = [list(block) for _, block in groupby(self._layout, key=lambda receiver: receiver.site)]
        starts = [[Node(sites.resid_pre(0), "activation"), *self._layout[block[0]][1:]] for block in blocks]
        parts = [
            EdgePart(
                self.lens, Senders.of(self.lens, senders, []), [receiver_of(self.lens, node, []) for node in block], "direct"
            )
            for senders, block in zip(starts, blocks, strict=True)
        ]
        depths = [1 + self.lens.n_layers - self.depth(block[0])[0] for block in blocks]
        sizes = [len(block) * len(senders) for block, senders in zip(blocks, starts, strict=True)]
        total, chunks = len(self.items) * len(self.pairs), list(self.pairs.chunks(PATCHED_AT_ONCE))
        with tqdm(total=total, desc="ablating", unit="edge", disable=not progress) as bar:
            cost = len(self.pairs) * sum(size * depth for size, depth in zip(sizes, depths, strict=True))
            done = announcing(bar, cost, lambda: self._busy)
            for some in chunks:
                pairs = Pairs(tuple(self.pairs[index] for index in some))
                study = cache(partial(Study.of, self.lens, parts, {}, pairs, Options(["all"], ["noising"], self.read)))
                if not bar.n and progress:
                    tokens = [sum(len(self.pairs[index]) for index in chunk) for chunk in chunks]
                    passes = sum(ceil(size * count / study().rows) for size, count in product(sizes, tokens))
                    said = f"{len(self.items):,} edges in {len(self.pairs)} pairs: at most {total:,} patches"
                    tqdm.write(f"{said} in {passes:,} passes of the layers from the receiver on", file=sys.stderr)
                for part, block, senders, depth in zip(parts, blocks, starts, depths, strict=True):
                    start, count = self._starts[block[0]], len(block) * len(senders)
                    measure = partial(self._alone_by_paths, study, part, some, list(product(block, senders)))
                    names = map(str, ("alone", *some, *block))
                    found[start : start + count, some] = self.once(names, (count, len(some)), measure)
                    done(count * len(some), count * len(some) * depth)
        return found

    def _alone_by_paths(
        self, study: Callable[[], Study], part: EdgePart, some: Sequence[int], ends: Sequence[tuple[Node, Node]]
    ) -> NDArray[np.float64]:
        """Measure the metric of some pairs with only one edge ablated, for all edges of a part, `[edges, pairs]`.

        Args:
            study: makes the experiment with the paths of these pairs, or returns it.
            part: the paths into receivers that see the same senders.
            some: the indices of the pairs.
            ends: the receiver and the sender of each edge.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        effects = replace(study(), parts=[part]).run_block(None, progress=False)
        if not effects.finished:
            raise KeyboardInterrupt
        for run in study().runs(tuple(range(len(some)))):
            run.found.clear()  # the changes of all edges together would take too much memory
        edges = {Edge.of(sender, receiver): number for number, (receiver, sender) in enumerate(ends)}
        places = np.array([edges[edge] for edge in effects.nodes if isinstance(edge, Edge)], dtype=np.int64)
        found = np.tile(self.whole[list(some)], (len(edges), 1))
        found[places[effects.row], effects.pair] = effects.noised
        return found

    def pruned(self, masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return masks without edges whose sender is not reached from the embedding, or whose receiver can't reach the logits.

        These are the edges that EAP-IG's `Graph.prune` removes. A head is reached through any of its query, key and value.
        """
        ends = [edge.receiver for edge in self._edges if edge.receiver.site == LOGITS.site]
        number = {node: n for n, node in enumerate(dict.fromkeys([*self._senders, *ends]))}
        senders = np.array([number[sender] for sender in self._senders])
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

    @property
    def _senders(self) -> list[Node]:
        return [edge.sender for edge in self._edges]

    def edge_counts(self, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the number of edges of each circuit."""
        return masks.sum(1).astype(np.float64)

    def about(self) -> Mapping[str, Any]:
        """Return what to store with the results: that the items are edges, their positions, and the dictionaries."""
        return {
            "over": "edges",
            "positions": list(self.regions.given) or "all",
            "saes": {group.dictionary.name: group.dictionary.digest() for group in self.mediators.values()},
        }

    def ablated(self) -> tuple[Sequence[str], Sequence[Dictionary]]:
        """Return the hook points whose activations determine what senders write, and the dictionaries of mediators."""
        dictionaries = [group.dictionary for group in self.mediators.values()]
        return list(dict.fromkeys([*sender_hooks(self.lens), *(each.writes for each in dictionaries)])), dictionaries

    @cached_property
    def empty(self) -> NDArray[np.float64]:
        """The metric of each pair with all edges ablated, which is that of the ablation run if values come from one."""
        last, values = sites.resid_post(self.lens.n_layers - 1), torch.zeros(len(self.runs), dtype=torch.float64)
        for some in self._groups():
            others = self.others(some)
            if others is None:
                return super().empty
            final = self.lens.read(others, [last])[last]
            with torch.no_grad():
                values[some] = self.metric_of(self.unembedded(final, *self._prompts(some))[None], some)[0].cpu()
        result: NDArray[np.float64] = self.combined(values).numpy()
        return result

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Measure the metric of all circuits and pairs in one run, layer by layer."""
        return self._run(kept.to(self._type), some)

    def components(self) -> list[tuple[Node, ...]]:
        """Return the embedding, the heads of each layer, the MLPs, and the mediators of each place."""
        found: dict[tuple[str, str], dict[Node, None]] = {}
        for sender in (sender for sent in self._layout.values() for sender in sent):
            found.setdefault((sender.site, sender.sae), {})[sender] = None
        return [tuple(group) for group in found.values()]

    def slopes(
        self, some: Sequence[int], points: Sequence[Point], weights: torch.Tensor, done: Callable[[int], object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate from the model's weights or, if it has another form or mediators, with a weight for each edge."""
        by_weights = None if self.mediators else self._projections
        if by_weights is None:
            return self._by_edge(some, points, weights, done)
        hooks, size = sender_hooks(self.lens), max(1, ESTIMATED_AT_ONCE // len(self.runs[some[0]]))
        parts = [slice(start, start + size) for start in range(0, len(some), size)]
        same = self._fixed(some, hooks) if self.others(some[:1]) is None else None
        total, values = self._zeros(len(self.items)), self._zeros(len(points), len(some))
        for rows in parts:
            others, numbers = self.others(some[rows]), self._regions_of(some[rows])
            regions = None if numbers is None else numbers[..., None] == torch.arange(len(self.regions.names))
            ablated = same if others is None else self.lens.read(others, hooks)
            assert ablated is not None

            def measure(part: slice, logits: torch.Tensor, rows: slice = rows) -> torch.Tensor:
                found = self._differentiable(self.metric_of(logits, some[rows]))
                values[part, rows] = found.detach().cpu()
                return found * weights[part, rows].to(logits.device)

            prompts = self._prompts(some[rows])
            found = summed_scores(self.lens, by_weights, *prompts, measure, points, ablated, done, regions)
            total += found.double().cpu()
        return total / len(points), values

    def _by_edge(
        self, some: Sequence[int], points: Sequence[Point], weights: torch.Tensor, done: Callable[[int], object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate by automatic differentiation of a run with a weight for each edge, which also covers mediators."""
        tokens, answers = self._prompts(some)
        where, outside = self._ablation_values(some)
        clean = _Run(tokens, where)
        with torch.no_grad():
            self._pass(clean)
        now = {node: x[0] for node, x in clean.written.items()}
        changes = {node: outside[node].to(x) - x for node, x in now.items()}
        total, values = self._zeros(len(self.items)), self._zeros(len(points), len(some))
        for number, point in enumerate(points):
            put = {node: point.between(outside[node], now[node]) for node in point.place}
            with torch.enable_grad():
                ablated = torch.zeros(1, len(self.items), dtype=self._type, requires_grad=True)
                run = _Run(tokens, where, ablated, outside, regions=self._regions_of(some), put=put, changes=changes)
                final = self._pass(run)
                logits = self.unembedded(final.flatten(0, 1), tokens, answers)
                found = self._differentiable(self.metric_of(logits[None], some)[0])
                (gradient,) = torch.autograd.grad((found * weights[number].to(found)).sum(), ablated)
            values[number] = found.detach().cpu()
            total += gradient[0].double().cpu()
            done(len(some))
        return total / len(points), values

    @cached_property
    def _projections(self) -> list[Projections] | None:
        """The projections of each layer's attention by head; None if they can't be had, so that heads go through the model."""
        some = max(self._groups(), key=lambda group: len(self.runs[group[0]]))
        return projections_of(self.lens, self._prompts(some[:1])[0])

    @cached_property
    def _outputs(self) -> list[AttentionOutput | None]:
        """The way in which each layer adds its heads to the residual stream; None if it can't be had from the weights."""
        some = max(self._groups(), key=lambda group: len(self.runs[group[0]]))
        return attention_outputs(self.lens, self._prompts(some[:1])[0])

    def _norm(self, layer: int) -> Norm | None:
        """Return the norm after a layer's attention, if there is one."""
        output = self._outputs[layer]
        return None if output is None else output.norm

    @cached_property
    def normed(self) -> dict[Node, int]:
        """The layer of each sender whose output goes into a norm, together with the others of its layer."""
        found: dict[Node, int] = {}
        for layer in (layer for layer in range(self.lens.n_layers) if self._norm(layer) is not None):
            group = self.mediators.get((layer, "z"))
            found |= dict.fromkeys(group.nodes if group else self._heads_at(layer, "z"), layer)
        return found

    def _regions_of(self, some: Sequence[int]) -> torch.Tensor | None:
        """Return the number of the region of each token of some equally long runs, `[runs, pos]`."""
        if not self.regions.given:
            return None
        pairs = (self.pairs[self.readings[index][0]] for index in some)
        return torch.stack([self.regions.numbers(pair, len(self.runs[some[0]])) for pair in pairs])

    def _fixed(self, some: Sequence[int], hooks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ablation values `[1, pos, ...]` that are the same in all runs, by hook point."""
        tokens, _ = self._prompts(some[:1])
        read = self.lens.read(tokens, hooks)
        return {hook: self.everywhere(hook, (read[hook][0],), tokens.shape[1])[0][None] for hook in hooks}

    @torch.no_grad()
    def _ablation_values(self, some: Sequence[int]) -> tuple[Mapping[Place, torch.Tensor], Written]:
        """Return the positions of the named nodes of mediators and the ablation values of senders, computed once."""
        if some[0] not in self._outside:
            where = {place: group.where(self.runs, some) for place, group in self.mediators.items()}
            self._where[some[0]], self._outside[some[0]] = where, self._written_outside(some, where)
        return self._where[some[0]], self._outside[some[0]]

    def _written_outside(self, some: Sequence[int], where: Mapping[Place, torch.Tensor]) -> Written:
        """Return the ablation value of each sender's output, `[runs or 1, pos, d_model]`."""
        others = self.others(some)
        if others is not None:
            run = _Run(others, where, projections=self._projections)
            self._pass(run)
            return {node: values[0] for node, values in run.written.items()}
        tokens, _ = self._prompts(some[:1])
        hooks, _ = self.ablated()
        fixed = self._fixed(some, hooks)
        stream = fixed[sites.resid_pre(0)]
        found = {EMBEDDING: stream}
        for layer in range(self.lens.n_layers):
            z = fixed[sites.component(layer, "z")]
            in_slots = (layer, "z") in self.mediators
            heads = self._slots(layer, z[None]) if in_slots else self._by_head(layer, stream[None], z, tokens)[0]
            found |= {node: values[0] for node, values in heads.items()}
            if not self.lens.attention_only:
                found[Node(sites.component(layer, "mlp_out"), "activation")] = fixed[sites.component(layer, "mlp_out")]
        for place, group in self.mediators.items():
            passing = fixed[group.dictionary.writes].flatten(2)
            split = group.dictionary.split(*(self.lens.read(tokens, [hook])[hook] for hook in (
                group.dictionary.reads, group.dictionary.writes)))  # fmt: skip
            features, error = self.everywhere(group.dictionary, (split.features[0], split.error[0]), tokens.shape[1])
            shares = group.fixed(features[None], error[None], passing, where[place])
            found |= {node: self._written_by(place, share) for node, share in shares.items()}
        return found

    def _prompts(self, some: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean tokens `[runs, pos]` and the answer positions `[runs]` of some equally long runs."""
        answers = torch.tensor([self.runs[index].answer_position for index in some])
        return torch.tensor([self.runs[index].clean for index in some]), answers

    def _run(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        tokens, answers = self._prompts(some)
        where, outside = self._ablation_values(some)
        run = _Run(tokens, where, 1 - kept, outside, projections=self._projections, regions=self._regions_of(some))
        final = self._pass(run)
        circuits = len(kept)
        logits = self.unembedded(final.flatten(0, 1), tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    def _pass(self, run: "_Run") -> torch.Tensor:
        """Return the input of the logits, `[circuits, pairs, pos, d_model]`, and store the outputs of senders in the run."""
        entry = self.lens.read(run.tokens, [sites.resid_pre(0)])[sites.resid_pre(0)]
        stream = entry.expand(1 if run.ablated is None else len(run.ablated), *entry.shape)
        sent = run.note({EMBEDDING: stream})
        stream = sent[EMBEDDING]
        for layer in range(self.lens.n_layers):
            stream, sent = self._mediated((layer, "pre"), stream, sent, run)
            added, heads = self._mediated((layer, "attn"), *self._attention(layer, stream, sent, run), run)
            mid, below = self._mediated((layer, "mid"), stream + added, sent | heads, run)
            if not self.lens.attention_only:
                seen = (stream, sent) if self.lens.parallel else (mid, below)
                outputs = self._mlp_outputs(layer, *seen, run)
                mid, below = sum(outputs.values(), mid), below | outputs
            stream, sent = mid, below
        stream, sent = self._mediated((self.lens.n_layers, "pre"), stream, sent, run)
        rows, _ = self._inputs([LOGITS], stream, sent, run)
        return rows[0]

    def _mediated(self, place: Place, passing: torch.Tensor, sent: Written, run: "_Run") -> tuple[torch.Tensor, Written]:
        """Return the activation that passes a place (the sum of its mediators, if there are any) and the senders after it."""
        if place not in self.mediators:
            return passing, sent
        rows, which = self._inputs(self.mediators[place].nodes, passing, sent, run)
        shares = self.mediators[place].shares(rows, rows, which, run.where[place])
        found = run.note({node: self._written_by(place, share) for node, share in shares.items()})
        return torch.stack(list(found.values())).sum(0), found

    def _written_by(self, place: Place, share: torch.Tensor) -> torch.Tensor:
        """Return what a mediator writes to the residual stream (before a norm after attention), given its output."""
        output = self._outputs[place[0]] if place[1] == "z" else None
        return share if output is None else (share.to(output.weight) @ output.weight.flatten(0, 1)).to(share)

    def _slots(self, layer: int, z: torch.Tensor) -> Written:
        """Return what each head adds to `z`, `[circuits, pairs, pos, heads, d_head]`, in which heads lie side by side."""
        own = torch.eye(z.shape[3], dtype=z.dtype, device=z.device)[:, :, None]
        return {node: (z * own[head]).flatten(3) for head, node in enumerate(self._heads_at(layer, "z"))}

    def _attention(self, layer: int, stream: torch.Tensor, sent: Written, run: "_Run") -> tuple[torch.Tensor, Written]:
        """Compute what attention adds, and the output of each head from its own inputs, or of the mediators at `hook_z`."""
        inside = {}
        for name in INSIDE:
            hook, nodes = sites.component(layer, name), self._heads_at(layer, name)
            rows, which = self._inputs(nodes, stream, sent, run)
            if run.projections:
                inside[hook] = run.projections[layer].project(name, rows.flatten(1, 3), which).unflatten(0, (-1, rows.shape[3]))
                continue
            values = self._through(layer, rows.flatten(0, 2), run.tokens, hook).unflatten(0, rows.shape[:3])
            inside[hook] = torch.stack([values[row, ..., head, :] for head, row in enumerate(which)], -2).flatten(0, 1)
        z = self._through(layer, stream.flatten(0, 1), run.tokens, sites.component(layer, "z"), inside)
        if (layer, "z") in self.mediators:
            z = z.unflatten(0, stream.shape[:2])
            slots, output = run.note(self._slots(layer, z)), self._outputs[layer]
            assert output is not None
            passing = torch.stack(list(slots.values())).sum(0)  # z, unless heads are set to given values
            _, heads = self._mediated((layer, "z"), passing, slots, run)
            bias = stream.new_zeros(stream.shape[-1]) if output.bias is None else output.bias.to(stream)
        elif run.projections:
            each, bias = run.projections[layer].outputs(z.flatten(0, 1)), run.projections[layer].bias.to(stream)
            nodes = self._heads_at(layer, "z")
            heads = {node: output.view_as(stream) for node, output in zip(nodes, each.to(stream), strict=True)}
        else:
            heads, bias = self._by_head(layer, stream, z, run.tokens)
        total, norm = sum(run.note(heads).values(), bias), self._norm(layer)
        self._bias[layer] = bias.expand_as(stream)[0, 0]
        if norm is None:
            return total, heads
        run.in_front[layer] = total
        return norm(total).to(total), heads

    def _mlp_outputs(self, layer: int, stream: torch.Tensor, sent: Written, run: "_Run") -> Written:
        """Compute the output of an MLP, or of the nodes of its dictionary."""
        nodes, group = self._mlp(layer), self.mediators.get((layer, "mlp"))
        rows, which = self._inputs(nodes, stream, sent, run)
        if run.projections and group is None:
            of_layer = run.projections[layer].layer
            output = of_layer.mlp_output(rows.to(of_layer.device).flatten(0, -2)).view_as(rows).to(stream)
            return run.note({nodes[0]: output[0]})
        outputs = self._mlp_activation(layer, rows, run.tokens, sites.component(layer, "mlp_out"))
        if group is None:
            return run.note({nodes[0]: outputs[0]})
        read = outputs if group.dictionary.reads == group.dictionary.writes else self._mlp_activation(
            layer, rows, run.tokens, group.dictionary.reads
        )  # fmt: skip
        return run.note(group.shares(read, outputs, which, run.where[layer, "mlp"]))

    def _mlp_activation(self, layer: int, rows: torch.Tensor, tokens: torch.Tensor, hook: str) -> torch.Tensor:
        """Compute the activation at a hook point of an MLP from the MLP's inputs `[..., pos, d_model]`."""
        stream = rows.flatten(0, -3)
        put = {sites.component(layer, "attn_out"): torch.zeros_like(stream)}
        return self._through(layer, stream, tokens, hook, put).unflatten(0, rows.shape[:-2])

    def _inputs(
        self, receivers: Sequence[Node], passing: torch.Tensor, sent: Written, run: "_Run"
    ) -> tuple[torch.Tensor, list[int]]:
        """Compute the inputs of receivers, with their ablated edges changed; receivers without ablated edges share a row.

        Returns:
            The different inputs, `[rows, circuits, pairs, pos, d_model]`, and the row of each receiver.
        """
        if run.ablated is None:
            return passing[None], [0] * len(receivers)
        start, parts = self._starts[receivers[0]], (len(receivers), len(sent), len(self.regions.names))
        ablated = run.ablated[:, start : start + prod(parts)].unflatten(1, parts)
        changed = torch.ones_like(ablated, dtype=torch.bool) if ablated.requires_grad else ablated != 0
        of_receiver, of_sender = changed.any(0).any(2).any(1), changed.any(0).any(2).any(0)
        if not of_receiver.any():
            return passing[None], [0] * len(receivers)
        weights = dict(zip(sent, ablated[:, of_receiver].to(passing).unbind(2), strict=True))
        nodes = [node for node, any_ablated in zip(sent, of_sender.tolist(), strict=True) if any_ablated]
        moved = torch.zeros_like(passing)
        for layer, group in groupby(sorted(nodes, key=self._norm_key), key=self._norm_key):
            some = list(group)
            changes = torch.stack([run.change(node, sent[node]) for node in some], 1)
            change = _weighted(torch.stack([weights[node] for node in some], 2), changes, run.regions)
            norm = None if layer < 0 else self._norm(layer)
            before = None if norm is None else run.in_front[layer]
            moved = moved + (change if norm is None or before is None else (norm(before + change) - norm(before)).to(change))
        whole = [] if of_receiver.all() else [passing[None]]
        which = torch.where(of_receiver, of_receiver.cumsum(0) - 1 + len(whole), 0)
        return torch.cat([*whole, passing + moved]), which.tolist()

    def _norm_key(self, sender: Node) -> int:
        """Return the layer of the norm that a sender's output goes into, or -1 if there is none."""
        return self.normed.get(sender, -1)

    def _by_head(self, layer: int, stream: torch.Tensor, z: torch.Tensor, tokens: torch.Tensor) -> tuple[Written, torch.Tensor]:
        """Split what attention adds, or what goes into the norm after it, into the outputs of its heads and the bias."""
        count, hook, output = z.shape[2], sites.component(layer, "z"), self._outputs[layer]
        if output is not None:
            written = torch.einsum("rphd,hdm->hrpm", z.to(output.weight), output.weight).to(stream)
            bias = stream.new_zeros(stream.shape[-1]) if output.bias is None else output.bias.to(stream)
            return {Node(hook, "head", head): each.view_as(stream) for head, each in enumerate(written)}, bias
        alone = torch.cat(
            [torch.zeros_like(z)[None], z * torch.eye(count, dtype=z.dtype, device=z.device)[:, None, None, :, None]]
        )
        resid = stream.flatten(0, 1).repeat(count + 1, 1, 1)
        outputs = self._through(layer, resid, tokens, sites.component(layer, "attn_out"), {hook: alone.flatten(0, 1)})
        bias, *each = outputs.unflatten(0, (count + 1, *stream.shape[:2]))
        return {Node(hook, "head", head): output - bias for head, output in enumerate(each)}, bias

    def _through(
        self, layer: int, resid: torch.Tensor, tokens: torch.Tensor, hook: str, put: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        with self.lens.put(put or {}):
            prompts_of_rows = tokens.repeat(len(resid) // len(tokens), 1).to(self.lens.device)
            return self.lens.differentiable_through(layer, resid, prompts_of_rows, hook).to(resid.device)

    def written(self, tokens: torch.Tensor) -> tuple[Written, dict[tuple[int, str], torch.Tensor]]:
        """Compute senders' outputs in unpatched runs, `[prompts, pos, d_model]`, and summed biases of attention by place."""
        run = _Run(tokens, {})
        self._pass(run)
        always: dict[tuple[int, str], torch.Tensor] = {}
        total = torch.zeros_like(run.written[EMBEDDING][0])
        for layer in range(self.lens.n_layers):
            always[layer, "pre"] = total
            total = total + self._bias[layer]
            always[layer, "mid"] = total
        always[self.lens.n_layers, "pre"] = total
        return {node: values[0] for node, values in run.written.items()}, always

    def depth(self, receiver: Node) -> tuple[int, str]:
        """Return the place in the residual stream that a receiver reads."""
        if receiver == LOGITS:
            return self.lens.n_layers, "pre"
        layer, place = sites.seen_at(receiver.site)
        return layer, "pre" if self.lens.parallel else place

    def users(self, receiver: Node) -> list[Node]:
        """Return the heads that use a query, key or value, or the receiver itself.

        They are several if keys and values are shared, and heads in all regions use keys and values in any.
        """
        if receiver.kind != "head" or not sites.is_component(receiver.site, *INSIDE):
            return [receiver]
        layer, name = sites.layer_of(receiver.site), receiver.site[-1]
        shared, first = self.heads(layer, "z") // self.heads(layer, name), int(receiver.index or 0)
        positions = [receiver.position] if name == "q" else self.regions.names
        heads = range(first * shared, (first + 1) * shared)
        return [Node(sites.component(layer, "z"), "head", head, position) for position, head in product(positions, heads)]

    def head_output(self, layer: int, head: int, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Compute the output of a head from the inputs `[prompts, pos, d_model]` of its query, key and value."""
        put = {hook: self._through(layer, inputs[name], tokens, hook)
               for name in INSIDE for hook in [sites.component(layer, name)]}  # fmt: skip
        stream = inputs["q"]
        z = self._through(layer, stream, tokens, sites.component(layer, "z"), put)
        heads, _ = self._by_head(layer, stream[None], z, tokens)
        return heads[Node(sites.component(layer, "z"), "head", head)][0]

    def mlp_output(self, layer: int, stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the output of an MLP from its input `[prompts, pos, d_model]`."""
        return self._mlp_activation(layer, stream, tokens, sites.component(layer, "mlp_out"))

    def unembedded(self, stream: torch.Tensor, tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Return the logits `[prompts, d_vocab]` at the answers, from the final residual stream `[prompts, pos, d_model]`."""
        last, device = self.lens.n_layers - 1, self.lens.device
        with self.lens.put({sites.resid_post(last): stream}):
            return self.lens.resume(last, stream, tokens.to(device), answers.to(device))

    @property
    def _type(self) -> torch.dtype:
        return self.lens.first_weight.dtype

    def heads(self, layer: int, name: str) -> int:
        """Return the number of heads at a hook point of a layer's attention."""
        return self.lens.heads(sites.component(layer, name))


def _weighted(weights: torch.Tensor, changes: torch.Tensor, regions: torch.Tensor | None) -> torch.Tensor:
    """Return the weighted sum of senders' changes for each receiver, `[receivers, circuits, pairs, pos, d_model]`.

    Args:
        weights: the weight of each edge, `[circuits, receivers, senders, regions]`.
        changes: the changes, `[circuits, senders, pairs, pos, d_model]`.
        regions: the number of the region of each token, `[pairs, pos]`; None for a single region.
    """
    if regions is None:
        return (weights[..., 0] @ changes.flatten(2)).unflatten(2, changes.shape[2:]).transpose(0, 1)
    return torch.einsum("crsbt,csbtd->rcbtd", weights[..., regions.to(weights.device)], changes)
