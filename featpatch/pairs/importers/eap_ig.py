"""Importer for EAP-IG (Hanna et al. 2024, arXiv 2403.17806; github.com/hannamw/EAP-IG).

A file is a CSV table with the columns clean and corrupted and, depending on the task, either two columns with the token ids of
the answers to the clean and to the corrupted prompt (one id, or a list such as "[12, 34]"), or for greater-than the two digits
of the year that answers must exceed.
"""

from pathlib import Path

from featpatch.errors import FeatpatchError
from featpatch.pairs.each import each, fitting
from featpatch.pairs.files import csv_rows, have_columns, parsed
from featpatch.pairs.make import make
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import AnswerTokens, Tokenizer

IDS = (
    ("correct_idx", "incorrect_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
    ("answers_idx", "corrupted_answers_idx"),
)
YEAR = ("label",)


def eap_ig(tokenizer: Tokenizer, path: str | Path, *, corrupted: str = "corrupted", skip: bool = False) -> tuple[Pair, ...]:
    """Read the pairs of an EAP-IG file; the columns determine the task, and other columns are not read.

    Args:
        tokenizer: the model or its tokenizer.
        path: the CSV file.
        corrupted: the column of the corrupted prompts.
        skip: whether to leave out pairs that do not fit the tokenizer, with a warning that counts them.

    Raises:
        FeatpatchError: unknown columns, a cell that is not in the format, or a pair that does not fit the tokenizer (with
            `skip`: none does).
    """
    columns, rows = csv_rows(path)
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
        "a token id or a list of them, e.g. 12 or [12, 34]" if task != YEAR else "the last two digits of a year, e.g. 52 or 4"
    )
    try:
        value = parsed(cell, expected)
    except FeatpatchError as error:
        raise FeatpatchError(f"{column}: {error}") from error
    numbers = value if isinstance(value, list) and task != YEAR else [value]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers) or (task == YEAR and numbers[0] > 99):
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
            f"{tokens.count(None)} of the years 00 to 99 (the first is {tokens.index(None):02}) do not follow "
            f"{clean[-30:]!r} as one token: expected all to; use a tokenizer that keeps the last two digits of a year together"
        )
    known = [token for token in tokens if token is not None]
    return known[year + 1 :], known[: year + 1]
