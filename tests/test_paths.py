"""Path patching against plain hooks on the whole model, and what must hold of paths."""

import contextlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import path_oracle
import pytest
import torch
from architectures import BRIDGES, FAMILIES, HOOKED, OTHERS
from small import LAYERS, Small, small_hooked, standard
from test_sets import pairs_of

import featpatch as fp
from featpatch.errors import FeatpatchWarning
from featpatch.patching.paths import path_study

Z, MLP = "blocks.{}.attn.hook_z", "blocks.{}.hook_mlp_out"
OPTIONS: dict[str, Any] = {"progress": False}
ROUTES = "direct", "through_mlps", "through_attention", "all"


def nodes_of(small: Small, names: list[str], count: int = 3) -> list[fp.Node]:
    """Features that differ, and the error, of dictionaries by name."""
    saes = [sae for sae in small.saes if name_of(sae) in names]
    table = fp.rank_features(small.model, saes, pairs_of(small), **OPTIONS)
    kept = [table.where(kind="feature", sae=name).top(count).nodes for name in names]
    return [node for of_sae in kept for node in of_sae] + list(table.where(kind="error").nodes)


def name_of(sae: Any) -> str:
    reads, writes = oracle.hooks(sae)
    return reads if reads == writes else f"{reads} -> {writes}"


def end(small: Small, node: fp.Node) -> path_oracle.End:
    if node == fp.LOGITS:
        return path_oracle.whole(f"blocks.{LAYERS - 1}.hook_resid_post")
    if node.kind == "activation":
        return path_oracle.whole(node.site)
    if node.kind == "head":
        return path_oracle.head(node.site, node.index)
    sae = next(sae for sae in small.saes if name_of(sae) == node.sae)
    return path_oracle.error(sae) if node.kind == "error" else path_oracle.feature(sae, node.index)


def expected(small: Small, edge: fp.Edge, slot: int, direction: str, route: str) -> float:
    runs = small.corrupted[slot], small.clean[slot]
    base, source = runs if direction == "denoising" else runs[::-1]
    sender, receiver = end(small, edge.sender), end(small, edge.receiver)
    logits = path_oracle.path_patch(
        small.model,
        base,
        source,
        sender,
        receiver,
        freeze_mlps=route in ("direct", "through_attention") and not getattr(small.model.cfg, "attn_only", False),
        freeze_attention=route in ("direct", "through_mlps"),
    )
    return oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.parametrize("route", ROUTES)
def test_every_path_equals_plain_hooks(small: Small, route: str) -> None:
    """Features, errors, heads, MLPs, whole sites; into features, errors, queries, keys, values, heads, MLPs and the logits."""
    transcoder = name_of(small.saes[-1])
    early = nodes_of(
        small, ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"], 1
    )
    late = nodes_of(small, ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", transcoder, "blocks.1.attn.hook_z"], 2)
    senders = [*early, fp.Node(Z.format(0), "head", 1), fp.Node(Z.format(1), "head", 2), fp.Node(MLP.format(0), "activation"),
               fp.Node("blocks.1.hook_resid_pre", "activation")]  # fmt: skip
    inside = [fp.Node(f"blocks.{layer}.attn.hook_{name}", "head", 3) for layer in (1, 2) for name in "qkvz"]
    receivers = [*late, *inside, fp.Node(MLP.format(1), "activation"), fp.Node(MLP.format(2), "activation"), fp.LOGITS]
    effects = fp.rank_paths(
        small.model, pairs_of(small), saes=small.saes, senders=senders, receivers=receivers, route=route, **OPTIONS
    )
    assert {type(node) for node in effects.nodes} == {fp.Edge}
    assert {node.receiver for node in effects.nodes} == set(receivers)
    assert {node.sender for node in effects.nodes} == set(senders)
    moved, looked_at = 0, range(0, len(effects.row), 31)
    for entry in looked_at:
        edge, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        for direction, found in (("denoising", effects.denoised[entry]), ("noising", effects.noised[entry])):
            true = expected(small, edge, slot, direction, route)
            base = effects.corrupted[slot] if direction == "denoising" else effects.clean[slot]
            moved += abs(true - base) > 1e-6
            assert found == pytest.approx(true, abs=1e-10), (str(edge), direction)
    assert moved > len(looked_at)


def test_positions(small: Small) -> None:
    """A sender at its position alone, a receiver where it is patched."""
    sae, receiver = small.at("blocks.0.hook_resid_pre"), small.at("blocks.2.hook_resid_post")
    index = fp.rank_features(small.model, sae, pairs_of(small), **OPTIONS).top(1).nodes[0].index
    sender = fp.Node("blocks.0.hook_resid_pre", "feature", index, 3, "blocks.0.hook_resid_pre")
    ends = [fp.Node(receiver.cfg.metadata.hook_name, "feature", n, 3, receiver.cfg.metadata.hook_name) for n in range(6)]
    effects = fp.rank_paths(small.model, pairs_of(small), saes=[sae, receiver], senders=[sender], receivers=ends, **OPTIONS)
    assert len(effects)
    for entry, edge in enumerate(effects.nodes[row] for row in effects.row):
        slot = int(effects.pair[entry])
        base, source = small.corrupted[slot], small.clean[slot]
        starts = path_oracle.feature(sae, index, [3])
        stops = path_oracle.feature(receiver, edge.receiver.index, [3])
        logits = path_oracle.path_patch(small.model, base, source, starts, stops, freeze_mlps=True)
        found = oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))
        assert effects.denoised[entry] == pytest.approx(found, abs=1e-9)


