"""Estimated scores of edges and nodes against slow loops over points, and their completeness."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import edge_oracle
import feature_edge_oracle
import numpy as np
import pytest
import torch
from architectures import BRIDGES, FAMILIES, HOOKED
from score_oracle import edge_scores, node_scores
from small import Small, small_bridge, small_hooked, standard
from test_circuits import graph_of as node_graph_of
from test_circuits import nodes_of, partners, saes_of
from test_edge_values import MODELS, labelled, small_of, where
from test_edge_values import graph_of as edge_graph_of
from test_edge_values import plain as without_position
from test_edges import difference, graph_of, named
from test_feature_edges import SITES, oracle_cuts
from test_feature_edges import graph_of as feature_graph_of
from test_feature_edges import named as named_with_features
from test_feature_edges import nodes_of as features_of
from test_sets import pairs_of

import featpatch as fp
from featpatch.circuits.attribution import points_of
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.mediators import mediators_of
from featpatch.circuits.node_graph import NodeGraph
from featpatch.metrics import Measures
from featpatch.model import facts
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

SCORES = ["estimate", "eap_ig_inputs", "eap_ig_activations"]
METRICS: dict[str, Any] = {
    "logit_diff": lambda logits, small: difference(logits, small.correct, small.wrong).sum(),
    "neg_kl": lambda logits, small: (
        -torch.nn.functional.kl_div(
            logits[:, -1].log_softmax(-1),
            small.model(small.clean)[:, -1].detach().log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
    ),
}


def outside(small: Small, to: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from activations in the corrupted and then the clean prompts to ablation values."""
    return {
        "corrupted": lambda x: x[:3],
        "zero": lambda x: torch.zeros_like(x[:3]),
        "mean": lambda x: x.mean((0, 1)).expand_as(x[:3]),
        "mean_by_position": lambda x: x.mean(0).expand_as(x[:3]),
        "resample": lambda x: x[partners(small)],
    }[to]


def groups_of(senders: Any) -> list[list[str]]:
    """The senders by component: the heads of a layer are one, and so are all nodes at one hook point."""
    found: dict[str, list[str]] = {}
    for sender in senders:
        key = sender.removeprefix("rest of ").split(" ")[0] if "." in sender and " " in sender else sender.split(".H")[0]
        found.setdefault(key, []).append(sender)
    return list(found.values())


