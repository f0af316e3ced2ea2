"""The arguments that all patching experiments share."""

from collections.abc import Sequence
from dataclasses import dataclass

from featpatch.pairs.spans import Positions
from featpatch.patch import DIRECTIONS, Direction
from featpatch.patching.study.noise import Noise
from featpatch.patching.study.readings import Metrics


@dataclass(frozen=True)
class Asked:
    """The arguments that all rankings share, as in `rank_features`; `Study.of` checks them."""

    positions: Positions = "all"
    directions: Sequence[Direction] = DIRECTIONS
    metric: Metrics = "logit_diff"
    batch_rows: int | None = None
    noise: Noise | None = None
