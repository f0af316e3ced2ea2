"""Importer for auto-circuit (Miller et al. 2024, arXiv 2407.08734; github.com/UFO-101/auto-circuit, datasets/*.json).

A file holds one JSON object `{"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}, ...], "word_idxs": {"A_def": 10,
...}}`. Prompts and answers are texts or token ids. The optional word_idxs are token positions counted without BOS, the same in
every prompt.
"""

from pathlib import Path
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.each import each, fitting
from featpatch.pairs.files import parsed, read
from featpatch.pairs.make import make, token_ids
from featpatch.pairs.pair import Pair
from featpatch.pairs.positions import after_special
from featpatch.pairs.tokens import Tokenizer


def auto_circuit(tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> tuple[Pair, ...]:
    """Read the pairs of an auto-circuit file; `word_idxs` become labels.

    Args:
        tokenizer: the model or its tokenizer.
        path: the JSON file.
        skip: whether to leave out pairs that do not fit the tokenizer, with a warning that counts them.

    Raises:
        FeatpatchError: the file is not in the format, or a pair does not fit the tokenizer (with `skip`: none does).
    """
    expected = "a JSON object with a list of prompts"
    text = read(path, "a JSON file", expected)
    try:
        data = parsed(text, expected)
    except FeatpatchError as error:
        raise FeatpatchError(f"{str(path)!r}: {error}") from error
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts:
        raise FeatpatchError(f"{str(path)!r} holds {text[:60]!r}: expected {expected}, one or more")
    words = data.get("word_idxs") or {}
    if not isinstance(words, dict) or not all(type(index) is int and index >= 0 for index in words.values()):
        raise FeatpatchError(f"word_idxs of {str(path)!r} is {words!r}: expected an object of token positions of 0 or more")
    where = [f"{str(path)!r} prompt {index}" for index in range(len(prompts))]
    each(_check, prompts, where=where)

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


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise FeatpatchError(f"{row!r} is no prompt: expected an object with clean, corrupt, answers and wrong_answers")
    for field in ("clean", "corrupt"):
        prompt = row.get(field)
        if not isinstance(prompt, str) and not (prompt and _ids(prompt)):
            raise FeatpatchError(f"{field} is {prompt!r}: expected a text or a list of token ids")
    for field in ("answers", "wrong_answers"):
        answers = row.get(field)
        if not answers:
            raise FeatpatchError(
                f"there are no {field} to {str(row['clean'])[:60]!r}: expected a list of at least one; add them"
            )
        if not _all_of(answers, str) and not _ids(answers):
            raise FeatpatchError(f"{field} is {answers!r}: expected a list of texts or a list of token ids")


def _ids(values: Any) -> bool:
    return _all_of(values, int) and min(values) >= 0


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
