"""Answers of several tokens: the pairs, their files, and the checklist, whose number is computed again by a plain loop."""

import json
from collections.abc import Callable, Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from small import Small
from test_tasks import byte_level

import featpatch as fp
from featpatch.pairs.checklist import Checklist, check

PROMPTS = {"clean": "Then John met Mary at the", "corrupted": "Then Mary met John at the"}
ROW = {**PROMPTS, "correct": ["red store", "bank"], "wrong": "big new park"}


@pytest.fixture(scope="module")
def words() -> Any:
    """A word is a token; <bos> comes first."""
    return fp.load_demo().model.tokenizer


def lengths(text: str) -> list[int]:
    """A tokenizer: the length of each word."""
    return [len(word) for word in text.split()]


def pair(**changed: Any) -> fp.Pair:
    fields = {"clean": (1, 2), "corrupted": (1, 3), "correct": (), "wrong": ()}
    sequences = {"correct_sequences": ((5, 6), (7,)), "wrong_sequences": ((8, 9, 8),)}
    return fp.Pair(**{**fields, **sequences, **changed})


def from_prompts(tokenizer: Any, **changed: Any) -> fp.Pairs:
    columns = {key: [value] for key, value in {**ROW, **changed}.items()}
    return fp.Pairs.from_prompts(tokenizer, **columns, long_answers=True)


# Pairs.


def test_answers_are_sequences_in_both_cases() -> None:
    assert pair().answers == (((5, 6), (7,)), ((8, 9, 8),))
    assert fp.Pair((1, 2), (1, 3), (4, 5), (6,)).answers == (((4,), (5,)), ((6,),))
    assert pair().answer_position == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"correct": (4,)},
            r"correct=\(4,\), wrong=\(\) together with correct_sequences=.*: expected tokens or sequences, not both",
        ),
        (
            {"wrong": (4,)},
            r"correct=\(\), wrong=\(4,\) together with .*: expected tokens or sequences, not both; give one-token",
        ),
        (
            {"correct": (4,), "correct_sequences": ()},
            r"correct=\(4,\), wrong=\(\) together with .*: expected tokens or sequences, not both",
        ),
        ({"correct_sequences": ()}, r"correct_sequences=\(\), wrong_sequences=\(\(8, 9, 8\),\): expected at least one correct"),
        ({"correct_sequences": ((5,), ())}, r"correct_sequences=\(\(5,\), \(\)\), .*: expected at least one token in each"),
        ({"wrong_sequences": ((),)}, r"wrong_sequences=\(\(\),\): expected at least one token in each answer"),
        ({"wrong_sequences": ((1,), (5, 6))}, r"wrong_sequences=\(\(1,\), \(5, 6\)\): expected no answer to be both"),
        (
            {"answer_position": 0},
            r"answer_position is 0 and the answers have several tokens: expected the last position, 1, because",
        ),
        ({"answer_position": -2}, r"answer_position is 0 and the answers have several tokens: expected the last position"),
    ],
)
def test_answers_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        pair(**changed)


def test_one_token_answers_may_be_read_before_the_end() -> None:
    assert fp.Pair((1, 2), (1, 3), (4,), (5,), answer_position=0).answer_position == 0


def test_the_digest_covers_sequences() -> None:
    others = [pair(), pair(correct_sequences=((5, 6),)), pair(correct_sequences=((5, 6), (4,))), pair(wrong_sequences=((9,),))]
    one_token = fp.Pair((1, 2), (1, 3), (7,), (9,))
    as_sequences = pair(correct_sequences=((7,),), wrong_sequences=((9,),))
    digests = [fp.Pairs((one,)).digest() for one in (*others, one_token, as_sequences)]
    assert len(set(digests)) == 6
    assert fp.Pairs((pair(),)).digest() == digests[0]


# Tokenisation.


def test_words_without_special_tokens(words: Any) -> None:
    (made,) = from_prompts(words)
    ids = words.convert_tokens_to_ids
    assert made.answers == ((tuple(ids(["red", "store"])), (ids("bank"),)), (tuple(ids(["big", "new", "park"])),))
    assert (made.correct, made.wrong) == ((), ())
    assert made.clean[0] == words.bos_token_id
    assert words.bos_token_id not in [token for side in made.answers for answer in side for token in answer]


def test_bytes() -> None:
    """A space belongs to the word after it, so that prompt and answer are the text's own tokens."""
    tokenizer = byte_level()
    (made,) = from_prompts(tokenizer, correct=" Mary gave", wrong=" John left")
    for answers, text in zip(made.answers, (" Mary gave", " John left"), strict=True):
        assert made.clean + answers[0] == tuple(tokenizer(PROMPTS["clean"] + text).input_ids)


