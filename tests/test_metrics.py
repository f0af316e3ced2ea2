"""Metrics: their signs, their values by hand, and sweeps against the oracle."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
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
        "logit": sum(logits[k] for k in correct) / len(correct),
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


# Functions of the user's own.


def fixed_pairs(small: Small) -> fp.Pairs:
    """The same answers for all, as functions of logits alone know no others."""
    return fp.Pairs.from_tokens(small.clean, small.corrupted, torch.full((3,), 3), torch.full((3,), 4))


def with_baselines(logits: torch.Tensor, clean_baseline: float = 0.0, corrupted_baseline: float = 0.0) -> torch.Tensor:
    """As in TransformerLens' demo of attribution patching: optional arguments that are no answers."""
    return logits[0, -1, 3] - logits[0, -1, 4] + clean_baseline - corrupted_baseline


class Difference(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 3] - logits[:, -1, 4]

    def method(self, logits: torch.Tensor) -> torch.Tensor:
        return self.forward(logits).mean()


def of_tokens(logits: torch.Tensor, right: int, wrong: int) -> torch.Tensor:
    return (logits[:, -1, right] - logits[:, -1, wrong]).sum()


ANSWERS = torch.tensor([[3, 4]])

OWN: dict[str, Any] = {
    "a value per prompt": lambda logits: logits[:, -1, 3] - logits[:, -1, 4],
    "a mean": lambda logits: (logits[:, -1][:, [3]] - logits[:, -1][:, [4]]).mean(),
    "the first prompt": lambda logits: logits[0, -1, 3] - logits[0, -1, 4],
    "optional arguments": with_baselines,
    "without the position": lambda logits: logits.squeeze(1)[:, 3] - logits.squeeze(1)[:, 4],
    "the positions as a batch": lambda logits: (
        F.cross_entropy(logits[0], torch.tensor([4])) - F.cross_entropy(logits[0], torch.tensor([3]))
    ),
    "fixed levels": lambda logits: (logits[:, -1, 3] - logits[:, -1, 4] + torch.tensor([0.0])).mean(),
    "a fixed direction": lambda logits: logits @ (torch.eye(40, dtype=logits.dtype)[3] - torch.eye(40, dtype=logits.dtype)[4]),
    "a partial function": partial(of_tokens, right=3, wrong=4),
    "a module": Difference(),
    "a method": Difference().method,
    "answers by gather": lambda logits, tokens=ANSWERS: -logits[:, -1].gather(1, tokens).diff()[:, 0],
    "any number of arguments": lambda *given: given[0][:, given[1]].mean(-1) - given[0][:, given[2]].mean(-1),
    "optional answers": lambda x, correct=(), wrong=(): x[:, list(correct)].mean(-1) - x[:, list(wrong)].mean(-1),
}


def measured(small: Small, metric: Any) -> list[Any]:
    """Heads swept, estimated and in a circuit."""
    pairs, options = fixed_pairs(small), {"metric": metric, "progress": False}
    heads = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(2)]
    return [
        fp.rank_components(small.model, pairs, sites="z", layers=[1], **options),
        fp.rank_components(small.model, pairs, method="atp", sites="z", layers=[1], **options),
        fp.find_circuit(small.model, pairs, nodes=heads, size=1, **options),
    ]


@pytest.fixture(scope="module")
def by_name(hooked: Small) -> list[Any]:
    return measured(hooked, "logit_diff")


@pytest.mark.parametrize("form", OWN)
def test_forms_of_functions(hooked: Small, by_name: list[Any], form: str) -> None:
    """Swept, estimated and in circuits, each the same as the named metric; the clean runs beside the plain model."""
    of_form = measured(hooked, OWN[form])
    for found, expected in zip(of_form, by_name, strict=True):
        values = [np.array(x.scores if isinstance(x, fp.Circuit) else x.denoised) for x in (found, expected)]
        np.testing.assert_allclose(*values, atol=1e-12)
    with torch.no_grad():
        logits = hooked.model(hooked.clean)[:, -1]
    np.testing.assert_allclose(of_form[0].clean, logits[:, 3] - logits[:, 4], atol=1e-10)


