"""Good and bad contrasts, each found for what it is."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

import featpatch as fp
from featpatch.checkpoints import Demo, folder
from featpatch.pairs.checklist import Checklist, check, without
from featpatch.reporting.terminal import by_pair, totals


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fp.load_demo()


CLEAN = "When Mary and John went to the store , John gave a drink to"
GOOD = (CLEAN, "When Mary and John went to the store , Mary gave a drink to", "Mary", "John")
EXAMPLES = {
    "good": (GOOD, {}),
    "another subject and another story": (
        (CLEAN, "While Anna and Paul were working at the park , Paul handed the key", "Mary", "John"), {"difference": "warn"}),
    "a name for a word": ((CLEAN, "When Mary and John went to the store , red gave a drink to", "Mary", "John"), {"kind": "warn"}),
    "a word that the tokenizer does not know": (
        (CLEAN.replace("drink", "saxophone"), GOOD[1].replace("drink", "saxophone"), "Mary", "John"), {"kind": "warn"}),
    "the wrong way round": ((GOOD[1], CLEAN, "Mary", "John"), {"output": "fail"}),
    "an answer that the corruption keeps": (
        (CLEAN, "When Mary and John went to the store , John gave a watch to", "Mary", "John"), {"output": "warn"}),
}  # fmt: skip


def pairs_of(demo: Demo, *examples: tuple[str, str, str, str], **options: Any) -> fp.Pairs:
    clean, corrupted, correct, wrong = zip(*examples, strict=True)
    return fp.Pairs.from_prompts(
        demo.model.tokenizer, clean=clean, corrupted=corrupted, correct=correct, wrong=wrong, **options
    )


def statuses(found: Checklist, pair: int = 0) -> dict[str, str]:
    return {finding.rule: finding.status for finding in found.findings if finding.pair == pair}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(demo: Demo, name: str) -> None:
    example, expected = EXAMPLES[name]
    found = statuses(check(pairs_of(demo, example), demo.model))
    assert {rule: status for rule, status in found.items() if status != "pass" and rule in expected} == expected
    if name == "good":
        assert set(found.values()) == {"pass"}


def test_a_beginning_that_is_also_the_unknown_token(demo: Demo) -> None:
    """Is no unknown word, but a second one is; answers that the model does not have are named."""
    tokenizer = deepcopy(demo.model.tokenizer)
    tokenizer.unk_token = tokenizer.bos_token
    pair = pairs_of(demo, GOOD)[0]
    assert statuses(check((pair,), demo.model, tokenizer=tokenizer))["kind"] == "pass"
    twice = replace(pair, clean=(*pair.clean[:3], 1, *pair.clean[4:]), corrupted=(*pair.corrupted[:3], 1, *pair.corrupted[4:]))
    (kind,) = (f for f in check((twice,), demo.model, tokenizer=tokenizer).findings if f.rule == "kind")
    assert (kind.status, kind.detail) == ("warn", "2 tokens unknown to the tokenizer")
    with pytest.raises(fp.FeatpatchError, match=r"pair 0 has answer ids \[424\]: expected 0 to 423, ids of the model"):
        check((replace(pair, wrong=(424,)),), demo.model)
    with pytest.raises(fp.FeatpatchError, match="correct holds -1: expected token ids, integers from 0 on"):
        replace(pair, correct=(-1,))


class Pieces:
    """A tokenizer of these pieces, in which a space is shown as GPT-2's does."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __call__(self, text: str) -> list[int]:
        return [self.pieces.index(text.replace(" ", "Ġ"))]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[n] for n in ids).replace("Ġ", " ")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[n] for n in ids]


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("ĠJohn", "a name after a space"), ("Anna", "a name"), ("Ġred", "a word after a space"), ("blue", "a word"),
        ("Ġ7", "a number after a space"), ("42", "a number"), ("!", "a punctuation mark"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("other", "its"), [("Mary", "a name"), ("ĠMary", "a name after a space"), ("red", "a word"), ("17", "a number")]
)
def test_kinds_of_words(piece: str, kind: str, other: str, its: str) -> None:
    found = check(
        [fp.Pair((0, 1), (0, 2), (3,), (4,))], Bigram(torch.zeros(6, 6)), tokenizer=Pieces("a", piece, other, "b", "c", "d")
    )
    (finding,) = [finding for finding in found.findings if finding.rule == "kind"]
    words = (repr(word.replace("Ġ", "")) for word in (piece, other))
    expected = ("warn", f"{next(words)} is {kind} and {next(words)} is {its}, at 1")
    assert (finding.status, finding.detail) == (expected if kind != its else ("pass", "changed tokens are of the same kind"))


