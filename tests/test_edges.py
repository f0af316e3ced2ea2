"""Edges between components against a forward pass in plain torch that puts every receiver's input together."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, FAMILIES, HOOKED, UNUSUAL
from circuits_by_hand import ByHand, gates, induction, two_hop
from edge_oracle import edges_of, forward_with_edges
from scipy.stats import mannwhitneyu
from small import Small, small_bridge, small_hooked
from test_sets import pairs_of

import featpatch as fp
from featpatch.circuits.attribution import Point
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.graph import Graph
from featpatch.circuits.search import along_edges
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap

OPTIONS: dict[str, Any] = {"over": "edges", "progress": False}
BY_HAND = {"induction, value": lambda: induction("value"), "induction, key": lambda: induction("key"), "and": lambda: gates("and"),
           "or": lambda: gates("or"), "two hops": two_hop}  # fmt: skip


def short(node: fp.Node) -> str:
    """A node as the oracle names it."""
    if node.site == "hook_embed":
        return "embed"
    if node == fp.LOGITS:
        return "logits"
    layer, name = node.site.split(".")[1], node.site.rsplit("_", 1)[1]
    return f"L{layer}.MLP" if name == "out" else f"L{layer}.H{node.index}" + ("" if name == "z" else f".{name}")


def named(edge: Any) -> tuple[str, str]:
    return short(edge.sender), short(edge.receiver)


def graph_of(model: Any, pairs: fp.Pairs, to: str = "corrupted") -> EdgeGraph:
    graph = EdgeGraph(wrap(model), pairs, to, Measures.of("logit_diff"))
    graph.check()
    return graph


def by_hand(found: ByHand) -> fp.Pairs:
    return fp.Pairs.from_tokens(found.clean, found.corrupted, found.correct, found.wrong)


def difference(logits: torch.Tensor, correct: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(correct))
    return logits[rows, -1, correct] - logits[rows, -1, wrong]


def test_any_edges_of_a_random_model() -> None:
    """Random halves, single ones, all and none, together in one call."""
    small = small_hooked()
    graph = graph_of(small.model, pairs_of(small))
    assert [named(edge) for edge in graph.items] == sorted(
        (named(e) for e in graph.items), key=[*map(named, graph.items)].index
    )
    assert {named(edge) for edge in graph.items} == set(edges_of(small.model))
    generator = np.random.default_rng(0)
    choices = [[e for e in graph.items if generator.random() < share] for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.9)]
    choices += [
        [],
        list(graph.items),
        [e for e in graph.items if e != graph.items[40]],
        [e for e in graph.items if e != graph.items[99]],
    ]
    found = graph.values(choices)
    for kept, values in zip(choices, found, strict=True):
        ablated = {named(edge) for edge in graph.items} - {named(edge) for edge in kept}
        logits = forward_with_edges(small.model, small.clean, small.corrupted, ablated)
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
    assert len(np.unique(found.round(6), axis=0)) == len(choices) - 1


@cache
def model_of(name: str) -> ByHand:
    return BY_HAND[name]()


@cache
def found_by(name: str, method: str, prompts: int = 8, **options: Any) -> fp.Circuit:
    found = model_of(name)
    target = {"target": 1.0} if method == "greedy" else {}
    return fp.find_circuit(found.model, by_hand(found)[:prompts], method=method, **target, **options, **OPTIONS)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("method", ["threshold", "greedy", "acdc"])
def test_circuits_by_hand_are_found(name: str, method: str) -> None:
    """Exactly the true edges, by the methods that can find them; what each one misses is known too."""
    found, circuit = model_of(name), found_by(name, method, prompts=4)
    edges = {named(edge) for edge in circuit.items}
    if name == "or" and method == "threshold":
        assert edges == {("L1.MLP", "logits")}  # each branch alone can go
    elif name == "or" and method == "acdc":
        assert edges < found.edges  # one branch is enough
        assert len(edges) == 3
    elif name != "or":
        assert edges == found.edges
    if not (name == "or" and method == "threshold"):
        assert circuit.faithfulness == pytest.approx(1.0)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    "name",
    ["bridge gpt2", "bridge neox", "bridge llama", "bridge qwen3", "hooked neox", "hooked llama", "hooked attention only"],
)
def test_architectures(name: str) -> None:
    """All edges are the model, none is the corrupted run, and a head's edges together are the head."""
    kind, _, which = name.partition(" ")
    model = (BRIDGES if kind == "bridge" else HOOKED)[which]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = graph_of(model, pairs_of(small))
    with torch.no_grad():
        clean, corrupted = (difference(model(t), small.correct, small.wrong) for t in (small.clean, small.corrupted))
        head = fp.Node("blocks.1.attn.hook_z", "head", 2)
        found = graph.values([graph.items, [], [e for e in graph.items if e.sender != head]])
        np.testing.assert_allclose(found[0], clean, atol=1e-9)
        np.testing.assert_allclose(found[1], corrupted, atol=1e-9)
        z = model.run_with_cache(small.corrupted)[1]["blocks.1.attn.hook_z"][:, :, 2]

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[:, :, 2] = z
            return x

        patched = model.run_with_hooks(small.clean, fwd_hooks=[("blocks.1.attn.hook_z", put)])
    np.testing.assert_allclose(found[2], difference(patched, small.correct, small.wrong), atol=1e-9)
    assert np.abs(found[2] - found[0]).max() > 1e-4


