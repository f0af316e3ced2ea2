"""Compare `fp.attribution_graph` with circuit-tracer, number by number, on small random models and transcoders in float64.

circuit-tracer is not installed: give the folder of its source, of 0.4.1 or later.

    PYTHONPATH=/path/to/circuit-tracer python -m benchmarks.graphs
    python -m benchmarks.graphs --truth 8

Edges, influence, scores, pruning and the choice of features under a limit are compared. Prints the largest deviations. With
`--truth`, graphs of so many prompts of each task of the shipped model are compared with exact ablations instead.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_lens import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp

LAYERS, WIDTH, HEADS, VOCAB, LENGTH = 4, 32, 4, 80, 9
READS, WRITES = "ln2.hook_normalized", "hook_mlp_out"
ROTARY = {"act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary",
          "rotary_dim": WIDTH // HEADS, "n_key_value_heads": 2, "final_rms": True}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {"act_fn": "gelu_new"},
    "Llama": ROTARY,
    "Gemma 2": {
        **ROTARY,
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0,
        "output_logits_soft_cap": 30.0,
    },
}


def randomise(module: torch.nn.Module, seed: int, size: float) -> Any:
    """Draw all weights of a module, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else noise + (1 if parameter.shape[0] == WIDTH else 0))
    return module


class Tokenizer:
    """A tokenizer of numbers, for circuit-tracer, which asks for one."""

    all_special_ids = (0,)
    bos_token_id = pad_token_id = eos_token_id = 0
    vocab_size, padding_side = VOCAB, "right"

    def decode(self, ids: Any) -> str:
        """Return ids as text."""
        return str(ids.tolist() if isinstance(ids, torch.Tensor) else ids)


def theirs(config: HookedTransformerConfig, model: HookedTransformer, given: list[Any]) -> tuple[Any, Any]:
    """Return circuit-tracer's functions and its model with the same weights."""
    import huggingface_hub.constants as constants

    if not hasattr(constants, "HF_HUB_ENABLE_HF_TRANSFER"):  # gone in huggingface_hub 1.0
        constants.HF_HUB_ENABLE_HF_TRANSFER = False
    from circuit_tracer.attribution.attribute_transformerlens import attribute
    from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    made = {}
    for layer, each in enumerate(given):
        skip = hasattr(each, "W_skip")
        coder = SingleLayerTranscoder(WIDTH, each.cfg.d_sae, torch.nn.functional.relu, layer, skip, dtype=torch.float64)
        with torch.no_grad():
            coder.W_enc.copy_(each.W_enc.T)
            coder.W_dec.copy_(each.W_dec)
            coder.b_enc.copy_(each.b_enc)
            coder.b_dec.copy_(each.b_dec)
            if skip:
                coder.W_skip.copy_(each.W_skip)
        made[layer] = coder
    other = TransformerLensReplacementModel.from_config(config, TranscoderSet(made, READS, WRITES, scan="none"))
    renamed = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): value
        for name, value in model.state_dict().items()
    }
    other.load_state_dict(renamed, strict=False)
    other.tokenizer = Tokenizer()
    functions = SimpleNamespace(
        attribute=attribute, prune=prune_graph, scores=compute_graph_scores, influence=compute_node_influence
    )
    return functions, other


