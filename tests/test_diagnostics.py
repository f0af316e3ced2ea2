"""Patched activations read again: against a loop over positions and features, written with nothing but sae-lens."""

import math
from dataclasses import replace
from typing import Any

import oracle
import pandas as pd
import pytest
import torch
from small import FEATURES, Small, small_bridge

import featpatch as fp
from featpatch.model.lens import Lens

STANDARD, TOPK, HEADS = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z"
NUMBERS = ["arrived", "leakage", "moved", "norm_ratio", "outside"]
READ_AGAIN = NUMBERS[:3]
LABELS = [{"odd": 3}, {"odd": 5}, {"odd": 4}]


def pairs_of(small: Small, special: tuple[int, ...] = ()) -> fp.Pairs:
    made = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, LABELS)
    return fp.Pairs(tuple(replace(pair, special=frozenset(special)) for pair in made))


def ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


@torch.no_grad()
def by_hand(small: Small, sae: Any, pairs: fp.Pairs, node: fp.Node, direction: str) -> dict[str, float]:
    """The definitions, place by place and feature by feature."""
    _, site = oracle.hooks(sae)
    seen, places, changed = [], [], set()
    for number, pair in enumerate(pairs):
        clean, corrupted = (oracle.activations(small.model, torch.tensor([tokens])) for tokens in (pair.clean, pair.corrupted))
        base, source = (corrupted[site], clean[site]) if direction == "denoising" else (clean[site], corrupted[site])
        f_b, f_s = oracle.encode(sae, base), oracle.encode(sae, source)
        old, new = base.flatten(2), base.flatten(2).clone()
        e_b, e_s = (x.flatten(2) - oracle.decode(sae, f, x, x).flatten(2) for x, f in ((base, f_b), (source, f_s)))
        for p in pair.positions(node.position):
            mixed = f_b.clone()
            for feature in range(FEATURES):
                if node.kind == "all_features" or node.index == feature:
                    mixed[0, p, feature] = f_s[0, p, feature]
            shift = oracle.decode(sae, mixed, base, base).flatten(2) - oracle.decode(sae, f_b, base, base).flatten(2)
            new[0, p] += shift[0, p] + (e_s - e_b)[0, p] * (node.kind == "error")
        f_n = oracle.encode(sae, new.reshape(base.shape))
        for p in pair.positions(node.position):
            if p < pair.first_difference:
                continue
            terms = dict.fromkeys(("along", "intended", "leaked", "whole", "moved"), 0.0)
            for feature in range(FEATURES):
                before, wanted, found = (float(f[0, p, feature]) for f in (f_b, f_s, f_n))
                if node.kind == "all_features" or node.index == feature:
                    terms["along"] += (found - before) * ((wanted > before) - (wanted < before))
                    terms["intended"] += abs(wanted - before)
                else:
                    terms["leaked"] += abs(found - before)
                    terms["whole"] += abs(wanted - before)
                    terms["moved"] += abs(found - before) > 1e-10
            if terms["intended"] or node.kind == "error":
                places.append({**terms, "before": float(old[0, p].norm()), "after": float(new[0, p].norm())})
                changed.add(number)
        for p in pair.positions("all"):
            seen += [float(x[0, p].norm()) for x in (base, source)]
    total = {name: sum(place[name] for place in places) for name in ("along", "intended", "leaked", "whole", "moved")}
    before, after = (sum(place[name] for place in places) for name in ("before", "after"))
    beyond = sum(not min(seen) * (1 - 1e-10) <= place["after"] <= max(seen) * (1 + 1e-10) for place in places)
    return {
        "changed_pairs": len(changed),
        "arrived": ratio(total["along"], total["intended"]),
        "leakage": ratio(total["leaked"], total["whole"]),
        "moved": ratio(total["moved"], len(places)),
        "norm_ratio": ratio(after, before),
        "outside": ratio(beyond, len(places)),
    }


def nodes_at(site: str) -> list[fp.Node]:
    """Every kind that belongs to the dictionary, at every kind of position."""
    positions: list[int | str] = ["all", "odd", 3, 6]
    features = [fp.Node(site, "feature", feature, position) for feature in range(FEATURES) for position in positions]
    return features + [fp.Node(site, kind, None, position) for kind in ("error", "all_features") for position in positions]


@pytest.mark.parametrize("site", [STANDARD, TOPK, HEADS])
@pytest.mark.parametrize("special", [(), (3, 4)])
def test_against_a_loop(small: Small, site: str, special: tuple[int, ...]) -> None:
    sae, pairs, nodes = small.at(site), pairs_of(small, special), nodes_at(site)[::5]
    table = fp.diagnose(small.model, sae, pairs, nodes)
    assert len(table) == 2 * len(nodes)
    for (_, row), (node, direction) in zip(
        table.iterrows(), ((node, way) for node in nodes for way in ("denoising", "noising")), strict=True
    ):
        assert (row["site"], row["kind"], row["position"], row["direction"]) == (site, node.kind, node.position, direction)
        assert node.index is None if pd.isna(row["index"]) else row["index"] == node.index
        assert row["pairs"] == 3
        for name, value in by_hand(small, sae, pairs, node, direction).items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), (node, direction, name)


