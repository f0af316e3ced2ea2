"""The import layers, as the README shows them: rooms import only from rooms above them. What is handed on is frozen."""

import ast
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "featpatch"
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
LAYERS = [
    re.split(r"  +", line[:44].rstrip())
    for line in re.findall(r"```text\nrooms .*?\n(.*?)```", README, re.DOTALL)[0].splitlines()
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__") or path.parent != PACKAGE)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("featpatch"):
            parts = node.module.split(".")[1:]
            imported = parts[:1] or [alias.name for alias in node.names]
            for other in imported:
                assert other == room(path) or LEVEL[other] < LEVEL[room(path)], f"{path} imports {node.module}"


def test_the_readme_shows_every_room() -> None:
    assert sorted(LEVEL) == sorted({room(path) for path in FILES})
    assert len(LEVEL) == sum(map(len, LAYERS))


def test_foreign_libraries_stay_in_their_room() -> None:
    for path in FILES:
        text = path.read_text()
        if room(path) != "lens":
            assert "import sae_lens" not in text
            assert "from sae_lens" not in text
            assert "from transformer_lens" not in text


def test_dataclasses_are_frozen() -> None:
    """But for those that hold work in progress."""
    names = [".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts) for path in FILES if path.stem != "__main__"]
    found = [value for name in names for value in vars(import_module(name)).values() if isinstance(value, type)]
    own = [each for each in found if each.__module__.startswith("featpatch.") and is_dataclass(each)]
    thawed = {each.__name__ for each in own if not each.__dataclass_params__.frozen}
    ours = {"Lock", "Kept", "Sweep", "StudyShards", "Fired", "Graph", "EdgeGraph", "NodeGraph", "_Batch", "_Run", "_Driver"}
    assert thawed == ours
