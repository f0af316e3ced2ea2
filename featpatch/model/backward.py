"""Backward passes under other rules, with the same forward pass: the gradients of `relp`, `gim` and of frozen models.

Each rule replaces a value y by `y.detach() + (g - g.detach())`: the value stays the same to the last bit, and the gradient is
that of g.

norms           g = (x - mean(x)) / s * w + b with the scale s as a constant (LN-rule of Ali et al. 2022).
activations     g = z * c with the constant c = act(z) / z (identity rule of Jafari et al. 2024).
products        g = (a * [b] + [a] * b) / 2 for the factors a = act(z) and b of a gated MLP, with [] for constants (half rule of
                Jafari et al. 2024).
patterns        frozen: a constant (AH-rule of Ali et al. 2022). Softened: g = T softmax(s / T) of the scores s, so that the
                backward pass uses the softmax Jacobian at the temperature T.
factors         g = x / 2 for queries, keys, values and attention patterns, which are the factors of attention's two products.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.layer import ACTIVATIONS, Head, Layer, Norm, close, hidden, norm_of, soft_capped
from featpatch.model.lens import Edit, Lens
from featpatch.threads import editing, in_this_thread

TEMPERATURE = 2.0
"""The temperature of the softmax Jacobian for softened patterns."""


@dataclass(frozen=True)
class Rules:
    """The rules of a backward pass; by default those of the model itself. The module defines each rule.

    Attributes:
        norms: whether the scales of norms are constants.
        patterns: `"live"`: attention patterns as they are; `"frozen"`: constants; `"softened"`: with the softmax Jacobian at
            the temperature 2.
        activations: whether activation functions are products with a constant.
        products: whether the two factors of a gated MLP get half of the gradient each.
        factors: whether the factors of attention's products (query and key, pattern and value) get half each.
    """

    norms: bool = False
    patterns: Literal["live", "frozen", "softened"] = "live"
    activations: bool = False
    products: bool = False
    factors: bool = False


RULES: Mapping[str, Rules] = {
    "relp": Rules(norms=True, patterns="frozen", activations=True, products=True),
    "relp_qk": Rules(norms=True, activations=True, products=True),
    "gim": Rules(norms=True, patterns="softened", products=True, factors=True),
}
"""The rules of methods of estimation, by name.

relp        Relevance patching (Jafari et al. 2025, arXiv 2508.21258) with all of its rules; nothing flows through queries and
            keys.
relp_qk     The same without the AH-rule: gradients flow through queries and keys too.
gim         Gradient interaction modifications (Edin et al. 2025, arXiv 2505.17630), as in the authors' package gim-explain:
            queries and keys get a quarter of their gradient, values a half.
