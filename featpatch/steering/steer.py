"""Steer a model: within `steer`, every call runs with features, heads or directions set, moved or scaled.

    x' = x + dec(f with f_i := v(f_i)) - dec(f),   v(f_i) = v, f_i + v or v f_i

The reconstruction error is kept, as in a patch. A transcoder or cross-layer transcoder changes what its layers write, after
they have read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from types import NoneType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices, check_kinds, is_finite
from featpatch.model.lens import Edit, Fired, Lens, added
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs
from featpatch.sae.codec import Split
from featpatch.sae.cross_codec import CrossCodec
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any
from featpatch.sae.nodes import check_nodes, with_owner
from featpatch.steering.positions import Places, Sequences, check_places
from featpatch.steering.units import Unit, raw_values

How = Literal["set", "add", "scale"]
"""What a number does to a value: `v`, `f + v` or `v f`."""

Encode = Literal["steered", "unsteered"]
"""The run whose activations are encoded."""


def moved(values: Float[torch.Tensor, "*at n"], amounts: Float[torch.Tensor, "..."], how: How) -> Float[torch.Tensor, "*at n"]:
    """Return the new values, given the number of each or one for all."""
    amounts = amounts.to(values)
    if how == "set":
        return amounts.expand_as(values)
    return values + amounts if how == "add" else values * amounts


@dataclass(frozen=True, eq=False)
class Steered:
    """Values of one dictionary, or of one hook point, that are steered together.

    Attributes:
        owner: the dictionary; None for heads, neurons and whole activations.
        group: the number of the group of features (the layer of a cross-layer transcoder); 0 if there is only one.
        site: the hook point of heads, neurons and whole activations; empty for features.
        numbers: the features, or the coordinates of the flat activation, that are steered.
        amounts: the number that belongs to each.
        how: what the numbers do.
    """

    owner: Dictionary | None
    group: int
    site: str
    numbers: Int[torch.Tensor, " n"]
    amounts: Float[torch.Tensor, " n"]
    how: How

    @property
    def reads(self) -> tuple[str, ...]:
        """The hook points whose activations determine the change."""
        if self.owner is None:
            return (self.site,)
        return (self.owner.inputs[self.group],) if self.owner.codec.groups > 1 else self.owner.inputs

    @property
    def writes(self) -> tuple[str, ...]:
        """The hook points that are changed."""
        return (self.site,) if self.owner is None else self.owner.outputs[self.group :]

    def change(self, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the change `[batch, pos, d]` at each hook point, given the activations that are read."""
        if self.owner is None:
            flat = live[self.site].flatten(2)
            change = torch.zeros_like(flat)
            change[..., self.numbers] = moved(flat[..., self.numbers], self.amounts, self.how) - flat[..., self.numbers]
            return {self.site: change}
        x, codec = torch.cat([live[hook].flatten(2) for hook in self.reads], dim=-1), self.owner.codec
        code = codec.encode_group(x, self.group) if isinstance(codec, CrossCodec) and codec.groups > 1 else codec.encode(x)
        numbers, features = self.numbers.to(code.features.device), code.features.clone()
        features[..., numbers] = moved(features[..., numbers], self.amounts, self.how)
        chosen = torch.zeros(self.owner.d_sae, dtype=torch.bool)
        chosen[self.numbers] = True
        kept = features.new_zeros(*features.shape[:-1], codec.d_out)  # the error, which stays as it is
        base, source = Split(code.features, code.state, kept), Split(features, code.state, kept)
        changes = self.owner.by_output(self.owner.change(base, source, features=chosen))
        return {hook: changes[hook] for hook in self.writes}