def compare_with_differences(graph: EdgeGraph, estimates: Any, numbers: Any) -> None:
    """Edge by edge, with the slope of the differentiable run."""
    step = 1e-5
    for number in numbers:
        kept = torch.ones(2, len(graph.items), dtype=torch.float64)
        kept[0, number] += step
        kept[1, number] -= step
        up, down = graph.measured(kept, [0, 1, 2]).mean(1).tolist()
        assert estimates[number] == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_estimates_are_the_gradient(make: Any) -> None:
    """Against finite differences of the differentiable run, edge by edge."""
    small = make()
    graph = graph_of(small.model, pairs_of(small))
    estimates = graph.estimates()
    compare_with_differences(graph, estimates, range(0, len(graph.items), 17))
    assert np.abs(estimates).max() > 1e-3


@pytest.mark.parametrize("other", ["scores", "window"])
def test_attention_that_is_not_as_described_runs_through_the_model(other: str) -> None:
    """The attention of a layer differs from its settings: at all tokens, or only at the last of seven."""
    small = small_hooked()
    attention = small.model.blocks[1].attn
    if other == "scores":
        masked = attention.apply_causal_mask
        attention.apply_causal_mask = lambda scores, *options: masked(2 * scores, *options)
    else:
        attention.attn_type, small.model.cfg.window_size = "local", 6
        attention._make_causal_mask = lambda query_ctx_length, **_: torch.ones([query_ctx_length] * 2).tril().bool()
    graph = graph_of(small.model, pairs_of(small))
    assert graph._projections is None
    compare_with_differences(graph, graph.estimates(), range(0, len(graph.items), 23))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", UNUSUAL)
def test_estimates_of_models_with_unusual_norms_or_logits(name: str) -> None:
    model = UNUSUAL[name]()
    graph = graph_of(model, pairs_of(Small(model, [])))
    estimates = graph.estimates()
    compare_with_differences(graph, estimates, range(0, len(graph.items), 23))
    assert np.abs(estimates).max() > 1e-4
    assert graph._projections is not None
    assert (graph._head is None) == (name == "cohere")