"""

NORMS = ("norm1", "post1", "query_norm", "key_norm", "norm2", "post2")
"""The norms of a `Layer`."""

LIVE = Rules()
"""The rules of the model itself."""

FROZEN = Rules(norms=True, patterns="frozen")
"""The rules under which a model is linear between its MLPs: norm scales and attention patterns are constants."""


@overload
def under(part: Norm, rules: Rules) -> Norm: ...
@overload
def under(part: Norm | None, rules: Rules) -> Norm | None: ...
@overload
def under(part: Layer, rules: Rules) -> Layer: ...
@overload
def under(part: Head, rules: Rules) -> Head: ...
def under(part: Norm | Layer | Head | None, rules: Rules) -> Norm | Layer | Head | None:
    """Return a part of a model as row-wise functions, with the gradients of rules; for attention, see `attend`."""
    if isinstance(part, Norm):
        return replace(part, frozen=rules.norms)
    if isinstance(part, Head):
        return replace(part, norm=under(part.norm, rules))
    if isinstance(part, Layer):
        norms = {name: under(getattr(part, name), rules) for name in NORMS}
        mlp = part.mlp and replace(part.mlp, scaled=rules.activations, halved=rules.products)
        return replace(part, mlp=mlp, **norms)
    return None


def attend(
    layer: Layer,
    q: Float[torch.Tensor, "prompts queries heads d_head"],
    k: Float[torch.Tensor, "prompts pos kv_heads d_head"],
    v: Float[torch.Tensor, "prompts pos kv_heads d_head"],
    rules: Rules,
) -> Float[torch.Tensor, "prompts queries heads d_head"]:
    """Return the outputs of heads, with the gradients of rules.

    Args:
        layer: the layer, with norms under the same rules.
        q: the queries of the last positions, as projected.
        k, v: the keys and values of all positions, as projected; several heads may share them.
        rules: the rules for the factors and patterns of attention.
    """
    if rules.factors:
        q, k, v = _half(q), _half(k), _half(v)
    positions, shared = torch.arange(k.shape[1], device=k.device), q.shape[2] // k.shape[2]
    rows = layer.placed(q.flatten(0, 1), layer.query_norm, positions[-q.shape[1] :].repeat(len(q))).view_as(q)
    keys = layer.placed(k.flatten(0, 1), layer.key_norm, positions.repeat(len(k))).view_as(k)
    rows, keys, values = (x.transpose(1, 2) for x in (rows, keys, v))
    if shared > 1:
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    scores, unseen = soft_capped(rows @ keys.mT * layer.scale, layer.softcap), layer.unseen(q.shape[1], k.shape[1])
    if unseen is not None:
        scores = scores.masked_fill(unseen, -torch.inf)
    pattern = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    if rules.patterns != "live":
        pattern = pattern.detach() if rules.patterns == "frozen" else _softened(pattern)
    return ((_half(pattern) if rules.factors else pattern) @ values).transpose(1, 2)


@contextmanager
def modified(lens: Lens, rules: Rules) -> Iterator[None]:
    """Make backward passes of a model follow rules, in calls of this thread, until the context ends.

    Forward values stay the same. Where an activation is a leaf at a hook point (`model/gradients.py`), its gradient
    follows the rules downstream.

    Raises:
        FeatpatchError: on entry or in a forward pass, if a layer does not have the form that a rule is defined for.
    """
    with ExitStack() as stack:
        if rules.norms:
            for module in lens.model.modules():
                if hasattr(module, "hook_normalized") and hasattr(module, "hook_scale"):
                    stack.enter_context(_frozen(lens, module))
        for layer in range(lens.n_layers):
            for site, edit, last in _edits(lens, layer, rules):
                if site not in lens.hook_points:
                    raise _form(f"the model has no hook {site!r}")
                stack.enter_context(lens.edit(site, edit, first=not last, last=last))
        yield


def _edits(lens: Lens, layer: int, rules: Rules) -> Iterator[tuple[str, Edit, bool]]:
    """Yield the edits of a layer: the hook point, the edit and whether it runs after all others, rather than before them."""
    if rules.patterns != "live":
        attention = _Attention(layer, torch.Tensor.detach if rules.patterns == "frozen" else _softened, [])
        yield sites.component(layer, "pattern"), attention.pattern, False
        yield sites.component(layer, "z"), attention.check, False
    for factor in ("q", "k", "v", "pattern") if rules.factors else ():
        yield sites.component(layer, factor), _half, True
    if not lens.attention_only and (rules.activations or rules.products):
        z, other = sites.mlp_inputs(layer)
        mlp = _Mlp(lens, layer, rules, (z, other) if other in lens.hook_points else (z,), {})
        for site in mlp.inputs:
            yield site, mlp.keep(site), True
        yield sites.component(layer, "neurons"), mlp, False


def _same(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a value with the gradient of another."""
    other = other.to(value)
    return value.detach() + (other - other.detach())


def _half(x: torch.Tensor) -> torch.Tensor:
    return _same(x, x / 2)


def _softened(pattern: torch.Tensor) -> torch.Tensor:
    """Return a pattern with the gradient of a softmax at a temperature: `softmax(log p / T)` is `softmax(scores / T)`.

    Raises:
        FeatpatchError: the rows of the pattern don't sum to 1.
    """
    wide = torch.promote_types(pattern.dtype, torch.float32)
    p = pattern.to(wide)
    if not close(p.sum(-1), torch.ones_like(pattern[..., 0])):
        raise _form("attention patterns don't sum to 1, as with attention sinks")
    return _same(pattern, TEMPERATURE * (p.clamp(min=torch.finfo(wide).tiny).log() / TEMPERATURE).softmax(-1))