@contextmanager
def steer(
    model: Any,
    values: Mapping[Node, float | str],
    *,
    saes: Any = None,
    how: How = "add",
    unit: Unit = "raw",
    reference: Sequence[str] | Pairs | None = None,
    positions: Places = "all",
    encode: Encode = "steered",
    pair: Pair | None = None,
    attention_mask: Int[torch.Tensor, "batch pos"] | None = None,
) -> Iterator[Fired]:
    """Context manager that steers features, heads or directions in every call of the model, also while it generates text.

    The result is the same with and without a KV cache, with sampling and with beams. The change acts only in the thread that
    enters the context. Other featpatch functions refuse the model in this thread until the context ends.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        values: a number for each node that is steered. Nodes are features, also of `fp.direction`, and heads, neurons and whole
            activations; their own positions are ignored. `"mean"` instead of a number is the mean over all tokens of the
            reference, only with `how="set"`.
        saes: the SAEs of the features.
        how: what the number does: `"add"` adds it to the value, `"set"` replaces the value (0 ablates it), `"scale"`
            multiplies the value. Heads and whole activations can't be added to; add a direction instead.
        unit: the unit of the numbers: `"raw"`; or, for features, `"mean"` or `"max"`: the mean over the tokens of the reference
            on which the feature is active, or its maximum there. Not with `"scale"`, whose numbers have no unit.
        reference: texts, or pairs whose prompts are used; required by the units and by `"mean"`.
        positions: the tokens that are steered, without special tokens: `"all"`; `"prompt"`; `"generated"`: every generated
            token; `"newest"`: the same and the last token of the prompt, so that every prediction after the prompt is made at a
            steered token; or a list of token indices of the prompt (-1 is its last token) and of labels of `pair`.
        encode: whether features are read in the `"steered"` model, whose activations earlier layers and tokens have changed
            already, or in the `"unsteered"` one, which needs a second run of the whole sequence in every call. Required to be
            `"unsteered"` for crosscoders, which read a layer after they have written to a lower one, and at `hook_resid_mid` of
            a TransformerBridge, which is changed by way of the output of attention.
        pair: the pair whose labels are among the positions; the prompts must be as long as its own.
        attention_mask: the mask of padded prompts, 1 for tokens and 0 for padding, so that indices count from the first token.

    Yields:
        A counter of how often the change was applied: once for each hook point and call of the model.

    Raises:
        FeatpatchError: the input is unusable, a feature is never active in the reference, the model's prompts don't fit the
            positions or the mask, an SAE writes before it has read everything, another `fp.do` or `fp.steer` on this model has
            not ended, or the model was never called.

    Examples:
        >>> tokens = model.to_tokens(demo.text()[0])[:, :8]
        >>> with fp.steer(model, {fp.feature(saes[0], 433): 3.0}, saes=saes[0], unit="mean", reference=pairs):
        ...     text = model.generate(tokens, max_new_tokens=4, do_sample=False, verbose=False)
        >>> len(text[0]) > len(tokens[0])
        True
    """
    lens = wrap(model)
    check_choices(get_args(How), how=how)
    check_choices(get_args(Encode), encode=encode)
    check_kinds((Pair, NoneType), pair=pair)
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise FeatpatchError(f"attention_mask is a {type(attention_mask).__name__}: expected a tensor [batch, pos] of 0 and 1")
    mask = None if attention_mask is None else torch.atleast_2d(attention_mask)
    prompts = Sequences(lens.tokenizer, check_places(positions, pair), pair, mask)
    groups = _groups(lens, dictionaries_if_any(lens, saes), values, how, unit, reference)
    steering = _Steering(lens, groups, prompts, encode)
    with steering.on():
        yield steering.total
        if not steering.reached:
            raise FeatpatchError(
                "the model was not called: expected a call of the model inside the `with fp.steer(...)` block, in the same "
                "thread"
            )


