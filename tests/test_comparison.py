"""Features beside components: the joined table by hand, contributions against a plain loop, and the law that shares add up."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from small import FEATURES, WIDTH, Small, small_hooked, standard

import featpatch as fp
from featpatch import compare
from featpatch.cli.options import spans
from featpatch.comparison.writers import Writers
from featpatch.model.transformer_lens import wrap
from featpatch.reporting.terminal import compared

PRE, MID, POST = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post"
TOPK, START = "blocks.2.hook_resid_pre", "blocks.0.hook_resid_pre"
NAMES = ("site", "kind", "index", "position")


def table(changes: dict[fp.Node, Any], noised: dict[fp.Node, Any] | None = None, **metadata: Any) -> fp.Effects:
    """A table of these changes `[pairs]` over gaps of 10, the same in both directions unless `noised` has others."""
    first = np.array([np.atleast_1d(change) for change in changes.values()], dtype=np.float64)
    second = first if noised is None else np.array([np.atleast_1d(noised[node]) for node in changes], dtype=np.float64)
    row, pair = (index.ravel() for index in np.indices(first.shape))
    known = {"metric": "m", "directions": ["denoising", "noising"], "pairs": "digest", **metadata}
    gap = np.full(first.shape[1], 10.0)
    return fp.Effects(tuple(changes), gap, gap * 0, row, pair, first.ravel(), gap[pair] - second.ravel(), known)


def by_hand() -> tuple[fp.Effects, fp.Effects]:
    """Three places with features of one dictionary each, the last without features that changed; components at two of them."""
    features = {
        fp.Node("blocks.1.hook_resid_pre", "feature", 3, "S2", "one"): 1,
        fp.Node("blocks.1.hook_resid_pre", "feature", 7, "S2", "one"): 4,
        fp.Node("blocks.1.hook_resid_pre", "all_features", None, "S2", "one"): 6,
        fp.Node("blocks.1.hook_resid_pre", "error", None, "S2", "one"): 2,
        fp.Node("blocks.1.hook_resid_pre", "activation", None, "S2"): 9,
        fp.Node("blocks.1.hook_resid_pre", "feature", 5, 4, "one"): -2,
        fp.Node("blocks.1.hook_resid_pre", "activation", None, 4): -3,
        fp.Node("blocks.2.attn.hook_z", "error", None, "S2", "two"): 8,
        fp.Node("blocks.2.attn.hook_z", "activation", None, "S2"): 8,
    }
    components = {
        fp.Node("blocks.2.attn.hook_z", "head", 1, "S2"): 3,
        fp.Node("blocks.2.attn.hook_z", "head", 0, "S2"): 5,
        fp.Node("blocks.0.hook_mlp_out", "activation", None, "S2"): 7,
        fp.Node("blocks.1.hook_resid_pre", "activation", None, "S2"): 9,
        fp.Node("blocks.1.hook_resid_pre", "activation", None, 4): -3,
    }
    return table(features, {node: 2 * change for node, change in features.items()}), table(components)


def row(found: Any, **wanted: Any) -> dict[str, Any]:
    """The only row with these values."""
    kept = found
    for column, value in wanted.items():
        kept = kept[
            [entry is value if value is None else bool(entry == value) for entry in kept[column].astype(object).fillna("")]
        ]
    assert len(kept) == 1, kept
    return dict(kept.iloc[0])


def test_table_by_hand() -> None:
    found = compare(*by_hand()).table
    assert len(found) == 5
    cell = row(found, site="blocks.1.hook_resid_pre", position="S2")
    expected = {
        "layer": 1, "kind": "activation", "sae": "one", "changed_features": 2, "recovery": 0.9, "recovery_features": 0.5,
        "recovery_all_features": 0.6, "recovery_error": 0.2, "recovery_activation": 0.9, "recovery_best": 0.4,
        "recovery_best_feature": 7, "degradation": 0.9, "degradation_features": 1.0, "degradation_all_features": 1.2,
    }  # fmt: skip
    assert {name: cell[name] for name in expected} == pytest.approx(expected)
    other = row(found, site="blocks.1.hook_resid_pre", position=4)
    assert (other["recovery_features"], other["recovery_all_features"], other["recovery_best_feature"]) == (-0.2, 0, 5)
    for head, effect in ((0, 0.5), (1, 0.3)):
        beside = row(found, kind="head", index=head)
        assert (beside["recovery"], beside["layer"], beside["sae"], beside["recovery_error"]) == (effect, 2, "two", 0.8)
        assert (beside["recovery_features"], beside["changed_features"]) == (0, 0)
        assert np.isnan(beside["recovery_best"])
    alone = row(found, site="blocks.0.hook_mlp_out")
    assert alone["recovery"] == 0.7
    assert alone["layer"] == 0
    assert np.isnan([alone["recovery_features"], alone["recovery_activation"], alone["degradation_best"]]).all()


def test_places_of_features_alone_and_several_dictionaries_have_rows_of_their_own() -> None:
    features, components = by_hand()
    second = {
        fp.Node("blocks.1.hook_resid_pre", "feature", 0, "S2", "more"): 2,
        fp.Node("blocks.5.hook_resid_post", "feature", 0, "S2", "late"): 3,
    }
    both = table({**dict(zip(features.nodes, features.denoised, strict=True)), **second})
    found = compare(both, components).table
    assert len(found) == 7
    late = row(found, sae="late")
    assert (late["site"], late["position"], late["layer"], late["recovery_features"]) == (
        "blocks.5.hook_resid_post",
        "S2",
        5,
        0.3,
    )
    assert np.isnan(late["recovery"])
    assert row(found, sae="more")["recovery"] == row(found, sae="one", position="S2")["recovery"] == 0.9
    assert row(found, sae="more")["recovery_features"] == pytest.approx(0.2)


def test_sums_count_all_features_that_were_ranked() -> None:
    features, components = by_hand()
    found = compare(features.top(1), components).table
    cell = row(found, site="blocks.1.hook_resid_pre", position="S2")
    assert cell["recovery_features"] == 0.5
    assert cell["recovery_all_features"] == 0.6
    assert set(found["sae"].dropna()) == {"one"}
    assert np.isnan(row(found, site="blocks.1.hook_resid_pre", position=4)["recovery_features"])


def test_agreement_by_hand() -> None:
    """Whole activations 1, 2, 3, 4 beside sums 0.1, 0.3, 0.2, 0.4: two neighbours are exchanged, 1 - 6 * 2 / (4 * 15) = 0.8."""
    features, components = {}, {}
    for position, (whole, one, two) in enumerate([(1, 0.3, -0.2), (2, 0.1, 0.2), (3, 0.1, 0.1), (4, 0.2, 0.2)]):
        features |= {fp.Node(PRE, "feature", 0, position, "s"): one, fp.Node(PRE, "feature", 1, position, "s"): two}
        components[fp.Node(PRE, "activation", None, position)] = whole
    components[fp.Node(PRE, "activation", None, 9)] = -7
    components[fp.Node("blocks.1.attn.hook_z", "head", 0, 0)] = -7
    turned = {node: -change for node, change in components.items()}
    found = compare(table(features), table(components, turned)).agreement
    assert {effect: (round(of.correlation, 12), of.points) for effect, of in found.items()} == {
        "recovery": (0.8, 4), "degradation": (-0.8, 4),
    }  # fmt: skip
    unknown = {**features, fp.Node(PRE, "feature", 0, 3, "s"): np.nan}
    assert compare(table(unknown), table(components)).agreement["recovery"].points == 3
    one = compare(*by_hand()).agreement["recovery"]
    assert (one.correlation, one.points) == (pytest.approx(1), 2)
    rounded = {node: change + 1e-8 * node.position for node, change in dict.fromkeys(components, 5).items()}
    assert np.isnan(compare(table(features), table(rounded)).agreement["recovery"].correlation), "ordered by rounding"
    constant = dict.fromkeys(components, 5)
    assert np.isnan(compare(table(features), table(constant)).agreement["recovery"].correlation)


def test_only_shared_directions_are_compared() -> None:
    features, components = by_hand()
    noising = replace(components, metadata={**components.metadata, "directions": ["noising"]})
    found = compare(features, noising)
    assert list(found.agreement) == ["degradation"]
    assert not [column for column in found.table.columns if "recovery" in column]


def test_a_missing_rank_correlation_says_why_and_what_to_rank() -> None:
    features = {fp.Node(PRE, "feature", index, position, "s"): index for index in (1, 2) for position in ("S2", "end")}
    elsewhere = {fp.Node(MID, "activation", None, "S2"): 1, fp.Node(PRE, "head", 0, "S2"): 2}
    apart = compare(table(features), table(elsewhere))
    advice = "rank_components(model, pairs, sites=['resid_pre'], layers=[1], positions=['S2', 'end'])"
    for text in (apart.agreement["recovery"].reason, repr(apart), unescape(apart._repr_html_())):
        assert f"features are at {PRE} (S2, end), whole activations of components at {MID} (S2)" in text
        assert advice in text
    assert repr(apart).count(advice) == 1
    shown = compared(apart).renderables[0]
    assert shown.count("recovery and degradation: none, because the tables have no hook point and position in common") == 1
    assert shown.endswith(f"at {MID} (S2); run featpatch components with --sites resid_pre --positions S2,end\n")
    named = compare(table({fp.Node(POST, "feature", 1, label, "s"): 1 for label in ("3", 'a,"b')}), table(elsewhere))
    (asked,) = shlex.split(compared(named).renderables[0].partition("--positions ")[2])
    assert spans(asked) == ["3", 'a,"b']
    each = compare(table({fp.Node(POST, "feature", 1, index, "s"): 1 for index in (3, 4)}), table(elsewhere))
    assert compared(each).renderables[0].endswith("--sites resid_post --positions each\n")
    heads = compare(table({fp.Node("blocks.1.attn.hook_z", "feature", 0, 3, "z"): 1}), table(elsewhere))
    assert "rank features of SAEs at resid_pre" in repr(heads)
    assert "; run featpatch rank with SAEs at resid_pre" in compared(heads).renderables[0]
    places = {fp.Node(PRE, "activation", None, position): 1 for position in ("S2", "end")}
    constant = compare(table(features), table(places))
    assert "effects of the components and of the summed features are the same in all 2 cells" in repr(constant)
    single = compare(table(features), table(dict(list(places.items())[:1])))
    unknown = compare(table({**features, fp.Node(PRE, "feature", 1, "end", "s"): np.nan}), table(places))
    assert "the tables share 1 cells (hook point and position) with known effects" in repr(single)
    assert "(1 more with unknown effects)" in repr(unknown)
    for found in (apart, heads, constant, single, unknown):
        assert not [word for word in ("NaN", "nan", "<NA>", "None") if word in repr(found)]
        assert bool(found.agreement["recovery"].reason) == bool(np.isnan(found.agreement["recovery"].correlation))
    fine = compare(*by_hand())
    assert fine.agreement["recovery"].reason == ""
    assert re.findall(r"(\w+) (\S+) over 2 hook points", compared(fine).renderables[0])
    assert "no Spearman" not in repr(fine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": "another"}, "pairs differ: expected the same pairs"),
        ({"metric": "prob"}, "metric is 'm' for the features and 'prob'"),
        ({"of_pairs": [0]}, "of_pairs is None for the features and \\[0\\]"),
        ({"noise": {"scale": 3}}, "noise is None for the features and \\{'scale': 3\\}"),
        ({"ablation": {"to": "zero"}}, "ablation is None for the features and \\{'to': 'zero'\\}"),
        ({"model": {"sha256": "x"}}, "on models with different weights"),
        ({"directions": []}, "an effect that both hold"),
    ],
)
def test_other_tables_are_refused(change: dict[str, Any], message: str) -> None:
    features, components = by_hand()
    with pytest.raises(fp.FeatpatchError, match=message):
        compare(features, replace(components, metadata={**components.metadata, **change}))


def test_tables_that_are_not_what_they_should_be_are_refused(tmp_path: Any) -> None:
    features, components = by_hand()
    with pytest.raises(fp.FeatpatchError, match="the features were ranked over 1 pair and the components over 2"):
        compare(features, table(dict.fromkeys(components.nodes, (1, 1))))
    with pytest.raises(fp.FeatpatchError, match="the corrupted runs differs between the tables, by up to 1"):
        compare(features, replace(components, corrupted=components.corrupted + 1))
    with pytest.raises(fp.FeatpatchError, match="the clean runs differs between the tables, by up to 1"):
        compare(features, replace(components, clean=components.clean - 1))
    for one, other in ((components, features), (features, features), (features, components.take([]))):
        with pytest.raises(fp.FeatpatchError, match="expected features of SAEs in the first"):
            compare(one, other)
    part = fp.Effects.load(features.top(1).save(tmp_path / "part"))
    with pytest.raises(fp.FeatpatchError, match="1 of 3 ranked features"):
        compare(part, components)
    with pytest.raises(fp.FeatpatchError, match="saes, pairs is missing"):
        compare(features, components, model=object())
    with pytest.raises(fp.FeatpatchError, match="top=0"):
        compare(features, components, top=0)
    for name in ("through", "writers"):
        with pytest.raises(fp.FeatpatchError, match="without a model"):
            getattr(compare(features, components), name)


def pairs_of(small: Small) -> fp.Pairs:
    labels = [{"change": 3, "late": 5}] * 3
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, labels)


def ranked(model: Any, saes: Any, pairs: fp.Pairs, positions: Any = "all", **options: Any) -> fp.Effects:
    return fp.rank_features(model, saes, pairs, positions=positions, progress=False, **options)


def heads_and_mlps(features: fp.Effects, positions: Any, layers: int = 3, heads: int = 4) -> fp.Effects:
    """A table of made-up effects of every head and MLP, later ones larger, as `rank_components` would give."""
    nodes = []
    for layer in range(layers):
        for position in positions:
            nodes += [fp.Node(f"blocks.{layer}.attn.hook_z", "head", head, position) for head in range(heads)]
            nodes.append(fp.Node(f"blocks.{layer}.attn.hook_q", "head", 0, position))
            nodes.append(fp.Node(f"blocks.{layer}.hook_resid_pre", "activation", None, position))
            nodes.append(fp.Node(f"blocks.{layer}.hook_mlp_out", "activation", None, position))
    made = table({node: np.full(len(features.clean), number) for number, node in enumerate(nodes)})
    gap = 10 / (features.clean - features.corrupted).mean()
    denoised, noised = made.denoised / gap + features.corrupted[made.pair], features.clean[made.pair] - made.denoised / gap
    runs = {"clean": features.clean, "corrupted": features.corrupted, "denoised": denoised, "noised": noised}
    return replace(made, **runs, metadata={**features.metadata, "saes": {}})


def written(model: Any, sites: dict[str, torch.Tensor], site: str, kind: str, index: Any) -> torch.Tensor:
    """What a writer writes, `[1, pos, d_model]`."""
    if kind != "head":
        return sites[site]
    layer = int(site.split(".")[1])
    heads = sites[site].reshape(*sites[site].shape[:2], -1, model.blocks[layer].attn.W_O.shape[1])
    return heads[:, :, index] @ model.blocks[layer].attn.W_O[index]


@torch.no_grad()
def loop(small: Small, sae: Any, writer: tuple[str, str, Any], feature: int, tokens: list[int]) -> tuple[float, float]:
    """Contribution and change by the definition, pair by pair and token by token."""
    contribution = change = 0.0
    reads = oracle.hooks(sae)[0]
    for clean, corrupted in zip(small.clean, small.corrupted, strict=True):
        source, base = (oracle.activations(small.model, run[None]) for run in (clean, corrupted))
        delta = written(small.model, source, *writer) - written(small.model, base, *writer)
        of_pair = own = 0.0
        for token in tokens:

            def value(x: torch.Tensor, token: int = token) -> float:
                return float(oracle.encode(sae, x)[0, token, feature])

            x_b, x_s, moved = base[reads], source[reads], torch.zeros_like(delta)
            moved[:, token] = delta[:, token]
            of_pair += 0.5 * (value(x_b + moved) - value(x_b) + value(x_s) - value(x_s - moved)) / len(small.clean)
            own += (value(x_s) - value(x_b)) / len(small.clean)
        contribution += np.sign(own) * of_pair
        change += abs(own)
    return contribution, change


TOKENS = {"late": [5], "change": [3], 6: [6], "all": [0, 1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("positions", [["late", 6], "all", ["change"]], ids=str)
def test_contributions_are_those_of_a_plain_loop(small: Small, positions: Any) -> None:
    saes, pairs = [small.at(hook) for hook in (PRE, MID, TOPK, POST)], pairs_of(small)
    features = ranked(small.model, saes, pairs, positions)
    components = heads_and_mlps(features, ["all"] if positions == "all" else positions)
    found = compare(features, components, model=small.model, saes=saes, pairs=pairs, top=6)
    by_name = {oracle.hooks(sae)[0]: sae for sae in saes}
    assert len(found.through) >= 6
    assert len(found.writers)
    for frame in (found.through, found.writers):
        for _, line in frame.iterrows():
            index = None if line["kind"] != "head" else int(line["index"])
            writer = (line["site"], line["kind"], index)
            expected = loop(small, by_name[line["sae"]], writer, line["feature"], TOKENS[line["position"]])
            assert (line["contribution"], line["change"]) == pytest.approx(expected, abs=1e-10)
            assert line["share"] == pytest.approx(expected[0] / expected[1], rel=1e-6)


def test_through_holds_the_largest_contributions_behind_the_top_components(small: Small) -> None:
    saes, pairs = [small.at(hook) for hook in (PRE, MID, POST)], pairs_of(small)
    features = ranked(small.model, saes, pairs, [6])
    components = heads_and_mlps(features, [6])
    found = compare(features, components, model=small.model, saes=saes, pairs=pairs, top=7).through
    order = list(dict.fromkeys(zip(found["site"], found["index"].fillna(-1), strict=True)))
    assert order == [("blocks.2.hook_mlp_out", -1), *((f"blocks.{2}.attn.hook_z", head) for head in (3, 2, 1, 0)),
                     ("blocks.1.hook_mlp_out", -1), ("blocks.1.attn.hook_z", 3)]  # fmt: skip
    by_name = {oracle.hooks(sae)[0]: sae for sae in saes}
    pooled = dict(zip(features.nodes, features.pooled("degradation"), strict=True))
    for (site, index), behind in ((order[0], [POST]), (order[4], [POST]), (order[5], [POST]), (order[6], [MID, POST])):
        writer = (site, "activation" if index < 0 else "head", None if index < 0 else int(index))
        acting = {(s, f) for s in behind for f in range(FEATURES) if pooled.get(fp.Node(s, "feature", f, 6, s), 0)}
        sizes = {(s, f): abs(loop(small, by_name[s], writer, f, [6])[0]) for s, f in acting}
        largest = sorted((key for key in sizes if sizes[key] > 1e-12), key=lambda key: -sizes[key])[:7]
        lines = found[(found["site"] == site) & (found["index"].fillna(-1) == index)]
        assert list(zip(lines["sae"], lines["feature"], strict=True)) == largest
        assert lines["recovery"].nunique() == 1
    for _, line in found.iterrows():
        assert line["feature_degradation"] == pooled[fp.Node(line["sae"], "feature", line["feature"], 6, line["sae"])]
    component = dict(zip(components.nodes, components.pooled("recovery"), strict=True))
    assert found["recovery"].iloc[0] == component[fp.Node("blocks.2.hook_mlp_out", "activation", None, 6)]


class Linear(torch.nn.Module):
    """Features that are linear in the activation, plus a constant."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W_enc, self.W_dec = (torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
                                  for shape in ((WIDTH, 8), (8, WIDTH)))  # fmt: skip
        self.b_enc = torch.nn.Parameter(torch.randn(8, generator=generator, dtype=torch.float64))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W_enc + self.b_enc

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.W_dec