def test_words_of_different_kinds_are_named(demo: Demo) -> None:
    found = check(pairs_of(demo, EXAMPLES["a name for a word"][0]), demo.model)
    (said,) = [finding.detail for finding in found.findings if finding.rule == "kind"]
    assert "John' is a name and" in said
    assert "red' is a word, at 10" in said


@pytest.mark.filterwarnings("ignore:.*the clean and the corrupted prompt are the same")
def test_what_is_shown_is_a_summary(demo: Demo) -> None:
    pairs = pairs_of(demo, GOOD, (CLEAN, CLEAN, "Mary", "John"), labels=[{"S2": 10}, {"S2": 10}])
    assert repr(pairs) == "2 pairs of 15 tokens, labels S2"
    lines = repr(pairs.check(demo.model)).splitlines()
    assert lines[0] == "checklist of 2 pairs: 1 pass, 0 warn, 1 fail"
    assert lines[1] == "  difference: 0 warn, 1 fail; change fewer words, or only those that decide the answer"
    fitting = repr(fp.check(demo.model, demo.saes[0], pairs))
    assert fitting.startswith("check on ")
    assert f"{demo.saes[0].cfg.metadata.hook_name}: fits, explains " in fitting


def test_numbers_are_the_models(demo: Demo) -> None:
    """The metric and the surprise, from plain logits."""
    pairs = pairs_of(demo, GOOD)
    found = check(pairs, demo.model)
    (pair,) = pairs
    with torch.no_grad():
        clean, corrupted = (demo.model(torch.tensor([tokens]))[0] for tokens in (pair.clean, pair.corrupted))
    for value, logits in ((found.clean[0], clean), (found.corrupted[0], corrupted)):
        assert value == pytest.approx(float(logits[-1, pair.correct[0]] - logits[-1, pair.wrong[0]]), abs=1e-4)
    changed = next(p for p in range(len(pair)) if pair.clean[p] != pair.corrupted[p])
    surprise = [
        -float(x[changed - 1].log_softmax(-1)[t[changed]]) for x, t in ((clean, pair.clean), (corrupted, pair.corrupted))
    ]
    detail = next(finding.detail for finding in found.findings if finding.rule == "surprise")
    assert f"{abs(surprise[1] - surprise[0]):.1f} nats" in detail


