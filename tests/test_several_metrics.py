"""Several metrics off the same patched runs, and answers of several tokens, teacher-forced."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from small import Small, small_hooked, standard

import featpatch as fp
from featpatch import metrics

SITE = "blocks.1.hook_resid_pre"
NAMES = ["logit_diff", "prob", "neg_kl", "neg_rank"]


def wrong_alone(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
    """A user's metric, of all logits."""
    return -logits[:, list(wrong)].mean(-1)


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def ranked(small: Small, metric: Any, **options: Any) -> fp.Effects:
    return fp.rank_features(small.model, small.at(SITE), pairs_of(small), metric=metric, progress=False, **options)


def same(one: fp.Effects, other: fp.Effects) -> None:
    assert one.nodes == other.nodes
    for column in ("clean", "corrupted", "row", "pair", "denoised", "noised"):
        np.testing.assert_allclose(getattr(one, column), getattr(other, column), rtol=0, atol=1e-12)


def test_several_are_what_each_is_alone(small: Small) -> None:
    several = ranked(small, [*NAMES, wrong_alone])
    assert several.metrics == [*NAMES, "wrong_alone"]
    for name in several.metrics:
        alone = ranked(small, wrong_alone if name == "wrong_alone" else name)
        same(several.for_metric(name), alone)
        assert several.for_metric(name).metadata["metric"] == name
    with pytest.raises(fp.FeatpatchError, match="metric 'accuracy' was not measured: expected one of logit_diff, prob"):
        several.for_metric("accuracy")


def test_the_other_metrics_follow_rows_and_pairs(small: Small, tmp_path: Path) -> None:
    several = ranked(small, ["logit_diff", "prob"])
    alone = ranked(small, "prob")
    order = [5, 0, 2]
    same(several.take(order).for_metric("prob"), alone.take(order))
    same(several.of_pairs([2, 0]).for_metric("prob"), alone.of_pairs([2, 0]))
    best = several.top(3)
    assert best.nodes == best.for_metric("prob").nodes
    again = fp.Effects.load(best.of_pairs([0, 1]).save(tmp_path / "effects.safetensors"))
    same(again.for_metric("prob"), best.of_pairs([0, 1]).for_metric("prob"))
    same(fp.Effects.load(several.for_metric("prob").save(tmp_path / "alone.safetensors")), alone)
    table, of_prob = several.to_pandas(), alone.to_pandas()
    for column in ("recovery", "degradation_high", "recovery_q", "recovery_median", "pairs_with_gap"):
        assert np.allclose(table[f"prob_{column}"], of_prob[column], equal_nan=True), column
    assert np.allclose(table["recovery"], ranked(small, "logit_diff").to_pandas()["recovery"])


