"""Pairs from tensors of token ids, with one row per pair and padding at either end."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch

from featpatch.errors import FeatpatchError, check_kinds, each
from featpatch.pairs.build import warn_of_equal_prompts
from featpatch.pairs.files import rows_of
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import PairsWarning, Tokenizer, check_starts, plain_integers, special_positions, unmasked, unpadded

Table = Sequence[int] | Sequence[Sequence[int]] | Sequence[torch.Tensor | np.ndarray] | np.ndarray
"""Token ids as lists, whose rows may have different lengths, or as an array."""


def of_tensors(
    clean: torch.Tensor | Table,
    corrupted: torch.Tensor | Table | None,
    correct: torch.Tensor | Table | None,
    wrong: torch.Tensor | Table | None,
    labels: Sequence[Mapping[str, SupportsIndex | Sequence[SupportsIndex]]] | None,
    attention_mask: torch.Tensor | Table | None,
    tokenizer: Tokenizer | None,
) -> tuple[Pair, ...]:
    """Make the pairs of `Pairs.from_tokens`, which describes the arguments and errors."""
    columns: dict[str, Sequence[Any]] = {"clean": _rows("clean", clean)}
    columns["corrupted"] = columns["clean"] if corrupted is None else _rows("corrupted", corrupted)
    count = len(columns["clean"])
    for name, answers in (("correct", correct), ("wrong", wrong)):
        none = answers is None or (name == "wrong" and not len(answers))
        columns[name] = _rows(name, [[]] * count if none else answers)
    columns["labels"] = labels if labels is not None else [{}] * count
    columns["attention_mask"] = [None] * count
    if attention_mask is not None:
        columns["attention_mask"] = _mask(attention_mask, columns["clean"], columns["corrupted"])
    rows = rows_of(columns)
    if attention_mask is None and tokenizer is not None:
        check_starts(tokenizer, [*columns["clean"], *columns["corrupted"]])
    pairs = each(lambda row: _pair_of_row(tokenizer, **row), rows.values, where=rows.where)
    given_lengths = zip(map(len, columns["clean"]), map(len, columns["corrupted"]), strict=True)
    cut = sum(pair.lengths != lengths for pair, lengths in zip(pairs, given_lengths, strict=True))
    if cut and attention_mask is None:
        warnings.warn(
            f"{cut} of {len(pairs)} pairs are padded: the padding is removed; pass attention_mask= to mark it explicitly",
            PairsWarning,
            stacklevel=3,
        )
    if corrupted is not None:
        warn_of_equal_prompts(pairs)
    return pairs


def _rows(name: str, value: Any) -> list[list[int]]:
    """Convert a tensor, an array or nested lists to rows of integers; of `correct` and `wrong`, single integers become rows.

    Raises:
        FeatpatchError: it does not hold integers, or has the wrong number of axes.
    """
    answers = name in ("correct", "wrong")
    shape = "[pairs] or [pairs, answers]" if answers else "[pairs, pos]"
    if isinstance(value, torch.Tensor | np.ndarray):
        given = torch.as_tensor(value)
        whole = not given.is_floating_point() and not given.is_complex()
        whole = (whole and (given.dtype != torch.bool or name == "attention_mask")) or not given.numel()
        if not whole or given.ndim not in ((1, 2) if answers else (2,)):
            raise FeatpatchError(
                f"{name} is a tensor {list(given.shape)} of {given.dtype}: expected integers {shape}, such as token ids"
            )
        value = given.long().tolist()
    rows = []
    for row in value if isinstance(value, list | tuple) else [None]:
        plain = plain_integers(row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else row)
        if plain is None or (isinstance(plain, int) and not answers):
            raise FeatpatchError(
                f"{name} is {str(value)[:60]}: expected integers {shape}, such as token ids, in a tensor, an array or lists"
            )
        rows.append([plain] if isinstance(plain, int) else list(plain))
    return rows


def _mask(value: Any, clean: Sequence[Sequence[int]], corrupted: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the attention mask as rows after checking that they are as long as those of both tables of prompts.

    Raises:
        FeatpatchError: the lengths differ.
    """
    mask = _rows("attention_mask", value)
    lengths = [[len(row) for row in table] for table in (clean, corrupted, mask)]
    if not lengths[0] == lengths[1] == lengths[2]:
        sizes = [f"{len(table)} rows of {min(table, default=0)} to {max(table, default=0)}" for table in lengths]
        raise FeatpatchError(
            f"clean has {sizes[0]}, corrupted {sizes[1]} and attention_mask {sizes[2]} values: expected equally many"
        )
    return mask


def _pair_of_row(
    tokenizer: Tokenizer | None,
    clean: list[int],
    corrupted: list[int],
    correct: list[int],
    wrong: list[int],
    labels: Mapping[str, Any],
    attention_mask: list[int] | None,
) -> Pair:
    """Make a pair from one row of token ids, without its padding."""
    check_kinds(Mapping, labels=labels)
    kept, kept_corrupted = (0, len(clean)), (0, len(corrupted))
    if attention_mask is not None:
        kept = kept_corrupted = unmasked(attention_mask)
    elif tokenizer is not None:
        kept, kept_corrupted = unpadded(tokenizer, clean), unpadded(tokenizer, corrupted)
    ids, other = tuple(clean[slice(*kept)]), tuple(corrupted[slice(*kept_corrupted)])
    return Pair(
        clean=ids,
        corrupted=other,
        correct=tuple(correct),
        wrong=tuple(wrong),
        labels={label: _moved(position, kept[0]) for label, position in labels.items()},
        special=special_positions(tokenizer, ids, other) if tokenizer is not None else frozenset(),
    )


def _moved(position: Any, start: int) -> Any:
    """Return the position of a label after the first `start` tokens of its row are removed."""
    plain = plain_integers(position)
    if plain is None:
        return position
    return plain - start if isinstance(plain, int) else tuple(p - start for p in plain)
