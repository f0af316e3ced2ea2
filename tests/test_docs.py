"""The API reference is built from the docstrings without a warning, and has every public name; what docs/ names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import featpatch as fp


@pytest.mark.extended
def test_the_reference_is_complete(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / ".ci" / "docs"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "featpatch.html").read_text() + "".join(p.name for p in tmp_path.rglob("*.html"))
    missing = [name for name in fp.__all__ if f'id="{name}"' not in text and f"{name}.html" not in text]
    assert missing == []
    assert "FeatpatchError" in text


def test_promises_name_tests_that_exist() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (tests / file).read_text(encoding="utf-8")]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|(---|\s*Guarantee)", line)]
    assert len(rows) > 10
    assert all("::" in row for row in rows)
