"""One thing made of every row, where an error says which row it is about."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from featpatch.errors import FeatpatchError
from featpatch.pairs.tokens import PairsWarning

T = TypeVar("T")


def each(make: Callable[..., T], *columns: Sequence[Any], where: Sequence[str] | None = None) -> tuple[T, ...]:
    """`make` for every row.

    Args:
        where: what an error calls each row; "pair 0", "pair 1", ... by default.

    Raises:
        FeatpatchError: what `make` raises, after the name of the row.
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
    """`make` for every row; with `skip`, for those rows for which it raises no error, and a warning that counts the others.

    Args:
        remarks: a list that `make` adds messages to; they become one warning.

    Raises:
        FeatpatchError: a row that can't be made, or, with `skip`, no row that can.
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
