"""The forward pass of a HookedTransformer recomputed from its weights, each receiver's input summed up edge by edge.

Imports nothing of ours, and uses no hooks. Senders are `embed` (tokens and positions), `L0.H3` and `L1.MLP` (each with its own
biases; an attention's b_O is no head's and always there), receivers `L1.H2.q`, `L1.H2.k`, `L1.H2.v`, `L0.MLP` and `logits`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens import HookedTransformer

Edge = tuple[str, str]


def edges_of(model: HookedTransformer) -> list[Edge]:
    """All edges, in the order of the forward pass."""
    senders, edges = ["embed"], []
    for layer in range(model.cfg.n_layers):
        heads = [f"L{layer}.H{head}" for head in range(model.cfg.n_heads)]
        edges += [(sender, f"{head}.{way}") for head in heads for way in "qkv" for sender in senders]
        senders += heads
        if not model.cfg.attn_only:
            edges += [(sender, f"L{layer}.MLP") for sender in senders]
            senders.append(f"L{layer}.MLP")
    return edges + [(sender, "logits") for sender in senders]


def forward_with_edges(
    model: HookedTransformer,
    clean: Tensor,
    corrupted: Tensor,
    ablated: set[Edge] | frozenset[Edge],
    other: dict[str, Tensor] | None = None,
) -> Tensor:
    """Logits `[pairs, pos, vocab]` of the clean prompts; an ablated edge brings what its sender wrote in the corrupted run.

    With `other`, it brings that instead: what each sender writes, `[pairs, pos, d_model]`.

    All other edges bring what their sender writes in this run, which ablated edges before it may have changed. Norms are
    computed from the input so put together, of each receiver by itself.
    """
    unknown = set(ablated) - set(edges_of(model))
    if unknown:
        raise ValueError(f"no such edges: {sorted(unknown)}")
    with torch.no_grad():
        return run(model, clean, outputs(model, corrupted) if other is None else other, ablated)[0]


@torch.no_grad()
def outputs(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """What each sender writes, `[pairs, pos, d_model]`."""
    return run(model, tokens, {}, frozenset())[1]


def run(
    model: HookedTransformer,
    tokens: Tensor,
    other: dict[str, Tensor],
    ablated: set[Edge] | frozenset[Edge],
    put: dict[str, Tensor] | None = None,
    pushes: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and outputs of senders; `put` replaces what senders write, and `pushes` are added to what receivers read."""
    cfg = model.cfg
    if cfg.positional_embedding_type != "standard" or cfg.parallel_attn_mlp or cfg.attention_dir != "causal":
        raise NotImplementedError("only learned positions, blocks in sequence, causal attention")
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    put, pushes = put or {}, pushes or {}
    written = {"embed": put.get("embed", model.W_E[tokens] + model.W_pos[:length])}
    always = torch.zeros(cfg.d_model, dtype=model.W_E.dtype)

    def read(receiver: str) -> Tensor:
        return (
            pushes.get(receiver, 0)
            + always
            + sum(other[name] if (name, receiver) in ablated else now for name, now in written.items())
        )

    for layer, block in enumerate(model.blocks):
        attention, heads = block.attn, {}
        for head in range(cfg.n_heads):
            name = f"L{layer}.H{head}"
            query, key, value = (
                _norm(model, read(f"{name}.{way}"), getattr(block, "ln1", None)) @ weight[head] + bias[head]
                for way, weight, bias in (
                    ("q", attention.W_Q, attention.b_Q),
                    ("k", attention.W_K, attention.b_K),
                    ("v", attention.W_V, attention.b_V),
                )
            )
            scores = query @ key.transpose(1, 2) / (cfg.d_head**0.5 if cfg.use_attn_scale else 1.0)
            heads[name] = scores.masked_fill(future, -torch.inf).softmax(-1) @ value @ attention.W_O[head]
        written |= {name: put.get(name, output) for name, output in heads.items()}
        always = always + attention.b_O
        if not cfg.attn_only:
            mlp, name = block.mlp, f"L{layer}.MLP"
            hidden = _norm(model, read(name), getattr(block, "ln2", None)) @ mlp.W_in + mlp.b_in
            written[name] = put.get(name, _activation(model, hidden) @ mlp.W_out + mlp.b_out)
    return _norm(model, read("logits"), getattr(model, "ln_final", None)) @ model.W_U + model.b_U, written


