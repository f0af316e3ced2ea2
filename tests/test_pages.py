"""The Python of README and documentation runs as it stands there, on fewer pairs, and recipes print what the page shows.

Code that needs files, a network or a cluster is marked as `py` instead of `python` and is not run.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

import featpatch as fp
from featpatch.checkpoints import Demo

ROOT = Path(__file__).parent.parent
FENCES = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = re.split(r"^## ", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8") and page.name != "recipes.md"]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fp.load_demo(progress=False)


@pytest.fixture
def names(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The names that a reader has before the first line of a page: none. The demo is loaded once, and the folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fp, "load_demo", lambda: demo)
    return {}


SLOW = {
    "circuits.md", "estimates.md", "Circuits in files", "Circuits: export the graph", "Plots, tensors and views of a prompt",
    "Share a result as one HTML file", "Paths: which way a feature acts", "Causal tracing over several draws of noise",
    "Named nodes, alone and together", "How much of the loss an SAE recovers",
}  # fmt: skip
"""Pages and recipes that run for seconds: extended."""


def tiers(names: dict[str, Any]) -> list[Any]:
    return [pytest.param(of, id=name, marks=[pytest.mark.extended] * (name in SLOW)) for name, of in names.items()]


@pytest.mark.parametrize("page", tiers({page.name: page for page in WITH_CODE}))
def test_page(page: Path, names: dict[str, object]) -> None:
    code = [content for kind, content in FENCES.findall(page.read_text(encoding="utf-8")) if kind == "python"]
    exec("\n".join(code).replace("n=32", "n=2").replace("n=16", "n=2").replace("n=64", "n=4"), names)


@pytest.mark.parametrize("section", tiers({section.partition("\n")[0]: section for section in RECIPES[1:]}))
def test_recipe(section: str, names: dict[str, object]) -> None:
    exec(FENCES.findall(RECIPES[0])[0][1], names)
    printed = io.StringIO()
    for kind, content in FENCES.findall(section):
        if kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(content, names)
        else:
            assert content.split() == printed.getvalue().split()
