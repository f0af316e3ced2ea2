"""The API reference has every public name, and the tests that docs/ names exist; `make docs` checks links and references."""

import re
from pathlib import Path

import featpatch as fp

ROOT = Path(__file__).parent.parent


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: featpatch\.(\w+)$", pages, re.MULTILINE)
    assert sorted(named) == sorted(set(fp.__all__) - {"LOGITS"})  # a value; the page of nodes has it in words


def test_promises_name_tests_that_exist() -> None:
    tests = ROOT / "tests"
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (tests / file).read_text(encoding="utf-8")]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|(---|\s*Guarantee)", line)]
    assert len(rows) > 10
    assert all("::" in row for row in rows)