def test_plain_numbers_and_truth_values(bridge: Small) -> None:
    """Whether the right answer's logit is above what it is, at most, in the corrupted runs; exact where nothing needs a gradient."""
    with torch.no_grad():
        clean, corrupted = (bridge.model(tokens)[:, -1, 3] for tokens in (bridge.clean, bridge.corrupted))
    level = float(corrupted.max()) if (clean > corrupted.max()).any() else float(clean.max())

    def number(logits: torch.Tensor) -> float:
        return float(logits[0, -1, 3])

    def whole(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        return (logits[:, correct[0]] > level + 1e-9).long()

    def truth(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        return logits[:, correct[0]] > level + 1e-9

    own = [number, whole, truth]
    found = fp.rank_components(bridge.model, fixed_pairs(bridge), sites="z", metric=own, progress=False)
    np.testing.assert_allclose(found.clean, clean, atol=1e-10)
    for name in ("whole", "truth"):
        assert found.for_metric(name).clean.tolist() == (clean > level).double().tolist()
        assert found.for_metric(name).corrupted.tolist() == (corrupted > level).double().tolist()


ANSWERS_OF_BATCH = ANSWERS.expand(3, 2)
CLEAN_OF_BATCH = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def divergence(logits: torch.Tensor, clean: torch.Tensor = CLEAN_OF_BATCH) -> torch.Tensor:
    """TransformerLens' form, with the clean logits of a batch: beside one prompt they are broadcast."""
    return (clean.exp() * (logits[:, -1].log_softmax(-1) - clean)).sum(-1).mean()


def whole_divergence(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Beside one prompt's only position, the prompts of a batch, or the positions of one prompt, are summed."""
    return -F.kl_div(logits.log_softmax(-1), clean, log_target=True, reduction="batchmean")


def above(logits: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Linear, so that the mean over a batch is the mean of what each prompt gives alone."""
    return (logits[:, -1, 3] - level).mean()


CLEANS = [CLEAN_OF_BATCH, CLEAN_OF_BATCH[:2], CLEAN_OF_BATCH[None]]
LEVELS = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 4.0])]

REFUSED: list[tuple[Any, str]] = [
    (lambda logits, correct, wrong: logits[:, -1, list(correct)], r"failed on logits of shape \[\d, 40\] \(IndexError: .*: expected metric\(logits \[rows, d_vocab\], correct, wrong\)"),
    (lambda logits: logits[:, 3], r"failed on logits of shape \[1, 1, 40\] \(IndexError"),
    (lambda logits: logits[:, -1], r"returned torch.float64 of shape \[1, 40\] for logits of shape \[1, 1, 40\]: expected metric"),
    (lambda logits: None, r"returned NoneType for logits of shape \[1, 1, 40\]"),
    (lambda logits: torch.complex(logits, logits)[0, -1, 3], r"returned torch.complex128 of shape \[\]"),
    (lambda logits, tokens: logits[:, -1].gather(1, tokens), r"takes \(logits, tokens\): expected a function metric\("),
    (lambda: torch.zeros(1), r"takes \(\): expected"),
    (lambda a, b, c, d: a[:, 0], r"takes \(a, b, c, d\): expected"),
    (lambda logits, *, tokens: logits[:, -1], r"takes \(logits, \*, tokens\): expected"),
    (torch.max, r"metric 'max' has no readable signature"),
    (lambda x, c, w: x.mean(), r"returned torch.float64 of shape \(\) for \d rows: expected one real value per row"),
    (lambda x, c, w: x[:, :1], r"returned torch.float64 of shape \(\d, 1\) for \d rows"),
    (lambda x, c, w: torch.complex(x[:, 0], x[:, 1]), r"returned torch.complex128 of shape \(\d,\) for \d rows: expected one real"),
    (lambda x, c, w: x[:, 0].tolist(), r"returned a list for \d rows: expected metric"),
    (lambda x, c, w: x[:, 0] * math.nan, r"returned NaN or an infinite value for \d rows"),
    (divergence, r"failed on logits of shape \[2, 1, 40\] .*without answers or clean logits"),
    (partial(divergence, clean=CLEAN_OF_BATCH[:2]), r"for 2 prompts one at a time and .* for them in one batch: .*'neg_kl'"),
    (lambda logits, tokens=ANSWERS_OF_BATCH: logits[:, -1].gather(1, tokens).mean(), r"failed on logits of shape"),
    *((partial(whole_divergence, clean=clean), r"failed on logits of shape \[1, \d, 40\] .*must match") for clean in CLEANS),
    *((partial(above, level=level), r"failed on logits of shape \[\d, 1, 40\] .*must match") for level in LEVELS),
]  # fmt: skip


WAYS: dict[str, Callable[..., Any]] = {
    "swept": lambda small, pairs, head, **o: fp.rank_features(small.model, small.at(SITE), pairs, **o),
    "controls": lambda small, pairs, head, **o: fp.random_controls(
        small.model, small.at(SITE), pairs, feature=0, position=3, n=2, **o),
    "estimated": lambda small, pairs, head, **o: fp.rank_features(small.model, small.at(SITE), pairs, method="atp", **o),
    "paths": lambda small, pairs, head, **o: fp.rank_paths(small.model, pairs, method="atp", senders=[head], receivers=["logits"], **o),
    "nodes": lambda small, pairs, head, **o: fp.find_circuit(small.model, pairs, nodes=[head], **o),
    "edges": lambda small, pairs, head, **o: fp.find_circuit(small.model, pairs, over="edges", **o),
    "scrubbed": lambda small, pairs, head, **o: fp.scrub(
        small.model, pairs, fp.Hypothesis({fp.LOGITS: {head: lambda pair: 0}}), **o),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
@pytest.mark.parametrize("way", WAYS)
def test_functions_that_are_no_metrics(bridge: Small, way: str, number: int) -> None:
    """By every way to a metric: swept, estimated by gradients, of paths, in circuits over nodes and edges, scrubbed."""
    metric, message = REFUSED[number]
    with pytest.raises(fp.FeatpatchError, match=message):
        WAYS[way](bridge, fixed_pairs(bridge), fp.Node("blocks.0.attn.hook_z", "head", 0), metric=metric, progress=False)


def test_a_function_that_runs_out_of_memory_gets_fewer_rows(bridge: Small) -> None:
    def wide(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if len(logits) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits[:, list(correct)].mean(-1) - logits[:, list(wrong)].mean(-1)

    one, other = (
        fp.rank_components(bridge.model, fixed_pairs(bridge), sites="z", metric=metric, progress=False)
        for metric in (wide, "logit_diff")
    )
    np.testing.assert_allclose(one.denoised, other.denoised, atol=1e-12)


def test_names_of_functions_are_the_same_in_every_process(bridge: Small, tmp_path: Path) -> None:
    """A journal is gone on with by the same partial function, made anew; modules go by their class."""

    def made() -> Any:
        def of(logits: torch.Tensor, right: int) -> torch.Tensor:
            return logits[0, -1, right]

        return partial(of, right=3)

    options: dict[str, Any] = {"sites": "z", "journal": tmp_path / "journal", "progress": False}
    first = fp.rank_components(bridge.model, fixed_pairs(bridge), metric=made(), **options)
    written = (tmp_path / "journal").read_bytes()
    again = fp.rank_components(bridge.model, fixed_pairs(bridge), metric=made(), **options)
    assert (tmp_path / "journal").read_bytes() == written
    np.testing.assert_array_equal(first.denoised, again.denoised)
    assert fp.Effects.load(first.save(tmp_path / "table.safetensors")).metrics == ["of"]
    assert metrics.find(Difference()).name == "Difference"


@pytest.mark.extended
def test_lists_of_metrics_are_those_that_the_function_accepts(hooked: Small) -> None:
    """An unknown name, and what is offered in its place, which is then accepted."""
    model, pairs, sae = hooked.model, pairs_of(hooked), hooked.at(SITE)
    head = fp.Node("blocks.0.attn.hook_z", "head", 0)
    paths: dict[str, Any] = {"senders": [head], "receivers": ["logits"], "progress": False, "directions": ["denoising"]}
    calls: list[Callable[[Any], Any]] = [
        lambda metric: fp.rank_features(model, sae, pairs, metric=metric, positions=[3], progress=False),
        lambda metric: fp.rank_features(
            model, sae, pairs, method="atp", metric=metric, directions=["denoising"], progress=False
        ),
        lambda metric: fp.rank_paths(model, pairs, metric=metric, **paths),
        lambda metric: fp.rank_paths(model, pairs, method="atp", metric=metric, **paths),
        lambda metric: fp.find_circuit(model, pairs, nodes=[head], metric=metric, progress=False),
        lambda metric: fp.scrub(model, pairs, fp.Hypothesis({fp.LOGITS: {head: lambda pair: 0}}), metric=metric, draws=1),
    ]
    for call in calls:
        with pytest.raises(fp.FeatpatchError, match="'f1' is unknown: expected one of") as caught:
            call("f1")
        offered = str(caught.value).split("expected one of ")[1].split(", or a function")[0].split(", ")
        assert len(offered) >= 5
        for name in {*metrics.MEASURES, *metrics.SEQUENCES} - {"accuracy"}:
            if name in offered:
                call(name)
            else:
                with pytest.raises(fp.FeatpatchError, match=f"{name}.*expected"):
                    call(name)
