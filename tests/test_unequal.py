"""Pairs whose labels are at different places in the two prompts, compared with hooks that have their own indices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import activations, decode, encode, hooks, logit_diff
from small import HEADS, Small

import featpatch as fp
from featpatch.errors import FeatpatchWarning

LABELS = {"same": 1, "subject": (3, 4), "verb": 4, "end": 6}
"""Places in the first clean and the second corrupted prompt, of 7 tokens; OTHERS are those in the prompt of 9 tokens."""
OTHERS = {"same": 1, "subject": (4, 5), "verb": 6, "end": 8}


def prompt(length: int, seed: int) -> tuple[int, ...]:
    drawn = torch.randint(10, 40, (length - 3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return (11, 12, 13, *drawn)


PAIRS = fp.Pairs(
    (
        fp.Pair(prompt(7, 1), prompt(9, 2), (3,), (4,), labels=LABELS, corrupted_labels=OTHERS),
        fp.Pair(prompt(9, 3), prompt(7, 4), (5,), (6,), labels=OTHERS, corrupted_labels=LABELS),
        fp.Pair(prompt(7, 5), prompt(9, 6), (7,), (8,), labels=LABELS, corrupted_labels=OTHERS),
        fp.Pair(prompt(7, 5), prompt(7, 7), (7,), (8,), labels=LABELS),
    )
)


def at(pair: fp.Pair, label: str) -> tuple[list[int], list[int]]:
    places = [np.atleast_1d(labels[label]).tolist() for labels in (pair.labels, pair.corrupted_labels or pair.labels)]
    return places[0], places[1]


@torch.no_grad()
def by_hand(model: Any, pair: fp.Pair, label: str, change: Any) -> dict[str, float]:
    """The metric of each patched run; `change(base, source, here, there)` returns hooks, from caches and token indices."""
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    here, there = at(pair, label)
    found = {}
    for way, base, source, to, of in (("denoising", corrupted, clean, there, here), ("noising", clean, corrupted, here, there)):
        edits = change(activations(model, base), activations(model, source), to, of)
        logits = model.run_with_hooks(base, fwd_hooks=edits)
        found[way] = logit_diff(logits, pair.correct[0], pair.wrong[0])
    return found


def replacing(hook: str, new: torch.Tensor) -> list[Any]:
    return [(hook, lambda activation, hook: new)]


def compare(effects: fp.Effects, row: int, index: int, expected: dict[str, float]) -> None:
    recovery, degradation = (effects.changes(effect).toarray()[row, index] for effect in ("recovery", "degradation"))
    assert effects.corrupted[index] + recovery == pytest.approx(expected["denoising"], abs=1e-10)
    assert effects.clean[index] - degradation == pytest.approx(expected["noising"], abs=1e-10)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"])
def test_features_at_labels(small: Small, hook: str, wide: None) -> None:
    sae = [sae for sae in small.saes if hook == hooks(sae)[1]][-1]  # a transcoder at hook_mlp_out
    reads, writes = hooks(sae)
    with pytest.warns(FeatpatchWarning, match="label 'same' has no rows, because it is before the first difference in every"):
        effects = fp.rank_features(small.model, sae, PAIRS, positions=list(LABELS), progress=False)
    assert {node.position for node in effects.nodes} == set(LABELS) - {"same"}
    for row, node in enumerate(effects.nodes):
        if node.kind == "feature" and node.index % 16:
            continue

        def change(base: Any, source: Any, to: list[int], of: list[int], node: fp.Node = node) -> list[Any]:
            if node.kind == "activation":
                new = base[writes].clone()
                new[:, to] = source[writes][:, of]
                return replacing(writes, new)
            f_base, f_source = encode(sae, base[reads]), encode(sae, source[reads])
            old = decode(sae, f_base, base[reads], base[writes])
            error, error_source = base[writes] - old, source[writes] - decode(sae, f_source, source[reads], source[writes])
            new = f_base.clone()
            if node.kind == "error":
                error = error.clone()
                error[:, to] = error_source[:, of]
            else:
                chosen = slice(None) if node.index is None else node.index
                new[0, to, chosen] = f_source[0, of, chosen]
            return replacing(writes, decode(sae, new, base[reads], base[writes]) + error)

        for index, pair in enumerate(PAIRS):
            compare(effects, row, index, by_hand(small.model, pair, str(node.position), change))


@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"])
def test_components_at_labels(small: Small, name: str, wide: None) -> None:
    labels = ["subject", "verb", "end"]
    effects = fp.rank_components(small.model, PAIRS, sites=name, layers=[1], positions=labels, progress=False)
    assert len(effects) == 3 * (HEADS if name in "zqkv" else 1)
    for row, node in enumerate(effects.nodes):
        hook = node.site

        def change(base: Any, source: Any, to: list[int], of: list[int], node: fp.Node = node, hook: str = hook) -> list[Any]:
            new = base[hook].clone()
            if node.index is None:
                new[:, to] = source[hook][:, of]
            else:
                new[:, to, node.index] = source[hook][:, of, node.index]
            return replacing(hook, new)

        for index, pair in enumerate(PAIRS):
            compare(effects, row, index, by_hand(small.model, pair, str(node.position), change))


def test_prompts_of_one_length_and_labels_at_the_same_places_are_patched_by_position() -> None:
    pair = fp.Pair(prompt(7, 5), prompt(7, 7), (7,), (8,), labels=LABELS, corrupted_labels=LABELS)
    assert pair == PAIRS[3]
    assert not pair.by_label
    assert fp.Pairs((pair,)).digest() == fp.Pairs((PAIRS[3],)).digest()


def test_sets_of_features_at_labels(hooked: Small, wide: None) -> None:
    """Two features together, with the features' own decoder: the sum of what they add where the label is in each prompt."""
    sae = hooked.at("blocks.1.hook_resid_pre")
    effects = fp.rank_features(hooked.model, sae, PAIRS, positions=["subject"], progress=False)
    chosen = [node.index for node in effects.top(2, by="recovery").nodes]
    together = fp.interactions(hooked.model, sae, PAIRS, features=chosen, position="subject", progress=False)
    hook = "blocks.1.hook_resid_pre"

    def change(base: Any, source: Any, to: list[int], of: list[int]) -> list[Any]:
        f_base, f_source = encode(sae, base[hook]), encode(sae, source[hook])
        new = f_base.clone()
        for feature in chosen:
            new[0, to, feature] = f_source[0, of, feature]
        return replacing(hook, base[hook] + sae.decode(new) - sae.decode(f_base))

    patched = [by_hand(hooked.model, pair, "subject", change) for pair in PAIRS]
    gap = float((effects.clean - effects.corrupted).sum())
    recovery = sum(runs["denoising"] for runs in patched) - float(effects.corrupted.sum())
    degradation = float(effects.clean.sum()) - sum(runs["noising"] for runs in patched)
    assert together["recovery"].tolist() == [pytest.approx(recovery / gap, abs=1e-9)]
    assert together["degradation"].tolist() == [pytest.approx(degradation / gap, abs=1e-9)]