class Bigram:
    """Predicts from the last token alone, by a table of logits."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


@pytest.mark.parametrize(
    ("drop", "status"), [(0.0, "pass"), (2.99, "pass"), (3.01, "warn"), (7.99, "warn"), (8.01, "fail"), (20.0, "fail")]
)
@pytest.mark.parametrize(("token", "word"), [(2, "more"), (1, "less")])
def test_odd_replacements(drop: float, status: str, token: int, word: str) -> None:
    """Token 2 or token 1 is `drop` nats less likely after token 0 than the other."""
    table = torch.zeros(6, 6)
    table[0, token] = -drop
    table[1, 4], table[2, 5] = 5.0, 5.0
    pair = fp.Pair((0, 1), (0, 2), correct=(4,), wrong=(5,))
    checked = check([pair], Bigram(table))
    found = statuses(checked)
    assert found["surprise"] == status
    assert found["output"] == "pass"
    (said,) = [finding.detail for finding in checked.findings if finding.rule == "surprise"]
    assert said == f"changed tokens {drop:.1f} nats {word if drop else 'less'} surprising when corrupted"


@pytest.mark.parametrize(("changed", "status"), [(1, "pass"), (3, "pass"), (4, "warn")])
def test_how_many_tokens_differ(changed: int, status: str) -> None:
    found = check([fp.Pair((0,) * 5, (0,) * (5 - changed) + (1,) * changed, (4,), (5,))], Bigram(torch.zeros(6, 6)))
    assert statuses(found)["difference"] == status
    detail = next(finding.detail for finding in found.findings if finding.rule == "difference")
    assert detail.startswith(f"{changed} of 5 tokens differ{'s' * (changed == 1)} ({5 - changed}: 0 -> 1")
    assert detail.count("->") == min(changed, 3)


@pytest.mark.parametrize(
    ("clean", "corrupted", "status"),
    [(1.0, -1.0, "pass"), (1.0, 0.0, "warn"), (1.0, 0.5, "warn"), (1.0, 1.0, "fail"), (1.0, 2.0, "fail"), (0.0, -1.0, "fail")],
)
@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff"])
def test_what_the_model_prefers(clean: float, corrupted: float, status: str, metric: Any) -> None:
    """The right answer on the clean prompt, and there more than on the corrupted one, on which it prefers the wrong one."""
    table = torch.zeros(6, 6)
    table[1, 4], table[2, 4] = clean, corrupted
    pair = fp.Pair((0, 1), (0, 2), (4,), (5,))
    assert statuses(check([pair], Bigram(table), metric=metric))["output"] == status


@pytest.mark.parametrize(
    ("clean", "corrupted", "status"), [(1.0, -1.0, "pass"), (-1.0, -2.0, "pass"), (1.0, 1.0, "fail"), (1.0, 2.0, "fail")]
)
def test_the_right_answer_alone_is_more_likely_on_the_clean_prompt(clean: float, corrupted: float, status: str) -> None:
    table = torch.zeros(6, 6)
    table[1, 4], table[2, 4] = clean, corrupted
    assert statuses(check([fp.Pair((0, 1), (0, 2), (4,), ())], Bigram(table)))["output"] == status


@pytest.mark.parametrize(
    ("right", "wrong", "status", "said"),
    [
        ([(4, 1), (3, 1)], [(5, 1)], "pass", "2 right, 1 wrong, 2 tokens each"),
        ([(4, 1)], [(5, 1, 2)], "pass", "1 right, 1 wrong, 2 to 3 tokens"),
        ([(4, 1)], [(4, 1, 2)], "warn", "one is the beginning of the other"),
        ([(4, 1, 2)], [(4, 1)], "warn", "one is the beginning of the other"),
        ([(4, 1)], [(5, 1), (4,)], "warn", "one is the beginning of the other"),
    ],
)
def test_answers_of_several_tokens(right: Any, wrong: Any, status: str, said: str) -> None:
    pair = fp.Pair((0, 1), (0, 2), (), (), correct_sequences=tuple(right), wrong_sequences=tuple(wrong))
    found = check([pair], Bigram(torch.zeros(6, 6)))
    assert statuses(found)["answers"] == status
    detail = next(finding.detail for finding in found.findings if finding.rule == "answers")
    assert detail == said if status == "pass" else said in detail


def test_what_pairs_have_in_common(demo: Demo) -> None:
    other = ("When Anna and Paul went to the store , Paul gave a drink to",
             "When Anna and Paul went to the store , Anna gave a drink to", "Anna", "Paul")  # fmt: skip
    labels = [{"S2": 10}, {"S2": 10}, {}]
    pairs = pairs_of(demo, GOOD, GOOD, other, labels=labels)
    found = check(pairs, demo.model)
    assert [statuses(found, pair)["duplicate"] for pair in range(3)] == ["pass", "fail", "pass"]
    assert [statuses(found, pair)["labels"] for pair in range(3)] == ["pass", "pass", "warn"]
    assert next(finding.detail for finding in found.findings if finding.rule == "labels") == "S2 10: 'John'"
    assert found.verdicts() == ["pass", "fail", "warn"]
    assert not found.ok
    assert list(pairs.drop(found, "fail")) == [pairs[0], pairs[2]]
    assert list(pairs.drop(found, ["fail", "warn"])) == [pairs[0]]
    assert found.counts()["duplicate"] == {"pass": 2, "warn": 0, "fail": 1}
    frame = found.to_pandas()
    assert list(frame.columns) == ["pair", "rule", "status", "detail", "advice"]
    assert (frame.advice != "").sum() == (frame.status != "pass").sum() == 2


@pytest.mark.parametrize(("size", "status"), [(0.2, "warn"), (0.99, "warn"), (1.01, "pass")])
def test_small_gaps(size: float, status: str) -> None:
    """Below a fifth of the median."""
    table = torch.zeros(8, 8)
    table[1, 6], table[2, 7], table[3, 6], table[4, 7] = 5.0, 5.0, size, size
    pairs = [fp.Pair((0, a), (0, b), (6,), (7,)) for a, b in ((1, 2), (1, 2), (3, 4))]
    found = check(pairs, Bigram(table))
    assert [statuses(found, pair)["gap"] for pair in range(3)] == ["pass", "pass", status]
    assert {finding.detail for finding in found.findings[:18] if finding.rule == "gap"} == {"gap 10.00, median 10.00"}


@pytest.mark.parametrize(("labelled", "status"), [(1, "pass"), (3, "pass"), (4, "warn")])
def test_labels_that_more_than_half_of_the_pairs_have(labelled: int, status: str) -> None:
    pairs = [fp.Pair((0, 1), (0, 2), (4,), (5,), labels={"it": 1} if n < labelled else {}) for n in range(6)]
    found = check(pairs, Bigram(torch.zeros(6, 6)))
    assert [statuses(found, pair)["labels"] for pair in range(6)] == ["pass"] * labelled + [status] * (6 - labelled)


def test_answers_that_are_no_words(demo: Demo) -> None:
    tokenizer = demo.model.tokenizer
    (pair,) = pairs_of(demo, GOOD)
    for odd in (tokenizer.bos_token_id, tokenizer.unk_token_id):
        changed = fp.Pair(pair.clean, pair.corrupted, (odd,), pair.wrong)
        assert statuses(check([changed], demo.model))["answers"] == "fail"


def test_shipped_pairs_pass(demo: Demo) -> None:
    """Nearly all of what ships and of what the tasks draw."""
    for pairs in (demo.pairs("ioi", n=16), demo.pairs("capitals", n=16), fp.tasks.ioi(demo.model.tokenizer, 16)):
        verdicts = check(pairs, demo.model).verdicts()
        assert verdicts.count("fail") <= 1


def test_tables(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    from featpatch.console import PlainConsole

    found = check(pairs_of(demo, GOOD, GOOD), demo.model)
    console = PlainConsole()
    console.print(totals(found))
    console.print(by_pair(found, lambda pair: "[b]markup[/b]"))
    printed = capsys.readouterr().out
    assert "checklist of 2 pairs: 1 pass, 0 warn, 1 fail" in printed
    assert "identical to pair 0" in printed
    assert "[b]markup[/b]" in printed
    assert "drop all but one" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("logits", [torch.zeros(2, 6), torch.full((1, 2, 6), torch.nan)])
def test_models_that_are_none(logits: torch.Tensor) -> None:
    with pytest.raises(fp.FeatpatchError, match="expected finite logits"):
        check([fp.Pair((0, 1), (0, 2), (4,), (5,))], lambda tokens: logits)


def test_checking_and_dropping(demo: Demo) -> None:
    pairs = pairs_of(demo, GOOD, GOOD, EXAMPLES["a name for a word"][0])
    found = pairs.check(demo.model)
    assert pairs.drop(found) == pairs[:1]
    assert pairs.drop(found, ["warn", "fail"]) == pairs[:1]
    assert pairs_of(demo, GOOD).drop(pairs_of(demo, GOOD).check(demo.model)) == pairs[:1]
    with pytest.raises(fp.FeatpatchError, match="the checklist is of 3 pairs and these are 1"):
        pairs[:1].drop(found)
    with pytest.raises(fp.FeatpatchError, match="none of 3 pairs is left without the verdict"):
        pairs.drop(found, ["pass", "warn", "fail"])


def test_on_the_command_line(tmp_path: Path) -> None:
    model = folder() / "model"
    lines = [{"clean": c, "corrupted": d, "correct": right, "wrong": wrong} for c, d, right, wrong in (GOOD, GOOD)]
    for name, count, code in (("good", 1, 0), ("twice", 2, 1)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[:count])))
        done = run("check", "--pairs", f"{name}.jsonl", "--model", model, "--out", f"{name}.csv", folder=tmp_path)
        assert done.returncode == code, done.stderr
        looked = "every pair passes" if count == 1 else "1 pair to look at\npair 1, fail: "
        assert done.stdout.startswith(f"{looked}")
        assert f"passes\nchecklist of {count} pair" in done.stdout or count > 1
        assert f"checklist of {count} pair{'s' * (count > 1)}:" in done.stdout
        assert (tmp_path / f"{name}.csv").read_text().count("\n") == 9 * count + 1


def test_unknown_verdicts(demo: Demo) -> None:
    pairs = pairs_of(demo, GOOD)
    with pytest.raises(fp.FeatpatchError, match=r"verdicts 'bad': expected some of pass, warn, fail"):
        without(pairs, Checklist((), (1.0,), (0.0,)), "bad")


def test_a_position_before_the_first_difference_is_said_to_have_no_rows(demo: Demo) -> None:
    """As where the BOS token was not counted; an index too, if nothing else was asked for."""
    pairs = pairs_of(demo, GOOD, labels=[{"who": 9, "end": 14}])
    sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post")
    with pytest.warns(UserWarning, match="label 'who' has no rows.*at position 9 and the prompts differ from position 10 on"):
        effects = fp.rank_features(demo.model, sae, pairs, positions=["who", "end"], progress=False)
    assert {node.position for node in effects.nodes} == {"end"}
    with pytest.warns(UserWarning, match="token index 9 has no rows.*at position 9 and the prompts differ from position 10 on"):
        assert not len(fp.rank_features(demo.model, sae, pairs, positions=[9], progress=False))
    assert {node.position for node in fp.rank_features(demo.model, sae, pairs, positions=[9, -1], progress=False).nodes} == {-1}
    assert len(fp.rank_features(demo.model, sae, pairs, positions="each", progress=False))