def linear(hook: str, seed: int = 0) -> Any:
    return fp.dictionaries.adapt(Linear(seed), hook, d_in=WIDTH, name=f"linear of {hook}", linear=True)


@torch.no_grad()
def along_encoder(small: Small, found: Any, hook: str, weights: torch.Tensor, token: int) -> None:
    """Every contribution is the change of what is written, times the encoder's weights, with the sign of the feature's own."""
    assert len(found)
    for _, line in found.iterrows():
        writer = (line["site"], line["kind"], None if line["kind"] != "head" else int(line["index"]))
        deltas = [
            (written(small.model, oracle.activations(small.model, clean[None]), *writer)
             - written(small.model, oracle.activations(small.model, corrupted[None]), *writer))[0, token]
            for clean, corrupted in zip(small.clean, small.corrupted, strict=True)
        ]  # fmt: skip
        stream = [[oracle.activations(small.model, run[None])[hook][0, token] for run in both]
                  for both in zip(small.clean, small.corrupted, strict=True)]  # fmt: skip
        w = weights[:, line["feature"]]
        signs = [((clean - corrupted) @ w).sign() for clean, corrupted in stream]
        expected = float(sum(sign * (delta @ w) for sign, delta in zip(signs, deltas, strict=True)) / len(deltas))
        assert line["contribution"] == pytest.approx(expected, abs=1e-10)


