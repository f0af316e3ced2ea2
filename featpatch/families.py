"""Registries of interchangeable modules: every module in a folder is a member, under the name of its file.

To add a member, add a file; there is no other list of members.
"""

from abc import ABCMeta
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def names(folder: str) -> list[str]:
    """Return the names of the modules in a folder of the package, in alphabetical order, without importing them."""
    return [name for _, name, _ in iter_modules([str(Path(__file__).parent / folder)])]


def modules(folder: str) -> dict[str, ModuleType]:
    """Import the modules in a folder of the package and return them by name."""
    return {name: import_module(f"featpatch.{folder.replace('/', '.')}.{name}") for name in names(folder)}


def classes(folder: str, base: ABCMeta) -> dict[str, Any]:
    """Return, by name, the only class derived from `base` in each module of a folder of the package."""
    return {name: _derived(module, base) for name, module in modules(folder).items()}


def _derived(module: ModuleType, base: ABCMeta) -> Any:
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    (found,) = [each for each in own if issubclass(each, base)]
    return found
