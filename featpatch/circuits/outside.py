"""What the outside of a circuit is set to: the values of other prompts."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from featpatch.errors import FeatpatchError
from featpatch.pairs import Pairs

Outside = Literal["corrupted", "mean", "resample"]
"""`corrupted`: the pair's corrupted run. `mean`: the mean over the clean runs of equally long pairs, position by position.
`resample`: the clean run of another equally long pair."""


def check_outside(to: str, pairs: Pairs) -> None:
    """Raises FeatpatchError for anything but an outside, and for pairs that have no other one of their length."""
    if to not in get_args(Outside):
        raise FeatpatchError(f"to={to!r}: expected one of {', '.join(get_args(Outside))}")
    alone = [group for group in pairs.by_length().values() if len(group) < 2]
    if to != "corrupted" and alone:
        raise FeatpatchError(
            f"pair {alone[0][0]} is the only one with {len(pairs[alone[0][0]])} tokens, and to={to!r} takes values from other "
            "pairs of the same length: expected two or more of each length, or to='corrupted'"
        )


def prompts(pairs: Pairs, some: Sequence[int], to: Outside) -> torch.Tensor:
    """Tokens `[pairs, pos]` of the runs that the values come from."""
    return torch.tensor([pairs[index].corrupted if to == "corrupted" else pairs[index].clean for index in some])


def settled(values: torch.Tensor, to: Outside) -> torch.Tensor:
    """From activations `[pairs, ...]` of `prompts` to what each pair is given: its own, their mean, or the pair's before it."""
    if to == "mean":
        return values.mean(0, keepdim=True).expand_as(values)
    return values.roll(1, 0) if to == "resample" else values
