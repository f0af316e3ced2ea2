"""Public functions: the same argument has the same name, place and default everywhere."""

import inspect
from collections import defaultdict
from typing import Any

import featpatch as fp

FUNCTIONS = {name: value for name in fp.__all__ if inspect.isfunction(value := getattr(fp, name))}

ORDER = ("effects", "model", "saes", "sae", "pairs")
"""What comes first, in this order: a table, the model, SAEs without which there is nothing to do, pairs."""

DIFFERENT = {
    "effect": "which to compare, or to reach",
    "screen": "`rank_paths` screens where there are many",
    "method": "of estimating, of searching",
    "metric": "`rank_*` must tell whether it is given, because gradients have their own",
    "seed": "`ablate` must tell whether it is given, because only resampling draws",
    "target": "`find_circuit` must tell whether it is given, because only a greedy search has one",
    "top": "`interactions` and `report` must tell whether it is given, because features or no SAEs leave no use for it",
    "sites": "`ablate` has SAEs beside them",
    "to": "an ablation can't take the corrupted run's values: that is noising",
}
"""Arguments that have more than one default, and why."""


OPTIONAL = {"load": ["saes"], "head": ["site", "position"], "feature": ["position"]}
"""What can be left out and need not be named: what says which node is meant, after the indices that it begins with."""


def parameters() -> dict[str, dict[str, inspect.Parameter]]:
    found: dict[str, dict[str, inspect.Parameter]] = defaultdict(dict)
    for name, function in FUNCTIONS.items():
        for parameter in inspect.signature(function).parameters.values():
            found[parameter.name][name] = parameter
    return found


def test_one_default() -> None:
    wrong = {}
    for argument, functions in parameters().items():
        given: dict[str, Any] = {name: p.default for name, p in functions.items() if p.default is not p.empty}
        if (len({repr(default) for default in given.values()}) > 1) != (argument in DIFFERENT):
            wrong[argument] = given
    assert wrong == {}


def test_methods_show_a_bar_by_default_as_functions_do() -> None:
    classes = [value for name in fp.__all__ if inspect.isclass(value := getattr(fp, name))]
    methods = [method for each in classes for _, method in inspect.getmembers(each, inspect.isfunction)]
    shown = [inspect.signature(f).parameters["progress"] for f in (*FUNCTIONS.values(), *methods)
             if "progress" in inspect.signature(f).parameters]  # fmt: skip
    assert len(shown) > 20
    assert {parameter.default for parameter in shown} == {True}


def test_what_comes_first() -> None:
    """What can be left out is named in the call; what can't is in one order."""
    wrong = {}
    for name, function in FUNCTIONS.items():
        found = list(inspect.signature(function).parameters.values())
        optional = [p.name for p in found if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
        first = [p.name for p in found if p.kind is not p.KEYWORD_ONLY and p.name in ORDER]
        if optional != OPTIONAL.get(name, []) or first != sorted(first, key=ORDER.index):
            wrong[name] = optional, first
    assert wrong == {}
