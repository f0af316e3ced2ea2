"""The graph of edges between the components of a model, in which each receiver's input is the sum of its senders' outputs.

Senders are the embedding, heads and MLPs; receivers are a head's query, key or value, MLPs and the logits. Mediators (see
`Mediators`), which are named features, errors and the rest of a dictionary, are both. An edge that is kept carries the sender's
output in this run, which upstream ablations may have changed; an ablated edge carries the sender's ablation value (Conmy et al.
2023, arXiv 2304.14997). Norms are recomputed for each receiver. The metric is differentiable with respect to the weight of each
edge, and its gradient at the whole model is edge attribution patching (Syed et al. 2023, arXiv 2310.10348).

If a norm follows attention (Gemma 2 and 3, OLMo 2), a head's output is its part of the norm's input, and this norm too is
recomputed for each receiver, which reads norm(sum of heads, each kept or ablated, + bias). EAP-IG evaluates circuits in the
same way, but its estimates leave that norm out. So ablating all edges of a head is ablating the head, and an edge is a direct
path. A norm after an MLP is a part of the MLP.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import groupby, product
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.circuits.attribution import ESTIMATED_AT_ONCE, Point
from featpatch.circuits.edge_gradients import sender_hooks, summed_scores
from featpatch.circuits.edge_runs import COMPARED, EdgeRuns, Run
from featpatch.circuits.graph import announcing
from featpatch.errors import FeatpatchError, counted
from featpatch.model.backward import modified, under
from featpatch.model.facts import once, settings
from featpatch.model.layer import Head, close, head_from
from featpatch.model.projections import rounding
from featpatch.nodes import Edge, Node
from featpatch.pairs.pairs import Pairs
from featpatch.patching.ablation_values import Everywhere
from featpatch.patching.paths import EdgePart
from featpatch.patching.route import Senders, receiver_of
from featpatch.patching.study import Study
from featpatch.sae.dictionary import digests

PATCHED_AT_ONCE = 80
"""The largest number of tokens of pairs whose edges are patched together, unless a single prompt is longer."""


@dataclass(eq=False, repr=False)
class EdgeGraph(EdgeRuns):
    """The graph of all edges between a model's components and mediators, whose scores can be estimated."""

    def check(self) -> None:
        """Check the pairs as in `Graph.check`, the dictionaries, and that the model's parts add up to the model.

        Raises:
            FeatpatchError: they do not, because of an unusual layer or quantised weights, or a dictionary's nodes can't be
                mediators.
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
        if not np.abs(found - self.whole).max() <= rounding(self.lens) * size:
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

    def rows_of_one(self) -> int:
        """Return the largest number of rows at once: one per head of a layer and one more, or one per mediator."""
        heads = [1 + self.heads(layer, "z") for layer in range(self.lens.n_layers)]
        return max([*heads, *(len(group.nodes) for group in self.mediators.values())])

    def alone(self, *, progress: bool = False) -> NDArray[np.float64]:
        """Measure the metric of each pair with only one edge ablated, `[items, pairs]`.

        Ablating a single edge to its value in the corrupted run patches a direct path, so the patches are those of
        `rank_paths` with `route="direct"`: they run from the receiver's layer on, and many share a forward pass. With other
        ablation values, mediators, positions or answers of several tokens, each edge needs a pass through all layers.
        """
        as_paths = self.to == "corrupted" and not self.mediators and not self.regions.given and not self.measures.by_token
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
                study = cache(partial(Study.of, self.lens, parts, {}, pairs, directions=["noising"], metric=self.measures))
                if not bar.n and progress:
                    tokens = [sum(len(self.pairs[index]) for index in chunk) for chunk in chunks]
                    passes = sum(ceil(size * count / study().rows) for size, count in product(sizes, tokens))
                    said = f"{counted(len(self.items), 'edge')} in {counted(len(self.pairs), 'pair')}"
                    work = f"{total:,} patches in {passes:,} passes of the layers from the receiver on"
                    tqdm.write(f"{said}: at most {work}", file=sys.stderr)
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
            study: returns the experiment with the paths of these pairs, which is made on the first call.
            part: the paths into receivers that see the same senders.
            some: the indices of the pairs.
            ends: the receiver and the sender of each edge.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        effects = replace(study(), parts=[part]).run_block(None, progress=False)
        if not effects.finished:
            raise KeyboardInterrupt
        edges = {Edge.of(sender, receiver): number for number, (receiver, sender) in enumerate(ends)}
        places = np.array([edges[edge] for edge in effects.nodes if isinstance(edge, Edge)], dtype=np.int64)
        found = np.tile(self.whole[list(some)], (len(edges), 1))
        found[places[effects.row], effects.pair] = effects.noised
        return found

    def about(self) -> Mapping[str, Any]:
        """Return what to store with the results: that the items are edges, their positions, and the dictionaries."""
        return {
            "over": "edges",
            "positions": "each" if self.regions.each else list(self.regions.given) or "all",
            "saes": digests([group.dictionary for group in self.mediators.values()]),
        }

    @cached_property
    def empty(self) -> NDArray[np.float64]:
        """The metric of each pair with all edges ablated; if the ablation values come from a run, it is that of the run."""
        last, values = sites.resid_post(self.lens.n_layers - 1), torch.zeros(len(self.runs), dtype=torch.float64)
        for some in self._groups():
            others = self.others(some)
            if others is None:
                return super().empty
            final = self.lens.read(others, [last])[last]
            with torch.no_grad():
                values[some] = self.metric_of(self.unembedded(final, *self.prompts(some))[None], some)[0].cpu()
        return self.combined(values).numpy()

    @cached_property
    @torch.no_grad()
    def _head(self) -> Head | None:
        """The map to logits as in the model's weights; None if the model's logits differ from it, e.g. by a scale (Cohere)."""
        found, tokens = head_from(self.lens.model), self._sample()[:1, :COMPARED]

        def compare(_: torch.nn.Module) -> bool:
            drawn = torch.randn(*tokens.shape, self.lens.d_model, generator=torch.Generator().manual_seed(0))
            stream = drawn.to(self.lens.first_weight)
            logits = self.unembedded(stream, tokens, torch.tensor([tokens.shape[1] - 1]))
            return close(found(stream[:, -1], None), logits)

        return found if once(self.lens.model, compare, "head", settings(self.lens.model)) else None

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Measure the metric of all circuits and runs in one forward pass, layer by layer."""
        (tokens, answers), circuits = self.prompts(some), len(kept)
        where, ablation_values = self._ablation_values(some)
        ablated = 1 - kept.to(self._type)
        regions = self._regions_of(some)
        final = self._pass(Run(tokens, where, ablated, ablation_values, projections=self._projections, regions=regions))
        logits = self.unembedded(final.flatten(0, 1), tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    def slopes(
        self, some: Sequence[int], points: Sequence[Point], weights: torch.Tensor, done: Callable[[int], object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate from the model's weights or, with mediators or unreadable weights, with a weight for each edge."""
        by_weights = None if self.mediators else self._projections
        if by_weights is None or self._head is None:
            return self._by_edge(some, points, weights, done)
        size = max(1, ESTIMATED_AT_ONCE // len(self.runs[some[0]]))
        parts = [slice(start, start + size) for start in range(0, len(some), size)]
        same = self._fixed(some, sender_hooks(self.lens)) if self.others(some[:1]) is None else None
        head = under(self._head, points[0].rules)
        total, values = self._zeros(len(self.items)), self._zeros(len(points), len(some))
        for rows in parts:
            numbers, others = self._regions_of(some[rows]), self.others(some[rows])
            regions = None if numbers is None else numbers[..., None] == torch.arange(len(self.regions.names))
            ablated = same if others is None else others
            assert ablated is not None

            def measure(part: slice, final: torch.Tensor, rows: slice = rows) -> torch.Tensor:
                def logits(slot: int, columns: Sequence[int] | None) -> torch.Tensor:
                    read = None if columns is None else torch.tensor(columns, device=head.weight.device)
                    return head(final[:, slot], read)

                found = self._differentiable(self.metric_from(logits, some[rows]))
                values[part, rows] = found.detach().cpu()
                return found * weights[part, rows].to(found)

            prompts = self.prompts(some[rows])
            found = summed_scores(self.lens, by_weights, *prompts, measure, points, ablated, done, regions)
            total += found.double().cpu()
        return total / len(points), values

    def _by_edge(
        self, some: Sequence[int], points: Sequence[Point], weights: torch.Tensor, done: Callable[[int], object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate by automatic differentiation with respect to a weight for each edge, which works for mediators too."""
        tokens, answers = self.prompts(some)
        where, ablation_values = self._ablation_values(some)
        clean = Run(tokens, where)
        with torch.no_grad():
            self._pass(clean)
        now = {node: x[0] for node, x in clean.written.items()}
        changes = {node: ablation_values[node].to(x) - x for node, x in now.items()}
        total, values = self._zeros(len(self.items)), self._zeros(len(points), len(some))
        for number, point in enumerate(points):
            put = {node: point.between(ablation_values[node], now[node]) for node in point.place}
            with torch.enable_grad(), modified(self.lens, point.rules):
                ablated = torch.zeros(1, len(self.items), dtype=self._type, requires_grad=True)
                regions = self._regions_of(some)
                run = Run(tokens, where, ablated, ablation_values, regions=regions, put=put, changes=changes, rules=point.rules)
                final = self._pass(run)
                logits = self.unembedded(final.flatten(0, 1), tokens, answers)
                found = self._differentiable(self.metric_of(logits[None], some)[0])
                (gradient,) = torch.autograd.grad((found * weights[number].to(found)).sum(), ablated)
            values[number] = found.detach().cpu()
            total += gradient[0].double().cpu()
            done(len(some))
        return total / len(points), values
