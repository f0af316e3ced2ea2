"""A dictionary of features as arithmetic alone: an activation comes in, its features and the rest go out, and back again.

    x = decode(features, state) + error

The state is whatever else of the activation decoding needs, position by position: the scale and mean of an SAE that
normalises each token, the skip path of a skip transcoder, the predicted codes of a temporal SAE. Most have none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

State = Mapping[str, torch.Tensor]
"""Tensors `[batch, pos, n]`, by name."""


@dataclass(frozen=True)
class Code:
    """What a dictionary makes of an activation: `features` `[batch, pos, d_sae]` and the state."""

    features: torch.Tensor
    state: State = field(default_factory=dict)


class Codec(ABC):
    """A pair of functions between activations `[batch, pos, d]` and codes, made from what the user gives as `saes`.

    Args:
        source: an object of this kind.
        like: a tensor of the model, whose type and device an object without tensors gets.

    Attributes:
        kind: what it is, for messages.
        d_in, d_out, d_sae: widths of what it reads, of what it writes, and the number of features.
        dtype: the type in which it encodes.
        may_be_linear: whether the decoder is of a kind that can be linear in the features; whether it is, is then found out.
    """

    kind: str
    d_in: int
    d_out: int
    d_sae: int
    dtype: torch.dtype
    may_be_linear: bool = True

    @abstractmethod
    def __init__(self, source: Any, like: torch.Tensor) -> None: ...

    @staticmethod
    @abstractmethod
    def hooks(source: Any) -> tuple[str, str] | None:
        """The names of the hooks that an object of this kind reads and writes; None for an object of another kind."""

    @abstractmethod
    def encode(self, x: Float[torch.Tensor, "batch pos d_in"]) -> Code:
        """The code of an activation of any type and device, in those of the dictionary."""

    @abstractmethod
    def decode(self, features: Float[torch.Tensor, "batch pos d_sae"], state: State) -> Float[torch.Tensor, "batch pos d_out"]:
        """The reconstruction."""

    def rows(self, features: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_out"] | None:
        """What the weights say that a unit of each feature adds, if they do; to be checked against `decode`."""
        return None

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of everything that decides what it computes."""