def test_a_linear_encoder_gives_the_change_times_its_weights(small: Small) -> None:
    sae, pairs = linear(TOPK), pairs_of(small)
    features = ranked(small.model, sae, pairs, ["late"])
    found = compare(features, heads_and_mlps(features, ["late"]), model=small.model, saes=sae, pairs=pairs)
    along_encoder(small, found.through, TOPK, sae.coder.W_enc, 5)
    along_encoder(small, found.writers, TOPK, sae.coder.W_enc, 5)


def test_a_relu_that_is_on_everywhere_gives_the_change_times_its_weights(small: Small) -> None:
    sae = small.at(PRE)
    before = sae.b_enc.detach().clone()
    try:
        with torch.no_grad():
            sae.b_enc += 100
        pairs = pairs_of(small)
        features = ranked(small.model, sae, pairs, ["late"])
        found = compare(features, heads_and_mlps(features, ["late"]), model=small.model, saes=sae, pairs=pairs)
        along_encoder(small, found.through, PRE, sae.W_enc, 5)
        along_encoder(small, found.writers, PRE, sae.W_enc, 5)
    finally:
        with torch.no_grad():
            sae.b_enc.copy_(before)


def shares_add_up(model: Any, pairs: fp.Pairs, hooks: list[str], heads: int = 4, positions: Any = "all") -> Any:
    saes = [linear(hook, seed) for seed, hook in enumerate(hooks)]
    features = ranked(model, saes, pairs, positions)
    components = heads_and_mlps(features, ["all"] if positions == "all" else positions, heads=heads)
    found = compare(features, components, model=model, saes=saes, pairs=pairs, top=200)
    sums = found.writers.groupby(["sae", "feature", "position"])["share"].sum()
    assert len(sums) == len(features.where(kind="feature"))
    np.testing.assert_allclose(sums, 1, atol=1e-9)
    assert set(found.writers["sae"]) == {sae.name for sae in saes}
    return found


