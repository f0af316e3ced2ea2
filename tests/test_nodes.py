"""Named nodes, alone and together, against hooked passes of the whole model and against `fp.do`."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small

import featpatch as fp

RESID, MLP, Z = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
LABELS = ({"there": 3, "pieces": (3, 4)}, {"there": 3, "pieces": (2, 3)}, {"there": 3, "pieces": (3, 4, 5)})


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, labels=LABELS)


def mixed(small: Small) -> list[fp.Node]:
    """Nodes of every kind, at hook points in all layers, in and out of order, at labels, indices and everywhere."""
    transcoder = small.saes[8]
    return [
        fp.head(1, 3, "v", "there"),
        fp.head(1, 0, position="pieces"),
        fp.head(0, 2, "q"),
        fp.head(2, 1, "k", 3),
        fp.feature(small.at(RESID), 5, "there"),
        fp.feature(small.at(RESID), 6, -4),
        fp.Node(RESID, "error", None, 5, RESID),
        fp.Node("blocks.2.hook_resid_post", "all_features", None, "pieces"),
        fp.feature(transcoder, 2, "all"),
        fp.Node("blocks.0.hook_mlp_out", "activation", None, "pieces"),
        fp.Node("blocks.2.mlp.hook_post", "neuron", 7),
        fp.Node("blocks.2.ln2.hook_normalized", "activation", None, -1),
    ]


def saes_of(small: Small) -> list[Any]:
    return [small.at(RESID), small.at("blocks.2.hook_resid_post"), small.saes[8]]


def by_do(small: Small, pair: fp.Pair, nodes: list[fp.Node], way: str, saes: Any) -> float:
    source, base = (torch.tensor([ids]) for ids in (pair.clean, pair.corrupted)[:: 1 if way == "denoising" else -1])
    with torch.no_grad(), fp.do(small.model, fp.Patch(tuple(nodes)), pair=pair, source=source, saes=saes, how="set"):
        return oracle.logit_diff(small.model(base), pair.correct[0], pair.wrong[0])


def check(small: Small, effects: fp.Effects, rows: list[list[fp.Node]], saes: Any) -> None:
    """Every value is that of `fp.do` in every pair, and a pair without an entry has that of the base run."""
    for way, found, base in (("denoising", effects.denoised, effects.corrupted), ("noising", effects.noised, effects.clean)):
        for row, nodes in enumerate(rows):
            for number, pair in enumerate(pairs_of(small)):
                entry = np.flatnonzero((effects.row == row) & (effects.pair == number))
                value = found[entry[0]] if len(entry) else base[number]
                assert value == pytest.approx(by_do(small, pair, nodes, way, saes), abs=1e-8), (way, row, number)


def test_nodes_of_every_kind_alone_and_together(small: Small, tmp_path: Path) -> None:
    nodes, saes = mixed(small), saes_of(small)
    effects = fp.rank_nodes(small.model, pairs_of(small), nodes, saes=saes, progress=False)
    assert [node.kind for node in effects.nodes] == [*(node.kind for node in nodes), "set"]
    assert [node.index for node in effects.nodes[:-1]] == [node.index for node in nodes]
    check(small, effects, [*([node] for node in nodes), nodes], saes)
    assert str(effects.nodes[-1]) == "12 nodes together @ (several)"
    assert effects.metadata["sites"] == [], "a node that is not named may have an effect"
    loaded = fp.Effects.load(effects.save(tmp_path / "nodes.safetensors"))
    assert loaded.nodes == effects.nodes
    np.testing.assert_array_equal(loaded.interval("recovery"), effects.interval("recovery"))
    assert "12 nodes together" in repr(loaded.take([12]))
    frame = loaded.to_pandas()
    assert (len(frame), list(frame["kind"])[-1]) == (13, "set")


def test_the_joint_patch_by_hand(small: Small) -> None:
    """Two heads, what the first MLP adds and a feature, with TransformerLens' hooks alone."""
    sae, pair = small.at(RESID), pairs_of(small)[1]
    nodes = [
        fp.Node("blocks.0.hook_mlp_out", "activation", None, 3),
        fp.feature(sae, 5, 3),
        fp.head(1, 3, "v", 3),
        fp.head(2, 1),
    ]
    effects = fp.rank_nodes(small.model, fp.Pairs((pair,)), nodes, saes=sae, directions=["denoising"], progress=False)
    source = oracle.activations(small.model, torch.tensor([pair.clean]))

    def of_mlp(x: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.cat([x[:, :3], source["blocks.0.hook_mlp_out"][:, 3:4], x[:, 4:]], 1)

    def of_feature(x: torch.Tensor, hook: object) -> torch.Tensor:
        new, old = (sae.encode(values)[0, 3, 5] for values in (source[RESID], x))
        x = x.clone()
        x[0, 3] += (new - old) * sae.W_dec[5]
        return x

    def of_value(v: torch.Tensor, hook: object) -> torch.Tensor:
        v = v.clone()
        v[0, 3, 3] = source["blocks.1.attn.hook_v"][0, 3, 3]
        return v

    def of_head(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[0, :, 1] = source["blocks.2.attn.hook_z"][0, :, 1]
        return z

    hooks = [
        ("blocks.0.hook_mlp_out", of_mlp), (RESID, of_feature), ("blocks.1.attn.hook_v", of_value),
        ("blocks.2.attn.hook_z", of_head),
    ]  # fmt: skip
    with torch.no_grad():
        logits = small.model.run_with_hooks(torch.tensor([pair.corrupted]), fwd_hooks=hooks)
    assert effects.denoised[effects.row == 4][0] == pytest.approx(
        oracle.logit_diff(logits, pair.correct[0], pair.wrong[0]), abs=1e-9
    )


def test_everything_together_is_the_source(small: Small) -> None:
    """Law 3 for parts: all heads and MLPs, and the embedding."""
    nodes = [fp.head(layer, head) for layer in range(3) for head in range(4)]
    nodes += [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in range(3)]
    nodes.append(fp.Node("blocks.0.hook_resid_pre", "activation"))
    effects = fp.rank_nodes(small.model, pairs_of(small), nodes, progress=False)
    np.testing.assert_allclose([effects.pooled(effect)[-1] for effect in ("recovery", "degradation")], 1, atol=1e-9)


def test_the_singles_are_those_of_the_other_rankings(small: Small) -> None:
    pairs, options = pairs_of(small), {"positions": ["there", "all"], "progress": False}
    sae = small.at(RESID)
    tables = [
        fp.rank_features(small.model, sae, pairs, **options),
        fp.rank_components(small.model, pairs, sites=["z", "k", "pattern", "mlp_out"], **options),
        fp.rank_components(small.model, pairs, sites=["pattern_entry"], positions=["there", "pieces", 6], progress=False),
    ]
    for table in tables:
        some = table.take(range(0, len(table), 7))
        found = fp.rank_nodes(small.model, pairs, some, saes=sae, together=False, progress=False)
        assert found.nodes == some.nodes
        for effect in ("recovery", "degradation"):
            np.testing.assert_allclose(found.pooled(effect), some.pooled(effect), atol=1e-12)
            np.testing.assert_allclose(found.interval(effect), some.interval(effect), atol=1e-12)


@pytest.mark.parametrize("to", ["zero", 0.3, "mean", "mean_by_position", "resample"])
def test_ablated_nodes(small: Small, to: Any) -> None:
    """Each alone as in `ablate`, and two heads of one layer together with hooks."""
    pairs, sae = pairs_of(small), small.at(RESID)
    nodes = [fp.feature(sae, 5, 3), fp.head(1, 0, "z", 3), fp.head(1, 2, "z", 3)]
    effects = fp.rank_nodes(small.model, pairs, nodes, saes=sae, to=to, progress=False)
    assert effects.directions_run() == ["degradation"]
    for site, saes in (((), sae), (("z",), None)):
        alone = fp.ablate(small.model, pairs, sites=site, saes=saes, to=to, positions=[3], progress=False)
        for node in set(nodes) & set(alone.nodes):
            value = alone.pooled("degradation")[alone.nodes.index(node)]
            assert effects.pooled("degradation")[effects.nodes.index(node)] == pytest.approx(value, abs=1e-10)
    if to in ("zero", 0.3):
        two = fp.rank_nodes(small.model, pairs, nodes[1:], to=to, progress=False)
        for number, pair in enumerate(pairs):

            def fill(z: torch.Tensor, hook: object) -> torch.Tensor:
                z = z.clone()
                z[0, 3, [0, 2]] = 0.0 if to == "zero" else to
                return z

            with torch.no_grad():
                logits = small.model.run_with_hooks(torch.tensor([pair.clean]), fwd_hooks=[(Z, fill)])
            (entry,) = np.flatnonzero((two.row == 2) & (two.pair == number))
            assert two.noised[entry] == pytest.approx(oracle.logit_diff(logits, pair.correct[0], pair.wrong[0]), abs=1e-9)


def test_noise_answers_of_several_tokens_and_several_metrics(small: Small) -> None:
    """The joint patch of a whole residual stream is the whole activation of the table."""
    pairs = pairs_of(small)
    nodes = [fp.Node(RESID, "activation", None, "pieces")]
    noise = fp.Noise(["there"], seed=1)
    for options in ({"noise": noise}, {"metric": ["logit_diff", "prob"]}):
        effects = fp.rank_nodes(small.model, pairs, nodes, progress=False, **options)
        for name in effects.metrics:
            np.testing.assert_allclose(*effects.for_metric(name).pooled("recovery").reshape(2, 1), atol=1e-9)
    long = fp.Pairs(
        tuple(
            fp.Pair(pair.clean, pair.corrupted, (), (), labels=pair.labels, correct_sequences=((3, 4, 5), (6,)), wrong_sequences=((7, 8),))
            for pair in pairs
        )
    )  # fmt: skip
    nodes = [fp.Node(RESID, "activation", None, "there"), fp.head(2, 0, "k", "pieces")]
    effects = fp.rank_nodes(small.model, long, nodes, metric="sequence_log_prob_diff", progress=False)
    entries = {(row, pair): value for row, pair, value in zip(effects.row, effects.pair, effects.denoised, strict=True)}
    for number, pair in enumerate(long):
        sides = []
        for answers in (pair.correct_sequences, pair.wrong_sequences):
            of_side = []
            for answer in answers:
                tokens = torch.tensor([[*pair.corrupted, *answer]])
                with torch.no_grad(), fp.do(small.model, fp.Patch(tuple(nodes)), pair=pair, how="set"):
                    log_probs = small.model(tokens)[0].log_softmax(-1)
                of_side.append(sum(log_probs[len(pair) - 1 + n, token] for n, token in enumerate(answer)))
            sides.append(torch.stack(of_side).logsumexp(0))
        assert entries[2, number] == pytest.approx(float(sides[0] - sides[1]), abs=1e-9)


def test_a_node_that_never_differs_has_a_row(small: Small) -> None:
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, labels=[{"early": 1}] * 3)
    nodes = [fp.head(1, 0, "z", "early"), fp.head(1, 0, "z", 3)]
    effects = fp.rank_nodes(small.model, pairs, nodes, progress=False)
    assert effects.changed_pairs.tolist() == [0, 3, 3]
    assert effects.pooled("recovery")[0] == 0
    assert effects.pooled("recovery")[1] == pytest.approx(effects.pooled("recovery")[2], abs=1e-12)
    assert effects.to_pandas()["recovery_low"][0] == 0
    assert effects.quadrants()[0] == "below threshold"


def test_it_resumes_and_verifies(small: Small, tmp_path: Path) -> None:
    pairs, nodes, saes = pairs_of(small), mixed(small), saes_of(small)
    options: dict[str, Any] = {"saes": saes, "journal": tmp_path / "journal", "progress": False}
    first, again = (fp.rank_nodes(small.model, pairs, nodes, **options) for _ in range(2))
    np.testing.assert_array_equal(first.denoised, again.denoised)
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: nodes"):
        fp.rank_nodes(small.model, pairs, nodes[1:], **options)
    assert fp.verify(first, small.model, pairs, saes=saes, rows=20, progress=False).ok


def test_a_direction(small: Small) -> None:
    vector = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    along, other = fp.direction(vector, RESID), fp.direction(vector.flip(0).tolist(), RESID)
    pairs = pairs_of(small)
    nodes = [fp.feature(along, 0, "there"), fp.feature(other, 0, "there")]
    effects = fp.rank_nodes(small.model, pairs, nodes, saes=[along, other], directions=["denoising"], progress=False)
    assert fp.rank_features(small.model, along, pairs, positions=["there"], progress=False).nodes[0] == nodes[0]
    unit = vector / vector.norm()
    for number, pair in enumerate(pairs):
        source = oracle.activations(small.model, torch.tensor([pair.clean]))[RESID]

        def project(x: torch.Tensor, hook: object, source: torch.Tensor = source) -> torch.Tensor:
            x = x.clone()
            x[0, 3] += ((source - x)[0, 3] @ unit) * unit
            return x

        with torch.no_grad():
            logits = small.model.run_with_hooks(torch.tensor([pair.corrupted]), fwd_hooks=[(RESID, project)])
        (entry,) = np.flatnonzero((effects.row == 0) & (effects.pair == number))
        assert effects.denoised[entry] == pytest.approx(oracle.logit_diff(logits, pair.correct[0], pair.wrong[0]), abs=1e-9)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.zeros(16), "not all of them 0"),
        (torch.ones(4, 4), r"a tensor \[4, 4\]"),
        (torch.tensor([1.0, torch.nan]), "expected finite numbers"),
        ("ab", "vector is a str: expected a tensor"),
    ],
)
def test_what_is_no_direction(vector: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.direction(vector, RESID)


def test_a_direction_of_another_width(bridge: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match="reads 4 values and the activation at .* has 16"):
        fp.rank_features(bridge.model, fp.direction(torch.ones(4), RESID), pairs_of(bridge), progress=False)


def test_constructors(bridge: Small) -> None:
    assert fp.head(1, 3) == fp.Node(Z, "head", 3)
    assert fp.head(0, 2, "pattern", "end <- S2") == fp.Node("blocks.0.attn.hook_pattern", "head", 2, "end <- S2")
    name = f"{bridge.saes[8].cfg.metadata.hook_name} -> {MLP}"
    assert fp.feature(bridge.saes[8], 4, -1) == fp.feature(name, 4, -1) == fp.Node(MLP, "feature", 4, -1, name)
    assert fp.feature(f"{RESID}#2", 4) == fp.Node(RESID, "feature", 4, "all", f"{RESID}#2")
    for make, message in (
        (lambda: fp.head(1, 3, "mlp"), "site='mlp': expected one of z, result, q, k, v, pattern"),
        (lambda: fp.head(-1, 3), "layer=-1: expected an integer"),
        (lambda: fp.feature(RESID, -3), "feature index -3 is negative"),
        (lambda: fp.feature("neurons of layer 1", 3), "pass the object"),
        (lambda: fp.feature([1], 3), "list is not a sae-lens SAE"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            make()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "expected a list of nodes"),
        (5, "nodes=5: expected a list of nodes"),
        ([fp.head(1, 3), fp.head(1, 3)], "each once"),
        ([fp.head(1, 9)], "expected a head of 0 to 3"),
        ([fp.head(9, 0)], "the model has no hook"),
        ([fp.head(1, 0, "z", "nowhere")], "a pair has no label 'nowhere'"),
        ([fp.head(1, 0, "z", -8)], r"position -8 is outside a prompt of 7 tokens: expected 0 to 6, or -1 to -7 from the end"),
        ([fp.head(1, 0, "pattern", "there <- there")], "together=False"),
        ([fp.Node("blocks.1.attn.hook_pattern", "activation")], "the first dimension of the activation there is not the position"),
        ([fp.Node("blocks.2.mlp.hook_post", "neuron", 32)], "neuron 32 @ all': expected a neuron of 0 to 31"),
        ([fp.head(1, 0, "z", "end <- there")], "is at an entry of an attention pattern: expected a head at hook_pattern"),
        ([fp.head(1, 0, "pattern", "there <- there <- there")], "is at an entry of an attention pattern: expected .* two pos"),
        ([fp.head(1, 4, "pattern")], "expected a head of 0 to 3"),
        ([fp.head(1, 4, "result")], "expected a head of 0 to 3"),
        ([fp.Edge.of(fp.head(1, 3), fp.LOGITS)], "does not say which values to patch: expected nodes such as"),
        ([fp.Node("3 nodes together", "set", 0)], "does not say which values to patch: expected nodes such as"),
        ([fp.Node(RESID, "feature", 99)], "expected a feature of 0 to 23"),
        ([fp.Node("blocks.0.hook_mlp_out", "feature", 1)], "belongs to 0 of the SAEs"),
        ([fp.Node(RESID, "set", 1)], "does not say which values to patch"),
        ([fp.Node(RESID, "feature", 1), fp.Node(RESID, "feature", 1, "all", RESID)], "names a node twice"),
        ([fp.Node(RESID, "feature", 1, 3), fp.Node(RESID, "activation", None, "pieces")], "pair 0: .* overlaps .* together=False"),
        (["logits"], "'logits' is among the nodes"),
    ],
)  # fmt: skip
def test_nodes_that_can_not_be_patched(bridge: Small, nodes: Any, message: str) -> None:
    """Also one at a time, unless the error says that they can be."""
    options: dict[str, Any] = {"saes": bridge.at(RESID), "progress": False}
    with pytest.raises(fp.FeatpatchError, match=message) as raised:
        fp.rank_nodes(bridge.model, pairs_of(bridge), nodes, **options)
    if "together=False" in str(raised.value):
        fp.rank_nodes(bridge.model, pairs_of(bridge), nodes, together=False, **options)
        return
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_nodes(bridge.model, pairs_of(bridge), nodes, together=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "median"}, "to='median': expected one of"),
        ({"to": "mean", "directions": ["denoising"]}, "expected no directions"),
        ({"to": "mean", "noise": fp.Noise([3])}, "no noise"),
        ({"seed": 3}, "reference or seed without to"),
        ({"batch_rows": 0}, "batch_rows=0"),
        ({"together": False, "combine": "set"}, "combine='set' with nodes that are patched alone"),
    ],
)
def test_options_that_are_refused(bridge: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_nodes(bridge.model, pairs_of(bridge), [fp.head(1, 3)], progress=False, **options)


def test_a_copy_of_the_residual_stream_is_patched_alone(bridge: Small) -> None:
    nodes = [fp.Node("blocks.1.hook_resid_mid", "activation"), fp.head(1, 3)]
    with pytest.raises(fp.FeatpatchError, match="is a copy of the residual stream.*together=False"):
        fp.rank_nodes(bridge.model, pairs_of(bridge), nodes, progress=False)
    alone = fp.rank_nodes(bridge.model, pairs_of(bridge), nodes, together=False, progress=False)
    same = fp.rank_components(bridge.model, pairs_of(bridge), sites=["resid_mid"], layers=[1], progress=False)
    assert alone.pooled("recovery")[0] == pytest.approx(same.pooled("recovery")[0], abs=1e-12)


def test_positions_from_the_end(small: Small, tmp_path: Path) -> None:
    """Everywhere as the index that they stand for; stored tables keep them."""
    pairs, sae = pairs_of(small), small.at(RESID)
    for rank in (
        lambda positions: fp.rank_features(small.model, sae, pairs, positions=positions, progress=False),
        lambda positions: fp.rank_components(small.model, pairs, positions=positions, progress=False),
        lambda positions: fp.ablate(small.model, pairs, saes=sae, positions=positions, to="zero", progress=False),
        lambda positions: fp.rank_features(small.model, sae, pairs, positions=positions, method="atp", progress=False),
    ):
        ends, same = rank([-1, -4]), rank([6, 3])
        assert [node.position for node in ends.nodes] == [{6: -1, 3: -4}[node.position] for node in same.nodes]
        np.testing.assert_array_equal(ends.noised, same.noised)
        assert fp.Effects.load(ends.save(tmp_path / "ends")).nodes == ends.nodes
        with pytest.raises(fp.FeatpatchError, match="or -1 to -7 from the end"):
            rank([-8])


def test_do_takes_labels_from_a_pair(small: Small) -> None:
    pair = pairs_of(small)[0]
    clean, corrupted = (torch.tensor([ids]) for ids in (pair.clean, pair.corrupted))
    named = fp.Patch((fp.head(1, 3, "v", "pieces"), fp.head(0, 0, "z", -4)))
    plain = fp.Patch((fp.head(1, 3, "v", 3), fp.head(1, 3, "v", 4), fp.head(0, 0, "z", 3)))
    with torch.no_grad():
        with fp.do(small.model, named, pair=pair):
            found = small.model(corrupted)
        with fp.do(small.model, plain, source=clean, base=corrupted):
            expected = small.model(corrupted)
        assert torch.equal(found, expected)
        with fp.do(small.model, named, pair=pair, source=corrupted, base=clean):
            found = small.model(clean)
        with fp.do(small.model, plain, source=corrupted, base=clean):
            assert torch.equal(found, small.model(clean))
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "source and pair are both None"),
        ({"source": "clean", "base": "corrupted"}, "is at a label: expected a token index or 'all', or pair="),
        ({"pair": "pair", "source": "short", "base": "short"}, "source has 6 tokens and pair has 7"),
        ({"pair": "unlabelled"}, "a pair has no label 'there'"),
    ],
)
def test_what_do_refuses(bridge: Small, options: dict[str, Any], message: str) -> None:
    pair = pairs_of(bridge)[0]
    values = {
        "clean": torch.tensor([pair.clean]), "corrupted": torch.tensor([pair.corrupted]), "short": torch.tensor([pair.clean[1:]]),
        "pair": pair, "unlabelled": fp.Pair(pair.clean, pair.corrupted, pair.correct, pair.wrong),
    }  # fmt: skip
    patch = fp.Patch((fp.head(1, 3, "z", "there"),))
    given = {name: values[value] for name, value in options.items()}
    with pytest.raises(fp.FeatpatchError, match=message), fp.do(bridge.model, patch, **given):
        pass


