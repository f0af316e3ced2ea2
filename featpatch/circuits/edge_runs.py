"""Runs of a model in which each receiver's input is the sum of its senders' outputs, some of them ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import prod

import torch

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING
from featpatch.circuits.edge_gradients import sender_hooks
from featpatch.circuits.edge_layout import EdgeLayout
from featpatch.circuits.mediators import Place
from featpatch.model.backward import LIVE, Rules, under
from featpatch.model.layer import Norm
from featpatch.model.projections import INSIDE, AttentionOutput, Projections, attention_outputs, projections_of
from featpatch.nodes import LOGITS, Node
from featpatch.sae.dictionary import Dictionary

COMPARED = 6
"""The number of first tokens on which a model's weights, read as a sum of parts, are compared with what the model computes."""

Written = dict[Node, torch.Tensor]
"""The output of each sender, `[circuits, pairs, pos, d_model]`."""


@dataclass(frozen=True, eq=False)
class Run:
    """A forward pass in which the input of each receiver is the sum of its senders' outputs.

    Attributes:
        tokens: token ids, `[pairs, pos]`.
        where: masks of the positions of the named nodes of mediators, by place.
        ablated: how far each edge is ablated, 0 to 1, `[circuits, items]`; None for an unpatched run.
        ablation_values: the ablation value of each sender's output.
        written: the outputs of senders in this run.
        projections: the projections of each layer's attention; None if heads run through the model.
        regions: the index of the region of each token, `[pairs, pos]`; None for a single region.
        before_norm: the input of the norm after attention, `[circuits, pairs, pos, d_model]`, by layer with such a norm.
        put: the values to which the outputs of some senders are set.
        changes: the changes that ablated edges make, if they are not the ablation values minus the outputs in this run.
        rules: the rules of a backward pass through the run.
    """

    tokens: torch.Tensor
    where: Mapping[Place, torch.Tensor]
    ablated: torch.Tensor | None = None
    ablation_values: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    written: Written = field(default_factory=dict)
    projections: Sequence[Projections] | None = None
    regions: torch.Tensor | None = None
    before_norm: dict[int, torch.Tensor] = field(default_factory=dict)
    put: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    changes: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    rules: Rules = LIVE

    def record(self, written: Written) -> Written:
        """Store the outputs of senders, with those in `put` set to their values, and return them."""
        written = {node: self.put[node].to(x).expand_as(x) if node in self.put else x for node, x in written.items()}
        self.written.update(written)
        return written

    def change(self, node: Node, output: torch.Tensor) -> torch.Tensor:
        """Return what an ablated edge adds to the input of its receiver."""
        if self.changes:
            return self.changes[node].to(output).expand_as(output)
        return self.ablation_values[node].to(output) - output


