"""Find executors by name."""

from collections.abc import Callable
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.execution.executor import Executor
from featpatch.families import classes

EXECUTORS: dict[str, Callable[..., Executor]] = classes("execution/executors", Executor)


def executor_of(executor: Any) -> Executor | None:
    """Return the executor that the `executor` argument names.

    Args:
        executor: None or `"serial"` for no executor, a name in `EXECUTORS`, or an executor object.

    Returns:
        The executor, or None to run in this process.

    Raises:
        FeatpatchError: `executor` is anything else.
    """
    if executor is None or executor == "serial":
        return None
    made = EXECUTORS[executor]() if isinstance(executor, str) and executor in EXECUTORS else executor
    if not isinstance(made, Executor):
        known = ", ".join(map(repr, ("serial", *EXECUTORS)))
        raise FeatpatchError(f"executor={executor!r}: expected {known}, or an object such as fp.Ray(...)")
    return made
