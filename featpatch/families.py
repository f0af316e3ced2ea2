"""Families of interchangeable parts: a folder each, in which every file is a member, called by the file's name.

A new member is a new file: nothing lists them but the folder.
"""

from abc import ABCMeta
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def names(folder: str) -> list[str]:
    """Of the members, in alphabetical order; none is imported."""
    return [name for _, name, _ in iter_modules([str(Path(__file__).parent / folder)])]


def modules(folder: str) -> dict[str, ModuleType]:
    """The members by name."""
    return {name: import_module(f"featpatch.{folder.replace('/', '.')}.{name}") for name in names(folder)}


def classes(folder: str, base: ABCMeta) -> dict[str, Any]:
    """By name the one class of each member that is derived from `base`."""
    return {name: _derived(module, base) for name, module in modules(folder).items()}


def _derived(module: ModuleType, base: ABCMeta) -> Any:
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    (found,) = [each for each in own if issubclass(each, base)]
    return found
