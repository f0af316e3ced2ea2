"""Ablation values of edges, and edges at positions, against a pass put together by hooks that imports nothing of ours."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import HOOKED
from edge_oracle import forward_by_hooks, written_by_hooks
from small import Small, small_hooked, standard
from test_circuits import partners
from test_edges import OPTIONS, compare_with_differences, difference, named
from test_sets import pairs_of
from test_several_metrics import long_pairs

import featpatch as fp
from featpatch.circuits.attribution import Point
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.regions import Regions
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap

VALUES = ["corrupted", "zero", "mean", "mean_by_position", "resample"]
MODELS = {"gpt2": lambda: small_hooked().model, "gemma2": HOOKED["gemma2"]}
EVERYWHERE = torch.ones(3, 7, dtype=torch.bool)


def small_of(name: str) -> Small:
    return Small(MODELS[name](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))


def graph_of(small: Small, to: str = "corrupted", pairs: Any = None, positions: Any = "all", **options: Any) -> EdgeGraph:
    pairs = pairs_of(small) if pairs is None else pairs
    regions, read = Regions.of(positions, pairs), Measures.of(options.pop("metric", "logit_diff"))
    graph = EdgeGraph(wrap(small.model), pairs, to, read, regions=regions, **options)
    graph.check()
    return graph


def written(small: Small, to: str, prompts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What each sender writes when ablated; `prompts` are averaged, by default the corrupted and then the clean ones."""
    both = torch.cat([small.corrupted, small.clean]) if prompts is None else prompts
    found = written_by_hooks(small.model, both)
    of = {
        "corrupted": lambda x: x[:3],
        "zero": lambda x: torch.zeros_like(x[:3]),
        "mean": lambda x: x.mean((0, 1)),
        "mean_by_position": lambda x: x.mean(0),
        "resample": lambda x: x[partners(small)],
    }[to]
    return {sender: of(values) for sender, values in found.items()}


def random_choices(graph: EdgeGraph) -> list[Any]:
    generator = np.random.default_rng(0)
    found = [[edge for edge in graph.items if generator.random() < share] for share in (0.1, 0.5, 0.9)]
    return [*found, [], [edge for edge in graph.items if edge != graph.items[40]]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", VALUES)
def test_any_edges(name: str, to: str) -> None:
    """Random choices, none and all but one; all edges are the model, and the estimates are the slope."""
    small = small_of(name)
    graph, other = graph_of(small, to), written(small, to)
    choices = random_choices(graph)
    for kept, values in zip(choices, graph.values(choices), strict=True):
        ablated = {named(edge): EVERYWHERE for edge in set(graph.items) - set(kept)}
        logits = forward_by_hooks(small.model, small.clean, other, ablated)
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
    np.testing.assert_allclose(graph.empty, graph.values([[]])[0], atol=1e-9)
    np.testing.assert_allclose(graph.values([graph.items])[0], graph.whole, atol=1e-9)
    assert np.abs(graph.empty - graph.whole).max() > 1e-2
    compare_with_differences(graph, graph.estimates(), range(0, len(graph.items), 61))


def test_reference_and_special_tokens() -> None:
    """Means over other prompts, without their special tokens, at every position of the edge."""
    small = small_of("gpt2")
    others = torch.randint(10, 40, (4, 9), generator=torch.Generator().manual_seed(8))
    special = fp.Pairs(
        tuple(replace(p, special=frozenset({0})) for p in fp.Pairs.from_tokens(others[:2], others[2:], [3, 5], [4, 6]))
    )
    graph = graph_of(small, "mean", reference=special)
    other = {sender: value[:, 1:].mean((0, 1)) for sender, value in written_by_hooks(small.model, others).items()}
    kept = random_choices(graph)[1]
    ablated = {named(edge): EVERYWHERE for edge in set(graph.items) - set(kept)}
    logits = forward_by_hooks(small.model, small.clean, other, ablated)
    np.testing.assert_allclose(graph.values([kept])[0], difference(logits, small.correct, small.wrong), atol=1e-9)


def test_seeds_of_resampling() -> None:
    small = small_of("gpt2")
    found = {seed: graph_of(small, "resample", seed=seed).ablation.partners for seed in range(4)}  # type: ignore[attr-defined]
    assert len({tuple(partners) for partners in found.values()}) > 1
    for drawn in found.values():
        assert all(prompt != pair.clean and len(prompt) == 7 for prompt, pair in zip(drawn, pairs_of(small), strict=True))


def labelled(small: Small) -> fp.Pairs:
    """A label at another place in each pair, a span, and one token that is neither."""
    labels = [{"name": at, "start": range(2), "end": 6} for at in (3, 4, 5)]
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, labels=labels)


