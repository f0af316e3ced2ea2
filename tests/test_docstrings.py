"""Docstrings of the public interface: every function, class and method has an example, and every example runs.

The names that the examples take as given are those of the fixture `given`; the docstring of `featpatch` lists them for readers.
"""

import contextlib
import doctest
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import featpatch as fp
from featpatch.attribution.calibration import Calibration
from featpatch.attribution.logits import LogitAttribution
from featpatch.checkpoints import Demo
from featpatch.circuits.curve import FaithfulnessCurve
from featpatch.comparison.compare import Comparison
from featpatch.descriptions import Description
from featpatch.effects.plots import Plots
from featpatch.pairs.checklist import Checklist
from featpatch.patching.controls import Controls
from featpatch.patching.curves import Curve
from featpatch.patching.sets import Selection
from featpatch.ranking.graph_effects import GraphEffects
from featpatch.ranking.plan import Plan
from featpatch.splicing import Losses
from featpatch.tracing.query_key import QueryKeyAttribution
from featpatch.tracing.result import AttributionGraph
from featpatch.verifying import Verified

RESULTS = (
    Calibration, Checklist, Comparison, Controls, Curve, Description, FaithfulnessCurve, GraphEffects, LogitAttribution, Losses, Plan,
    QueryKeyAttribution, Selection, Verified, AttributionGraph,
)  # fmt: skip
"""Classes of results that functions return; an example of the class shows its methods."""

INTERNAL = {
    "Cross.to", "Executor.run", "Gradients.check_directions", "Gradients.of", "PatchedValues.rows_in_whole", "Noise.about", "Noise.added", "Noise.at",
    "Pairs.chunks", "Ray.run", "Stored.digest_of",
}  # fmt: skip
"""Methods of public classes that other modules of featpatch call, and users do not."""

SAES = ("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")


def public() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, every public method, and its name in the reference."""
    names = [getattr(fp, name) for name in fp.__all__]
    modules = [getattr(module, name) for module in names if isinstance(module, ModuleType) for name in module.__all__]
    for value in (*names, *modules, *RESULTS, Demo, Plots):
        if inspect.isfunction(value):
            yield value.__name__, value
        elif inspect.isclass(value):
            yield value.__name__, value
            yield from methods(value) if value not in RESULTS else ()


def methods(of: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods of a class that are defined in featpatch, by the class that defines them."""
    for owner in of.__mro__:
        for name, member in vars(owner).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            where = f"{owner.__name__}.{name}"
            ours = inspect.isfunction(function) and owner.__module__.startswith("featpatch")
            if ours and not name.startswith("_") and where not in INTERNAL:
                yield where, function


def examples() -> dict[str, Any]:
    return {name: value for name, value in public() if "Examples:\n" in (value.__doc__ or "")}


def test_every_public_name_has_an_example() -> None:
    missing = sorted({name for name, _ in public()} - set(examples()))
    assert missing == []


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run once for equal arguments: many examples begin with the same line."""
    known: list[tuple[Any, Any]] = []

    def run(*args: Any, **options: Any) -> Any:
        for asked, result in known:
            with contextlib.suppress(ValueError):  # of arrays, which only the same table shares
                if asked == (args, options):
                    return result
        known.append(((args, options), function(*args, **options)))
        return known[-1][1]

    return run


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """The names that the examples take as given, except `folder`."""
    demo = fp.load_demo(progress=False)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in SAES]
    pairs = demo.pairs("ioi", n=4)
    options: dict[str, Any] = {"positions": ["S2"], "progress": False}
    shared = {name: once(getattr(fp, name)) for name in ("rank_features", "rank_components", "find_circuit")}
    return {
        "fp": SimpleNamespace(**{name: getattr(fp, name) for name in fp.__all__} | shared),
        "demo": demo,
        "model": demo.model,
        "saes": saes,
        "pairs": pairs,
        "effects": shared["rank_features"](demo.model, saes, pairs, **options),
        "components": shared["rank_components"](demo.model, pairs, **options),
    }


def failures(values: dict[str, Any], given: dict[str, Any], folder: Callable[[], Path]) -> list[str]:
    """Run the examples of some docstrings, each with names of its own, and return reports of those that failed."""
    found: list[str] = []
    parser, options = doctest.DocTestParser(), doctest.REPORT_ONLY_FIRST_FAILURE
    for name, value in values.items():
        names = {**given, "folder": folder()}
        test = parser.get_doctest(inspect.cleandoc(value.__doc__), names, name, None, None)
        doctest.DocTestRunner(verbose=False, optionflags=options).run(test, out=found.append)
    return found


@pytest.mark.parametrize("of_methods", [True, False])
def test_examples_run(given: dict[str, Any], tmp_path: Path, of_methods: bool) -> None:
    some = {name: value for name, value in examples().items() if ("." in name) == of_methods}
    found = failures(some, given, lambda: Path(tempfile.mkdtemp(dir=tmp_path)))
    assert not found, "\n".join(found)


def test_a_wrong_example_is_found(given: dict[str, Any], tmp_path: Path) -> None:
    def wrong() -> None:
        """Count.

        Examples:
            >>> len(pairs)
            5
        """

    (report,) = failures({"wrong": wrong}, given, lambda: tmp_path)
    assert "in wrong" in report
    assert "Got:\n    4" in report