def test_the_loop_saw_something(small: Small) -> None:
    """Values in the middle, so that the comparison above can fail."""
    table = fp.diagnose(small.model, small.at(STANDARD), pairs_of(small, (3, 4)), nodes_at(STANDARD))
    features = table[(table["kind"] == "feature") & (table["position"] == "all")]
    assert ((features["arrived"] - 1).abs() > 0.1).sum() > 5
    assert (features["leakage"].between(0.01, 2)).sum() > 5
    assert (features["moved"] > 1).sum() > 5
    assert (table["outside"].between(0.1, 0.9)).any()


def test_coordinates_arrive_and_leak_nothing(small: Small) -> None:
    coordinates = fp.dictionaries.identity(small.model, STANDARD)
    nodes = [fp.Node(STANDARD, "feature", index, position) for index in (0, 7) for position in ("all", "odd")]
    table = fp.diagnose(small.model, coordinates, pairs_of(small), nodes)
    assert table["arrived"].to_numpy() == pytest.approx(1, abs=1e-12)
    assert not table["leakage"].any()
    assert not table["moved"].any()
    error = fp.diagnose(small.model, coordinates, pairs_of(small), [fp.Node(STANDARD, "error")])
    assert not error["changed_pairs"].any()
    assert error[NUMBERS].isna().to_numpy().all()


def test_a_whole_activation_is_that_of_the_other_run(small: Small) -> None:
    """It belongs to no dictionary; its norm is one that was seen, rounding or not."""
    pairs, nodes = pairs_of(small), [fp.Node(STANDARD, "activation", None, position) for position in ("all", "odd")]
    table = fp.diagnose(small.model, small.at(STANDARD), pairs, nodes).set_index(["position", "direction"])
    assert table[READ_AGAIN].isna().to_numpy().all()
    assert not table["outside"].any()
    norms = {"clean": 0.0, "corrupted": 0.0}
    for pair, labels in zip(pairs, LABELS, strict=True):
        for run in norms:
            norms[run] += float(
                oracle.activations(small.model, torch.tensor([getattr(pair, run)]))[STANDARD][0, labels["odd"]].norm()
            )
    assert table["norm_ratio"]["odd", "denoising"] == pytest.approx(norms["clean"] / norms["corrupted"], rel=1e-9)
    assert table["norm_ratio"]["odd", "noising"] == pytest.approx(norms["corrupted"] / norms["clean"], rel=1e-9)


def test_what_a_transcoder_writes_is_not_what_it_reads(small: Small) -> None:
    transcoder = small.saes[-1]
    pairs = pairs_of(small)
    nodes = fp.rank_features(small.model, transcoder, pairs, progress=False).nodes[:-1]
    table = fp.diagnose(small.model, transcoder, pairs, nodes, directions=["noising"])
    assert table[READ_AGAIN].isna().to_numpy().all()
    assert set(table["direction"]) == {"noising"}
    assert table["changed_pairs"].all()
    assert ((table["norm_ratio"] - 1).abs() > 1e-3).any()
    assert table["norm_ratio"].notna().all()