def test_ablation_is_of_the_clean_prompt_alone(small: Small, wide: None) -> None:
    effects = fp.ablate(small.model, PAIRS, sites="z", layers=[1], positions=["verb"], to=0.0, progress=False)
    hook = "blocks.1.attn.hook_z"
    for row, node in enumerate(effects.nodes):
        for index, pair in enumerate(PAIRS):
            new = activations(small.model, torch.tensor([pair.clean]))[hook].clone()
            new[:, at(pair, "verb")[0], node.index] = 0
            with torch.no_grad():
                logits = small.model.run_with_hooks(torch.tensor([pair.clean]), fwd_hooks=replacing(hook, new))
            expected = effects.clean[index] - logit_diff(logits, pair.correct[0], pair.wrong[0])
            assert effects.changes("degradation").toarray()[row, index] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("positions", ["all", "each", ["end", 3]])
def test_other_positions_are_refused(hooked: Small, positions: Any) -> None:
    message = r"pair 0 has 7 tokens in the clean and 9 in the corrupted prompt, and .* is not the same place in both: expected"
    with pytest.raises(fp.FeatpatchError, match=rf"{message} labels.*positions=\['same', 'subject'\]"):
        fp.rank_components(hooked.model, PAIRS, sites="z", positions=positions, progress=False)


