"""Edges between single features against a forward pass in plain torch, and on a circuit set by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from circuits_by_hand import two_hop
from feature_edge_oracle import edges_of, forward_with_feature_edges
from sae_lens import StandardSAE, StandardSAEConfig
from small import Small, randomised, small_bridge, small_hooked, standard
from small import at as metadata_at
from test_circuits import partners
from test_edges import OPTIONS, by_hand, compare_with_differences, difference, short
from test_sets import pairs_of
from test_several_metrics import long_pairs

import featpatch as fp
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.mediators import mediators_of
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

TRANSCODER = "blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out"
SITES = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]


def feature(site: str, index: int, position: Any = "all", sae: str = "") -> fp.Node:
    return fp.Node(site, "feature", index, position, sae or site)


def nodes_of(names: list[str]) -> list[fp.Node]:
    """Some features of each dictionary, at all and at single positions, and every other one's error."""
    nodes = [feature(name.rsplit(" ", 1)[-1], n, position, name) for name in names for n, position in ((2, "all"), (5, 3), (5, 6), (9, "all"))]  # fmt: skip
    return nodes + [fp.Node(name.rsplit(" ", 1)[-1], "error", None, "all", name) for name in names[::2]]


def graph_of(small: Small, saes: list[Any], nodes: list[fp.Node], to: str = "corrupted") -> EdgeGraph:
    lens = wrap(small.model)
    graph = EdgeGraph(
        lens, pairs_of(small), to, Measures.of("logit_diff"), mediators=mediators_of(nodes, dictionaries(lens, saes))
    )
    graph.check()
    return graph


def oracle_cuts(small: Small, saes: list[Any], nodes: list[fp.Node]) -> list[Any]:
    """As the oracle wants them, with each node's own name."""
    found = []
    for sae in saes:
        reads, writes = oracle.hooks(sae)
        own = []
        for node in (node for node in nodes if node.sae == (reads if reads == writes else f"{reads} -> {writes}")):
            here = torch.zeros(3, 7, dtype=torch.bool)
            here[:, slice(None) if node.position == "all" else node.position] = True
            own.append((str(node), "error" if node.index is None else node.index, here))
        found.append((reads, writes, sae, own))
    return found


def named(edge: Any) -> tuple[str, str]:
    """As the oracle names it."""
    return tuple(
        f"rest of {n.site}" if n.kind == "rest" else str(n) if n.sae else short(n) for n in (edge.sender, edge.receiver)
    )  # type: ignore[return-value]


