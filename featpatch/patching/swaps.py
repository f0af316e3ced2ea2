"""From two runs of a pair to the deltas of its swaps, for one dictionary.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

With `b` corrupted and `s` clean this is denoising, the other way round noising; the deltas of the two differ in sign only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.engine import Deltas, Directional, Explicit
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Split
from featpatch.pairs import Pair
from featpatch.patch import Node, Position

Positions = str | Sequence[Position]
"""`"all"`, `"each"`, or a list of labels and indices."""


@dataclass(frozen=True)
class Swaps:
    """Nodes of one site that differ between the runs of one pair, with the deltas from corrupted to clean."""

    site: str
    nodes: tuple[Node, ...]
    deltas: Deltas


def spans(pair: Pair, positions: Positions) -> dict[Position, list[int]]:
    """What each requested position stands for in a pair: a name or index, and the token positions.

    Raises:
        FeatpatchError: the pair has no such position, or the request is not one.
    """
    if isinstance(positions, str) and positions not in ("all", "each"):
        raise FeatpatchError(
            f"positions={positions!r}: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]"
        )
    if positions == "all":
        return {"all": pair.positions("all")}
    wanted: Sequence[Position] = pair.positions("all") if positions == "each" else list(positions)
    if not wanted:
        raise FeatpatchError("positions is empty: expected 'all', 'each' or a list of labels and indices")
    return {position: pair.positions(position) for position in wanted}


def feature_swaps(dictionary: Dictionary, clean: Split, corrupted: Split, wanted: dict[Position, list[int]]) -> list[Swaps]:
    """Every feature that differs, alone; then all features, and the error. Splits are of one pair: `[pos, ...]`."""
    difference = clean.features - corrupted.features
    swaps = []
    for position, span in wanted.items():
        part = difference[span]
        indices = (part != 0).any(0).nonzero()[:, 0]
        coefficients = torch.zeros(len(indices), len(difference), dtype=part.dtype, device=part.device)
        coefficients[:, span] = part[:, indices].T
        names = [Node(dictionary.writes, "feature", int(index), position, dictionary.name) for index in indices]
        swaps.append(Swaps(dictionary.writes, tuple(names), Directional(coefficients, dictionary.directions(indices))))
    together = dictionary.decode(clean.features) - dictionary.decode(corrupted.features)
    swaps.append(whole_swaps(dictionary.writes, "all_features", together, wanted, dictionary.name))
    swaps.append(whole_swaps(dictionary.writes, "error", clean.error - corrupted.error, wanted, dictionary.name))
    return swaps


def whole_swaps(
    site: str, kind: str, difference: Float[torch.Tensor, "pos d"], wanted: dict[Position, list[int]], sae: str = ""
) -> Swaps:
    """One swap per requested position of everything that differs there."""
    nodes, deltas = [], []
    for position, span in wanted.items():
        delta = torch.zeros_like(difference)
        delta[span] = difference[span]
        if delta.any():
            nodes.append(Node(site, kind, None, position, sae))  # type: ignore[arg-type]
            deltas.append(delta)
    return Swaps(site, tuple(nodes), Explicit(deltas))