def test_a_plain_function() -> None:
    (made,) = from_prompts(lengths, corrupted=PROMPTS["clean"].replace("Mary", "Marie"))
    assert made.answers == (((3, 5), (4,)), ((3, 3, 4),))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"correct": ["bank", "red Xaver"]}, r"pair 0: answer 'red Xaver' is not in the tokenizer's vocabulary: expected"),
        ({"wrong": ""}, r"pair 0: answer '' has no tokens: expected at least one; give text"),
        ({"correct": []}, r"pair 0: correct_sequences=\(\), .*: expected at least one correct answer"),
        ({"wrong": "red store"}, r"pair 0: correct_sequences=.*: expected no answer to be both correct and wrong"),
    ],
)
def test_texts_that_are_refused(words: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        from_prompts(words, **changed)


def test_without_long_answers_the_error_names_them(words: Any) -> None:
    columns = {key: [value] for key, value in ROW.items()}
    message = r"answer 'red store' is 2 tokens .*: expected exactly one; .* or pass long_answers=True .*metric='sequence_log_prob_diff'"
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_prompts(words, **columns)
    with pytest.raises(fp.FeatpatchError, match="filler='a b' can't be used") as caught:
        fp.Pairs.from_prompts(lengths, **columns, align="labels", filler="a b")
    assert "long_answers" not in str(caught.value)


# Files.


@pytest.mark.parametrize("tokenizer", ["words", "lengths"])
def test_files_and_tables(tokenizer: str, words: Any, tmp_path: Path) -> None:
    chosen = words if tokenizer == "words" else lengths
    rows = [{**ROW, "labels": {"S": 4}}, {**ROW, "correct": "store", "wrong": "red bank"}]
    answers = [[ROW["correct"], [ROW["wrong"]]], [["store"], ["red bank"]]]
    bare = {"add_special_tokens": False} if tokenizer == "words" else {}
    expected = [tuple(tuple(tuple(_ids(chosen(text, **bare))) for text in side) for side in of_pair) for of_pair in answers]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    frame = pandas.DataFrame(rows)
    cells = frame.assign(
        correct=[json.dumps(row["correct"]) if isinstance(row["correct"], list) else row["correct"] for row in rows],
        labels=[json.dumps(row.get("labels", {})) for row in rows],
    )
    cells.to_csv(tmp_path / "p.csv")
    read = [
        fp.Pairs.from_jsonl(chosen, tmp_path / "p.jsonl", long_answers=True),
        fp.Pairs.from_csv(chosen, tmp_path / "p.csv", long_answers=True),
        fp.Pairs.from_pandas(chosen, frame, long_answers=True),
    ]
    assert [[one.answers for one in pairs] for pairs in read] == [expected] * 3
    assert read[0] == read[1] == read[2]
    for refused in (
        lambda: fp.Pairs.from_jsonl(chosen, tmp_path / "p.jsonl"),
        lambda: fp.Pairs.from_csv(chosen, tmp_path / "p.csv"),
        lambda: fp.Pairs.from_pandas(chosen, frame),
    ):
        with pytest.raises(fp.FeatpatchError, match=r"(line|row) .: answer 'red store' is 2 tokens"):
            refused()


def _ids(tokens: Any) -> Sequence[int]:
    return getattr(tokens, "input_ids", tokens)


# The checklist.


def by_hand(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> float:
    """log of the sum over answers of the product of their tokens' probabilities, one forward pass for each token."""
    total = 0.0
    for answer in answers:
        product = 1.0
        for place, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer[:place]]]))
            product *= exp(float(logits[0, -1].log_softmax(-1)[token]))
        total += product
    return log(total)


def test_the_number_by_hand(small: Small) -> None:
    prompts = {"clean": tuple(small.clean[0].tolist()), "corrupted": tuple(small.corrupted[0].tolist())}
    long = pair(**prompts, correct_sequences=((5, 6), (7,)), wrong_sequences=((8, 9, 8), (6, 5)))
    single = fp.Pair(**prompts, correct=(5, 6), wrong=(7,))
    found = check([long, single], small.model)
    for values, prompt in ((found.clean, long.clean), (found.corrupted, long.corrupted)):
        right, wrong = (by_hand(small.model, prompt, answers) for answers in long.answers)
        assert values[0] == pytest.approx(right - wrong, abs=1e-9)
        with torch.no_grad():
            logits = small.model(torch.tensor([prompt]))[0, -1]
        assert values[1] == pytest.approx(float((logits[5] + logits[6]) / 2 - logits[7]), abs=1e-9)
    assert check([long], small.model, metric="prob_diff").clean[0] == pytest.approx(found.clean[0], abs=1e-9)
    gap = next(finding.detail for finding in found.findings if finding.rule == "gap")
    assert gap.startswith(f"gap {found.clean[0] - found.corrupted[0]:.2f}")