def test_a_whole_receiver_takes_its_value_where_it_stands(bridge: Small) -> None:
    sender = fp.Node("blocks.0.hook_mlp_out", "activation")
    receivers = [fp.Node("blocks.2.hook_mlp_out", "activation", None, position) for position in (3, 6)]
    study, _ = path_study(bridge.model, pairs_of(bridge), None, [sender], receivers, "direct", directions=["denoising"])
    for of_pairs in study.work():
        for block in chain(*of_pairs):
            (deltas,) = block.deltas.values()
            assert set(deltas.position.tolist()) == {block.nodes[0].position}


@pytest.mark.parametrize("slow", [False, True])
def test_the_whole_way_into_a_cut_is_the_whole_effect(small: Small, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual stream after a layer, or the logits, once everything between is recomputed; by either engine."""
    pairs, site = pairs_of(small), "blocks.0.hook_resid_pre"
    features = fp.rank_features(small.model, small.at(site), pairs, positions=[3], **OPTIONS)
    features = features.take([row for row, node in enumerate(features.nodes) if (node.index or 0) < 6])
    heads = fp.rank_components(small.model, pairs, sites=["z", "mlp_out"], layers=[0], positions=[3, "all"], **OPTIONS)
    assert len({node.kind for node in (*features.nodes, *heads.nodes)}) == 5
    if slow:
        monkeypatch.setattr("featpatch.engine.path._disagreement", lambda *_: 2.0)
    cut = ["logits", *(fp.Node(f"blocks.{layer}.hook_resid_post", "activation") for layer in (0, 1))]
    for table, saes in ((features, small.at(site)), (heads, None)):
        run: dict[str, Any] = {"saes": saes, "senders": table, "receivers": cut, "route": "all", **OPTIONS}
        with pytest.warns(fp.SlowPathWarning) if slow else contextlib.nullcontext():
            paths = fp.rank_paths(small.model, pairs, **run)
        assert len(paths) == len(table) * len(cut)
        for effect in ("recovery", "degradation"):
            whole = dict(zip(table.nodes, table.pooled(effect), strict=True))
            through = [whole[edge.sender] for edge in paths.nodes]
            np.testing.assert_allclose(paths.pooled(effect), through, atol=1e-10)
            assert np.abs(through).max() > 0.1


def test_only_attention_moves_what_is_sent_to_another_position(small: Small) -> None:
    """A sender at position 3 into a receiver at position 5, by each route; the table says which."""
    sender, receiver = fp.Node("blocks.0.hook_resid_pre", "activation", None, 3), fp.Node(MLP.format(1), "activation", None, 5)
    moved = {}
    for route in ROUTES:
        for method in ("exact", "atp"):
            run: dict[str, Any] = {"senders": [sender], "receivers": [receiver, "logits"], "route": route, "method": method}
            table = fp.rank_paths(small.model, pairs_of(small), **run, **OPTIONS)
            moved[route, method] = np.abs(table.pooled("recovery")).tolist()
            assert (table.route, set(table.to_pandas()["route"])) == (route, {route})
            assert f"{table.value} effects of paths (route {route!r}) over 3 pairs, 2 rows" in repr(table)
    for (route, _), sizes in moved.items():
        assert min(sizes) > 1e-6 if route in ("through_attention", "all") else max(sizes) < 1e-14


def test_receivers_that_were_off_switch_on(small: Small) -> None:
    """The receiver's new value is put in, also where it was 0 in the base run."""
    sae, receiver = small.at("blocks.0.hook_resid_pre"), small.at("blocks.2.hook_resid_pre")
    name = receiver.cfg.metadata.hook_name
    senders = [fp.Node("blocks.0.hook_resid_pre", "activation")]
    ends = [fp.Node(name, "feature", n, 3, name) for n in range(24)]
    effects = fp.rank_paths(small.model, pairs_of(small), saes=[sae, receiver], senders=senders, receivers=ends, **OPTIONS)
    moved = 0
    for way, tokens, base, patched in (
        ("denoising", small.corrupted, effects.corrupted, effects.denoised), ("noising", small.clean, effects.clean, effects.noised)
    ):  # fmt: skip
        with torch.no_grad():
            off = receiver.encode(small.model.run_with_cache(tokens)[1][name])[:, 3] == 0
        for entry, pair in enumerate(effects.pair):
            edge = effects.nodes[effects.row[entry]]
            if off[pair, edge.receiver.index] and patched[entry] != base[pair]:
                moved += 1
                assert patched[entry] == pytest.approx(expected_at(small, receiver, edge, int(pair), way), abs=1e-9)
    assert moved


def expected_at(small: Small, receiver: Any, edge: fp.Edge, slot: int, way: str) -> float:
    runs = small.corrupted[slot], small.clean[slot]
    base, source = runs if way == "denoising" else runs[::-1]
    starts, stops = path_oracle.whole(edge.sender.site), path_oracle.feature(receiver, edge.receiver.index, [3])
    logits = path_oracle.path_patch(small.model, base, source, starts, stops, freeze_mlps=True)
    return oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))