def test_a_journal_holds_several(small: Small, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    first = ranked(small, ["logit_diff", "prob"], journal=journal, batch_rows=40)
    written = journal.read_bytes()
    second = ranked(small, ["logit_diff", "prob"], journal=journal, batch_rows=40)
    assert journal.read_bytes() == written
    same(first.for_metric("prob"), second.for_metric("prob"))
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: metrics"):
        ranked(small, ["prob", "logit_diff"], journal=journal)


@pytest.mark.parametrize("metric", [[], ["prob", "prob"], ["sequence_log_prob", "prob"], ["sequence_log_prob"] * 2])
def test_metrics_that_do_not_go_together(small: Small, metric: list[str]) -> None:
    with pytest.raises(fp.FeatpatchError, match="expected"):
        ranked(small, metric)


def test_a_gap_near_zero_names_its_metric(small: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match="accuracy is 0 on clean and 0 on corrupted"):
        ranked(small, ["logit_diff", "accuracy"])


ANSWERS = [(((3, 9),), ((4, 11, 6),)), (((5,), (12, 13)), ((6, 2),)), (((7, 7, 7),), ((7, 8), (30,)))]
"""Right and wrong answers of each pair."""


def long_pairs(small: Small) -> fp.Pairs:
    return fp.Pairs(
        tuple(
            fp.Pair(tuple(clean), tuple(corrupted), (), (), correct_sequences=right, wrong_sequences=wrong)
            for clean, corrupted, (right, wrong) in zip(small.clean.tolist(), small.corrupted.tolist(), ANSWERS, strict=True)
        )
    )


def by_hand(small: Small, slot: int, side: int, base: str, node: fp.Node | None) -> float:
    """Logarithm of the summed probabilities of the answers in one hooked run for each, prompt and answer together."""
    total = 0.0
    for answer in ANSWERS[slot][side]:
        runs = {
            name: torch.cat([tokens[slot], torch.tensor(answer[:-1], dtype=torch.long)])[None]
            for name, tokens in (("clean", small.clean), ("corrupted", small.corrupted))
        }
        source = runs["clean" if base == "corrupted" else "corrupted"]
        features = [] if node is None else [node.index] if node.kind == "feature" else list(range(24))
        logits = oracle.patched_logits(
            small.model,
            small.at(SITE),
            runs[base],
            source,
            features=features,
            positions=list(range(7)) if node is None or node.position == "all" else [node.position],
            error=node is not None and node.kind in ("error", "activation"),
        )
        log_p = logits[0, 6:].log_softmax(-1)
        total += float(torch.exp(sum(log_p[place, token] for place, token in enumerate(answer))))
    return float(np.log(total))


@pytest.mark.parametrize("names", [["sequence_log_prob"], ["sequence_log_prob_diff", "sequence_log_prob"]])
@pytest.mark.parametrize("positions", ["all", [3]])
def test_sequences_against_the_oracle(small: Small, names: list[str], positions: Any) -> None:
    pairs = long_pairs(small)
    found = fp.rank_features(small.model, small.at(SITE), pairs, metric=names, positions=positions, progress=False)
    for name in names:
        effects = found.for_metric(name)

        def expected(slot: int, base: str, node: fp.Node | None, name: str = name) -> float:
            right = by_hand(small, slot, 0, base, node)
            return right - by_hand(small, slot, 1, base, node) if name.endswith("diff") else right

        for slot in range(3):
            assert effects.clean[slot] == pytest.approx(expected(slot, "clean", None), abs=1e-10)
            assert effects.corrupted[slot] == pytest.approx(expected(slot, "corrupted", None), abs=1e-10)
        for entry in range(0, len(effects.row), 3):
            node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
            if node.kind in ("feature", "all_features"):
                assert effects.denoised[entry] == pytest.approx(expected(slot, "corrupted", node), abs=1e-10), node
                assert effects.noised[entry] == pytest.approx(expected(slot, "clean", node), abs=1e-10), node


def test_one_token_is_its_log_probability(small: Small) -> None:
    same(ranked(small, "sequence_log_prob"), ranked(small, "log_prob"))
    both, right, wrong = (ranked(small, name).clean for name in ("sequence_log_prob_diff", "sequence_log_prob", "logit_diff"))
    assert np.allclose(both, wrong)
    assert not np.allclose(both, right)


def test_answers_of_several_tokens_need_their_own_metric(small: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"pair 0: its answers .* several tokens, and logit_diff, prob reads one"):
        fp.rank_features(
            small.model, small.at(SITE), long_pairs(small), metric=["logit_diff", "prob", "neg_kl"], progress=False
        )
    fp.rank_features(small.model, small.at(SITE), long_pairs(small), metric="neg_kl", progress=False)


def test_answers_must_fit_behind_the_prompt() -> None:
    small = small_hooked()
    long = fp.Pair((1,) * 14, (2,) * 14, (), (), correct_sequences=((3,) * 4,), wrong_sequences=((4,),))
    with pytest.raises(fp.FeatpatchError, match="pair 0 has 17 tokens with its answers: expected at most 16"):
        fp.rank_features(small.model, small.at(SITE), fp.Pairs((long,)), metric="sequence_log_prob", progress=False)
    strange = fp.Pair((1, 1), (2, 1), (), (), correct_sequences=((3, 99),), wrong_sequences=((4,),))
    with pytest.raises(fp.FeatpatchError, match="outside the model's vocabulary"):
        fp.rank_features(small.model, small.at(SITE), fp.Pairs((strange,)), metric="sequence_log_prob", progress=False)


def test_measures_name_their_columns() -> None:
    together = metrics.Measures.of(["prob", "logit_diff"])
    assert together.columns([1], [2]) is None
    assert metrics.Measures.of("logit_diff").columns([1], [2]) == (1, 2)
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    assert together(logits, [1], [2])[0].tolist() == pytest.approx([float(logits.softmax(-1)[0, 1]), 1.0])


@pytest.mark.parametrize("make", [BRIDGES["llama"], HOOKED["neox"]])
def test_the_longest_run_may_be_that_of_a_shorter_prompt(make: Any) -> None:
    """Rotations are made ready for the prompt with its answer."""
    model = make()
    long = fp.Pair((1, 2, 3, 4, 5), (1, 9, 3, 4, 5), (), (), correct_sequences=((3,),), wrong_sequences=((4,),))
    short = fp.Pair((1, 2, 3), (1, 9, 3), (), (), correct_sequences=((3, 5, 6, 7, 8),), wrong_sequences=((4,),))
    least = fp.Pair((1, 2), (1, 9), (), (), correct_sequences=((3,),), wrong_sequences=((4,),))
    found = fp.rank_features(
        model, standard(SITE, 1), fp.Pairs((long, short, least)), metric="sequence_log_prob", progress=False
    )
    with torch.no_grad():
        log_p = model(torch.tensor([[1, 2, 3, 3, 5, 6, 7]]))[0].log_softmax(-1)
    expected = sum(log_p[2 + place, token] for place, token in enumerate((3, 5, 6, 7, 8)))
    assert found.clean[1] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("name", ["z", "q", "k", "v", "pattern", "resid_post"])
def test_sequences_of_components(small: Small, name: str) -> None:
    """A key or value of the prompt is seen by the tokens of the answer too."""
    pairs = long_pairs(small)
    options = {"sites": name, "layers": [1], "positions": [3, 6], "metric": "sequence_log_prob", "progress": False}
    effects = fp.rank_components(small.model, pairs, **options)
    zeroed = fp.ablate(small.model, pairs, to="zero", **({**options, "positions": [3]} if name != "pattern" else options))

    def expected(slot: int, base: str, node: fp.Node, zero: bool = False) -> float:
        total = 0.0
        for answer in ANSWERS[slot][0]:
            runs = {
                run: torch.cat([tokens[slot], torch.tensor(answer[:-1], dtype=torch.long)])[None]
                for run, tokens in (("clean", small.clean), ("corrupted", small.corrupted))
            }
            old = oracle.activations(small.model, runs[base])[node.site]
            new, other = (
                old.clone(),
                oracle.activations(small.model, runs["clean" if base == "corrupted" else "corrupted"])[node.site],
            )
            where = (0, node.index, node.position) if name == "pattern" else (0, node.position, node.index)
            where = where[:2] if node.index is None else where
            new[where] = 0.0 if zero else other[where]
            with torch.no_grad():
                log_p = oracle.replaced(small.model, runs[base], node.site, old, new)[0, 6:].log_softmax(-1)
            total += float(torch.exp(sum(log_p[place, token] for place, token in enumerate(answer))))
        return float(np.log(total))

    for entry in range(0, len(effects.row), 2):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        assert effects.denoised[entry] == pytest.approx(expected(slot, "corrupted", node), abs=1e-9), node
        assert effects.noised[entry] == pytest.approx(expected(slot, "clean", node), abs=1e-9), node
    for entry in range(len(zeroed.row)):
        node, slot = zeroed.nodes[zeroed.row[entry]], int(zeroed.pair[entry])
        assert zeroed.noised[entry] == pytest.approx(expected(slot, "clean", node, zero=True), abs=1e-9), node


def test_some_pairs_are_saved_with_every_metric(bridge: Small, tmp_path: Path) -> None:
    options: dict[str, Any] = {"metric": ["logit_diff", "prob"], "positions": [3], "progress": False}
    some = fp.rank_features(bridge.model, bridge.saes[0], pairs_of(bridge), **options).of_pairs([0, 2])
    again = fp.Effects.load(some.save(tmp_path / "some.safetensors"))
    assert again.metrics == ["logit_diff", "prob"]
    np.testing.assert_array_equal(again.for_metric("prob").pooled("recovery"), some.for_metric("prob").pooled("recovery"))
    assert some.take([0]).metrics == ["logit_diff", "prob"]