def compare(name: str, skip: bool, features: int, size: int | None) -> None:
    """Compare one model, and print the deviations."""
    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=32, d_head=WIDTH // HEADS, n_heads=HEADS, d_mlp=2 * WIDTH, d_vocab=VOCAB,
        dtype=torch.float64, seed=1, init_weights=True, **MODELS[name],
    )  # fmt: skip
    model = randomise(HookedTransformer(config).eval(), 1, 0.25)
    kind, settings = (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    given = []
    for layer in range(LAYERS):
        places = SAEMetadata(hook_name=f"blocks.{layer}.{READS}", hook_name_out=f"blocks.{layer}.{WRITES}")
        cfg = settings(WIDTH, features, "float64", d_out=WIDTH, apply_b_dec_to_input=False, metadata=places)
        given.append(randomise(kind(cfg), layer, 0.3))
    ids = [0, *torch.randint(1, VOCAB, (LENGTH - 1,), generator=torch.Generator().manual_seed(2)).tolist()]
    functions, other = theirs(config, model, given)
    start = time.perf_counter()
    expected = functions.attribute(ids, other, batch_size=64, max_feature_nodes=size, update_interval=32)
    middle = time.perf_counter()
    prompt = fp.Pair(tuple(ids), tuple(ids), (), (), special=frozenset({0}))
    found = fp.attribution_graph(model, given, prompt, size=size, progress=False)
    end = time.perf_counter()
    nodes = [tuple(row) for row in expected.active_features[expected.selected_features].tolist()]
    own = [(int(n.site.split(".")[1]), n.position, n.index) for n in found.nodes if n.kind == "feature"]
    assert own == nodes, "other features"
    matrix = expected.adjacency_matrix
    errors = torch.arange(LAYERS * LENGTH).unflatten(0, (LAYERS, LENGTH))[:, 1:].flatten()  # there are none at BOS here
    keep = torch.cat([torch.arange(len(nodes)), len(nodes) + errors, torch.arange(len(nodes) + LAYERS * LENGTH, len(matrix))])
    dropped = torch.ones(len(matrix), dtype=torch.bool).index_fill_(0, keep, False)
    assert not matrix[dropped].any()
    assert not matrix[:, dropped].any()
    off = {"edges": (torch.from_numpy(found.adjacency) - matrix[keep][:, keep]).abs().max()}
    weights = torch.zeros(len(matrix))
    weights[-len(expected.logit_probabilities) :] = expected.logit_probabilities
    off["influence"] = (torch.from_numpy(found.influence) - functions.influence(matrix, weights)[keep]).abs().max()
    scores = functions.scores(expected)
    off["scores"] = max(abs(found.replacement_score - scores[0]), abs(found.completeness_score - scores[1]))
    kept, links, shares = functions.prune(expected)
    pruned = found.prune()
    same = [n for n, keeps in enumerate(kept[keep].tolist()) if keeps] == [found.nodes.index(n) for n in pruned.nodes]
    inside = (matrix * links)[keep][:, keep][kept[keep]][:, kept[keep]]
    off["pruned edges"] = (torch.from_numpy(pruned.adjacency) - inside).abs().max() if same else float("nan")
    off["cumulative influence"] = (torch.from_numpy(found.cumulative) - shares[keep])[: len(nodes)].abs().max()
    said = ", ".join(f"{what} {float(value):.1e}" for what, value in off.items())
    of = "" if size is None else f" of {len(expected.active_features)}"
    print(
        f"{name}{' skip' if skip else ''}, {len(nodes)} features{of}, "
        f"{len(pruned.nodes)} nodes and {int((pruned.adjacency != 0).sum())} edges after pruning: {said}; "
        f"{middle - start:.2f} s and {end - middle:.2f} s here"
    )


def truth(prompts: int) -> None:
    """Compare influence in pruned graphs of the shipped model with exact effects, and edges with what patterns do."""
    demo = fp.load_demo(progress=False)
    print(
        "| transcoders, task | nodes per pruned graph | replacement score | Spearman of influence | of totals | edge: patterns "
        "| edge: scales |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for name, given in (("per layer", demo.transcoders), ("cross-layer", demo.clt)):
        for task in ("ioi", "capitals", "greater_than", "sentiment"):
            rows, nodes, changes = [], 0, []
            for pair in demo.pairs(task, n=prompts):
                graph = fp.attribution_graph(demo.model, given, pair, progress=False)
                found = fp.graph_effects(demo.model, given, graph.prune(), progress=False)
                rows.append((graph.replacement_score, found.spearman, found.spearman_predicted))
                nodes += len(found.nodes)
                changes += [(each.graph, each.frozen, each.live) for each in found.edges]
            edges = np.array(changes)
            moved = [np.median(abs(edges[:, one] - edges[:, other]) / abs(edges[:, 0])) for one, other in ((2, 1), (1, 0))]
            cells = " | ".join(f"{value:.2f}" for value in (*np.nanmean(rows, 0), *moved))
            print(f"| {name}, {task} | {nodes / prompts:.0f} | {cells} |")


def main() -> None:
    """Compare all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=64, help="features of each transcoder")
    parser.add_argument("-t", "--truth", type=int, default=0, help="prompts of each task to compare with exact ablations")
    options = parser.parse_args()
    if options.truth:
        truth(options.truth)
        return
    features = options.features
    torch.set_default_dtype(torch.float64)
    for name in MODELS:
        for skip in (False, True):
            compare(name, skip, features, None)
    compare("GPT-2", False, 4 * features, 2100)


if __name__ == "__main__":
    main()