def where(small: Small, region: Any) -> torch.Tensor:
    """The tokens of each region, by hand."""
    at = {"name": [[3], [4], [5]], "start": [[0, 1]] * 3, -1: [[6]] * 3, "elsewhere": [[2, 4, 5], [2, 3, 5], [2, 3, 4]]}[region]
    found = torch.zeros(3, 7, dtype=torch.bool)
    for row, tokens in enumerate(at):
        found[row, tokens] = True
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean"])
def test_any_edges_at_positions(name: str, to: str) -> None:
    """Labels, a span and an index from the end; what is in no region is one more."""
    small = small_of(name)
    graph, other = graph_of(small, to, labelled(small), ["name", "start", -1]), written(small, to)
    assert {edge.position for edge in graph.items} == {"name", "start", -1, "elsewhere"}
    choices = random_choices(graph)
    for kept, values in zip(choices, graph.values(choices), strict=True):
        ablated: dict[Any, torch.Tensor] = {}
        for edge in set(graph.items) - set(kept):
            assert edge.sender.position == edge.receiver.position == edge.position
            ablated[named(plain(edge))] = ablated.get(named(plain(edge)), ~EVERYWHERE) | where(small, edge.position)
        logits = forward_by_hooks(small.model, small.clean, other, ablated)
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
    np.testing.assert_allclose(graph.values([graph.items])[0], graph.whole, atol=1e-9)
    np.testing.assert_allclose(graph.empty, graph.values([[]])[0], atol=1e-9)


