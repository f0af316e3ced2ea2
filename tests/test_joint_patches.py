"""Lists of joint patches, in any layers, against hooked passes of the whole model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small
from test_nodes import MLP, RESID, Z, by_do, mixed, pairs_of, saes_of
from test_several_hooks import hooked_logits

import featpatch as fp

LAST = "blocks.2.hook_resid_post"


def patches_of(small: Small) -> list[fp.Node | fp.Patch]:
    feature, other = small.at(RESID), small.at(LAST)
    return [
        fp.Patch((fp.feature(feature, 5, "there"), fp.feature(feature, 6, "there"), fp.feature(other, 1)), name="features"),
        fp.feature(feature, 5, "there"),
        fp.Patch((fp.head(1, 0, position="pieces"), fp.Node("blocks.0.hook_mlp_out", "activation", None, "there"))),
        fp.Patch((fp.Node(RESID, "error", None, 3, RESID), fp.head(1, 3), fp.Node(LAST, "all_features", None, "pieces"))),
        fp.Patch((fp.Node("blocks.0.hook_mlp_out", "activation"), fp.Node("blocks.1.hook_resid_pre", "activation"))),
        fp.Patch((fp.feature(feature, 5, 0),)),
    ]


def saes(small: Small) -> list[Any]:
    return [small.at(RESID), small.at(LAST)]


def nodes_in(entry: fp.Node | fp.Patch) -> tuple[fp.Node, ...]:
    return entry.nodes if isinstance(entry, fp.Patch) else (entry,)


def change(small: Small, node: fp.Node, base: torch.Tensor, source: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The hook point of a node and the change `[pos, ...]` of its activation, from the definition."""
    runs = [oracle.activations(small.model, tokens) for tokens in (base, source)]
    b, s = (run[node.site] for run in runs)
    if node.kind == "activation":
        return node.site, (s - b)[0]
    if node.kind == "head":
        moved = torch.zeros_like(b)
        moved[:, :, node.index] = (s - b)[:, :, node.index]
        return node.site, moved[0]
    sae = small.at(node.sae or node.site)
    f = [oracle.encode(sae, x) for x in (b, s)]
    rebuilt = [oracle.decode(sae, code, x, x) for code, x in zip(f, (b, s), strict=True)]
    if node.kind == "error":
        return node.site, ((s - rebuilt[1]) - (b - rebuilt[0]))[0]
    new = f[0].clone()
    some: Any = slice(None) if node.kind == "all_features" else node.index
    new[..., some] = f[1][..., some]
    return node.site, (oracle.decode(sae, new, b, b) - rebuilt[0])[0]


def by_hand(small: Small, pair: fp.Pair, nodes: tuple[fp.Node, ...], way: str, combine: str) -> float:
    source, base = (torch.tensor([ids]) for ids in (pair.clean, pair.corrupted)[:: 1 if way == "denoising" else -1])
    changes: dict[str, dict[int, torch.Tensor]] = {}
    for node in nodes:
        site, delta = change(small, node, base, source)
        for position in pair.positions(node.position):
            if bool((delta[position] != 0).any()):
                at = changes.setdefault(site, {})
                at[position] = at.get(position, 0) + delta[position]
    logits = hooked_logits(small.model, base, changes, combine)
    return float((logits[-1, pair.correct[0]] - logits[-1, pair.wrong[0]]).detach())


def values(effects: fp.Effects) -> Mapping[tuple[str, int, int], float]:
    """The value of every row in every pair: that of the base run where the table has no entry."""
    found = {}
    for way, column, base in (("denoising", effects.denoised, effects.corrupted), ("noising", effects.noised, effects.clean)):
        for row in range(len(effects)):
            for pair in range(len(base)):
                entry = np.flatnonzero((effects.row == row) & (effects.pair == pair))
                found[way, row, pair] = float(column[entry[0]] if len(entry) else base[pair])
    return found


