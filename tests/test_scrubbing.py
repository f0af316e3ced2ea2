"""A right hypothesis about a circuit by hand keeps the behaviour, wrong ones lose it."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, HOOKED
from circuits_by_hand import BOS, induction
from small import Small, small_bridge, small_hooked
from test_circuits import ANSWERS, long_pairs
from test_sets import pairs_of

import featpatch as fp
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.scrubbing import Scrubbed, _Run
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap

EMBED = fp.Node("hook_embed", "activation")
LENGTH = 8


def z(layer: int, head: int) -> fp.Node:
    return fp.Node(f"blocks.{layer}.attn.hook_z", "head", head)


def inside(layer: int, head: int, letter: str) -> fp.Node:
    return fp.Node(f"blocks.{layer}.attn.hook_{letter}", "head", head)


def prompts(count: int = 60) -> fp.Pairs:
    """`... A B ... A`, two of each A, B and place, so that many prompts share each label."""
    generator = np.random.default_rng(1)
    clean, corrupted, correct, wrong = [], [], [], []
    for _ in range(count):
        a, b, start = generator.integers(1, 3), generator.integers(7, 9), generator.integers(1, 3)
        prompt = [BOS, *generator.permutation(np.arange(13, 19))[: LENGTH - 2], a]
        prompt[start : start + 2] = a, b
        other = list(prompt)
        other[start + 1] = 15 - b
        clean.append(prompt)
        corrupted.append(other)
        correct.append(b)
        wrong.append(15 - b)
    return fp.Pairs.from_tokens(*(torch.tensor(np.array(values)) for values in (clean, corrupted, correct, wrong)))


def a(pair: fp.Pair) -> int:
    return pair.clean[-1]


def b(pair: fp.Pair) -> int:
    return pair.correct[0]


def place(pair: fp.Pair) -> int:
    return pair.clean.index(a(pair))


def a_and_place(pair: fp.Pair) -> tuple[int, int]:
    return a(pair), place(pair)


def b_and_place(pair: fp.Pair) -> tuple[int, int]:
    return b(pair), place(pair)


def everything(pair: fp.Pair) -> tuple[int, int, int]:
    return a(pair), b(pair), place(pair)


RIGHT = {
    fp.LOGITS: {z(1, 2): b},
    inside(1, 2, "q"): {EMBED: a},
    inside(1, 2, "k"): {z(0, 1): a_and_place},
    inside(1, 2, "v"): {EMBED: b_and_place},
}
"""Read with the prompt that stands for B: whatever A and place it has, they must be those of query, key and value alike."""


def test_right_and_wrong_hypotheses() -> None:
    model, pairs = induction("value").model, prompts()
    right = fp.scrub(model, pairs, fp.Hypothesis(RIGHT))
    assert right.recovered == pytest.approx(1.0, abs=1e-9)
    assert right.low == pytest.approx(1.0, abs=1e-9)
    wrong_label = fp.scrub(model, pairs, fp.Hypothesis({**RIGHT, fp.LOGITS: {z(1, 2): a}}))
    assert wrong_label.high < 0.5
    wrong_head = fp.scrub(model, pairs, fp.Hypothesis({fp.LOGITS: {z(1, 0): b}}))
    assert wrong_head.high < 0.5
    place_left_out = fp.scrub(model, pairs, fp.Hypothesis({**RIGHT, inside(1, 2, "v"): {EMBED: b}}))
    assert 0.2 < place_left_out.recovered < 0.95
    without_query = fp.scrub(model, pairs, fp.Hypothesis({**RIGHT, inside(1, 2, "q"): {}}))
    assert without_query.high < 0.95
    leaf = fp.scrub(model, pairs, fp.Hypothesis({fp.LOGITS: {z(1, 2): b}}))
    assert leaf.recovered == pytest.approx(1.0, abs=1e-9)
    assert "recovered 1.00 [1.00, 1.00] over 60 prompts" in repr(right)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_everything_in_the_hypothesis_is_the_model(make: Any) -> None:
    """Labels that only the prompt itself has, all senders important, down to the embedding: nothing changes."""
    small = make()
    graph = EdgeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("logit_diff"))
    own: Any = lambda pair: pair.clean  # noqa: E731
    parents = {receiver: dict.fromkeys(graph.senders(receiver), own) for receiver in graph.receivers()
               if receiver == fp.LOGITS or ".0." in receiver.site or receiver.site == "blocks.1.hook_mlp_out"}  # fmt: skip
    found = fp.scrub(small.model, pairs_of(small), fp.Hypothesis(parents), draws=1)
    np.testing.assert_allclose(found.values, found.whole, atol=1e-9)
    assert found.recovered == pytest.approx(1.0)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_prompts_that_are_alike_stand_for_each_other(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is resampled from them is the same, also of senders that are not in the hypothesis."""
    small = make()
    biases = [
        p for name, p in small.model.named_parameters() if ".attn." in name and name.endswith(("b_O", "bias")) and len(p) == 16
    ]
    assert biases
    with torch.no_grad():
        for bias in biases:
            bias.normal_()
    tokens = [table[:1].expand(3, -1) for table in (small.clean, small.corrupted)]
    pairs = fp.Pairs.from_tokens(*tokens, small.correct[:1].expand(3), small.wrong[:1].expand(3))
    parents = {fp.LOGITS: {fp.head(1, 2): b}, fp.head(1, 2, "v"): {EMBED: b}}
    monkeypatch.setattr("featpatch.circuits.scrubbing.check_gap", lambda *_: None)  # chance is the same too
    with np.errstate(divide="ignore", invalid="ignore"):
        found = fp.scrub(small.model, pairs, fp.Hypothesis(parents), draws=1)
    np.testing.assert_allclose(found.values, found.whole, atol=1e-9)


