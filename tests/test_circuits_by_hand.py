"""The circuits of `circuits_by_hand` are what they say, and the oracle for edges is TransformerLens' forward pass."""

from collections.abc import Iterable
from itertools import product
from random import Random

import pytest
import torch
from circuits_by_hand import ByHand, Edge, gates, induction, two_hop
from edge_oracle import edges_of, forward_with_edges, outputs
from small import Small, small_hooked
from torch import Tensor

BUILT = {
    "induction, value": induction("value"),
    "induction, key": induction("key"),
    "and": gates("and"),
    "or": gates("or"),
    "two hops": two_hop(),
}
GAP = {name: 1.0 if name in ("and", "or") else 2.0 for name in BUILT}
BRANCHES = [{("embed", f"L0.H{head}.v"), (f"L0.H{head}", "L1.MLP")} for head in (0, 1)]

DISTRACTORS = {
    "induction, value": {"L0.H0", "L0.H1", "L0.H3", "L1.H0", "L1.H1", "L1.H3"},
    "induction, key": {"L0.H2", "L0.H3", "L1.H0", "L1.H1", "L1.H3"},
    "and": {"L0.H2", "L0.MLP", "L1.H0", "L1.H1"},
    "or": {"L0.H2", "L0.MLP", "L1.H0", "L1.H1"},
    "two hops": {"L0.H0", "L0.H2", "L1.H3", "L1.MLP", "L2.H0", "L2.H2"},
}
"""Off the circuit, but not the same in both runs."""

every = pytest.mark.parametrize("name", BUILT)


def metric(built: ByHand, logits: Tensor) -> Tensor:
    pairs = torch.arange(len(logits))
    return logits[pairs, -1, built.correct] - logits[pairs, -1, built.wrong]


def ablating(built: ByHand, edges: Iterable[Edge]) -> Tensor:
    """The logit differences of the pairs."""
    return metric(built, forward_with_edges(built.model, built.clean, built.corrupted, set(edges)))


def false_edges(built: ByHand) -> list[Edge]:
    return [edge for edge in edges_of(built.model) if edge not in built.edges]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    return one.shape == other.shape and bool(((one - other).abs() < tolerance).all())


@every
def test_pairs(name: str) -> None:
    """One difference or two flags in a pair, no two pairs the same, and the answers are right in both runs."""
    built = BUILT[name]
    assert len(built.clean) >= 6
    for tokens, sign in ((built.clean, 1), (built.corrupted, -1)):
        assert len(tokens.unique(dim=0)) == len(tokens)
        best = built.model(tokens)[:, -1].argmax(-1)
        if name not in ("and", "or") or sign == 1:
            assert (best == (built.correct if sign == 1 else built.wrong)).all()
    assert ((built.clean != built.corrupted).sum(1) == (2 if name in ("and", "or") else 1)).all()
    clean, corrupted = (metric(built, built.model(tokens)) for tokens in (built.clean, built.corrupted))
    assert close(clean, torch.ones_like(clean))
    assert close(clean - corrupted, torch.full_like(clean, GAP[name]))


@every
def test_the_oracle_is_the_forward_pass(name: str) -> None:
    built = BUILT[name]
    none, everything = (
        forward_with_edges(built.model, built.clean, built.corrupted, edges) for edges in (set(), set(edges_of(built.model)))
    )
    assert close(none, built.model(built.clean), 1e-10)
    assert close(everything, built.model(built.corrupted), 1e-10)


