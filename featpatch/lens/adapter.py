"""Any other dictionary: an object with `encode` and `decode`, told at which hook it belongs."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from featpatch.errors import FeatpatchError
from featpatch.lens.codec import Code, Codec, State
from featpatch.lens.digest import digest

PROBES = 16
"""Random activations by which a dictionary without weights of its own is told from others."""


@dataclass(frozen=True)
class Adapted:
    """A dictionary that is not of sae-lens, at its hooks; made by `adapt` and the baselines.

    Attributes:
        coder: an object with `encode` and `decode`.
        hook, hook_out: hook names that it reads and writes.
        d_in: width of what it reads.
        name: a name for tables; empty for the name of the hook.
        linear: whether `decode` is known to be a fixed linear map, plus a constant.
    """

    coder: Any
    hook: str
    hook_out: str
    d_in: int
    name: str = ""
    linear: bool = False


def adapt(coder: Any, hook: str, *, d_in: int, hook_out: str | None = None, name: str = "", linear: bool = False) -> Adapted:
    """Takes an object of your own for a dictionary, wherever SAEs are expected.

    Args:
        coder: an object (a `torch.nn.Module` or not) with `encode(x)`, from activations `[batch, pos, d_in]` (heads of
            `hook_z` side by side) to features `[batch, pos, d_sae]`, and `decode(features)` to `[batch, pos, d_out]`.
            `decode` may be nonlinear, but sees nothing of the activation besides its features; `encode` may look at
            earlier positions.
        hook: the hook that it reads.
        d_in: width of an activation there.
        hook_out: the hook that it writes, for a transcoder.
        name: a name for tables; by default that of the hook.
        linear: whether `decode` is a fixed linear map plus a constant, as that of nearly every SAE is. Then what a feature adds
            is worked out once; otherwise every patch decodes, which is right for any decoder and slower.

    Raises:
        FeatpatchError: the object has no `encode` or no `decode`.
    """
    missing = [verb for verb in ("encode", "decode") if not callable(getattr(coder, verb, None))]
    if missing:
        raise FeatpatchError(
            f"{type(coder).__name__} has no {' and no '.join(missing)}: expected an object with encode(x) and decode(features)"
        )
    return Adapted(coder, hook, hook_out or hook, d_in, name, linear)


class AdaptedCodec(Codec):
    """The object behind an `Adapted`, fed in the type and on the device of its first tensor.

    Args:
        like: a tensor of the model, whose type and device an object without tensors gets.

    Raises:
        FeatpatchError: it returns something else than a tensor of the right shape.
    """

    def __init__(self, adapted: Adapted, like: torch.Tensor) -> None:
        self.coder = adapted.coder
        self.kind = type(adapted.coder).__name__
        own = self.coder.state_dict() if isinstance(self.coder, torch.nn.Module) else getattr(self.coder, "__dict__", {})
        tensors = (value for value in own.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
        self._like = next(tensors, like)
        self.d_in, self.may_be_linear = adapted.d_in, adapted.linear
        probe = torch.zeros(1, 1, self.d_in)
        self.d_sae = self._width(adapted.coder.encode(self._moved(probe)), "encode")
        self.d_out = self._width(adapted.coder.decode(self._moved(torch.zeros(1, 1, self.d_sae))), "decode")

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> Code:
        """Features alone."""
        return Code(self.coder.encode(self._moved(x)))

    @torch.no_grad()
    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """The object's own."""
        return self.coder.decode(self._moved(features))

    def digest(self) -> str:
        """Of the weights, if it has any, and of what it makes of random activations, which settings beside them decide."""
        weights = digest(self.coder) if isinstance(self.coder, torch.nn.Module) else ""
        x = torch.randn(1, PROBES, self.d_in, generator=torch.Generator().manual_seed(0))
        features = self.encode(x).features
        made = torch.cat([features.flatten(), self.decode(features, {}).flatten()]).double().cpu()
        return hashlib.sha256(f"{self.kind} {weights}".encode() + made.numpy().tobytes()).hexdigest()

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        """A copy, since an object may work in place."""
        return x.to(device=self._like.device, dtype=self._like.dtype, copy=True)

    def _width(self, made: Any, verb: str) -> int:
        if not isinstance(made, torch.Tensor) or made.ndim != 3 or made.shape[:2] != (1, 1):
            found = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise FeatpatchError(
                f"{self.kind}.{verb} makes {found} of a tensor [1, 1, n]: expected a tensor [1, 1, m], one row per position"
            )
        return int(made.shape[2])