@pytest.mark.parametrize(
    "places", [SITES, ["blocks.1.hook_resid_mid", TRANSCODER], ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"]]
)
def test_any_edges_of_features(places: list[str]) -> None:
    """Random halves, single ones, all and none, together in one call."""
    small = small_hooked()
    saes = [small.saes[-1] if place == TRANSCODER else small.at(place) for place in places]
    nodes = nodes_of(places)
    graph, own = graph_of(small, saes, nodes), oracle_cuts(small, saes, nodes)
    assert {named(edge) for edge in graph.items} == set(edges_of(small.model, own))
    generator = np.random.default_rng(0)
    choices = [[e for e in graph.items if generator.random() < share] for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
    choices += [[], list(graph.items)]
    choices += [[e for e in graph.items if e != one] for one in graph.items if one.receiver.sae][::37]
    found = graph.values(choices)
    for kept, values in zip(choices, found, strict=True):
        ablated = {named(edge) for edge in graph.items} - {named(edge) for edge in kept}
        logits = forward_with_feature_edges(small.model, small.clean, small.corrupted, ablated, own)
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
    assert len(np.unique(found.round(7), axis=0)) > len(choices) / 2


@pytest.mark.parametrize("last", [6, -1])
def test_mediators_with_whole_answers(last: int) -> None:
    """A position is one of the prompt, not of the answer that follows: each reading against a pass of its own."""
    small, site = small_hooked(), "blocks.1.hook_resid_mid"
    lens, sae = wrap(small.model), small.at(site)
    nodes = [fp.Node(site, "feature", 3, last, site), fp.Node(site, "error", None, last, site)]
    mediators = mediators_of(nodes, dictionaries(lens, [sae]))
    graph = EdgeGraph(lens, long_pairs(small), "corrupted", Measures.of("sequence_log_prob"), mediators=mediators)
    graph.check()
    generator = np.random.default_rng(0)
    kept = [edge for edge in graph.items if generator.random() < 0.5]
    ablated = {named(edge) for edge in graph.items} - {named(edge) for edge in kept}
    values = torch.zeros(len(graph.runs), dtype=torch.float64)
    for number, (index, reading) in enumerate(graph.readings):
        behind = torch.tensor(reading.clean[len(small.clean[index]) :], dtype=torch.long)
        clean, corrupted = (torch.cat([tokens[index], behind])[None] for tokens in (small.clean, small.corrupted))
        here = torch.zeros(clean.shape, dtype=torch.bool)
        here[:, 6] = True
        own = [(site, site, sae, [(str(node), "error" if node.index is None else node.index, here) for node in nodes])]
        logits = forward_with_feature_edges(small.model, clean, corrupted, ablated, own)[0, -1]
        values[number] = logits.log_softmax(-1)[reading.correct[0]]
    np.testing.assert_allclose(graph.values([kept])[0], graph.combined(values).numpy(), atol=1e-9)


def coordinates(model: Any, site: str, which: list[int]) -> StandardSAE:
    """A dictionary of some coordinates of the stream, each positive."""
    width = model.cfg.d_model
    sae = StandardSAE(StandardSAEConfig(width, len(which), "float64", apply_b_dec_to_input=False, metadata=metadata_at(site)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[which, range(len(which))] = 1.0
        sae.W_dec[range(len(which)), which] = 1.0
    return sae


@pytest.mark.extended
@pytest.mark.parametrize("method", ["threshold", "acdc"])
def test_two_hops_by_hand(method: str) -> None:
    """From the embedding to single bridges, from the head to single answers; no edge of any other feature or the rest."""
    found = two_hop()
    first, last = "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"
    with torch.no_grad():
        cache = found.model.run_with_cache(torch.cat([found.clean, found.corrupted]))[1]
    written = {site: (cache[site].abs().amax((0, 1)) > 0).nonzero()[:, 0].tolist() for site in (first, last)}
    saes = [coordinates(found.model, site, written[site]) for site in (first, last)]
    nodes = [feature(site, n) for site in (first, last) for n in range(len(written[site]))]
    circuit = fp.find_circuit(
        found.model,
        by_hand(found)[:3],
        saes=saes,
        nodes=nodes,
        method=method,
        **({"target": 1.0} if method == "greedy" else {}),
        **OPTIONS,
    )
    assert circuit.faithfulness == pytest.approx(1.0)
    bridges, answers = ([n for n in nodes if n.site == site and coordinate(found, n, written) in wanted] for site, wanted in (
        (first, read_by_head(found.model)), (last, read_by_logits(found.model))))  # fmt: skip
    assert len(bridges) == len(answers) == 4
    assert len(nodes) > 8
    edges = {(short(e.sender) if not e.sender.sae else e.sender, short(e.receiver) if not e.receiver.sae else e.receiver) for e in circuit.items}  # fmt: skip
    true = {("embed", b) for b in bridges} | {(b, "L1.H1.v") for b in bridges}
    true |= {("L1.H1", a) for a in answers} | {(a, "logits") for a in answers}
    assert edges == true


def coordinate(found: Any, node: fp.Node, written: dict[str, list[int]]) -> int:
    return written[node.site][int(node.index or 0)]


def read_by_head(model: Any) -> set[int]:
    return set(model.blocks[1].attn.W_V[1].abs().sum(1).nonzero()[:, 0].tolist())


def read_by_logits(model: Any) -> set[int]:
    return set(model.W_U.abs().sum(1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_estimates_of_feature_edges_are_the_gradient(make: Any) -> None:
    """Against finite differences of the differentiable run."""
    small = make()
    graph = graph_of(small, [small.at(site) for site in SITES], nodes_of(SITES))
    estimates = graph.estimates()
    into = [n for n, e in enumerate(graph.items) if e.receiver.sae or e.sender.sae]
    compare_with_differences(graph, estimates, into[::31])
    assert np.abs(estimates[into]).max() > 1e-3


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("to", ["corrupted", "resample"])
def test_scaled_dictionaries(norm: str, to: str) -> None:
    """All edges are the model; one feature's edges from below ablated is its value as of there, in the scale of its own input."""
    small = small_hooked()
    site = "blocks.1.hook_attn_out"
    sae = standard(site, 3, normalize_activations=norm)
    node = feature(site, 4)
    graph = graph_of(small, [sae], [node], to)
    rest = [item for item in graph.items if item.receiver != node]
    for refused in ("zero", "mean"):
        with pytest.raises(fp.FeatpatchError, match="scales features by the size of the activation at each"):
            graph_of(small, [sae], [node], refused)
    found = graph.values([graph.items, rest])
    np.testing.assert_allclose(found[0], graph.whole, atol=1e-9)
    with torch.no_grad():
        below = small.model.run_with_cache(torch.cat([small.corrupted, small.clean]))[1][site]
        below = {"corrupted": below[:3], "resample": below[partners(small)]}[to]

        def share(x: torch.Tensor) -> torch.Tensor:
            features = sae.encode(x)
            one = sae.decode(features)
            features[..., 4] = 0
            sae.encode(x)
            return one - sae.decode(features)

        keep = torch.ones(7, 1, dtype=torch.bool)
        hook = [(site, lambda x, hook: torch.where(keep, x - share(x) + share(below), x))]
        logits = small.model.run_with_hooks(small.clean, fwd_hooks=hook)[:, -1]
    rows = torch.arange(3)
    np.testing.assert_allclose(found[1], logits[rows, small.correct] - logits[rows, small.wrong], atol=1e-9)
    assert np.abs(found[1] - found[0]).max() > 1e-4


@pytest.mark.parametrize(("reads", "writes"), [("attn.hook_q", ""), ("hook_resid_mid", "hook_resid_post")])
def test_hook_points_that_are_no_place_of_mediators(reads: str, writes: str) -> None:
    """Those of a query, and two places of the residual stream."""
    small, hook = small_hooked(), f"blocks.1.{reads}"
    sae: Any = standard(hook, 3)
    if writes:
        own = SimpleNamespace(encode=sae.encode, decode=sae.decode)
        sae = fp.dictionaries.adapt(own, hook, hook_out=f"blocks.1.{writes}", d_in=16, linear=True)
    (dictionary,) = dictionaries(wrap(small.model), sae)
    node = dictionary.node(2, "all")
    with pytest.raises(fp.FeatpatchError, match="expected, for edges, a dictionary of the residual stream"):
        fp.find_circuit(small.model, pairs_of(small), saes=sae, nodes=[node], **OPTIONS)


@pytest.mark.parametrize("scores", ["estimate", "eap_ig_inputs"])
def test_a_dictionary_of_your_own_has_the_estimates_of_the_sae_that_it_wraps(scores: Any) -> None:
    """torch differentiates it too; where it can't, an error says so."""
    small, site = small_hooked(), "blocks.1.hook_resid_pre"
    sae = small.at(site)
    own = SimpleNamespace(encode=sae.encode, decode=sae.decode)
    nodes = [feature(site, n) for n in (3, 5, 8)]
    both = [
        fp.find_circuit(small.model, pairs_of(small), saes=each, nodes=nodes, scores=scores, **OPTIONS)
        for each in (sae, fp.dictionaries.adapt(own, site, d_in=16, linear=True))
    ]
    np.testing.assert_allclose(both[1].scores, both[0].scores, atol=1e-10)
    assert np.abs(both[0].scores).max() > 1e-3
    cut_off = SimpleNamespace(encode=lambda x: sae.encode(x).detach(), decode=sae.decode)
    with pytest.raises(fp.FeatpatchError, match="has an encoder without a gradient: expected"):
        fp.find_circuit(
            small.model, pairs_of(small), saes=fp.dictionaries.adapt(cut_off, site, d_in=16, linear=True), nodes=nodes,
            scores=scores, **OPTIONS,
        )  # fmt: skip


def test_bad_cuts() -> None:
    small = small_hooked()
    site = "blocks.1.hook_resid_pre"
    twice = [small.at(site), randomised(standard(site, 40), 41)]
    for saes, nodes, message in (
        (small.at(site), [feature(site, 3), feature(site, 3, 3)], "overlap: expected each feature"),
        (twice, [feature(site, 3), feature(site, 3, "all", f"{site}#2")], "at the same place"),
        (small.at(site), [fp.Node("blocks.0.hook_mlp_out", "activation")], "need not be named"),
        (small.at(site), None, "saes without nodes: expected candidates"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=nodes, **OPTIONS)


def test_features_of_a_table_as_edges() -> None:
    """Candidates from a ranking; a graph that leads to the logits; found again for other pairs."""
    small = small_hooked()
    saes = [small.at(site) for site in SITES[2:]]
    effects = fp.rank_features(small.model, saes, pairs_of(small), progress=False)
    top = [node for node in effects.nodes if node.kind == "feature"][:6]
    circuit = fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=top, scores="estimate", size=40, **OPTIONS)
    assert circuit.metadata["saes"].keys() == {node.sae for node in top}
    named = {node for node in circuit.to_networkx() if node.kind == "feature"}
    assert named <= set(top)
    assert any(node.kind == "rest" for node in circuit.to_networkx())
    assert 0 <= circuit.stability(resamples=1)["jaccard"][0] <= 1
