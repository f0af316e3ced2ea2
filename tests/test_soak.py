"""The soak for a short time: every kind of fault, and nothing lost. Workers of Ray are killed in `test_execution`."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"
FAULTS = [
    "memory refused", "memory limited", "killed", "Ctrl-C", "disk full", "file too large", "truncated", "a byte flipped",
    "written twice", "NaN", "clock jumps", "two at once", "memory refused (here)", "truncated (here)", "NaN (here)",
    "clock jumps (here)",
]  # fmt: skip


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: every batch waits for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="the faults are made by Linux")
def test_a_short_soak(folder: Path) -> None:
    """It says what was met, lost and repeated by its own count, and ends with 0 only if all was well."""
    command = [sys.executable, str(SOAK), "--minutes", "0.2", "--no-ray", "--seed", "3", "--folder", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=590, env={**os.environ, "TQDM_DISABLE": "0"})
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    met = dict(re.findall(r"([A-Za-z][A-Za-z -]*(?: \(here\))?) (\d+)", ended.stdout.split("faults met: ")[1]))
    assert [name for name in FAULTS if not int(met.get(name, 0))] == []
    for name in ("batches lost", "batches run again", "rows lost", "rows that differ", "problems"):
        assert re.findall(rf"{name} (\d+)", ended.stdout)[-1] == "0"
    for name in ("studies", "restarts", "patches", "sweeps here"):
        assert re.findall(rf"{name} (\d+)", ended.stdout)[-1] != "0"
    assert ended.stdout.rstrip().endswith("all was well")
    assert [*folder.iterdir()] == []
