"""Edges between the components of a model: every receiver's input put together sender by sender.

Senders are the embedding, heads and MLPs; receivers a head's query, key or value, MLPs and the logits. An edge that is kept
brings what its sender writes in this run, which ablations below may have moved, an ablated one what it writes in the outside
(Conmy et al. 2023, arXiv 2304.14997). Norms are recomputed for each receiver. The metric is differentiable in how far edges
are kept, and its gradient at the whole model is edge attribution patching (Syed et al. 2023, arXiv 2310.10348).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featpatch import sites
from featpatch.circuits.graph import Graph
from featpatch.circuits.outside import prompts, settled
from featpatch.errors import FeatpatchError
from featpatch.patch import LOGITS, Edge, Node

EMBEDDING = Node(sites.EMBEDDING, "activation")
"""What enters the first block: tokens and, where they are added, positions."""

INSIDE = ("q", "k", "v")

Written = dict[Node, torch.Tensor]
"""What each sender writes, `[circuits, pairs, pos, d_model]`."""

TOLERANCE = 1e-3
"""Share of the metric's size by which the run that is put together may differ from the model's own in float32."""


@dataclass(eq=False)
class EdgeGraph(Graph):
    """All edges of a model's components."""

    _outside: dict[int, dict[Node, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)
    _bias: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.items = tuple(Edge.of(sender, receiver) for receiver in self.receivers() for sender in self.senders(receiver))
        self._columns = {item: number for number, item in enumerate(self.items)}

    def check(self) -> None:
        """As for every graph, and that the parts of the model add up to it.

        Raises:
            FeatpatchError: what heads add to the stream goes through a norm, or a block of another form.
        """
        super().check()
        found = self.values([self.items])[0]
        size = max(np.abs(self.whole).max(), np.abs(found).max(), 1e-30)
        if not np.abs(found - self.whole).max() <= TOLERANCE * size:
            raise FeatpatchError(
                f"the model's parts add up to a metric of {found.mean():.6g}, and the model has {self.whole.mean():.6g}: "
                "expected heads and MLPs that write to the stream without a norm behind them; find a circuit over nodes instead"
            )

    def receivers(self) -> list[Node]:
        """In the order of the forward pass."""
        found = []
        for layer in range(self.lens.n_layers):
            for name in INSIDE:
                found += [Node(sites.component(layer, name), "head", head) for head in range(self.heads(layer, name))]
            if not self.lens.attention_only:
                found.append(Node(sites.component(layer, "mlp_out"), "activation"))
        return [*found, LOGITS]

    def senders(self, receiver: Node | None = None) -> list[Node]:
        """In the order of the forward pass, those below a receiver."""
        found = [EMBEDDING]
        for layer in range(self.lens.n_layers):
            mlp = Node(sites.component(layer, "mlp_out"), "activation")
            if receiver and receiver != LOGITS and sites.layer_of(receiver.site) == layer and receiver != mlp:
                return found
            if receiver == mlp and self.lens.parallel:
                return found
            found += [Node(sites.component(layer, "z"), "head", head) for head in range(self.heads(layer, "z"))]
            if receiver == mlp:
                return found
            found += [] if self.lens.attention_only else [mlp]
        return found

    def rows_of_one(self) -> int:
        """One for each head of a block, and one that none adds to."""
        return 1 + max(self.heads(layer, "z") for layer in range(self.lens.n_layers))

    def about(self) -> Mapping[str, Any]:
        """That these are edges."""
        return {"over": "edges"}

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """One run of all circuits and pairs together, block by block."""
        return self._run(kept.to(self._type), some)

    def estimates(self) -> NDArray[np.float64]:
        """What the mean metric loses with each edge, estimated by its gradient in the whole model, `[items]`."""
        total = np.zeros(len(self.items))
        for some in self._groups():
            with torch.inference_mode(False), torch.enable_grad():
                kept = torch.ones(1, len(self.items), dtype=self._type, requires_grad=True)
                values = self._run(kept, some)
                if not values.requires_grad:
                    raise FeatpatchError(
                        f"metric {self.measure.name} has no gradient: expected a differentiable one to estimate with"
                    )
                (gradient,) = torch.autograd.grad(values.sum(), kept)
            total += gradient[0].double().cpu().numpy()
        return total / len(self.pairs)

    def _run(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([self.pairs[index].clean for index in some])
        answers = torch.tensor([self.pairs[index].answer_position for index in some])
        with torch.no_grad():
            if some[0] not in self._outside:
                written = self._pass(None, prompts(self.pairs, some, self.to), {})[0]
                self._outside[some[0]] = {node: settled(values[0], self.to) for node, values in written.items()}
        _, final = self._pass(1 - kept, tokens, self._outside[some[0]])
        circuits = len(kept)
        logits = self.unembedded(final.flatten(0, 1), tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    def _pass(
        self, ablated: torch.Tensor | None, tokens: torch.Tensor, outside: Mapping[Node, torch.Tensor]
    ) -> tuple[Written, torch.Tensor]:
        """What senders write, and the input of the logits.

        Args:
            ablated: how far each edge is, `[circuits, items]`; None for a plain run.
        """
        circuits = 1 if ablated is None else len(ablated)
        entry = self.lens.read(tokens, [sites.resid_pre(0)])[sites.resid_pre(0)]
        written: Written = {EMBEDDING: entry.expand(circuits, *entry.shape)}
        stream = written[EMBEDDING]
        for layer in range(self.lens.n_layers):
            inside = {}
            for name in INSIDE:
                hook = sites.component(layer, name)
                nodes = [Node(hook, "head", head) for head in range(self.heads(layer, name))]
                rows = torch.stack([stream + self._brought(node, written, ablated, outside) for node in nodes])
                values = self._through(layer, rows.flatten(0, 2), tokens, hook).unflatten(0, rows.shape[:3])
                inside[hook] = torch.stack([values[head, :, :, :, head] for head in range(len(nodes))], 3).flatten(0, 1)
            z = self._through(layer, stream.flatten(0, 1), tokens, sites.component(layer, "z"), inside)
            heads, bias = self._by_head(layer, stream, z, tokens)
            self._bias[layer] = bias[0, 0]
            before = dict(written)
            written |= heads
            added = torch.stack(list(heads.values())).sum(0) + bias
            if not self.lens.attention_only:
                mlp = Node(sites.component(layer, "mlp_out"), "activation")
                below = stream + self._brought(mlp, before, ablated, outside)
                attention = added + self._brought(mlp, heads, ablated, outside)
                put = {sites.component(layer, "attn_out"): attention.flatten(0, 1)}
                written[mlp] = self._through(layer, below.flatten(0, 1), tokens, mlp.site, put).unflatten(0, stream.shape[:2])
                stream = stream + written[mlp]
            stream = stream + added
        return written, stream + self._brought(LOGITS, written, ablated, outside)

    def _brought(
        self, receiver: Node, written: Written, ablated: torch.Tensor | None, outside: Mapping[Node, torch.Tensor]
    ) -> torch.Tensor:
        """How a receiver's input changes by the ablated ones of its edges from some senders."""
        like = next(iter(written.values()))
        if ablated is None:
            return torch.zeros_like(like)
        total = torch.zeros_like(like)
        for sender, now in written.items():
            column = self._columns.get(Edge.of(sender, receiver))
            if column is None:
                continue
            weight = ablated[:, column].to(like.device)
            if weight.requires_grad or bool(weight.any()):
                total = total + weight[:, None, None, None] * (outside[sender].to(like) - now)
        return total

    def _by_head(self, layer: int, stream: torch.Tensor, z: torch.Tensor, tokens: torch.Tensor) -> tuple[Written, torch.Tensor]:
        """What each head adds to the stream, and what attention adds without any."""
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
            return self.lens.differentiable_through(layer, resid, prompts_of_rows, hook)

    def written(self, tokens: torch.Tensor) -> tuple[Written, dict[tuple[int, str], torch.Tensor]]:
        """What senders write in plain runs, `[prompts, pos, d_model]`, and what attention always adds, up to each `depth`."""
        written, _ = self._pass(None, tokens, {})
        always: dict[tuple[int, str], torch.Tensor] = {}
        total = torch.zeros_like(next(iter(written.values()))[0])
        for layer in range(self.lens.n_layers):
            always[layer, "pre"] = total
            total = total + self._bias[layer]
            always[layer, "mid"] = total
        always[self.lens.n_layers, "pre"] = total
        return {node: values[0] for node, values in written.items()}, always

    def depth(self, receiver: Node) -> tuple[int, str]:
        """The place in the stream that a receiver reads."""
        if receiver == LOGITS:
            return self.lens.n_layers, "pre"
        layer, place = sites.seen_at(receiver.site)
        return layer, "pre" if self.lens.parallel else place

    def users(self, receiver: Node) -> list[Node]:
        """The heads that use a query, key or value: several where keys and values are shared."""
        if receiver.kind != "head":
            return [receiver]
        layer, name = sites.layer_of(receiver.site), receiver.site[-1]
        shared, first = self.heads(layer, "z") // self.heads(layer, name), int(receiver.index or 0)
        return [Node(sites.component(layer, "z"), "head", head) for head in range(first * shared, (first + 1) * shared)]

    def head_output(self, layer: int, head: int, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """What a head writes, of the streams `[prompts, pos, d_model]` that its query, key and value read."""
        put = {hook: self._through(layer, inputs[name], tokens, hook)
               for name in INSIDE for hook in [sites.component(layer, name)]}  # fmt: skip
        stream = inputs["q"]
        z = self._through(layer, stream, tokens, sites.component(layer, "z"), put)
        heads, _ = self._by_head(layer, stream[None], z, tokens)
        return heads[Node(sites.component(layer, "z"), "head", head)][0]

    def mlp_output(self, layer: int, stream: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What an MLP writes, of the stream `[prompts, pos, d_model]` that it reads."""
        put = {sites.component(layer, "attn_out"): torch.zeros_like(stream)}
        return self._through(layer, stream, tokens, sites.component(layer, "mlp_out"), put)

    def unembedded(self, stream: torch.Tensor, tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Logits `[prompts, d_vocab]` at the answers, of the final stream `[prompts, pos, d_model]`."""
        last, device = self.lens.n_layers - 1, self.lens.device
        with self.lens.put({sites.resid_post(last): stream}):
            return self.lens.resume(last, stream, tokens.to(device), answers.to(device))

    @property
    def _type(self) -> torch.dtype:
        return next(self.lens.model.parameters()).dtype

    def heads(self, layer: int, name: str) -> int:
        """Of a block, at a hook of its attention."""
        return self.lens.heads(sites.component(layer, name))
