"""Sites, lists and bounds in words, for the sentences at the end of examples."""

from math import ceil

WORDS = {"hook_resid_pre": "before block", "hook_resid_post": "after block"}


def place(site: str) -> str:
    """blocks.1.hook_resid_pre is before block 1; what is no residual stream keeps its name."""
    _, layer, hook = site.split(".", 2)
    return f"{WORDS[hook]} {layer}" if hook in WORDS else site


def listed(parts: list[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def at_most(value: float, digits: int) -> str:
    """The number rounded up: 0.02 for 0.0104."""
    return f"{ceil(value * 10**digits) / 10**digits:.{digits}f}"
