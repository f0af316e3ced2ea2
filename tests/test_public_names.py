"""Public functions: the same argument has the same name, place and default everywhere."""

import inspect
from collections import defaultdict
from typing import Any

import pytest

import featpatch as fp

FUNCTIONS = {name: value for name in fp.__all__ if inspect.isfunction(value := getattr(fp, name))}

ORDER = ("effects", "model", "saes", "sae", "pairs")
"""What comes first, in this order: a table, the model, SAEs without which there is nothing to do, pairs."""

DIFFERENT = {
    "dtype": "of an SAE that of its folder",
    "effect": "which to compare, or to reach",
    "exact": "`rank_paths` screens where there are many",
    "method": "of estimating, of searching",
    "seed": "None where it belongs to a screen that may not be asked for",
    "sites": "`ablate` has SAEs beside them",
    "target": "a share of the behaviour, or of the ranking",
    "to": "an ablation can't take the corrupted run's values: that is noising",
    "top": "None where it belongs to a screen that may not be asked for",
}
"""Arguments that have more than one default, and why."""


def parameters() -> dict[str, dict[str, inspect.Parameter]]:
    found: dict[str, dict[str, inspect.Parameter]] = defaultdict(dict)
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters.values():
            found[parameter.name][name] = parameter
    return found


@pytest.mark.parametrize("argument", sorted(parameters()))
def test_one_default(argument: str) -> None:
    given: dict[str, Any] = {name: p.default for name, p in parameters()[argument].items() if p.default is not p.empty}
    several = len({repr(default) for default in given.values()}) > 1
    assert several == (argument in DIFFERENT), given


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_comes_first(name: str) -> None:
    """What can be left out is named in the call; what can't is in one order."""
    found = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    optional = [p.name for p in found if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    assert optional == (["saes"] if name == "load" else [])
    first = [p.name for p in found if p.kind is not p.KEYWORD_ONLY and p.name in ORDER]
    assert first == sorted(first, key=ORDER.index)