@torch.no_grad()
def test_pairs_are_checked_label_by_label(hooked: Small) -> None:
    """Against plain runs of both prompts of every pair, unbatched and read at their last tokens."""
    found = PAIRS.check(hooked.model)
    for index, pair in enumerate(PAIRS):
        logits = [hooked.model(torch.tensor([tokens]))[0] for tokens in (pair.clean, pair.corrupted)]
        metrics = [logit_diff(each[None], pair.correct[0], pair.wrong[0]) for each in logits]
        assert (found.clean[index], found.corrupted[index]) == pytest.approx(metrics, abs=1e-10)
        places = dict.fromkeys(place for label in pair.labels for place in zip(*at(pair, label), strict=True))
        changed = [(p, q) for p, q in places if pair.clean[p] != pair.corrupted[q]]
        rules = {finding.rule: finding.detail for finding in found.findings if finding.pair == index}
        if pair.corrupted_labels:
            assert rules["difference"].startswith(f"{len(changed)} of {len(places)} labelled tokens differ")
        losses = [
            np.mean([-float(each.log_softmax(-1)[p - 1, tokens[p]]) for p in where if p])
            for each, tokens, where in zip(logits, (pair.clean, pair.corrupted), zip(*changed, strict=True), strict=True)
            if pair.corrupted_labels
        ]
        if losses:
            assert f" {abs(losses[1] - losses[0]):.1f} nats {'more' if losses[1] > losses[0] else 'less'} " in rules["surprise"]
    alike = fp.Pair((1, 5, 2), (1, 5, 3, 2), (3,), (4,), labels={"five": 1}, corrupted_labels={"five": 1})
    (same,) = [each for each in fp.Pairs((alike,)).check(hooked.model).findings if each.rule == "difference"]
    assert (same.status, same.detail) == ("fail", "0 of 1 labelled token differ")


def test_what_needs_prompts_that_correspond_is_refused(hooked: Small) -> None:
    model, sae, positions = hooked.model, hooked.at("blocks.1.hook_resid_pre"), ["verb"]
    calls: list[Any] = [
        lambda: fp.rank_features(model, sae, PAIRS, positions=positions, method="atp", progress=False),
        lambda: fp.rank_features(model, sae, PAIRS, positions=positions, screen=fp.Screen(k=2, audit=2), progress=False),
        lambda: fp.rank_components(model, PAIRS, positions=positions, method="atp", progress=False),
        lambda: fp.rank_paths(model, PAIRS, senders=[fp.Node("blocks.0.attn.hook_z", "head", 0)], receivers=["logits"]),
        lambda: fp.find_circuit(model, PAIRS),
    ]
    for call in calls:
        with pytest.raises(fp.FeatpatchError, match=r"pair 0 is patched label by label .*: expected prompts that correspond"):
            call()
    with pytest.raises(
        fp.FeatpatchError, match=r"sites=\['pattern'\] with pair 0, which is patched label by label: expected prompts of"
    ):
        fp.rank_components(model, PAIRS, sites=["pattern", "z"], positions=positions, progress=False)


def test_the_check_of_saes_cuts_prompts_to_the_shorter_one(hooked: Small) -> None:
    cut = fp.Pairs(tuple(fp.Pair(pair.clean[:7], pair.corrupted[:7], pair.correct, pair.wrong) for pair in PAIRS))
    found, expected = (fp.check(hooked.model, hooked.at("blocks.1.hook_resid_pre"), pairs).fits[0] for pairs in (PAIRS, cut))
    assert found == expected


