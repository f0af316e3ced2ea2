"""Edges of models with a norm after attention, against hooks of TransformerLens that put every receiver's input together."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, HOOKED, OTHERS
from edge_oracle import forward_by_hooks, written_by_hooks
from small import Small, small_hooked, standard
from test_edges import OPTIONS, compare_with_differences, difference, graph_of, named
from test_sets import pairs_of

import featpatch as fp
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.graph import Graph
from featpatch.circuits.mediators import mediators_of
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

pytestmark = pytest.mark.usefixtures("wide")
EVERYWHERE = torch.ones(3, 7, dtype=torch.bool)
NORMED = {"hooked gemma2": HOOKED["gemma2"], "gemma2": BRIDGES["gemma2"], "gemma3": BRIDGES["gemma3"], "olmo2": OTHERS["olmo2"]}


def small_of(name: str) -> Small:
    return Small(NORMED[name](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))


@pytest.mark.parametrize("make", [HOOKED["gemma2"], HOOKED["llama"], HOOKED["neox"]])
def test_any_edges_against_hooks(make: Any) -> None:
    """Random choices; the norm is applied to the heads that each receiver sees."""
    small = Small(make(), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph, other = graph_of(small.model, pairs_of(small)), written_by_hooks(small.model, small.corrupted)
    generator = np.random.default_rng(0)
    choices = [[edge for edge in graph.items if generator.random() < share] for share in (0.3, 0.7, 0.95)]
    for kept, values in zip(choices, graph.values(choices), strict=True):
        ablated = {named(edge): EVERYWHERE for edge in set(graph.items) - set(kept)}
        logits = forward_by_hooks(small.model, small.clean, other, ablated)
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
        assert np.abs(values - graph.whole).max() > 1e-3


@pytest.mark.parametrize("name", NORMED)
def test_all_edges_none_and_those_of_a_head(name: str) -> None:
    """All edges are the model, none is the corrupted run, and the edges of a head together are the head."""
    small = small_of(name)
    graph, model = graph_of(small.model, pairs_of(small)), small.model
    site, head = "blocks.1.attn.hook_z", 2
    found = graph.values([graph.items, [], [e for e in graph.items if e.sender != fp.Node(site, "head", head)]])
    with torch.no_grad():
        z = model.run_with_cache(small.corrupted)[1][site]

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[:, :, head] = z[:, :, head]
            return x

        runs = model(small.clean), model(small.corrupted), model.run_with_hooks(small.clean, fwd_hooks=[(site, put)])
    for values, logits in zip(found, runs, strict=True):
        np.testing.assert_allclose(values, difference(logits, small.correct, small.wrong), atol=1e-9)
    assert np.abs(found[2] - found[0]).max() > 1e-4


@pytest.mark.parametrize("name", NORMED)
def test_estimates_and_single_edges(name: str) -> None:
    """Estimates by weights are the slopes of a run with a weight per edge; single edges are those of whole passes."""
    small = small_of(name)
    graph = graph_of(small.model, pairs_of(small))
    estimates = graph.estimates()
    assert (graph._projections is None) == (name == "olmo2")
    compare_with_differences(graph, estimates, range(0, len(graph.items), 61))
    one = graph_of(small.model, pairs_of(small, [0]))
    np.testing.assert_allclose(one.alone(), Graph.alone(one), atol=1e-9)
    assert np.abs(estimates).max() > 1e-3


def test_a_circuit_of_gemma_from_prompts_to_figure() -> None:
    small = small_of("hooked gemma2")
    circuit = fp.find_circuit(small.model, pairs_of(small), scores="estimate", size=30, **OPTIONS)
    assert len(circuit.to_networkx()) > 2
    with pytest.raises(fp.FeatpatchError, match="the heads of layer 0 go through a norm together"):
        fp.scrub(small.model, pairs_of(small), fp.Hypothesis({fp.LOGITS: {}}), progress=False)


Z = "blocks.1.attn.hook_z"
FEATURE = fp.Node(Z, "feature", 4, "all", Z)
BY_HOOKS = {"small": small_hooked, "gemma2": lambda: small_of("hooked gemma2")}


@pytest.mark.parametrize("name", BY_HOOKS)
@pytest.mark.parametrize("to", ["corrupted", "zero", "mean"])
def test_a_feature_of_heads_is_a_mediator(name: str, to: str) -> None:
    """Edges into and out of a feature of hook_z, by hooks: it is written through W_O, in front of the norm after attention."""
    small = BY_HOOKS[name]()
    model, sae, lens = small.model, standard(Z, 10, reshape_activations="hook_z"), wrap(small.model)
    mediators = mediators_of([FEATURE], dictionaries(lens, sae))
    graph = EdgeGraph(lens, pairs_of(small), to, Measures.of("logit_diff"), mediators=mediators)
    graph.check()
    head = fp.Node(Z, "head", 2)
    single = fp.Edge.of(head, FEATURE)
    receiver = fp.Node("blocks.2.hook_mlp_out", "activation")
    own = fp.Edge.of(FEATURE, receiver)
    choices = [
        graph.items,
        [e for e in graph.items if e.receiver != FEATURE],
        [e for e in graph.items if e != single],
        [e for e in graph.items if e.sender != FEATURE],
        [e for e in graph.items if e != own],
    ]
    found = graph.values(choices)
    with torch.no_grad():
        other = model.run_with_cache(torch.cat([small.corrupted, small.clean] if to == "mean" else [small.corrupted]))[1][Z]
        other = {"corrupted": other, "zero": 0 * other, "mean": other.mean((0, 1)).expand(small.clean.shape + other.shape[2:])}[
            to
        ]

        def value(z: torch.Tensor) -> torch.Tensor:
            return sae.encode(z)[..., 4]

        def share(value: torch.Tensor) -> torch.Tensor:
            return (value[..., None] * sae.W_dec[4]).unflatten(-1, other.shape[2:])

        both = model.run_with_cache(torch.cat([small.clean, small.corrupted]))[1][Z]
        when_ablated = {
            "corrupted": lambda: value(other),
            "zero": lambda: torch.zeros(small.clean.shape, dtype=torch.float64),
            "mean": lambda: value(both).mean().expand(small.clean.shape),
        }[to]()

        def with_one(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, 2] = other[:, :, 2]
            return z

        def at_z(new: Any) -> Any:
            return lambda x, hook: x - share(value(x)) + share(new(x))

        def differences(hooks: Any) -> Any:
            return difference(model.run_with_hooks(small.clean, fwd_hooks=hooks), small.correct, small.wrong)

        np.testing.assert_allclose(found[0], differences([]), atol=1e-9)
        np.testing.assert_allclose(found[1], differences([(Z, at_z(lambda x: value(torch.zeros_like(x) + other)))]), atol=1e-9)
        np.testing.assert_allclose(found[2], differences([(Z, at_z(lambda x: value(with_one(x))))]), atol=1e-9)
        np.testing.assert_allclose(found[3], differences([(Z, at_z(lambda x: when_ablated))]), atol=1e-9)
        clean = model.run_with_cache(small.clean)[1]
        weights, bias = model.blocks[1].attn.W_O, model.blocks[1].attn.b_O
        raw = torch.einsum("bphd,hdm->bpm", clean[Z], weights) + bias
        moved = raw + torch.einsum("bphd,hdm->bpm", share(when_ablated) - share(value(clean[Z])), weights)
        norm = getattr(model.blocks[1], "ln1_post", lambda x: x)
        change = norm(moved) - norm(raw)
        model.set_use_hook_mlp_in(True)
        expected = differences([("blocks.2.hook_mlp_in", lambda x, hook: x + change)])
    np.testing.assert_allclose(found[4], expected, atol=1e-9)
    assert len(np.unique(found.round(6), axis=0)) >= len(found) - 1  # all edges into the feature may be all out of it
    estimates = graph.estimates()
    compare_with_differences(graph, estimates, [graph.items.index(edge) for edge in (single, own)])


def test_features_of_heads_whose_weights_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    small = small_hooked()
    monkeypatch.setattr(type(wrap(small.model)), "output_weight", lambda self, layer: None)
    with pytest.raises(fp.FeatpatchError, match="W_O of that layer can't be read"):
        fp.find_circuit(small.model, pairs_of(small), saes=small.at(Z), nodes=[FEATURE], **OPTIONS)
