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


def hooks(sae: Any) -> tuple[str, str]:
    """The hooks that a sae-lens object, or an object with `hook` and `hook_out`, reads and writes."""
    if hasattr(sae, "hook"):
        return sae.hook, sae.hook_out
    return sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name


def encode(sae: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(sae, "coder"):
        return sae.coder.encode(x.flatten(2))
    return sae.encode(x if sae.cfg.reshape_activations == "hook_z" else x.flatten(2))


def decode(sae: Any, features: torch.Tensor, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The reconstruction from features beside the activation `x` that was read.

    sae-lens decodes with the statistics of whatever it encoded last, so `x` is encoded before every call. A temporal SAE's
    reconstruction is its own forward pass with the novel codes exchanged, a skip transcoder's has the skip path added.
    """
    if hasattr(sae, "coder"):
        skipped = 0 if sae.skip is None else sae.skip(x.flatten(2))
        return (sae.coder.decode(features) + skipped).reshape(like.shape)
    own = encode(sae, x)
    decoded = sae.decode(features).reshape(like.shape)
    if hasattr(sae, "W_skip"):
        return decoded + (x.flatten(2) @ sae.W_skip.T).reshape(like.shape)
    if sae.cfg.architecture() == "temporal":
        forward = sae(x if sae.cfg.reshape_activations == "hook_z" else x.flatten(2)).reshape(like.shape)
        encode(sae, x)
        return forward + decoded - sae.decode(own).reshape(like.shape)
    return decoded


@torch.no_grad()
def patched_logits(
    model: Any, sae: Any, base: torch.Tensor, source: torch.Tensor, *, features: list[int], positions: list[int], error: bool
) -> torch.Tensor:
    """Logits of the base run with features (and everything else of the activation) at positions as in the source run.

    Straight from the definition: x' = dec(f') + e', with what decoding needs besides features from the run of the error.
    """
    reads, writes = hooks(sae)
    runs = []
    for tokens in (base, source):
        cache = activations(model, tokens)
        x, y = cache[reads], cache[writes]
        f = encode(sae, x)
        runs.append((x, f, y - decode(sae, f, x, y)))
    (x_base, f_base, e_base), (x_source, f_source, e_source) = runs
    f_new = f_base.clone()
    for position in positions:
        for feature in features:
            f_new[0, position, feature] = f_source[0, position, feature]
    old = activations(model, base)[writes]
    new = decode(sae, f_new, x_base, old) + e_base
    if error:
        new[:, positions] = (decode(sae, f_new, x_source, old) + e_source)[:, positions]
    return replaced(model, base, writes, old, new.to(old.dtype))


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
