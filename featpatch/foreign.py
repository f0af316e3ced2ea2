"""JSON that others wrote."""

import json
from typing import Any

LEVELS = 20
"""Lists and objects within one another, at most; nothing that is read here needs as many."""


def read_json(text: str) -> Any:
    """The value of a text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds half a character (a lone surrogate), which no file can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"more than {LEVELS} lists and objects within one another") from error
    _check(value, LEVELS)
    return value


def _check(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError(f"more than {LEVELS} lists and objects within one another")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (list, dict)):
        for part in value if isinstance(value, list) else (*value, *value.values()):
            _check(part, levels - 1)
