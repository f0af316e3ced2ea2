"""Studies of SAE features: every one that differs, alone; or those of one dictionary at one position."""

from collections.abc import Sequence
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, dictionaries, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import Direction, Node, Position
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.noise import Noise
from featpatch.patching.readings import Metrics
from featpatch.patching.study import Study


def feature_study(
    model: Any,
    saes: Any,
    pairs: Pairs,
    positions: Positions,
    directions: Sequence[Direction],
    metric: Metrics,
    batch_rows: int | None,
    noise: Noise | None = None,
    only: frozenset[Node] | None = None,
) -> tuple[Study, list[Dictionary]]:
    """What `rank_features` with these arguments does, checked, and the dictionaries in it.

    Args:
        only: the nodes that are patched; None for all.
    """
    check_pairs(pairs)
    lens = wrap(model)
    found = dictionaries(lens, saes)
    about = {"saes": {dictionary.name: dictionary.digest() for dictionary in found}}
    study = Study.of(
        lens,
        [FeaturePart(found, only)],
        about,
        pairs,
        positions=positions,
        directions=directions,
        metric=metric,
        batch_rows=batch_rows,
        noise=noise,
    )
    return study, found


def single_study(
    model: Any,
    sae: Any,
    pairs: Pairs,
    position: Position,
    directions: Sequence[Direction],
    metric: Metrics,
    batch_rows: int | None,
) -> tuple[Study, Dictionary]:
    """As `feature_study`, of one dictionary at one position.

    Raises:
        FeatpatchError: several dictionaries; unusable input.
    """
    positions: Positions = "all" if position == "all" else [position]
    study, found = feature_study(model, sae, pairs, positions, directions, metric, batch_rows)
    if len(found) != 1:
        raise FeatpatchError(f"there are {len(found)} dictionaries: expected one, whose features are swapped at one site")
    return study, found[0]
