"""Circuits over nodes against plain hooks, and what is said of circuits."""

from dataclasses import replace
from html import unescape
from random import Random
from typing import Any

import networkx as nx
import numpy as np
import oracle
import pytest
import torch
from constructed import and_gate, or_gate
from sae_lens import Transcoder, TranscoderConfig
from small import Small, at, randomised
from test_sets import pairs_of
from test_several_metrics import ANSWERS, long_pairs

import featpatch as fp
from featpatch.circuits.node_graph import NodeGraph
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

OPTIONS: dict[str, Any] = {"progress": False}
SITES = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.2.hook_resid_post"]


def saes_of(small: Small) -> list[Any]:
    return [*(small.at(site) for site in SITES), small.saes[-1]]


def nodes_of(small: Small) -> list[fp.Node]:
    """Features at labelled and at all positions, errors, heads, an MLP."""
    nodes = [fp.Node(site, "feature", n, "all", site) for site in SITES for n in range(0, 24, 5)]
    name = f"{oracle.hooks(small.saes[-1])[0]} -> blocks.1.hook_mlp_out"
    nodes += [fp.Node("blocks.1.hook_mlp_out", "feature", n, 3, name) for n in range(0, 24, 3)]
    nodes += [fp.Node(site, "error", None, "all", site) for site in SITES[:2]]
    nodes += [fp.Node("blocks.0.attn.hook_z", "head", n, 3) for n in range(3)]
    return [*nodes, fp.Node("blocks.0.hook_mlp_out", "activation", None, "all")]


def graph_of(small: Small, to: str, errors: str) -> NodeGraph:
    lens = wrap(small.model)
    nodes = tuple(node for node in nodes_of(small) if errors == "nodes" or node.kind != "error")
    graph = NodeGraph(lens, pairs_of(small), to, Measures.of("logit_diff"), nodes, dictionaries(lens, saes_of(small)), errors)
    graph.check()
    return graph


