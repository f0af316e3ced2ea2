"""A model with attention patterns and the scales of norms frozen, as plain forward passes. Imports nothing of featpatch.

    x_mid = x + post1'((P v) W_O + b_O),  v = norm1'(x) W_V + b_V;    x_next = x_mid + what is given for the MLP

A norm with a prime keeps the scale that it has on the prompt. What the model writes is passed in, so that one source at a time
can be changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import oracle
import torch


def frozen_norm(module: Any, x: torch.Tensor, at: torch.Tensor, eps: float, *, weighted: bool = True) -> torch.Tensor:
    """A norm, its scale that of `at`. Norms of HookedTransformer hold `w` and `b`, those of a bridge wrap one of Hugging Face."""
    if module is None or isinstance(module, torch.nn.Identity):
        return x
    original = getattr(module, "original_component", None)
    name = type(original or module).__name__
    centred = name.startswith("LayerNorm")
    if original is None:
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    else:
        weight, bias = original.weight, getattr(original, "bias", None)
        weight = 1 + weight if "Gemma" in name else weight
        eps = getattr(original, "eps", getattr(original, "variance_epsilon", None)) or eps
    if centred:
        x, at = x - x.mean(-1, keepdim=True), at - at.mean(-1, keepdim=True)
    y = x / (at.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if not weighted:
        return y
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@dataclass
class Frozen:
    """A prompt in a model with everything frozen but what is added to the residual stream.

    `skips` are the matrices of skip transcoders by layer, which act on the recomputed input of the MLP; `hook` is where they read
    it, after the norm with its weight or before the weight.
    """

    model: Any
    tokens: torch.Tensor
    hook: str
    skips: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        oracle._activations.cache_clear()
        self.cache = {name: x[0] for name, x in oracle.activations(self.model, self.tokens).items()}
        self.layers = range(self.model.cfg.n_layers)
        self.parallel = bool(self.model.cfg.parallel_attn_mlp)
        self.eps = float(self.model.cfg.eps)

    def at(self, layer: int, name: str) -> torch.Tensor:
        return self.cache[f"blocks.{layer}.{name}"]

    def mid(self, layer: int) -> torch.Tensor:
        stream = self.at(layer, "hook_resid_pre")
        return stream if self.parallel else stream + self.at(layer, "hook_attn_out")

    def before_post(self, layer: int) -> torch.Tensor:
        attn = self.model.blocks[layer].attn
        z = self.at(layer, "attn.hook_z").reshape(len(self.tokens[0]), -1, self.model.cfg.d_head)
        return torch.einsum("phe,hed->pd", z, attn.W_O) + self.bias(attn, "b_O")

    @staticmethod
    def bias(attn: Any, name: str) -> Any:
        found = getattr(attn, name, None)
        return 0 if found is None else found

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        block = self.model.blocks[layer]
        attn, pattern = block.attn, self.at(layer, "attn.hook_pattern")
        y = frozen_norm(getattr(block, "ln1", None), x, self.at(layer, "hook_resid_pre"), self.eps)
        weight, bias = attn.W_V, self.bias(attn, "b_V")
        out = torch.zeros_like(x)
        for head in range(len(pattern)):
            shared = head * len(weight) // len(pattern)
            v = y @ weight[shared] + (bias[shared] if isinstance(bias, torch.Tensor) else 0)
            out = out + pattern[head] @ v @ attn.W_O[head]
        out = out + self.bias(attn, "b_O")
        return frozen_norm(getattr(block, "ln1_post", None), out, self.before_post(layer), self.eps)

    def mlp_input(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        block = self.model.blocks[layer]
        norm = getattr(block, "ln2", None) or (block.ln1 if self.parallel else None)
        return frozen_norm(norm, x, self.mid(layer), self.eps, weighted=not self.hook.endswith("hook_normalized"))

    @torch.no_grad()
    def run(self, start: torch.Tensor, written: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The input of each MLP and the logits at the last position, without a soft-cap.

        `written` is what each MLP adds, without its skip path.
        """
        x, inputs = start, []
        for layer in self.layers:
            out = self.attention(layer, x)
            inputs.append(self.mlp_input(layer, x if self.parallel else x + out))
            skipped = inputs[-1] @ self.skips[layer].T if layer in self.skips else 0
            x = x + out + written[layer] + skipped
        final = frozen_norm(getattr(self.model, "ln_final", None), x, self.at(self.layers[-1], "hook_resid_post"), self.eps)
        logits = final[-1] @ self.model.unembed.W_U
        return inputs, logits + self.bias(self.model.unembed, "b_U")