def statuses(found: Checklist, index: int = 0) -> dict[str, str]:
    return {finding.rule: finding.status for finding in found.findings if finding.pair == index}


def details(found: Checklist, index: int = 0) -> dict[str, str]:
    return {finding.rule: finding.detail for finding in found.findings if finding.pair == index}


def bigram(tokens: torch.Tensor) -> torch.Tensor:
    """After 2 comes 5, after 3 comes 8, both 5 nats above anything else."""
    table = torch.zeros(10, 10)
    table[2, 5], table[3, 8] = 5.0, 5.0
    return table[tokens]


def test_a_good_pair_and_the_same_the_wrong_way_round() -> None:
    good = pair()
    turned = pair(clean=good.corrupted, corrupted=good.clean)
    found = check([good, turned], bigram)
    assert [statuses(found, index)["output"] for index in range(2)] == ["pass", "fail"]
    assert details(found)["answers"] == "2 right, 1 wrong, 1 to 3 tokens"


def test_the_second_token_counts() -> None:
    """Both answers begin alike; the corruption turns what comes after that."""

    def model(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 10)
        logits[:, 2:, 6] = 4.0 * (tokens[:, 1:2] == 2)
        logits[:, 2:, 7] = 4.0 * (tokens[:, 1:2] == 3)
        return logits

    found = check([pair(correct_sequences=((5, 6),), wrong_sequences=((5, 7),))], model)
    assert (found.clean[0], found.corrupted[0]) == pytest.approx((4, -4), abs=1e-5)
    assert set(statuses(found).values()) == {"pass"}
    assert details(found)["answers"] == "1 right, 1 wrong, 2 tokens each"


Outcome = tuple[str, str]
ANSWERS: dict[str, tuple[dict[str, Any], Outcome]] = {
    "single tokens": ({"correct_sequences": ((5,),), "wrong_sequences": ((8,),)}, ("pass", "1 right, 1 wrong, one token each")),
    "right begins wrong": (
        {"correct_sequences": ((7,), (5, 6)), "wrong_sequences": ((5, 6, 8),)},
        ("warn", r"of [5, 6] (right) and [5, 6, 8] (wrong), one is the beginning of the other: they are not mutually exclusive"),
    ),
    "wrong begins right": ({"correct_sequences": ((5, 6),), "wrong_sequences": ((5,),)}, ("warn", "[5, 6] (right) and [5] (wrong)")),
    "beginning alike": ({"correct_sequences": ((5, 6),), "wrong_sequences": ((5, 7),)}, ("pass", "2 tokens each")),
    "one side alone": ({"correct_sequences": ((5, 6), (5,)), "wrong_sequences": ((8,),)}, ("pass", "1 to 2 tokens")),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    changed, (status, detail) = ANSWERS[name]
    found = check([pair(**changed)], bigram)
    assert statuses(found)["answers"] == status
    assert detail in details(found)["answers"]


def test_special_and_unknown_tokens_within_sequences(words: Any) -> None:
    (made,) = from_prompts(words)
    model: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: torch.zeros(*tokens.shape, len(words))  # noqa: E731
    for odd in (words.bos_token_id, words.unk_token_id):
        for field, other in (("correct_sequences", "wrong_sequences"), ("wrong_sequences", "correct_sequences")):
            changed = {field: ((20, odd),), other: ((21, 22),)}
            found = check([fp.Pair(made.clean, made.corrupted, (), (), **changed)], model, tokenizer=words)
            assert statuses(found)["answers"] == "fail"
            assert f"answers [{odd}] are special or unknown" in details(found)["answers"]


def test_duplicates() -> None:
    others = [pair(), pair(wrong_sequences=((8, 9),)), pair(), pair(correct_sequences=((5,),)), pair(correct_sequences=((5,),))]
    found = check(others, bigram)
    assert [statuses(found, index)["duplicate"] for index in range(5)] == ["pass", "pass", "fail", "pass", "fail"]


def test_models_that_are_none_on_the_longer_prompt() -> None:
    """Finite on the prompt, not on the prompt with an answer."""

    def model(tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((*tokens.shape, 10), 0.0 if tokens.shape[1] == 2 else torch.nan)

    with pytest.raises(fp.FeatpatchError, match=r"tokens \[2, 3\]: expected finite logits"):
        fp.Pairs((pair(),)).check(model)