def test_padding_at_the_end_is_no_position_from_the_end(bridge: Small) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    options = {"source": bridge.clean[:1], "base": bridge.corrupted[:1], "attention_mask": mask}
    with pytest.raises(fp.FeatpatchError, match="is at padding"):
        fp.do(bridge.model, fp.Patch((fp.head(1, 3, "z", -1),)), **options).__enter__()


def test_nodes_without_the_name_of_their_only_sae(small: Small) -> None:
    """Paths take them as nodes with the name."""
    sae, pairs = small.at(RESID), pairs_of(small)
    tables = [
        fp.rank_paths(
            small.model, pairs, saes=sae, senders=[fp.Node(RESID, "feature", 5, 3, name)], receivers=["logits"], progress=False
        )
        for name in ("", RESID)
    ]
    assert tables[0].nodes == tables[1].nodes
    np.testing.assert_array_equal(tables[0].denoised, tables[1].denoised)


def test_an_entry_of_a_pattern_is_no_position_of_a_ranking(bridge: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"rank_nodes\(model, pairs, \[fp.head\(1, 3, 'pattern', 'end <- S2'\)\]\)"):
        fp.rank_components(
            bridge.model, pairs_of(bridge), sites=["pattern_entry"], positions=["there <- there"], progress=False
        )
