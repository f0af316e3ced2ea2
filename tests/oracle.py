"""The slow, naive reference: one hooked forward pass of the whole model per patch. Imports nothing of featpatch."""

from functools import lru_cache
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge


@lru_cache(maxsize=64)
def _activations(model: Any, tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([tokens]))
    return {name: cache[name].clone() for name in cache}


def activations(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return _activations(model, tuple(tokens[0].tolist()))


def logit_diff(logits: torch.Tensor, correct: int, wrong: int, position: int = -1) -> float:
    return float(logits[0, position, correct] - logits[0, position, wrong])


def decode(sae: Any, features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return sae.decode(features).reshape(like.shape)


@torch.no_grad()
def patched_logits(
    model: Any, sae: Any, base: torch.Tensor, source: torch.Tensor, *, features: list[int], positions: list[int], error: bool
) -> torch.Tensor:
    """Logits of the base run with features (and error) at positions set to their values in the source run.

    Straight from the definition: x' = dec(f') + e'.
    """
    reads = sae.cfg.metadata.hook_name
    writes = sae.cfg.metadata.hook_name_out or reads
    runs = []
    for tokens in (base, source):
        cache = activations(model, tokens)
        f = sae.encode(cache[reads])
        runs.append((f, cache[writes] - decode(sae, f, cache[writes])))
    (f_base, e_base), (f_source, e_source) = runs
    f_new, e_new = f_base.clone(), e_base.clone()
    for position in positions:
        for feature in features:
            f_new[0, position, feature] = f_source[0, position, feature]
        if error:
            e_new[0, position] = e_source[0, position]

    old = activations(model, base)[writes]
    return replaced(model, base, writes, old, (decode(sae, f_new, old) + e_new).to(old.dtype))


@torch.no_grad()
def patched_activation_logits(
    model: Any, hook: str, base: torch.Tensor, source: torch.Tensor, positions: list[int]
) -> torch.Tensor:
    """Logits of the base run with the whole activation at positions taken from the source run: plain TransformerLens."""
    old = activations(model, base)[hook]
    new = old.clone()
    new[:, positions] = activations(model, source)[hook][:, positions]
    return replaced(model, base, hook, old, new)


def replaced(model: Any, tokens: torch.Tensor, hook: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Logits with `new` in the place of `old` at a hook.

    The bridge's `hook_resid_mid` is the input of the MLP's norm, which the stream goes past: there what attention adds to
    the stream is replaced too, so that both change.
    """
    hooks = [(hook, lambda activation, hook: new)]
    if isinstance(model, TransformerBridge) and hook.endswith("hook_resid_mid"):
        hooks = [(hook.replace("resid_mid", "attn_out"), lambda activation, hook: activation + (new - old))]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)