def _norm(model: HookedTransformer, x: Tensor, norm: torch.nn.Module | None) -> Tensor:
    kind = model.cfg.normalization_type
    if kind is None:
        return x
    if kind != "LN":
        raise NotImplementedError(f"normalization {kind}")
    return functional.layer_norm(x, x.shape[-1:], norm.w, norm.b, model.cfg.eps)


def _activation(model: HookedTransformer, x: Tensor) -> Tensor:
    return {"relu": functional.relu, "gelu": functional.gelu}[model.cfg.act_fn](x)


@torch.no_grad()
def forward_by_hooks(model: HookedTransformer, tokens: Tensor, other: dict[str, Tensor], ablated: dict[Edge, Tensor]) -> Tensor:
    """The logits of `run_by_hooks`."""
    return run_by_hooks(model, tokens, other, ablated)


def run_by_hooks(
    model: HookedTransformer,
    tokens: Tensor,
    other: dict[str, Tensor],
    ablated: dict[Edge, Tensor],
    put: dict[str, Tensor] | None = None,
    pushes: dict[Edge, Tensor] | None = None,
) -> Tensor:
    """Logits `[pairs, pos, vocab]` of any HookedTransformer with split inputs, put together at the hooks of the receivers.

    Senders and receivers are named as above. A head writes what goes into the norm after attention, where there is one, and that
    norm is applied anew to the heads that each receiver sees.

    Args:
        other: what senders write when ablated, broadcast to `[pairs, pos, d_model]`.
        ablated: for ablated edges where they are, `[pairs, pos]`; all other edges bring what their sender writes in this run.
        put: replaces what senders write.
        pushes: for some edges, what is added to what they bring.
    """
    put, pushes = put or {}, pushes or {}
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_attn_result(True)
    cfg, written, hooks = model.cfg, {}, []

    def read(receiver: str, layers: int, mlps: int) -> Tensor:
        def seen(sender: str) -> Tensor:
            where = ablated.get((sender, receiver), torch.zeros(tokens.shape, dtype=torch.bool))
            kept = written[sender] + pushes.get((sender, receiver), 0)
            return torch.where(where[..., None], other[sender] if (sender, receiver) in ablated else kept, kept)

        total = seen("embed")
        for layer, block in enumerate(model.blocks):
            if layer < layers:
                heads = sum(seen(f"L{layer}.H{head}") for head in range(cfg.n_heads)) + block.attn.b_O
                total = total + (block.ln1_post(heads) if cfg.use_normalization_before_and_after else heads)
            if layer < mlps:
                total = total + seen(f"L{layer}.MLP")
        return total

    def keep(name: str) -> Callable[..., None]:
        def hook(x: Tensor, hook: object) -> None:
            found = {f"{name}{head}": x[:, :, head] for head in range(x.shape[2])} if name.endswith("H") else {name: x}
            written.update({sender: put.get(sender, output) for sender, output in found.items()})

        return hook

    def put_head(layer: int, way: str) -> Callable[..., Tensor]:
        return lambda x, hook: torch.stack([read(f"L{layer}.H{head}.{way}", layer, layer) for head in range(x.shape[2])], 2)

    def put_mlp(layer: int) -> Callable[..., Tensor]:
        return lambda x, hook: read(f"L{layer}.MLP", layer + (not cfg.parallel_attn_mlp), layer)

    hooks.append(("blocks.0.hook_resid_pre", keep("embed")))
    for layer in range(cfg.n_layers):
        hooks += [(f"blocks.{layer}.hook_{way}_input", put_head(layer, way)) for way in "qkv"]
        hooks += [(f"blocks.{layer}.attn.hook_result", keep(f"L{layer}.H"))]
        hooks += [(f"blocks.{layer}.hook_mlp_in", put_mlp(layer)), (f"blocks.{layer}.hook_mlp_out", keep(f"L{layer}.MLP"))]
    hooks.append((f"blocks.{cfg.n_layers - 1}.hook_resid_post", lambda x, hook: read("logits", cfg.n_layers, cfg.n_layers)))
    try:
        logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
        model.set_use_attn_result(False)
    return logits


def written_by_hooks(model: HookedTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """What each sender writes in an unpatched run, `[pairs, pos, d_model]`, from the cache of TransformerLens."""
    _, cache = model.run_with_cache(tokens)
    found = {"embed": cache["blocks.0.hook_resid_pre"]}
    for layer, block in enumerate(model.blocks):
        each = torch.einsum("bphd,hdm->hbpm", cache["z", layer], block.attn.W_O)
        found |= {f"L{layer}.H{head}": value for head, value in enumerate(each)}
        found[f"L{layer}.MLP"] = cache["mlp_out", layer]
    return found
