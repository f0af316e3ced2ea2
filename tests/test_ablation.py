"""Ablations against hooks on the whole model, and corruption by noise."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small

import featpatch as fp
from featpatch.errors import FeatpatchWarning
from featpatch.model.lens import Lens
from featpatch.patching.ablation_values import ABLATION_VALUES

SITE, Z, POST = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def ablated(small: Small, **options: Any) -> fp.Effects:
    return fp.ablate(small.model, pairs_of(small), progress=False, **options)


def prompts_of(small: Small) -> list[torch.Tensor]:
    """Every prompt once."""
    return [torch.tensor([ids]) for ids in dict.fromkeys(map(tuple, torch.cat([small.clean, small.corrupted]).tolist()))]


REPLACED: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": lambda values: torch.zeros_like(values[0]),
    0.7: lambda values: torch.full_like(values[0], 0.7),
    "mean": lambda values: values.mean((0, 1)).expand_as(values[0]),
    "mean_by_position": lambda values: values.mean(0),
}
"""By hand: from values in every prompt `[prompts, pos, ...]` to what each prompt is given `[pos, ...]`."""


def replaced(small: Small, to: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """In the place of `of(tokens)` `[1, pos, ...]`."""
    return REPLACED[to](torch.cat([of(tokens) for tokens in prompts_of(small)]))[None]


def test_every_way_is_tested() -> None:
    """But one, which draws and has tests of its own."""
    assert {name for name in REPLACED if isinstance(name, str)} == set(ABLATION_VALUES) - {"resample"}


def run_with(small: Small, slot: int, hook: str, new: torch.Tensor) -> float:
    clean = small.clean[[slot]]
    old = oracle.activations(small.model, clean)[hook]
    with torch.no_grad():
        logits = oracle.replaced(small.model, clean, hook, old, new)
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.parametrize("to", REPLACED)
def test_features_errors_and_whole_sites(small: Small, to: Any) -> None:
    sae = small.at(SITE)
    effects = ablated(small, saes=sae, to=to, positions=[2, 5])
    assert np.isnan(effects.denoised).all()

    def split(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = oracle.activations(small.model, tokens)[SITE]
        f = oracle.encode(sae, x)
        return x, f, x - sae.decode(f)

    values = [replaced(small, to, lambda tokens, part=part: split(tokens)[part]) for part in range(3)]
    kinds = set()
    for entry in range(len(effects.row)):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        x, f, e = split(small.clean[[slot]])
        new_x, new_f, new_e, p = x.clone(), f.clone(), e.clone(), node.position
        if node.kind == "activation":
            new_x[0, p] = values[0][0, p]
        elif node.kind == "error":
            new_e[0, p] = values[2][0, p]
        else:
            which = slice(None) if node.kind == "all_features" else node.index
            new_f[0, p, which] = values[1][0, p, which]
        new = new_x + (sae.decode(new_f) - sae.decode(f)) + (new_e - e)
        if node.kind != "feature" or entry % 4 == 0:
            assert effects.noised[entry] == pytest.approx(run_with(small, slot, SITE, new), abs=1e-9), node
            kinds.add(node.kind)
    assert kinds == {"feature", "error", "all_features", "activation"}
    assert effects.metadata["ablation"]["to"] == to


@pytest.mark.parametrize("to", REPLACED)
@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "neurons"])
def test_components(small: Small, name: str, to: Any) -> None:
    effects = ablated(small, sites=name, layers=[1], to=to, positions=[2, 5])
    for entry in range(0, len(effects.row), 5 if name == "neurons" else 1):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        old = oracle.activations(small.model, small.clean[[slot]])[node.site]
        values = replaced(small, to, lambda tokens, site=node.site: oracle.activations(small.model, tokens)[site])
        new = old.clone()
        where = (0, node.position) if node.index is None else (0, node.position, node.index)
        new[where] = values[where]
        assert effects.noised[entry] == pytest.approx(run_with(small, slot, node.site, new), abs=1e-9), node


@pytest.mark.parametrize("to", ["mean", "mean_by_position"])
def test_means_are_read_in_one_batched_pass_per_length(small: Small, to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hook points and dictionaries at once; against plain means over single runs of prompts of several lengths."""
    rng = torch.Generator().manual_seed(2)
    lengths = [7] * 90 + [5] * 30
    reference = fp.Pairs(tuple(
        fp.Pair(ids := tuple(torch.randint(10, 40, (length,), generator=rng).tolist()), ids, (3,), (), special=frozenset({0}))
        for length in lengths
    ))  # fmt: skip
    pair, sae, site = pairs_of(small)[:1], small.at(SITE), "blocks.2.hook_mlp_out"
    prompts = list(dict.fromkeys(pair.clean for pair in reference))
    read: list[tuple[int, ...]] = []
    lens_read = Lens.read

    def counted(lens: Lens, tokens: torch.Tensor, hooks: Any) -> Any:
        read.append(tuple(tokens.shape))
        return lens_read(lens, tokens, hooks)

    monkeypatch.setattr(Lens, "read", counted)
    options: dict[str, Any] = {"saes": sae, "sites": ["mlp_out", "z", "neurons"], "layers": [2], "positions": [5], "to": to}
    effects = fp.ablate(small.model, pair, reference=reference, progress=False, **options)
    batched = [shape for shape in read if shape[1] in (5, 7) and shape[0] > 1]
    assert sorted(batched) == sorted([(73, 7), (17, 7)] + ([(30, 5)] if to == "mean" else []))
    assert not [shape for shape in read if shape[0] == 1 and shape[1] in (5, 7)], "no prompt is run by itself"

    runs = [oracle.activations(small.model, torch.tensor([ids])) for ids in prompts]

    def naive(of: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        rows = [of(run)[0] for run, ids in zip(runs, prompts, strict=True) if to == "mean" or len(ids) == 7]
        return torch.cat([row[1:] for row in rows]).mean(0) if to == "mean" else torch.stack(rows).mean(0)[5]

    clean = oracle.activations(small.model, small.clean[[0]])
    features, error = (naive(lambda run, part=part: part(run[SITE])) for part in (
        lambda x: oracle.encode(sae, x).detach(), lambda x: (x - sae.decode(oracle.encode(sae, x))).detach()
    ))  # fmt: skip
    f, e = oracle.encode(sae, clean[SITE]).detach(), (clean[SITE] - sae.decode(oracle.encode(sae, clean[SITE]))).detach()
    for node, found in zip(effects.nodes, effects.noised, strict=True):
        new = clean[node.site].clone()
        if node.kind == "feature":
            new[0, 5] += (features[node.index] - f[0, 5, node.index]) * sae.W_dec.detach()[node.index]
        elif node.kind == "error":
            new[0, 5] += error - e[0, 5]
        elif node.kind == "all_features":
            continue
        else:
            where = (5,) if node.index is None else (5, node.index)
            new[(0, *where)] = naive(lambda run, at=node.site: run[at])[where[1:]]
        assert found == pytest.approx(run_with(small, 0, node.site, new), abs=1e-10), node
    assert {node.kind for node in effects.nodes} == {"feature", "all_features", "error", "activation", "head", "neuron"}
    assert site in {node.site for node in effects.nodes}


def test_patterns(small: Small) -> None:
    site = "blocks.1.attn.hook_pattern"
    effects = ablated(small, sites="pattern", layers=[1], to="mean_by_position", positions=[5])
    values = replaced(small, "mean_by_position", lambda tokens: oracle.activations(small.model, tokens)[site])
    for entry in range(len(effects.row)):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        new = oracle.activations(small.model, small.clean[[slot]])[site].clone()
        new[0, node.index, 5] = values[0, node.index, 5]
        assert effects.noised[entry] == pytest.approx(run_with(small, slot, site, new), abs=1e-9)
    with pytest.raises(fp.FeatpatchError, match="is not an attention pattern"):
        ablated(small, sites="pattern", to="mean")


def test_resampled_from_the_only_other_prompt_is_noising(small: Small) -> None:
    pair = pairs_of(small)[:1]
    sae = small.at(SITE)
    noised = fp.rank_features(small.model, sae, pair, positions="each", directions=["noising"], progress=False)
    found = fp.ablate(small.model, pair, saes=sae, to="resample", positions="each", progress=False)
    assert found.nodes == noised.nodes
    np.testing.assert_allclose(found.noised, noised.noised, atol=1e-12)


def test_resampling_is_seeded_and_takes_whole_prompts(small: Small) -> None:
    one, same, other = (ablated(small, sites="resid_pre", layers=[0], to="resample", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.noised, same.noised)
    assert not np.array_equal(one.noised, other.noised)
    with torch.no_grad():
        logits = [small.model(tokens)[0, -1] for tokens in prompts_of(small)]
    drawn = [ablated(small, sites="resid_pre", layers=[0], to="resample", seed=seed) for seed in range(8)]
    assert all((effects.noised != effects.clean[effects.pair]).all() for effects in drawn), "never its own prompt"
    assert all(len(effects.row) == 3 for effects in drawn), "always another one"
    for entry in range(len(one.row)):
        correct, wrong = (int(ids[one.pair[entry]]) for ids in (small.correct, small.wrong))
        of_prompts = [float(row[correct] - row[wrong]) for row in logits]
        assert min(abs(value - one.noised[entry]) for value in of_prompts) < 1e-9, "the run of another prompt"
        assert abs(one.noised[entry] - one.clean[one.pair[entry]]) > 1e-9, "not of its own"


def test_means_over_other_prompts_leave_special_tokens_out(small: Small) -> None:
    pair = fp.Pair((1, 2, 3), (1, 4, 3), (5,), (6,), special=frozenset({0}))
    effects = ablated(small, sites="resid_pre", layers=[0], reference=fp.Pairs((pair,)), positions=[2])
    rows = [
        oracle.activations(small.model, torch.tensor([ids]))["blocks.0.hook_resid_pre"][0, 1:]
        for ids in (pair.clean, pair.corrupted)
    ]
    new = oracle.activations(small.model, small.clean[[0]])["blocks.0.hook_resid_pre"].clone()
    new[0, 2] = torch.cat(rows).mean(0)
    assert effects.noised[0] == pytest.approx(run_with(small, 0, "blocks.0.hook_resid_pre", new), abs=1e-9)
    with pytest.raises(fp.FeatpatchError, match="no prompt of 7 tokens to take a mean by position over"):
        ablated(small, sites="resid_pre", reference=fp.Pairs((pair,)), to="mean_by_position")
    with pytest.raises(fp.FeatpatchError, match="pair 0 has 7 tokens, and no other prompt has"):
        ablated(small, sites="resid_pre", reference=fp.Pairs((pair,)), to="resample")


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "nothing to ablate"), ({"sites": "z", "to": "nothing"}, "to='nothing': expected one of 'zero', 'mean'"),
     ({"sites": "z", "to": float("nan")}, "a finite number, or activations"), ({"sites": "z", "to": float("inf")}, "a finite number, or activations"),
     ({"layers": [0]}, r"layers=\[0\] without sites"),
     ({"sites": "z", "reference": fp.Pairs((fp.Pair((99, 2), (3, 2), (4,), (5,)),))}, "has token ids from 2 to 99"),
     ({"sites": "z", "reference": fp.Pairs((fp.Pair((1, 2), (3, 2), (4,), (5,), special=frozenset({0, 1})),))}, "hold only special tokens"),],
)  # fmt: skip
def test_errors(small: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        ablated(small, **options)


def test_noise_on_the_embeddings(small: Small) -> None:
    """Clean features into the noised run and back; the noise is seen at the embeddings, and only there put in."""
    sae, noise = small.at(SITE), fp.Noise([2, 4], scale=2.0, seed=3)
    pairs = pairs_of(small)
    effects = fp.rank_features(small.model, sae, pairs, noise=noise, positions=[2, 6], progress=False)
    components = fp.rank_components(small.model, pairs, sites="resid_pre", layers=[0], noise=noise, progress=False)
    np.testing.assert_allclose(components.pooled("recovery"), [1.0], atol=1e-9)
    np.testing.assert_allclose(components.corrupted, effects.corrupted, atol=1e-12)
    assert effects.metadata["noise"] == {"positions": [2, 4], "scale": 2.0, "seed": 3}
    for slot in range(3):
        clean = small.clean[[slot]]
        old = oracle.activations(small.model, clean)["hook_embed"]
        digest = sha256(repr((3, tuple(clean[0].tolist()))).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        added = torch.randn(2, old.shape[-1], generator=generator, dtype=torch.float64)
        new = old.clone()
        new[0, [2, 4]] += 2.0 * float(old.std()) * added
        x = {}
        with torch.no_grad():
            hooks = [
                ("hook_embed", lambda value, hook, new=new: new),
                (SITE, lambda value, hook, x=x: x.update(noisy=value.clone())),
            ]
            noisy = small.model.run_with_hooks(clean, fwd_hooks=hooks)
        answers = int(small.correct[slot]), int(small.wrong[slot])
        assert effects.corrupted[slot] == pytest.approx(oracle.logit_diff(noisy, *answers), abs=1e-9)
        f_clean, f_noisy = (oracle.encode(sae, value) for value in (oracle.activations(small.model, clean)[SITE], x["noisy"]))
        for entry in np.flatnonzero(effects.pair == slot)[::3]:
            node = effects.nodes[effects.row[entry]]
            if node.kind != "feature":
                continue
            changed = f_noisy.clone()
            changed[0, node.position, node.index] = f_clean[0, node.position, node.index]
            patched = x["noisy"] + sae.decode(changed) - sae.decode(f_noisy)
            with torch.no_grad():
                logits = small.model.run_with_hooks(clean, fwd_hooks=[hooks[0], (SITE, lambda value, hook, new=patched: new)])
            assert effects.denoised[entry] == pytest.approx(oracle.logit_diff(logits, *answers), abs=1e-9), node


def test_draws_of_noise_are_averaged(small: Small, tmp_path: Path) -> None:
    """By hand from tables of single draws; a feature that differs in some draws only has no effect in the others."""
    sae, pairs = small.at(SITE), pairs_of(small)
    options: dict[str, Any] = {"positions": [2, 6], "metric": ["logit_diff", "logit"], "progress": False}
    one = [fp.rank_features(small.model, sae, pairs, noise=fp.Noise([2], 3.0, seed), **options) for seed in (4, 5, 6)]
    path = tmp_path / "journal"
    noise = fp.Noise([2], 3.0, 4, draws=3)
    effects = fp.rank_features(small.model, sae, pairs, noise=noise, journal=path, **options)
    assert sorted(file.name for file in tmp_path.iterdir() if "lock" not in file.name) == ["journal", "journal.1", "journal.2"]
    assert set(effects.nodes) == {node for table in one for node in table.nodes}
    assert len({len(table) for table in one}) > 1, "some features differ in some draws only"
    for metric in ("logit_diff", "logit"):
        table, singles = effects.for_metric(metric), [draw.for_metric(metric) for draw in one]
        gap = np.mean([draw.gap.mean() for draw in singles])
        for effect in ("recovery", "degradation"):
            by_draw = np.zeros((2, 3, len(table)))
            for number, draw in enumerate(singles):
                at = [table.nodes.index(node) for node in draw.nodes]
                by_draw[0, number, at] = draw.changes(effect).toarray().mean(1)
                by_draw[1, number, at] = draw.pooled(effect)
            np.testing.assert_allclose(table.pooled(effect), by_draw[0].mean(0) / gap, atol=1e-10)
            np.testing.assert_allclose(table.spread[effect], by_draw[1].std(0, ddof=1), atol=1e-10)
            np.testing.assert_array_equal(table.to_pandas()[f"{effect}_spread"], table.spread[effect])
    assert "over 3 pairs and 3 draws of noise (spread: standard deviation over draws)" in repr(effects)
    assert effects.metadata["noise"] == {"positions": [2], "scale": 3.0, "seed": 4, "draws": 3}
    few = effects.top(2)
    for table in (few, fp.Effects.load(few.save(tmp_path / "few.safetensors"))):
        np.testing.assert_array_equal(table.spread["recovery"], effects.spread["recovery"][few.rows_in_whole()])
        np.testing.assert_array_equal(table.for_metric("logit").spread["recovery"], few.for_metric("logit").spread["recovery"])
    assert effects.of_pairs([0, 1]).spread == {}
    single = fp.rank_features(small.model, sae, pairs, noise=fp.Noise([2], 3.0, 4), **options)
    np.testing.assert_array_equal(single.denoised, one[0].denoised)
    assert single.spread == {}
    with pytest.raises(fp.FeatpatchError, match="draws=0"):
        fp.Noise([2], draws=0)


@pytest.mark.parametrize("later", [1, 6])
def test_interrupted_draws_leave_those_that_are_finished(small: Small, later: int) -> None:
    """Ctrl-C in the first forward passes of the second draw, and in the midst of it."""
    calls = {"made": 0, "last": 10**9}

    def metric(logits: torch.Tensor, correct: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        calls["made"] += 1
        if calls["made"] > calls["last"]:
            raise KeyboardInterrupt
        return logits[:, 3]

    def draws(number: int) -> fp.Effects:
        noise, calls["made"] = fp.Noise([2], draws=number), 0
        options: dict[str, Any] = {"sites": "z", "layers": [1], "batch_rows": 4, "progress": False}
        return fp.rank_components(small.model, pairs_of(small), noise=noise, metric=[metric, "logit"], **options)

    one = draws(1)
    calls["last"] = calls["made"] + later
    with pytest.warns(FeatpatchWarning, match="over 3 of 3 pairs and 1 of 3 draws; pass journal="):
        rest = draws(3)
    assert (one.finished, rest.finished, rest.for_metric("logit").finished) == (True, False, False)
    np.testing.assert_array_equal(rest.denoised, one.denoised)
    assert "draws" not in rest.metadata["noise"]


def test_noise_needs_positions_and_a_scale() -> None:
    bad: list[dict[str, Any]] = [{"positions": []}, {"positions": [1], "scale": 0.0}, {"positions": [1], "scale": float("inf")}]
    for options in bad:
        with pytest.raises(
            fp.FeatpatchError, match="expected positions as a list of at least one label or index, and a finite scale above 0"
        ):
            fp.Noise(**options)
    with pytest.raises(fp.FeatpatchError, match="seed=-1: expected an integer, 0 or more"):
        fp.Noise([1], seed=-1)


def test_a_draw_is_the_same_whichever_other_pairs_there_are(small: Small) -> None:
    """Law 5, for noise and for resampling."""
    pairs, noise = pairs_of(small), fp.Noise([2])
    together = fp.rank_components(small.model, pairs, sites="resid_pre", layers=[0], noise=noise, progress=False)
    alone = fp.rank_components(small.model, pairs[1:2], sites="resid_pre", layers=[0], noise=noise, progress=False)
    assert alone.corrupted[0] == pytest.approx(together.corrupted[1], abs=1e-12)
    other = fp.rank_components(small.model, pairs, sites="resid_pre", layers=[0], noise=fp.Noise([2], seed=1), progress=False)
    assert abs(other.corrupted - together.corrupted).min() > 1e-6
    options = {"sites": "resid_pre", "layers": [0], "to": "resample", "reference": pairs, "progress": False}
    drawn, single = (fp.ablate(small.model, some, **options) for some in (pairs, pairs[1:2]))
    assert single.noised[0] == pytest.approx(drawn.noised[list(drawn.pair).index(1)], abs=1e-12)


def test_a_journal_of_another_question_is_refused(small: Small, tmp_path: Path) -> None:
    """An ablation's journal is not that of a swap, nor of another ablation, other layers or other means."""
    sae, pairs = fp.dictionaries.identity(small.model, SITE), pairs_of(small)
    journal = tmp_path / "journal"
    fp.ablate(small.model, pairs, saes=sae, to="mean", positions=[3], journal=journal, progress=False)
    special = fp.Pairs(tuple(fp.Pair(p.clean, p.corrupted, p.correct, p.wrong, special=frozenset({0})) for p in pairs))
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: ablation differ"):
        fp.rank_features(small.model, sae, pairs, positions=[3], directions=["noising"], journal=journal, progress=False)
    for changed in ({"to": "zero"}, {"reference": special}):
        options: dict[str, Any] = {"to": "mean", **changed}
        with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: ablation differ"):
            fp.ablate(small.model, pairs, saes=sae, positions=[3], journal=journal, progress=False, **options)
    fp.ablate(small.model, pairs, sites="z", layers=[0], journal=tmp_path / "z", progress=False)
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: layers differ"):
        fp.ablate(small.model, pairs, sites="z", layers=[1], journal=tmp_path / "z", progress=False)