def test_shares_of_all_writers_add_up_to_one(small: Small) -> None:
    """The law for linear encoders, at every kind of hook of the stream and the first and the last place of it."""
    found = shares_add_up(small.model, pairs_of(small), [START, PRE, MID, TOPK, "blocks.0.hook_resid_post", POST]).writers
    count = found.groupby("sae")["site"].nunique()
    expected = {START: 1, "blocks.0.hook_resid_post": 3, PRE: 3, MID: 4, TOPK: 5, POST: 7}
    assert {name.removeprefix("linear of "): number for name, number in count.items()} == expected
    first = found[found["site"] == START]
    assert set(first["kind"]) == {"activation"}
    one = found[(found["sae"] == f"linear of {PRE}") & (found["feature"] == 0)]
    assert list(one["share"]) == sorted(one["share"], reverse=True)


def test_a_stream_that_does_not_change_is_no_writer(small: Small) -> None:
    found = shares_add_up(small.model, pairs_of(small), [PRE], positions=["late", 6]).writers
    late, last = (set(found[found["position"] == position]["site"]) for position in ("late", 6))
    assert START in late
    assert START not in last
    assert {"blocks.0.hook_mlp_out", "blocks.0.attn.hook_z"} <= last


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    **{f"bridge {name}": BRIDGES[name] for name in ("neox", "llama", "gemma2", "gemma3")},
    **{f"hooked {name}": HOOKED[name] for name in ("neox", "gemma2", "attention only")},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shares_add_up_to_one_on_other_architectures(name: str) -> None:
    """With a norm behind attention heads do not add up: there attention is one writer, and the comparison says so."""
    model, tokens = ARCHITECTURES[name](), torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(2))
    corrupted = tokens.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 20
    pairs = fp.Pairs.from_tokens(tokens, corrupted, torch.tensor([3, 4]), torch.tensor([5, 6]))
    found = shares_add_up(model, pairs, [TOPK, POST], positions=[4])
    normed = "gemma" in name
    assert bool(found.written.notes) == normed
    assert ("head" in set(found.writers["kind"])) == (not normed)
    assert ("blocks.0.hook_attn_out" in set(found.writers["site"])) == normed
    assert ("head" in set(found.through["kind"])) == (not normed)
    assert ("do not write to the residual stream individually" in repr(found)) == normed
    assert ("blocks.0.hook_mlp_out" in set(found.writers["site"])) == ("only" not in name)


