"""Metrics: their signs, their values by hand, and sweeps against the oracle."""

import math
from typing import Any

import oracle
import pytest
import torch
from small import Small

import featpatch as fp
from featpatch import metrics

SITE = "blocks.1.hook_resid_pre"
LOGITS = torch.tensor([[0.0, 1.0, 3.0, 2.0], [2.0, 2.0, -1.0, 0.0]], dtype=torch.float64)
CLEAN = torch.tensor([[0.0, 0.0, 2.0, 0.0]], dtype=torch.float64)


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def by_hand(name: str, logits: list[float], correct: list[int], wrong: list[int], clean: list[float]) -> float:
    """Written out with plain floats."""
    total = sum(map(math.exp, logits))
    p = [math.exp(logit) / total for logit in logits]
    right, false = sum(p[k] for k in correct), sum(p[k] for k in wrong)
    above = sum(logit > max(logits[k] for k in correct) for logit in logits)
    q_total = sum(map(math.exp, clean))
    return {
        "logit_diff": sum(logits[k] for k in correct) / len(correct) - sum(logits[k] for k in wrong) / len(wrong),
        "prob_diff": right - false,
        "prob": right,
        "log_prob": math.log(right),
        "neg_rank": -above,
        "accuracy": float(above == 0),
        "neg_kl": -sum(math.exp(c) / q_total * math.log(math.exp(c) / q_total / p[k]) for k, c in enumerate(clean)),
    }[name]


@pytest.mark.parametrize("name", metrics.MEASURES)
@pytest.mark.parametrize(("correct", "wrong"), [([2], [3]), ([1, 2], [0, 3]), ([0], [1, 2, 3])])
def test_values_by_hand(name: str, correct: list[int], wrong: list[int]) -> None:
    measure = metrics.find(name)
    columns = measure.columns(correct, wrong)
    logits = LOGITS if columns is None else LOGITS[:, list(columns)]
    found = measure(logits, correct, wrong, CLEAN if measure.needs == "clean" else None)
    expected = [by_hand(name, row, correct, wrong, CLEAN[0].tolist()) for row in LOGITS.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", metrics.MEASURES)
def test_larger_is_closer_to_the_clean_behaviour(name: str) -> None:
    """The clean run puts the right answer first, the corrupted one the wrong answer."""
    clean, corrupted = torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([[1.0, 4.0, 0.0]])
    measure = metrics.find(name)
    columns = measure.columns([0], [1])
    best, worst = (measure(x if columns is None else x[:, list(columns)], [0], [1], clean) for x in (clean, corrupted))
    assert float(best) > float(worst)
    if name in ("neg_kl", "neg_rank"):
        assert float(best) == 0


@pytest.mark.parametrize("name", [name for name in metrics.MEASURES if name not in ("logit_diff", "accuracy")])
@pytest.mark.parametrize("directions", [("denoising",), ("denoising", "noising")])
def test_sweeps_against_the_oracle(small: Small, name: str, directions: Any) -> None:
    sae = small.at(SITE)
    with torch.no_grad():
        last = [small.model(tokens)[:, -1] for tokens in (small.clean, small.corrupted)]
    ranks = [(-logits).argsort(-1).argsort(-1) for logits in last]
    correct, wrong = (ranks[1] - ranks[0]).argmax(-1), (ranks[1] - ranks[0]).argmin(-1)
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, correct, wrong)
    effects = fp.rank_features(small.model, sae, pairs, metric=name, directions=directions, positions=[3, 6], progress=False)
    for entry in range(0, len(effects.row), 5):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        if node.kind == "activation":
            continue
        runs = small.corrupted[[slot]], small.clean[[slot]]
        clean = last[0][slot].tolist()
        for direction, values in (("denoising", effects.denoised), ("noising", effects.noised)):
            if direction not in directions:
                continue
            base, source = runs if direction == "denoising" else runs[::-1]
            kinds = {"feature": [node.index], "all_features": list(range(24)), "error": []}
            logits = oracle.patched_logits(
                small.model, sae, base, source, features=kinds[node.kind], positions=[node.position], error=node.kind == "error"
            )
            answers = [int(correct[slot])], [int(wrong[slot])]
            expected = by_hand(name, logits[0, -1].tolist(), *answers, clean)
            assert values[entry] == pytest.approx(expected, abs=1e-9), (node, direction)
    if name == "neg_kl":
        assert (effects.clean == 0).all()
        assert (effects.corrupted < 0).all()


def test_pairs_with_the_same_answers_keep_their_own_clean_run(small: Small) -> None:
    """Measured together only where they share it."""
    answers = torch.full((3,), 3), torch.full((3,), 4)
    together = fp.rank_features(
        small.model,
        small.at(SITE),
        fp.Pairs.from_tokens(small.clean, small.corrupted, *answers),
        metric="neg_kl",
        progress=False,
    )
    for slot in range(3):
        pair = fp.Pairs.from_tokens(small.clean[[slot]], small.corrupted[[slot]], answers[0][:1], answers[1][:1])
        alone = fp.rank_features(small.model, small.at(SITE), pair, metric="neg_kl", progress=False)
        part = together.of_pairs([slot])
        found, expected = (
            {effects.nodes[row]: value for row, value in zip(effects.row, effects.denoised, strict=True)}
            for effects in (part, alone)
        )
        assert found == pytest.approx(expected, abs=1e-10)


def test_kl_by_the_models_own_pass(small: Small) -> None:
    """Plain path, where no trace of the clean run is at hand."""
    sae, pairs = small.at(SITE), pairs_of(small)
    fast = fp.rank_features(small.model, sae, pairs, metric="neg_kl", directions=["denoising"], progress=False)
    point = small.model.hook_dict["blocks.2.hook_resid_post"]
    point.add_hook(lambda value, hook: value)
    try:
        with pytest.warns(fp.SlowPathWarning):
            slow = fp.rank_features(small.model, sae, pairs, metric="neg_kl", directions=["denoising"], progress=False)
    finally:
        small.model.reset_hooks()
    assert abs(fast.denoised - slow.denoised).max() < 1e-10
