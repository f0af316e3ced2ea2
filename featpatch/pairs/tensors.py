"""Pairs from tensors of token ids, with one row per pair and padding at either end."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch

from featpatch.errors import FeatpatchError, each
from featpatch.pairs.files import rows_of
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import PairsWarning, Tokenizer, check_starts, plain_integers, special_positions, unmasked, unpadded

Table = Sequence[int] | Sequence[Sequence[int]]
"""Token ids as plain lists."""


def of_tensors(
    clean: torch.Tensor | Table,
    corrupted: torch.Tensor | Table,
    correct: torch.Tensor | Table | None,
    wrong: torch.Tensor | Table | None,
    labels: Sequence[Mapping[str, SupportsIndex | Sequence[SupportsIndex]]] | None,
    attention_mask: torch.Tensor | Table | None,
    tokenizer: Tokenizer | None,
) -> tuple[Pair, ...]:
    """Make the pairs of `Pairs.from_tokens`.

    Raises:
        FeatpatchError: the tables, labels or padding are not valid, see `Pairs.from_tokens`.
    """
    given = {"clean": clean, "corrupted": corrupted, "correct": correct, "wrong": wrong}
    ids = {name: _integers(name, value) for name, value in given.items() if value is not None}
    none = torch.zeros(len(clean), 0, dtype=torch.long)
    ids |= {name: none for name in ("correct", "wrong") if given[name] is None}
    if not len(ids["wrong"]):
        ids["wrong"] = none
    columns: dict[str, Sequence[Any]] = {name: table.tolist() for name, table in ids.items()}
    columns["labels"] = labels if labels is not None else [{}] * len(clean)
    columns["attention_mask"] = [None] * len(clean)
    if attention_mask is not None:
        columns["attention_mask"] = _mask(attention_mask, ids["clean"], ids["corrupted"]).tolist()
    rows = rows_of(columns)
    if attention_mask is None and tokenizer is not None:
        check_starts(tokenizer, [*columns["clean"], *columns["corrupted"]])
    pairs = each(lambda row: _pair_of_row(tokenizer, **row), rows.values, where=rows.where)
    widths = ids["clean"].shape[1], ids["corrupted"].shape[1]
    cut = sum((len(pair.clean), len(pair.corrupted)) != widths for pair in pairs)
    if cut and attention_mask is None:
        warnings.warn(
            f"{cut} of {len(pairs)} pairs are padded: the padding is removed; pass attention_mask= to mark it explicitly",
            PairsWarning,
            stacklevel=3,
        )
    return pairs


def _integers(name: str, value: Any) -> torch.Tensor:
    """Convert a tensor or nested lists to a table of integers; a single axis becomes one column.

    Raises:
        FeatpatchError: it does not hold integers, or has the wrong number of axes.
    """
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeatpatchError(f"{name} is {str(value)[:60]} ({error}): expected a tensor of token ids") from error
    whole = not table.is_floating_point() and not table.is_complex() and (table.dtype != torch.bool or name == "attention_mask")
    whole = whole or not table.numel()  # torch makes floats of empty lists
    axes = {"correct": (1, 2), "wrong": (1, 2), "attention_mask": range(1, 3)}.get(name, (2,))
    if not whole or table.ndim not in axes:
        shape = "[pairs] or [pairs, answers]" if name in ("correct", "wrong") else "[pairs, pos]"
        raise FeatpatchError(
            f"{name} is a tensor {list(table.shape)} of {table.dtype}: expected integers {shape}, such as token ids"
        )
    return table.long() if table.ndim == 2 else table.long()[:, None]


def _mask(value: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Return the attention mask as a tensor after checking that it has the shape of both tables of prompts.

    Raises:
        FeatpatchError: the shapes differ.
    """
    mask = _integers("attention_mask", value)
    if not mask.shape == clean.shape == corrupted.shape:
        raise FeatpatchError(
            f"clean is {tuple(clean.shape)}, corrupted {tuple(corrupted.shape)} and attention_mask {tuple(mask.shape)}: "
            "expected equal shapes"
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
