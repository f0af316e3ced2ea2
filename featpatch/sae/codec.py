"""Interface of an SAE or transcoder as pure arithmetic: encode an activation into features and a state, and decode it.

    x = decode(features, state) + error

The state is whatever else decoding needs of the activation, position by position: the scale and mean of an SAE that
normalises each token, the skip path of a skip transcoder, the predicted codes of a temporal SAE. Most have none.

How a codec behaves is tested on random activations rather than derived from its name, unless its arithmetic is featpatch's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch.errors import FeatpatchError
from featpatch.model.layer import product_rounding

State = Mapping[str, torch.Tensor]
"""The parts of a state by name, tensors `[batch, pos, n]`."""


Hooks = tuple[str, str] | tuple[tuple[str, ...], tuple[str, ...]]
"""The hook points that a dictionary reads and writes: one of each, or several."""


@dataclass(frozen=True)
class Code:
    """An encoded activation: `features` `[batch, pos, d_sae]` and the state."""

    features: torch.Tensor
    state: State = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """An activation at a hook point, split by a dictionary.

    Attributes:
        features: the features, `[batch, pos, d_sae]`.
        state: the parts of the activation that decoding needs besides the features (see `Codec`), each `[batch, pos, n]`.
        error: the part that the dictionary does not reconstruct, `[batch, pos, d_out]`.
    """

    features: torch.Tensor
    state: State
    error: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Split":
        """Return the split with a function applied to features, error and each part of the state."""
        return Split(change(self.features), {name: change(value) for name, value in self.state.items()}, change(self.error))

    @staticmethod
    def cat(splits: "Sequence[Split]") -> "Split":
        """Return splits of several batches as one batch."""
        state = {name: torch.cat([split.state[name] for split in splits]) for name in splits[0].state}
        return Split(torch.cat([split.features for split in splits]), state, torch.cat([split.error for split in splits]))

    def at(self, positions: Int[torch.Tensor, " n"]) -> "Split":
        """Return a split of one prompt with each of these positions as a prompt of its own, `[n, 1, ...]`."""
        return self.map(lambda values: values[0, positions, None])


class Codec(ABC):
    """A pair of functions between activations `[batch, pos, d]` and codes, made from an object that the user passes as `saes`.

    Args:
        source: an object of the type that the codec supports.
        like: a tensor of the model, whose dtype and device are used for an object without tensors.

    Attributes:
        kind: the name of the object's type, for messages.
        d_in, d_out, d_sae: the widths of the activations that it reads and writes, and the number of features.
        dtype: the dtype in which it encodes.
        groups: the number of equal groups of features; group g writes only to the g-th and higher outputs of the dictionary, as
            layer g of a cross-layer transcoder does. All others have one group.
        may_be_linear: whether the decoder is of a type that can be linear in the features; whether it is, is then tested.
        behaviour: the behaviour, if it follows from the codec's own arithmetic; None if it has to be tested.
    """

    kind: str
    d_in: int
    d_out: int
    d_sae: int
    dtype: torch.dtype
    may_be_linear: bool = True
    groups: int = 1
    behaviour: "Behaviour | None" = None

    @abstractmethod
    def __init__(self, source: Any, like: torch.Tensor) -> None: ...

    @staticmethod
    @abstractmethod
    def hooks(source: Any) -> "Hooks | None":
        """Return the names of the hook points that an object reads and writes; None for an object of another type.

        A codec for several hook points gives tuples, in the order in which activations and changes of all of them lie side by
        side in `encode`, `decode` and `rows`.
        """

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

    def encoders(
        self, features: Int[torch.Tensor, " n"]
    ) -> tuple[Float[torch.Tensor, "n d_read"], Float[torch.Tensor, " n"]] | None:
        """Return vectors w and biases b such that an active feature is `w . x + b`; None if the weights do not tell.

        `x` is what the group of the feature reads: the whole input, unless there are several groups.
        """
        return None

    def pull_skip(self, gradient: Float[torch.Tensor, "*rows d_out"]) -> Float[torch.Tensor, "*rows d_in"] | None:
        """Return the gradient through a linear skip path, from its output to its input; None if there is none or is unknown."""
        return None

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of everything that determines what the codec computes."""

    def off(self) -> Code:
        """Return the code that directions are measured from: all features off, in the state of a fixed random activation."""
        code = self.encode(torch.randn(1, 1, self.d_in, generator=torch.Generator().manual_seed(3)))
        return Code(torch.zeros_like(code.features), code.state)


LENGTH = 8
"""Number of positions in the random prompts."""

CHANGED = 2**14
"""Maximum number of features that are changed together."""

PROBED = 2**23
"""Maximum number of feature values that are decoded together."""

SUMMED = 256
"""Number of features whose rows of the weights are checked together."""

ROUNDING = 64
"""Tolerated difference between a decoded change and the sum of what its features add, in units of rounding."""