def by_hooks(small: Small, kept: list[fp.Node], to: str, errors: str) -> torch.Tensor:
    """Every site's ablation as a hook of the whole clean run; nothing but sae-lens and TransformerLens."""
    model = small.model
    _, cache = model.run_with_cache(torch.cat([small.corrupted, small.clean]))

    def outside(values: torch.Tensor) -> torch.Tensor:
        """Ablation values, from those of the corrupted prompts and then those of the clean ones."""
        return {
            "corrupted": lambda: values[:3],
            "zero": lambda: torch.zeros_like(values[:3]),
            "mean": lambda: values.mean((0, 1)).expand_as(values[:3]),
            "mean_by_position": lambda: values.mean(0).expand_as(values[:3]),
            "resample": lambda: values[partners(small)],
        }[to]()

    live: dict[str, torch.Tensor] = {}
    hooks: list[Any] = []

    def keep(name: str) -> Any:
        return lambda x, hook: live.update({name: x.clone()})

    def coded(sae: Any, own: list[fp.Node]) -> Any:
        reads, writes = oracle.hooks(sae)

        def change(x: torch.Tensor, hook: Any) -> torch.Tensor:
            now = sae.encode(live[reads])
            other = outside(sae.encode(cache[reads]))
            error_now, error_other = x - sae.decode(now), outside(cache[writes] - sae.decode(sae.encode(cache[reads])))
            mixed = other.clone()
            for node in own:
                at = slice(None) if node.position == "all" else node.position
                if node.kind == "feature":
                    mixed[:, at, node.index] = now[:, at, node.index]
            keeps_error = errors == "in" or any(node.kind == "error" for node in own)
            return sae.decode(mixed) + (error_now if keeps_error else error_other)

        return change

    def heads(x: torch.Tensor, hook: Any) -> torch.Tensor:
        mixed = outside(cache["blocks.0.attn.hook_z"]).clone()
        for node in kept:
            if node.kind == "head":
                mixed[:, node.position, node.index] = x[:, node.position, node.index]
        return mixed

    def mlp(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x if any(node.kind == "activation" for node in kept) else outside(cache["blocks.0.hook_mlp_out"])

    for sae in saes_of(small):
        reads, writes = oracle.hooks(sae)
        name = reads if reads == writes else f"{reads} -> {writes}"
        hooks += [(reads, keep(reads)), (writes, coded(sae, [node for node in kept if node.sae == name]))]
    hooks += [("blocks.0.attn.hook_z", heads), ("blocks.0.hook_mlp_out", mlp)]
    logits = model.run_with_hooks(small.clean, fwd_hooks=hooks)[:, -1]
    rows = torch.arange(3)
    return logits[rows, small.correct] - logits[rows, small.wrong]


def partners(small: Small) -> list[int]:
    """The numbers of the prompts, first the corrupted and then the clean ones, that `fp.ablate` would draw."""
    prompts = [tuple(p.tolist()) for p in torch.cat([small.corrupted, small.clean])]
    in_order = [prompts[n] for n in (3, 0, 4, 1, 5, 2)]
    drawn = [Random(repr((0, clean))).choice([p for p in in_order if p != clean]) for clean in prompts[3:]]
    return [prompts.index(prompt) for prompt in drawn]


@pytest.mark.parametrize("errors", ["in", "out", "nodes"])
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean", "mean_by_position", "resample"])
def test_any_nodes_equal_plain_hooks(small: Small, to: str, errors: str) -> None:
    """Several choices of nodes in one call; what is ablated below moves what is kept above."""
    graph = graph_of(small, to, errors)
    generator = np.random.default_rng(0)
    choices = [[node for node in graph.items if generator.random() < share] for share in (0.0, 0.2, 0.5, 0.8, 1.0)]
    found = graph.values(choices)
    with torch.no_grad():
        for kept, values in zip(choices, found, strict=True):
            np.testing.assert_allclose(values, by_hooks(small, kept, to, errors), atol=1e-9)
    assert np.abs(found[0] - found[4]).max() > 1e-4
    assert not np.allclose(found[4], graph.whole)  # what is no candidate is ablated too


def components(model: Any) -> list[fp.Node]:
    heads = [
        fp.Node(f"blocks.{layer}.attn.hook_z", "head", n)
        for layer in range(model.cfg.n_layers)
        for n in range(model.cfg.n_heads)
    ]
    return [*heads, *(fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in range(model.cfg.n_layers))]


def test_gates() -> None:
    """AND is found by all methods; of OR threshold and ACDC miss what each branch alone can replace; greedy finds a branch."""
    heads = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(2)]
    mlp = fp.Node("blocks.0.hook_mlp_out", "activation")
    options: dict[str, Any] = {"threshold": {}, "greedy": {"target": 1.0}, "acdc": {}}
    for make in (and_gate, or_gate):
        found = make()
        pairs = fp.Pairs.from_tokens(found.clean, found.corrupted, found.correct, found.wrong)
        run: dict[str, Any] = {"nodes": components(found.model), **OPTIONS}
        acdc, threshold, greedy = (
            set(fp.find_circuit(found.model, pairs, method=m, **options[m], **run).items)
            for m in ("acdc", "threshold", "greedy")
        )
        assert mlp in acdc
        if make is and_gate:
            assert acdc == threshold == {*heads, mlp}
            assert greedy >= {*heads, mlp}
        else:
            assert threshold == {mlp}
            assert len(acdc) == 2
            assert mlp in greedy