def test_joining(hooked: Small) -> None:
    one, other = PAIRS[:1], PAIRS[1:]
    assert one + other == PAIRS
    with pytest.raises(fp.FeatpatchError, match="pairs is a tuple: expected fp.Pairs"):
        one + PAIRS.pairs


def test_indices_that_are_pooled_over_different_words(hooked: Small) -> None:
    """A warning names the label to use instead, and each row says how many pairs are long enough."""
    pairs = fp.Pairs(
        (
            fp.Pair(prompt(7, 1), prompt(7, 2), (3,), (4,), labels={"end": 6}),
            fp.Pair(prompt(9, 3), prompt(9, 4), (5,), (6,), labels={"end": 8}),
        )
    )
    options: dict[str, Any] = {"sites": "resid_pre", "layers": [1], "progress": False}
    message = (
        r"'each' pools token indices over pairs of 7 to 9 tokens.* \(label 'end' is at 6 and 8, ...\): .*positions=\['end'\]"
    )
    for method in ("exact", "atp"):
        with pytest.warns(FeatpatchWarning, match=message):
            effects = fp.rank_components(hooked.model, pairs, positions="each", method=method, **options)
        table = effects.to_pandas().set_index("position")["pairs"]
        assert table.to_dict() == {3: 2, 4: 2, 5: 2, 6: 2, 7: 1, 8: 1}
        assert effects.of_pairs([0]).to_pandas()["pairs"].tolist() == [1] * 4
    assert "pairs" in repr(effects).split()
    same = fp.rank_components(hooked.model, pairs[:1], positions="each", **options)
    assert same.to_pandas()["pairs"].tolist() == [1] * 4
    assert "pairs" not in repr(same).split()


def test_prompts_of_unequal_length_are_shown_side_by_side(tmp_path: Path) -> None:
    """A notebook, the report and views of a pair read each prompt by itself; only labels have a place in both."""
    demo = fp.load_demo()
    model, sae = demo.model, demo.saes[4]
    clean = "When Mary and John went to the store , John gave a drink to"
    corrupted = "When Mary and John went to the store , then later Mary gave a drink to"
    there, here = {"S2": 12, "end": 16}, {"S2": 10, "end": 14}
    options: dict[str, Any] = {"align": "labels", "labels": [here], "corrupted_labels": [there]}
    pairs = fp.Pairs.from_prompts(model, clean=clean, corrupted=corrupted, correct="Mary", wrong="John", **options)
    shown = pairs._repr_html_()
    assert shown.count("token differs") == 1 + 3  # John; then later Mary
    assert 'title="position 12, S2"' in shown
    effects = fp.rank_features(model, sae, pairs, positions=["S2", "end"], progress=False)
    table = fp.active_features(model, sae, pairs[0], effects=effects, per_token=2)
    for _, row in table.iterrows():
        label = {10: "S2", 14: "end"}.get(row["position"])
        if label is None:
            assert np.isnan(row["corrupted"])
            continue
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([pairs[0].corrupted]))
            expected = sae.encode(cache["blocks.1.hook_resid_pre"])[0, there[label], row["feature"]]
        assert row["corrupted"] == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    assert fp.verify(effects, model, pairs, saes=sae, rows=2, progress=False).ok
    figure = fp.attention_pattern(model, pairs[0], layer=1, head=3)
    assert [trace.z.shape for trace in figure.data] == [(15, 15), (17, 17)]
    page = fp.report(effects, tmp_path / "unequal.html", model=model, saes=sae, pairs=pairs).read_text()
    assert 'title="position 16, end"' in page
    with pytest.raises(fp.FeatpatchError, match=r"patched label by label, .*unequal lengths: expected prompts that corr"):
        fp.do(model, fp.Patch((fp.head(1, 3, "v", "S2"),)), pair=pairs[0]).__enter__()
