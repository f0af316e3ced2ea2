"""Regions of the prompts, in each of which an edge is an item of its own, so that a circuit says at which positions.

The residual stream moves nothing between positions, so an edge at a position leads from what its sender writes there to what
its receiver reads there. A head moves information from the regions of its keys and values to that of its query. The regions
partition each prompt, as the spans of Haklay et al. 2025 (arXiv 2502.04577) do: all other positions, including answer tokens
that follow the prompt, are one more region. So all edges together are the model, and without any it is the ablation run.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int

from featpatch.errors import FeatpatchError
from featpatch.nodes import Position
from featpatch.pairs.pair import Pair, Positions, spans, spans_of
from featpatch.pairs.pairs import Pairs

ELSEWHERE = "elsewhere"
"""The name of the region of all positions that are not given."""


@dataclass(frozen=True)
class Regions:
    """The regions of all prompts.

    Attributes:
        given: the positions that are given; none if an edge is one item at all positions.
        each: whether they were given as `"each"`.
    """

    given: tuple[Position, ...] = ()
    each: bool = False

    @classmethod
    def of(cls, positions: Positions, pairs: Pairs) -> "Regions":
        """Return the regions for the argument `positions` of `find_circuit`.

        Raises:
            FeatpatchError: a pair lacks a position, positions overlap, or `"each"` stands for other indices in some pair.
        """
        found = spans_of(pairs, positions)
        if isinstance(positions, str) and positions == "all":
            return cls()
        for index, wanted in enumerate(found):
            if positions == "each" and list(wanted) != list(found[0]):
                raise FeatpatchError(
                    f"positions='each' with pair {index} of {len(pairs[index])} tokens and pair 0 of {len(pairs[0])}: expected "
                    "prompts of one length, with special tokens at the same positions; pass labels instead"
                )
            seen = [token for span in wanted.values() for token in span]
            if len(set(seen)) < len(seen):
                raise FeatpatchError(
                    f"positions={positions!r} overlap in pair {index}: expected each token in at most one; leave one out"
                )
            if ELSEWHERE in wanted:
                raise FeatpatchError(
                    f"positions={positions!r}: {ELSEWHERE!r} is the name of the region of all positions that are not given; "
                    "leave it out, or rename the label"
                )
        return cls(tuple(found[0]), positions == "each")

    @property
    def names(self) -> tuple[Position, ...]:
        """The names of the regions: the given positions and `"elsewhere"`, or `"all"` alone if none are given."""
        return (*self.given, ELSEWHERE) if self.given else ("all",)

    def numbers(self, pair: Pair, length: int) -> Int[torch.Tensor, " pos"]:
        """Return the index of the region of each token of a clean prompt and its continuation, `length` tokens in all."""
        found = torch.full((length,), len(self.given))
        for number, position in enumerate(self.given):
            found[spans(pair, [position])[position]] = number
        return found