def test_changed_pairs_are_those_of_the_table(small: Small) -> None:
    saes = [small.at(STANDARD), small.at(TOPK)]
    effects = fp.rank_features(small.model, saes, pairs_of(small), positions=["odd"], progress=False)
    table = fp.diagnose(small.model, saes, pairs_of(small), effects.nodes, directions=["denoising"])
    assert list(table["changed_pairs"]) == list(effects.changed_pairs)
    assert list(table["sae"]) == [node.sae for node in effects.nodes]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], r"nodes=\[\]: expected a list of at least one fp.Node"),
        (
            [fp.Node(HEADS, "head", 0), fp.Node(STANDARD, "error")],
            "nodes are of kind head: expected only nodes of kind feature, error",
        ),
        ([fp.Node("blocks.0.hook_resid_post", "error")], "belongs to 0 of the SAEs"),
        ([fp.Node(STANDARD, "feature", 0, sae="mine")], "belongs to 0 of the SAEs"),
        ([fp.Node(STANDARD, "feature", FEATURES)], f"feature {FEATURES} of .* is out of range: expected 0 to {FEATURES - 1}"),
        ([fp.Node("blocks.9.hook_resid_pre", "error")], "blocks.9.hook_resid_pre"),
        ([fp.Node(STANDARD, "error", None, "even")], "pair 0: a pair has no label 'even': expected one of"),
        ([fp.Node(STANDARD, "error", None, 7)], "pair 0: position 7 is outside a prompt of 7 tokens"),
    ],
)
def test_nodes_that_can_not_be_looked_at(bridge: Small, nodes: list[fp.Node], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.diagnose(bridge.model, bridge.at(STANDARD), pairs_of(bridge), nodes)


def test_directions_are_checked(bridge: Small) -> None:
    nodes = [fp.Node(STANDARD, "error")]
    for directions in ([], ["forwards"]):
        with pytest.raises(fp.FeatpatchError, match="expected 'denoising', 'noising' or both"):
            fp.diagnose(bridge.model, bridge.at(STANDARD), pairs_of(bridge), nodes, directions=directions)


def test_rounding_moves_nothing(small: Small) -> None:
    """Principal components are orthogonal: what is swapped alone arrives, and what the others change by is rounding."""
    components = fp.dictionaries.pca(small.model, STANDARD, pairs_of(small))
    nodes = [fp.Node(STANDARD, "feature", index, "all") for index in range(4)]
    table = fp.diagnose(small.model, components, pairs_of(small), nodes)
    assert table["arrived"].to_numpy() == pytest.approx(1, abs=1e-9)
    assert table["leakage"].between(1e-20, 1e-9).all()
    assert not table["moved"].any()


class Rotation:
    """Large features: coordinates in a rotated basis, times 1e8."""

    def __init__(self, d: int) -> None:
        self.basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.basis * 1e8

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.basis.T / 1e8


def test_rounding_is_relative_to_the_features(small: Small) -> None:
    rotation = fp.dictionaries.adapt(Rotation(16), STANDARD, d_in=16)
    table = fp.diagnose(small.model, rotation, pairs_of(small), [fp.Node(STANDARD, "feature", 0, "all")])
    assert table["leakage"].between(1e-20, 1e-9).all()
    assert not table["moved"].any()


def test_before_the_first_difference_nothing_differs(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where rounding says otherwise."""
    read = Lens.read

    def noisy(lens: Lens, tokens: torch.Tensor, hooks: Any) -> dict[str, torch.Tensor]:
        found = read(lens, tokens, hooks)
        return {
            hook: values + 1e-9 * torch.arange(len(values)).reshape(-1, *[1] * (values.ndim - 1))
            for hook, values in found.items()
        }

    monkeypatch.setattr(Lens, "read", noisy)
    monkeypatch.setattr(Lens, "causal", True)  # which is found out by a pass of two rows
    table = fp.diagnose(small.model, small.at(STANDARD), pairs_of(small), [fp.Node(STANDARD, "error", None, p) for p in (2, 3)])
    assert list(table["changed_pairs"]) == [0, 0, 3, 3]


class Silent:
    """Coordinates, of which decoding leaves out the first."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features * (torch.arange(features.shape[2]) > 0)


def test_a_feature_that_decodes_to_nothing_changes_and_does_not_arrive(small: Small) -> None:
    silent = fp.dictionaries.adapt(Silent(), STANDARD, d_in=16, linear=True)
    table = fp.diagnose(small.model, silent, pairs_of(small), [fp.Node(STANDARD, "feature", 0, "odd")])
    assert list(table["changed_pairs"]) == [3, 3]
    assert list(table["arrived"]) == [0, 0]
    assert list(table["norm_ratio"]) == [1, 1]


class Running:
    """Features are sums over the positions up to here."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_an_encoder_that_looks_back_sees_the_whole_prompt(small: Small) -> None:
    """At one position the difference d of the sums is added to one coordinate, and read again as it is.

    Over all positions d_p is added at each p, so that the sum at p is off by d_0 + ... + d_p.
    """
    running, pairs = fp.dictionaries.adapt(Running(), STANDARD, d_in=16, linear=True), pairs_of(small)[:1]
    nodes = [fp.Node(STANDARD, "feature", 0, position) for position in (6, "all")]
    table = fp.diagnose(small.model, running, pairs, nodes, directions=["denoising"])
    old, new = (
        oracle.activations(small.model, torch.tensor([run]))[STANDARD][0] for run in (pairs[0].corrupted, pairs[0].clean)
    )
    difference = (new - old).cumsum(0)[:, 0]
    patched = old[6].clone()
    patched[0] += difference[6]
    assert table["arrived"][0] == pytest.approx(1, abs=1e-9)
    assert table["norm_ratio"][0] == pytest.approx(float(patched.norm() / old[6].norm()), rel=1e-9)
    along = (difference.cumsum(0) * difference.sign()).sum() / difference.abs().sum()
    assert table["arrived"][1] == pytest.approx(float(along), rel=1e-9)


def test_rounding_is_not_outside() -> None:
    """With a single position that is not special, the whole activation has the smallest or the largest norm that was seen."""
    small = small_bridge()
    model = torch.nn.Module.to(small.model, torch.float32)
    for position in (3, 4, 5, 6):
        for pair in pairs_of(small, tuple(set(range(7)) - {position})):
            node = fp.Node(STANDARD, "activation", None, position)
            table = fp.diagnose(model, small.at(STANDARD), fp.Pairs((pair,)), [node])
            assert not table["outside"].any()


def test_where_every_position_is_special_any_norm_is_outside() -> None:
    small = small_bridge()
    pairs = fp.Pairs(tuple(pairs_of(small, tuple(range(7)))))
    table = fp.diagnose(small.model, small.at(STANDARD), pairs, [fp.Node(STANDARD, "activation", None, 3)])
    assert table["outside"].all()
