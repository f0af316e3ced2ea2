"""Ablation values of the complement of a circuit, which are taken from other prompts."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from featpatch.errors import FeatpatchError
from featpatch.pairs import Pairs

Outside = Literal["corrupted", "mean", "resample"]
"""The source of ablation values. `corrupted`: the pair's corrupted run. `mean`: the mean at each position over the clean runs
of equally long pairs. `resample`: the clean run of another equally long pair."""


def check_outside(to: str, pairs: Pairs) -> None:
    """Check that ablation values can be taken from a source.

    Raises:
        FeatpatchError: if the source is unknown, or needs other pairs of the same length and there are none.
    """
    if to not in get_args(Outside):
        raise FeatpatchError(f"to={to!r}: expected one of {', '.join(get_args(Outside))}")
    alone = [group for group in pairs.by_length().values() if len(group) < 2]
    if to != "corrupted" and alone:
        raise FeatpatchError(
            f"pair {alone[0][0]} is the only one with {len(pairs[alone[0][0]])} tokens, and to={to!r} takes values from other "
            "pairs of the same length: expected two or more of each length, or to='corrupted'"
        )


def prompts(pairs: Pairs, some: Sequence[int], to: Outside) -> torch.Tensor:
    """Return the token ids `[pairs, pos]` of the runs that ablation values are taken from."""
    return torch.tensor([pairs[index].corrupted if to == "corrupted" else pairs[index].clean for index in some])


def settled(values: torch.Tensor, to: Outside) -> torch.Tensor:
    """Return the ablation values of each pair from the activations `[pairs, ...]` of `prompts`.

    They are the pair's own row, the mean over all rows, or the row of the previous pair.
    """
    if to == "mean":
        return values.mean(0, keepdim=True).expand_as(values)
    return values.roll(1, 0) if to == "resample" else values
