"""The units of steering: raw values, or multiples of how active a feature is on reference texts."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float

from featpatch.descriptions import Document, check_texts, documents_of, read_words
from featpatch.errors import FeatpatchError, check_choices, is_finite
from featpatch.model.lens import Lens
from featpatch.nodes import Node
from featpatch.pairs.pairs import Pairs
from featpatch.sae.dictionary import Dictionary

Unit = Literal["raw", "mean", "max"]
"""The unit of a number: raw, or the mean of a feature over the tokens on which it is active, or its maximum."""


def raw_values(
    lens: Lens,
    found: Sequence[Dictionary],
    values: Mapping[Node, Any],
    how: str,
    unit: Unit,
    reference: Sequence[str] | Pairs | None,
) -> dict[Node, Float[torch.Tensor, ""]]:
    """Return the raw number of each node.

    Args:
        lens, found: the model and the dictionaries.
        values: numbers in the unit, or `"mean"`.
        how, unit, reference: as in `steer`.

    Raises:
        FeatpatchError: a unit or a mean does not fit the nodes or `how`, a reference is missing or unused, or a feature is
            never active there.
    """
    check_choices(get_args(Unit), unit=unit)
    means = [node for node, value in values.items() if not is_finite(value)]
    scaled = [] if unit == "raw" else [node for node in values if node not in means]
    if scaled and how == "scale":
        raise FeatpatchError(f"unit={unit!r} with how='scale': expected unit='raw', because factors have no unit; leave it out")
    if means and how != "set":
        raise FeatpatchError(f"a value 'mean' with how={how!r}: expected how='set', or numbers")
    if strange := next((node for node in (*means, *scaled) if node.kind != "feature"), None):
        raise FeatpatchError(f"{str(strange)!r} with a mean or unit={unit!r}: expected a feature, or a raw number")
    if (reference is None) == bool(means or scaled):
        expected = "no reference, because raw numbers need none" if reference is not None else "reference=..., texts or pairs"
        given = "None" if reference is None else type(reference).__name__
        raise FeatpatchError(f"unit={unit!r} with reference={given}: expected {expected}")
    raw = {node: torch.tensor(float(value), dtype=torch.float64) for node, value in values.items() if node not in means}
    if reference is None:
        return raw
    active = _active(lens, found, [*means, *scaled], reference)
    raw |= {node: active[node].mean() for node in means}
    for node in scaled:
        on = active[node][active[node] != 0]
        if not len(on):
            raise FeatpatchError(
                f"{str(node)!r} is never active in the reference: expected texts on which it is active, to measure "
                f"unit={unit!r}; give other texts, or use unit='raw'"
            )
        raw[node] = raw[node] * (on.mean() if unit == "mean" else on.max())
    return raw


def _active(
    lens: Lens, found: Sequence[Dictionary], features: Sequence[Node], reference: Sequence[str] | Pairs
) -> dict[Node, Float[torch.Tensor, " tokens"]]:
    """Return the activation of each feature on every token of the reference that is not special."""
    if not isinstance(reference, Pairs):
        check_texts(reference)
    text = [Document.of(lens.tokenizer, ids) for ids in documents_of(lens, reference)]
    return dict(zip(features, read_words(lens, found, features, text).T, strict=True))
