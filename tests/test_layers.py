"""The structure that the code keeps: the order of imports, where hook names and foreign libraries appear, frozen dataclasses."""

import ast
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import featpatch

PACKAGE = Path(featpatch.__file__).parent
LAYERS = (
    ("untrusted",),
    ("errors", "console", "frame"),
    ("files", "threads", "metric_functions"),
    ("page", "nodes"),
    ("sites", "metrics"),
    ("components",),
    ("pairs", "diagram"),
    ("tasks", "model"),
    ("effects", "sae"),
    ("engine", "dictionaries"),
    ("patching", "attribution", "tracing", "descriptions", "labels", "comparison"),
    ("ranking", "selfcheck", "splicing", "circuits", "verifying", "views"),
    ("reporting", "steering", "streaming"),
    ("loading",),
    ("checkpoints",),
    ("cli",),
)
"""Packages and modules of featpatch, bottom-up: each imports only from lines above its own."""

LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ("__init__", "__main__") or path.parent != PACKAGE
}


def package(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Every import in a file, also within functions: the module, and the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield node.module or "", [alias.name for alias in node.names]


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string in a file that is not documentation: no string alone in a line of its own."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_imports_go_up() -> None:
    assert sorted(LEVEL) == sorted({package(path) for path in TREES})
    for path, tree in TREES.items():
        for module, names in imports(tree):
            if module.split(".")[0] == "featpatch":
                for other in module.split(".")[1:2] or names:
                    same = other == package(path)
                    assert same or LEVEL.get(other, -1) < LEVEL[package(path)], f"{path} imports {module} {names}"


def test_only_lens_knows_the_libraries_of_models() -> None:
    for path, tree in TREES.items():
        if package(path) not in ("model", "sae"):
            roots = {module.split(".")[0] for module, _ in imports(tree)}
            assert not roots & {"sae_lens", "transformer_lens", "transformers"}, path


def test_only_lens_looks_into_the_model() -> None:
    """Others ask the lens: `lens.model` is handed on, but nothing of it is read."""
    for path, tree in TREES.items():
        if package(path) not in ("model", "sae"):
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    assert not re.search(r"\blens\.model\.", ast.unparse(node)), f"{path}:{node.lineno}"


def test_only_sites_spells_hook_names() -> None:
    """Complement of `sites` and `lens`, hook names appear in sentences only, such as error messages."""
    for path, tree in TREES.items():
        if package(path) not in ("sites", "model", "sae"):
            names = [
                text for text in texts(tree) if re.search(r"hook_(?!name|dict)|\battn\.|blocks\.", text) and " " not in text
            ]
            assert names == [], path


def test_dataclasses_are_frozen() -> None:
    """But for those that hold work in progress."""
    names = [".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts) for path in TREES]
    found = [value for name in names for value in vars(import_module(name)).values() if isinstance(value, type)]
    own = [each for each in found if each.__module__.startswith("featpatch.") and is_dataclass(each)]
    thawed = {each.__name__ for each in own if not each.__dataclass_params__.frozen}
    ours = {
        "Lock",
        "Runner",
        "Sweep",
        "Shards",
        "Fired",
        "Graph",
        "CleanRuns",
        "EdgeLayout",
        "EdgeRuns",
        "EdgeGraph",
        "NodeGraph",
        "NodeRuns",
        "_Batch",
        "_Gradients",
        "_Run",
        "_Driver",
        "Sequences",
        "_Steering",
    }
    assert thawed == ours
