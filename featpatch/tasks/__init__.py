"""Prompt pairs for behaviours that are well studied, drawn for any tokenizer."""

from collections.abc import Callable

from featpatch.pairs.pairs import Pairs
from featpatch.tasks.capitals import capitals
from featpatch.tasks.greater_than import greater_than
from featpatch.tasks.ioi import ioi
from featpatch.tasks.sentiment import sentiment

TASKS: dict[str, Callable[..., Pairs]] = {task.__name__: task for task in (capitals, greater_than, ioi, sentiment)}
__all__ = ["TASKS", "capitals", "greater_than", "ioi", "sentiment"]