class Mixed(Linear):
    """Features that look at earlier positions."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + 0.5 * x.cumsum(1)) @ self.W_enc


def test_an_encoder_that_looks_at_earlier_positions_sees_them(bridge: Small) -> None:
    coder, pairs = Mixed(0), pairs_of(bridge)
    sae = fp.dictionaries.adapt(coder, TOPK, d_in=WIDTH, linear=True)
    features = ranked(bridge.model, sae, pairs, [4])
    found = compare(features, heads_and_mlps(features, [4]), model=bridge.model, saes=sae, pairs=pairs).through
    assert len(found)
    for _, line in found.iterrows():
        writer = (line["site"], line["kind"], None if line["kind"] != "head" else int(line["index"]))
        expected = loop(bridge, sae, writer, line["feature"], [4])
        assert (line["contribution"], line["change"]) == pytest.approx(expected, abs=1e-10)


def test_shorter_pairs_have_no_such_index() -> None:
    """Contributions at a position that only one of two pairs has are half of that pair's."""
    small = small_hooked()
    long, short = (fp.Pairs.from_tokens(small.clean[:1, :n], small.corrupted[:1, :n], small.correct[:1], small.wrong[:1])
                   for n in (7, 4))  # fmt: skip
    sae = linear(TOPK)

    def contribution(pairs: fp.Pairs) -> float:
        features = ranked(small.model, sae, pairs, "each")
        components = heads_and_mlps(features, [6])
        found = compare(features, components, model=small.model, saes=sae, pairs=pairs, top=30).through
        return row(found, site="blocks.1.hook_mlp_out", feature=2)["contribution"]

    assert contribution(fp.Pairs((*long, *short))) == pytest.approx(contribution(long) / 2, abs=1e-12)


