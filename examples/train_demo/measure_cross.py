"""How faithful a dictionary over several hook points is; see `measure_dictionary` for what is measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import featpatch as fp
from featpatch.sae.cross_codec import CrossCodec

from .activations import load_model
from .measure_dictionary import (
    DOCUMENTS,
    LOSS_DOCUMENTS,
    Text,
    after_bos,
    best_features,
    cross_entropy,
    held_out_documents,
    properties,
    read,
    recovered,
    zero,
)


@torch.no_grad()
def measure_cross(model_folder: Path, folder: Path) -> dict[str, Any]:
    """All measurements of a saved CLT or crosscoder."""
    model, cross = load_model(model_folder), fp.load_sae(folder, dtype="float32")
    codec, text = CrossCodec(cross, torch.zeros(1)), read(held_out_documents(DOCUMENTS))
    features, true, made = [], [], []
    for ids, words in zip(text.ids.split(250), text.words.split(250), strict=True):
        cache = model.run_with_cache(ids, names_filter=[*cross.hook, *cross.hook_out], return_type=None)[1]
        found = codec.encode(torch.cat([cache[hook][:, 1:] for hook in cross.hook], dim=-1)).features
        features.append(found[words])
        true.append(torch.cat([cache[hook][:, 1:] for hook in cross.hook_out], dim=-1)[words])
        made.append(codec.decode(found, {})[words])
    x, f = torch.cat(true), torch.cat(features)
    left, all_of_it = (x - torch.cat(made)).pow(2).sum(0), (x - x.mean(0)).pow(2).sum(0)
    by_hook = (1 - left.view(len(cross.hook_out), -1).sum(1) / all_of_it.view(len(cross.hook_out), -1).sum(1)).tolist()
    return {
        "words": len(x),
        "features": f.shape[1],
        "l0": round((f > 0).float().sum(1).mean().item(), 2),
        "l0_by_group": [round((part > 0).float().sum(1).mean().item(), 2) for part in f.chunk(codec.groups, dim=1)],
        "dead_features": int((f.amax(0) <= 0).sum()),
        "hook_points": {
            hook: {"explained_variance": round(share, 4), **losses_at(model, codec, hook, text)}
            for hook, share in zip(cross.hook_out, by_hook, strict=True)
        },
        "together": losses_together(model, codec, text) if codec.groups > 1 else None,
        "best_features": {name: best_features(f, labels) for name, labels in properties(text).items()},
    }


def losses_at(model: TransformerBridge, codec: CrossCodec, hook: str, text: Text) -> dict[str, float]:
    """Losses with the reconstruction at one hook point, from what the unmodified model has at those that are read."""
    cross, ids = codec.cross, text.ids[:LOSS_DOCUMENTS]
    cache = model.run_with_cache(ids, names_filter=list(cross.hook), return_type=None)[1]
    made = codec.decode(codec.encode(torch.cat([cache[name] for name in cross.hook], dim=-1)).features, {})
    new = made.chunk(len(cross.hook_out), dim=-1)[cross.hook_out.index(hook)]

    def replace(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return after_bos(activation, new)

    replaced, without = (cross_entropy(model, text, [(hook, change)]) for change in (replace, zero))
    return recovered(cross_entropy(model, text, []), replaced, without)


def losses_together(model: TransformerBridge, codec: CrossCodec, text: Text) -> dict[str, float]:
    """Losses with the reconstructions of a CLT at all hook points: each layer reads what the reconstructions below make."""
    cross, kept = codec.cross, {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept[hook.name] = activation

    def replace(number: int) -> Callable[..., torch.Tensor]:
        def hook_fn(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            below = [kept.get(name, torch.zeros_like(activation)) for name in cross.hook]  # those above are not read here
            made = codec.decode(codec.encode(torch.cat(below, dim=-1)).features, {})
            return after_bos(activation, made.chunk(len(cross.hook_out), dim=-1)[number])

        return hook_fn

    spliced = [(hook, keep) for hook in cross.hook] + [(hook, replace(n)) for n, hook in enumerate(cross.hook_out)]
    without = cross_entropy(model, text, [(hook, zero) for hook in cross.hook_out])
    return recovered(cross_entropy(model, text, []), cross_entropy(model, text, spliced), without)
