"""The one error class of the package, and checks of arguments that many functions share.

Every message names the value that was met, what was expected, and what to do next.
"""

from featpatch.untrusted import visible

LARGEST = 2**63 - 1
"""The largest integer that arrays and files can hold."""


class FeatpatchError(ValueError):
    """Input that featpatch refuses; the message says value, expectation and next action."""

    def __str__(self) -> str:
        return visible(super().__str__())


def check_numbers(least: int, /, **given: object) -> None:
    """Raises FeatpatchError for what is no integer of at least so much, or too large an integer."""
    for name, value in given.items():
        if type(value) is not int or value < least:
            raise FeatpatchError(f"{name}={value!r}: expected an integer, {least} or more")
        if value > LARGEST:
            raise FeatpatchError(f"{name} is an integer of {value.bit_length()} bits: expected at most {LARGEST}")


def check_kinds(kind: type | tuple[type, ...], /, **given: object) -> None:
    """Raises FeatpatchError for arguments that are not of a class, or of one of several."""
    for name, value in given.items():
        if not isinstance(value, kind):
            names = [each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)) if each is not type(None)]
            raise FeatpatchError(f"{name} is of type {type(value).__name__}: expected {' or '.join(names)}")
