"""Curves, CPR, CMD, ROC and comparisons of circuits against definitions written out by hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jaxtyping
import networkx as nx
import numpy as np
import pytest
import torch
from architectures import HOOKED
from edge_oracle import edges_of, forward_with_edges, outputs
from small import Small, small_hooked
from test_circuit_journals import tiny
from test_edges import difference, found_by, graph_of, model_of, named
from test_feature_edges import graph_of as graph_with_features
from test_sets import pairs_of

import featpatch as fp
from featpatch.circuits.curve import sizes_of

OPTIONS: dict[str, Any] = {"over": "edges", "scores": "estimate", "progress": False}
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Edge = tuple[str, str]


def without_dangling(edges: Iterable[Edge], users: dict[str, list[str]] | None = None) -> set[Edge]:
    """The edges on some path from the embedding to the logits, found by networkx; `L1.H2.k` is a part of `L1.H2`."""
    kept, graph = set(edges), nx.DiGraph()
    graph.add_nodes_from(["embed", "logits"])

    def parts(receiver: str) -> list[str]:
        own = receiver.rsplit(".", 1)[0] if receiver[-2:] in (".q", ".k", ".v") else receiver
        return (users or {}).get(receiver, [own])

    for sender, receiver in kept:
        graph.add_edges_from((sender, user) for user in parts(receiver))
    from_input, to_logits = nx.descendants(graph, "embed") | {"embed"}, nx.ancestors(graph, "logits") | {"logits"}
    return {edge for edge in kept if edge[0] in from_input and to_logits.intersection(parts(edge[1]))}


def random_masks(graph: Any, shares: Iterable[float]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.array([generator.random(len(graph.items)) < share for share in shares])


def test_edges_that_dangle() -> None:
    small = small_hooked()
    graph = graph_of(small.model, pairs_of(small))
    masks = random_masks(graph, [0.0, 0.02, 0.02, 0.05, 0.05, 0.1, 0.3, 1.0])
    names = [named(edge) for edge in graph.items]
    for mask, pruned in zip(masks, graph.pruned(masks), strict=True):
        kept = {name for name, is_kept in zip(names, mask, strict=True) if is_kept}
        left = {name for name, is_kept in zip(names, pruned, strict=True) if is_kept}
        assert left == without_dangling(kept)
    sizes, left_sizes = masks.sum(1), graph.pruned(masks).sum(1)
    assert (left_sizes[[0, -1]] == sizes[[0, -1]]).all()
    assert (left_sizes[1:-1] < sizes[1:-1]).any()
    np.testing.assert_array_equal(graph.edge_counts(masks), sizes)


@pytest.mark.usefixtures("wide")
def test_an_edge_into_a_shared_key_dangles_only_if_no_head_that_uses_it_is_read() -> None:
    small = Small(HOOKED["llama"](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = graph_of(small.model, pairs_of(small))
    heads = small.model.cfg.n_heads // small.model.cfg.n_key_value_heads
    users = {f"L{layer}.H{n // heads}.{way}": [f"L{layer}.H{m}" for m in range(n // heads * heads, (n // heads + 1) * heads)]
             for layer in range(small.model.cfg.n_layers) for n in range(small.model.cfg.n_heads) for way in "kv"}  # fmt: skip
    masks = random_masks(graph, [0.02, 0.03, 0.04, 0.06] * 8)
    names = [named(edge) for edge in graph.items]
    for mask, pruned in zip(masks, graph.pruned(masks), strict=True):
        kept, left = ({n for n, is_kept in zip(names, of, strict=True) if is_kept} for of in (mask, pruned))
        assert left == without_dangling(kept, users)


def test_mediators_dangle_like_components() -> None:
    """A feature is a node of its own between the components upstream and downstream of its activation."""
    small = small_hooked()
    sae, name = small.at("blocks.1.hook_resid_pre"), "blocks.1.hook_resid_pre"
    graph = graph_with_features(small, [sae], [fp.Node(name, "feature", n, sae=name) for n in range(3)])
    masks = random_masks(graph, [0.05, 0.2, 0.3])
    names = [(str(edge.sender), *(str(user) for user in graph.users(edge.receiver))) for edge in graph.items]
    for mask, pruned in zip(masks, graph.pruned(masks), strict=True):
        walked = nx.DiGraph(names[n] for n in np.flatnonzero(mask))
        walked.add_nodes_from([names[0][0], str(fp.LOGITS)])
        below, above = nx.descendants(walked, names[0][0]) | {names[0][0]}, nx.ancestors(walked, str(fp.LOGITS))
        expected = [m and names[n][0] in below and names[n][1] in {*above, str(fp.LOGITS)} for n, m in enumerate(mask)]
        assert pruned.tolist() == expected
    assert (graph.pruned(masks)[1:].sum(1) > 0).all()
    assert (graph.pruned(masks).sum(1) < masks.sum(1)).all()


@pytest.mark.parametrize("to", ["corrupted", "mean_by_position"])
def test_curves_are_those_of_the_mib_benchmark(to: Any) -> None:
    """Sizes are rounded down, dangling edges removed, and areas trapezoidal; faithfulness is compared with the edge oracle."""
    small = small_hooked()
    circuit = fp.find_circuit(small.model, pairs_of(small), size=5, to=to, **OPTIONS)
    curve, edges = circuit.curve(), edges_of(small.model)
    both = outputs(small.model, torch.cat([small.clean, small.corrupted]))
    other = {name: values.mean(0, keepdim=True).expand(len(small.clean), -1, -1) for name, values in both.items()}
    scores = dict(zip(map(named, circuit.graph.items), circuit.scores.tolist(), strict=True))

    def metric(kept: set[Edge]) -> float:
        ablated = set(edges) - kept
        logits = forward_with_edges(small.model, small.clean, small.corrupted, ablated, other if to != "corrupted" else None)
        return float(difference(logits, small.correct, small.wrong).mean())

    whole, nothing = metric(set(edges)), metric(set())
    for found, key in ((curve, lambda edge: -scores[edge]), (curve.other, lambda edge: -abs(scores[edge]))):
        ranked = sorted(map(named, circuit.graph.items), key=key)
        circuits = [without_dangling(ranked[: int(share * len(edges))]) for share in SHARES]
        faithful = [(metric(kept) - nothing) / (whole - nothing) for kept in circuits]
        assert found.sizes == tuple(int(share * len(edges)) for share in SHARES)
        assert found.edges.tolist() == [len(kept) for kept in circuits]
        assert (found.low[0], found.high[0], found.low[-1], found.high[-1]) == pytest.approx((0, 0, 1, 1))
        np.testing.assert_allclose(found.faithfulness, faithful, atol=1e-9)
        assert 0 < len(circuits[-3]) < found.sizes[-3]  # some edges dangle
        under = above = 0.0
        for n in range(len(SHARES) - 1):
            width = SHARES[n + 1] - SHARES[n]
            under += width * (faithful[n] + faithful[n + 1]) / 2
            above += width * (abs(1 - faithful[n]) + abs(1 - faithful[n + 1])) / 2
        assert (found.cpr, found.cmd) == pytest.approx((under, above))
    assert curve.cpr != pytest.approx(curve.other.cpr, abs=1e-3)
    if to != "corrupted":  # edges from senders that aren't reached matter where ablation values are not those of a run
        order = np.argsort(-circuit.scores, kind="stable")
        unpruned = circuit.graph.values([[circuit.graph.items[n] for n in order[:size]] for size in curve.sizes])
        assert np.abs(circuit.graph.faithfulness(unpruned) - curve.faithfulness).max() > 1e-3


def test_both_orders_are_shown() -> None:
    small = small_hooked()
    circuit = fp.find_circuit(small.model, pairs_of(small), size=5, **OPTIONS)
    signed, absolute = circuit.curve([0.1, 0.5]), circuit.curve([0.1, 0.5], order="absolute")
    assert signed.order == absolute.other.order == "signed"
    np.testing.assert_array_equal(signed.faithfulness, absolute.other.faithfulness)
    np.testing.assert_array_equal(signed.other.faithfulness, absolute.faithfulness)
    for order, curve in (("signed", signed), ("absolute", absolute)):
        for shown in (repr(signed), repr(absolute)):
            assert f"{order} order CPR {curve.cpr:.3g}, CMD {curve.cmd:.3g}" in shown
    assert signed.table()["order"].tolist() == ["signed"] * 2 + ["absolute"] * 2
    assert [line.name.split()[0] for line in signed.plot().data] == ["signed", "absolute"]
    assert sizes_of(100, [0.29, 0.57, 0.999]) == (29, 57, 99)
    for call, message in (
        (lambda: circuit.curve(order="largest"), "order='largest'"), (lambda: circuit.curve([2.0]), "expected fractions"),
        (lambda: circuit.curve([0.2, 0.1]), "ascending"), (lambda: circuit.roc_auc(circuit, order="up"), "order='up'"),
        (lambda: circuit.roc_auc(circuit.graph.items), "at least one item in it and one outside"),
        (lambda: circuit.roc_auc([fp.LOGITS]), "is not in the graph"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            call()
    acdc = fp.find_circuit(small.model, pairs_of(small), over="edges", method="acdc", threshold=0.5, progress=False)
    with pytest.raises(fp.FeatpatchError, match="ranked no items"):
        acdc.roc_auc(circuit)


def test_edges_between_kept_components() -> None:
    """For nodes, edges are counted between kept heads, MLPs, embedding and logits; for other candidates they are NaN."""
    small = small_hooked()
    heads = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", n) for layer in range(3) for n in range(4)]
    mlps = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in range(3)]
    for nodes in ([*heads, *mlps], heads):  # candidates that are not given are kept
        circuit = fp.find_circuit(small.model, pairs_of(small), nodes=nodes, size=3, progress=False)
        curve = circuit.curve([0.0, 0.4, 1.0])
        names = [f"L{n.site.split('.')[1]}.{'MLP' if n.kind == 'activation' else f'H{n.index}'}" for n in circuit.graph.items]
        for share, found in zip((0.0, 0.4, 1.0), curve.edges, strict=True):
            out = {names[n] for n in np.argsort(-circuit.scores, kind="stable")[int(share * len(names)) :]}
            between = [
                (a, b)
                for a, b in edges_of(small.model)
                if a not in out and b.removesuffix(b[-2:] if b[-2] == "." else "") not in out
            ]
            assert found == len(between)
    sae = small.at("blocks.1.hook_resid_pre")
    features = [fp.Node("blocks.1.hook_resid_pre", "feature", n, sae="blocks.1.hook_resid_pre") for n in range(4)]
    for more, saes in ((features, sae), ([fp.Node("blocks.0.hook_mlp_out", "activation", None, 3)], None)):
        curve = fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=more, size=1, progress=False).curve([0.5, 1.0])
        assert np.isnan(curve.edges).all()
        assert "edges" not in repr(curve)


def test_the_area_under_the_roc_curve() -> None:
    """The area is the share of (true, other) pairs of items in the right order; ties count half."""
    circuit = found_by("or", "threshold", scores="estimate")
    true = [edge for edge in circuit.graph.items if named(edge) in model_of("or").edges]
    is_true = [edge in true for edge in circuit.graph.items]
    for order, scores in (("signed", circuit.scores), ("absolute", np.abs(circuit.scores))):
        pairs = [
            (scores[a], scores[b]) for a, one in enumerate(is_true) for b, other in enumerate(is_true) if one and not other
        ]
        expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        assert circuit.roc_auc(true, order=order) == pytest.approx(expected)
        assert circuit.roc_auc(circuit, order="absolute") == 1.0
    assert 0.5 < expected < 0.7
    small = small_hooked()
    other = fp.find_circuit(small.model, pairs_of(small), size=30, **OPTIONS)
    worst = [other.graph.items[n] for n in np.argsort(other.scores)[:9]]
    assert (other.roc_auc(worst), other.roc_auc(worst, order="absolute") > 0.5) == (0.0, True)


def test_nodes_and_drawings_are_compared() -> None:
    small = small_hooked()
    pairs = pairs_of(small)
    one, other = (
        fp.find_circuit(small.model, pairs, size=size, metric=m, **OPTIONS) for size, m in ((12, "logit_diff"), (9, "log_prob"))
    )
    table = one.compare(other)

    def ends(circuit: fp.Circuit) -> set[str]:
        return {end.removesuffix(end[-2:] if end[-2] == "." else "") for edge in map(named, circuit.items) for end in edge}

    both, either = ends(one) & ends(other), ends(one) | ends(other)
    assert table.attrs["node_jaccard"] == len(both) / len(either)
    assert 0 < len(both) < len(either)
    assert len(table.attrs["nodes"]) == len(both)
    stable = one.stability(resamples=2)
    assert stable.attrs["jaccard"] == pytest.approx((stable["jaccard"].mean(), *np.percentile(stable["jaccard"], [2.5, 97.5])))
    found = np.array(list(stable.attrs["found"].values()))
    assert list(stable.attrs["found"]) == list(map(str, one.items))
    shared = 2 * len(one) * stable["jaccard"] / (1 + stable["jaccard"])  # both circuits have 12 items
    assert found.sum() == pytest.approx(shared.sum() / 2)
    assert set(found * 2) <= {0, 1, 2}


def test_a_circuit_of_edges_in_viewers_and_graphviz() -> None:
    """Edges at all positions are exported as links between nodes; the inputs of one head are added up."""
    small = small_hooked()
    circuit = fp.find_circuit(small.model, pairs_of(small), size=40, **OPTIONS)
    graph = circuit.to_networkx()
    viewed = fp.diagram.viewer_json(graph, tokens=list("abcdefg"), slug="edges", model="small")
    links = {}
    for edge, score in zip(circuit.graph.items, circuit.scores, strict=True):
        if edge in circuit.items:
            ends = tuple(end.removesuffix(end[-2:] if end[-2] == "." else "") for end in named(edge))
            links[ends] = links.get(ends, 0.0) + score
    assert sorted(link["weight"] for link in viewed["links"]) == pytest.approx(sorted(links.values()))
    assert len(links) < 40
    assert len(viewed["nodes"]) == len({end for ends in links for end in ends})
    assert {node["ctx_idx"] for node in viewed["nodes"] if node["feature_type"] != "whole embedding"} == {6}
    assert fp.diagram.dot(graph).count("->") == 40


def test_default_scores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores are exact if cheap, else estimated with a message; always exact for nodes and metrics without a gradient."""
    small = tiny()
    run: dict[str, Any] = {"size": 5}
    monkeypatch.setattr("featpatch.circuits.find.EXACT_WORK", 13 * 21 * 12 * 8**2 - 1)  # edges, tokens, width
    found = fp.find_circuit(small.model, pairs_of(small), **run)
    assert (found.metadata["scores"], "scores='estimate'" in repr(found)) == ("estimate", True)
    assert "need about 39 patches" in capsys.readouterr().err
    assert fp.find_circuit(small.model, pairs_of(small), metric="neg_kl", **run).metadata["scores"] == "exact"
    heads = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(2)]
    assert fp.find_circuit(small.model, pairs_of(small), nodes=heads, size=1).metadata["scores"] == "exact"
    assert "estimated" not in capsys.readouterr().err
    monkeypatch.setattr("featpatch.circuits.find.EXACT_WORK", 13 * 21 * 12 * 8**2)
    assert "scores='exact'" in repr(fp.find_circuit(small.model, pairs_of(small), **run, progress=False))


