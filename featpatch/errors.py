"""The package's one error class, argument checks that many functions share, and counts, numbers and lists as phrases.

Every message of an error names the value that was given, what was expected, and what to do next.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from sys import float_info
from typing import Any, TypeGuard, TypeVar

from featpatch.untrusted import visible

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1
"""The largest integer that arrays and files can hold."""


class FeatpatchError(ValueError):
    """Error for unusable input; its message names the value, what was expected and what to do next.

    Examples:
        >>> try:
        ...     pairs[0].positions("S3")
        ... except fp.FeatpatchError as error:
        ...     print(str(error).partition(":")[0])
        a pair has no label 'S3'
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class FeatpatchWarning(UserWarning):
    """Warning of featpatch, whose text may hold names from untrusted files."""

    def __str__(self) -> str:
        return visible(super().__str__())


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, of Python or of NumPy; True and False are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, of Python or of NumPy; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a number, see `is_number`, that a float can hold: neither NaN, infinite nor too large."""
    return is_number(value) and (abs(value) <= float_info.max if is_integer(value) else isfinite(value))


def closest(value: object, known: Sequence[str]) -> str:
    """Return the known name that a value most resembles as the end of a message, or an empty text if it resembles none."""
    found = get_close_matches(value, known, 1) if isinstance(value, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""


def check_numbers(least: int, /, **given: object) -> None:
    """Raise a FeatpatchError unless each argument is an integer from `least` to `MAX_INTEGER`, of Python or of NumPy."""
    for name, value in given.items():
        if not is_integer(value) or value < least:
            raise FeatpatchError(f"{name}={value!r}: expected an integer, {least} or more")
        if value > MAX_INTEGER:
            raise FeatpatchError(f"{name} is an integer of {int(value).bit_length()} bits: expected at most {MAX_INTEGER}")


def check_choices(known: Sequence[str], /, **given: object) -> None:
    """Raise a FeatpatchError unless each argument is one of the known names."""
    for name, value in given.items():
        if not isinstance(value, str) or value not in known:
            raise FeatpatchError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_fractions(**given: object) -> None:
    """Raise a FeatpatchError unless each argument is a number above 0 and at most 1; a percentage is not."""
    for name, value in given.items():
        if not is_number(value) or not 0 < value <= 1:
            percent = f"; for {value} %, write {name}={value / 100:g}" if is_number(value) and 1 < value <= 100 else ""
            raise FeatpatchError(f"{name}={value!r}: expected a fraction above 0, up to 1, such as 0.8{percent}")


def check_kinds(kind: type | tuple[type, ...], /, **given: object) -> None:
    """Raise a FeatpatchError unless each argument is an instance of a class, or of one of several."""
    for name, value in given.items():
        if not isinstance(value, kind):
            names = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)) if each is not type(None)]
            raise FeatpatchError(f"{name} is of type {type(value).__name__}: expected {' or '.join(names)}")


@contextmanager
def errors_about(name: str) -> Iterator[None]:
    """Put a name in front of the message of any FeatpatchError that is raised within the context."""
    try:
        yield
    except FeatpatchError as error:
        raise FeatpatchError(f"{name}: {error}") from error


def each(make: Callable[..., T], *columns: Sequence[Any], where: Sequence[str] | None = None) -> tuple[T, ...]:
    """Return `make(*row)` for every row of the columns.

    Args:
        where: the name of each row in error messages; "pair 0", "pair 1", ... by default.

    Raises:
        FeatpatchError: `make` raises one; the name of the row is put in front of its message.
    """
    made = []
    for index, row in enumerate(zip(*columns, strict=True)):
        with errors_about(f"pair {index}" if where is None else where[index]):
            made.append(make(*row))
    return tuple(made)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which gets an s unless the number is 1: `1 pair`, `2 pairs`, `1,000 pairs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def decimal(value: float, form: str = ".2f") -> str:
    """Return a number in a format of `format`, without a minus sign if it is rounded to zero."""
    text = format(value, form)
    return text if text.strip("-0.%") else text.lstrip("-")


def listed(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first names as a list in words, with the number of further names: `a, b and 3 more`."""
    return separator.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
