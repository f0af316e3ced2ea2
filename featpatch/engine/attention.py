"""Attention of many patched runs that share the keys and values of one base run up to the first patched position.

    scores = [q . k_base(0..p-1) | q . k_own(p..a)] * scale,  soft-capped, masked;   z = softmax(scores) [v_base | v_own]

The base run's part is one matrix product per head for all patches; none of it is copied.
"""

import torch
from jaxtyping import Float

from featpatch.lens import Layer

BaseHeads = Float[torch.Tensor, "prefix kv_heads d_head"]


def attend(
    layer: Layer,
    q: Float[torch.Tensor, "patches queries heads d_head"],
    k: Float[torch.Tensor, "patches own kv_heads d_head"],
    v: Float[torch.Tensor, "patches own kv_heads d_head"],
    base_k: BaseHeads,
    base_v: BaseHeads,
) -> Float[torch.Tensor, "patches queries width"]:
    """Return the output of attention before W_O, with heads side by side.

    The queries are those of the last `queries` positions of each patch's own part. Heads that share keys (grouped-query
    attention) are treated as more queries of one key head.

    Args:
        layer: the layer.
        q, k, v: the queries, keys and values of the patched positions.
        base_k, base_v: the keys and values of the base run at the positions before.
    """
    patches, queries, heads, width = q.shape
    own, kv_heads, prefix = k.shape[1], k.shape[2], base_k.shape[0]
    group = heads // kv_heads
    rows = q.unflatten(2, (kv_heads, group)).permute(2, 0, 3, 1, 4).reshape(kv_heads, patches, group * queries, width)
    k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    scores = rows.new_empty(kv_heads, patches, group * queries, prefix + own)
    if prefix:
        scores[..., :prefix] = (rows.flatten(1, 2) @ base_k.permute(1, 2, 0)).view(kv_heads, patches, -1, prefix)
    scores[..., prefix:] = rows @ k.transpose(-1, -2)
    scores *= layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    hidden = _hidden(layer, queries, prefix + own, scores.device)
    if hidden is not None:
        scores.unflatten(2, (group, queries)).masked_fill_(hidden, -torch.inf)
    wide = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    pattern = torch.softmax(scores, -1, dtype=wide).to(v.dtype)
    z = pattern[..., prefix:] @ v
    if prefix:
        z += (pattern[..., :prefix].flatten(1, 2) @ base_v.transpose(0, 1)).view_as(z)
    return z.unflatten(2, (group, queries)).permute(1, 3, 0, 2, 4).reshape(patches, queries, heads * width)


def _hidden(layer: Layer, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """Return which keys `[queries, keys]` are hidden from the queries; None if all are seen.

    Later keys are hidden, and so are keys beyond the attention window.
    """
    if queries == 1 and (layer.window is None or keys <= layer.window):
        return None
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return back < 0 if layer.window is None else (back < 0) | (back >= layer.window)
