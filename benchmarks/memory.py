"""Peak memory of a call, from the high-water mark that Linux keeps for the process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def peak_of(run: Callable[[], T]) -> tuple[T, float]:
    """Return the result of a call, and its peak memory in MB above the memory in use when it began."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    return result, (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1))
