"""Conversion between pairs and the fields that files and tables store."""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from featpatch.errors import FeatpatchError, closest, each, errors_about, listed
from featpatch.pairs.build import filler_id, make
from featpatch.pairs.files import Rows, fitting, parsed
from featpatch.pairs.pair import Pair, positions_of
from featpatch.pairs.tokens import Tokenizer, plain_integers, plain_tokenizer, special_positions

NEEDED = ("clean", "corrupted", "correct", "wrong")
OBJECTS = ("labels", "corrupted_labels", "spans", "corrupted_spans")


def pairs_of(
    tokenizer: Tokenizer,
    rows: Rows,
    read: Callable[[Any], Mapping[str, Any] | Pair],
    align: str | None,
    filler: str | None,
    long_answers: bool,
) -> tuple[Pair, ...]:
    """Make a pair from each row.

    Args:
        read: a function from a row to the arguments of `make`, or to the pair itself.
        align, filler, long_answers: those of `Pairs.from_prompts`.

    Raises:
        FeatpatchError: a row does not make a valid pair, or `align` or `filler` is not valid.
    """
    fields = each(read, rows.values, where=rows.where)
    remarks: list[str] = []
    options: dict[str, Any] = {
        "by_label": align is not None,
        "filler": filler_id(tokenizer, align, filler),
        "long_answers": long_answers,
    }
    made = partial(make, tokenizer, remarks=remarks, **options)
    return fitting(lambda row: row if isinstance(row, Pair) else made(**row), fields, where=rows.where, remarks=remarks)


def checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the types of the fields of one pair and return them, with spans added to the labels.

    Raises:
        FeatpatchError: a field has the wrong type, or a name is both a label and a span.
    """
    expected = (
        "expected a string; for answers, a string or a list of strings; for labels and spans, an object; for tags, an object "
        "of strings"
    )
    for field in (*NEEDED, *OBJECTS, "tags"):
        if field in row and not _fits(field, row[field]):
            raise FeatpatchError(f"{field} is {row[field]!r} in {str(dict(row))[:60]!r}: {expected}")
    fields: dict[str, Any] = {field: row[field] for field in NEEDED}
    for labels, spans in (("labels", "spans"), ("corrupted_labels", "corrupted_spans")):
        named, spanned = row.get(labels, {}), row.get(spans, {})
        both = sorted(set(named) & set(spanned))
        if both:
            raise FeatpatchError(
                f"{', '.join(both)} is in both {labels} and {spans}: expected it in only one of them; remove it from the other"
            )
        wrong = {name: span for name, span in spanned.items() if not isinstance(span, list | tuple)}
        if wrong:
            raise FeatpatchError(
                f"{spans} holds {wrong}: expected the index of the first character and the index after the last, e.g. [34, 38]"
            )
        fields[labels] = {**named, **spanned}
    return {**fields, "tags": row.get("tags", {})}


def from_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of one pair from the cells of a table row.

    A cell with several values holds JSON. Columns that are not fields of a pair become tags.

    Raises:
        FeatpatchError: a required cell is empty, or a cell does not have the expected format.
    """
    row = {**row, "wrong": []} if _blank(row["wrong"]) else row
    empty = [column for column in NEEDED if _blank(row[column])]
    if empty:
        raise FeatpatchError(
            f"{', '.join(empty)} is empty: expected text in each of clean, corrupted and correct; fill in or remove the row"
        )
    if any(re.fullmatch(r"\[[0-9, ]*\]", str(row[prompt])) for prompt in ("clean", "corrupted")):
        raise FeatpatchError(
            f"clean is {str(row['clean'])[:60]!r}, which looks like token ids: expected text; write ids with Pairs.to_jsonl, "
            "or text with Pairs.to_csv(path, tokenizer=model)"
        )
    filled = {column: cell for column, cell in row.items() if not _blank(cell)}
    fields = {column: filled.pop(column) for column in (*NEEDED, *OBJECTS) if column in filled}
    for column, cell in fields.items():
        several = column in OBJECTS or (column in ("correct", "wrong") and str(cell).startswith("["))
        if several and isinstance(cell, str):
            with errors_about(column):
                fields[column] = parsed(cell, 'JSON such as ["a", "b"] or {"S2": 12}')
    return checked({**fields, "tags": {column: str(cell) for column, cell in filled.items()}})


