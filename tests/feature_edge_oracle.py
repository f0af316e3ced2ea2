"""The forward pass of `edge_oracle` with sparse autoencoders that cut the graph: edges between single features.

Imports of ours only that file, and uses no hooks. A cut is an SAE or transcoder at a hook, with the nodes named there: features
or the error, each at its own positions, and last `rest of <hook>`, which is whatever else is there.
"""

import torch
from edge_oracle import Edge, _activation, _norm
from edge_oracle import edges_of as edges_without_cuts
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional
from transformer_lens import HookedTransformer

Named = tuple[str, int | str, Tensor]  # name, feature or "error", where `[pairs, pos]`
Mediators = tuple[str, str, SAE, list[Named]]  # the hook it reads, the hook it writes


def edges_of(model: HookedTransformer, cuts: list[Mediators]) -> list[Edge]:
    """All edges, in the order of the forward pass."""
    at = _by_hook(model, cuts)
    edges: list[Edge] = []

    def through(hook: str, senders: list[str]) -> list[str]:
        if hook not in at:
            return senders
        edges.extend((sender, node) for node in _nodes(at[hook]) for sender in senders)
        return _nodes(at[hook])

    senders = ["embed"]
    for layer in range(model.cfg.n_layers):
        senders = through(f"blocks.{layer}.hook_resid_pre", senders)
        heads = [f"L{layer}.H{head}" for head in range(model.cfg.n_heads)]
        edges += [(sender, f"{head}.{way}") for head in heads for way in "qkv" for sender in senders]
        senders = senders + through(f"blocks.{layer}.hook_attn_out", heads)
        if not model.cfg.attn_only:
            senders = through(f"blocks.{layer}.hook_resid_mid", senders)
            cut = at.get(f"blocks.{layer}.hook_mlp_out")
            parts = _nodes(cut) if cut else [f"L{layer}.MLP"]
            edges += [(sender, part) for part in parts for sender in senders]
            senders = senders + parts
        senders = through(f"blocks.{layer}.hook_resid_post", senders)
    return edges + [(sender, "logits") for sender in senders]


def forward_with_feature_edges(
    model: HookedTransformer, clean: Tensor, corrupted: Tensor, ablated: set[Edge] | frozenset[Edge], cuts: list[Mediators]
) -> Tensor:
    """Logits `[pairs, pos, vocab]` of the clean prompts; an ablated edge brings what its sender wrote in the corrupted run.

    Each node of a cut has an input put together for it alone, and encodes that: a feature writes its activation times its decoder
    row, the error what the reconstruction leaves, both zero where they are not; the rest writes what is left when all that the
    named nodes would write at its own input is taken away. On the stream nothing else goes past a cut, biases included; at
    `hook_attn_out` the cut stands for the layer's heads and b_O, at `hook_mlp_out` for the MLP, which each node runs by itself.
    """
    unknown = set(ablated) - set(edges_of(model, cuts))
    if unknown:
        raise ValueError(f"no such edges: {sorted(unknown)}")
    with torch.no_grad():
        return run(model, clean, cuts, outputs(model, corrupted, cuts), ablated)[0]


@torch.no_grad()
def outputs(model: HookedTransformer, tokens: Tensor, cuts: list[Mediators]) -> dict[str, Tensor]:
    """What each sender writes, `[pairs, pos, d_model]`, those that end at a cut included."""
    return run(model, tokens, cuts, {}, frozenset())[1]