@pytest.mark.parametrize(("scores", "metric"), [(s, m) for s in SCORES for m in METRICS if (s, m) != ("estimate", "neg_kl")])
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean", "mean_by_position", "resample"])
def test_edges_by_a_loop_over_points(scores: Any, metric: str, to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small, steps = small_hooked(), 3
    graph = EdgeGraph(wrap(small.model), pairs_of(small), to, Measures.of(metric))
    monkeypatch.setattr("featpatch.circuits.edge_graph.ESTIMATED_AT_ONCE", 14)  # two prompts, then one
    both = edge_oracle.outputs(small.model, torch.cat([small.corrupted, small.clean]))
    now, other = {name: x[3:] for name, x in both.items()}, {name: outside(small, to)(x) for name, x in both.items()}
    expected = edge_scores(
        lambda put, pushes: edge_oracle.run(small.model, small.clean, {}, frozenset(), put, pushes)[0],
        edge_oracle.edges_of(small.model), now, other, groups_of(now), scores, steps, lambda x: METRICS[metric](x, small),
    )  # fmt: skip
    wanted = -np.array([expected[named(edge)] for edge in graph.items]) / 3
    np.testing.assert_allclose(graph.estimates(scores, steps), wanted, atol=1e-10)
    assert np.abs(wanted).max() > 1e-3


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("to", ["corrupted", "mean_by_position", "resample"])
def test_edges_of_features_by_a_loop_over_points(scores: Any, to: Any) -> None:
    small, steps = small_hooked(), 2
    saes, nodes = [small.at(site) for site in SITES], features_of(SITES)
    graph, cuts = feature_graph_of(small, saes, nodes, to), oracle_cuts(small, saes, nodes)
    now, there = (feature_edge_oracle.outputs(small.model, prompts, cuts) for prompts in (small.clean, small.corrupted))
    other = {name: outside(small, to)(torch.cat([there[name], x])) for name, x in now.items()}
    expected = edge_scores(
        lambda put, pushes: feature_edge_oracle.run(small.model, small.clean, cuts, {}, frozenset(), put, pushes)[0],
        feature_edge_oracle.edges_of(small.model, cuts), now, other, groups_of(now), scores, steps,
        lambda x: METRICS["logit_diff"](x, small),
    )  # fmt: skip
    wanted = -np.array([expected[named_with_features(edge)] for edge in graph.items]) / 3
    np.testing.assert_allclose(graph.estimates(scores, steps), wanted, atol=1e-10)
    assert len(points_of(scores, steps, graph.components)) == {"eap_ig_activations": 2 * len(groups_of(now))}.get(
        scores, 1 + (scores != "estimate")
    )


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name"), FAMILIES)
@pytest.mark.parametrize("scores", ["eap_ig_inputs", "eap_ig_activations", "relp", "relp_qk", "gim"])
def test_edges_by_weights_are_those_by_a_weight_per_edge(kind: str, name: str, scores: Any) -> None:
    """Both ways agree for shared keys, parallel layers, no MLPs, rotary positions and norms after attention."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = graph_of(model, pairs_of(small))
    points = points_of(scores, 2, graph.components)
    run: Any = ([0, 1, 2], points, torch.ones(len(points), 3), lambda runs: None)
    fast, values = graph.slopes(*run)
    slow, expected = graph._by_edge(*run)
    assert graph._projections is not None
    np.testing.assert_allclose(fast, slow, atol=1e-10 * float(slow.abs().max()))
    np.testing.assert_allclose(values, expected, atol=1e-10)
    assert float(slow.abs().max()) > 1e-4


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("errors", ["in", "out", "nodes"])
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean", "mean_by_position", "resample"])
def test_nodes_by_a_loop_over_points(small: Small, scores: Any, errors: str, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are features (of a transcoder too) at single and all positions, errors, heads and an MLP."""
    graph, steps = node_graph_of(small, to, errors), 3
    monkeypatch.setattr("featpatch.circuits.node_graph.ESTIMATED_AT_ONCE", 14)
    both = torch.cat([small.corrupted, small.clean])
    expected = node_scores(
        small.model, small.clean, both, saes_of(small), list(graph.items), outside(small, to), errors, scores, steps,
        lambda x: METRICS["logit_diff"](x, small),
    )  # fmt: skip
    np.testing.assert_allclose(graph.estimates(scores, steps), -np.array(expected) / 3, atol=1e-10)
    kinds = {node.kind: 0.0 for node in graph.items}
    for node, score in zip(graph.items, expected, strict=True):
        kinds[node.kind] = max(kinds[node.kind], abs(score))
    assert min(kinds.values()) > 1e-6


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("errors", ["out", "nodes"])
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_special_tokens_of_nodes_by_a_loop_over_points(hooked: Small, scores: Any, errors: str, to: str) -> None:
    """Ablation values that are the same in all prompts do not apply to special tokens, where a node has no effect."""
    pairs = fp.Pairs(tuple(replace(pair, special=frozenset({0, 3})) for pair in pairs_of(hooked)))
    lens, nodes = wrap(hooked.model), node_graph_of(hooked, to, errors).items
    graph = NodeGraph(lens, pairs, to, Measures.of("logit_diff"), nodes, dictionaries(lens, saes_of(hooked)), errors)
    words = [1, 2, 4, 5, 6]
    of = {"zero": outside(hooked, "zero"), "mean": lambda x: x[:, words].mean((0, 1)).expand_as(x[:3])}[to]
    expected = node_scores(
        hooked.model, hooked.clean, torch.cat([hooked.corrupted, hooked.clean]), saes_of(hooked), list(nodes), of, errors,
        scores, 2, lambda x: METRICS["logit_diff"](x, hooked), special=[0, 3],
    )  # fmt: skip
    np.testing.assert_allclose(graph.estimates(scores, 2), -np.array(expected) / 3, atol=1e-10)
    assert {score == 0 for node, score in zip(nodes, expected, strict=True) if node.position == 3} == {True}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("to", ["corrupted", "mean"])
def test_edges_at_positions_and_in_front_of_norms(name: str, scores: Any, to: str) -> None:
    """Scores equal slopes measured with hooks, for each edge, region and point."""
    small, steps = small_of(name), 2
    graph = edge_graph_of(small, to, labelled(small), ["name", "start", -1])
    both = edge_oracle.written_by_hooks(small.model, torch.cat([small.corrupted, small.clean]))
    now, other = {s: x[3:].detach() for s, x in both.items()}, {s: outside(small, to)(x).detach() for s, x in both.items()}
    puts: list[dict[str, torch.Tensor]] = [{}]
    if scores == "eap_ig_inputs":
        puts = [{"embed": other["embed"] + k / steps * (now["embed"] - other["embed"])} for k in range(steps)]
    elif scores == "eap_ig_activations":
        puts = [
            {sender: other[sender] + k / steps * (now[sender] - other[sender]) for sender in group}
            for group in groups_of(now)
            for k in range(1, steps + 1)
        ]
    total = torch.zeros(len(graph.items), dtype=torch.float64)
    for put in puts:
        shares = torch.zeros(len(graph.items), dtype=torch.float64, requires_grad=True)
        pushes: dict[tuple[str, str], torch.Tensor] = {}
        for edge, share in zip(graph.items, shares, strict=True):
            sender, receiver = named(without_position(edge))
            change = share * where(small, edge.position)[..., None] * (other[sender] - now[sender])
            pushes[sender, receiver] = pushes.get((sender, receiver), torch.zeros(())) + change
        logits = edge_oracle.run_by_hooks(small.model, small.clean, {}, {}, put, pushes)
        total += torch.autograd.grad(METRICS["logit_diff"](logits, small), shares)[0] / len(puts)
    np.testing.assert_allclose(graph.estimates(scores, steps), -total / 3, atol=1e-10)
    assert float(total.abs().max()) > 1e-3


@pytest.mark.parametrize("scores", SCORES)
def test_nodes_with_the_divergence(hooked: Small, scores: Any) -> None:
    """The gradient of `"neg_kl"` is zero only if the candidates are everything at their hook points."""
    lens, nodes = wrap(hooked.model), tuple(node for node in nodes_of(hooked) if node.kind != "error")
    graph = NodeGraph(lens, pairs_of(hooked), "corrupted", Measures.of("neg_kl"), nodes, dictionaries(lens, saes_of(hooked)))
    expected = node_scores(
        hooked.model, hooked.clean, hooked.corrupted, saes_of(hooked), list(nodes), lambda x: x, "in", scores, 2,
        lambda x: METRICS["neg_kl"](x, hooked),
    )  # fmt: skip
    np.testing.assert_allclose(graph.estimates(scores, 2), -np.array(expected) / 3, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_points_of_features_of_heads(name: str) -> None:
    """Moving all heads of a layer, or all mediators at its hook_z, equals moving hook_z, also before a norm."""
    small, site = small_of(name), "blocks.1.attn.hook_z"
    sae, lens = standard(site, 10, reshape_activations="hook_z"), wrap(small.model)
    mediators = mediators_of([fp.Node(site, "feature", 4, "all", site)], dictionaries(lens, sae))
    graph = EdgeGraph(lens, pairs_of(small), "corrupted", Measures.of("logit_diff"), mediators=mediators)
    points = [point for point in points_of("eap_ig_activations", 2, graph.components) if point.place[0].site == site]
    _, found = graph.slopes([0, 1, 2], points, torch.ones(len(points), 3), lambda runs: None)
    clean, other = (small.model.run_with_cache(prompts)[1][site] for prompts in (small.clean, small.corrupted))
    for point, values in zip(points, found, strict=True):
        moved = other + point.share * (clean - other)
        logits = small.model.run_with_hooks(small.clean, fwd_hooks=[(site, lambda x, hook, moved=moved: moved)])
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong).detach(), atol=1e-10)
    assert [point.share for point in points] == [0.5, 1.0, 0.5, 1.0]


