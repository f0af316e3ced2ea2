"""Importers of the pair files of other projects, one function per project.

Each takes the model or its tokenizer, the path of the file, and `skip`: whether to leave out pairs that do not fit the
tokenizer, with a warning that counts them. Each raises a FeatpatchError if the file is not in the format, or if a pair does not
fit the tokenizer (with `skip`: if none does).
"""

from pathlib import Path
from typing import Any

from featpatch.errors import FeatpatchError, each, errors_about
from featpatch.pairs.build import make, token_ids
from featpatch.pairs.files import csv_rows, fitting, have_columns, json_lines, parsed, read
from featpatch.pairs.labels import after_special
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import AnswerTokens, Tokenizer


def auto_circuit(tokenizer: Tokenizer, path: str | Path, *, skip: bool) -> tuple[Pair, ...]:
    """Read the pairs of an auto-circuit file, which is JSON; `word_idxs` become labels."""
    expected = "a JSON object with a list of prompts"
    text = read(path, "a JSON file", expected)
    with errors_about(repr(str(path))):
        data = parsed(text, expected)
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts:
        raise FeatpatchError(f"{str(path)!r} holds {text[:60]!r}: expected {expected}, one or more")
    words = data.get("word_idxs") or {}
    if not isinstance(words, dict) or not all(type(index) is int and index >= 0 for index in words.values()):
        raise FeatpatchError(f"word_idxs of {str(path)!r} is {words!r}: expected an object of token positions of 0 or more")
    where = [f"{str(path)!r} prompt {index}" for index in range(len(prompts))]
    each(_check_auto_circuit, prompts, where=where)

    remarks: list[str] = []

    def pair(row: dict[str, Any]) -> Pair:
        return make(
            tokenizer,
            clean=row["clean"],
            corrupted=row["corrupt"],
            correct=row["answers"],
            wrong=row["wrong_answers"],
            remarks=remarks,
            labels=after_special(tokenizer, token_ids(tokenizer, row["clean"]), words),
        )

    return fitting(pair, prompts, where=where, skip=skip, remarks=remarks)


def _check_auto_circuit(row: Any) -> None:
    if not isinstance(row, dict):
        raise FeatpatchError(f"{row!r} is not a prompt: expected an object with clean, corrupt, answers and wrong_answers")
    for field in ("clean", "corrupt"):
        prompt = row.get(field)
        if not isinstance(prompt, str) and not (prompt and _ids(prompt)):
            raise FeatpatchError(f"{field} is {prompt!r}: expected a string or a list of token ids")
    for field in ("answers", "wrong_answers"):
        answers = row.get(field)
        if not answers:
            raise FeatpatchError(
                f"there are no {field} for {str(row['clean'])[:60]!r}: expected a list of at least one; add them"
            )
        if not _all_of(answers, str) and not _ids(answers):
            raise FeatpatchError(f"{field} is {answers!r}: expected a list of strings or a list of token ids")


def _ids(values: Any) -> bool:
    return _all_of(values, int) and min(values) >= 0


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


