"""The arguments that select rows: the effect that they are sorted by, indices, and masks."""

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError, check_kinds, check_numbers, closest, is_integer, listed
from featpatch.nodes import Effect, Node

Over = Literal["all", "changed"]
"""The pairs that an effect is pooled over: all of them, or those in which the node differs."""
By = Literal["recovery", "degradation", "recovery_where_changed", "degradation_where_changed"]
"""The effects that rows can be sorted by."""
LEAST_CHANGED = 5
"""The number of pairs in which a row must differ, by default, to be ranked by its effect over these pairs."""
WHERE_CHANGED = "_where_changed"
"""The suffix of effects that are pooled over the pairs in which the node differs."""


def sorting(by: str | None, run: Sequence[Effect], metrics: Sequence[str] = ()) -> tuple[Effect, Over]:
    """Split the name of a sort key, such as `"recovery_where_changed"`, into the effect and the pairs that it is pooled over.

    Args:
        by: the name; None for the first effect.
        run: the effects that were run.
        metrics: the metrics of the table, by which rows can't be sorted.

    Raises:
        FeatpatchError: the effect was not run.
    """
    known: dict[str, tuple[Effect, Over]] = {effect: (effect, "all") for effect in run}
    known |= {f"{effect}{WHERE_CHANGED}": (effect, "changed") for effect in run}
    check_kinds((str, NoneType), by=by)
    if by is None:
        return run[0], "all"
    if by not in known:
        advice = f"; for the effects on the metric {by}, write effects.for_metric({by!r}).top(...)" if by in metrics else ""
        near = advice or closest(by, list(known))
        raise FeatpatchError(f"by={by!r}: expected one of the measured effects, {', '.join(known)}{near}")
    return known[by]


def measured_effect(effect: str | None, run: Sequence[Effect]) -> Effect:
    """Return an effect that was run, by default the first.

    Raises:
        FeatpatchError: the effect was not run.
    """
    check_kinds((str, NoneType), effect=effect)
    found = [each for each in run if effect in (each, None)]
    if not found:
        raise FeatpatchError(f"effect={effect!r}: expected one of the measured effects, {', '.join(run)}{closest(effect, run)}")
    return found[0]


def least_to_sort(over: Over, asked: int | None, pairs: int) -> int:
    """Return the number of pairs in which a row must differ to be among the top rows, given the number of all pairs.

    Raises:
        FeatpatchError: `asked` is not a number of pairs.
    """
    least = (min(LEAST_CHANGED, pairs) if over == "changed" else 0) if asked is None else asked
    check_numbers(0, least_changed=least)
    return least


def check_measured(nodes: Sequence[Node], metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that the table has the sites, positions and SAEs by which rows are selected.

    A value that was asked for in the study is accepted even if no node has it, because what is the same in both runs of every
    pair has no row; so is the empty name of the SAE of a component.

    Args:
        nodes: the nodes of the whole table.
        metadata: the metadata of the table.
        wanted: the wanted values of a node's fields.

    Raises:
        FeatpatchError: a value was not measured.
    """
    for field, asked in (("site", "sites"), ("position", "positions"), ("sae", "saes")):
        if field not in wanted:
            continue
        value, studied = wanted[field], metadata.get(asked) or []
        if studied == "each" and is_integer(value) and value >= 0:
            continue
        known = list(dict.fromkeys([getattr(node, field) for node in nodes]))
        known += [each for each in ([studied] if isinstance(studied, str) else studied) if each not in known]
        if value not in known and (field, value) != ("sae", ""):
            shown = listed([str(each) for each in known if each != ""], 10) or "(the table has none)"
            near = closest(value, [each for each in known if isinstance(each, str)])
            raise FeatpatchError(f"{field}={value!r} was not measured: expected one of {shown}{near}")


def indices(wanted: Sequence[int] | NDArray[Any], count: int, what: str) -> NDArray[np.int64]:
    """Convert indices or a mask to an array of valid indices without duplicates.

    Raises:
        FeatpatchError: an index is out of range or given twice, or the mask has the wrong length.
    """
    given = np.asarray(wanted)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "biu"):
        raise FeatpatchError(f"{what}s={wanted!r}: expected a list of indices or a boolean mask")
    mask, order = given.dtype == bool, given.astype(np.int64)
    if mask and len(given) == count:
        return np.flatnonzero(given)
    if order.size and (mask or order.min() < 0 or order.max() >= count or np.bincount(order).max() > 1):
        raise FeatpatchError(
            f"{what}s={order[:10].tolist()}: expected indices from 0 to {count - 1}, each once, or a boolean mask of length "
            f"{count}"
        )
    return order