def test_noising_alone_ranks_by_degradation(bridge: Small) -> None:
    sae, pairs = bridge.at(TOPK), pairs_of(bridge)
    features = ranked(bridge.model, sae, pairs, ["late"], directions=["noising"])
    components = heads_and_mlps(features, ["late"])
    gap = (features.clean - features.corrupted).mean() / 10
    components = replace(components, noised=components.clean[components.pair] - components.row % 7 * gap)
    found = compare(features, components, model=bridge.model, saes=sae, pairs=pairs, top=3)
    assert "recovery" not in found.through.columns
    best = features.top(3, by="degradation")
    assert list(dict.fromkeys(found.writers["feature"])) == [node.index for node in best.nodes]
    assert list(dict.fromkeys(found.through["site"])) == [
        "blocks.0.hook_mlp_out",
        "blocks.1.hook_mlp_out",
        "blocks.0.attn.hook_z",
    ]
    assert list(dict.fromkeys(found.through["degradation"].round(12))) == [0.6, 0.3]


def test_effects_that_were_not_measured_are_unknown(bridge: Small) -> None:
    """Components of one layer and features of one position were ranked."""
    sae, pairs = bridge.at(TOPK), pairs_of(bridge)
    features = ranked(bridge.model, sae, pairs, ["late"])
    components = heads_and_mlps(features, ["late", 6], layers=1)
    found = compare(features, components, model=bridge.model, saes=sae, pairs=pairs, top=20)
    known = found.writers["site"].str.startswith("blocks.0")
    assert found.writers[known]["recovery"].notna().all()
    assert found.writers[~known]["recovery"].isna().all()
    assert set(found.through["position"]) == {"late", 6}
    assert list(found.through["feature_recovery"].isna()) == list(found.through["position"] == 6)