IDS = (
    ("correct_idx", "incorrect_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("answers_idx", "corrupted_answers_idx"),
)
YEAR = ("label",)


def eap_ig(tokenizer: Tokenizer, path: str | Path, *, corrupted: str, skip: bool) -> tuple[Pair, ...]:
    """Read the pairs of an EAP-IG file, which is CSV; the columns determine the task, and other columns are not read.

    Args:
        corrupted: the column of the corrupted prompts.
    """
    rows = csv_rows(path, ())
    columns = list(rows.values[0])
    task = next((names for names in (*IDS, YEAR) if set(names) <= set(columns)), None)
    if task is None:
        known = "; ".join(", ".join(names) for names in (*IDS, YEAR))
        raise FeatpatchError(
            f"{str(path)!r} has the columns {', '.join(columns)}: expected clean, corrupted and one of: {known}"
        )
    have_columns(repr(str(path)), columns, ("clean", corrupted, *task))
    read = each(lambda row: _read(row, ("clean", corrupted), task), rows.values, where=rows.where)

    def pair(row: tuple[str, str, list[list[int]]]) -> Pair:
        clean, other, numbers = row
        right, wrong = _years(tokenizer, clean, numbers[0][0]) if task == YEAR else numbers
        return make(tokenizer, clean=clean, corrupted=other, correct=right, wrong=wrong)

    return fitting(pair, read, where=rows.where, skip=skip)


def _read(row: dict[str, str], prompts: tuple[str, str], task: tuple[str, ...]) -> tuple[str, str, list[list[int]]]:
    empty = [column for column in prompts if not row[column]]
    if empty:
        raise FeatpatchError(f"{', '.join(empty)} is empty: expected a prompt")
    return row[prompts[0]], row[prompts[1]], [_numbers(column, row[column], task) for column in task]


def _numbers(column: str, cell: str, task: tuple[str, ...]) -> list[int]:
    """Return the token ids that a cell holds, or the year as a list of one number.

    Raises:
        FeatpatchError: the cell does not have the expected format.
    """
    expected = (
        "a token id or a list of them, e.g. 12 or [12, 34]"
        if task != YEAR
        else "the last two digits of a year, 0 to 98, e.g. 52 or 4"
    )
    with errors_about(column):
        value = parsed(cell, expected)
    numbers = value if isinstance(value, list) and task != YEAR else [value]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers) or (task == YEAR and numbers[0] > 98):
        raise FeatpatchError(f"{column} is {cell!r}: expected {expected}")
    return numbers


def _years(tokenizer: Tokenizer, clean: str, year: int) -> tuple[list[int], list[int]]:
    """Return the token ids of the last two digits of all later years of the century, and of all other years.

    Raises:
        FeatpatchError: the two digits of some year are not one token after the prompt.
    """
    after = AnswerTokens(tokenizer, clean)
    tokens = [after.next_token(f"{number:02}") for number in range(100)]
    if None in tokens:
        raise FeatpatchError(
            f"{tokens.count(None)} of the years 00 to 99 (the first is {tokens.index(None):02}) are not one token after "
            f"{clean[-30:]!r}: expected one token for each; use a tokenizer that keeps the last two digits of a year together"
        )
    known = [token for token in tokens if token is not None]
    return known[year + 1 :], known[: year + 1]


FIELDS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def feature_circuits(tokenizer: Tokenizer, path: str | Path, *, skip: bool) -> tuple[Pair, ...]:
    """Read the pairs of a feature-circuits file, which is JSON lines; `clean_answer` is correct, `patch_answer` wrong."""
    rows = json_lines(path, FIELDS)
    each(_check_feature_circuits, rows.values, where=rows.where)

    remarks: list[str] = []

    def pair(row: dict[str, Any]) -> Pair:
        ids = token_ids(tokenizer, row["clean_prefix"])
        return make(
            tokenizer,
            clean=row["clean_prefix"],
            corrupted=row["patch_prefix"],
            correct=row["clean_answer"],
            wrong=row["patch_answer"],
            remarks=remarks,
            labels=after_special(tokenizer, ids, _positions(row)),
            tags={field: value for field, value in row.items() if field not in FIELDS and isinstance(value, str)},
        )

    return fitting(pair, rows.values, where=rows.where, skip=skip, remarks=remarks)


def _check_feature_circuits(row: dict[str, Any]) -> None:
    for field in FIELDS:
        if not isinstance(row[field], str):
            raise FeatpatchError(f"{field} is {row[field]!r}: expected a string")
    _positions(row)


def _positions(row: dict[str, Any]) -> dict[str, int]:
    positions = {}
    for field, value in row.items():
        if field in ("position", "pos") or field.endswith("_pos"):
            last = value[-1] if isinstance(value, list) and len(value) == 2 else value
            if type(last) is not int or last < 0:
                raise FeatpatchError(f"{field} is {value!r}: expected a token position of 0 or more, or [first, last]")
            positions[field] = last
    return positions
