"""Find out what a codec does from random activations, rather than from its name."""

from dataclasses import dataclass

import torch

from featpatch.errors import FeatpatchError
from featpatch.lens.codec import Code, Codec, State

LENGTH = 8
"""Positions of the random prompts."""

CHANGED = 2**14
"""Features that are changed together, at most."""


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of a codec: how it treats positions and features.

    Attributes:
        rowwise: a position is encoded alone, not with earlier ones.
        linear: what a unit of a feature adds to the activation has one direction, whatever the other features and the state.
        scaled: how much it adds depends on the state, for all features in proportion.
    """

    rowwise: bool
    linear: bool
    scaled: bool

    @classmethod
    def of(cls, codec: Codec, name: str) -> "Behaviour":
        """Find out the behaviour of a codec on a few random activations of different sizes.

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
        same = _same if codec.dtype in (torch.bfloat16, torch.float16) else _close
        if not all(
            same(one[0], other[0]) and same(other[:, :-1], before)
            for one, other, before in zip(*map(_parts, (together, alone, upto)), strict=True)
        ):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) encodes a row differently beside others: expected one whose features depend on "
                "the prompt up to there alone; save a training SAE with save_inference_model and load it again"
            )
        rows = [torch.cat(row, dim=1) for row in zip(*(_parts(codec.encode(x[:1, [p]])) for p in range(LENGTH)), strict=True)]
        by_row = [codec.decode(alone.features[:, [p]], _at(alone.state, p)) for p in range(LENGTH)]
        if not _close(decoded, torch.cat(by_row, dim=1)):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) decodes a position differently beside others: expected every position alone"
            )
        scale = gain(codec, alone.state)
        return cls(
            rowwise=all(map(_close, _parts(alone), rows)),
            linear=codec.may_be_linear and _linear(codec, alone, scale),
            scaled=not torch.allclose(scale, torch.ones_like(scale), rtol=1e-3),
        )


def _parts(code: Code) -> list[torch.Tensor]:
    """The features and every part of the state, `[batch, pos, n]` each."""
    return [code.features, *code.state.values()]


def reference(codec: Codec) -> Code:
    """No features, in the state of a fixed random activation: where directions are probed, and the gain is 1."""
    code = codec.encode(torch.randn(1, 1, codec.d_in, generator=torch.Generator().manual_seed(3)))
    return Code(torch.zeros_like(code.features), code.state)


def gain(codec: Codec, state: State) -> torch.Tensor:
    """Return how much a unit of any feature adds at each position, `[batch, pos, 1]`, relative to the reference.

    Measured with a fixed change of the features in each position's own state; meaningful where the codec is linear.
    """
    there = reference(codec)
    if not state:
        return torch.ones_like(there.features[..., :1])
    batch, positions = next(iter(state.values())).shape[:2]
    here = Code(there.features.expand(batch, positions, -1), state)
    change = _change(codec, there, seed=2)
    added, unit = _adds(codec, here, change), _adds(codec, there, change)
    return (added * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True)


def _linear(codec: Codec, code: Code, scale: torch.Tensor) -> bool:
    """Whether the same change of the features changes the activation alike, up to the gain, whatever the features are."""
    change = _change(codec, code, seed=1)
    once, twice = (_adds(codec, code, times * change) for times in (1, 2))
    expected = scale * _adds(codec, reference(codec), change)
    largest = codec.decode(code.features, code.state).abs().max() + twice.abs().max()
    tolerance = 64 * torch.finfo(once.dtype).eps * float(largest)
    return bool(torch.cat([once - expected, twice - 2 * expected]).abs().max() <= tolerance)


def _change(codec: Codec, code: Code, seed: int) -> torch.Tensor:
    """Return a random change of all features, or of few enough that rounding does not hide their sum."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(codec.d_sae, generator=generator)
    if codec.d_sae > CHANGED:
        change[torch.randperm(codec.d_sae, generator=generator)[CHANGED:]] = 0
    return change.to(code.features)


def _adds(codec: Codec, code: Code, change: torch.Tensor) -> torch.Tensor:
    return codec.decode(code.features + change, code.state) - codec.decode(code.features, code.state)


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