def test_other_models_saes_and_pairs_are_refused(bridge: Small) -> None:
    sae, pairs = bridge.at(PRE), pairs_of(bridge)
    features = ranked(bridge.model, [sae, bridge.at("blocks.1.hook_attn_out")], pairs)
    components = heads_and_mlps(features, ["all"])
    for options, message in (
        ({"pairs": pairs[:2]}, "the 2 pairs differ from those of the tables"),
        ({"model": small_hooked().model}, "weights differ from those of the tables"),
        ({"saes": bridge.at(TOPK)}, "'blocks.2.hook_resid_pre' differs from that of the effects"),
        ({"saes": standard(PRE, 99)}, "'blocks.1.hook_resid_pre' differs from that of the effects"),
        ({"saes": linear(PRE)}, "differs from that of the effects"),
        (
            {"saes": bridge.at("blocks.1.hook_attn_out")},
            "the SAEs are at 'blocks.1.hook_attn_out': expected one SAE of the residual",
        ),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            compare(features, components, **{"model": bridge.model, "saes": sae, "pairs": pairs, **options})


def test_dictionaries_over_several_layers_are_left_out(bridge: Small) -> None:
    pairs, coordinates = pairs_of(bridge), torch.eye(WIDTH).repeat(2, 1, 1)
    hooks, nothing = ["blocks.0.hook_resid_post", POST], torch.zeros(2, WIDTH)
    crosscoder = fp.dictionaries.Crosscoder(coordinates, coordinates, nothing[0], nothing, hook=hooks)
    saes = [crosscoder, bridge.at(PRE)]
    features = ranked(bridge.model, saes, pairs)
    found = compare(features, heads_and_mlps(features, ["all"]), model=bridge.model, saes=saes, pairs=pairs)
    assert set(found.writers["sae"]) == {PRE}


@pytest.mark.parametrize("origin", ["noise", "ablation"])
def test_noise_and_ablations_are_refused_where_prompts_are_run(bridge: Small, origin: str) -> None:
    features = ranked(bridge.model, bridge.at(PRE), pairs_of(bridge))
    noisy = replace(features, metadata={**features.metadata, origin: {"scale": 3}})
    with pytest.raises(fp.FeatpatchError, match="corrupted by noise"):
        compare(noisy, heads_and_mlps(noisy, ["all"]), model=bridge.model, saes=bridge.at(PRE), pairs=pairs_of(bridge))


def test_heads_behind_a_norm_are_told_in_half_precision_too() -> None:
    for name, by_head in (("gemma2", False), ("llama", True), ("gpt2", True)):
        model = BRIDGES[name]().to(torch.bfloat16)
        pairs = fp.Pairs.from_tokens(*(torch.tensor([[1, 2, n, 4, 5]]) for n in (3, 6)), torch.tensor([7]), torch.tensor([8]))
        assert [weight is not None for weight in Writers.of(wrap(model), pairs[0]).weights] == [by_head] * 3


def test_features_with_exactly_no_effect_carry_nothing(bridge: Small) -> None:
    """After the last block a position that isn't read has no effect, though its features change."""
    saes, pairs = [bridge.at(TOPK), bridge.at(POST)], pairs_of(bridge)
    features = ranked(bridge.model, saes, pairs, ["change"])
    found = compare(features, heads_and_mlps(features, ["change"]), model=bridge.model, saes=saes, pairs=pairs)
    assert POST in {node.sae for node in features.where(kind="feature").nodes}
    assert set(found.through["sae"]) == {TOPK}


def test_real_components_have_the_effects_of_the_whole_sites(small: Small) -> None:
    """Whole activations are the same patches in both tables, and a table of heads goes through W_O as in the oracle."""
    saes, pairs = [small.at(PRE), small.at(MID), small.at(TOPK)], pairs_of(small)
    features = ranked(small.model, saes, pairs, ["late", "change"])
    components = fp.rank_components(
        small.model, pairs, sites=["resid_pre", "resid_mid", "mlp_out", "z", "q"], positions=["late", "change"], progress=False
    )
    found = compare(features, components, model=small.model, saes=saes, pairs=pairs, top=4)
    cells = found.table[(found.table["kind"] == "activation") & found.table["sae"].notna()]
    assert len(cells) == found.agreement["recovery"].points == 6
    for effect in ("recovery", "degradation"):
        np.testing.assert_allclose(cells[effect], cells[f"{effect}_activation"], atol=1e-10)
    able = {"blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"}
    nodes = [node for node in components.top(100, kind=None).nodes if node.site in able][:4]
    told = found.through[list(NAMES)].drop_duplicates().astype(object).where(lambda frame: frame.notna(), None)
    assert [tuple(line) for line in told.itertuples(index=False)] == [
        tuple(getattr(node, name) for name in NAMES) for node in nodes
    ]


def test_a_stream_that_blocks_do_not_add_to_is_refused() -> None:
    small = small_hooked()
    sae, pairs = small.at(TOPK), pairs_of(small)
    features = ranked(small.model, sae, pairs)
    small.model.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda x, hook: 1.5 * x)
    with pytest.raises(
        fp.FeatpatchError, match="what layers write and the residual stream at 'blocks.2.hook_resid_pre' differ by"
    ):
        compare(features, heads_and_mlps(features, ["all"]), model=small.model, saes=sae, pairs=pairs)


