"""Interface of an SAE or transcoder as pure arithmetic: encode an activation into features and a state, and decode it.

    x = decode(features, state) + error

The state is whatever else decoding needs of the activation, position by position: the scale and mean of an SAE that
normalises each token, the skip path of a skip transcoder, the predicted codes of a temporal SAE. Most have none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

State = Mapping[str, torch.Tensor]
"""The parts of a state by name, tensors `[batch, pos, n]`."""


@dataclass(frozen=True)
class Code:
    """An encoded activation: `features` `[batch, pos, d_sae]` and the state."""

    features: torch.Tensor
    state: State = field(default_factory=dict)


class Codec(ABC):
    """A pair of functions between activations `[batch, pos, d]` and codes, made from an object that the user passes as `saes`.

    Args:
        source: an object of the type that the codec supports.
        like: a tensor of the model, whose dtype and device are used for an object without tensors.

    Attributes:
        kind: the name of the object's type, for messages.
        d_in, d_out, d_sae: the widths of the activations that it reads and writes, and the number of features.
        dtype: the dtype in which it encodes.
        may_be_linear: whether the decoder is of a type that can be linear in the features; whether it is, is then tested.
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
        """Return the names of the hook points that an object reads and writes; None for an object of another type."""

    @abstractmethod
    def encode(self, x: Float[torch.Tensor, "batch pos d_in"]) -> Code:
        """Encode an activation of any dtype and device, in the dtype and on the device of the dictionary."""

    @abstractmethod
    def decode(self, features: Float[torch.Tensor, "batch pos d_sae"], state: State) -> Float[torch.Tensor, "batch pos d_out"]:
        """Return the reconstruction."""

    def rows(self, features: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_out"] | None:
        """Return what a unit of each feature adds according to the weights; None if the weights do not tell.

        It is always checked against `decode`.
        """
        return None

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of everything that determines what the codec computes."""
