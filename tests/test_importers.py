"""Pairs from files and tables, ours and those of three other projects; labels by character; alignment by labels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
from test_tasks import byte_level

import featpatch as fp
from featpatch.pairs.tokens import PairsWarning

CLEAN = "When John and Mary left , Mary gave a book to"
CORRUPTED = "When John and Mary left , John gave a book to"
PAIR = {"clean": CLEAN, "corrupted": CORRUPTED, "correct": "John", "wrong": "Mary"}
SHORT = "When John and Mary left , John gave a book to"
LONG = "When John and Mary left , then the new John gave a book to"
YEARS = "The war lasted from the year 1752 to the year 17"


@pytest.fixture(scope="module")
def words() -> Any:
    """A word is a token; <bos> comes first."""
    return fp.load_demo().model.tokenizer


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A space belongs to the word after it; no BOS."""
    return byte_level()


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text).input_ids)


def one(tokenizer: Any, text: str) -> int:
    (token,) = tokenizer(text, add_special_tokens=False).input_ids
    return token


def expected(tokenizer: Any, *, space: str = "", **changed: Any) -> fp.Pair:
    """The pair of CLEAN and CORRUPTED, and what is else with it."""
    fields = {
        "clean": ids(tokenizer, CLEAN),
        "corrupted": ids(tokenizer, CORRUPTED),
        "correct": (one(tokenizer, f"{space}John"),),
        "wrong": (one(tokenizer, f"{space}Mary"),),
        "special": frozenset({0} if tokenizer.bos_token else ()),
    }
    return fp.Pair(**{**fields, **changed})


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


# From files and tables of ours.


def test_json_lines(words: Any, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl", {**PAIR, "labels": {"S2": 7}, "tags": {"template": "3"}}, "", {**PAIR, "wrong": ["Mary", "Tom"]}
    )
    assert list(fp.Pairs.from_jsonl(words, path)) == [
        expected(words, labels={"S2": 7}, tags={"template": "3"}),
        expected(words, wrong=(one(words, "Mary"), one(words, "Tom"))),
    ]


CSV = f"""\
,clean,corrupted,correct,wrong,labels,spans,template,corruption
0,"{CLEAN}","{CORRUPTED}",John,"[""Mary"", ""Tom""]","{{""S2"": 7}}","{{""IO"": [5, 9]}}",3,swap
1,"{CLEAN}","{CORRUPTED}",John,Mary,,,,swap
"""