def test_without_components_that_write_through_is_empty(bridge: Small) -> None:
    sae, pairs = bridge.at(TOPK), pairs_of(bridge)
    features = ranked(bridge.model, sae, pairs)
    components = heads_and_mlps(features, ["all"]).where(site="blocks.1.hook_resid_pre")
    found = compare(features, components, model=bridge.model, saes=sae, pairs=pairs, top=2)
    assert not len(found.through)
    assert found.writers["feature"].nunique() == 2
    assert list(found.through.columns) == list(found.writers.columns)


def test_results_of_heads_are_heads(bridge: Small) -> None:
    sae, pairs = bridge.at(TOPK), pairs_of(bridge)
    features = ranked(bridge.model, sae, pairs, ["late"])
    heads = heads_and_mlps(features, ["late"]).where(kind="head").where(site="blocks.1.attn.hook_z")
    results = replace(heads, nodes=tuple(replace(node, site="blocks.1.attn.hook_result") for node in heads.nodes))
    one, other = (compare(features, t, model=bridge.model, saes=sae, pairs=pairs) for t in (heads, results))
    assert len(one.through)
    assert one.through.equals(other.through)


def test_plot_shows_every_cell_with_escaped_names_and_the_diagonal() -> None:
    features, components = by_hand()
    nodes = {node: replace(node, sae="<b>one</b>" if node.sae == "one" else node.sae) for node in features.nodes}
    figure = compare(replace(features, nodes=tuple(nodes.values())), components).plot()
    assert [trace.name for trace in figure.data] == ["recovery", "degradation"]
    assert list(figure.data[0].x) == pytest.approx([0.5, -0.2])
    assert list(figure.data[0].y) == pytest.approx([0.9, -0.3])
    assert list(figure.data[1].x) == pytest.approx([1.0, -0.4])
    assert figure.data[0].text[0] == "blocks.1.hook_resid_pre @ S2 (&lt;b&gt;one&lt;/b&gt;)"
    (line,) = figure.layout.shapes
    assert (line.x0, line.y0, line.x1, line.y1) == pytest.approx((-0.4, -0.4, 1.0, 1.0))
    figure.to_html()
    empty = compare(features, components.where(kind="head")).plot()
    assert list(empty.data[0].x) == []


def test_shown_are_agreement_and_the_top_of_both(bridge: Small) -> None:
    features, components = by_hand()
    nodes = tuple(replace(node, sae="<b>" if node.sae == "one" else node.sae) for node in features.nodes)
    found = compare(replace(features, nodes=nodes), components)
    text, html = repr(found), found._repr_html_()
    for shown in (text, html):
        assert "Spearman" in shown
        assert shown.index("blocks.2.attn.hook_z") > 0
        assert "through" not in shown
    assert text.index("  0.7 ") < text.index("  0.5 ") < text.index("  0.4 ")
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    sae, pairs = bridge.at(TOPK), pairs_of(bridge)
    table = ranked(bridge.model, sae, pairs)
    more = compare(table, heads_and_mlps(table, ["all"]), model=bridge.model, saes=sae, pairs=pairs)
    for shown in (repr(more), more._repr_html_()):
        assert "through" in shown
        assert "writers" in shown
        assert "contribution" in shown