def test_a_circuit_is_refined_item_by_item(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`refine` equals a plain loop from the output down, also after saving and loading."""
    small = small_hooked()
    found = fp.find_circuit(small.model, pairs_of(small), size=40, **OPTIONS)
    graph, threshold = found.graph, 0.03
    kept = [item for item in graph.items if item in set(found.items)]
    now = graph.faithfulness(graph.values([kept]))[0]
    for item in kept[::-1]:
        without = [other for other in kept if other != item]
        faithful = graph.faithfulness(graph.values([without]))[0]
        if abs(faithful - now) < threshold:
            kept, now = without, faithful
    refined = found.refine(threshold=threshold, progress=False)
    assert 0 < len(kept) < len(found)
    assert set(refined.items) == set(kept)
    assert [item for item in found.items if item in set(kept)] == list(refined.items)
    assert refined.faithfulness == pytest.approx(now, abs=1e-12)
    assert "scores='estimate', refined at 0.03)" in repr(refined)
    loaded = fp.load_circuit(refined.save(tmp_path / "c.json"), small.model, pairs_of(small))
    capsys.readouterr()
    assert loaded.items == loaded.again(pairs_of(small)).items == refined.again(pairs_of(small)).items == refined.items
    assert capsys.readouterr().err == "", "a repeated search shows no progress"
    for wrong in (0.0, -0.1, float("nan")):
        with pytest.raises(fp.FeatpatchError, match="expected a finite fraction of the behaviour above 0"):
            found.refine(threshold=wrong)


def test_a_circuit_is_refined_twice(tmp_path: Path) -> None:
    """The file has both thresholds, so that the same search is repeated for other pairs."""
    small = small_hooked()
    found = fp.find_circuit(small.model, pairs_of(small), scores="estimate", size=20, progress=False)
    twice = found.refine(threshold=0.3, progress=False).refine(threshold=1e-9, progress=False)
    assert "refined at 0.3, refined at 1e-09" in repr(twice)
    loaded = fp.load_circuit(twice.save(tmp_path / "c.json"), small.model, pairs_of(small))
    assert loaded.again(pairs_of(small)).items == twice.items
    assert set(found.refine(threshold=1e-9, progress=False).items) > set(twice.items)


def test_thresholds_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    small = small_hooked()
    found = fp.find_circuit(small.model, pairs_of(small), scores="estimate", size=20, progress=False)
    for threshold in (np.inf, np.nan, 10**400, 0, True):
        with pytest.raises(fp.FeatpatchError, match="^threshold=.*: expected a finite fraction"):
            found.refine(threshold=threshold, progress=False)
        with pytest.raises(fp.FeatpatchError, match="^threshold=.*: expected a finite fraction"):
            fp.find_circuit(small.model, pairs_of(small), threshold=threshold, progress=False)


def test_shares_and_known_items_of_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are shares; one share has no area, rather than one of 0, which would be the best CMD."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    small = small_hooked()
    found = fp.find_circuit(small.model, pairs_of(small), scores="estimate", size=20, progress=False)
    shares = np.linspace(0, 1, 3)
    assert found.curve(shares).cmd == found.curve(shares.tolist()).cmd  # type: ignore[arg-type]
    one = found.curve([1.0])
    assert one.faithfulness == pytest.approx([1.0])
    assert np.isnan([one.cpr, one.cmd, one.other.cpr, one.other.cmd]).all()
    for known, said in (
        (3, "items=3: expected several"),
        ("ab", "items='ab'"),
        ([[1]], "is not in the graph"),
        (None, "items=None"),
    ):
        with pytest.raises(fp.FeatpatchError, match=said):
            found.roc_auc(known)  # type: ignore[arg-type]