def plain(edge: Any) -> fp.Edge:
    """An edge at all positions."""
    return fp.Edge.of(replace(edge.sender, position="all"), replace(edge.receiver, position="all"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", [["name", "start", -1], "each"])
def test_estimates_at_positions(name: str, positions: Any) -> None:
    """The slopes of a weight per edge; and the scores of all regions of an edge add up to that of the whole edge."""
    small = small_of(name)
    pairs = labelled(small)
    graph, whole = graph_of(small, "corrupted", pairs, positions), graph_of(small, "corrupted", pairs)
    assert graph._projections is not None
    found = graph.estimates()
    slow, _ = graph._by_edge([0, 1, 2], [Point()], torch.ones(1, 3), lambda runs: None)
    np.testing.assert_allclose(found, -slow.numpy() / 3, atol=1e-9)
    np.testing.assert_allclose(found.reshape(len(whole.items), -1).sum(1), whole.estimates(), atol=1e-9)
    assert np.abs(found).max() > 1e-3


def test_searches_at_positions(tmp_path: Any) -> None:
    """Every search; a greedy circuit leads to the logits through keys and values of other positions; files come back."""
    small = small_of("gpt2")
    pairs = labelled(small)
    run: dict[str, Any] = {"positions": ["name", "end"], **OPTIONS}
    circuit = fp.find_circuit(small.model, pairs, method="greedy", scores="estimate", size=60, **run)
    assert len(circuit) == 60
    assert circuit.metadata["positions"] == ["name", "end"]
    graph = circuit.to_networkx()
    crossing = [(s.position, t.position) for s, t, key in graph.edges(keys=True) if key in ("k", "v")]
    assert ("name", "end") in crossing
    assert all(s.position == t.position for s, t, key in graph.edges(keys=True) if key in ("", "q"))
    assert 0 <= circuit.stability(resamples=1)["jaccard"][0] <= 1
    assert {"removed", "circuit"} <= set(circuit.completeness(subsets=2).columns)
    again = fp.load_circuit(circuit.save(tmp_path / "c.json"), small.model, pairs)
    assert (again.items, again.graph.items, again.faithfulness) == (circuit.items, circuit.graph.items, circuit.faithfulness)
    assert again.again(pairs).items == circuit.items
    with pytest.raises(fp.FeatpatchError, match="form='eap_ig' with .*at all positions together"):
        circuit.save(tmp_path / "e.json", form="eap_ig")


@pytest.mark.parametrize("to", ["zero", "mean", "resample"])
def test_files_keep_ablation_values(tmp_path: Any, to: str) -> None:
    """The seed comes back; other prompts must be given again."""
    small = small_of("gpt2")
    options: dict[str, Any] = {"resample": {"seed": 5}, "mean": {"reference": pairs_of(small, [1, 2])}, "zero": {}}[to]
    circuit = fp.find_circuit(small.model, pairs_of(small), to=to, scores="estimate", size=20, **options, **OPTIONS)
    path = circuit.save(tmp_path / "c.json")
    if "reference" in options:
        with pytest.raises(fp.FeatpatchError, match="come from other prompts, which the file does not hold"):
            fp.load_circuit(path, small.model, pairs_of(small))
    again = fp.load_circuit(path, small.model, pairs_of(small), **({} if to == "resample" else options))
    assert again.faithfulness == circuit.faithfulness
    assert again.again(pairs_of(small)).items == circuit.items
    assert circuit.stability(resamples=1).shape[0] == 1


@pytest.mark.parametrize("to", ["zero", "mean", "resample"])
def test_whole_answers(to: str) -> None:
    """Answers that follow the prompt are ablated too, and are elsewhere: each reading against a pass of its own."""
    small = small_of("gpt2")
    pairs = fp.Pairs(tuple(replace(pair, labels={"end": 6}) for pair in long_pairs(small)))
    graph = graph_of(small, to, pairs, ["end", 0], metric="sequence_log_prob")
    kept = random_choices(graph)[1]
    np.testing.assert_allclose(graph.values([graph.items])[0], graph.whole, atol=1e-9)
    np.testing.assert_allclose(graph.values([[]])[0], graph.empty, atol=1e-9)
    model, runs = small.model, torch.zeros(len(graph.runs), dtype=torch.float64)
    both = torch.cat([small.corrupted, small.clean])
    for number, (index, reading) in enumerate(graph.readings):
        behind = torch.tensor(reading.clean[len(small.clean[index]) :], dtype=torch.long)
        tokens = torch.cat([small.clean[index], behind])[None]
        if to == "resample":
            other = written_by_hooks(model, torch.cat([both[partners(small)[index]], behind])[None])
        else:
            other = written(small, to)
            other = {s: (0 * x[0, 0] if to == "zero" else x) for s, x in other.items()}
        at = {"end": [6], 0: [0], "elsewhere": [*range(1, 6), *range(7, tokens.shape[1])]}
        ablated: dict[Any, torch.Tensor] = {}
        for edge in set(graph.items) - set(kept):
            mask = ablated.setdefault(named(plain(edge)), torch.zeros(tokens.shape, dtype=torch.bool))
            mask[:, at[edge.position]] = True
        logits = forward_by_hooks(model, tokens, other, ablated)[0, -1]
        runs[number] = logits.log_softmax(-1)[reading.correct[0]]
    np.testing.assert_allclose(graph.values([kept])[0], graph.combined(runs).numpy(), atol=1e-9)


@pytest.mark.parametrize("to", ["zero", "mean", "mean_by_position"])
def test_mediators_keep_laws(to: str) -> None:
    """With features, an error and the rest: all edges ablated leave what the last senders' ablation values add up to."""
    small = small_hooked()
    site = "blocks.2.hook_resid_post"
    nodes = [
        fp.Node(site, "feature", 3, 3, site),
        fp.Node(site, "feature", 5, "all", site),
        fp.Node(site, "error", None, "all", site),
    ]
    options: dict[str, Any] = {"saes": small.at(site), "nodes": nodes, "over": "edges", "scores": "estimate", "errors": "nodes"}
    circuit = fp.find_circuit(small.model, pairs_of(small), to=to, size=9, progress=False, **options)
    graph = circuit.graph
    np.testing.assert_allclose(graph.values([graph.items])[0], graph.whole, atol=1e-9)
    with torch.no_grad():
        final = small.model.run_with_cache(torch.cat([small.corrupted, small.clean]))[1][site]
        of = {
            "zero": lambda x: 0 * x[0],
            "mean": lambda x: x.mean((0, 1)).expand_as(x[0]),
            "mean_by_position": lambda x: x.mean(0),
        }[to]
        logits = small.model.unembed(small.model.ln_final(of(final).expand(3, 7, -1)))
        np.testing.assert_allclose(graph.empty, difference(logits, small.correct, small.wrong), atol=1e-9)
        sae, clean = small.at(site), final[3:]
        features = sae.encode(final)
        moved = (features[3:] - of(features))[..., None] * sae.W_dec
        lost = [moved[:, :, 3] * (torch.arange(7) == 3)[:, None], moved[:, :, 5]]
        lost.append(clean - sae.decode(features[3:]) - of(final - sae.decode(features)))
        for node, change in zip(nodes, lost, strict=True):
            out = fp.Edge.of(node, fp.LOGITS)
            logits = small.model.unembed(small.model.ln_final(clean - change))
            found = graph.values([[edge for edge in graph.items if edge != out]])[0]
            np.testing.assert_allclose(found, difference(logits, small.correct, small.wrong), atol=1e-9)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_nodes_keep_the_state_of_the_patched_run(norm: str) -> None:
    """What a dictionary needs to decode is that of the run in which a head below is ablated, as in `fp.ablate`."""
    small, site = small_of("gpt2"), "blocks.1.hook_resid_pre"
    sae = standard(site, 3, normalize_activations=norm)
    head = fp.Node("blocks.0.attn.hook_z", "head", 1)
    nodes = [head, fp.Node(site, "feature", 4, "all", site)]
    options: dict[str, Any] = {"saes": sae, "nodes": nodes, "to": "zero", "errors": "out", "progress": False}
    graph = fp.find_circuit(small.model, pairs_of(small), **options).graph

    def only_state(x: torch.Tensor, hook: Any) -> Any:
        return sae.decode(torch.zeros_like(sae.encode(x)))

    with torch.no_grad():
        hooks: list[Any] = [(head.site, lambda x, hook: torch.zeros_like(x)), (site, only_state)]
        logits = small.model.run_with_hooks(small.clean, fwd_hooks=hooks)
    np.testing.assert_allclose(graph.empty, difference(logits, small.correct, small.wrong), atol=1e-9)


def test_prompts_without_a_counterfactual() -> None:
    """Means over the prompts themselves."""
    small = small_of("gpt2")
    pairs = fp.Pairs(tuple(fp.Pair(*[tuple(tokens.tolist())] * 2, (3,), (4,)) for tokens in small.clean))
    graph = graph_of(small, "mean", pairs)
    other = written(small, "mean", small.clean)
    kept = random_choices(graph)[1]
    ablated = {named(edge): EVERYWHERE for edge in set(graph.items) - set(kept)}
    logits = forward_by_hooks(small.model, small.clean, other, ablated)[:, -1]
    np.testing.assert_allclose(graph.values([kept])[0], (logits[:, 3] - logits[:, 4]).numpy(), atol=1e-9)


def test_special_tokens_of_nodes() -> None:
    """With values that are the same in all prompts special tokens keep theirs, as in `fp.ablate`."""
    small = small_of("gpt2")
    pairs = fp.Pairs(tuple(replace(pair, special=frozenset({0})) for pair in pairs_of(small)))
    sae, site = standard("blocks.1.hook_resid_pre", 1), "blocks.1.hook_resid_pre"
    node = fp.Node("blocks.0.attn.hook_z", "head", 1)
    circuit = fp.find_circuit(small.model, pairs, nodes=[node], to="zero", **OPTIONS | {"over": "nodes"})

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, 1:] = 0
        return x

    with torch.no_grad():
        logits = small.model.run_with_hooks(small.clean, fwd_hooks=[(node.site, zero)])
    np.testing.assert_allclose(circuit.graph.empty, difference(logits, small.correct, small.wrong), atol=1e-9)
    single = fp.Node(site, "feature", 4, "all", site)
    of_sae = fp.find_circuit(
        small.model, pairs, saes=sae, nodes=[single], to="zero", errors="out", **OPTIONS | {"over": "nodes"}
    )
    with torch.no_grad():
        hook = [(site, lambda x, hook: torch.cat([x[:, :1], sae.b_dec.expand_as(x[:, 1:])], 1))]
        logits = small.model.run_with_hooks(small.clean, fwd_hooks=hook)
    np.testing.assert_allclose(of_sae.graph.empty, difference(logits, small.correct, small.wrong), atol=1e-9)


def test_refused_positions() -> None:
    small = small_of("gpt2")
    pairs = labelled(small)
    unequal = fp.Pairs((*pairs_of(small, [0]), *fp.Pairs.from_tokens(small.clean[1:2, :6], small.corrupted[1:2, :6], [5], [6])))
    site = "blocks.0.hook_resid_pre"
    for changed, message in (
        ({"positions": ["name", 3]}, "overlap in pair 0"),
        ({"positions": ["other"]}, "no label 'other'"),
        ({"positions": []}, "positions is empty"),
        ({"positions": "every"}, "positions='every'"),
        ({"positions": [True]}, "position True is a bool: expected a label or an index"),
        ({"positions": "each", "pairs": unequal}, "positions='each' with pair 1 of 6 tokens and pair 0 of 7"),
        ({"positions": ["elsewhere"], "pairs": renamed(pairs)}, "'elsewhere' is the name of the region"),
        (
            {"positions": ["name"], "nodes": [fp.Node(site, "feature", 3)], "saes": standard(site, 0)},
            "positions=.*with nodes.*fp.feature\\(sae, 7, pos",
        ),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.find_circuit(small.model, **{"pairs": pairs, **OPTIONS, **changed})


def renamed(pairs: fp.Pairs) -> fp.Pairs:
    return fp.Pairs(tuple(replace(pair, labels={"elsewhere": 2}) for pair in pairs))


def test_exact_scores_of_a_region() -> None:
    """One edge at one place, by itself."""
    small = small_of("gpt2")
    one = Small(small.model, [], small.clean[:1], small.corrupted[:1], small.correct[:1], small.wrong[:1])
    graph = graph_of(one, "corrupted", labelled(small)[:1], ["name"])
    other, found = written_by_hooks(small.model, one.corrupted), graph.alone()
    for number in range(5, len(graph.items), 37):
        edge: Any = graph.items[number]
        here = torch.arange(7)[None] == 3
        mask = here if edge.position == "name" else ~here
        logits = forward_by_hooks(small.model, one.clean, other, {named(plain(edge)): mask})
        np.testing.assert_allclose(found[number], difference(logits, one.correct, one.wrong), atol=1e-9)
    assert np.abs(found - graph.whole).max() > 1e-3