def from_line(tokenizer: Tokenizer, row: Mapping[str, Any], *, long_answers: bool) -> dict[str, Any] | Pair:
    """Return the fields of one pair from a line of JSON, or the pair itself if its prompts are token ids.

    Raises:
        FeatpatchError: a field is unknown or has the wrong type.
    """
    ids = isinstance(row["clean"], list)
    known = (*NEEDED, *(OBJECTS[:2] if ids else OBJECTS), "tags", *(("special", "answer_position") if ids else ()))
    if unknown := [field for field in row if field not in (*known, *OBJECTS)]:
        raise FeatpatchError(
            f"{listed([f'{field!r:.60}' for field in unknown], 5)} in {str(dict(row))[:60]!r}: expected only "
            f"{', '.join(known)}; put other information into tags{closest(unknown[0], known)}"
        )
    return _of_ids(tokenizer, row, long_answers) if ids else checked(row)


def _of_ids(tokenizer: Tokenizer, row: Mapping[str, Any], long_answers: bool) -> Pair:
    """Make a pair from a row whose prompts are token ids, as `written` writes it; nothing is tokenized or aligned.

    Answers are ids, or lists of ids for sequences; with `long_answers`, all become sequences. Special positions are by default
    those of the tokenizer's special tokens.

    Raises:
        FeatpatchError: a field has the wrong type.
    """
    for name in (*NEEDED, "special"):
        ids = row.get(name, [])
        nested = name in ("correct", "wrong") and isinstance(ids, list) and all(isinstance(answer, list) for answer in ids)
        if not all(isinstance(plain_integers(each), tuple) for each in (ids if nested else [ids])):
            raise FeatpatchError(
                f"{name} is {str(ids)[:60]!r} in a line with token ids: expected a list of ids or, for answers of several "
                "tokens, a list of lists"
            )
    other = [field for field in OBJECTS[2:] if field in row]
    if other or not all(_fits(field, row.get(field, {})) for field in (*OBJECTS[:2], "tags")):
        raise FeatpatchError(
            f"{', '.join(other) or 'labels or tags'} in {str(dict(row))[:60]!r}: expected, alongside token ids, labels as an "
            "object of positions and tags as an object of strings"
        )
    answer_position = row.get("answer_position", -1)
    if type(answer_position) is not int:
        raise FeatpatchError(f"answer_position is {answer_position!r}: expected an integer, a position of the prompt")
    places: dict[str, Any] = {
        field: {name: plain_integers(at) for name, at in row.get(field, {}).items()} for field in OBJECTS[:2]
    }
    if any(None in labels.values() for labels in places.values()):
        raise FeatpatchError(
            f"labels is {row.get('labels')!r} in a line with token ids: expected positions, or for a span a list of them"
        )
    clean, corrupted = tuple(row["clean"]), tuple(row["corrupted"])
    answers: dict[str, list[Any]] = {name: row[name] for name in ("correct", "wrong")}
    if long_answers or any(isinstance(answer, list) for side in answers.values() for answer in side):
        of = {
            name: tuple(tuple(each) if isinstance(each, list) else (each,) for each in side) for name, side in answers.items()
        }
        sides: dict[str, Any] = {"correct": (), "wrong": (), **{f"{name}_sequences": side for name, side in of.items()}}
    else:
        sides = {name: tuple(side) for name, side in answers.items()}
    return Pair(
        clean,
        corrupted,
        **sides,
        **places,
        special=frozenset(row["special"]) if "special" in row else special_positions(tokenizer, clean, corrupted),
        tags=row.get("tags", {}),
        answer_position=answer_position,
    )