def test_a_table_of_paths_is_a_table(small: Small, tmp_path: Path) -> None:
    """Saved, loaded, shown and resumed from its journal."""
    senders = [fp.Node(Z.format(0), "head", 0), fp.Node(MLP.format(0), "activation")]
    receivers = ["logits", fp.Node("blocks.1.attn.hook_k", "head", 1)]
    run = {"senders": senders, "receivers": receivers, **OPTIONS}
    effects = fp.rank_paths(small.model, pairs_of(small), journal=tmp_path / "journal", **run)
    again = fp.rank_paths(small.model, pairs_of(small), journal=tmp_path / "journal", **run)
    np.testing.assert_array_equal(again.denoised, effects.denoised)
    loaded = fp.Effects.load(effects.save(tmp_path / "paths.safetensors"))
    assert loaded.nodes == effects.nodes
    frame = loaded.top(4).to_pandas()
    assert set(frame["sender"]) == {str(node) for node in senders}
    assert set(frame["receiver"]) == {"logits activation @ all", "blocks.1.attn.hook_k head 1 @ all"}
    assert effects.ranked.all()
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep"):
        fp.rank_paths(small.model, pairs_of(small), journal=tmp_path / "journal", route="through_mlps", **run)
    page = fp.report(effects, tmp_path / "paths.html").read_text()
    assert "blocks.1.attn.hook_k" in page
    assert f"{len(effects)} edges (route &#39;direct&#39;)" in page
    estimates = fp.rank_paths(small.model, pairs_of(small), method="atp", **{**run, "route": "all"})
    with pytest.raises(fp.FeatpatchError, match="route is 'all' for the estimates and 'direct' for the exact effects"):
        fp.calibrate(estimates, effects)