def test_embedding_edges_add_up_to_the_effect_of_the_embedding() -> None:
    """Integrated gradients are complete: the error of the left Riemann sum falls as 1 / steps."""
    small = small_hooked()
    graph = graph_of(small.model, pairs_of(small))
    from_embedding = [n for n, edge in enumerate(graph.items) if named(edge)[0] == "embed"]
    behaviour = graph.whole.mean() - graph.empty.mean()
    left = [abs(graph.estimates("eap_ig_inputs", steps)[from_embedding].sum() / behaviour - 1) for steps in (10, 40)]
    assert left[1] < 0.3 * left[0]
    assert left[1] < 0.05


def test_nodes_of_a_hook_point_add_up_to_the_effect_of_all(small: Small) -> None:
    """The nodes are the features and error of one dictionary; the error of the right Riemann sum falls as 1 / steps."""
    whole = node_graph_of(small, "corrupted", "nodes")
    nodes = next(place for place in whole.components() if place[0].site == SITES[0])
    graph = NodeGraph(whole.lens, whole.pairs, "corrupted", whole.measures, nodes, whole.dictionaries, "nodes")
    effect = graph.values([nodes])[0].mean() - graph.values([[]])[0].mean()
    left = [abs(graph.estimates("eap_ig_activations", steps).sum() / effect - 1) for steps in (10, 40)]
    assert left[1] < 0.3 * left[0]
    assert left[1] < 0.05


