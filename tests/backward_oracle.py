"""A transformer written out from its weights, with constants where a backward pass has other rules. Imports nothing of ours.

The forward pass begins at the residual stream that enters the first layer. `stopped` names the parts that are constants:
`norms`, `patterns`, `activations`, `products` (half of the gradient for each factor of a gated MLP), `factors` (half for each of
query, key, value and pattern) and `softened` (the softmax Jacobian at temperature 2, as an autograd function).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


class HotSoftmax(torch.autograd.Function):
    """A softmax whose backward pass uses the Jacobian at temperature 2."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (scores,), gradient = ctx.saved_tensors, gradients[0]
        hot = (scores / 2).softmax(-1)
        return hot * gradient - hot * (hot * gradient).sum(-1, keepdim=True)


def norm(module: Any, x: Tensor, cfg: Any, frozen: bool) -> Tensor:
    own = getattr(module, "original_component", None)
    rms = "RMS" in type(own or module).__name__ or "RMS" in str(getattr(cfg, "normalization_type", ""))
    weight, bias = (module.w, getattr(module, "b", None)) if own is None else (own.weight, getattr(own, "bias", None))
    if own is not None and "Gemma" in type(own).__name__:
        weight = weight + 1
    eps = cfg.eps if own is None else getattr(own, "variance_epsilon", getattr(own, "eps", None))
    centred = x if rms else x - x.mean(-1, keepdim=True)
    scale = ((centred**2).mean(-1, keepdim=True) + eps) ** 0.5
    y = centred / (scale.detach() if frozen else scale) * weight
    return y if rms else y + bias


def rotate(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotate `[batch, pos, head, d_head]`, dimension i with dimension i + dims / 2."""
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / base ** (torch.arange(0, dims, 2, dtype=x.dtype) / dims)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two = x[..., : dims // 2], x[..., dims // 2 : dims]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, x[..., dims:]], -1)


def halved(x: Tensor) -> Tensor:
    return x / 2 + x.detach() / 2


class Written:
    """The model; `rotary` dimensions are rotated, scores are divided by `divisor`, and local layers see `window` positions."""

    def __init__(
        self, model: Any, *, rotary: int = 0, divisor: float = 2.0, softcap: float = 0.0, final_cap: float = 0.0,
        windows: tuple[int, ...] = (99, 99, 99), parallel: bool = False, stopped: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.model, self.stopped, self.rotary, self.divisor = model, stopped, rotary, divisor
        self.softcap, self.final_cap, self.windows, self.parallel = softcap, final_cap, windows, parallel
        self.taps: dict[str, Tensor] = {}

    def tap(self, layer: int, name: str, x: Tensor) -> Tensor:
        self.taps[f"blocks.{layer}.{name}"] = x = x.clone().requires_grad_()
        return x

    def norm(self, module: Any, x: Tensor) -> Tensor:
        return x if module is None else norm(module, x, self.model.cfg, "norms" in self.stopped)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        attn = self.model.blocks[layer].attn
        rows = {}
        for name in "qkv":
            weight, bias = getattr(attn, f"W_{name.upper()}"), getattr(attn, f"b_{name.upper()}")
            found = torch.einsum("bpd,hde->bphe", x, weight)
            found = found if bias is None else found + bias.reshape(found.shape[2:])
            heads = 4 if name == "q" else getattr(self.model.cfg, "n_key_value_heads", None) or 4
            found = found[:, :, :: found.shape[2] // heads]
            found = self.tap(layer, f"attn.hook_{name}", found)
            found = halved(found) if "factors" in self.stopped else found
            if name != "v":
                found = self.norm(getattr(attn, f"{name}_norm", None), found)
                found = rotate(found, self.rotary, 10000.0) if self.rotary else found
            rows[name] = found.repeat_interleave(4 // heads, 2)
        scores = torch.einsum("bqhe,bkhe->bhqk", rows["q"], rows["k"]) / self.divisor
        scores = self.softcap * (scores / self.softcap).tanh() if self.softcap else scores
        age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        scores = scores.masked_fill((age < 0) | (age >= self.windows[layer]), -torch.inf)
        pattern = HotSoftmax.apply(scores) if "softened" in self.stopped else scores.softmax(-1)
        pattern = self.tap(layer, "attn.hook_pattern", pattern.detach() if "patterns" in self.stopped else pattern)
        pattern = halved(pattern) if "factors" in self.stopped else pattern
        z = self.tap(layer, "attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, rows["v"]))
        out = torch.einsum("bqhe,hed->bqd", z, attn.W_O)
        return out if attn.b_O is None else out + attn.b_O

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp, act = self.model.blocks[layer].mlp, ACTS[self.model.cfg.act_fn]
        gate, bridge = getattr(mlp, "W_gate", None), hasattr(mlp, "original_component")
        bias = 0 if mlp.b_in is None else mlp.b_in
        inner = x @ mlp.W_in
        z = self.tap(layer, "mlp.hook_pre", inner + bias if gate is None else x @ gate)
        active = z * (act(z) / z).detach() if "activations" in self.stopped else act(z)
        if gate is not None:
            other = self.tap(layer, "mlp.hook_pre_linear", inner + bias if bridge else inner)
            active = halved(active * other) if "products" in self.stopped else active * other
            active = active if bridge else active + bias
        post = self.tap(layer, "mlp.hook_post", active)
        return post @ mlp.W_out + (0 if mlp.b_out is None else mlp.b_out)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[batch, pos, vocab]` from the residual stream that enters the first layer."""
        for layer, block in enumerate(self.model.blocks):
            before = x = self.tap(layer, "hook_resid_pre", x)
            normed = self.norm(block.ln1, x)
            attn_out = self.norm(getattr(block, "ln1_post", None), self.attention(layer, normed))
            x = x + self.tap(layer, "hook_attn_out", attn_out)
            normed = self.norm(getattr(block, "ln2", None) or block.ln1, before if self.parallel else x)
            mlp_out = self.norm(getattr(block, "ln2_post", None), self.mlp(layer, normed))
            x = x + self.tap(layer, "hook_mlp_out", mlp_out)
        unembed = self.model.unembed
        logits = self.norm(self.model.ln_final, x) @ unembed.W_U + (0 if unembed.b_U is None else unembed.b_U)
        return self.final_cap * (logits / self.final_cap).tanh() if self.final_cap else logits


def gradients(written: Written, x: Tensor, correct: int, wrong: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The difference of two logits at the last position, `[batch]`, and its gradients at the hook points."""
    logits = written(x.clone().requires_grad_())[:, -1]
    values = logits[:, correct] - logits[:, wrong]
    found = torch.autograd.grad(values.sum(), list(written.taps.values()), allow_unused=True)
    kept = zip(written.taps.items(), found, strict=True)
    return values.detach(), {name: torch.zeros_like(tap) if g is None else g for (name, tap), g in kept}
