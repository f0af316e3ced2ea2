"""The nodes of a patch that share a site and a dictionary, as masks over positions and features.

delta = dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

The error node stands for all of the activation that is not features: with it goes the state that decoding needs (the token's
norm, a skip path, predicted codes), so that all features and the error are the whole activation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens
from featpatch.patch import Node, Patch

Values = Mapping[str, torch.Tensor]
"""Activations `[batch, pos, ...]` by hook name."""


@dataclass(frozen=True)
class Chosen:
    """What to swap at one site.

    Attributes:
        dictionary: None where the whole activation is swapped.
        features: which features at which positions.
        rest: at which positions the error is swapped, or the whole activation where there is no dictionary.
    """

    site: str
    dictionary: Dictionary | None
    features: Bool[torch.Tensor, "pos d_sae"]
    rest: Bool[torch.Tensor, " pos"]

    @property
    def hooks(self) -> set[str]:
        """The hooks whose values `delta` needs."""
        return {self.site} if self.dictionary is None else {self.site, self.dictionary.reads}

    def delta(self, base: Values, source: Values) -> Float[torch.Tensor, "batch pos d"]:
        """Change of the activation at the site, flat, when the chosen values go from source into base."""
        if self.dictionary is None:
            difference = (source[self.site] - base[self.site]).flatten(2)
            return difference * self.rest[:, None].to(difference)
        b, s = (self.dictionary.split(values[self.dictionary.reads], values[self.site]) for values in (base, source))
        features, rest = self.features.to(b.features.device), self.rest[:, None].to(b.features.device)
        chosen = torch.where(features, s.features, b.features)
        state = {name: torch.where(rest, s.state[name], value) for name, value in b.state.items()}
        after, before = self.dictionary.decode(chosen, state), self.dictionary.decode(b.features, b.state)
        return after.to(b.error) - before.to(b.error) + (s.error - b.error) * rest


def choose(lens: Lens, patch: Patch, found: Sequence[Dictionary], length: int) -> list[Chosen]:
    """The patch by site and dictionary, for prompts of `length` tokens.

    Raises:
        FeatpatchError: an unknown site, no or several dictionaries for a node, an index or a position out of range.
    """
    masks: dict[tuple[str, str], Chosen] = {}
    for node in patch.nodes:
        site = lens.site(node.site)
        dictionary = None if node.kind == "activation" else _dictionary(node, site, found)
        width = dictionary.d_sae if dictionary else 0
        empty = torch.zeros(length, width, dtype=torch.bool)
        key = (site, dictionary.name if dictionary else "")
        part = masks.setdefault(key, Chosen(site, dictionary, empty, torch.zeros(length, dtype=torch.bool)))
        where = _positions(node, length)
        _check_apart(node, site, where, masks)
        if node.kind == "feature":
            if node.index is None or node.index >= width:
                raise FeatpatchError(f"feature {node.index} of {key[1]!r} is out of range: expected 0 to {width - 1}")
            part.features[where, node.index] = True
        elif node.kind == "all_features":
            part.features[where] = True
        else:
            part.rest[where] = True
    return list(masks.values())


def _check_apart(node: Node, site: str, where: list[int], masks: dict[tuple[str, str], Chosen]) -> None:
    """Refuses a whole activation beside parts of it, which would be swapped twice."""
    for (other, dictionary), part in masks.items():
        if (
            other == site
            and bool(dictionary) == (node.kind == "activation")
            and (part.rest | part.features.any(1))[where].any()
        ):
            raise FeatpatchError(
                f"node {str(node)!r} overlaps other nodes at {site!r}: expected the whole activation or parts of it; name one"
            )


def _dictionary(node: Node, site: str, found: Sequence[Dictionary]) -> Dictionary:
    fitting = [d for d in found if d.writes == site and node.sae in ("", d.name)]
    if len(fitting) != 1:
        raise FeatpatchError(
            f"node {str(node)!r} (sae={node.sae!r}) belongs to {len(fitting)} of the dictionaries "
            f"{[d.name for d in found]}: expected exactly one; pass saes=..., and name the dictionary where a hook has several"
        )
    return fitting[0]


def _positions(node: Node, length: int) -> list[int]:
    if node.position == "all":
        return list(range(length))
    if isinstance(node.position, str):
        raise FeatpatchError(f"node {str(node)!r} is at a label: expected a token index or 'all' outside of pairs")
    if not 0 <= node.position < length:
        raise FeatpatchError(f"node {str(node)!r} is outside a prompt of {length} tokens: expected 0 to {length - 1}")
    return [node.position]