def _groups(
    lens: Lens, found: Sequence[Dictionary], values: Any, how: How, unit: Unit, reference: Sequence[str] | Pairs | None
) -> list[Steered]:
    """Return what is steered, by dictionary and hook point.

    Raises:
        FeatpatchError: the values are not numbers by node, a node can't be steered like this, or a unit does not fit.
    """
    if not isinstance(values, Mapping) or not values:
        raise FeatpatchError(f"values={values!r:.80}: expected a number for each node, such as {{fp.feature(sae, 7): 3.0}}")
    for node, value in values.items():
        if not is_finite(value) and value != "mean":
            raise FeatpatchError(f"values[{str(node)!r}]={value!r}: expected a finite number, or 'mean'")
    nodes = check_nodes(lens, list(values), found, "values")
    owners = [with_owner(lens, node, found) for node in nodes]
    given = dict(zip(nodes, values.values(), strict=True))
    amounts = raw_values(lens, found, given, how, unit, reference)
    groups: dict[tuple[str, str, int], tuple[Dictionary | None, list[int], list[torch.Tensor]]] = {}
    for node, owner in owners:
        site = "" if owner is not None else lens.site(node.site)
        check_node(node, owner, how)
        numbers = [owner.number(node)] if owner is not None else list(_coordinates(lens, node))
        name, group = ("", 0) if owner is None else (owner.name, numbers[0] // owner.per_group)
        _, all_numbers, all_amounts = groups.setdefault((site, name, group), (owner, [], []))
        if set(numbers) & set(all_numbers):
            raise FeatpatchError(f"{str(node)!r} overlaps another node: expected each value once; leave one of them out")
        all_numbers += numbers
        all_amounts.append(amounts[node].expand(len(numbers)))
    return [
        Steered(owner, group, site, torch.tensor(numbers), torch.cat(parts), how)
        for (site, _, group), (owner, numbers, parts) in groups.items()
    ]


def check_node(node: Node, owner: Dictionary | None, how: How) -> None:
    """Raise a FeatpatchError unless a node is of a kind that can be steered, and its values can be changed like this."""
    if owner is not None and node.kind == "feature":
        return
    if node.kind not in ("head", "neuron", "activation"):
        raise FeatpatchError(f"{str(node)!r}: expected a feature, a head, a neuron or a whole activation; leave it out")
    if how == "add" and node.kind != "neuron":
        raise FeatpatchError(
            f"{str(node)!r} with how='add': expected how='set' or 'scale', because a number has no direction in an activation; "
            "to add a direction, make it a feature with fp.direction(vector, hook)"
        )
    if not sites.by_position(node.site):
        raise FeatpatchError(f"{str(node)!r}: expected a hook point whose first dimension is the position, such as hook_z")


def _coordinates(lens: Lens, node: Node) -> range:
    """Return the coordinates of the flat activation that a head, a neuron or a whole activation consists of."""
    shape = lens.shape(lens.site(node.site))
    if node.kind == "activation" or node.index is None:
        return range(prod(shape))
    size = shape[-1] if node.kind == "head" else 1
    return range(node.index * size, (node.index + 1) * size)


@dataclass(eq=False)
class _Steering:
    """The edits of a model that steer it.

    Attributes:
        lens: the model.
        groups: what is steered.
        prompts: the sequences that the model works on.
        encode: the run whose activations are encoded.
        total: the number of times that a change was made.
        reached: whether any hook point that is written to was reached.
        paused: whether the model runs without being steered at the moment.
        live: the activations that have been read in the current call.
        changes: the changes at hook points that the current call has not reached yet.
        waiting: the groups whose change is not known yet in the current call.
    """

    lens: Lens
    groups: Sequence[Steered]
    prompts: Sequences
    encode: Encode
    total: Fired = field(default_factory=Fired, init=False)
    reached: bool = field(default=False, init=False)
    paused: bool = field(default=False, init=False)
    live: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    changes: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False)
    waiting: list[Steered] = field(default_factory=list, init=False)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Steer the calls of the model in this thread until the context ends."""
        hooks = {hook for group in self.groups for hook in group.reads}
        written = {hook for group in self.groups for hook in group.writes}
        with ExitStack() as stack:
            stack.enter_context(self.lens.seeing(self._begin))
            for hook in hooks:
                stack.enter_context(self.lens.edit(hook, self._reading(hook)))
            for hook in written:
                stack.enter_context(self.lens.edit(self.lens.carrier(hook), self._writing(hook)))
            yield

    def _begin(self, tokens: Int[torch.Tensor, "batch pos"], cached: bool | None) -> None:
        """Begin a call of the model with these tokens, see `Lens.seeing`."""
        if self.paused:
            return
        self.prompts.see(tokens, cached)
        self.live, self.changes, self.waiting = {}, {}, list(self.groups)
        if self.encode == "unsteered":
            self.paused = True
            try:
                hooks = sorted({hook for group in self.groups for hook in group.reads})
                self._read(self.lens.read(self.prompts.whole()[0], hooks, self.prompts.whole()[1]))
            finally:
                self.paused = False

    def _read(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take note of activations, and compute the changes that are known with them."""
        self.live.update(values)
        ready = [group for group in self.waiting if all(hook in self.live for hook in group.reads)]
        self.waiting = [group for group in self.waiting if group not in ready]
        for group in ready:
            for hook, change in group.change(self.live).items():
                self.changes.setdefault(hook, []).append(change)

    def _check_read(self, hook: str) -> None:
        """Check that what is written to a hook point is known.

        Raises:
            FeatpatchError: a dictionary that writes to it has not read everything yet, or no call has begun, because the model
                was not given tokens.
        """
        late = next((group for group in self.waiting if hook in group.writes), None)
        if late is not None:
            name = late.site if late.owner is None else late.owner.name
            missing = ", ".join(each for each in late.reads if each not in self.live)
            raise FeatpatchError(
                f"{name!r} writes to {self.lens.carrier(hook)!r} before it has read everything ({missing}): expected "
                "encode='unsteered', which reads values in a run of its own"
            )
        if hook not in self.changes:
            raise FeatpatchError(
                "the model was called without token ids, or runs a layer twice: expected tokens, whose positions are steered; "
                "pass tokens instead of embeddings or start_at_layer"
            )

    def _reading(self, hook: str) -> Edit:
        def keep(activation: torch.Tensor) -> None:
            if not self.paused:
                self._read({hook: activation})

        return keep

    def _writing(self, hook: str) -> Edit:
        def change(activation: torch.Tensor) -> torch.Tensor | None:
            if self.paused:
                return None
            self._check_read(hook)
            self.reached, length, changes = True, activation.shape[1], self.changes.pop(hook)
            mask = self.prompts.steered(length).to(activation.device)
            if not mask.any():
                return None
            total = torch.stack([each[:, -length:].to(activation.device) for each in changes]).sum(0) * mask
            self.total.count += 1
            return added(activation, total.reshape(activation.shape))

        return change
