"""The graph of edges between the components of a model, in which each receiver's input is the sum of its senders' outputs.

Senders are the embedding, heads and MLPs; receivers are a head's query, key or value, MLPs and the logits. Mediators (see
`Mediators`), which are named features, errors and the rest of a dictionary, are both. An edge that is kept carries the sender's
output in this run, which upstream ablations may have changed; an ablated edge carries the sender's ablation value (Conmy et al.
2023, arXiv 2304.14997). Norms are recomputed for each receiver. The metric is differentiable with respect to how far each edge
is kept, and its gradient at the whole model is edge attribution patching (Syed et al. 2023, arXiv 2310.10348).
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, product
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING, ESTIMATED_AT_ONCE, INSIDE, Point, sender_hooks, summed_scores
from featpatch.circuits.graph import Graph, announcing, prompts, settled
from featpatch.circuits.mediators import Mediators, Place
from featpatch.errors import FeatpatchError
from featpatch.model.stack import Projections, projections_of
from featpatch.nodes import LOGITS, Edge, Node
from featpatch.pairs.pairs import Pairs
from featpatch.patching.paths import EdgePart
from featpatch.patching.readings import AtAnswer
from featpatch.patching.route import Senders, receiver_of
from featpatch.patching.study import Options, Study

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
        put: the outputs of senders that are set to given values.
        changes: the changes that ablated edges make, if these are not the ablation values minus the outputs in this run.
    """

    tokens: torch.Tensor
    where: Mapping[Place, torch.Tensor]
    ablated: torch.Tensor | None = None
    outside: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    written: Written = field(default_factory=dict)
    projections: Sequence[Projections] | None = None
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
    """

    mediators: Mapping[Place, Mediators] = field(default_factory=dict)
    _outside: dict[int, Written] = field(default_factory=dict, init=False, repr=False)
    _where: dict[int, Mapping[Place, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)
    _bias: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.lens.shapes(sites.component(layer, name) for layer in range(self.lens.n_layers) for name in (*INSIDE, "z"))
        self._layout = self._lay_out()
        self._edges = [Edge.of(sender, receiver) for receiver, sent in self._layout.items() for sender in sent]
        self.items = tuple(self._edges)

    def check(self) -> None:
        """Check the pairs as in `Graph.check`, and that the model's parts add up to the model.

        Raises:
            FeatpatchError: if they do not, because of a norm after heads or MLPs, an unusual layer or quantised weights.
        """
        super().check()
        found, size = self.values([self.items])[0], np.abs(self.empty if self.reads_clean else self.whole).max()
        if not np.abs(found - self.whole).max() <= TOLERANCE * size:
            expected = "heads and MLPs that write to the residual stream without a norm after them"
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
            heads = through((layer, "attn"), tuple(self._heads_at(layer, "z")))
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
        if self.to != "corrupted" or self.mediators or not isinstance(self.read, AtAnswer):
            return super().alone(progress=progress)
        found, options = np.tile(self.whole, (len(self.items), 1)), Options(["all"], ["noising"], self.read)
        blocks = [list(block) for _, block in groupby(self._layout, key=lambda receiver: receiver.site)]
        first = Node(sites.resid_pre(0), "activation")
        starts = [[first, *self._layout[receivers[0]][1:]] for receivers in blocks]
        parts = [
            EdgePart(
                self.lens, Senders.of(self.lens, senders, []), [receiver_of(self.lens, node, []) for node in block], "direct"
            )
            for senders, block in zip(starts, blocks, strict=True)
        ]
        depths = [1 + self.lens.n_layers - self.depth(receivers[0])[0] for receivers in blocks]
        costs = [len(block) * len(senders) * depth for block, senders, depth in zip(blocks, starts, depths, strict=True)]
        total = len(self.items) * len(self.pairs)
        with tqdm(total=total, desc="ablating", unit="edge", disable=not progress) as bar:
            done = announcing(bar, sum(costs) * len(self.pairs))
            for some in self.pairs.chunks(PATCHED_AT_ONCE):
                pairs = Pairs(tuple(self.pairs[index] for index in some))
                study = Study.of(self.lens, parts, {}, pairs, options)
                if not bar.n and progress:
                    sizes = [len(block) * len(senders) for block, senders in zip(blocks, starts, strict=True)]
                    tokens = [sum(len(self.pairs[index]) for index in chunk) for chunk in self.pairs.chunks(PATCHED_AT_ONCE)]
                    passes = sum(ceil(size * count / study.rows) for size, count in product(sizes, tokens))
                    said = (
                        f"{len(self.items):,} edges in {len(self.pairs)} pairs: at most {total:,} patches in {passes:,} passes"
                    )
                    tqdm.write(f"{said} of the layers from the receiver on", file=sys.stderr)
                for part, receivers, senders, cost in zip(parts, blocks, starts, costs, strict=True):
                    effects = replace(study, parts=[part]).run_block(None, progress=False)
                    if not effects.finished:
                        raise KeyboardInterrupt
                    for run in study.runs(tuple(range(len(some)))):
                        run.found.clear()  # the changes of all edges together would take too much memory
                    start = self._numbers[Edge.of(self._layout[receivers[0]][0], receivers[0])]
                    edges = {Edge.of(*ends[::-1]): start + n for n, ends in enumerate(product(receivers, senders))}
                    places = np.array([edges[edge] for edge in effects.nodes if isinstance(edge, Edge)], dtype=np.int64)
                    found[places[effects.row], np.array(some)[effects.pair]] = effects.noised
                    done(len(receivers) * len(senders) * len(some), cost * len(some))
        return found

    def about(self) -> Mapping[str, Any]:
        """Return what to store with the results: that the items are edges, and the dictionaries."""
        return {
            "over": "edges",
            "saes": {group.dictionary.name: group.dictionary.digest() for group in self.mediators.values()},
        }

    @cached_property
    def empty(self) -> NDArray[np.float64]:
        """The metric of each pair with all edges ablated, where the logits read nothing but ablation values."""
        last, values = sites.resid_post(self.lens.n_layers - 1), torch.zeros(len(self.runs), dtype=torch.float64)
        for some in self._groups():
            final = settled(self.lens.read(prompts(self.runs, some, self.to), [last])[last], self.to)
            with torch.no_grad():
                values[some] = self.metric_of(self.unembedded(final, *self._prompts(some))[None], some)[0].cpu()
        result: NDArray[np.float64] = self.combined(values).numpy()
        return result

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Measure the metric of all circuits and pairs in one run, layer by layer."""
        return self._run(kept.to(self._type), some)

    def places(self) -> list[tuple[Node, ...]]:
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
        others: Iterable[Mapping[str, torch.Tensor]] = (
            self.lens.read(prompts(self.runs, some[part], self.to), hooks) for part in parts
        )
        if self.to != "corrupted":
            read = list(others)
            ablated = {hook: settled(torch.cat([of_part[hook] for of_part in read]), self.to) for hook in hooks}
            others = ({hook: ablated[hook][part] for hook in hooks} for part in parts)
        total, values = (
            torch.zeros(len(self.items), dtype=torch.float64),
            torch.zeros(len(points), len(some), dtype=torch.float64),
        )
        for rows, of_part in zip(parts, others, strict=True):

            def measure(part: slice, logits: torch.Tensor, rows: slice = rows) -> torch.Tensor:
                found = self._differentiable(self.metric_of(logits, some[rows]))
                values[part, rows] = found.detach().cpu()
                return found * weights[part, rows].to(logits.device)

            found = summed_scores(self.lens, by_weights, *self._prompts(some[rows]), measure, points, of_part, done)
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
        total, values = (
            torch.zeros(len(self.items), dtype=torch.float64),
            torch.zeros(len(points), len(some), dtype=torch.float64),
        )
        for number, point in enumerate(points):
            put = {node: point.between(outside[node], now[node]) for node in point.place}
            with torch.enable_grad():
                ablated = torch.zeros(1, len(self.items), dtype=self._type, requires_grad=True)
                final = self._pass(_Run(tokens, where, ablated, outside, put=put, changes=changes))
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

    def _prompts(self, some: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean tokens `[runs, pos]` and the answer positions `[runs]` of some equally long runs."""
        answers = torch.tensor([self.runs[index].answer_position for index in some])
        return torch.tensor([self.runs[index].clean for index in some]), answers

    def _run(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        tokens, answers = self._prompts(some)
        where, outside = self._ablation_values(some)
        final = self._pass(_Run(tokens, where, 1 - kept, outside, projections=self._projections))
        circuits = len(kept)
        logits = self.unembedded(final.flatten(0, 1), tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    @torch.no_grad()
    def _ablation_values(self, some: Sequence[int]) -> tuple[Mapping[Place, torch.Tensor], Written]:
        """Return the positions of the named nodes of mediators and the ablation values of senders, computed once."""
        if some[0] not in self._outside:
            where = {place: group.where(self.runs, some) for place, group in self.mediators.items()}
            self._where[some[0]] = where
            other = _Run(prompts(self.runs, some, self.to), where, projections=self._projections)
            self._pass(other)
            self._outside[some[0]] = {node: settled(values[0], self.to) for node, values in other.written.items()}
        return self._where[some[0]], self._outside[some[0]]

    def _pass(self, run: "_Run") -> torch.Tensor:
        """Return the input of the logits, `[circuits, pairs, pos, d_model]`, and store the outputs of senders in the run."""
        entry = self.lens.read(run.tokens, [sites.resid_pre(0)])[sites.resid_pre(0)]
        stream = entry.expand(1 if run.ablated is None else len(run.ablated), *entry.shape)
        sent = run.note({EMBEDDING: stream})
        stream = sent[EMBEDDING]
        for layer in range(self.lens.n_layers):
            stream, sent = self._mediated((layer, "pre"), stream, sent, run)
            heads, bias = self._attention(layer, stream, sent, run)
            self._bias[layer] = bias.expand_as(stream)[0, 0]
            added, heads = self._mediated((layer, "attn"), sum(heads.values(), bias), heads, run)
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
        shares = run.note(self.mediators[place].shares(rows, rows, which, run.where[place]))
        return torch.stack(list(shares.values())).sum(0), shares

    def _attention(self, layer: int, stream: torch.Tensor, sent: Written, run: "_Run") -> tuple[Written, torch.Tensor]:
        """Compute the output of each head from its own query, key and value inputs, and the bias of attention."""
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
        if run.projections:
            each, bias = run.projections[layer].outputs(z.flatten(0, 1)), run.projections[layer].bias.to(stream)
            nodes = self._heads_at(layer, "z")
            heads = {node: output.view_as(stream) for node, output in zip(nodes, each.to(stream), strict=True)}
        else:
            heads, bias = self._by_head(layer, stream, z, run.tokens)
        return run.note(heads), bias

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
        start = self._numbers[Edge.of(next(iter(sent)), receivers[0])]
        ablated = run.ablated[:, start : start + len(receivers) * len(sent)].unflatten(1, (len(receivers), len(sent)))
        changed = torch.ones_like(ablated, dtype=torch.bool) if ablated.requires_grad else ablated != 0
        of_receiver, of_sender = changed.any(0).any(1), changed.any(0).any(0)
        if not of_receiver.any():
            return passing[None], [0] * len(receivers)
        nodes = [node for node, any_ablated in zip(sent, of_sender.tolist(), strict=True) if any_ablated]
        changes = torch.stack([run.change(node, sent[node]) for node in nodes], 1)
        weights = ablated[:, of_receiver][:, :, of_sender].to(changes)
        moved = (weights @ changes.flatten(2)).unflatten(2, changes.shape[2:]).transpose(0, 1)
        whole = [] if of_receiver.all() else [passing[None]]
        which = torch.where(of_receiver, of_receiver.cumsum(0) - 1 + len(whole), 0)
        return torch.cat([*whole, passing + moved]), which.tolist()

    def _by_head(self, layer: int, stream: torch.Tensor, z: torch.Tensor, tokens: torch.Tensor) -> tuple[Written, torch.Tensor]:
        """Split the output of attention into the outputs of its heads and the bias."""
        count, hook = z.shape[2], sites.component(layer, "z")
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
        """Return the heads that use a query, key or value (several if keys and values are shared), or the receiver itself."""
        if receiver.kind != "head":
            return [receiver]
        layer, name = sites.layer_of(receiver.site), receiver.site[-1]
        shared, first = self.heads(layer, "z") // self.heads(layer, name), int(receiver.index or 0)
        return [Node(sites.component(layer, "z"), "head", head) for head in range(first * shared, (first + 1) * shared)]

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
