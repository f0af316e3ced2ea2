"""Any other dictionary: an object with `encode` and `decode`, told at which hook it belongs."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

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
        FeatpatchError: the object has no `encode` or no `decode`, is a class or of sae-lens, or a hook or a width is none.
    """
    if isinstance(coder, type):
        raise FeatpatchError(f"{coder.__name__} is a class: expected an object of it")
    if not all(isinstance(name, str) for name in (hook, hook_out or hook)) or not isinstance(d_in, int) or d_in < 1:
        raise FeatpatchError(
            f"hook={hook!r}, hook_out={hook_out!r}, d_in={d_in!r}: expected names of hooks and a width of 1 or more"
        )
    if isinstance(coder, SAE):
        raise FeatpatchError(
            f"{type(coder).__name__} is a sae-lens object: pass it as it is; set cfg.metadata.hook_name (and hook_name_out) "
            "to use it at another hook"
        )
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
        FeatpatchError: it fails, or returns something else than a tensor of the right shape.
    """

    def __init__(self, adapted: Adapted, like: torch.Tensor) -> None:
        self.coder = adapted.coder
        self.kind = type(adapted.coder).__name__
        own = self.coder.state_dict() if isinstance(self.coder, torch.nn.Module) else getattr(self.coder, "__dict__", {})
        tensors = (value for value in own.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
        self._like = next(tensors, like)
        self.d_in, self.may_be_linear, self.dtype = adapted.d_in, adapted.linear, self._like.dtype
        self.d_sae = self._call("encode", torch.zeros(1, 1, self.d_in)).shape[2]
        self.d_out = self._call("decode", torch.zeros(1, 1, self.d_sae)).shape[2]

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> Code:
        """Features alone."""
        return Code(self._call("encode", x))

    @torch.no_grad()
    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """The object's own."""
        return self._call("decode", features)

    def digest(self) -> str:
        """Of the weights, if it has any, and of what it makes of random activations, which settings beside them decide."""
        weights = digest(self.coder) if isinstance(self.coder, torch.nn.Module) else ""
        x = torch.randn(1, PROBES, self.d_in, generator=torch.Generator().manual_seed(0))
        features = self.encode(x).features
        made = torch.cat([features.flatten(), self.decode(features, {}).flatten()]).double().cpu()
        return hashlib.sha256(f"{self.kind} {weights}".encode() + made.numpy().tobytes()).hexdigest()

    def _call(self, verb: str, x: torch.Tensor) -> torch.Tensor:
        """What the object makes of a copy, since it may work in place; dense and of the type that it was given."""
        given = x.to(device=self._like.device, dtype=self._like.dtype, copy=True)
        try:
            made = getattr(self.coder, verb)(given)
        except Exception as error:
            raise FeatpatchError(
                f"{self.kind}.{verb} fails on a tensor {list(x.shape)} of {given.dtype} ({type(error).__name__}: {error}): "
                f"expected an object for activations of width {self.d_in}"
            ) from error
        if not isinstance(made, torch.Tensor) or made.ndim != 3 or made.shape[:2] != x.shape[:2]:
            found = list(made.shape) if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
            raise FeatpatchError(
                f"{self.kind}.{verb} makes {found} of a tensor {list(x.shape)}: expected a tensor "
                f"[{x.shape[0]}, {x.shape[1]}, n], one row per position"
            )
        dense = made.to_dense() if made.is_sparse else made
        return dense if dense.is_floating_point() else dense.to(given.dtype)