@dataclass(eq=False, repr=False)
class EdgeRuns(EdgeLayout):
    """Runs in which any edges are ablated, layer by layer."""

    _ablation: dict[int, tuple[Mapping[Place, torch.Tensor], Written]] = field(default_factory=dict, init=False, repr=False)
    _bias: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def ablated(self) -> tuple[Sequence[str], Sequence[Dictionary]]:
        """Return the hook points whose activations determine what senders write, and the dictionaries of mediators."""
        dictionaries = [group.dictionary for group in self.mediators.values()]
        return list(dict.fromkeys([*sender_hooks(self.lens), *(each.writes for each in dictionaries)])), dictionaries

    def written(self, tokens: torch.Tensor) -> tuple[Written, dict[tuple[int, str], torch.Tensor]]:
        """Compute senders' outputs in unpatched runs, `[prompts, pos, d_model]`, and the sum of attention biases by depth."""
        run = Run(tokens, {})
        self._pass(run)
        biases: dict[tuple[int, str], torch.Tensor] = {}
        total = torch.zeros_like(run.written[EMBEDDING][0])
        for layer in range(self.lens.n_layers):
            biases[layer, "pre"] = total
            total = total + self._bias[layer]
            biases[layer, "mid"] = total
        biases[self.lens.n_layers, "pre"] = total
        return {node: values[0] for node, values in run.written.items()}, biases

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

    @cached_property
    def _projections(self) -> list[Projections] | None:
        """The projections of each layer's attention by head; None if they can't be read and heads run through the model."""
        return projections_of(self.lens, self._sample(), COMPARED)

    @cached_property
    def _outputs(self) -> list[AttentionOutput | None]:
        """How each layer adds its heads to the residual stream; None for layers whose weights don't tell."""
        return attention_outputs(self.lens, self._sample()[:, :COMPARED])

    def _sample(self) -> torch.Tensor:
        """Return the tokens `[1, pos]` of one of the longest clean runs, on which weights are compared with the model."""
        some = max(self._groups(), key=lambda group: len(self.runs[group[0]]))
        return self.prompts(some[:1])[0]

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

    def _norm_key(self, sender: Node) -> int:
        """Return the layer of the norm that a sender's output goes into, or -1 if there is none."""
        return self.normed.get(sender, -1)

    def _regions_of(self, some: Sequence[int]) -> torch.Tensor | None:
        """Return the index of the region of each token of some equally long runs, `[runs, pos]`."""
        if not self.regions.given:
            return None
        pairs = (self.pairs[self.readings[index][0]] for index in some)
        return torch.stack([self.regions.numbers(pair, len(self.runs[some[0]])) for pair in pairs])

    @torch.no_grad()
    def _ablation_values(self, some: Sequence[int]) -> tuple[Mapping[Place, torch.Tensor], Written]:
        """Return masks of the positions of mediators, and the ablation values of senders; both are computed once."""
        if some[0] not in self._ablation:
            length = len(self.runs[some[0]])
            where = {place: group.where(self.tokens_at, some, length) for place, group in self.mediators.items()}
            self._ablation[some[0]] = where, self._ablated_outputs(some, where)
        return self._ablation[some[0]]

    def _ablated_outputs(self, some: Sequence[int], where: Mapping[Place, torch.Tensor]) -> Written:
        """Return the ablation value of each sender's output, `[runs or 1, pos, d_model]`."""
        others = self.others(some)
        if others is not None:
            run = Run(others, where, projections=self._projections)
            self._pass(run)
            return {node: values[0] for node, values in run.written.items()}
        tokens, _ = self.prompts(some[:1])
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
            dictionary, passing = group.dictionary, fixed[group.dictionary.writes].flatten(2)
            read = self.lens.read(tokens, sorted({dictionary.reads, dictionary.writes}))
            split = dictionary.split(read)
            features, error = self.everywhere(dictionary, (split.features[0], split.error[0]), tokens.shape[1])
            shares = group.fixed(features[None], error[None], passing, where[place])
            found |= {node: self._written_by(place, share) for node, share in shares.items()}
        return found

    def _fixed(self, some: Sequence[int], hooks: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return ablation values `[1, pos, ...]` that are the same in all runs, by hook point."""
        tokens, _ = self.prompts(some[:1])
        read = self.lens.read(tokens, hooks)
        return {hook: self.everywhere(hook, (read[hook][0],), tokens.shape[1])[0][None] for hook in hooks}

    def _pass(self, run: Run) -> torch.Tensor:
        """Return the input of the logits, `[circuits, pairs, pos, d_model]`, and store the outputs of senders in the run."""
        entry = self.lens.read(run.tokens, [sites.resid_pre(0)])[sites.resid_pre(0)]
        stream = entry.expand(1 if run.ablated is None else len(run.ablated), *entry.shape)
        sent = run.record({EMBEDDING: stream})
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

    def _mediated(self, place: Place, passing: torch.Tensor, sent: Written, run: Run) -> tuple[torch.Tensor, Written]:
        """Return the activation that passes a place (the sum of its mediators, if there are any) and the senders after it."""
        if place not in self.mediators:
            return passing, sent
        rows, which = self._inputs(self.mediators[place].nodes, passing, sent, run)
        shares = self.mediators[place].shares(rows, rows, which, run.where[place])
        found = run.record({node: self._written_by(place, share) for node, share in shares.items()})
        return torch.stack(list(found.values())).sum(0), found

    def _written_by(self, place: Place, share: torch.Tensor) -> torch.Tensor:
        """Return what a mediator writes to the residual stream (before a norm after attention), given its output."""
        output = self._outputs[place[0]] if place[1] == "z" else None
        return share if output is None else (share.to(output.weight) @ output.weight.flatten(0, 1)).to(share)

    def _slots(self, layer: int, z: torch.Tensor) -> Written:
        """Return what each head adds to `z`, `[circuits, pairs, pos, heads, d_head]`, in which heads lie side by side."""
        own = torch.eye(z.shape[3], dtype=z.dtype, device=z.device)[:, :, None]
        return {node: (z * own[head]).flatten(3) for head, node in enumerate(self._heads_at(layer, "z"))}

    def _attention(self, layer: int, stream: torch.Tensor, sent: Written, run: Run) -> tuple[torch.Tensor, Written]:
        """Compute what attention adds, and the output of each head, or of each mediator at `hook_z`, from its own inputs."""
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
            slots, output = run.record(self._slots(layer, z)), self._outputs[layer]
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
        total, norm = sum(run.record(heads).values(), bias), under(self._norm(layer), run.rules)
        self._bias[layer] = bias.expand_as(stream)[0, 0]
        if norm is None:
            return total, heads
        run.before_norm[layer] = total
        return norm(total).to(total), heads

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

    def _mlp_outputs(self, layer: int, stream: torch.Tensor, sent: Written, run: Run) -> Written:
        """Compute the output of an MLP, or of the nodes of its dictionary."""
        nodes, group = self._mlp(layer), self.mediators.get((layer, "mlp"))
        rows, which = self._inputs(nodes, stream, sent, run)
        if run.projections and group is None:
            of_layer = run.projections[layer].layer
            output = of_layer.mlp_output(rows.to(of_layer.device).flatten(0, -2)).view_as(rows).to(stream)
            return run.record({nodes[0]: output[0]})
        outputs = self._mlp_activation(layer, rows, run.tokens, sites.component(layer, "mlp_out"))
        if group is None:
            return run.record({nodes[0]: outputs[0]})
        read = outputs if group.dictionary.reads == group.dictionary.writes else self._mlp_activation(
            layer, rows, run.tokens, group.dictionary.reads
        )  # fmt: skip
        return run.record(group.shares(read, outputs, which, run.where[layer, "mlp"]))

    def _mlp_activation(self, layer: int, rows: torch.Tensor, tokens: torch.Tensor, hook: str) -> torch.Tensor:
        """Compute the activation at a hook point of an MLP from the MLP's inputs `[..., pos, d_model]`."""
        stream = rows.flatten(0, -3)
        put = {sites.component(layer, "attn_out"): torch.zeros_like(stream)}
        return self._through(layer, stream, tokens, hook, put).unflatten(0, rows.shape[:-2])

    def _through(
        self, layer: int, resid: torch.Tensor, tokens: torch.Tensor, hook: str, put: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Run a layer from its input `[rows, pos, d_model]` and return the activation at a hook point, with others set."""
        with self.lens.put(put or {}):
            prompts_of_rows = tokens.repeat(len(resid) // len(tokens), 1).to(self.lens.device)
            return self.lens.differentiable_through(layer, resid, prompts_of_rows, hook).to(resid.device)

    def _inputs(
        self, receivers: Sequence[Node], passing: torch.Tensor, sent: Written, run: Run
    ) -> tuple[torch.Tensor, list[int]]:
        """Compute the inputs of receivers, with the changes of ablated edges; receivers without ablated edges share a row.

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
            norm = None if layer < 0 else under(self._norm(layer), run.rules)
            before = None if norm is None else run.before_norm[layer]
            moved = moved + (change if norm is None or before is None else (norm(before + change) - norm(before)).to(change))
        whole = [] if of_receiver.all() else [passing[None]]
        which = torch.where(of_receiver, of_receiver.cumsum(0) - 1 + len(whole), 0)
        return torch.cat([*whole, passing + moved]), which.tolist()

    @property
    def _type(self) -> torch.dtype:
        return self.lens.first_weight.dtype


def _weighted(weights: torch.Tensor, changes: torch.Tensor, regions: torch.Tensor | None) -> torch.Tensor:
    """Return the weighted sum of senders' changes for each receiver, `[receivers, circuits, pairs, pos, d_model]`.

    Args:
        weights: the weight of each edge, `[circuits, receivers, senders, regions]`.
        changes: the changes, `[circuits, senders, pairs, pos, d_model]`.
        regions: the index of the region of each token, `[pairs, pos]`; None for a single region.
    """
    if regions is None:
        return (weights[..., 0] @ changes.flatten(2)).unflatten(2, changes.shape[2:]).transpose(0, 1)
    return torch.einsum("crsbt,csbtd->rcbtd", weights[..., regions.to(weights.device)], changes)