def test_what_is_said_of_a_circuit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faithfulness, completeness, minimality, curve, stability, graph, on the AND and OR gates."""
    found = and_gate()
    pairs = fp.Pairs.from_tokens(found.clean, found.corrupted, found.correct, found.wrong)
    circuit = fp.find_circuit(found.model, pairs, nodes=components(found.model), **OPTIONS)
    assert circuit.faithfulness == pytest.approx(1.0)
    assert circuit.faithfulness_interval == pytest.approx((1.0, 1.0))
    assert (circuit.minimality()["loss"] > 0.99).all()
    assert circuit.completeness()["incompleteness"].max() == pytest.approx(0.0)
    curve = circuit.curve([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve.sizes == (0, 1, 2, 3, 4, 5)
    np.testing.assert_allclose(curve.faithfulness, [0, 0, 0, 1, 1, 1], atol=1e-12)
    assert curve.cpr == pytest.approx(0.5)
    assert curve.cmd == pytest.approx(0.5)
    for part, drawn in zip((curve, curve.other), curve.plot().data, strict=True):
        rows = curve.table().query("order == @part.order")
        assert list(rows["faithfulness"]) == list(drawn.y) == list(part.faithfulness)
    stable = circuit.stability(resamples=3)
    assert list(stable["jaccard"]) == [1.0] * 3
    assert list(stable["faithfulness"]) == pytest.approx([1.0] * 3)
    graph = circuit.to_networkx()
    assert set(graph.nodes) == set(circuit.items)
    assert all(data["effect"] == pytest.approx(1.0) for _, data in graph.nodes(data=True))
    assert (
        "circuit of 3 of 5 nodes (threshold, scores='exact'), complement ablated to corrupted values: faithfulness 1.00"
        in repr(circuit)
    )
    everything = replace(circuit, items=circuit.graph.items)
    assert "circuit of 5 of 5 nodes (threshold, scores='exact'), everything else at these hook points abl" in repr(everything)
    with monkeypatch.context() as patched:
        patched.setattr(fp.Circuit, "faithfulness", property(lambda circuit: -0.001))
        patched.setattr(fp.Circuit, "faithfulness_interval", (-0.002, 0.001))
        assert "faithfulness 0.00 [0.00, 0.00]" in repr(circuit)
    either = or_gate()
    pairs = fp.Pairs.from_tokens(either.clean, either.corrupted, either.correct, either.wrong)
    one = fp.find_circuit(either.model, pairs, nodes=components(either.model), method="acdc", **OPTIONS)
    assert one.faithfulness == pytest.approx(1.0)
    assert one.completeness()["incompleteness"].max() == pytest.approx(1.0)  # the other branch does the same
    edges = fp.find_circuit(either.model, pairs, over="edges", method="acdc", **OPTIONS).to_networkx()
    assert nx.is_directed_acyclic_graph(edges)
    head = next(iter(acdc_heads := [node for node in edges if node.kind == "head"]))
    assert len(acdc_heads) == 1  # one branch, through the MLP
    assert nx.shortest_path(edges, head, fp.LOGITS) == [head, fp.Node("blocks.0.hook_mlp_out", "activation"), fp.LOGITS]


def test_features_of_a_table(small: Small) -> None:
    """The first rows of a ranking as candidates; sites in the table beside features are left out."""
    sae = small.at("blocks.1.hook_resid_pre")
    effects = fp.rank_features(small.model, sae, pairs_of(small), **OPTIONS)
    circuit = fp.find_circuit(small.model, pairs_of(small), saes=sae, nodes=effects, size=5, **OPTIONS)
    assert len(circuit) == 5
    assert {node.kind for node in circuit.graph.items} == {"feature"}
    everything = circuit.graph.values([circuit.graph.items])
    assert circuit.graph.faithfulness(everything)[0] == pytest.approx(1.0)  # all that differ, and the errors: the whole model
    order = np.argsort(-np.abs(circuit.scores), kind="stable")[:5]
    assert circuit.items == tuple(circuit.graph.items[n] for n in order)


def shorter(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[:, :5], small.corrupted[:, :5], small.correct, small.wrong)


def test_errors(small: Small) -> None:
    head = fp.Node("blocks.0.attn.hook_z", "head", 0)
    site = "blocks.1.hook_resid_pre"
    for changed, message in (
        ({"nodes": None, "over": "nodes"}, "over='nodes' without nodes"),
        ({"over": "edges"}, "over='edges' with nodes, but without saes: expected the SAEs"),
        ({"nodes": None, "saes": small.at(site)}, "saes without nodes: expected candidates"),
        ({"over": "edges", "saes": small.at(site)}, "embedding, heads and MLPs need not be named"),
        ({"over": "edges", "nodes": [fp.Node(site, "feature", 3)], "saes": small.at(site), "errors": "out"}, "over='edges' with errors='out'"),
        ({"method": "magic"}, "method='magic'"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"size": 0}, "size=0"),
        ({"target": 0.0}, "target=0.0"),
        ({"target": 0.5}, "target=0.5 with method='threshold': expected threshold or size"),
        ({"method": "greedy", "threshold": 0.1}, "threshold=0.1 with method='greedy': expected target or size"),
        ({"method": "acdc", "target": 0.5}, "target=0.5 with method='acdc': expected threshold; leave"),
        ({"method": "greedy", "target": 0.5, "size": 2}, "size=2, target=0.5 with method='greedy': expected target or size, not both"),
        ({"method": "greedy", "scores": "exact"}, "scores='exact' with over='nodes' and method='greedy': expected no scores"),
        ({"method": "acdc", "scores": "exact"}, "scores='exact' with over='nodes' and method='acdc': expected no scores"),
        ({"scores": "estimate", "metric": "neg_rank"}, "metric 'neg_rank' has no gradient"),
        ({"errors": "in"}, "errors='in' without saes"),
        ({"method": "acdc", "size": 3}, "size=3 with method='acdc'"),
        ({"to": "nothing"}, "to='nothing'"),
        ({"to": "zero", "reference": pairs_of(small)}, "to='zero' with reference: expected no prompts"),
        ({"reference": pairs_of(small)}, "to='corrupted' with reference=.*: expected neither"),
        ({"to": "mean", "seed": 3}, "to='mean' with seed=3"),
        ({"positions": ["S2"]}, "positions=.* with nodes and over='nodes': expected no positions.*fp.head\\(1"),
        ({"errors": "maybe"}, "errors='maybe'"),
        ({"nodes": [head, head]}, "each once"),
        ({"nodes": [fp.Node(site, "feature", 3, "all", "other")]}, "is of the SAE 'other', and no SAEs were passed"),
        ({"nodes": [fp.Node("blocks.0.attn.hook_q", "head", 0)]}, "a head at hook_z"),
        ({"nodes": [fp.Node(site, "feature", 3, "all", site), fp.Node(site, "activation")], "saes": small.at(site)}, "expected only one kind"),
        ({"metric": "neg_kl", "over": "edges", "nodes": None, "scores": "estimate"}, "zero in the unpatched clean run; .*'exact'"),
        ({"pairs": pairs_of(small, [0]), "to": "resample", "reference": shorter(small)}, "pair 0 has 7 tokens, and no other"),
        ({"pairs": pairs_of(small, [0]), "to": "mean_by_position", "reference": shorter(small)}, "no prompt of 7 tokens"),
    ):  # fmt: skip
        options: dict[str, Any] = {"pairs": pairs_of(small), "nodes": [head], **OPTIONS, **changed}
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.find_circuit(small.model, **options)


def test_a_circuit_in_a_report(tmp_path: Any) -> None:
    """As a page of its own, and as a part of the report of a table."""
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=4, seed=0)
    components = fp.rank_components(demo.model, pairs, sites=["z", "mlp_out"], positions=["S2", "end"], **OPTIONS)
    circuit = fp.find_circuit(demo.model, pairs, over="edges", scores="estimate", size=12, **OPTIONS)
    own = circuit.report(tmp_path / "circuit.html").read_text()
    with pytest.raises(fp.FeatpatchError, match="is a folder: expected the path of a file"):
        circuit.report(tmp_path)
    whole = fp.report(components, tmp_path / "r.html", model=demo.model, pairs=pairs, circuit=circuit).read_text()
    for text in (own, whole):
        assert 'id="graph"' in text
        assert 'id="node-data"' in text
    edges = fp.diagram.graph(circuit.items, [1.0] * 12)
    assert edges.number_of_edges() == circuit.to_networkx().number_of_edges() == 12
    assert set(edges.nodes) == set(circuit.to_networkx().nodes)


def test_every_export_has_every_edge(tmp_path: Any) -> None:
    """The README's circuits on the shipped model: items and scores come back from the graph, and viewers' files are made."""
    demo = fp.load_demo(progress=False)
    pairs = demo.pairs("ioi", n=2, seed=0)
    tokens = demo.model.tokenizer.convert_ids_to_tokens(pairs[0].clean)
    effects = fp.rank_features(demo.model, demo.saes[0], pairs, positions=["S2", "end"], **OPTIONS)
    named = effects.top(3).nodes
    circuits = [
        fp.find_circuit(demo.model, pairs, over="edges", scores="estimate", size=60, **OPTIONS),
        fp.find_circuit(demo.model, pairs, saes=demo.saes[0], nodes=named, over="edges", scores="estimate", size=40, **OPTIONS),
    ]
    for circuit in circuits:
        graph, scores = circuit.to_networkx(), dict(zip(circuit.graph.items, circuit.scores, strict=True))
        found = {}
        for source, target, key, effect in graph.edges(keys=True, data="effect"):
            receiver = fp.Node(f"{target.site[:-1]}{key}", "head", target.index, target.position) if key else target
            found[fp.Edge.of(source, receiver)] = effect
        assert found == {edge: scores[edge] for edge in circuit.items}
        assert {key for *_, key in graph.edges(keys=True)} == {"", "q", "k", "v"}
        pairs_of_nodes = {(source, target) for source, target, _ in graph.edges}
        assert len(pairs_of_nodes) < len(circuit)  # queries, keys and values of one head
        assert len([line for line in fp.diagram.figure(graph).data if line.hoverinfo == "skip"]) == len(circuit)
        text = fp.diagram.dot(graph)
        assert text.count(" -> ") == len(circuit)
        assert text.count("label=value") + text.count('label="value"') == sum(key == "v" for *_, key in graph.edges(keys=True))
        assert f"{len(graph)} nodes, {len(circuit)} edges" in circuit.report(tmp_path / "edges.html").read_text()
        viewed = fp.diagram.viewer_json(graph, tokens=tokens, slug="ioi", model="demo", positions=pairs[0].labels)
        assert (
            len({node["node_id"] for node in viewed["nodes"]}) == len({node["clerp"] for node in viewed["nodes"]}) == len(graph)
        )
        assert len(viewed["links"]) == len(pairs_of_nodes)
        assert sum(link["weight"] for link in viewed["links"]) == pytest.approx(sum(found.values()))
    assert {node["ctx_idx"] for node in viewed["nodes"] if "@ S2" in node["clerp"]} == {pairs[0].labels["S2"]}


def test_a_circuit_of_nodes_says_that_it_has_no_edges(tmp_path: Any) -> None:
    demo = fp.load_demo(progress=False)
    pairs = demo.pairs("ioi", n=4, seed=0)
    effects = fp.rank_features(demo.model, demo.saes[0], pairs, positions=["S2", "end"], **OPTIONS)
    circuit = fp.find_circuit(demo.model, pairs, saes=demo.saes[0], nodes=effects.top(5), size=3, **OPTIONS)
    graph, scores = circuit.to_networkx(), dict(zip(circuit.graph.items, circuit.scores, strict=True))
    assert dict(graph.nodes(data="effect")) == {node: scores[node] for node in circuit.items}
    assert graph.number_of_edges() == 0
    for call in ("fp.find_circuit(..., over='edges')", "fp.rank_paths(..., senders=circuit.items, receivers=circuit.items)"):
        assert call in graph.graph["note"]
    assert graph.graph["note"] in unescape(circuit.report(tmp_path / "nodes.html").read_text())


def test_a_transcoder_sees_what_was_ablated_where_it_reads(small: Small) -> None:
    """Two dictionaries, one of which reads where the other writes, in either order."""
    site, out = "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"
    transcoder = randomised(
        Transcoder(TranscoderConfig(16, 24, "float64", d_out=16, apply_b_dec_to_input=False, metadata=at(site, out))), 11
    )
    first, name = small.at(site), f"{site} -> {out}"
    nodes = [
        *(fp.Node(site, "feature", n, "all", site) for n in range(0, 24, 2)),
        *(fp.Node(out, "feature", n, "all", name) for n in range(0, 24, 2)),
    ]
    kept = nodes[3:6] + nodes[14:20]
    with torch.no_grad():
        cache = small.model.run_with_cache(small.corrupted)[1]
        live: dict[str, torch.Tensor] = {}

        def below(x: torch.Tensor, hook: Any) -> torch.Tensor:
            now, mixed = first.encode(x), first.encode(cache[site]).clone()
            for node in kept[:3]:
                mixed[..., node.index] = now[..., node.index]
            live["x"] = x + first.decode(mixed) - first.decode(now)
            return live["x"]

        def above(x: torch.Tensor, hook: Any) -> torch.Tensor:
            now, mixed = transcoder.encode(live["x"]), transcoder.encode(cache[site]).clone()
            for node in kept[3:]:
                mixed[..., node.index] = now[..., node.index]
            return x + transcoder.decode(mixed) - transcoder.decode(now)

        logits = small.model.run_with_hooks(small.clean, fwd_hooks=[(site, below), (out, above)])[:, -1]
        rows = torch.arange(3)
        expected = logits[rows, small.correct] - logits[rows, small.wrong]
    lens = wrap(small.model)
    for saes in ([first, transcoder], [transcoder, first]):
        graph = NodeGraph(
            lens, pairs_of(small), "corrupted", Measures.of("logit_diff"), tuple(nodes), dictionaries(lens, saes), "in"
        )
        np.testing.assert_allclose(graph.values([kept])[0], expected, atol=1e-9)


def test_interrupted_circuits_are_not_half_known(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between prompts of different lengths leaves nothing behind."""
    tokens = [(small.clean[n, : 7 - n].tolist(), small.corrupted[n, : 7 - n].tolist()) for n in range(3)]
    pairs = fp.Pairs(tuple(fp.Pair(tuple(c), tuple(x), (3,), (4,)) for c, x in tokens))
    lens = wrap(small.model)
    heads = tuple(fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(4))
    graph = NodeGraph(lens, pairs, "corrupted", Measures.of("logit_diff"), heads)
    true = NodeGraph(lens, pairs, "corrupted", Measures.of("logit_diff"), heads).values([heads[:2]])
    measured, calls = NodeGraph.measured, []

    def interrupted(self: NodeGraph, kept: Any, some: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(self, kept, some)

    monkeypatch.setattr(NodeGraph, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graph.values([heads[:2]])
    np.testing.assert_array_equal(graph.values([heads[:2]]), true)


def test_metrics_of_circuits(small: Small) -> None:
    head = [fp.Node("blocks.0.attn.hook_z", "head", 0)]
    for metric, message in ((lambda x, c, w: x[:, 0] * float("nan"), "one finite value per row"),):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.find_circuit(small.model, pairs_of(small), nodes=head, metric=metric, **OPTIONS)
    with pytest.raises(fp.FeatpatchError, match="has no gradient"):
        fp.find_circuit(small.model, pairs_of(small), over="edges", scores="estimate", metric="neg_rank", **OPTIONS)


def test_stability_draws_within_lengths_and_counts_what_is_shared(small: Small) -> None:
    cut = ((0, 7), (1, 7), (2, 6), (1, 6))
    tokens = [(small.clean[n, :length].tolist(), small.corrupted[n, :length].tolist()) for n, length in cut]
    pairs = fp.Pairs(tuple(fp.Pair(tuple(c), tuple(x), (3,), (4,)) for c, x in tokens))
    heads = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(4)] + [fp.Node("blocks.0.hook_mlp_out", "activation")]
    circuit = fp.find_circuit(small.model, pairs, nodes=heads, size=2, to="mean", **OPTIONS)
    stable = circuit.stability(resamples=4)
    assert set(stable["jaccard"]) <= {0.0, 1 / 3, 1.0}
    larger = replace(
        circuit, again=lambda _: replace(circuit, items=(circuit.items[0], *(n for n in heads if n not in circuit.items)))
    )
    assert list(larger.stability(resamples=1)["jaccard"]) == [1 / 5]  # one of two and of four
    for call in (lambda: circuit.stability(resamples=0), lambda: circuit.completeness(subsets=0), lambda: circuit.completeness(share=5.0),
                 lambda: circuit.curve([0.5, 0.1])):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match="expected"):
            call()