def from_table(words: Any) -> list[fp.Pair]:
    return [
        expected(
            words,
            wrong=(one(words, "Mary"), one(words, "Tom")),
            labels={"S2": 7, "IO": 2},
            tags={"template": "3", "corruption": "swap"},
        ),
        expected(words, tags={"corruption": "swap"}),
    ]


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_csv(words: Any, tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(CSV, encoding=encoding, newline=newline)
    assert list(fp.Pairs.from_csv(words, path)) == from_table(words)


def test_pandas(words: Any, tmp_path: Path) -> None:
    """As read from CSV, with NaN for empty cells; and with lists and dictionaries in its cells."""
    path = tmp_path / "p.csv"
    path.write_text(CSV)
    frame = pandas.read_csv(path, index_col=0, dtype={"template": "Int64"})
    assert list(fp.Pairs.from_pandas(words, frame)) == from_table(words)
    frame = pandas.DataFrame([{**PAIR, "wrong": ["Mary", "Tom"], "labels": {"S2": 7}, "spans": {"IO": (5, 9)}, "template": 3}])
    assert list(fp.Pairs.from_pandas(words, frame.assign(corruption="swap"))) == from_table(words)[:1]


HEADER = "clean,corrupted,correct,wrong"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"p.csv' is empty: expected a header and one row per pair"),
        (HEADER, r"p.csv' has a header but no rows: expected one row per pair"),
        (
            "clean,corrupt,correct\na,b,c",
            r"p.csv' has the columns clean, corrupt, correct and lacks corrupted, wrong: expected",
        ),
        (f"{HEADER},wrong\na,b,c,d,e", r"p.csv' has several columns named wrong: expected each name once"),
        (f"{HEADER}\n\na,b,c,d,e", r"p.csv' line 3 has 5 cells and the header 4: expected equal numbers; put text"),
        (f'{HEADER}\n"The\nwar",The war,a,b\nThe,The,,a', r"p.csv' line 4: correct is empty: expected text in each"),
        (f'{HEADER}\nThe,"The', r"p.csv' line 2 is not CSV \(.*\): expected cells separated by commas"),
        (f'{HEADER}\nThe,The,"[""a"", b]",b', r"p.csv' line 2: correct: '\[\"a\", b\]' is not JSON .*: expected JSON such as"),
        (f"{HEADER},labels\nThe,The,a,b,S2", r"p.csv' line 2: labels: 'S2' is not JSON .*: expected JSON such as"),
        (
            f"{HEADER},labels\nThe,The,a,b,7",
            r"p.csv' line 2: labels is 7 in .*: expected a string.*for labels and spans, an object",
        ),
        (f"{HEADER}\nThe,The war,Tom,Anna", r"p.csv' line 2: clean has 2 tokens and corrupted has 3: expected equal lengths"),
        (f"{HEADER}\nThe,The,Tom,Xaver", r"p.csv' line 2: answer 'Xaver' is not in the tokenizer's vocabulary"),
        (f'{HEADER}\n"[1, 5]","[1, 6]",7,8', r"p.csv' line 2: clean is '\[1, 5\]', which looks like token ids: expected text"),
    ],
)
def test_csv_files_that_are_refused(words: Any, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_csv(words, tmp_path / "p.csv")


def test_lines_of_json_that_are_no_pairs(words: Any, tmp_path: Path) -> None:
    (tmp_path / "array.jsonl").write_text("[]")
    with pytest.raises(fp.FeatpatchError, match="line 1: '\\[\\]' is a list: expected one object per line with clean"):
        fp.Pairs.from_jsonl(words, tmp_path / "array.jsonl")
    (tmp_path / "like.jsonl").write_text('{"clean": "a", "corrupt": "b", "correct": "c", "wrong": "d"}')
    with pytest.raises(fp.FeatpatchError, match="lacks corrupted: expected an object with .*; did you mean 'corrupt'"):
        fp.Pairs.from_jsonl(words, tmp_path / "like.jsonl")


IMPORTERS = ["from_jsonl", "from_csv", "from_feature_circuits", "from_eap_ig", "from_auto_circuit"]


@pytest.mark.parametrize("importer", IMPORTERS)
def test_files_that_can_not_be_read(words: Any, tmp_path: Path, importer: str) -> None:
    read = getattr(fp.Pairs, importer)
    with pytest.raises(fp.FeatpatchError, match=r"there is no file 'nowhere': expected a "):
        read(words, "nowhere")
    (tmp_path / "p").write_bytes(b"clean,\xff\n")
    with pytest.raises(fp.FeatpatchError, match=r"p' is not UTF-8 \(.*0xff.*\): expected .*, in UTF-8; save it"):
        read(words, tmp_path / "p")
    (tmp_path / "p").write_text(" \n\n")
    with pytest.raises(fp.FeatpatchError, match=r"p' is empty: expected (one|a) "):
        read(words, tmp_path / "p")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ([PAIR], r"frame is a list: expected a pandas DataFrame"),
        (pandas.DataFrame([{"clean": "a"}]), r"the table has the columns clean and lacks corrupted, correct, wrong"),
        (pandas.DataFrame([PAIR, {**PAIR, "correct": float("nan")}], index=[3, 8]), r"row 8: correct is empty: expected text"),
        (
            pandas.DataFrame([{**PAIR, "correct": 52}]),
            r"row 0: correct is 52 in .*: expected a string; for answers, a string or a list",
        ),
        (pandas.DataFrame(columns=list(PAIR)), r"there are no pairs: expected at least one"),
    ],
)
def test_tables_that_are_refused(words: Any, frame: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_pandas(words, frame)


# Labels by character.


@pytest.mark.filterwarnings("ignore:.*the clean and the corrupted prompt are the same")
def test_places_are_token_positions(bytewise: Any, words: Any) -> None:
    """A word of several tokens is labelled at its last one."""
    text = "Then Mary left"
    assert [bytewise.decode([token]) for token in ids(bytewise, text)] == ["Then", " Mary", " l", "e", "f", "t"]
    rows = {"clean": [text], "corrupted": [text], "correct": [" Tom"], "wrong": [" Anna"]}
    labels = {"index": 1, "text": "left", "span": (5, 9), "inside": (10, 12)}
    (pair,) = fp.Pairs.from_prompts(bytewise, **rows, labels=[labels], corrupted_labels=[{"text": "left"}])
    assert pair.labels == {"index": 1, "text": 5, "span": 1, "inside": 3}
    (pair,) = fp.Pairs.from_prompts(words, **rows, labels=[labels | {"inside": [0, 4]}])
    assert pair.labels == {"index": 1, "text": 3, "span": 2, "inside": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": {"S2": "Mary"}}, r"label 'S2': 'Mary' is more than once in 'When .*: expected text that occurs exactly once; give more"),
        ({"labels": {"S2": "Anna"}}, r"label 'S2': 'Anna' is not in 'When .*: expected text that occurs exactly once"),
        ({"labels": {"S2": 1.5}}, r"label 'S2': 1.5 is not a valid label: expected a token position, text"),
        ({"labels": {"S2": True}}, r"label 'S2': True is not a valid label"),
        ({"labels": {"S2": 12}}, r"label 'S2': position 12 is outside a prompt of .* tokens: expected 0 to 11"),
        ({"spans": {"S2": [4, 46]}}, r"label 'S2': the characters \[4, 46\] are outside 'When .*: expected 0 <= start < end <= 45"),
        ({"spans": {"S2": [4, 4]}}, r"label 'S2': the characters \[4, 4\] are outside .* or empty"),
        ({"spans": {"S2": [4, 5]}}, r"label 'S2': character 4 of 'When .* is in no token"),
        ({"spans": {"S2": [4, 5, 6]}}, r"label 'S2': \[4, 5, 6\] is not a valid label"),
        ({"spans": {"S2": 7}}, r"spans holds \{'S2': 7\}: expected the index of the first character and the index after the last"),
        ({"spans": {"S2": [5, 9]}, "labels": {"S2": 2}}, r"S2 is in both labels and spans: expected it in only one of them"),
        ({"spans": {"S2": [26, 30]}, "corrupted_spans": {"S2": [14, 18]}},
         r"label 'S2' is at position 7 of the clean prompt and at 4 of the corrupted one: expected the same .*align='labels'"),
        ({"corrupted_labels": {"S2": 7}}, r"label 'S2' is only in corrupted_labels: expected it in labels too, which has \[\]"),
        ({"tags": {"template": 3}}, r"tags is \{'template': 3\} in .*for tags, an object of strings"),
        ({"wrong": ["Mary", 3]}, r"wrong is \['Mary', 3\] in .*: expected a string; for answers, a string or a list of strings"),
    ],
)  # fmt: skip
def test_lines_that_are_refused(words: Any, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = lines(tmp_path / "p.jsonl", PAIR, {**PAIR, **fields})
    with pytest.raises(fp.FeatpatchError, match=f"p.jsonl' line 2: {message}"):
        fp.Pairs.from_jsonl(words, path)


# Alignment by labels.


@pytest.mark.filterwarnings("ignore:fillers change:featpatch.pairs.tokens.PairsWarning")
def test_alignment(words: Any, tmp_path: Path) -> None:
    """Whichever prompt is shorter gets filler, behind the label in front; the labels and the ends stand side by side."""
    spans = {"comma": [24, 25], "S2": [26, 30]}
    row = {**PAIR, "clean": SHORT, "corrupted": LONG, "spans": spans, "corrupted_spans": {**spans, "S2": [39, 43]}}
    swapped = {**row, "clean": LONG, "corrupted": SHORT, "spans": row["corrupted_spans"], "corrupted_spans": spans}
    options = {"align": "labels", "filler": "a"}
    equal = {**PAIR, "labels": {"S2": 7}, "corrupted_labels": {"S2": 7}}
    with pytest.warns(
        PairsWarning, match=r"so that it is now '<bos> When .* left , a a a John .*'; .* \(and 1 similar remark\)"
    ):
        four = fp.Pairs.from_jsonl(words, lines(tmp_path / "p.jsonl", row, swapped, PAIR, equal), **options)
    first, second, third, fourth = four
    filled = ids(words, "When John and Mary left , a a a John gave a book to")
    assert (first.clean, first.corrupted, first.labels) == (filled, ids(words, LONG), {"comma": 6, "S2": 10})
    assert (second.clean, second.corrupted, second.labels) == (ids(words, LONG), filled, first.labels)
    assert (third, fourth) == (expected(words), expected(words, labels={"S2": 7}))
    columns = {key: [value] for key, value in {**PAIR, "clean": SHORT, "corrupted": LONG}.items()}
    labels = {"labels": [{"comma": ",", "S2": 7}], "corrupted_labels": [{"comma": 6, "S2": "new John"}]}
    assert fp.Pairs.from_prompts(words, **columns, **labels, **options)[0] == first
    table = pandas.DataFrame([row])
    assert fp.Pairs.from_pandas(words, table, **options)[0] == first
    for column in ("spans", "corrupted_spans"):
        table[column] = table[column].map(json.dumps)
    table.to_csv(tmp_path / "p.csv")
    assert fp.Pairs.from_csv(words, tmp_path / "p.csv", **options)[0] == first


@pytest.mark.filterwarnings("ignore:fillers change:featpatch.pairs.tokens.PairsWarning")
def test_alignment_after_the_last_label(words: Any) -> None:
    (pair,) = fp.Pairs.from_prompts(
        words, clean=["Then Mary left"], corrupted=["Then Mary saw the man"], correct=["Tom"], wrong=["Anna"],
        labels=[{"S": "Mary"}], corrupted_labels=[{"S": "Mary"}], align="labels", filler="the",
    )  # fmt: skip
    assert pair.clean == ids(words, "Then Mary the the left")
    assert pair.labels == {"S": 2}


@pytest.mark.parametrize(
    ("labels", "corrupted_labels", "options", "message"),
    [
        ({}, {}, {}, r"clean has 12 tokens and corrupted has 15: expected equal lengths"),
        ({}, {}, {"align": "left", "filler": "a"}, r"align='left': expected 'labels', or None"),
        (
            {},
            {},
            {"align": "labels"},
            r"clean has 12 tokens, corrupted has 15, and align='labels' without corrupted_labels: expected",
        ),
        (
            {"S2": 7},
            {"at": 7},
            {"align": "labels"},
            r"the labels are \['S2'\] in the clean and \['at'\] in the corrupted prompt",
        ),
        ({"S2": range(7, 9)}, {"S2": 10}, {"align": "labels"}, r"label 'S2' is at \(7, 8\) .* and at 10 .*, 2 and 1 tokens: "),
        (
            {"S2": 7},
            {"S2": 15},
            {"align": "labels"},
            r"label 'S2': position 15 is outside a prompt of .* tokens: expected 0 to 14",
        ),
        ({}, {}, {"filler": "a"}, r"align=None, filler='a': expected align='labels' with a filler"),
        ({}, {}, {"align": "labels", "filler": "a book"}, r"filler='a book' can't be used: answer 'a book' is 2 tokens"),
        ({"S2": 7}, {}, {"align": "labels", "filler": "a"}, r"the labels are \['S2'\] in the clean and \[\] in the corrupted"),
        (
            {"a": 6, "b": 7},
            {"a": 10, "b": 6},
            {"align": "labels", "filler": "a"},
            r"the labels are \['a', 'b'\] .* \['b', 'a'\]",
        ),
        ({}, {}, {"align": "labels", "filler": "a"}, r"the labels are \[\] in the clean and \[\] .*: expected the same names"),
        (
            {"S2": 7},
            {"S2": 10},
            {"align": "labels", "filler": "a"},
            r"differ in length before the first label, 'S2' at 7 and 10: ",
        ),
        (
            {"a": 2, "b": 7},
            {"a": 2, "b": 8},
            {"align": "labels", "filler": "a"},
            r"differ in length in 2 of the regions.*one region only",
        ),
        ({"a": 6, "b": 6}, {"a": 6, "b": 9}, {"align": "labels", "filler": "a"}, r"after label 'a' there are 0 and 3 tokens: "),
        (
            {"end": 11},
            {"end": 11},
            {"align": "labels", "filler": "a"},
            r"after label 'end' there are 0 and 3 tokens: expected at",
        ),
    ],
)
def test_what_can_not_be_aligned(
    words: Any, labels: dict[str, int], corrupted_labels: dict[str, int], options: dict[str, str], message: str
) -> None:
    columns: dict[str, Any] = {"clean": [SHORT], "corrupted": [LONG], "correct": ["Tom"], "wrong": ["Anna"]}
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_prompts(words, **columns, labels=[labels], corrupted_labels=[corrupted_labels], **options)


def test_labels_that_move_in_prompts_of_equal_length(words: Any) -> None:
    columns: dict[str, Any] = {"clean": [CLEAN], "corrupted": [CORRUPTED], "correct": ["Tom"], "wrong": ["Anna"]}
    labels = {"labels": [{"a": 2, "b": 7}], "corrupted_labels": [{"a": 2, "b": 8}]}
    with pytest.raises(fp.FeatpatchError, match="differ in length in 2 of the regions"):
        fp.Pairs.from_prompts(words, **columns, **labels, align="labels", filler="a")


def test_label_by_label(words: Any, tmp_path: Path) -> None:
    """Without a filler the prompts are kept, and each label has a place in both; files give the same pairs again."""
    spans = {"comma": [24, 25], "S2": [26, 30]}
    row = {**PAIR, "clean": SHORT, "corrupted": LONG, "spans": spans, "corrupted_spans": {**spans, "S2": [39, 43]}}
    equal = {**PAIR, "labels": {"S2": 7}, "corrupted_labels": {"S2": 7}}
    pairs = fp.Pairs.from_jsonl(words, lines(tmp_path / "p.jsonl", row, equal), align="labels")
    assert (pairs[0].clean, pairs[0].corrupted) == (ids(words, SHORT), ids(words, LONG))
    assert (pairs[0].labels, pairs[0].corrupted_labels) == ({"comma": 6, "S2": 7}, {"comma": 6, "S2": 10})
    assert pairs[0].places("S2") == [(7, 10)]
    assert pairs[1] == expected(words, labels={"S2": 7})
    assert "12 and 15 tokens, patched label by label" in repr(pairs[0])
    assert "S2 7 / 10" in repr(pairs[0])
    assert repr(pairs) == "2 pairs of 12 to 15 tokens, labels comma, S2, 1 of them patched label by label"
    assert fp.Pairs.from_jsonl(words, pairs.to_jsonl(tmp_path / "again.jsonl", tokenizer=words)) == pairs
    assert fp.Pairs.from_csv(words, pairs.to_csv(tmp_path / "again.csv", tokenizer=words), align="labels") == pairs
    moved = {**PAIR, "labels": {"S2": 7}, "corrupted_labels": {"S2": 8}}
    (pair,) = fp.Pairs.from_jsonl(words, lines(tmp_path / "m.jsonl", moved), align="labels")
    assert pair.by_label
    assert pair.places("S2") == [(7, 8)]


# feature-circuits.

AGREEMENT = {
    "clean_prefix": CLEAN,
    "patch_prefix": CORRUPTED,
    "clean_answer": " John",
    "patch_answer": " Mary",
    "case": "clean_first",
}


@pytest.mark.parametrize(("kind", "shift"), [("words", 1), ("bytewise", 0)])
def test_feature_circuits(kind: str, shift: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    path = lines(tmp_path / "p.json", {**AGREEMENT, "subj_pos": 0, "position": [2, 3], "number": 4, "source": "x"}, AGREEMENT)
    plain = expected(tokenizer, space=" ", tags={"case": "clean_first"})
    labels = {"subj_pos": shift, "position": 3 + shift}
    positioned = expected(tokenizer, space=" ", labels=labels, tags={"case": "clean_first", "source": "x"})
    assert list(fp.Pairs.from_feature_circuits(tokenizer, path)) == [positioned, plain]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: '\{' is not JSON"),
        (
            {"clean_prefix": "a"},
            r"line 2: .* lacks patch_prefix, clean_answer, patch_answer: expected an object with clean_prefix",
        ),
        ({**AGREEMENT, "clean_answer": 3}, r"line 2: clean_answer is 3: expected a string"),
        ({**AGREEMENT, "pos": "2"}, r"line 2: pos is '2': expected a token position of 0 or more, or \[first, last\]"),
        ({**AGREEMENT, "pos": -1}, r"line 2: pos is -1: expected a token position"),
        ({**AGREEMENT, "pos": [3]}, r"line 2: pos is \[3\]: expected a token position of 0 or more, or \[first, last\]"),
        ({**AGREEMENT, "pos": [1, -2]}, r"line 2: pos is \[1, -2\]: expected a token position"),
        ({**AGREEMENT, "pos": 11}, r"line 2: label 'pos': position 12 is outside a prompt of .* tokens: expected 0 to 11"),
        ({**AGREEMENT, "patch_answer": " give up"}, r"line 2: answer ' give up' is 2 tokens"),
    ],
)
def test_feature_circuits_that_are_refused(words: Any, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_feature_circuits(words, lines(tmp_path / "p.json", AGREEMENT, row))


# EAP-IG.


def table(path: Path, header: str, *cells: str, clean: str = CLEAN, corrupted: str = CORRUPTED) -> Path:
    return lines(path, f"clean,corrupted,{header}", *(f'"{clean}","{corrupted}",{row}' for row in cells))


@pytest.mark.parametrize(
    ("header", "cells", "correct", "wrong"),
    [
        ("correct_idx,incorrect_idx", "103,115", (103,), (115,)),
        ("country,country_idx,corrupted_country_idx", "Peru,7,8", (7,), (8,)),
        ("corrupted_answer_idx,clean_answer_idx", "7,8", (8,), (7,)),
        ("answers_idx,corrupted_answers_idx", '"[123, 45]",[6]', (123, 45), (6,)),
    ],
)
def test_eap_ig(words: Any, tmp_path: Path, header: str, cells: str, correct: tuple[int, ...], wrong: tuple[int, ...]) -> None:
    pairs = fp.Pairs.from_eap_ig(words, table(tmp_path / "p.csv", header, cells))
    assert list(pairs) == [expected(words, correct=correct, wrong=wrong)]


def test_eap_ig_with_two_corruptions(words: Any, tmp_path: Path) -> None:
    """The first columns of some files have no name."""
    third = "When John and Mary left , Tom gave a book to"
    header = ",,clean,corrupted,corrupted_hard,correct_idx,incorrect_idx"
    path = lines(tmp_path / "p.csv", header, f'0,470,"{CLEAN}","{third}","{CORRUPTED}",103,115')
    assert fp.Pairs.from_eap_ig(words, path)[0] == expected(words, corrupted=ids(words, third), correct=(103,), wrong=(115,))
    assert fp.Pairs.from_eap_ig(words, path, corrupted="corrupted_hard")[0] == expected(words, correct=(103,), wrong=(115,))


@pytest.mark.parametrize("kind", ["words", "bytewise"])
def test_eap_ig_years(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Later years are right, the year itself and earlier ones wrong, each with two digits."""
    tokenizer = request.getfixturevalue(kind)
    prompts = {"clean": YEARS, "corrupted": YEARS.replace("1752", "1701")}
    pairs = fp.Pairs.from_eap_ig(tokenizer, table(tmp_path / "p.csv", "label", "52", "4", "0", "98", **prompts))
    for pair, year in zip(pairs, (52, 4, 0, 98), strict=True):
        assert pair.clean == ids(tokenizer, YEARS)
        assert pair.corrupted == ids(tokenizer, prompts["corrupted"])
        assert [tokenizer.decode([token]) for token in pair.correct] == [f"{number:02}" for number in range(year + 1, 100)]
        assert [tokenizer.decode([token]) for token in pair.wrong] == [f"{number:02}" for number in range(year + 1)]


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        ("answer", "3", r"p.csv' has the columns clean, corrupted, answer: expected clean, corrupted and one of: correct_idx, inc.*label"),
        ("correct_idx,incorrect_idx", "3,-4", r"line 2: incorrect_idx is '-4': expected a token id or a list of them"),
        ("correct_idx,incorrect_idx", "3,John", r"line 2: incorrect_idx: 'John' is not JSON .*: expected a token id"),
        ("correct_idx,incorrect_idx", '3,"[4, 5.5]"', r"line 2: incorrect_idx is '\[4, 5.5\]': expected a token id"),
        ("correct_idx,incorrect_idx", "3,[]", r"line 2: incorrect_idx is '\[\]': expected a token id"),
        ("correct_idx,incorrect_idx", "3,3", r"line 2: correct=\(3,\), wrong=\(3,\): expected no answer to be both"),
        ("label", "1752", r"line 2: label is '1752': expected the last two digits of a year, 0 to 98, e.g. 52 or 4"),
        ("label", "99", r"line 2: label is '99': expected the last two digits of a year, 0 to 98"),
        ("label", "-1", r"line 2: label is '-1': expected the last two digits of a year"),
        ("label", "[52]", r"line 2: label is '\[52\]': expected the last two digits of a year"),
    ],
)  # fmt: skip
def test_eap_ig_that_is_refused(words: Any, tmp_path: Path, header: str, cells: str, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_eap_ig(words, table(tmp_path / "p.csv", header, cells))


def test_eap_ig_with_columns_or_prompts_missing(words: Any, tmp_path: Path) -> None:
    path = table(tmp_path / "p.csv", "correct_idx,incorrect_idx", "3,4", clean="")
    with pytest.raises(fp.FeatpatchError, match="line 2: clean is empty: expected a prompt"):
        fp.Pairs.from_eap_ig(words, path)
    with pytest.raises(fp.FeatpatchError, match="has the columns clean, .* and lacks corrupted_hard: expected"):
        fp.Pairs.from_eap_ig(words, path, corrupted="corrupted_hard")


def test_years_of_several_tokens(tmp_path: Path) -> None:
    """Characters as a tokenizer: no two digits are one token."""
    path = table(tmp_path / "p.csv", "label", "52", clean=YEARS, corrupted=YEARS)
    with pytest.raises(
        fp.FeatpatchError, match=r"line 2: 100 of the years 00 to 99 \(the first is 00\) are not one token after '.* 17'"
    ):
        fp.Pairs.from_eap_ig(lambda text: [ord(letter) for letter in text], path)


# auto-circuit.

PROMPT = {"clean": CLEAN, "corrupt": CORRUPTED, "answers": ["John"], "wrong_answers": ["Mary", "Tom"]}


def test_auto_circuit(words: Any, tmp_path: Path) -> None:
    """Prompts and answers as texts, or as ids (here without BOS, so that nothing moves)."""
    wrong = (one(words, "Mary"), one(words, "Tom"))
    content = {"prompts": [PROMPT, {**PROMPT, "wrong_answers": ["Tom"]}], "seq_labels": ["x"], "word_idxs": {"A": 3, "B": 0}}
    assert list(fp.Pairs.from_auto_circuit(words, lines(tmp_path / "p.json", json.dumps(content, indent=2)))) == [
        expected(words, wrong=wrong, labels={"A": 4, "B": 1}),
        expected(words, wrong=wrong[1:], labels={"A": 4, "B": 1}),
    ]
    content = {
        "prompts": [{"clean": [20, 21], "corrupt": [20, 22], "answers": [5, 0], "wrong_answers": [6, 7]}],
        "word_idxs": {"A": 1},
    }
    (pair,) = fp.Pairs.from_auto_circuit(words, lines(tmp_path / "p.json", content))
    assert pair == fp.Pair((20, 21), (20, 22), (5, 0), (6, 7), labels={"A": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"p.json': .* is not JSON .*: expected a JSON object with a list of prompts"),
        ([PROMPT], r"p.json' holds '\[.*: expected a JSON object with a list of prompts, one or more"),
        ({"prompts": []}, r"p.json' holds .*: expected a JSON object with a list of prompts, one or more"),
        ({"prompts": ["a"]}, r"prompt 0: 'a' is not a prompt: expected an object with clean, corrupt, answers"),
        (
            {"prompts": [PROMPT, {**PROMPT, "corrupt": ["a"]}]},
            r"prompt 1: corrupt is \['a'\]: expected a string or a list of token ids",
        ),
        (
            {"prompts": [PROMPT, {**PROMPT, "answers": []}]},
            r"prompt 1: there are no answers for 'When .*: expected a list of at least",
        ),
        (
            {"prompts": [{**PROMPT, "wrong_answers": ["a", 3]}]},
            r"prompt 0: wrong_answers is \['a', 3\]: expected a list of strings or",
        ),
        ({"prompts": [{**PROMPT, "answers": [3, -1]}]}, r"prompt 0: answers is \[3, -1\]: expected a list of strings or a"),
        (
            {"prompts": [PROMPT], "word_idxs": {"A": "x"}},
            r"word_idxs of .*p.json' is \{'A': 'x'\}: expected an object of token",
        ),
        (
            {"prompts": [PROMPT], "word_idxs": {"A": 11}},
            r"prompt 0: label 'A': position 12 is outside a prompt of .* tokens: expected 0 to 11",
        ),
    ],
)
def test_auto_circuit_that_is_refused(words: Any, tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_auto_circuit(words, lines(tmp_path / "p.json", content))


# Pairs that do not fit the tokenizer.


@pytest.mark.parametrize("importer", ["from_feature_circuits", "from_eap_ig", "from_auto_circuit"])
def test_pairs_that_do_not_fit_are_left_out_on_request(words: Any, tmp_path: Path, importer: str) -> None:
    """Unequal lengths in the second pair; what is not in the format at all stays an error."""
    read, path, longer = getattr(fp.Pairs, importer), tmp_path / "p", CORRUPTED + " Tom"
    write = {
        "from_feature_circuits": lambda *others: lines(path, *({**AGREEMENT, "patch_prefix": other} for other in others)),
        "from_eap_ig": lambda *others: lines(
            path, "clean,corrupted,correct_idx,incorrect_idx", *(f'"{CLEAN}","{other}",3,4' for other in others)
        ),
        "from_auto_circuit": lambda *others: lines(path, {"prompts": [{**PROMPT, "corrupt": other} for other in others]}),
    }[importer]
    write(CORRUPTED, longer, CORRUPTED)
    with pytest.raises(fp.FeatpatchError, match=r"p' (line [23]|prompt 1): clean has 12 tokens and corrupted has 13"):
        read(words, path)
    with pytest.warns(
        PairsWarning, match=r"left out 1 of 3 pairs, .*; the first problem: .*p' (line [23]|prompt 1): clean has 12"
    ):
        pairs = read(words, path, skip=True)
    assert [pair.corrupted for pair in pairs] == [ids(words, CORRUPTED)] * 2
    assert len(read(words, write(CORRUPTED), skip=True)) == 1
    with pytest.raises(
        fp.FeatpatchError, match=r"none of the 2 pairs fits this tokenizer: expected at least one; the first problem: .*p' "
    ):
        read(words, write(longer, longer), skip=True)
    with pytest.raises(fp.FeatpatchError, match="expected a (string|prompt)"):
        read(words, write(CORRUPTED, 3 if importer != "from_eap_ig" else ""), skip=True)


# Pairs as files.


def test_pairs_are_written_as_texts_where_these_are_read_as_the_same(words: Any, bytewise: Any, tmp_path: Path) -> None:
    """Words of a tokenizer with BOS, and of one with spaces in its tokens; labels, spans, several answers and none."""
    for tokenizer, space in ((words, ""), (bytewise, " ")):
        labels = [{"S2": 5, "start": {"span": "When John"}}]
        made = fp.Pairs.from_prompts(
            tokenizer, clean=[CLEAN], corrupted=[CORRUPTED], correct=[[f"{space}John"]], wrong=[[f"{space}Mary", f"{space}gave"]],
            labels=labels, tags=[{"template": "=1+1"}],
        )  # fmt: skip
        path = made.to_jsonl(tmp_path / "pairs.jsonl", tokenizer=tokenizer)
        (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        assert (row["clean"], row["corrupted"], row["tags"]) == (CLEAN, CORRUPTED, {"template": "=1+1"})
        assert [text.strip() for text in (*row["correct"], *row["wrong"])] == ["John", "Mary", "gave"]
        assert row["labels"] == {"S2": 5, "start": {"span": "When John"}}
        assert fp.Pairs.from_jsonl(tokenizer, path) == made
        table = pandas.read_csv(made.to_csv(tmp_path / "pairs.csv", tokenizer=tokenizer))
        assert table["template"].tolist() == ["'=1+1"]
        read = fp.Pairs.from_csv(tokenizer, tmp_path / "pairs.csv")
        assert read == fp.Pairs((replace(made[0], tags={"template": "'=1+1"}),))
    made.to_csv(tmp_path / "ids.csv")
    assert json.loads(pandas.read_csv(tmp_path / "ids.csv")["clean"][0]) == list(made[0].clean)
    twice = fp.Pairs((replace(made[0], tags={"clean": "x"}),)).to_csv(tmp_path / "twice.csv", tokenizer=bytewise)
    assert list(pandas.read_csv(twice).columns) == ["clean", "corrupted", "correct", "wrong", "labels", "tag clean"]


def test_pairs_that_texts_do_not_give_again_are_written_as_ids(words: Any, tmp_path: Path) -> None:
    """Two prompts of which nothing is special here, and one read before the end; a reader may want sequences of all answers."""
    plain = fp.Pair((5, 6, 7), (5, 8, 7), (9,), (10,), labels={"both": (0, 1)}, answer_position=1)
    path = fp.Pairs((plain,)).to_jsonl(tmp_path / "pairs.jsonl", tokenizer=words)
    row = json.loads(path.read_text())
    assert (row["clean"], row["correct"], row["special"], row["answer_position"]) == ([5, 6, 7], [9], [], 1)
    assert fp.Pairs.from_jsonl(words, path)[0] == plain
    whole = fp.Pairs((replace(plain, answer_position=2),)).to_jsonl(path)
    assert fp.Pairs.from_jsonl(words, whole, long_answers=True)[0].answers == (((9,),), ((10,),))
    bos = words.bos_token_id
    given = lines(path, {"clean": [bos, 5], "corrupted": [bos, 6], "correct": [7], "wrong": []})
    assert fp.Pairs.from_jsonl(words, given)[0].special == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corrupted": "When"}, "corrupted is 'When' in a line with token ids"),
        ({"correct": ["John"]}, "correct is .*John.* in a line with token ids: expected a list of ids"),
        ({"correct": 7}, "correct is '7' in a line with token ids"),
        ({"wrong": [7, [8]]}, "wrong is .* in a line with token ids"),
        ({"special": ["a"]}, "special is .* in a line with token ids"),
        ({"spans": {"S2": [0, 1]}}, "spans in .*: expected, alongside token ids, labels as an object of positions"),
        ({"labels": [3]}, "labels or tags in"),
        ({"labels": {"S2": "Mary"}}, "labels is .*Mary.* in a line with token ids: expected positions"),
        ({"labels": {"S2": 9}}, "label 'S2': position 9 is outside a prompt of .* tokens: expected 0 to 1"),
        ({"answer_position": "end"}, "answer_position is 'end'"),
        ({"clean": []}, "the clean prompt has no tokens"),
    ],
)
def test_lines_of_ids_that_are_refused(words: Any, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    row = {"clean": [5, 6], "corrupted": [5, 7], "correct": [8], "wrong": [9]}
    with pytest.raises(fp.FeatpatchError, match=f"p.jsonl' line 1: {message}"):
        fp.Pairs.from_jsonl(words, lines(tmp_path / "p.jsonl", {**row, **fields}))


def test_pairs_that_can_not_be_written(words: Any, tmp_path: Path) -> None:
    pair = fp.Pair((5, 6), (5, 7), (8,), (9,))
    with pytest.raises(fp.FeatpatchError, match="pair 1: labels .*expected valid Unicode"):
        fp.Pairs((pair, replace(pair, tags={"a": "\ud800"}))).to_jsonl(tmp_path / "p.jsonl")
    with pytest.raises(fp.FeatpatchError, match="is a folder"):
        fp.Pairs((pair,)).to_jsonl(tmp_path)
    for tags, message in (
        ({"a": "\ud800"}, "Unicode"),
        ({"": "x"}, "a different column"),
        ({"clean": "c", "tag clean": "d"}, "a different column"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.Pairs((replace(pair, tags=tags),)).to_csv(tmp_path / "p.csv")
    for write in (fp.Pairs((pair,)).to_jsonl, fp.Pairs((pair,)).to_csv):
        with pytest.raises(fp.FeatpatchError, match="no decode: .*leave it out"):
            write(tmp_path / "p", tokenizer=lambda text: [1])
    assert not list(tmp_path.iterdir())