@pytest.mark.parametrize("combine", [None, "add", "set"])
def test_joint_patches_are_hooked_forward_passes(small: Small, combine: Any) -> None:
    """Every patch of the list, whatever else the list holds; by default values are set, whatever arrives there."""
    asked, pairs = patches_of(small), pairs_of(small)
    effects = fp.rank_nodes(small.model, pairs, asked, saes=saes(small), combine=combine, progress=False)
    assert [node.kind for node in effects.nodes] == ["set", "feature", "set", "set", "set", "set"]
    assert [node.index for node in effects.nodes if node.kind == "set"] == [0, 2, 3, 4, 5]
    assert str(effects.nodes[0]) == "features together @ (several)"
    assert effects.metadata.get("combine") == combine
    for (way, row, pair), value in values(effects).items():
        nodes = nodes_in(asked[row])
        if combine is None:
            expected = by_do(small, pairs[pair], list(nodes), way, saes(small))
        else:
            expected = by_hand(small, pairs[pair], nodes, way, combine)
        assert value == pytest.approx(expected, abs=1e-9), (way, row, pair)


def test_the_meanings_of_a_joint_patch_differ(small: Small) -> None:
    """A change of an MLP arrives at the residual stream above it, where it is kept, replaced or taken into account."""
    nodes = (fp.Node("blocks.0.hook_mlp_out", "activation"), fp.Node(RESID, "activation"))
    found = [
        fp.rank_nodes(small.model, pairs_of(small), [fp.Patch(nodes)], combine=combine, progress=False).pooled("recovery")[0]
        for combine in (None, "set", "add")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert abs(found[2] - found[1]) > 1e-3


def test_nodes_inside_of_layers_are_added_up(small: Small) -> None:
    """Nodes of every kind, also those that the fast sweep has no hook point for, in one patch and in two."""
    nodes, pairs = mixed(small), pairs_of(small)
    some = [fp.Patch(tuple(nodes[:3])), fp.Patch((nodes[9], nodes[11])), fp.Patch((nodes[11],))]
    joint = fp.rank_nodes(small.model, pairs, some, saes=saes_of(small), combine="add", progress=False)
    alone = fp.rank_nodes(small.model, pairs, [nodes[11]], together=False, progress=False)
    np.testing.assert_allclose(joint.pooled("recovery")[2], alone.pooled("recovery")[0], rtol=0, atol=1e-9)
    with pytest.raises(fp.FeatpatchError, match="combine='set' with .*: expected hook points of the residual stream"):
        fp.rank_nodes(small.model, pairs, some, saes=saes_of(small), combine="set", progress=False)


def test_a_journal_of_joint_patches(bridge: Small, tmp_path: Path) -> None:
    def run(**options: Any) -> fp.Effects:
        return fp.rank_nodes(
            bridge.model, pairs_of(bridge), patches_of(bridge), saes=saes(bridge), journal=tmp_path / "journal", progress=False,
            **options,
        )  # fmt: skip

    first = run(combine="add")
    again = run(combine="add")
    np.testing.assert_array_equal(first.denoised, again.denoised)
    with pytest.raises(fp.FeatpatchError, match="combine"):
        run(combine="set")


@pytest.mark.parametrize(
    ("patch", "options", "message"),
    [
        ((fp.Node(RESID, "feature", 1), fp.Node(RESID, "feature", 1, "there")), {"combine": "add"}, "overlap"),
        ((fp.Node(RESID, "feature", 1), fp.Node(RESID, "all_features", None, 3)), {"combine": "set"}, "overlap"),
        ((fp.Node(RESID, "activation"), fp.Node(RESID, "error", None, 3)), {"combine": "add"}, "overlap"),
        ((fp.Node(Z, "head", 1), fp.Node(Z, "activation")), {"combine": "add"}, "overlap"),
        ((fp.Node(RESID, "activation"), fp.Node(RESID, "error", None, 3)), {}, "overlaps other nodes"),
        ((fp.Node(MLP, "activation"),), {"together": True}, "together=True with patches: expected False"),
        ((fp.Node(MLP, "activation"),), {"combine": "both"}, "combine='both': expected one of add, set"),
    ],
)
def test_what_is_refused(bridge: Small, patch: tuple[fp.Node, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_nodes(bridge.model, pairs_of(bridge), [fp.Patch(patch)], saes=bridge.at(RESID), progress=False, **options)


def across(small: Small, combine: Any) -> dict[str, Any]:
    return {"model": small.model, "saes": saes(small), "pairs": pairs_of(small), "combine": combine, "progress": False}


def joint_recovery(small: Small, sets: list[tuple[fp.Node, ...]], combine: Any) -> np.ndarray[Any, Any]:
    patches = [fp.Patch(nodes) for nodes in sets]
    return fp.rank_nodes(
        small.model, pairs_of(small), patches, saes=saes(small), combine=combine, progress=False
    ).pooled("recovery")  # fmt: skip


@pytest.mark.parametrize("combine", [None, "add"])
def test_interactions_across_layers(small: Small, combine: Any) -> None:
    alone = fp.rank_features(small.model, saes(small), pairs_of(small), positions=["there"], progress=False)
    nodes = [alone.where(sae=sae).top(2, kind="feature").nodes[n] for sae, n in ((RESID, 0), (LAST, 0), (RESID, 1))]
    table = fp.interactions(**across(small, combine), features=nodes, position="there", directions=["denoising"])
    single = joint_recovery(small, [(node,) for node in nodes], combine)
    for row in table.itertuples():
        both = joint_recovery(small, [(row.one, row.other)], combine)[0]
        assert row.recovery == pytest.approx(both, abs=1e-9)
        left = both - single[nodes.index(row.one)] - single[nodes.index(row.other)]
        assert row.recovery_interaction == pytest.approx(left, abs=1e-9)
    assert len(table) == 3
    with pytest.raises(fp.FeatpatchError, match="expected features at this position; pass position='there'"):
        fp.interactions(**across(small, combine), features=nodes)


def test_features_of_all_layers_are_selected_together(small: Small) -> None:
    """The greedy selection by hand, from joint patches of each candidate with those chosen before."""
    options = across(small, "add")
    chosen = fp.select_features(**options, candidates=12, most=3, target=1.0, position="there")
    alone = fp.rank_features(small.model, saes(small), pairs_of(small), positions=["there"], progress=False)
    pool, expected, best = list(alone.top(12, kind="feature").nodes), list[fp.Node](), 0.0
    while len(expected) < 3:
        values = joint_recovery(small, [(*expected, node) for node in pool], "add")
        if expected and values.max() <= best:
            break
        best = float(values.max())
        expected.append(pool.pop(int(values.argmax())))
    assert list(chosen.features) == list(chosen.nodes) == expected
    assert chosen.effects.pooled("recovery")[-1] == pytest.approx(best, abs=1e-9)
    assert {node.sae for node in alone.top(12, kind="feature").nodes} == {RESID, LAST}


def test_the_effects_of_a_selection_are_in_the_order_in_which_it_grew() -> None:
    """The first feature alone is patched at one hook point, above those of the larger sets, which are patched at several."""
    demo = fp.load_demo()
    options: dict[str, Any] = {"model": demo.model, "saes": demo.saes, "pairs": demo.pairs("ioi", n=4), "progress": False}
    chosen = fp.select_features(**options, candidates=24, most=3, target=1.0, position="S2")
    assert chosen.nodes[0].site > chosen.nodes[1].site
    grown = [fp.Patch(chosen.nodes[: size + 1]) for size in range(3)]
    by_hand = fp.rank_nodes(nodes=grown, **options).pooled("recovery")
    np.testing.assert_allclose(chosen.effects.pooled("recovery"), by_hand, atol=1e-6)
    assert f"3 features bring back {by_hand[-1]:.0%}, short of 100%" in repr(chosen)


def test_the_top_features_of_all_layers_together(small: Small) -> None:
    curve = fp.top_k_curve(**across(small, None), across=True, most=4, positions=["there", "pieces"])
    for position in ("there", "pieces"):
        nodes = curve.features["all SAEs", position]
        assert {node.sae for node in nodes} <= {RESID, LAST}
        expected = joint_recovery(small, [tuple(nodes[:k]) for k in (1, 2, 3, 4)], None)
        rows = curve.table().query(f"position == '{position}'")
        np.testing.assert_allclose(rows["recovery"], expected, rtol=0, atol=1e-9)
        assert rows["k"].tolist() == [1, 2, 3, 4]
