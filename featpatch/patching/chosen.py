"""The values that the nodes of a patch stand for, by hook point and dictionary, as masks over positions and features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.nodes import COMPONENT_KINDS, Node, Patch
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.nodes import with_owner

Values = Mapping[str, torch.Tensor]
"""Activations `[batch, pos, ...]` by hook point."""


@dataclass(frozen=True)
class Chosen:
    """The features, coordinates or error that are patched at one hook point.

    Attributes:
        site: the hook point that is patched.
        dictionary: the dictionary of the features; None if the activation itself or coordinates of it are patched.
        columns: mask of the patched features or, without a dictionary, of the coordinates of the flat activation, for one
            prompt or for each prompt of a batch.
        rest: mask of the positions at which the error or, without a dictionary, the whole activation is patched.
    """

    site: str
    dictionary: Dictionary | None
    columns: Bool[torch.Tensor, "*batch pos columns"]
    rest: Bool[torch.Tensor, "*batch pos"]

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations `delta` needs."""
        return {self.site} if self.dictionary is None else set(self.dictionary.hooks)

    def delta(self, base: Values, source: Values) -> Float[torch.Tensor, "batch pos d"]:
        """Return how patching the chosen values from source into base changes the flat activation at the hook point."""
        if self.dictionary is None:
            return self.change(base[self.site], source[self.site])
        b, s = map(self.dictionary.split, (base, source))
        return self.change(b, s)

    def change(self, base: Any, source: Any) -> Float[torch.Tensor, "batch pos d"]:
        """Return `delta` from activations `[batch, pos, ...]` or, with a dictionary, from their splits."""
        if self.dictionary is None:
            difference = (source - base).flatten(2)
            return difference * (self.columns | self.rest[..., None]).to(difference)
        return self.dictionary.change(base, source, features=self.columns, error=self.rest[..., None])


def choose(
    lens: Lens, patch: Patch, found: Sequence[Dictionary], length: int, places: Callable[[Node], list[int]]
) -> list[Chosen]:
    """Group a patch's nodes by hook point and dictionary, for prompts of `length` tokens; `places(node)` are token indices.

    Raises:
        FeatpatchError: a hook point is unknown, a node belongs to no dictionary or to several, an index or position is out of
            range, or nodes overlap.
    """
    masks: dict[tuple[str, str], Chosen] = {}
    for node in patch.nodes:
        named, dictionary = with_owner(lens, node, found)
        site = named.site
        if not sites.by_position(site):
            raise FeatpatchError(
                f"node {str(node)!r}: the first dimension of the activation there is not the position: expected a hook such "
                "as hook_z; to patch attention patterns, call rank_components(sites=['pattern'])"
            )
        if dictionary is not None:
            site = dictionary.writes  # the only one, or else an error
        width = dictionary.d_sae if dictionary else prod(lens.shape(site))
        key = (site, dictionary.name if dictionary else "")
        empty = Chosen(site, dictionary, *(torch.zeros(length, *shape, dtype=torch.bool) for shape in ((width,), ())))
        part, where = masks.setdefault(key, empty), places(node)
        _check_apart(node, site, where, masks)
        if node.kind in ("error", "activation"):
            part.rest[where] = True
        else:
            part.columns[where, _columns(node, part, lens)] = True
    return list(masks.values())


def _columns(node: Node, part: Chosen, lens: Lens) -> slice:
    """Return the slice of features or coordinates that a node stands for.

    Raises:
        FeatpatchError: the index is out of range, a head is named where the activation has no heads, or nodes of this kind name
            no values by themselves.
    """
    if node.kind == "all_features":
        return slice(None)
    if node.index is None or node.kind not in ("feature", *COMPONENT_KINDS):
        raise FeatpatchError(
            f"node {str(node)!r} does not say which values to patch: expected the features themselves; put them into one Patch"
        )
    count, size = part.columns.shape[1], 1
    if node.kind == "head":
        shape = lens.shape(part.site)
        if len(shape) != 2:
            raise FeatpatchError(
                f"node {str(node)!r}: the activation there has no heads: expected hook_z, hook_q, hook_k or hook_v"
            )
        count, size = shape
    if node.index >= count:
        raise FeatpatchError(f"{node.kind} {node.index} of {part.site!r} is out of range: expected 0 to {count - 1}")
    return slice(node.index * size, (node.index + 1) * size)


def _check_apart(node: Node, site: str, where: list[int], masks: dict[tuple[str, str], Chosen]) -> None:
    """Raise a FeatpatchError if a node would patch a value that other nodes at the hook point patch too."""
    for part in (part for (other, _), part in masks.items() if other == site):
        mixed = (part.dictionary is None) != (node.kind in COMPONENT_KINDS)
        whole = part.dictionary is None and bool(node.kind == "activation" or part.rest[where].any())
        if (mixed or whole) and (part.rest | part.columns.any(1))[where].any():
            raise FeatpatchError(
                f"node {str(node)!r} overlaps other nodes at {site!r}: expected either the whole activation or parts of it; "
                "leave one of them out"
            )


def check_settable(lens: Lens, group: Chosen) -> None:
    """Raise a FeatpatchError if `how="set"` is not possible, for a dictionary that reads after it writes or for a copy."""
    site = group.site
    if sites.highest(group.hooks - {site}, lens.n_layers) > sites.layer_of(site):
        raise FeatpatchError(
            f"the dictionary at {site!r} reads at {', '.join(group.hooks - {site})}, after it writes, so its values can't be "
            "set: expected how='add' with base tokens"
        )
    if lens.carrier(site) != site:
        raise FeatpatchError(
            f"site {site!r} of a {lens.kind} is a copy of the residual stream, so it can't be set: expected another hook "
            "point, how='add' with base tokens, or a HookedTransformer"
        )
