"""Rows of JSON-lines files, CSV files and tables in memory, with errors that name the line or row."""

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import pandas as pd

from featpatch.errors import FeatpatchError, check_kinds, closest, counted, each, errors_about
from featpatch.files import as_path, read_json
from featpatch.pairs.tokens import PairsWarning


@dataclass(frozen=True)
class Rows:
    """Rows of a file or table with their places in it.

    Attributes:
        where: the place of each row for error messages, e.g. `'pairs.csv' line 3`.
        values: the fields of each row, or the pair made from them.
    """

    where: list[str]
    values: list[Any]


@contextmanager
def opened(path: str | Path, kind: str) -> Iterator[TextIO]:
    """Yield a file that is open for reading, whose lines end with a line feed.

    Args:
        path: the file.
        kind: what the file should be, for error messages, e.g. "a CSV file".

    Raises:
        FeatpatchError: the file is missing, can't be read or is not UTF-8.
    """
    path = as_path(path)
    if not path.is_file():
        raise FeatpatchError(f"there is no file {str(path)!r}: expected {kind}; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        what = f"is not UTF-8 ({error})" if isinstance(error, ValueError) else f"can't be read ({error.strerror})"
        raise FeatpatchError(f"the file {str(path)!r} {what}: expected {kind}, in UTF-8; save it in this encoding") from error


def read(path: str | Path, kind: str, holding: str) -> str:
    """Return the text of a file that holds what it should, in words for error messages, e.g. "a header and a row per pair".

    Raises:
        FeatpatchError: the file is missing, not UTF-8 or empty.
    """
    with opened(path, kind) as file:
        text = file.read()
    if not text.strip():
        raise FeatpatchError(f"the file {str(path)!r} is empty: expected {holding}")
    return text


def json_lines(path: str | Path, needed: Sequence[str]) -> Rows:
    """Read a file with one JSON object per line; blank lines are skipped.

    Raises:
        FeatpatchError: the file can't be read, or a line is not a JSON object with the needed fields.
    """
    text = read(path, "a JSON-lines file", "one JSON object per line")
    return _objects(dict(_numbered(path, text.split("\n"))), needed)


def json_lines_in_blocks(path: str | Path, needed: Sequence[str], size: int) -> Iterator[Rows]:
    """Read a JSON-lines file `size` lines at a time, so that it need not fit into memory; see `json_lines`.

    Raises:
        FeatpatchError: the file can't be read or is empty, or a line is not a JSON object with the needed fields.
    """
    with opened(path, "a JSON-lines file") as file:
        lines = _numbered(path, file)
        block = dict(islice(lines, size))
        if not block:
            raise FeatpatchError(f"the file {str(path)!r} is empty: expected one JSON object per line")
        while block:
            yield _objects(block, needed)
            block = dict(islice(lines, size))


def _numbered(path: str | Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Return the lines that are not blank, each after its name in error messages."""
    return ((f"{str(path)!r} line {n}", line) for n, line in enumerate(lines, start=1) if line.strip())


def _objects(lines: Mapping[str, str], needed: Sequence[str]) -> Rows:
    def parse(line: str) -> dict[str, Any]:
        row = parsed(line, "one object per line; for a CSV file, use fp.Pairs.from_csv")
        if not isinstance(row, dict):
            raise FeatpatchError(
                f"{line[:60]!r} is a {type(row).__name__}: expected one object per line with {', '.join(needed)}"
            )
        missing = [field for field in needed if field not in row]
        if missing:
            near = closest(missing[0], [field for field in row if field not in needed])
            raise FeatpatchError(f"{line[:60]!r} lacks {', '.join(missing)}: expected an object with {', '.join(needed)}{near}")
        return row

    return Rows(list(lines), list(each(parse, list(lines.values()), where=list(lines))))


def csv_rows(path: str | Path, needed: Sequence[str]) -> Rows:
    """Read a CSV file with a header; columns without a name (row numbers) are left out.

    Raises:
        FeatpatchError: the file can't be read or has no rows, a needed column is missing, a column occurs twice, or a row has
            more or fewer cells than the header.
    """
    reader = csv.reader(io.StringIO(read(path, "a CSV file", "a header and one row per pair"), newline=""), strict=True)
    lines = dict(_lines(reader, str(path)))
    (_, header), *rest = lines.items()
    if not rest:
        raise FeatpatchError(f"the file {str(path)!r} has a header but no rows: expected one row per pair")
    for where, cells in rest:
        if len(cells) != len(header):
            raise FeatpatchError(
                f"{where} has {len(cells)} cells and the header {len(header)}: expected equal numbers; put text that contains "
                "a comma in quotes"
            )
    have_columns(repr(str(path)), [column for column in header if column], needed)
    values = [{column: cell for column, cell in zip(header, cells, strict=True) if column} for _, cells in rest]
    return Rows([where for where, _ in rest], values)


def frame_rows(frame: Any, needed: Sequence[str]) -> Rows:
    """Return the rows of a pandas DataFrame; a missing value becomes None.

    Raises:
        FeatpatchError: it is not a DataFrame, a needed column is missing, or a column occurs twice.
    """
    if not isinstance(frame, pd.DataFrame):
        raise FeatpatchError(f"frame is a {type(frame).__name__}: expected a pandas DataFrame; for a file use from_csv")
    columns = [str(column) for column in frame.columns]
    have_columns("the table", columns, needed)
    values = [
        {
            column: None if pd.api.types.is_scalar(cell) and pd.isna(cell) else cell
            for column, cell in zip(columns, row, strict=True)
        }
        for row in frame.itertuples(index=False, name=None)
    ]
    return Rows([f"row {index!r}" for index in frame.index.tolist()], values)


def rows_of(columns: Mapping[str, Sequence[Any]]) -> Rows:
    """Return the rows of some columns, named "pair 0", "pair 1", ... in error messages.

    Raises:
        FeatpatchError: the columns are not sequences of equal length.
    """
    check_kinds(Sized, **columns)
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        first, size = next(iter(counts.items()))
        others = [f"{count} of {name}" for name, count in counts.items() if count != size]
        raise FeatpatchError(
            f"there are {size} of {first} and {' and '.join(others)}: expected equal numbers, one of each per pair; add the "
            "missing ones, or remove those without a pair"
        )
    values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return Rows([f"pair {index}" for index in range(len(values))], values)


def parsed(text: str, expected: str) -> Any:
    """Parse a text as JSON.

    Args:
        text: the text.
        expected: what the text should be, for the error message.

    Raises:
        FeatpatchError: the text is not JSON.
    """
    try:
        return read_json(text)
    except ValueError as error:
        raise FeatpatchError(f"{text[:60]!r} is not JSON ({error}): expected {expected}") from error


def have_columns(name: str, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise a FeatpatchError unless a table has the required columns, and each column once."""
    missing = [column for column in needed if column not in columns]
    if missing:
        raise FeatpatchError(
            f"{name} has the columns {', '.join(columns)} and lacks {', '.join(missing)}: expected {', '.join(needed)}; "
            "rename or add columns"
        )
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise FeatpatchError(
            f"{name} has several columns named {', '.join(twice)}: expected each name once; rename or remove one"
        )


def _lines(reader: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows that are not blank, each after the file and line at which it begins."""
    begin = 1
    try:
        for cells in reader:
            if cells:
                yield f"{path!r} line {begin}", cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise FeatpatchError(
            f"{path!r} line {begin} is not CSV ({error}): expected cells separated by commas, with closing quotes where there "
            "are opening ones"
        ) from error


T = TypeVar("T")


def fitting(
    make: Callable[[T], Any], rows: Sequence[T], *, where: Sequence[str], skip: bool = False, remarks: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Return `make(row)` for every row, or only for the rows that fit the tokenizer.

    Args:
        where: the name of each row in error messages.
        skip: whether to leave out rows for which `make` raises a FeatpatchError, with a warning that counts them.
        remarks: a list to which `make` adds messages, which are reported as one warning.

    Raises:
        FeatpatchError: `make` fails for a row or, with `skip`, for all of them.
    """
    made, refused = [], []
    for row, name in zip(rows, where, strict=True):
        try:
            with errors_about(name):
                made.append(make(row))
        except FeatpatchError as error:
            if not skip:
                raise
            refused.append(str(error))
    if refused and not made:
        raise FeatpatchError(
            f"none of the {len(rows)} pairs fits this tokenizer: expected at least one; the first problem: {refused[0]}"
        )
    if refused:
        message = (
            f"left out {len(refused)} of {len(rows)} pairs, which do not fit this tokenizer; the first problem: {refused[0]}"
        )
        warnings.warn(message, PairsWarning, stacklevel=4)
    if remarks:
        others = f" (and {counted(len(remarks) - 1, 'similar remark')})" if len(remarks) > 1 else ""
        warnings.warn(f"{remarks[0]}{others}", PairsWarning, stacklevel=4)
    return tuple(made)
