"""What a codec does, found out on random activations rather than believed from its name."""

from dataclasses import dataclass

import torch

from featpatch.errors import FeatpatchError
from featpatch.lens.codec import Code, Codec, State

LENGTH = 8
"""Positions of the random prompts."""


@dataclass(frozen=True)
class Behaviour:
    """How a codec treats positions and features.

    Attributes:
        rowwise: a position is encoded alone, not with earlier ones.
        linear: a unit of a feature adds the same to the activation whatever the other features and the state.
    """

    rowwise: bool
    linear: bool

    @classmethod
    def of(cls, codec: Codec, name: str) -> "Behaviour":
        """From a few random activations of different sizes.

        Raises:
            FeatpatchError: values that are not finite; a position is encoded together with other prompts or with later
                positions, or decoded together with others: then its features have no values of their own.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, LENGTH, codec.d_in, generator=generator) * torch.arange(1.0, LENGTH + 1)[:, None]
        together, alone, upto = codec.encode(x), codec.encode(x[:1]), codec.encode(x[:1, :-1])
        decoded = codec.decode(alone.features, alone.state)
        if not torch.isfinite(together.features).all() or not torch.isfinite(decoded).all():
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) gives NaN or infinite values for random activations: expected finite numbers; "
                "check its weights, or load it in float32"
            )
        if not _same(together.features[0], alone.features[0]) or not _same(alone.features[:, :-1], upto.features):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) encodes a row differently beside others: expected one whose features depend on "
                "the prompt up to there alone; save a training SAE with save_inference_model and load it again"
            )
        rows = torch.cat([codec.encode(x[:1, [p]]).features for p in range(LENGTH)], dim=1)
        by_row = [codec.decode(alone.features[:, [p]], _at(alone.state, p)) for p in range(LENGTH)]
        if not _same(decoded, torch.cat(by_row, dim=1)):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) decodes a position differently beside others: expected every position alone"
            )
        return cls(rowwise=_close(alone.features, rows), linear=codec.may_be_linear and _linear(codec, alone))


def _linear(codec: Codec, code: Code) -> bool:
    """Whether the same change of the features changes the activation alike at positions with other features and states."""
    generator = torch.Generator().manual_seed(1)
    change = torch.rand(codec.d_sae, generator=generator).to(code.features)
    changed = codec.decode(code.features + change, code.state) - codec.decode(code.features, code.state)
    twice = codec.decode(code.features + 2 * change, code.state) - codec.decode(code.features, code.state)
    largest = codec.decode(code.features, code.state).abs().max() + twice.abs().max()
    tolerance = 64 * torch.finfo(changed.dtype).eps * float(largest)
    differs = torch.cat([changed - changed[:, :1], twice - 2 * changed]).abs().max()
    return bool(differs <= tolerance)


def _at(state: State, position: int) -> State:
    return {name: value[:, [position]] for name, value in state.items()}


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    tolerance = 256 * torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether few values differ: rounding may turn a feature at its threshold on or off."""
    differs = (one - other).abs() > 1e-2 * float(one.abs().max())
    return int(differs.sum()) <= 2 + 0.05 * int((one != 0).sum())
