"""Every notebook runs, and its last line says the result in a sentence with the numbers of the run."""

import json
from pathlib import Path

import plotly.io
import pytest

from featpatch.checkpoints import Demo

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def check_sentence(printed: str) -> None:
    last = printed.strip().splitlines()[-1]
    assert last.endswith(".")
    assert any(character.isdecimal() for character in last)


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=[NOTEBOOKS[0].stem])
def test_the_code(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In an empty folder, with few pairs and without showing figures."""
    pairs = Demo.pairs
    monkeypatch.setattr(Demo, "pairs", lambda demo, task="ioi", n=32, seed=0: pairs(demo, task, n=min(n, 2), seed=seed))
    monkeypatch.setattr(plotly.io, "show", lambda figure, *_, **__: None)
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    exec("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), {"__name__": "notebook"})
    check_sentence(capsys.readouterr().out)


@pytest.mark.extended
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_the_notebook(path: Path, tmp_path: Path) -> None:
    """As it stands, in a kernel; what it prints at its end is what is stored in the file."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    stored = notebook.cells[-1].outputs[-1]["text"]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = notebook.cells[-1].outputs[-1]["text"]
    check_sentence(printed)
    assert printed == stored