def test_overlapping_nodes_lose_nothing_alone(hooked: Small) -> None:
    """A head that two candidates cover stays kept if only one of them is ablated, as in exact scores."""
    nodes = (fp.Node("blocks.0.attn.hook_z", "head", 1, 3), fp.Node("blocks.0.attn.hook_z", "head", 1), fp.head(1, 2))
    graph = NodeGraph(wrap(hooked.model), pairs_of(hooked), "corrupted", Measures.of("logit_diff"), nodes)
    for scores in SCORES:
        found = graph.estimates(scores)  # type: ignore[arg-type]
        assert found[0] == 0
        assert found[1] != 0
    assert graph.alone()[0] == pytest.approx(graph.values([nodes])[0], abs=1e-12)


@pytest.mark.parametrize("over", ["edges", "nodes"])
@pytest.mark.parametrize("several", [False, True])
def test_answers_of_several_tokens(over: str, several: bool) -> None:
    """The gradients of several answers are weighted, at each point, by the probability of each answer there."""
    small, steps = small_hooked(), 2
    answers = ((((9, 2), (11,)) if several else ((9, 2),)), ((3, 4, 5),))
    prompts = tuple(small.clean[0].tolist()), tuple(small.corrupted[0].tolist())
    pair = fp.Pair(*prompts, (), (), correct_sequences=answers[0], wrong_sequences=answers[1])
    nodes = (fp.head(0, 1), fp.head(1, 2), fp.Node("blocks.1.hook_mlp_out", "activation"))

    def graph(pairs: fp.Pairs, metric: str) -> Any:
        lens = wrap(small.model)
        if over == "edges":
            return EdgeGraph(lens, pairs, "corrupted", Measures.of(metric))
        return NodeGraph(lens, pairs, "corrupted", Measures.of(metric), nodes)

    expected, points = 0.0, points_of("eap_ig_inputs", steps, list)
    singles = []
    for answer in (*answers[0], *answers[1]):
        for place, token in enumerate(answer):
            tokens = (pair.clean + answer[:place], pair.corrupted + answer[:place])
            one = graph(fp.Pairs((fp.Pair(*tokens, (token,), (39,)),)), "log_prob")
            singles.append((answer, [one.slopes([0], [point], torch.ones(1, 1), lambda runs: None) for point in points]))
    for number in range(steps):
        log_p = {answer: sum(float(of[number][1]) for a, of in singles if a == answer) for answer, _ in singles}
        total = np.logaddexp.reduce([log_p[answer] for answer in answers[0]])
        for answer, of in singles:
            weight = np.exp(log_p[answer] - total) if answer in answers[0] else -1.0
            expected = expected - weight * of[number][0].numpy() / steps
    found = graph(fp.Pairs((pair,)), "sequence_log_prob_diff").estimates("eap_ig_inputs", steps)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.abs(found).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "estimate", "metric": "neg_kl"}, "use scores='eap_ig_inputs', 'eap_ig_activations' or 'exact'"),
        ({"scores": "estimate", "steps": 4}, "steps=4 with scores='estimate': expected steps only with"),
        ({"steps": 4}, "steps=4 with scores='exact'"),
        ({"scores": "eap_ig_inputs", "steps": 0}, "steps=0: expected an integer, 1 or more"),
        ({"scores": "eap_ig_inputs", "steps": True}, "steps=True: expected an integer"),
        ({"scores": "eap_ig_inputs", "metric": "neg_rank"}, "metric 'neg_rank' has no gradient: expected a differentiable"),
        ({"scores": "eap_ig_inputs", "method": "acdc"}, "leave scores out"),
    ],
)
def test_options_that_are_refused(hooked: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.find_circuit(hooked.model, pairs_of(hooked), progress=False, **options)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_circuits_by_integrated_gradients(make: Any) -> None:
    """`find_circuit` uses integrated gradients over edges and nodes and with `"neg_kl"`, also when found again for other pairs."""
    small = make()
    run: dict[str, Any] = {"size": 5, "progress": False}
    for scores in SCORES[1:]:
        found = fp.find_circuit(small.model, pairs_of(small), scores=scores, steps=2, metric="neg_kl", **run)
        assert (found.metadata["scores"], found.metadata["steps"], len(found)) == (scores, 2, 5)
    assert found.stability(resamples=1)["jaccard"][0] >= 0
    nodes = [fp.head(layer, head) for layer in range(2) for head in range(4)]
    exact = fp.find_circuit(small.model, pairs_of(small), nodes=nodes, **run)
    for scores in SCORES:
        circuit = fp.find_circuit(small.model, pairs_of(small), nodes=nodes, scores=scores, **run)
        assert np.corrcoef(exact.scores, circuit.scores)[0, 1] > 0.6
        assert circuit.metadata["steps"] == (None if scores == "estimate" else 5)


@pytest.mark.parametrize("over", ["edges", "nodes"])
def test_exact_scores_say_their_cost_before_the_start(
    hooked: Small, over: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Patches and passes are announced, and the time left once, after the first part that is not read from the journal."""
    nodes = [fp.head(layer, head) for layer in range(3) for head in range(4)] if over == "nodes" else None
    monkeypatch.setattr("featpatch.circuits.graph.LONG", -1.0)
    run: dict[str, Any] = {"over": over, "nodes": nodes, "size": 3, "journal": tmp_path / "journal"}
    fp.find_circuit(hooked.model, pairs_of(hooked), **run)
    said = capsys.readouterr().err
    count = "262 edges in 3 pairs: at most 786 patches in 13 passes" if over == "edges" else "12 items in 3 pairs"
    assert said.count(count) == 1
    assert ("786/786" if over == "edges" else "12/12") in said
    assert said.count(" left (estimated from the first ") == 1
    assert said.index(count) < said.index(" left (estimated")
    fp.find_circuit(hooked.model, pairs_of(hooked), **run)
    assert " left (estimated" not in capsys.readouterr().err


def doubled(part: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook that doubles what a module returns."""
    return 2 * output


def wrapped(part: torch.nn.Module) -> None:
    """Replace the forward method of one module by one that doubles what it returns."""
    forward = part.forward
    part.forward = lambda *given: 2 * forward(*given)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook on an MLP": lambda model: model.blocks[0].mlp.register_forward_hook(doubled),
    "a hook on the unembedding": lambda model: model.unembed.register_forward_hook(doubled),
    "the epsilon of a norm": lambda model: setattr(model.ln_final, "eps", 10.0),
    "another activation function": lambda model: setattr(model.blocks[0].mlp, "act_fn", torch.tanh),
    "a wrapped unembedding": lambda model: wrapped(model.unembed),
    "weights in place": lambda model: model.blocks[1].attn.W_O.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_after_the_first_call_is_noticed(change: str) -> None:
    """The comparison of weights with the model is kept between calls, but not if the model has changed."""
    small = small_hooked()

    def estimates() -> np.ndarray:
        return EdgeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("logit_diff")).estimates()

    first = estimates()
    np.testing.assert_array_equal(estimates(), first)
    CHANGES[change](small.model)
    changed = estimates()
    facts._known.clear()
    np.testing.assert_allclose(changed, estimates(), atol=1e-12)
    assert np.abs(changed - first).max() > 0.1 * np.abs(first).max()
