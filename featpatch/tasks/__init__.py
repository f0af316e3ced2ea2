"""Prompt pairs for behaviours that are well studied, drawn for any tokenizer: each file holds the task of its name."""

from featpatch.families import modules

TASKS = {name: getattr(module, name) for name, module in modules("tasks").items()}
__all__ = list(TASKS)
globals().update(TASKS)
