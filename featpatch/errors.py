"""The one error class of the package.

Every message names the value that was met, what was expected, and what to do next.
"""

from featpatch.untrusted import visible


class FeatpatchError(ValueError):
    """Input that featpatch refuses; the message says value, expectation and next action."""

    def __str__(self) -> str:
        return visible(super().__str__())


def check_numbers(least: int, **given: object) -> None:
    """Raises FeatpatchError for what is no integer of at least so much."""
    for name, value in given.items():
        if type(value) is not int or value < least:
            raise FeatpatchError(f"{name}={value!r}: expected an integer, {least} or more")
