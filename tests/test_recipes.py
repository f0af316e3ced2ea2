"""Every recipe of docs/recipes.md runs as it stands, and prints what the page shows."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
FENCES = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def setting() -> str:
    ((_, code),) = FENCES.findall(SECTIONS[0])
    return code.replace("load_demo()", "load_demo(progress=False)")


@pytest.mark.parametrize("section", SECTIONS[1:], ids=[section.partition("\n")[0] for section in SECTIONS[1:]])
def test_recipe(section: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(setting, names)
    printed = io.StringIO()
    for kind, content in FENCES.findall(section):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(content, names)
        else:
            assert content.split() == printed.getvalue().split()
