"""Importer for feature-circuits (Marks et al. 2024, arXiv 2403.19647; github.com/saprmarks/feature-circuits, data/*.json).

A file holds JSON lines `{"clean_prefix", "patch_prefix", "clean_answer", "patch_answer", "case", ...}`. Other text fields
become tags. Numbers in the fields position, pos or *_pos are token positions counted without BOS and become labels; a span
[first, last] stands for its last token.
"""

from pathlib import Path
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.each import each, fitting
from featpatch.pairs.files import json_lines
from featpatch.pairs.make import make, token_ids
from featpatch.pairs.pair import Pair
from featpatch.pairs.positions import after_special
from featpatch.pairs.tokens import Tokenizer

FIELDS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")


def feature_circuits(tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> tuple[Pair, ...]:
    """Read the pairs of a feature-circuits file; `clean_answer` is correct, `patch_answer` wrong.

    Args:
        tokenizer: the model or its tokenizer.
        path: the JSON-lines file.
        skip: whether to leave out pairs that do not fit the tokenizer, with a warning that counts them.

    Raises:
        FeatpatchError: a line is not in the format, or a pair does not fit the tokenizer (with `skip`: none does).
    """
    rows = json_lines(path, FIELDS)
    each(_check, rows.values, where=rows.where)

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


def _check(row: dict[str, Any]) -> None:
    for field in FIELDS:
        if not isinstance(row[field], str):
            raise FeatpatchError(f"{field} is {row[field]!r}: expected a text")
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
