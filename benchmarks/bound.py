"""What a number does not exceed, in few digits."""

from decimal import ROUND_UP, Context


def bound(value: float, digits: int = 1) -> str:
    """Rounded up: 5e-7 for 4.2e-7."""
    return f"{Context(prec=digits, rounding=ROUND_UP).create_decimal_from_float(value):e}"
