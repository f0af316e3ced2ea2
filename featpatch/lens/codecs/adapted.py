"""The codec for objects of the user's own."""

from typing import Any

import torch

from featpatch.errors import FeatpatchError
from featpatch.files import sha256
from featpatch.lens.adapter import Adapted
from featpatch.lens.codec import Code, Codec, State
from featpatch.lens.digest import digest

PROBES = 16
"""Number of random activations in the digest, which tell apart dictionaries that hold no weights."""


class AdaptedCodec(Codec):
    """A codec for the object in an `Adapted`, which is called in the dtype and on the device of its first tensor.

    Raises:
        FeatpatchError: the object fails, or returns something other than a tensor of the right shape.
    """

    def __init__(self, adapted: Adapted, like: torch.Tensor) -> None:
        self.coder, self.skip = adapted.coder, adapted.skip
        self.kind = type(adapted.coder).__name__
        own = self.coder.state_dict() if isinstance(self.coder, torch.nn.Module) else getattr(self.coder, "__dict__", {})
        tensors = (value for value in own.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
        self._like = next(tensors, like)
        self.d_in, self.may_be_linear, self.dtype = adapted.d_in, adapted.linear, self._like.dtype
        self.d_sae = self._call("encode", torch.zeros(1, 1, self.d_in)).shape[2]
        self.d_out = self._call("decode", torch.zeros(1, 1, self.d_sae)).shape[2]
        if not self.d_sae or not self.d_out:
            raise FeatpatchError(
                f"{self.kind} makes {self.d_sae} features of an activation and {self.d_out} values of them: expected 1 or more"
            )
        width = self.d_out if self.skip is None else self._call("skip", torch.zeros(1, 1, self.d_in)).shape[2]
        if width != self.d_out:
            raise FeatpatchError(
                f"the skip path of {self.kind} makes {width} values and decode {self.d_out}: expected a matrix "
                f"[{self.d_out}, {self.d_in}], or a function that makes as many as decode"
            )

    @staticmethod
    def hooks(source: Any) -> tuple[str, str] | None:
        """Return the hook points that were passed to `adapt`; None for any other object."""
        return (source.hook, source.hook_out) if isinstance(source, Adapted) else None

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> Code:
        """Return the features and, if there is a skip path, its value as the state."""
        return Code(self._call("encode", x), {} if self.skip is None else {"skip": self._call("skip", x)})

    @torch.no_grad()
    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """Return the object's own reconstruction plus the skip path."""
        decoded = self._call("decode", features)
        return decoded + state["skip"] if "skip" in state else decoded

    def digest(self) -> str:
        """Return a digest of the weights, if any, and of results on random activations, which also depend on the settings."""
        weights = digest(self.coder) if isinstance(self.coder, torch.nn.Module) else ""
        x = torch.randn(1, PROBES, self.d_in, generator=torch.Generator().manual_seed(0))
        code = self.encode(x)
        made = torch.cat([code.features.flatten(), self.decode(code.features, code.state).flatten()]).double().cpu()
        return sha256(f"{self.kind} {weights}".encode() + made.numpy().tobytes())

    def _call(self, verb: str, x: torch.Tensor) -> torch.Tensor:
        """Call a method on a copy, because it may work in place, and return a dense floating-point result."""
        given = x.to(device=self._like.device, dtype=self._like.dtype, copy=True)
        try:
            made = (self.skip if verb == "skip" and self.skip else getattr(self.coder, verb))(given)
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
