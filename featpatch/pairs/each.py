"""Functions that process rows one by one and name the row in error messages."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from featpatch.errors import FeatpatchError
from featpatch.pairs.tokens import PairsWarning

T = TypeVar("T")


def each(make: Callable[..., T], *columns: Sequence[Any], where: Sequence[str] | None = None) -> tuple[T, ...]:
    """Return `make(*row)` for every row of the columns.

    Args:
        where: the name of each row in error messages; "pair 0", "pair 1", ... by default.

    Raises:
        FeatpatchError: `make` raises one; the name of the row is put in front of its message.
    """
    made = []
    for index, row in enumerate(zip(*columns, strict=True)):
        try:
            made.append(make(*row))
        except FeatpatchError as error:
            raise FeatpatchError(f"{f'pair {index}' if where is None else where[index]}: {error}") from error
    return tuple(made)


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
            made.append(make(row))
        except FeatpatchError as error:
            if not skip:
                raise FeatpatchError(f"{name}: {error}") from error
            refused.append(f"{name}: {error}")
    if refused and not made:
        raise FeatpatchError(f"none of {len(rows)} pairs fits this tokenizer: expected at least one; the first is {refused[0]}")
    if refused:
        message = f"left out {len(refused)} of {len(rows)} pairs that do not fit this tokenizer; the first is {refused[0]}"
        warnings.warn(message, PairsWarning, stacklevel=4)
    if remarks:
        others = f" (and {len(remarks) - 1} similar remarks)" if len(remarks) > 1 else ""
        warnings.warn(f"{remarks[0]}{others}", PairsWarning, stacklevel=4)
    return tuple(made)
