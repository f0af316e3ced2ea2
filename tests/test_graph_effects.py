"""An attribution graph beside the model, against plain hooked forward passes, in float64."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED, LAYERS
from test_graphs import cross_layer, prompt, reads, transcoders

import featpatch as fp
from featpatch.errors import FeatpatchWarning
from featpatch.patching.study import Study

EXACT = 1e-9
EVERY = {"bridge": BRIDGES, "hooked": HOOKED}


def written(given: Any, layer: int, index: int) -> dict[int, torch.Tensor]:
    """The decoder of a feature by the layer of the MLP that it writes to."""
    if isinstance(given, list):
        return {layer: given[layer].W_dec[index]}
    return {layer + later: row for later, row in enumerate(given.parts[layer].W_dec[index])}


def encoder(given: Any, layer: int, index: int) -> torch.Tensor:
    return given[layer].W_enc[:, index].detach() if isinstance(given, list) else given.parts[layer].W_enc[index]


def place(node: fp.Node) -> tuple[int, int, int]:
    assert node.index is not None
    return int(node.site.split(".")[1]), int(node.position), node.index


def lowered(
    model: Any, tokens: torch.Tensor, by: dict[str, tuple[int, torch.Tensor]], fixed: dict[str, torch.Tensor], read: str
) -> Any:
    """Run with something subtracted at one position, and other activations fixed; return the logits and the activation at `read`."""
    kept = {}

    def change(name: str) -> Any:
        def changed(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = fixed.get(name, x).clone().reshape(x.shape)
            if name in by:
                at, vector = by[name]
                x[:, at] -= vector
            return x

        return changed

    def keep(x: torch.Tensor, hook: Any) -> None:
        kept[read] = x.clone()

    hooks = [(name, change(name)) for name in {*by, *fixed}] + [(read, keep)]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1], kept[read][0]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name", "kind_of"), [("bridge", "gpt2", "per layer"), ("hooked", "neox", "cross-layer"),
                                                       ("bridge", "llama", "cross-layer")])  # fmt: skip
def test_effects_are_those_of_plain_runs(kind: str, name: str, kind_of: str) -> None:
    model = EVERY[kind][name]()
    given = transcoders(model) if kind_of == "per layer" else cross_layer(model)
    tokens = prompt(5)
    graph = fp.attribution_graph(model, given, tokens[0].tolist(), targets=[3, 7], progress=False).prune(0.97, 0.999)
    corrupted = tokens.clone()
    corrupted[0, 2] = (tokens[0, 2] + 5) % 30
    pair = fp.Pair(tuple(tokens[0].tolist()), tuple(corrupted[0].tolist()), (3,), ())
    found = fp.graph_effects(model, given, graph, pair=pair, edges=8, progress=False)
    oracle._activations.cache_clear()
    cache = oracle.activations(model, tokens)

    def supported(logits: torch.Tensor) -> float:
        return float((logits[[3, 7]] - logits.mean()) @ torch.from_numpy(graph.probabilities))

    clean = supported(model(tokens)[0, -1].detach())
    read = f"blocks.0.{reads(model)}"
    acts = {(layer, p, i): graph.values[graph.number(node)] for node in graph.nodes if node.kind == "feature"
            for layer, p, i in [place(node)]}  # fmt: skip
    with torch.no_grad():
        for node, exact in zip(found.nodes, found.exact, strict=True):
            if node.kind == "feature":
                layer, at, index = place(node)
                by = {f"blocks.{later}.hook_mlp_out": (at, acts[layer, at, index] * row)
                      for later, row in written(given, layer, index).items()}  # fmt: skip
                assert abs(clean - supported(lowered(model, tokens, by, {}, read)[0]) - exact) < EXACT, node
        assert found.swapped is not None
        other = {name: value.clone() for name, value in oracle.activations(model, corrupted).items()}
        for node, swapped in zip(found.nodes, found.swapped, strict=True):
            if node.kind == "feature" and isinstance(given, list):
                layer, at, index = place(node)
                there = given[layer].encode(other[f"blocks.{layer}.{reads(model)}"])[0, at, index].detach()
                by = {f"blocks.{layer}.hook_mlp_out": (at, (acts[layer, at, index] - there) * given[layer].W_dec[index])}
                assert abs(clean - supported(lowered(model, tokens, by, {}, read)[0]) - swapped) < EXACT, node
    mlps = {f"blocks.{layer}.hook_mlp_out": cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(LAYERS)}
    patterns = {f"blocks.{layer}.attn.hook_pattern": cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(LAYERS)}
    names = {graph.name(n): node for n, node in enumerate(graph.nodes)}
    assert found.edges
    for edge in found.edges:
        (layer, at, index), (above, there, target) = (place(names[end]) for end in (edge.source, edge.target))
        by = {
            f"blocks.{later}.hook_mlp_out": (at, acts[layer, at, index] * row)
            for later, row in written(given, layer, index).items()
        }
        hook = f"blocks.{above}.{reads(model)}"
        for fixed, value in ((mlps | patterns, edge.frozen), (mlps, edge.live)):
            x = lowered(model, tokens, by, fixed, hook)[1]
            lost = (cache[hook][0, there] - x[there]) @ encoder(given, above, target)
            assert abs(float(lost) - value) < EXACT, edge
        assert edge.graph == graph.adjacency[graph.number(names[edge.target]), graph.number(names[edge.source])]
    assert any(abs(edge.frozen - edge.live) > 1e-6 for edge in found.edges)


def test_tables_and_errors() -> None:
    demo = fp.load_demo(progress=False)
    pair = demo.pairs("capitals", n=1)[0]
    graph = fp.attribution_graph(demo.model, demo.transcoders, pair, size=300, progress=False).prune()
    found = fp.graph_effects(demo.model, demo.transcoders, graph, edges=4, progress=False)
    table = found.to_pandas()
    assert abs(table["exact"]).tolist() == sorted(abs(found.exact), reverse=True)
    ranks = table["influence"].rank(ascending=False).to_numpy()
    assert np.array_equal(table["overrated"].to_numpy(), abs(table["exact"]).rank(ascending=False).to_numpy() - ranks)
    assert abs(found.spearman - np.corrcoef(ranks, abs(table["exact"]).rank(ascending=False))[0, 1]) < EXACT
    assert len(found.edges_to_pandas()) == 4
    assert "Spearman" in repr(found)
    assert found.swapped is None
    assert list(found.plot(title="a <b>").data[0].y) == found.exact.tolist()
    beside = fp.graph_effects(demo.model, demo.transcoders, graph, pair=pair, edges=0, progress=False)
    assert "swapped" in beside.to_pandas()
    with pytest.raises(fp.FeatpatchError, match="expected the graph's prompt"):
        fp.graph_effects(demo.model, demo.transcoders, graph, pair=demo.pairs("capitals", n=2)[1], progress=False)
    with pytest.raises(fp.FeatpatchError, match="pass the graph's transcoders"):
        fp.graph_effects(demo.model, demo.clt, graph, progress=False)


@pytest.mark.parametrize("half", ["ablations", "patches"])
def test_an_interrupted_call_resumes(half: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = EVERY["bridge"]["gpt2"]()
    given, tokens = transcoders(model), prompt(5)[0].tolist()
    graph = fp.attribution_graph(model, given, tokens, progress=False).prune(0.97, 0.999)
    pair = fp.Pair(tuple(tokens), (*tokens[:2], (tokens[2] + 5) % 30, *tokens[3:]), (3,), ())
    call = partial(fp.graph_effects, model, given, graph, pair=pair, progress=False)
    whole, swept = call(), Study._swept

    def stops(study: Study, *args: Any, **options: Any) -> fp.Effects:
        found = swept(study, *args, **options)
        mine = ("ablation" in study.metadata) == (half == "ablations")
        return replace(found.of_pairs([0]), metadata={**found.metadata, "finished": not mine})

    monkeypatch.setattr(Study, "_swept", stops)
    with pytest.warns(FeatpatchWarning, match="over 1 of 1 pair"), pytest.raises(KeyboardInterrupt, match="work.journal"):
        call()
    with pytest.warns(FeatpatchWarning), pytest.raises(KeyboardInterrupt, match="resumes from there"):
        call(journal=tmp_path / "journal")
    monkeypatch.setattr(Study, "_swept", swept)
    again = call(journal=tmp_path / "journal")
    assert np.array_equal(again.exact, whole.exact)
    assert np.array_equal(again.swapped, whole.swapped)
    assert {path.name for path in tmp_path.iterdir()} == {"journal", "journal.swapped"}


def test_graphs_of_other_models_and_transcoders() -> None:
    model, other = EVERY["bridge"]["gpt2"](), EVERY["bridge"]["neox"]()
    given = transcoders(model)
    graph = fp.attribution_graph(model, given, prompt(5)[0].tolist(), progress=False).prune(0.97, 0.999)
    changed = transcoders(model)
    with torch.no_grad():
        changed[1].b_enc[:] += 0.1
    for of, tried in ((model, changed), (other, given)):
        for edges in (0, 5):
            with pytest.raises(fp.FeatpatchError, match="pass the model and the transcoders of the graph"):
                fp.graph_effects(of, tried, graph, edges=edges, progress=False)