def test_norms_that_a_model_computes_in_float32_are_recognised() -> None:
    """The model's other numbers are in float64."""
    model = BRIDGES["llama"]()
    assert graph_of(model, pairs_of(Small(model, [])))._projections is not None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_estimates_in_bfloat16(name: str) -> None:
    """The sum of parts rounds otherwise than the model; estimates are those of the same model in float64, but for rounding."""
    small = Small(BRIDGES[name](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    expected = graph_of(small.model, pairs_of(small)).estimates()
    small.model.to(torch.bfloat16)
    found = graph_of(small.model, pairs_of(small)).estimates()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert not np.allclose(found, expected, rtol=1e-4)


SLOWLY = ("llama", "gemma2", "fewer outputs than inputs")
"""Families whose edges are run one by one."""


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name"), FAMILIES)
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean", "mean_by_position", "resample"])
def test_estimates_by_weights_are_those_by_a_weight_per_edge(
    kind: str, name: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product of changes and gradients against automatic differentiation of a run put together from its edges."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = graph_of(model, pairs_of(small), to)
    assert graph._projections is not None
    monkeypatch.setattr("featpatch.circuits.edge_graph.ESTIMATED_AT_ONCE", 14)  # two prompts, then one
    found = graph.estimates()
    slow = -graph._by_edge([0, 1, 2], [Point()], torch.ones(1, 3), lambda runs: None)[0].numpy() / 3
    np.testing.assert_allclose(found, slow, atol=1e-10 * np.abs(slow).max())
    assert np.abs(slow).max() > 1e-4


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*each.values, marks=[pytest.mark.extended] * (each.values[1] not in SLOWLY)) for each in FAMILIES],
)
@pytest.mark.parametrize("metric", ["logit_diff", "neg_kl", lambda logits, correct, wrong: logits[:, correct].sum(1)])
def test_single_edges_as_paths_are_those_of_whole_passes(kind: str, name: str, metric: Any) -> None:
    """Every edge ablated by itself, through the engine of paths and in a pass put together from all edges."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = EdgeGraph(wrap(model), pairs_of(small, [0, 1]), "corrupted", Measures.of(metric))
    found, slow = graph.alone(), Graph.alone(graph)
    np.testing.assert_allclose(found, slow, atol=1e-10)
    assert np.abs(slow - graph.whole).max() > 1e-4


def ranked(name: str, method: str) -> dict[tuple[str, str], float]:
    """Every edge with a score by which a method would keep it sooner than others."""
    if method in ("exact", "estimate"):
        circuit = found_by(name, "threshold") if method == "exact" else found_by(name, "threshold", scores=method)
        return {named(e): abs(score) for e, score in zip(circuit.graph.items, circuit.scores, strict=True)}
    if method == "greedy":
        circuit = found_by(name, "greedy")
        order = {edge: -float(n) for n, edge in enumerate(circuit.items)}
        return {named(e): order.get(e, -float(len(circuit.graph.items))) for e in circuit.graph.items}
    both = found_by(name, "acdc"), found_by(name, "acdc", threshold=0.6)
    return {named(e): float(sum(e in of.items for of in both)) for e in both[0].graph.items}


def area(name: str, method: str) -> float:
    """Under the ROC curve: the chance that a true edge has a larger score than another one, ties counted half."""
    scores, edges = ranked(name, method), model_of(name).edges
    true, other = ([s for e, s in scores.items() if (e in edges) == want] for want in (True, False))
    return float(mannwhitneyu(true, other).statistic / (len(true) * len(other)))


METHODS = ("exact", "estimate", "greedy", "acdc")
AREAS = {
    "induction, value": (1.0, 1.0, 1.0, 1.0),
    "induction, key": (1.0, 0.67, 1.0, 1.0),
    "and": (1.0, 1.0, 1.0, 1.0),
    "or": (0.6, 0.6, 0.79, 0.8),
    "two hops": (1.0, 1.0, 1.0, 1.0),
}
"""Areas under the ROC curve by model and method, as the README has them."""


@pytest.mark.extended
@pytest.mark.parametrize("name", AREAS)
def test_areas_under_the_roc_curve(name: str) -> None:
    assert [round(area(name, method), 2) for method in METHODS] == pytest.approx(AREAS[name], abs=0.006)


if __name__ == "__main__":
    print("| circuit | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    for name in BY_HAND:
        print(f"| {name} | " + " | ".join(f"{area(name, method):.2f}" for method in METHODS) + " |")


@pytest.mark.usefixtures("wide")
def test_parallel_blocks_have_no_edge_from_a_head_to_their_own_mlp() -> None:
    small = Small(HOOKED["neox"](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = graph_of(small.model, pairs_of(small))
    assert ("L1.H0", "L1.MLP") not in {named(edge) for edge in graph.items}
    assert ("L0.H0", "L1.MLP") in {named(edge) for edge in graph.items}


def test_shared_keys_lead_to_the_heads_that_use_them() -> None:
    """Greedy search and graph: a key head of a model with grouped queries belongs to several heads."""
    small = Small(HOOKED["llama"](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = EdgeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("logit_diff"))
    last = next(e for e in graph.items if named(e) == ("L2.H1", "logits"))
    keys = [e for e in graph.items if named(e) in {("embed", "L2.H0.k"), ("embed", "L2.H1.k")}]
    scores = np.array([3.0 if e == last else 2.0 if e == keys[1] else 1.0 if e == keys[0] else 0.0 for e in graph.items])
    *_, found = along_edges(graph, scores, 1.0, 2)
    assert [named(graph.items[n]) for n in found] == [named(last), ("embed", "L2.H0.k")]
    heads = [fp.Node("blocks.2.attn.hook_z", "head", n) for n in (0, 1)]
    assert set(fp.diagram.graph([keys[0]], [1.0], graph.users).successors(keys[0].sender)) == set(heads)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_search_along_edges_by_a_loop(seed: int) -> None:
    """At every step the largest |score| of all edges into what is reached, the first of equal ones, looked up anew."""
    small = small_hooked()
    graph = graph_of(small.model, pairs_of(small))
    scores = np.random.default_rng(seed).integers(-20, 21, len(graph.items)).astype(float)
    names, reached, expected = [named(edge) for edge in graph.items], {"logits"}, list[int]()
    for _ in range(60):
        into = [n for n, (_, receiver) in enumerate(names) if n not in expected
                and (receiver.rpartition(".")[0] if receiver[-2:] in (".q", ".k", ".v") else receiver) in reached]  # fmt: skip
        expected.append(max(into, key=lambda n: abs(scores[n])))
        reached.add(names[expected[-1]][0])
    *_, found = along_edges(graph, scores, 1.0, 60)
    assert found == expected


def test_orders_sizes_and_signs() -> None:
    """ACDC goes from the output down; both greedy searches stop at their size; estimates have the sign of what is lost."""
    found = gates("or")
    pairs = by_hand(found)[:4]
    greedy = fp.find_circuit(found.model, pairs, method="greedy", size=2, **OPTIONS)
    assert named(greedy.items[0]) == ("L1.MLP", "logits")
    assert len(greedy) == 2
    acdc = fp.find_circuit(found.model, pairs, method="acdc", **OPTIONS)
    assert [named(edge) for edge in acdc.items] == [named(e) for e in acdc.graph.items[::-1] if e in set(acdc.items)]
    assert {named(edge) for edge in acdc.items} == {("L1.MLP", "logits"), ("L0.H0", "L1.MLP"), ("embed", "L0.H0.v")}
    small = small_hooked()
    run: dict[str, Any] = {"size": 30, "to": "corrupted", **OPTIONS}
    exact, estimate = (fp.find_circuit(small.model, pairs_of(small, [0]), scores=how, **run) for how in ("exact", "estimate"))
    assert np.corrcoef(exact.scores, estimate.scores)[0, 1] > 0.5


def test_the_divergence_of_edges() -> None:
    """The metric of any edges against the recomputed forward pass, and a search by exact scores."""
    small = small_hooked()
    graph = EdgeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("neg_kl"))
    graph.check()
    generator = np.random.default_rng(0)
    choices = [[edge for edge in graph.items if generator.random() < share] for share in (0.3, 0.9)]
    with torch.no_grad():
        p = small.model(small.clean)[:, -1].softmax(-1)
    for kept, values in zip(choices, graph.values(choices), strict=True):
        ablated = {named(edge) for edge in set(graph.items) - set(kept)}
        q = forward_with_edges(small.model, small.clean, small.corrupted, ablated)[:, -1].softmax(-1)
        np.testing.assert_allclose(values, -(p * (p / q).log()).sum(-1), atol=1e-9)


def test_whole_answers_of_edges() -> None:
    """Exact values by the recomputed forward pass; estimates are those of single tokens, weighted by how likely answers are."""
    small = small_hooked()
    answers = (((3, 9), (5,)), ((4, 11),))
    pair = fp.Pair(
        tuple(small.clean[0].tolist()), tuple(small.corrupted[0].tolist()), (), (),
        correct_sequences=answers[0], wrong_sequences=answers[1],
    )  # fmt: skip
    graph = EdgeGraph(wrap(small.model), fp.Pairs((pair,)), "corrupted", Measures.of("sequence_log_prob_diff"))
    graph.check()
    kept = [edge for number, edge in enumerate(graph.items) if number % 3]
    ablated = {named(edge) for edge in set(graph.items) - set(kept)}

    def log_p(answer: tuple[int, ...], without: Any) -> float:
        behind = torch.tensor(answer[:-1], dtype=torch.long)
        runs = [torch.cat([tokens[0], behind])[None] for tokens in (small.clean, small.corrupted)]
        logits = forward_with_edges(small.model, *runs, without)[0, 6:].log_softmax(-1)
        return float(sum(logits[place, token] for place, token in enumerate(answer)))

    for choice, without in ((kept, ablated), (graph.items, frozenset())):
        right, wrong = ([log_p(answer, without) for answer in side] for side in answers)
        expected = np.logaddexp.reduce(right) - np.logaddexp.reduce(wrong)
        assert graph.values([choice])[0, 0] == pytest.approx(expected, abs=1e-9)
    weights = np.exp(np.array(right) - np.logaddexp.reduce(right))
    expected_scores = np.zeros(len(graph.items))
    for answer, weight in zip((*answers[0], *answers[1]), (*weights, -1.0), strict=True):
        for place, token in enumerate(answer):
            behind = answer[:place]
            single = fp.Pair(pair.clean + behind, pair.corrupted + behind, (token,), (39,))
            of_token = EdgeGraph(wrap(small.model), fp.Pairs((single,)), "corrupted", Measures.of("log_prob"))
            expected_scores += weight * of_token.estimates()
    np.testing.assert_allclose(graph.estimates(), expected_scores, atol=1e-9)


def test_edges_are_the_default_without_nodes(bridge: Small) -> None:
    run: dict[str, Any] = {"scores": "estimate", "size": 3, "progress": False}
    one, other = (fp.find_circuit(bridge.model, pairs_of(bridge), **over, **run) for over in ({}, {"over": "edges"}))
    assert one.items == other.items