def written(pair: Pair, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fields of a pair for a line of JSON, from which exactly this pair can be read again.

    With a tokenizer, prompts and answers are texts if these give exactly the same pair again; else they are token ids.

    Raises:
        FeatpatchError: a label or tag that JSON can't hold, or a tokenizer without `decode`.
    """
    _check_unicode(pair)
    if tokenizer is not None and not pair.correct_sequences and not pair.by_label:
        fields = _texts(pair, tokenizer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if make(tokenizer, **checked(fields)) == pair:
                    return fields
        except FeatpatchError:
            pass  # texts that give no pair, or not this one, are no error: the token ids below always do
    fields = {"clean": pair.clean, "corrupted": pair.corrupted, "labels": dict(pair.labels), "special": sorted(pair.special)}
    if pair.by_label:
        fields["corrupted_labels"] = dict(pair.corrupted_labels)
    sides = {name: getattr(pair, f"{name}_sequences" if pair.correct_sequences else name) for name in ("correct", "wrong")}
    return {**fields, **sides, "tags": dict(pair.tags), "answer_position": pair.answer_position}


def _check_unicode(pair: Pair) -> None:
    """Raise a FeatpatchError unless all labels and tags are strings without surrogates (halves of characters)."""
    texts = [*pair.labels, *pair.tags, *pair.tags.values()]
    if not all(isinstance(text, str) for text in texts) or any("\ud800" <= char <= "\udfff" for char in "".join(texts)):
        raise FeatpatchError(
            f"labels {list(pair.labels)} and tags {dict(pair.tags)}: expected valid Unicode strings, so that they can be "
            "written to a file"
        )


def for_cells(pair: Pair, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fields of a pair as the cells of a table, with one column per tag; a cell with several values holds JSON.

    Raises:
        FeatpatchError: a label or tag that a file can't hold, tags that do not give one column each, or a tokenizer without
            `decode`.
    """
    _check_unicode(pair)
    fields = written(pair, None) if tokenizer is None else _texts(pair, tokenizer)
    tags = {f"tag {name}" if name in (*NEEDED, *OBJECTS) else name: tag for name, tag in fields["tags"].items()}
    if len(tags) < len(fields["tags"]) or "" in tags:
        raise FeatpatchError(
            f"tags {list(fields['tags'])}: expected names that each give a different column; rename one, or use to_jsonl"
        )
    sides = {name: fields[name][0] if len(fields[name]) == 1 else fields[name] or "" for name in ("correct", "wrong")}
    shown = {name: fields[name] for name in ("clean", "corrupted")} | sides | {"labels": fields["labels"] or ""}
    if pair.by_label:
        shown["corrupted_labels"] = fields["corrupted_labels"]
    return {
        name: cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for name, cell in shown.items()
    } | tags


def _texts(pair: Pair, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the prompts, answers and labelled spans of a pair as texts, without the special tokens at the start.

    Raises:
        FeatpatchError: the tokenizer has no `decode`.
    """
    decode = getattr(plain_tokenizer(tokenizer), "decode", None)
    if decode is None:
        raise FeatpatchError(
            "the tokenizer has no decode: expected one that can convert ids to text; leave it out to write token ids"
        )
    start = next((position for position in range(len(pair)) if position not in pair.special), len(pair))

    def answer(ids: Sequence[int]) -> str:
        before, after = decode(list(pair.clean[start:])), decode([*pair.clean[start:], *ids])
        return str(after.removeprefix(before) if after.startswith(before) else decode(list(ids)))

    def place(ids: Sequence[int], label: int | tuple[int, ...]) -> Any:
        span = [ids[position] for position in positions_of(label)]
        return label if isinstance(label, int) else {"span": decode(span).strip()}

    elsewhere = {name: place(pair.corrupted, label) for name, label in pair.corrupted_labels.items()}
    return {
        "clean": decode(list(pair.clean[start:])),
        "corrupted": decode(list(pair.corrupted[start:])),
        "correct": [answer(ids) for ids in pair.answers[0]],
        "wrong": [answer(ids) for ids in pair.answers[1]],
        "labels": {name: place(pair.clean, label) for name, label in pair.labels.items()},
        **({"corrupted_labels": elsewhere} if elsewhere else {}),
        "tags": dict(pair.tags),
    }


def _blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell)


def _fits(field: str, value: Any) -> bool:
    if field in ("correct", "wrong") and isinstance(value, list):
        return all(isinstance(answer, str) for answer in value)
    if field == "tags":
        return isinstance(value, dict) and all(isinstance(tag, str) for tag in value.values())
    return isinstance(value, dict if field in OBJECTS else str)
