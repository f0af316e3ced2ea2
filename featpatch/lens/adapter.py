"""Any other dictionary: an object with `encode` and `decode`, told at which hook it belongs."""

from dataclasses import dataclass
from typing import Any

from sae_lens import SAE

from featpatch.errors import FeatpatchError


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