@dataclass(frozen=True)
class Behaviour:
    """The way in which a codec treats positions and features.

    Attributes:
        rowwise: whether each position is encoded on its own, without earlier ones.
        linear: whether a unit of a feature adds to the activation along one fixed direction, whatever the other features and
            the state are.
        scaled: whether the amount that it adds depends on the state, in the same proportion for all features.
    """

    rowwise: bool
    linear: bool
    scaled: bool

    @classmethod
    def of(cls, codec: Codec, name: str) -> "Behaviour":
        """Return the behaviour that a codec declares, or determine it from a few random activations of different sizes.

        Raises:
            FeatpatchError: values are not finite; or a position is encoded together with other prompts or later positions, or
                decoded together with other positions, so that its features have no values of their own.
        """
        if codec.behaviour is not None:
            return codec.behaviour
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, LENGTH, codec.d_in, generator=generator) * torch.arange(1.0, LENGTH + 1)[:, None]
        together, alone, upto = codec.encode(x), codec.encode(x[:1]), codec.encode(x[:1, :-1])
        decoded = codec.decode(alone.features, alone.state)
        if not torch.isfinite(together.features).all() or not torch.isfinite(decoded).all():
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) returns NaN or infinite values for random activations: expected finite numbers; "
                "check its weights, or load it in float32"
            )
        same = _same if product_rounding(codec.dtype, 1) > 1e-4 else _close
        if not all(
            same(one[0], other[0]) and same(other[:, :-1], before)
            for one, other, before in zip(*map(_parts, (together, alone, upto)), strict=True)
        ):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) encodes a row differently when other rows are in the batch: expected features "
                "that depend only on the prompt up to their position; save a training SAE with save_inference_model and load "
                "it again"
            )
        rows = [torch.cat(row, dim=1) for row in zip(*(_parts(codec.encode(x[:1, [p]])) for p in range(LENGTH)), strict=True)]
        by_row = [codec.decode(alone.features[:, [p]], _at(alone.state, p)) for p in range(LENGTH)]
        if not _close(decoded, torch.cat(by_row, dim=1)):
            raise FeatpatchError(
                f"SAE {name!r} ({codec.kind}) decodes a position differently when there are other positions: expected each "
                "position to be decoded independently"
            )
        scale = gain(codec, alone.state)
        return cls(
            rowwise=all(map(same, _parts(alone), rows)),
            linear=codec.may_be_linear and _linear(codec, alone, scale),
            scaled=not torch.allclose(scale, torch.ones_like(scale), rtol=1e-3),
        )


def _parts(code: Code) -> list[torch.Tensor]:
    """Return the features and every part of the state, each `[batch, pos, n]`."""
    return [code.features, *code.state.values()]


def gain(codec: Codec, state: State) -> torch.Tensor:
    """Return how much a unit of any feature adds at each position, `[batch, pos, 1]`, relative to `codec.off()`.

    It is measured with a fixed change of the features in each position's own state, and is meaningful if the codec is linear.
    """
    there = codec.off()
    if not state:
        return torch.ones_like(there.features[..., :1])
    batch, positions = next(iter(state.values())).shape[:2]
    here = Code(there.features.expand(batch, positions, -1), state)
    change = _change(codec, there, seed=2)
    added, unit = _adds(codec, here, change), _adds(codec, there, change)
    return (added * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True)


@torch.no_grad()
def directions(codec: Codec, features: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_out"]:
    """Compute what one unit of each feature adds to the activation, according to `decode` rather than `W_dec`.

    Rows of the weights are used if `decode` maps random sums of features to the same sums of rows, up to a common factor;
    otherwise each feature is decoded by itself. Valid only if the behaviour is `linear`: a feature then adds this direction in
    every state, times the gain of the state.
    """
    single, back = features.unique(return_inverse=True)
    found = _checked_rows(codec, single)
    if found is None:
        found = torch.cat([probed(codec, some) for some in single.split(max(1, PROBED // codec.d_sae))])
    return found[back.to(found.device)]


def _checked_rows(codec: Codec, features: torch.Tensor) -> torch.Tensor | None:
    """Return the rows of features without duplicates, times their common factor; None if `decode` adds something else."""
    rows, off = codec.rows(features), codec.off()
    if rows is None or not len(features):
        return None
    checked = []
    for some, of_some in zip(features.split(SUMMED), rows.split(SUMMED), strict=True):
        signs = torch.randint(0, 2, (len(some),), generator=torch.Generator().manual_seed(0)).to(rows) * 2 - 1
        units = off.features.clone()
        units[0, 0, some.to(units.device)] = signs.to(units)
        decoded = codec.decode(units, off.state)
        added = (decoded - codec.decode(off.features, off.state))[0, 0]
        expected = signs @ of_some
        factor = (added @ expected) / (expected @ expected)
        if not (added - factor * expected).abs().max() <= product_rounding(rows.dtype, ROUNDING) * decoded.abs().max():
            return None
        checked.append(of_some * factor)
    return torch.cat(checked)


def probed(codec: Codec, features: torch.Tensor) -> torch.Tensor:
    """Return what decoding adds for each feature by itself."""
    off = codec.off()
    units = off.features.repeat(len(features), 1, 1)
    units[torch.arange(len(features), device=units.device), 0, features.to(units.device)] = 1
    state = {name: value.expand(len(features), -1, -1) for name, value in off.state.items()}
    return codec.decode(units, state)[:, 0] - codec.decode(off.features, off.state)[:, 0]


def _linear(codec: Codec, code: Code, scale: torch.Tensor) -> bool:
    """Return whether a change of the features adds the same to the activation, up to the gain, whatever the features are."""
    change = _change(codec, code, seed=1)
    once, twice = (_adds(codec, code, times * change) for times in (1, 2))
    expected = scale * _adds(codec, codec.off(), change)
    largest = codec.decode(code.features, code.state).abs().max() + twice.abs().max()
    tolerance = product_rounding(once.dtype, ROUNDING) * float(largest)
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
    """Return whether two results differ by rounding alone."""
    tolerance = product_rounding(one.dtype, 256)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether only a few values differ: rounding may turn a feature at its threshold on or off."""
    differs = (one - other).abs() > 1e-2 * float(one.abs().max())
    return int(differs.sum()) <= 2 + 0.05 * int((one != 0).sum())