def run(
    model: HookedTransformer,
    tokens: Tensor,
    cuts: list[Mediators],
    other: dict[str, Tensor],
    ablated: set[Edge] | frozenset[Edge],
    put: dict[str, Tensor] | None = None,
    pushes: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and outputs of senders; `put` replaces what senders write, and `pushes` are added to what receivers read."""
    put, pushes = put or {}, pushes or {}
    cfg, at = model.cfg, _by_hook(model, cuts)
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    nothing = torch.zeros(cfg.d_model, dtype=model.W_E.dtype)
    written = {"embed": put.get("embed", model.W_E[tokens] + model.W_pos[:length])}

    def read(receiver: str, senders: list[str], always: Tensor) -> Tensor:
        return (
            pushes.get(receiver, 0)
            + always
            + sum(other[name] if (name, receiver) in ablated else written[name] for name in senders)
        )

    def through(hook: str, senders: list[str], always: Tensor) -> tuple[list[str], Tensor]:
        """The senders and biases past a hook: those before it, or the nodes of the cut there alone."""
        if hook not in at:
            return senders, always
        for node in _nodes(at[hook]):
            x = read(node, senders, always)
            written[node] = put.get(node, _part(at[hook], node, x, x))
        return _nodes(at[hook]), nothing

    senders, always = ["embed"], nothing
    for layer, block in enumerate(model.blocks):
        here = f"blocks.{layer}"
        senders, always = through(f"{here}.hook_resid_pre", senders, always)
        attention, heads = block.attn, []
        for head in range(cfg.n_heads):
            name = f"L{layer}.H{head}"
            query, key, value = (
                _norm(model, read(f"{name}.{way}", senders, always), getattr(block, "ln1", None)) @ weight[head] + bias[head]
                for way, weight, bias in (
                    ("q", attention.W_Q, attention.b_Q),
                    ("k", attention.W_K, attention.b_K),
                    ("v", attention.W_V, attention.b_V),
                )
            )
            scores = query @ key.transpose(1, 2) / (cfg.d_head**0.5 if cfg.use_attn_scale else 1.0)
            written[name] = put.get(name, scores.masked_fill(future, -torch.inf).softmax(-1) @ value @ attention.W_O[head])
            heads.append(name)
        added, bias = through(f"{here}.hook_attn_out", heads, attention.b_O)
        senders, always = senders + added, always + bias
        if not cfg.attn_only:
            senders, always = through(f"{here}.hook_resid_mid", senders, always)
            mlp, cut = block.mlp, at.get(f"{here}.hook_mlp_out")
            parts = _nodes(cut) if cut else [f"L{layer}.MLP"]
            for name in parts:
                x = read(name, senders, always)
                hidden = _norm(model, x, getattr(block, "ln2", None)) @ mlp.W_in + mlp.b_in
                y = _activation(model, hidden) @ mlp.W_out + mlp.b_out
                normalised = functional.layer_norm(x, x.shape[-1:], eps=cfg.eps)
                reads = {f"{here}.hook_resid_mid": x, f"{here}.ln2.hook_normalized": normalised, f"{here}.hook_mlp_out": y}
                written[name] = put.get(name, _part(cut, name, reads[cut[0]], y) if cut else y)
            senders = senders + parts
        senders, always = through(f"{here}.hook_resid_post", senders, always)
    logits = _norm(model, read("logits", senders, always), getattr(model, "ln_final", None)) @ model.W_U + model.b_U
    return logits, written


def _part(cut: Mediators, node: str, x: Tensor, y: Tensor) -> Tensor:
    """What a node of a cut writes that read `x` and has its part of `y`."""
    _, _, sae, named = cut
    f = sae.encode(x)
    decoded = sae.decode(f)
    if not torch.allclose(decoded, f @ sae.W_dec + sae.b_dec, atol=1e-5):
        raise NotImplementedError("only decoders that are W_dec and b_dec")
    parts = {
        name: (y - decoded if which == "error" else f[..., which, None] * sae.W_dec[which]) * where[..., None]
        for name, which, where in named
    }
    return parts[node] if node in parts else y - sum(parts.values())


def _nodes(cut: Mediators) -> list[str]:
    return [name for name, _, _ in cut[3]] + [f"rest of {cut[1]}"]


def _by_hook(model: HookedTransformer, cuts: list[Mediators]) -> dict[str, Mediators]:
    """The cuts by the hook they write at; refuses what this file does not compute."""
    cfg = model.cfg
    if cfg.positional_embedding_type != "standard" or cfg.parallel_attn_mlp or cfg.attention_dir != "causal":
        raise NotImplementedError("only learned positions, blocks in sequence, causal attention")
    kinds = ["resid_pre", "attn_out", "resid_post"] + ([] if cfg.attn_only else ["resid_mid", "mlp_out"])
    hooks = {f"blocks.{layer}.hook_{kind}" for layer in range(cfg.n_layers) for kind in kinds}
    for reads, writes, _, _ in cuts:
        here = writes.removesuffix(".hook_mlp_out")
        inputs = {f"{here}.hook_resid_mid"} | ({f"{here}.ln2.hook_normalized"} if cfg.normalization_type == "LN" else set())
        if writes not in hooks or not (reads == writes or (here != writes and reads in inputs)):
            raise NotImplementedError(f"a dictionary from {reads} to {writes}")
    own = {name for edge in edges_without_cuts(model) for name in edge}
    names = [name for cut in cuts for name in _nodes(cut)]
    if len(set(names)) < len(names) or set(names) & own:
        raise ValueError(f"names that are not one node's alone, among {sorted(names)}")
    return {cut[1]: cut for cut in cuts}
