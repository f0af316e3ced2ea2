"""A transformer layer as row-wise functions, so that rows of different prompts can share every matrix product.

    y = norm1(x);   q, k, v = y W + b          queries and keys are then normed and rotated by their position
    x_mid  = x + post1(z W_O + b_O)            z from attention, the only step that combines rows
    x_post = x_mid + post2(mlp(norm2(x_mid)))  in a parallel layer the MLP reads x instead of x_mid

A row is one position of one prompt, `[rows, d_model]`. The weights are the model's own tensors, not copies, wherever
their layout allows it. The lenses convert the layers of a TransformerLens model, and `build` adds the map to logits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int

Rows = Float[torch.Tensor, "rows d"]
Hidden = Float[torch.Tensor, "rows d_mlp"]
Heads = Float[torch.Tensor, "rows heads d_head"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""Activation functions by the names that TransformerLens and Hugging Face use."""


REDUCED = {"high": 2**-10, "medium": 2**-7}
"""The precision to which PyTorch may round float32 in matrix products (TF32, bfloat16), by its `float32_matmul_precision`."""


def product_rounding(dtype: torch.dtype, units: int) -> float:
    """Return the accepted deviation of matrix products from each other by rounding, as a share of the largest value.

    PyTorch can be set to round float32 to TF32 or bfloat16 in matrix products, see `torch.set_float32_matmul_precision`. Rows
    that are multiplied together then differ from rows that are multiplied one by one as if the model had fewer bits.

    Args:
        dtype: the dtype of the numbers that are multiplied.
        units: the deviation in units of the dtype's precision; at most 8 if it has as few bits as TF32.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32:
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # set for one backend alone, which PyTorch refuses to describe by one word
            precision = "high"
        eps = max(eps, REDUCED.get(precision, 0.0))
    return float(eps * (min(units, 8) if eps > 1e-4 else units))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two activations are equal but for rounding in the dtype of the second.

    Rounding is at least that of float32, in which models compute norms.
    """
    one, other = one.detach().to(other), other.detach()
    eps = max(torch.finfo(other.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((one - other).abs().max() <= eps**0.5 * other.abs().max())


class UnsupportedError(Exception):
    """Error for a model whose layers do not have the form above; such a model runs through its own forward pass instead."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm if `centred` is False; both in float32 at least.

    Attributes:
        centred: whether the mean is subtracted.
        weight, bias: what the normed input is multiplied by and what is added; None for nothing.
        eps: the number added to the variance.
        frozen: whether the scale passes no gradient on.
    """

    centred: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    frozen: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise rows, on the device of the weight."""
        x = x if self.weight is None else x.to(self.weight.device)
        if self.centred and not self.frozen:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.frozen:
            found = self.scaled(wide, wide.detach())
            return (found if self.bias is None else found + self.bias.to(found)).to(x.dtype)
        weight = self.weight if self.weight is None else self.weight.to(wide.dtype)
        return F.rms_norm(wide, x.shape[-1:], weight, self.eps).to(x.dtype)

    def pull(self, weights: Float[torch.Tensor, "*rows d"], at: Float[torch.Tensor, "*at d"]) -> Float[torch.Tensor, "*rows d"]:
        """Return the gradient of `norm(at) @ weights` with respect to `at`, row by row, with the scale frozen at its value.

        The leading axes of `at` broadcast to those of `weights`.

        Because the norm with a frozen scale is linear except for its bias, the contribution of each summand of `at` is its
        product with this gradient.
        """
        found = weights / self._scale(at)
        return self._centred(found if self.weight is None else found * self.weight.to(found))

    def scaled(self, x: Float[torch.Tensor, "*rows d"], at: Float[torch.Tensor, "*at d"]) -> Float[torch.Tensor, "*rows d"]:
        """Return what a summand `x` of `at` contributes to `norm(at)` with the scale frozen; the bias is not included.

        The leading axes of `at` broadcast to those of `x`.
        """
        found = self._centred(x) / self._scale(at)
        return found if self.weight is None else found * self.weight.to(found)

    def push(self, changes: Float[torch.Tensor, "changes rows d"], at: Rows) -> Float[torch.Tensor, "changes rows d"]:
        """Return the change of `norm(at)` to first order in each change of `at`; the scale changes too unless it is frozen."""
        scale, at, changes = self._scale(at), self._centred(at), self._centred(changes)
        of_scale = 0 if self.frozen else at * (at * changes).mean(-1, keepdim=True) / scale.square()
        found = (changes - of_scale) / scale
        return found if self.weight is None else found * self.weight.to(found)

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def _scale(self, at: torch.Tensor) -> torch.Tensor:
        return (self._centred(at).square().mean(-1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True)
class Linear:
    """The linear map `x W + b` with W `[d_in, d_out]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the map to rows."""
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


def hidden(
    activation: Callable[[torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    scaled: bool = False,
    halved: bool = False,
) -> torch.Tensor:
    """Return the hidden layer of an MLP, `act(z)`, or of a gated one, `act(z) * other`.

    Args:
        activation: the activation function.
        z: its input.
        other: the other factor of a gated MLP.
        scaled: whether gradients pass the activation function as the product of z with the constant `act(z) / z`, which is the
            limit from above where z is 0.
        halved: whether each factor of a gated MLP gets half of its gradient.
    """
    active = activation(z)
    if scaled:
        at = z.detach().where(z != 0, torch.finfo(z.dtype).tiny ** 0.25)
        active = z * (activation(at) / at)
    if other is None:
        return active
    return (active * other.detach() + active.detach() * other) / 2 if halved else active * other


@dataclass(frozen=True)
class Mlp:
    """An MLP: `act(x W_in + b_in) W_out + b_out`, or gated `(act(x W_gate) * (x W_in) + b_in) W_out + b_out`.

    Attributes:
        activation: the activation function.
        gate, into, out: the projections.
        scaled, halved: how gradients pass the hidden layer, see `hidden`.
    """

    activation: Callable[[torch.Tensor], torch.Tensor]
    gate: Linear | None
    into: Linear
    out: Linear
    scaled: bool = False
    halved: bool = False

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The maps to the input of the activation function and, in a gated MLP, to the other factor."""
        return (self.into,) if self.gate is None else (self.gate, Linear(self.into.weight, None))

    def hidden(self, inner: Sequence[Hidden]) -> Hidden:
        """Return the hidden layer from what the maps `inputs` return."""
        found = hidden(self.activation, *inner, scaled=self.scaled, halved=self.halved)
        return found if self.gate is None or self.into.bias is None else found + self.into.bias

    def written(self, inner: Sequence[Hidden]) -> Rows:
        """Return the output from what the maps `inputs` return."""
        return self.out(self.hidden(inner))


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the first `cos.shape[1]` dimensions of a head (Su et al. 2021, arXiv 2104.09864).

    Attributes:
        cos, sin: cosines and sines, `[pos, dims]`.
        adjacent: whether adjacent dimensions form a pair, rather than dimensions of the two halves.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    adjacent: bool

    def __call__(self, x: Heads, positions: Int[torch.Tensor, " rows"]) -> Heads:
        """Rotate heads by the positions of their rows."""
        dims = self.cos.shape[1]
        turned = x[..., :dims]
        if self.adjacent:
            flipped = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            flipped = torch.cat([-turned[..., dims // 2 :], turned[..., : dims // 2]], -1)
        turned = turned * self.cos[positions, None] + flipped * self.sin[positions, None]
        return torch.cat([turned, x[..., dims:]], -1).to(x.dtype)


@dataclass(frozen=True)
class Layer:
    """A transformer layer.

    Attributes:
        norm1, post1: the norms before and after attention; None if there is none.
        query, key, value, out: the projections of attention; heads lie side by side.
        query_norm, key_norm: the norms of queries and keys over one head; None if there are none.
        rotation: the rotary position embedding; None if there is none.
        d_head: the width of a head.
        scale: the factor on the attention scores.
        softcap: c in the soft-capped scores `c tanh(scores / c)`; None for no soft-cap.
        window: how many positions back a query sees; None for all.
        norm2, post2: the norms before and after the MLP; None if there is none.
        mlp: the MLP; None in attention-only models.
        parallel: whether attention and the MLP read the same residual stream.
    """

    norm1: Norm | None
    query: Linear
    key: Linear
    value: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    rotation: Rotation | None
    d_head: int
    scale: float
    softcap: float | None
    window: int | None
    out: Linear
    post1: Norm | None
    norm2: Norm | None
    mlp: Mlp | None
    post2: Norm | None
    parallel: bool

    @property
    def device(self) -> torch.device:
        """The device that the layer runs on."""
        return self.query.weight.device

    def attention_input(self, x: Rows) -> Rows:
        """Return the normed residual stream, which `queries` and `keys_values` read."""
        return x if self.norm1 is None else self.norm1(x)

    def queries(self, y: Rows, positions: Int[torch.Tensor, " rows"]) -> Heads:
        """Return the queries of each head, normed and rotated."""
        return self.placed(self._split(self.query(y)), self.query_norm, positions)

    def keys_values(self, y: Rows, positions: Int[torch.Tensor, " rows"]) -> tuple[Heads, Heads]:
        """Return the keys of each head, normed and rotated, and the values."""
        return self.placed(self._split(self.key(y)), self.key_norm, positions), self._split(self.value(y))

    def attention_output(self, z: Float[torch.Tensor, "rows width"]) -> Rows:
        """Return what attention adds to the residual stream; z holds the heads side by side."""
        out = self.out(z)
        return out if self.post1 is None else self.post1(out)

    def mlp_output(self, x: Rows) -> Rows:
        """Return what the MLP adds to the residual stream that it reads."""
        return torch.zeros_like(x) if self.mlp is None else self.mlp_written(self.mlp_inner(x))

    def mlp_inner(self, x: Rows) -> list[Hidden]:
        """Return the inputs of the MLP's activation function and other factor, see `Mlp.inputs`; none if there is no MLP."""
        y = x if self.norm2 is None else self.norm2(x)
        return [] if self.mlp is None else [linear(y) for linear in self.mlp.inputs]

    def mlp_written(self, inner: Sequence[Hidden]) -> Rows:
        """Return what the MLP adds to the residual stream from the inputs of its hidden layer."""
        assert self.mlp is not None
        out = self.mlp.written(inner)
        return out if self.post2 is None else self.post2(out)

    def placed(self, x: Heads, norm: Norm | None, positions: Int[torch.Tensor, " rows"]) -> Heads:
        """Return queries or keys as projected, normed and rotated by the positions of their rows."""
        x = x if norm is None else norm(x)
        return x if self.rotation is None else self.rotation(x, positions)

    def unseen(self, queries: int, keys: int) -> Bool[torch.Tensor, "queries keys"] | None:
        """Return which keys are hidden from the last queries; None if all are seen.

        Later keys are hidden, and so are keys beyond the attention window.
        """
        if queries == 1 and (self.window is None or keys <= self.window):
            return None
        back = torch.arange(keys - queries, keys, device=self.device)[:, None] - torch.arange(keys, device=self.device)
        return back < 0 if self.window is None else (back < 0) | (back >= self.window)

    def _split(self, flat: Rows) -> Heads:
        return flat.unflatten(-1, (-1, self.d_head))


def soft_capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return `cap tanh(x / cap)`, or x for None."""
    return x if cap is None else cap * torch.tanh(x / cap)


@dataclass(frozen=True)
class Head:
    """The map from the final residual stream to logits: final norm, unembedding and soft-cap."""

    norm: Norm | None
    weight: Float[torch.Tensor, "d_model d_vocab"]
    bias: Float[torch.Tensor, " d_vocab"] | None
    softcap: float | None

    def __call__(self, x: Rows, columns: Int[torch.Tensor, " columns"] | None) -> Float[torch.Tensor, "rows columns"]:
        """Return the logits of some columns of the vocabulary, or of all for None."""
        weight = self.weight if columns is None else self.weight[:, columns]
        bias = self.bias if columns is None or self.bias is None else self.bias[columns]
        logits = Linear(weight, bias)((x if self.norm is None else self.norm(x)).to(weight.device))
        return soft_capped(logits, self.softcap)


@dataclass(frozen=True)
class Stack:
    """A model as layers and the map to logits."""

    layers: tuple[Layer, ...]
    head: Head


def build(model: Any, layers: Iterable[Layer]) -> Stack:
    """Return a TransformerBridge or a HookedTransformer as row-wise functions; both use the same names for weights.

    Args:
        model: the model.
        layers: its layers, which are made only if the model has the right form.

    Raises:
        UnsupportedError: the model does not have the form described above.
    """
    cfg = model.cfg
    if cfg.positional_embedding_type not in ("standard", "rotary"):
        raise UnsupportedError(f"position embeddings of type {cfg.positional_embedding_type!r}")
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise UnsupportedError("bidirectional attention")
    return Stack(tuple(layers), head_from(model))


def head_from(model: Any) -> Head:
    """Return the map from the final residual stream to logits that the weights describe; a model may scale logits after it."""
    cfg, bias = model.cfg, getattr(model.unembed, "b_U", None)
    return Head(norm_of(getattr(model, "ln_final", None), cfg), model.unembed.W_U, bias, softcap_of(cfg.output_logits_soft_cap))


def norm_of(module: Any, cfg: Any) -> Norm | None:
    """Convert a norm module; None if there is no norm.

    Norms of HookedTransformer hold `w` and `b`; those of a TransformerBridge wrap a Hugging Face module.
    """
    if module is None or isinstance(module, torch.nn.Identity):
        return None
    original = getattr(module, "original_component", None)
    if original is None:
        centred = type(module).__name__.startswith("LayerNorm")
        return Norm(centred, getattr(module, "w", None), getattr(module, "b", None), float(cfg.eps))
    centred = not module.uses_rms_norm
    eps = getattr(original, "eps", getattr(original, "variance_epsilon", cfg.eps))
    weight = getattr(original, "weight", None)
    if weight is not None and not centred and getattr(cfg, "rmsnorm_uses_offset", False):
        weight = weight + 1
    return Norm(centred, weight, getattr(original, "bias", None), float(eps))


def softcap_of(softcap: float | None) -> float | None:
    """Return a soft-cap of a configuration; None if it is not positive, which means that there is none."""
    return float(softcap) if softcap is not None and softcap > 0 else None