@contextmanager
def _frozen(lens: Lens, module: Any) -> Iterator[None]:
    """Make the scale of a norm module a constant in backward passes of this thread, until the context ends.

    The difference of the two gradients is added, so that hook points inside the norm keep theirs. On a TransformerBridge, input
    and output are hook points inside the norm, and what is set there must not pass on a gradient of the norm.
    """
    norm, kept = norm_of(module, lens.model.cfg), list[torch.Tensor]()
    frozen = under(norm, FROZEN)

    def keep(x: torch.Tensor, hook: object) -> None:
        kept[:] = [x]

    def freeze(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        if norm is None or frozen is None or not torch.is_grad_enabled():
            return None
        live = norm(x)
        if not close(live, output):
            raise _form(f"a {type(module).__name__} does not return its normed input")
        change = (frozen(x) - live).to(output)
        return output + (change - change.detach())

    def outside(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        return freeze(args[0], output)

    def inside(output: torch.Tensor, hook: object) -> torch.Tensor | None:
        return freeze(kept.pop(), output)

    with ExitStack() as stack:
        if hasattr(module, "hook_in"):
            stack.enter_context(editing(lens.model, module.hook_in, keep, first=False, last=True))
            stack.enter_context(editing(lens.model, module.hook_out, inside, first=True))
        else:
            stack.callback(module.register_forward_hook(in_this_thread(outside)).remove)
        yield


@dataclass(frozen=True)
class _Attention:
    """The edit of an attention pattern, and the check that the heads' outputs are computed from it.

    TransformerBridge runs the attention of some models (OPT, GPT-J) as a whole, and shows the pattern afterwards.

    Attributes:
        layer: the index of the layer.
        edit: the edit.
        seen: whether the pattern of the current forward pass has been edited: one entry if so.
    """

    layer: int
    edit: Callable[[torch.Tensor], torch.Tensor]
    seen: list[bool]

    def pattern(self, pattern: torch.Tensor) -> torch.Tensor:
        """Return the pattern with another gradient."""
        self.seen[:] = [True]
        return self.edit(pattern)

    def check(self, z: torch.Tensor) -> None:
        """Raise a FeatpatchError unless the pattern has been edited when the outputs of the heads are there."""
        if not self.seen and z.requires_grad:
            raise _form(f"the attention of layer {self.layer} does not compute its output from the pattern at its hook point")
        self.seen.clear()


@dataclass(frozen=True)
class _Mlp:
    """The edit of an MLP's hidden layer.

    Attributes:
        lens, layer, rules: the model, the index of the layer and the rules.
        inputs: the hook points of the activation function's input and, in a gated MLP, of the other factor.
        kept: the activations at these in the current forward pass.
    """

    lens: Lens
    layer: int
    rules: Rules
    inputs: tuple[str, ...]
    kept: dict[str, torch.Tensor]

    def keep(self, site: str) -> Edit:
        """Make the edit that keeps an input and leaves it as it is."""

        def keep(x: torch.Tensor) -> None:
            self.kept[site] = x

        return keep

    def __call__(self, post: torch.Tensor) -> torch.Tensor | None:
        """Return the hidden layer with the gradient of the rules.

        Raises:
            FeatpatchError: it isn't the activation function of the input, times the other factor of a gated MLP.
        """
        inputs = [self.kept.pop(site, None) for site in self.inputs]
        if not torch.is_grad_enabled():
            return None
        act = ACTIVATIONS.get(self.lens.model.cfg.act_fn)
        if act is None or any(x is None for x in inputs):
            raise _form(f"the MLP of layer {self.layer} has an unknown activation function or no {' and '.join(self.inputs)}")
        z, *others = [x for x in inputs if x is not None]
        if not any(close(value, post) for value in self._values(hidden(act, z, *others))):
            raise _form(f"the MLP of layer {self.layer} does not compute its activation function of its input")
        found = hidden(act, z, *others, scaled=self.rules.activations, halved=self.rules.products)
        return _same(post, found)

    def _values(self, product: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the values that the hidden layer can have; HookedTransformer adds the bias of a gated MLP after the product."""
        yield product
        bias = getattr(self.lens.model.blocks[self.layer].mlp, "b_in", None)
        if len(self.inputs) > 1 and bias is not None:
            yield product + bias


def _form(reason: str) -> FeatpatchError:
    return FeatpatchError(
        f"{reason}: expected norms, attention patterns and MLPs in the form that modified gradients are defined for (the MLP "
        "is act(x W_in) W_out or gated, and no hooks change values inside a norm); use method='atp' or method='exact'"
    )