@every
def test_the_circuit_alone_is_the_clean_run(name: str) -> None:
    """Of the complement no part changes anything either; and with the circuit ablated the rest does nothing."""
    built = BUILT[name]
    clean, rest = metric(built, built.model(built.clean)), false_edges(built)
    assert built.edges < set(edges_of(built.model))
    assert close(ablating(built, rest), clean)
    for seed in range(20):
        assert close(ablating(built, Random(seed).sample(rest, len(rest) // 2)), clean)
    assert close(ablating(built, built.edges), metric(built, built.model(built.corrupted)))


@every
def test_no_false_edge_matters(name: str) -> None:
    built = BUILT[name]
    clean = metric(built, built.model(built.clean))
    assert [edge for edge in false_edges(built) if not close(ablating(built, [edge]), clean)] == []


@every
def test_every_true_edge_matters(name: str) -> None:
    """Alone, by all of the gap; but in the OR gate the two branches stand for each other, and one edge of each is enough."""
    built = BUILT[name]
    clean, corrupted = (metric(built, built.model(tokens)) for tokens in (built.clean, built.corrupted))
    alone = built.edges.difference(*BRANCHES) if name == "or" else built.edges
    assert alone
    for edge in alone:
        assert close(ablating(built, [edge]), corrupted), edge
    for edge in built.edges - alone:
        assert close(ablating(built, [edge]), clean), edge
    if name == "or":
        assert built.edges - alone == BRANCHES[0] | BRANCHES[1]
        for edges in product(*BRANCHES):
            assert close(ablating(built, edges), corrupted), edges


@every
def test_the_circuit_without_an_edge_is_broken(name: str) -> None:
    """The circuit without one of its edges, all else ablated, isn't the clean run; but either branch of the OR gate is enough."""
    built = BUILT[name]
    clean, corrupted = (metric(built, built.model(tokens)) for tokens in (built.clean, built.corrupted))
    for edge in built.edges:
        enough = name == "or" and edge in BRANCHES[0] | BRANCHES[1]
        assert close(ablating(built, [*false_edges(built), edge]), clean if enough else corrupted), edge


@every
def test_distractors(name: str) -> None:
    """They differ, one at least in every layer and at the last position; the rest of the heads doesn't; senders are nodes."""
    built = BUILT[name]
    clean, corrupted = (outputs(built.model, tokens) for tokens in (built.clean, built.corrupted))
    differ = {node for node in clean if not torch.equal(clean[node], corrupted[node])}
    assert differ - built.nodes == DISTRACTORS[name]
    assert built.nodes <= differ
    assert built.nodes == {sender for sender, _ in built.edges}
    last = {node for node in DISTRACTORS[name] if (clean[node] != corrupted[node])[:, -1].any(-1).all()}
    assert {node.split(".")[0] for node in last} == {f"L{layer}" for layer in range(built.model.cfg.n_layers)}


@every
def test_attention_of_the_circuit_is_one_hot(name: str) -> None:
    built = BUILT[name]
    heads = [node.split(".") for node in built.nodes if ".H" in node]
    assert heads
    for tokens in (built.clean, built.corrupted):
        _, cache = built.model.run_with_cache(tokens)
        for layer, head in heads:
            pattern = cache["pattern", int(layer[1:])][:, int(head[1:])]
            queries = pattern[:, -1:] if name in ("and", "or") else pattern
            assert ((queries == 0) | (queries == 1)).all()


def test_the_oracle_refuses_edges_that_are_not_there() -> None:
    built = BUILT["and"]
    with pytest.raises(ValueError, match=r"no such edges: \[\('L1.H0', 'L0.MLP'\)\]"):
        ablating(built, [("L1.H0", "L0.MLP")])


def test_the_oracle_has_all_edges_of_a_random_model() -> None:
    """Of three layers, each of four heads with three ways in, and an MLP."""
    small = biased()
    edges = edges_of(small.model)
    assert len(edges) == len(set(edges)) == sum(12 * (1 + 5 * layer) + (5 + 5 * layer) for layer in range(3)) + 16
    clean, corrupted = small.model(small.clean), small.model(small.corrupted)
    assert not close(clean, corrupted, 1e-2)
    assert close(forward_with_edges(small.model, small.clean, small.corrupted, set()), clean, 1e-10)
    assert close(forward_with_edges(small.model, small.clean, small.corrupted, set(edges)), corrupted, 1e-10)
    into_logits = {edge for edge in edges if edge[1] == "logits"}
    assert close(forward_with_edges(small.model, small.clean, small.corrupted, into_logits), corrupted, 1e-10)


@pytest.mark.extended
def test_single_edges_of_a_random_model_by_hooks() -> None:
    """A hook of TransformerLens on the receiver's input adds the difference of what the sender writes in the two runs."""
    small = biased()
    model = small.model
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    clean, corrupted = (written(model, tokens) for tokens in (small.clean, small.corrupted))
    changed = 0
    for sender, receiver in edges_of(model):
        difference = corrupted[sender] - clean[sender]
        layer, _, part = receiver.partition(".")
        if receiver == "logits":
            hook, where = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", ...
        elif part == "MLP":
            hook, where = f"blocks.{layer[1:]}.hook_mlp_in", ...
        else:
            hook, where = f"blocks.{layer[1:]}.hook_{part[-1]}_input", (slice(None), slice(None), int(part[1:-2]))

        def add(value: Tensor, hook: object, where: object = where, difference: Tensor = difference) -> Tensor:
            value = value.clone()
            value[where] += difference
            return value

        expected = model.run_with_hooks(small.clean, fwd_hooks=[(hook, add)])
        actual = forward_with_edges(model, small.clean, small.corrupted, {(sender, receiver)})
        assert close(actual, expected, 1e-10), (sender, receiver)
        changed += not close(expected, model(small.clean), 1e-6)
    assert changed > 200


def test_all_edges_of_nodes_of_a_random_model_by_hooks() -> None:
    """Nodes set to their corrupted values, several at once: the later ones, too, whatever the earlier ones changed in them."""
    small = biased()
    model = small.model
    _, cache = model.run_with_cache(small.corrupted)
    for nodes in (["L0.H1"], ["L1.MLP"], ["L0.H3", "L1.H2", "L1.MLP", "L2.H0"]):

        def patch(value: Tensor, hook: object, nodes: list[str] = nodes) -> Tensor:
            value, layer = value.clone(), hook.name.split(".")[1]
            for node in nodes:
                of, part = node.split(".")
                if of != f"L{layer}" or (part == "MLP") != hook.name.endswith("mlp_out"):
                    continue
                where = ... if part == "MLP" else (slice(None), slice(None), int(part[1:]))
                value[where] = cache[hook.name][where]
            return value

        hooks = [(f"blocks.{layer}.{site}", patch) for layer in range(3) for site in ("attn.hook_z", "hook_mlp_out")]
        expected = model.run_with_hooks(small.clean, fwd_hooks=hooks)
        outgoing = {edge for edge in edges_of(model) if edge[0] in nodes}
        assert close(forward_with_edges(model, small.clean, small.corrupted, outgoing), expected, 1e-10), nodes
        assert not close(expected, model(small.clean), 1e-3)


def biased() -> Small:
    """A fresh small model with layer norm, of which no bias and no weight of a norm is trivial."""
    small = small_hooked()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in small.model.named_parameters():
            if "b_" in name or "ln" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return small


def written(model: object, tokens: Tensor) -> dict[str, Tensor]:
    """What each sender writes, from the cache of TransformerLens."""
    _, cache = model.run_with_cache(tokens)
    found = {"embed": cache["hook_embed"] + cache["hook_pos_embed"]}
    for layer in range(model.cfg.n_layers):
        results = torch.einsum("bphd,hdm->bphm", cache["z", layer], model.blocks[layer].attn.W_O)
        found |= {f"L{layer}.H{head}": results[:, :, head] for head in range(model.cfg.n_heads)}
        found[f"L{layer}.MLP"] = cache["mlp_out", layer]
    return found
