"""Sites in words, for the sentences at the end of examples."""

WORDS = {"hook_resid_pre": "before block", "hook_resid_post": "after block"}


def place(site: str) -> str:
    """blocks.1.hook_resid_pre is before block 1; what is no residual stream keeps its name."""
    _, layer, hook = site.split(".", 2)
    return f"{WORDS[hook]} {layer}" if hook in WORDS else site


def listed(parts: list[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
