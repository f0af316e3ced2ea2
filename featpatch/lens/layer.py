"""A transformer block as row-wise functions, so that rows of different prompts can share every matrix product.

    y = norm1(x);   q, k, v = y W + b          queries and keys then pass their norm and are rotated by their position
    x_mid  = x + post1(z W_O + b_O)            z from attention, the only step in which rows meet
    x_post = x_mid + post2(mlp(norm2(x_mid)))  in a parallel block the MLP reads x instead of x_mid

A row is one position of one prompt, `[rows, d_model]`. The weights are the model's own tensors, not copies, wherever
their layout allows it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

Rows = Float[torch.Tensor, "rows d"]
Heads = Float[torch.Tensor, "rows heads d_head"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""By the names that TransformerLens and Hugging Face use."""


class UnsupportedError(Exception):
    """A block that is not of the form above; such a model runs through its own forward pass instead."""


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where `centred` is False; both in float32 at least."""

    centred: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The normed rows, on the device of the weight."""
        x = x if self.weight is None else x.to(self.weight.device)
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        weight = self.weight if self.weight is None else self.weight.to(wide.dtype)
        return F.rms_norm(wide, x.shape[-1:], weight, self.eps).to(x.dtype)


@dataclass(frozen=True)
class Linear:
    """`x W + b` with W `[d_in, d_out]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The mapped rows."""
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True)
class Mlp:
    """`act(x W_in + b_in) W_out + b_out`, or gated: `(act(x W_gate) * (x W_in) + b_in) W_out + b_out`."""

    activation: Callable[[torch.Tensor], torch.Tensor]
    gate: Linear | None
    into: Linear
    out: Linear

    def __call__(self, x: Rows) -> Rows:
        """The output rows."""
        if self.gate is None:
            return self.out(self.activation(self.into(x)))
        hidden = self.activation(self.gate(x)) * (x @ self.into.weight)
        return self.out(hidden if self.into.bias is None else hidden + self.into.bias)


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the first `cos.shape[1]` dimensions of a head (Su et al. 2021, arXiv 2104.09864).

    Attributes:
        cos, sin: `[pos, dims]`.
        adjacent: whether neighbours form a pair, rather than the two halves.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    adjacent: bool

    def __call__(self, x: Heads, positions: Int[torch.Tensor, " rows"]) -> Heads:
        """The rotated heads."""
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
    """One block.

    Attributes:
        query, key, value, out: projections; heads lie side by side.
        query_norm, key_norm: over one head, where the model has them.
        scale: factor of the attention scores; softcap: `c tanh(scores / c)`; window: how far back a query sees.
        mlp: None in attention-only models.
        parallel: whether attention and MLP read the same stream.
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
        """Where its rows are."""
        return self.query.weight.device

    def attention_input(self, x: Rows) -> Rows:
        """The normed stream, which the next two functions read."""
        return x if self.norm1 is None else self.norm1(x)

    def queries(self, y: Rows, positions: Int[torch.Tensor, " rows"]) -> Heads:
        """Queries by head, normed and rotated."""
        return self._placed(self._split(self.query(y)), self.query_norm, positions)

    def keys_values(self, y: Rows, positions: Int[torch.Tensor, " rows"]) -> tuple[Heads, Heads]:
        """Keys, normed and rotated, and values."""
        return self._placed(self._split(self.key(y)), self.key_norm, positions), self._split(self.value(y))

    def attention_output(self, z: Float[torch.Tensor, "rows width"]) -> Rows:
        """What attention adds to the stream; z holds the heads side by side."""
        out = self.out(z)
        return out if self.post1 is None else self.post1(out)

    def mlp_output(self, x: Rows) -> Rows:
        """What the MLP adds to the stream that it reads."""
        if self.mlp is None:
            return torch.zeros_like(x)
        out = self.mlp(x if self.norm2 is None else self.norm2(x))
        return out if self.post2 is None else self.post2(out)

    def _split(self, flat: Rows) -> Heads:
        return flat.unflatten(-1, (-1, self.d_head))

    def _placed(self, x: Heads, norm: Norm | None, positions: torch.Tensor) -> Heads:
        x = x if norm is None else norm(x)
        return x if self.rotation is None else self.rotation(x, positions)


@dataclass(frozen=True)
class Head:
    """From the final stream to logits: final norm, unembedding, soft-cap."""

    norm: Norm | None
    weight: Float[torch.Tensor, "d_model d_vocab"]
    bias: Float[torch.Tensor, " d_vocab"] | None
    softcap: float | None

    def __call__(self, x: Rows, columns: Int[torch.Tensor, " columns"] | None) -> Float[torch.Tensor, "rows columns"]:
        """Logits of some columns of the vocabulary, or of all."""
        weight = self.weight if columns is None else self.weight[:, columns]
        bias = self.bias if columns is None or self.bias is None else self.bias[columns]
        logits = Linear(weight, bias)((x if self.norm is None else self.norm(x)).to(weight.device))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Stack:
    """A model as blocks and a head."""

    layers: tuple[Layer, ...]
    head: Head
