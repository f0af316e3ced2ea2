"""Studies of SAE features: every one that differs, alone; or those of one dictionary at one position."""

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
    """What `rank_features` with these arguments does, checked, and the dictionaries in it.

    Args:
        only: the nodes that are patched; None for all.
    """
    check_pairs(pairs)
    lens = wrap(model)
    found = dictionaries(lens, saes)
    about = {"saes": {dictionary.name: dictionary.digest() for dictionary in found}}
    return Study.of(lens, [FeaturePart(found, only)], about, pairs, asked), found


def single_study(model: Any, sae: Any, pairs: Pairs, position: Position, asked: Asked) -> tuple[Study, Dictionary]:
    """As `feature_study`, of one dictionary at one position, which replaces what is asked.

    Raises:
        FeatpatchError: several dictionaries; unusable input.
    """
    positions: Positions = "all" if position == "all" else [position]
    study, found = feature_study(model, sae, pairs, replace(asked, positions=positions))
    if len(found) != 1:
        raise FeatpatchError(f"there are {len(found)} dictionaries: expected one, whose features are swapped at one site")
    return study, found[0]
