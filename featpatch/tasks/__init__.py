"""Prompt pairs for behaviours that are well studied, drawn for any tokenizer."""

from featpatch.tasks.capitals import capitals
from featpatch.tasks.greater_than import greater_than
from featpatch.tasks.ioi import ioi
from featpatch.tasks.sentiment import sentiment

__all__ = ["capitals", "greater_than", "ioi", "sentiment"]
