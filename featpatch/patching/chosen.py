"""The nodes of a patch that share a hook point and a dictionary, as masks over positions and features.

delta = dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

The error node is everything in the activation except the features. It includes the state that decoding needs (the token's norm,
a skip path, predicted codes), so that all features together with the error make up the whole activation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens
from featpatch.patch import COMPONENTS, Node, Patch

Values = Mapping[str, torch.Tensor]
"""Activations `[batch, pos, ...]` by hook point."""


@dataclass(frozen=True)
class Chosen:
    """The features, coordinates or error that are patched at one hook point.

    Attributes:
        site: the hook point that is patched.
        dictionary: the dictionary of the features; None if the activation itself or coordinates of it are patched.
        columns: mask of the patched features or, without a dictionary, of the coordinates of the flat activation.
        rest: mask of the positions at which the error or, without a dictionary, the whole activation is patched.
    """

    site: str
    dictionary: Dictionary | None
    columns: Bool[torch.Tensor, "pos columns"]
    rest: Bool[torch.Tensor, " pos"]

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations `delta` needs."""
        return {self.site} if self.dictionary is None else {self.site, self.dictionary.reads}

    def delta(self, base: Values, source: Values) -> Float[torch.Tensor, "batch pos d"]:
        """Return how patching the chosen values from source into base changes the flat activation at the hook point."""
        if self.dictionary is None:
            difference = (source[self.site] - base[self.site]).flatten(2)
            return difference * (self.columns | self.rest[:, None]).to(difference)
        b, s = (self.dictionary.split(values[self.dictionary.reads], values[self.site]) for values in (base, source))
        columns, rest = self.columns.to(b.features.device), self.rest[:, None].to(b.features.device)
        chosen = torch.where(columns, s.features, b.features)
        state = {name: torch.where(rest, s.state[name], value) for name, value in b.state.items()}
        after, before = self.dictionary.decode(chosen, state), self.dictionary.decode(b.features, b.state)
        return after.to(b.error) - before.to(b.error) + (s.error - b.error) * rest


def choose(lens: Lens, patch: Patch, found: Sequence[Dictionary], length: int) -> list[Chosen]:
    """Group the nodes of a patch by hook point and dictionary, for prompts of `length` tokens.

    Raises:
        FeatpatchError: if a hook point is unknown, a node belongs to no dictionary or to several, an index or position is out
            of range, or nodes overlap.
    """
    masks: dict[tuple[str, str], Chosen] = {}
    for node in patch.nodes:
        site = lens.site(node.site)
        if not sites.by_position(site):
            raise FeatpatchError(
                f"node {str(node)!r}: the activation there has no position first: expected a hook such as hook_z; "
                "patch patterns by rank_components(sites='pattern')"
            )
        dictionary = None if node.kind in COMPONENTS else _dictionary(node, site, found)
        width = dictionary.d_sae if dictionary else prod(_shape(lens, site))
        key = (site, dictionary.name if dictionary else "")
        empty = Chosen(site, dictionary, *(torch.zeros(length, *shape, dtype=torch.bool) for shape in ((width,), ())))
        part, where = masks.setdefault(key, empty), _positions(node, length)
        _check_apart(node, site, where, masks)
        if node.kind in ("error", "activation"):
            part.rest[where] = True
        else:
            part.columns[where, _columns(node, part, lens)] = True
    return list(masks.values())


def _columns(node: Node, part: Chosen, lens: Lens) -> slice:
    """Return the slice of features or coordinates that a node stands for.

    Raises:
        FeatpatchError: if the index is out of range, a head is named where the activation has no heads, or nodes of this kind
            name no values by themselves.
    """
    if node.kind == "all_features":
        return slice(None)
    if node.index is None or node.kind not in ("feature", *COMPONENTS):
        raise FeatpatchError(f"node {str(node)!r} names no values by itself: expected the features themselves, in one Patch")
    count, size = part.columns.shape[1], 1
    if node.kind == "head":
        shape = _shape(lens, part.site)
        if len(shape) != 2:
            raise FeatpatchError(
                f"node {str(node)!r}: the activation there has no heads: expected hook_z, hook_q, hook_k or hook_v"
            )
        count, size = shape
    if node.index >= count:
        raise FeatpatchError(f"{node.kind} {node.index} of {part.site!r} is out of range: expected 0 to {count - 1}")
    return slice(node.index * size, (node.index + 1) * size)


def _shape(lens: Lens, site: str) -> tuple[int, ...]:
    """Return the shape of the activation at one position."""
    return tuple(lens.read(torch.zeros(1, 1, dtype=torch.long), [site])[site].shape[2:])


def _check_apart(node: Node, site: str, where: list[int], masks: dict[tuple[str, str], Chosen]) -> None:
    """Check that no value would be patched twice.

    Raises:
        FeatpatchError: if a node overlaps others at the same hook point: a whole activation and a part of it, or SAE nodes and
            components.
    """
    for (other, _), part in masks.items():
        mixed = (part.dictionary is None) != (node.kind in COMPONENTS)
        whole = part.dictionary is None and bool(node.kind == "activation" or part.rest[where].any())
        if other == site and (mixed or whole) and (part.rest | part.columns.any(1))[where].any():
            raise FeatpatchError(
                f"node {str(node)!r} overlaps other nodes at {site!r}: expected the whole activation or parts of it; name one"
            )


def _dictionary(node: Node, site: str, found: Sequence[Dictionary]) -> Dictionary:
    """Return the dictionary that a node belongs to.

    Raises:
        FeatpatchError: if there is not exactly one.
    """
    fitting = [d for d in found if d.writes == site and node.sae in ("", d.name)]
    if len(fitting) != 1:
        raise FeatpatchError(
            f"node {str(node)!r} (sae={node.sae!r}) belongs to {len(fitting)} of the dictionaries "
            f"{[d.name for d in found]}: expected exactly one; pass saes=..., and name the dictionary where a hook has several"
        )
    return fitting[0]


def _positions(node: Node, length: int) -> list[int]:
    """Return the token indices of a node in a prompt of `length` tokens.

    Raises:
        FeatpatchError: if the position is a label or out of range.
    """
    if node.position == "all":
        return list(range(length))
    if isinstance(node.position, str):
        raise FeatpatchError(f"node {str(node)!r} is at a label: expected a token index or 'all' outside of pairs")
    if not 0 <= node.position < length:
        raise FeatpatchError(f"node {str(node)!r} is outside a prompt of {length} tokens: expected 0 to {length - 1}")
    return [node.position]