def test_heads_into_inputs_as_transformer_lens_splits_them() -> None:
    """A head's result, added to another head's query, key or value input by TransformerLens' own split inputs."""
    small = small_hooked()
    model = small.model
    sender = fp.Node(Z.format(0), "head", 1)
    receivers = [fp.Node(f"blocks.1.attn.hook_{letter}", "head", 2) for letter in "qkv"]
    effects = fp.rank_paths(model, pairs_of(small), senders=[sender], receivers=receivers, directions=["denoising"], **OPTIONS)
    model.set_use_split_qkv_input(True)
    with torch.no_grad():
        z = [model.run_with_cache(tokens)[1][Z.format(0)][:, :, 1] for tokens in (small.clean, small.corrupted)]
        change = (z[0] - z[1]) @ model.blocks[0].attn.W_O[1]

        def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.cat([x[:, :, :2], x[:, :, 2:3] + change[:, :, None], x[:, :, 3:]], 2)

        for entry, edge in enumerate(effects.nodes[row] for row in effects.row):
            hook = f"blocks.1.hook_{edge.receiver.site[-1]}_input"
            logits = model.run_with_hooks(small.corrupted, fwd_hooks=[(hook, add)])
            slot = int(effects.pair[entry])
            true = oracle.logit_diff(logits[[slot]], int(small.correct[slot]), int(small.wrong[slot]))
            assert effects.denoised[entry] == pytest.approx(true, abs=1e-9)


def test_errors(small: Small) -> None:
    head, mlp = fp.Node(Z.format(1), "head", 0), fp.Node(MLP.format(1), "activation")
    for changed, message in (
        ({"senders": ["logits"]}, "'logits' is among the senders: expected it only among the receivers"),
        ({"senders": []}, "senders=\\[\\]: expected a list of nodes"),
        ({"senders": [mlp], "receivers": [fp.Node("blocks.1.attn.hook_q", "head", 0)]}, "no receiver is downstream of a sender"),
        ({"senders": [fp.Node("blocks.0.attn.hook_q", "head", 0)]}, "does not write to the residual stream"),
        ({"senders": [fp.Node("blocks.1.hook_resid_pre", "feature", 3)]}, "is of the SAE .*, and no SAEs were passed: .* pass saes="),
        ({"receivers": [fp.Node("blocks.2.attn.hook_q", "head", 9)]}, "expected a head of 0 to 3"),
        ({"receivers": [fp.Node("blocks.2.attn.hook_pattern", "head", 0)]}, "expected a feature or error of"),
        ({"receivers": [fp.Node("blocks.2.hook_resid_pre", "feature", 99, "all", "blocks.2.hook_resid_pre")],
          "saes": small.at("blocks.2.hook_resid_pre")}, "expected a feature of 0 to 23"),
        ({"senders": [fp.Node(Z.format(0), "head", 99)]}, "expected a head of 0 to 3"),
        ({"senders": [fp.Node(MLP.format(0), "activation", None, "all", "invented")]}, "names the SAE 'invented'"),
        ({"receivers": "abc"}, "receivers='abc': expected a list of nodes"),
        ({"route": "around"}, "route='around': expected one of direct, through_mlps, through_attention, all"),
        ({"metric": "sequence_log_prob"}, "is not supported for paths, .* expected one of logit_diff"),
    ):  # fmt: skip
        options: dict[str, Any] = {"senders": [head], "receivers": ["logits"], "saes": None, **OPTIONS, **changed}
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.rank_paths(small.model, pairs=pairs_of(small), **options)


def test_a_sender_that_never_changes_is_pointed_out(bridge: Small) -> None:
    """Position 0 is before the first difference."""
    senders = [fp.Node("blocks.0.attn.hook_z", "head", 0, position) for position in (0, 6)]
    options: dict[str, Any] = {"receivers": ["logits"], "progress": False}
    with pytest.warns(FeatpatchWarning, match=r"no rows, because .* the same at blocks.0.attn.hook_z head 0 @ 0: expected"):
        assert not len(fp.rank_paths(bridge.model, pairs_of(bridge), senders=senders[:1], **options))
    paths = fp.rank_paths(bridge.model, pairs_of(bridge), senders=senders, **options)
    assert [edge.sender for edge in paths.nodes if isinstance(edge, fp.Edge)] == senders[1:]


