"""Token positions of a pair that a request such as `"all"`, `"each"` or `["S2", 0]` stands for."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import SupportsIndex, cast

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import Pair
from featpatch.patch import Position

Positions = str | Sequence[Position]
"""`"all"`, `"each"`, or a list of labels and indices."""

Wanted = Mapping[Position, list[int]]
"""The token positions of one pair that each requested position stands for."""


def spans(pair: Pair, positions: Positions) -> dict[Position, list[int]]:
    """Return the token positions of a pair that each requested label or index stands for.

    Raises:
        FeatpatchError: the pair has no such position, or the request is not valid.
    """
    if positions not in ("all", "each") if isinstance(positions, str) else not isinstance(positions, Sequence):
        raise FeatpatchError(
            f"positions={positions!r}: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]"
        )
    if positions == "all":
        return {"all": pair.positions("all")}
    wanted: Sequence[Position] = pair.positions("all") if positions == "each" else [_plain(entry) for entry in positions]
    if not wanted:
        raise FeatpatchError("positions is empty: expected 'all', 'each' or a list of labels and indices")
    return {position: pair.positions(position) for position in wanted}


def _plain(entry: object) -> Position:
    """Return a label unchanged, or an index as a plain int.

    Raises:
        FeatpatchError: the entry is neither.
    """
    try:
        return entry if isinstance(entry, str) else index(cast(SupportsIndex, entry))
    except TypeError as error:
        raise FeatpatchError(f"position {entry!r} is a {type(entry).__name__}: expected a label or an index") from error
