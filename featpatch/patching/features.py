"""Set up studies of SAE features: of all features that differ, or of one dictionary at one position."""

from dataclasses import replace
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, dictionaries, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import Node, Position
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.study import Asked, Study


def feature_study(
    model: Any, saes: Any, pairs: Pairs, asked: Asked, only: frozenset[Node] | None = None
) -> tuple[Study, list[Dictionary]]:
    """Return the validated experiment that `rank_features` runs with these arguments, and its dictionaries.

    Args:
        model, saes, pairs: as in `rank_features`.
        asked: the other arguments of `rank_features`.
        only: the nodes that are patched; None for all.
    """
    check_pairs(pairs)
    lens = wrap(model)
    found = dictionaries(lens, saes)
    about = {"saes": {dictionary.name: dictionary.digest() for dictionary in found}}
    return Study.of(lens, [FeaturePart(found, only)], about, pairs, asked), found


def single_study(model: Any, sae: Any, pairs: Pairs, position: Position, asked: Asked) -> tuple[Study, Dictionary]:
    """Return a validated experiment with the features of one dictionary at one position, and the dictionary.

    Args:
        position: replaces the positions of `asked`.
        model, sae, pairs, asked: as in `feature_study`.

    Raises:
        FeatpatchError: if there are several dictionaries, or the input is unusable.
    """
    positions: Positions = "all" if position == "all" else [position]
    study, found = feature_study(model, sae, pairs, replace(asked, positions=positions))
    if len(found) != 1:
        raise FeatpatchError(f"there are {len(found)} dictionaries: expected one, whose features are swapped at one site")
    return study, found[0]
