"""Upper bounds of numbers with few digits."""

from decimal import ROUND_UP, Context


def bound(value: float, digits: int = 1) -> str:
    """Return a number rounded up to some digits, as text: 5e-7 for 4.2e-7."""
    return f"{Context(prec=digits, rounding=ROUND_UP).create_decimal_from_float(value):e}"