def test_the_interval_of_stability(small: Small) -> None:
    """Of 41 resamples, the ends of the 95 % interval are the second smallest and the second largest."""
    nodes = [fp.head(layer, n) for layer in range(3) for n in range(4)]
    whole = fp.find_circuit(small.model, pairs_of(small), nodes=nodes, size=12, **OPTIONS)
    sizes = [1, 2, 3, *[6] * 35, 10, 11, 12]
    found = (replace(whole, items=whole.items[:size]) for size in Random(0).sample(sizes, len(sizes)))
    stable = replace(whole, again=lambda pairs: next(found)).stability(resamples=41)
    assert sorted(stable["size"]) == sizes
    assert stable.attrs["jaccard"] == pytest.approx((sum(sizes) / 41 / 12, 2 / 12, 11 / 12))
    assert list(stable.attrs["found"].values()) == pytest.approx([sum(size > n for size in sizes) / 41 for n in range(12)])


def test_whole_heads_and_single_ones(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's output as a whole is kept if the whole is; and batches make no difference."""
    site = "blocks.0.attn.hook_z"
    nodes = (fp.Node(site, "activation", None, 3), *(fp.Node(site, "head", n) for n in range(4)))
    graphs = [NodeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("logit_diff"), nodes) for _ in range(2)]
    choices = [[nodes[0]], list(nodes[1:]), [*nodes], []]
    found = graphs[0].values(choices)
    np.testing.assert_allclose(found[1], found[2])
    np.testing.assert_allclose(found[1], graphs[0].whole)
    monkeypatch.setattr("featpatch.circuits.graph.TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(graphs[1].values(choices), found, atol=1e-12)
    with torch.no_grad():
        z = small.model.run_with_cache(small.corrupted)[1][site]

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            mixed = z.clone()
            mixed[:, 3] = x[:, 3]
            return mixed

        logits = small.model.run_with_hooks(small.clean, fwd_hooks=[(site, put)])[:, -1]
    rows = torch.arange(3)
    np.testing.assert_allclose(found[0], logits[rows, small.correct] - logits[rows, small.wrong], atol=1e-9)


HEADS = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", n) for layer in range(2) for n in range(4)]


def kept_heads(small: Small, kept: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Logits `[pos, d_vocab]` of one clean prompt in which the heads of two blocks that are not kept are the corrupted run's."""

    def put(site: str, cache: Any) -> Any:
        def change(x: torch.Tensor, hook: Any) -> torch.Tensor:
            mixed = cache[site].clone()
            for node in kept:
                if node.site == site:
                    mixed[:, :, node.index] = x[:, :, node.index]
            return mixed

        return change

    with torch.no_grad():
        _, cache = small.model.run_with_cache(corrupted[None])
        hooks = [(site, put(site, cache)) for site in ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z")]
        return small.model.run_with_hooks(clean[None], fwd_hooks=hooks)[0]


def divergence(small: Small, kept: Any, slot: int) -> float:
    """Minus KL(clean run || circuit), written out."""
    with torch.no_grad():
        p = small.model(small.clean[[slot]])[0, -1].softmax(-1)
    q = kept_heads(small, kept, small.clean[slot], small.corrupted[slot])[-1].softmax(-1)
    return -float((p * (p / q).log()).sum())


def test_the_divergence_of_circuits(small: Small) -> None:
    """Exact, by hooks; the searches are those that the values by hand lead to."""
    pairs, run = pairs_of(small), {"nodes": HEADS, "metric": "neg_kl", **OPTIONS}
    circuit = fp.find_circuit(small.model, pairs, size=3, **run)
    assert circuit.graph.whole.tolist() == [0.0, 0.0, 0.0]

    def mean(kept: Any) -> float:
        return float(np.mean([divergence(small, kept, slot) for slot in range(3)]))

    empty = mean([])
    share = {
        tuple(kept): 1 - mean(kept) / empty for kept in [circuit.items, *([h for h in HEADS if h != out] for out in HEADS)]
    }
    assert circuit.faithfulness == pytest.approx(share[circuit.items], abs=1e-9)
    everything = float(circuit.graph.faithfulness(circuit.graph.values([HEADS]))[0])
    assert everything == pytest.approx(1.0)
    lost = [everything - share[tuple(h for h in HEADS if h != out)] for out in HEADS]
    np.testing.assert_allclose(circuit.scores, lost, atol=1e-9)
    greedy = fp.find_circuit(small.model, pairs, method="greedy", size=1, **run)
    assert greedy.items[0] == max(HEADS, key=lambda head: -abs(mean([head]) / empty))
    acdc, stays = fp.find_circuit(small.model, pairs, method="acdc", threshold=0.05, **run), list(HEADS)
    for head in reversed(HEADS):
        rest = [other for other in stays if other != head]
        if abs(mean(rest) - mean(stays)) / abs(empty) < 0.05:
            stays = rest
    assert set(acdc.items) == set(stays)


def whole_answers(small: Small, kept: Any, slot: int, side: int) -> float:
    """Logarithm of the summed probabilities of a pair's answers; each answer in a run of its own, behind both prompts."""
    total = 0.0
    for answer in ANSWERS[slot][side]:
        behind = torch.tensor(answer[:-1], dtype=torch.long)
        runs = [torch.cat([tokens[slot], behind]) for tokens in (small.clean, small.corrupted)]
        log_p = kept_heads(small, kept, *runs)[6:].log_softmax(-1)
        total += float(torch.exp(sum(log_p[place, token] for place, token in enumerate(answer))))
    return float(np.log(total))


@pytest.mark.parametrize("name", ["sequence_log_prob", "sequence_log_prob_diff"])
def test_answers_of_several_tokens(small: Small, name: str) -> None:
    circuit = fp.find_circuit(small.model, long_pairs(small), nodes=HEADS, size=3, metric=name, **OPTIONS)
    choices = [HEADS, [], HEADS[2:5], list(circuit.items)]
    found = circuit.graph.values(choices)
    for kept, values in zip(choices, found, strict=True):
        for slot in range(3):
            expected = whole_answers(small, kept, slot, 0)
            expected -= whole_answers(small, kept, slot, 1) if name.endswith("diff") else 0.0
            assert values[slot] == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(found[0], circuit.graph.whole, atol=1e-9)
    ratio = (found[3].mean() - found[1].mean()) / (circuit.graph.whole.mean() - found[1].mean())
    assert circuit.faithfulness == pytest.approx(ratio)
    assert circuit.metadata["metric"] == name
    assert len(circuit.stability(resamples=1)) == 1


@pytest.mark.parametrize("last", ["end", 6, -1])
def test_positions_of_longer_runs_are_those_of_the_prompt(small: Small, last: str | int) -> None:
    """A head kept at position 3 is ablated elsewhere, also in the answer; -1 is the last token of the prompt."""
    pairs = fp.Pairs(tuple(replace(pair, labels={"end": 6}) for pair in long_pairs(small)))
    site = "blocks.0.attn.hook_z"
    nodes = (fp.Node(site, "head", 1, 3), fp.Node(site, "head", 2, last))
    graph = NodeGraph(wrap(small.model), pairs, "corrupted", Measures.of("sequence_log_prob"), nodes)
    found = graph.values([nodes])[0]
    at_six = NodeGraph(graph.lens, pairs, "corrupted", graph.measures, (nodes[0], replace(nodes[1], position=6)))
    np.testing.assert_array_equal(graph.estimates(), at_six.estimates())
    answer = ANSWERS[0][0][0]
    clean, corrupted = (torch.cat([tokens[0], torch.tensor(answer[:-1])])[None] for tokens in (small.clean, small.corrupted))
    with torch.no_grad():
        z = small.model.run_with_cache(corrupted)[1][site]

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            mixed = z.clone()
            mixed[:, 3, 1], mixed[:, 6, 2] = x[:, 3, 1], x[:, 6, 2]
            return mixed

        log_p = small.model.run_with_hooks(clean, fwd_hooks=[(site, put)])[0, 6:].log_softmax(-1)
    assert found[0] == pytest.approx(float(sum(log_p[place, token] for place, token in enumerate(answer))), abs=1e-9)


def test_positions_in_the_answer_are_refused(small: Small) -> None:
    for position in (7, -8):
        with pytest.raises(fp.FeatpatchError, match=f"position {position} .*expected"):
            fp.find_circuit(
                small.model,
                long_pairs(small),
                nodes=[fp.head(0, 1, position=position)],
                metric="sequence_log_prob",
                size=1,
                **OPTIONS,
            )


def test_whole_answers_that_are_refused(small: Small) -> None:
    run: dict[str, Any] = {"nodes": HEADS[:1], "metric": "sequence_log_prob", **OPTIONS}
    with pytest.raises(fp.FeatpatchError, match="to='mean_by_position' with metric 'sequence_log_prob' and answers of several"):
        fp.find_circuit(small.model, long_pairs(small), to="mean_by_position", **run)
    with pytest.raises(
        fp.FeatpatchError, match="pair 0: its answers .* several tokens, and logit_diff reads one: .*sequence_log"
    ):
        fp.find_circuit(small.model, long_pairs(small), **{**run, "metric": "logit_diff"})
    too_long = fp.Pair((1,) * 14, (2,) * 14, (), (), correct_sequences=((3,) * 4,), wrong_sequences=((4,),))
    with pytest.raises(fp.FeatpatchError, match="pair 0 has 17 tokens with its answers"):
        fp.find_circuit(small.model, fp.Pairs((too_long,)), **run)
    one_token = fp.find_circuit(small.model, pairs_of(small), to="mean", **run)
    assert one_token.scores == pytest.approx(
        fp.find_circuit(small.model, pairs_of(small), to="mean", **{**run, "metric": "log_prob"}).scores
    )