def test_errors() -> None:
    model, pairs = induction("value").model, prompts(8)
    for parents, options, message in (
        ({fp.LOGITS: {}}, {"draws": 0}, "draws=0"),
        ({z(1, 2): {EMBED: b}}, {}, "expected fp.LOGITS"),
        ({inside(0, 1, "v"): {z(1, 0): b}}, {}, "is not upstream of"),
        ({inside(1, 1, "v"): {EMBED: b}}, {}, "has no entry for the logits"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.scrub(model, pairs, fp.Hypothesis(parents), **options)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["hooked neox", "bridge neox", "hooked llama", "bridge llama"])
def test_every_receiver_in_every_kind_of_block(name: str) -> None:
    """Parallel blocks, shared keys, biases: labels that only the prompt has leave the model as it is."""
    kind, _, which = name.partition(" ")
    model = (BRIDGES if kind == "bridge" else HOOKED)[which]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = EdgeGraph(wrap(model), pairs_of(small), "corrupted", Measures.of("logit_diff"))
    own: Any = lambda pair: pair.clean  # noqa: E731
    parents = {receiver: dict.fromkeys(graph.senders(receiver), own) for receiver in graph.receivers()
               if receiver == fp.LOGITS or ".0.attn.hook_k" in receiver.site or receiver.site == "blocks.1.hook_mlp_out"}  # fmt: skip
    found = fp.scrub(model, pairs_of(small), fp.Hypothesis(parents), draws=1)
    np.testing.assert_allclose(found.values, found.whole, atol=1e-9)


def test_bad_hypotheses() -> None:
    model, pairs = induction("value").model, prompts(8)
    hypotheses: list[tuple[Any, str]] = [
        (fp.Hypothesis({fp.LOGITS: {z(1, 2): lambda pair: [1]}}), "a label function failed"),
        (fp.Hypothesis({fp.LOGITS: {z(1, 2): b}, inside(1, 1, "q"): {EMBED: a}}), "does not reach the logits"),
    ]
    for hypothesis, message in hypotheses:
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.scrub(model, pairs, hypothesis)
    with pytest.raises(fp.FeatpatchError, match="seed=-1"):
        fp.scrub(model, pairs, fp.Hypothesis(RIGHT), seed=-1)


def test_shared_keys_belong_to_every_head_that_uses_them() -> None:
    """A shared key from random prompts moves the second of its heads as well as the first."""
    small = Small(HOOKED["llama"](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    graph = EdgeGraph(wrap(small.model), pairs_of(small), "corrupted", Measures.of("logit_diff"))
    own: Any = lambda pair: pair.clean  # noqa: E731
    run = _Run(
        graph,
        fp.Hypothesis({fp.LOGITS: dict.fromkeys(graph.senders(fp.LOGITS), own), inside(2, 1, "k"): {}}),
        np.random.default_rng(0),
    )
    for head in (2, 3):
        output = run._output(z(2, head), np.arange(3), run.hypothesis.parents)
        assert (output - run.written[z(2, head)]).abs().max() > 1e-6
    for head in (0, 1):
        torch.testing.assert_close(run._output(z(2, head), np.arange(3), run.hypothesis.parents), run.written[z(2, head)])


def scrubbed_by_neighbours(small: Small, pairs: fp.Pairs, metric: str, monkeypatch: pytest.MonkeyPatch) -> Scrubbed:
    """Everything that writes to the logits comes from the pair after this one, as if that had been drawn."""
    monkeypatch.setattr(_Run, "_agreeing", lambda self, label, rows: np.roll(rows, -1))
    graph = EdgeGraph(wrap(small.model), pairs, "corrupted", Measures.of(metric))
    parents = {fp.LOGITS: dict.fromkeys(graph.senders(fp.LOGITS), lambda pair: 0)}
    return fp.scrub(small.model, pairs, fp.Hypothesis(parents), metric=metric, draws=2)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_the_divergence(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plain runs of other prompts."""
    small = make()
    found = scrubbed_by_neighbours(small, pairs_of(small), "neg_kl", monkeypatch)
    with torch.no_grad():
        p = small.model(small.clean)[:, -1].softmax(-1)
    np.testing.assert_allclose(found.values, -(p * (p / p.roll(-1, 0)).log()).sum(-1), atol=1e-9)
    assert found.whole.tolist() == [0.0, 0.0, 0.0]
    assert found.recovered == pytest.approx(1 - found.values.mean() / found.chance.mean())


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_whole_answers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair's own answers behind the prompts that are drawn, in plain runs of the model."""
    small = make()
    pairs = long_pairs(small)
    found = scrubbed_by_neighbours(small, pairs, "sequence_log_prob_diff", monkeypatch)
    for values, shift in ((found.values, 1), (found.whole, 0)):
        for slot in range(3):
            sides = []
            for side in ANSWERS[slot]:
                total = 0.0
                for answer in side:
                    run = torch.cat([small.clean[(slot + shift) % 3], torch.tensor(answer[:-1], dtype=torch.long)])
                    with torch.no_grad():
                        log_p = small.model(run[None])[0, 6:].log_softmax(-1)
                    total += float(torch.exp(sum(log_p[place, token] for place, token in enumerate(answer))))
                sides.append(np.log(total))
            assert values[slot] == pytest.approx(sides[0] - sides[1], abs=1e-9)


def test_what_is_drawn_does_not_depend_on_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens of all answers see the same prompts."""
    small, agreeing, drawn = small_hooked(), _Run._agreeing, defaultdict(list)

    def noted(self: _Run, label: Any, rows: Any) -> Any:
        found = agreeing(self, label, rows)
        drawn[self.continuation].append(found.tolist())
        return found

    monkeypatch.setattr(_Run, "_agreeing", noted)
    hypothesis = fp.Hypothesis({fp.LOGITS: {z(1, 2): lambda pair: 0, z(1, 0): len}})
    fp.scrub(small.model, long_pairs(small), hypothesis, metric="sequence_log_prob", draws=4)
    assert set(drawn) == {(), (3,), (12,), (7,), (7, 7)}
    assert all(found == drawn[()] for found in drawn.values())
    assert len({tuple(rows) for rows in drawn[()]}) > 2
