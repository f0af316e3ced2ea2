"""The fields of a pair as files and tables give them."""

from collections.abc import Mapping
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.files import parsed

NEEDED = ("clean", "corrupted", "correct", "wrong")
OBJECTS = ("labels", "corrupted_labels", "spans", "corrupted_spans")


def checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one pair, spans put among the labels.

    Raises:
        FeatpatchError: a field is not what it should be.
    """
    expected = "expected text, for answers a list of texts too, for labels and spans an object, for tags an object of texts"
    for field in (*NEEDED, *OBJECTS, "tags"):
        if field in row and not _fits(field, row[field]):
            raise FeatpatchError(f"{field} is {row[field]!r} in {str(dict(row))[:60]!r}: {expected}")
    fields: dict[str, Any] = {field: row[field] for field in NEEDED}
    for labels, spans in (("labels", "spans"), ("corrupted_labels", "corrupted_spans")):
        named, spanned = row.get(labels, {}), row.get(spans, {})
        both = sorted(set(named) & set(spanned))
        if both:
            raise FeatpatchError(f"{', '.join(both)} is in {labels} and in {spans}: expected it in one of them")
        wrong = {name: span for name, span in spanned.items() if not isinstance(span, list | tuple)}
        if wrong:
            raise FeatpatchError(
                f"{spans} holds {wrong}: expected the first character and the one after the last, e.g. [34, 38]"
            )
        fields[labels] = {**named, **spanned}
    return {**fields, "tags": row.get("tags", {})}


def from_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one pair out of the cells of a table: JSON where one cell holds several things, other columns as tags.

    Raises:
        FeatpatchError: a cell is empty or not what it should be.
    """
    row = {**row, "wrong": []} if _blank(row["wrong"]) else row
    empty = [column for column in NEEDED if _blank(row[column])]
    if empty:
        raise FeatpatchError(
            f"{', '.join(empty)} is empty: expected a text in each of clean, corrupted and correct; fill or remove the row"
        )
    filled = {column: cell for column, cell in row.items() if not _blank(cell)}
    fields = {column: filled.pop(column) for column in (*NEEDED, *OBJECTS) if column in filled}
    for column, cell in fields.items():
        several = column in OBJECTS or (column in ("correct", "wrong") and str(cell).startswith("["))
        if several and isinstance(cell, str):
            try:
                fields[column] = parsed(cell, 'JSON such as ["a", "b"] or {"S2": 12}')
            except FeatpatchError as error:
                raise FeatpatchError(f"{column}: {error}") from error
    return checked({**fields, "tags": {column: str(cell) for column, cell in filled.items()}})


def _blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell)


def _fits(field: str, value: Any) -> bool:
    if field in ("correct", "wrong") and isinstance(value, list):
        return all(isinstance(answer, str) for answer in value)
    if field == "tags":
        return isinstance(value, dict) and all(isinstance(tag, str) for tag in value.values())
    return isinstance(value, dict if field in OBJECTS else str)