def test_hooks_of_the_user_are_refused() -> None:
    small = small_hooked()
    small.model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x * 2)
    with pytest.raises(fp.FeatpatchError, match="hooks are attached"):
        fp.rank_paths(small.model, pairs_of(small), senders=[fp.Node(MLP.format(0), "activation")], receivers=["logits"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("kind", "name"), FAMILIES)
@pytest.mark.usefixtures("wide")
def test_architectures(kind: str, name: str, route: str) -> None:
    """Parallel blocks, shared keys, norms behind what is added, no MLPs, no norms."""
    compare_with_hooks((BRIDGES if kind == "bridge" else HOOKED)[name](), route)


@pytest.mark.usefixtures("wide")
@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
def test_one_norm_over_the_queries_of_all_heads() -> None:
    """In OLMo 2 the query or key of one head changes those of all others."""
    compare_with_hooks(OTHERS["olmo2"](), "direct")


def compare_with_hooks(model: Any, route: str) -> None:
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    mlps = not getattr(model.cfg, "attn_only", False)
    senders = [fp.Node(Z.format(0), "head", 1), *([fp.Node(MLP.format(0), "activation")] if mlps else [])]
    keys = model.hook_dict and model.run_with_cache(small.clean)[1]["blocks.1.attn.hook_k"].shape[2]
    receivers = [
        fp.Node(f"blocks.1.attn.hook_{letter}", "head", n) for letter, n in (("q", 3), ("k", keys - 1), ("v", 0), ("z", 2))
    ]
    receivers += [fp.LOGITS, *([fp.Node(MLP.format(layer), "activation") for layer in (0, 2)] if mlps else [])]
    run: dict[str, Any] = {"senders": senders, "receivers": receivers, "route": route, "directions": ["denoising"], **OPTIONS}
    effects = fp.rank_paths(model, pairs_of(small, [0]), **run)
    assert len(effects)
    for entry, edge in enumerate(effects.nodes[row] for row in effects.row):
        assert effects.denoised[entry] == pytest.approx(expected(small, edge, 0, "denoising", route), abs=1e-9), str(edge)


def test_many_paths_are_screened(small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is run has the values of the full sweep; the audit bounds the others; the cost is said before."""
    senders = [fp.Node(Z.format(layer), "head", n) for layer in (0, 1) for n in range(4)]
    receivers = [fp.Node(f"blocks.2.attn.hook_{letter}", "head", n) for letter in "qkv" for n in range(4)]
    run: dict[str, Any] = {"senders": senders, "receivers": receivers, "progress": False}
    whole = fp.rank_paths(small.model, pairs_of(small), **run)
    some = fp.rank_paths(small.model, pairs_of(small), screen=fp.Screen(k=20, audit=10), **run)
    assert len(some) == 30
    assert some.value == "exact"
    for node, value in zip(some.nodes, some.pooled("recovery"), strict=True):
        assert value == pytest.approx(whole.pooled("recovery")[whole.nodes.index(node)], abs=1e-9)
    assert some.audit(top=10).recall < 1
    all_run = fp.rank_paths(small.model, pairs_of(small), screen=fp.Screen(k=20, audit=76), **run)
    assert all_run.audit(top=10).recall == 1
    assert some.rows_ranked == len(whole)
    monkeypatch.setattr("featpatch.ranking.rank.BUDGET", 50)
    monkeypatch.setattr("featpatch.ranking.rank.MANY", fp.Screen(k=20, audit=10))
    automatic = fp.rank_paths(small.model, pairs_of(small), **{**run, "progress": True})
    assert automatic.nodes == some.nodes
    assert "96 paths in 3 pairs and 2 directions: screened by gradient estimates" in capsys.readouterr().err
    with pytest.raises(fp.FeatpatchError, match="method='some': expected 'exact', one of atp"):
        fp.rank_paths(small.model, pairs_of(small), method="some", **run)


@pytest.mark.parametrize("letter", ["q", "k", "v", "z"])
def test_heads_at_one_position(small: Small, letter: str) -> None:
    """The query, key or value itself takes its new value there, whoever sees it."""
    receiver = fp.Node(f"blocks.1.attn.hook_{letter}", "head", 2, 4)
    run: dict[str, Any] = {
        "senders": [fp.Node(Z.format(0), "head", 1)],
        "receivers": [receiver],
        "directions": ["denoising"],
        **OPTIONS,
    }
    effects = fp.rank_paths(small.model, pairs_of(small), **run)
    for entry, slot in enumerate(effects.pair):
        starts, stops = path_oracle.head(Z.format(0), 1), path_oracle.head(receiver.site, 2, [4])
        logits = path_oracle.path_patch(small.model, small.corrupted[slot], small.clean[slot], starts, stops, freeze_mlps=True)
        true = oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))
        assert effects.denoised[entry] == pytest.approx(true, abs=1e-9)
    estimate = fp.rank_paths(small.model, pairs_of(small), method="atp", **run)
    assert np.corrcoef(estimate.denoised - estimate.corrupted, effects.denoised - effects.corrupted)[0, 1] > 0.9


@pytest.mark.extended
@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_dictionaries_that_scale(small: Small, normalisation: str) -> None:
    """A feature's change counts times the norm of the base run's token, as sender and as receiver."""
    saes = [
        standard(site, n, normalize_activations=normalisation)
        for n, site in enumerate(("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"))
    ]
    last = oracle.hooks(saes[1])[0]
    senders = fp.rank_features(small.model, saes[0], pairs_of(small), **OPTIONS).top(2).nodes
    receivers = [fp.Node(last, "feature", n, "all", last) for n in range(8)]
    run: dict[str, Any] = {"senders": list(senders), "receivers": receivers, "directions": ["noising"], **OPTIONS}
    exact = fp.rank_paths(small.model, pairs_of(small, [0]), saes=saes, **run)

    def end_of(sae: Any, index: int, share: float) -> path_oracle.End:
        def swapped(base: Any, source: Any, x: torch.Tensor) -> torch.Tensor:
            site = oracle.hooks(sae)[0]
            f_source, f_base = oracle.encode(sae, source[site]), oracle.encode(sae, base[site])
            mixed = f_base.clone()
            mixed[..., index] += share * (f_source - f_base)[..., index]
            return x + oracle.decode(sae, mixed, base[site], x) - oracle.decode(sae, f_base, base[site], x)

        return path_oracle.End(oracle.hooks(sae)[0], swapped)

    def value(edge: Any, slot: int, share: float) -> float:
        ends = end_of(saes[0], edge.sender.index, share), end_of(saes[1], edge.receiver.index, 1.0)
        logits = path_oracle.path_patch(small.model, small.clean[slot], small.corrupted[slot], *ends, freeze_mlps=True)
        return oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))

    estimate = fp.rank_paths(small.model, pairs_of(small, [0]), method="atp", saes=saes, **run)
    known = {
        (estimate.nodes[row], pair): value
        for row, pair, value in zip(estimate.row, estimate.pair, estimate.noised, strict=True)
    }
    for entry, slot in enumerate(exact.pair.tolist()):
        edge = exact.nodes[exact.row[entry]]
        assert exact.noised[entry] == pytest.approx(value(edge, slot, 1.0), abs=1e-9)
        slope = (value(edge, slot, 1e-5) - value(edge, slot, -1e-5)) / 2e-5
        if normalisation == "constant_norm_rescale":  # a layer norm's state moves with the activation, too
            assert known[edge, slot] - exact.clean[slot] == pytest.approx(slope, abs=1e-5)


def test_screening_keeps_to_its_route_and_metric(small: Small) -> None:
    senders = [fp.Node(Z.format(0), "head", n) for n in range(4)]
    receivers = [fp.Node(f"blocks.2.attn.hook_{letter}", "head", n) for letter in "qv" for n in range(4)]
    run: dict[str, Any] = {
        "senders": senders,
        "receivers": receivers,
        "route": "through_mlps",
        "metric": ["prob", "logit_diff"],
        **OPTIONS,
    }
    whole = fp.rank_paths(small.model, pairs_of(small), **run)
    some = fp.rank_paths(small.model, pairs_of(small), screen=fp.Screen(k=8, audit=4), **run)
    expected = [whole.pooled("recovery")[whole.nodes.index(node)] for node in some.nodes]
    np.testing.assert_allclose(some.pooled("recovery"), expected, atol=1e-9)
    estimate = fp.rank_paths(small.model, pairs_of(small), method="atp", **{**run, "metric": "prob"})
    first = [estimate.nodes[row] for row in np.argsort(-estimate.sizes(), kind="stable")[:8]]
    assert list(some.nodes[:8]) == first
