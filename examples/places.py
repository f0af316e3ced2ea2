"""Hook points, lists and bounds in words, for the sentences that the examples print."""

from math import ceil

WORDS = {"hook_resid_pre": "before layer", "hook_resid_post": "after layer"}


def place(site: str) -> str:
    """Return a hook point in words, such as "before layer 1"; hook points other than the residual stream keep their names."""
    _, layer, hook = site.split(".", 2)
    return f"{WORDS[hook]} {layer}" if hook in WORDS else site


def listed(parts: list[str], last: str = "and") -> str:
    """Join names as in "a, b and c"."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def at_most(value: float, digits: int) -> str:
    """Return a number rounded up, as text: 0.02 for 0.0104."""
    return f"{ceil(value * 10**digits) / 10**digits:.{digits}f}"
