"""Adapt any object with `encode` and `decode` as a dictionary at a hook point."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens.finite import TYPES
from featpatch.lens.formats import Coder, Weights, of_object
from featpatch.untrusted import visible

Skip = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, repr=False)
class Adapted:
    """A dictionary that is not a sae-lens object, with its hook points; made by `adapt` and the baselines.

    Attributes:
        coder: an object with `encode` and `decode`.
        hook, hook_out: names of the hook points that it reads and writes.
        d_in: width of the activation that it reads.
        name: a name for tables; if empty, the name of the hook point is used.
        linear: whether `decode` is known to be a fixed linear map plus a constant.
        skip: the skip path, a function of the activation that is read, whose value is added to that of `decode`; or None.
    """

    coder: Any
    hook: str
    hook_out: str
    d_in: int
    name: str = ""
    linear: bool = False
    skip: Skip | None = None

    def __repr__(self) -> str:
        hooks = " -> ".join(dict.fromkeys((self.hook, self.hook_out)))
        named = f"{self.name} ({hooks})" if self.name and self.name != hooks else hooks
        return visible(f"{type(self.coder).__name__} at {named}, width {self.d_in}{', with a skip path' if self.skip else ''}")


def adapt(
    coder: Any,
    hook: str,
    *,
    d_in: int | None = None,
    hook_out: str | None = None,
    name: str = "",
    linear: bool = False,
    skip: Any = None,
) -> Adapted | SAE[Any]:
    """Wrap an object of your own as a dictionary that can be passed wherever SAEs are expected.

    For an SAE or transcoder of dictionary_learning, sparsify or circuit-tracer, only the hook point (and `hook_out`) is needed:
    its weights are copied into a sae-lens object that computes the same, if there is one.

    Args:
        coder: an object (a `torch.nn.Module` or not) with `encode(x)`, from activations `[batch, pos, d_in]` (heads of
            `hook_z` side by side) to features `[batch, pos, d_sae]`, and `decode(features)` to `[batch, pos, d_out]`.
            `decode` may be nonlinear, but receives only the features, not the activation (see `skip`); `encode` may
            look at earlier positions.
        hook: the hook point that it reads.
        d_in: width of the activation there; known for objects of the libraries named above. An object of a subclass is adapted
            through its `encode` and `decode`, and needs `d_in`.
        hook_out: the hook point that it writes, for a transcoder.
        name: a name for tables; by default the name of the hook point.
        linear: whether `decode` is a fixed linear map plus a constant, as in nearly every SAE. If so, the direction that a
            feature adds is computed once; otherwise every patch is decoded, which is correct for any decoder but slower.
        skip: the skip path of a transcoder, a matrix `[d_out, d_in]` or a function from `[batch, pos, d_in]` to
            `[batch, pos, d_out]`, position by position: the error is x_out - decode(f) - skip(x).

    Returns:
        A sae-lens object if sae-lens has a class that computes the same; otherwise an `Adapted`.

    Raises:
        FeatpatchError: the object has no `encode` or no `decode`, is a class or a sae-lens object, or a hook point, the width
            or the skip path is not valid.
    """
    if isinstance(coder, type):
        raise FeatpatchError(f"{coder.__name__} is a class: expected an object of it")
    weights = of_object(coder)
    own_width = None if weights is None else int(weights.tensors["W_enc"].shape[0])
    hooks = all(isinstance(each, str) and each for each in (hook, hook if hook_out is None else hook_out))
    if not hooks or (d_in is None and own_width is None) or not (d_in is None or (type(d_in) is int and d_in >= 1)):
        raise FeatpatchError(
            f"hook={hook!r}, hook_out={hook_out!r}, d_in={d_in!r}: expected names of hooks and a width of 1 or more, which is "
            "known only of the classes of dictionary_learning, sparsify and circuit-tracer themselves"
        )
    if isinstance(coder, SAE):
        raise FeatpatchError(
            f"{type(coder).__name__} is a sae-lens object: pass it as it is; set cfg.metadata.hook_name (and hook_name_out) "
            "to use it at another hook"
        )
    if weights is not None:
        if d_in not in (None, own_width) or skip is not None:
            raise FeatpatchError(
                f"{weights.origin} reads {own_width} values and {'has its own' if 'W_skip' in weights.tensors else 'no'} skip "
                f"path: expected neither another d_in={d_in!r} nor skip=; leave them out"
            )
        return placed(weights.at(hook, hook_out), name)
    missing = [verb for verb in ("encode", "decode") if not callable(getattr(coder, verb, None))]
    if missing:
        raise FeatpatchError(
            f"{type(coder).__name__} has no {' and no '.join(missing)}: expected an object with encode(x) and decode(features)"
        )
    return Adapted(coder, hook, hook_out or hook, d_in or 0, name, linear, _skip(skip, d_in or 0))


def placed(weights: Weights, name: str = "") -> Adapted | SAE[Any]:
    """Make a dictionary from weights and their hook points: a sae-lens object if one computes the same, else an `Adapted`."""
    reads, writes, w = weights.reads or "", weights.writes or "", weights.tensors["W_enc"]
    if weights.architecture is None:
        coder = Coder(weights)
        path = coder.skip if "W_skip" in weights.tensors else None
        return Adapted(coder, reads, writes, len(w), name, linear=True, skip=path)
    metadata = {"hook_name": reads, **({"hook_name_out": writes} if writes != reads else {})}
    settings: dict[str, Any] = {
        "architecture": weights.architecture,
        "d_in": len(w),
        "d_sae": w.shape[1],
        "dtype": str(w.dtype).removeprefix("torch."),
        "device": "meta",
        "apply_b_dec_to_input": weights.centred,
        "reshape_activations": "hook_z" if sites.is_component(reads, "z") and reads == writes else "none",
        "metadata": metadata | ({"model_name": weights.model} if weights.model else {}),
    }
    if weights.transcoder:
        settings["d_out"] = weights.tensors["W_dec"].shape[1]
    if weights.activation == "topk":
        settings["k"] = weights.k
    sae: SAE[Any] = SAE.from_dict(settings)
    sae.cfg.device = str(w.device)
    sae.load_state_dict(dict(weights.tensors), assign=True)
    sae = sae.to(dtype=w.dtype, device=w.device)
    if name:
        sae.name = name
    return sae


def _skip(skip: Any, d_in: int) -> Skip | None:
    """Return the skip path as a function, or None if there is none.

    Raises:
        FeatpatchError: the matrix has the wrong shape, dtype or values, or `skip` is neither a matrix nor a function.
    """
    if isinstance(skip, torch.Tensor):
        if skip.ndim != 2 or skip.shape[1] != d_in or skip.dtype not in TYPES or not torch.isfinite(skip).all():
            raise FeatpatchError(
                f"skip is a tensor {list(skip.shape)} of {skip.dtype}: expected finite numbers [d_out, {d_in}], which adds "
                "x @ skip.T"
            )
        matrix = skip.detach().clone()
        return lambda x: x.to(matrix) @ matrix.T
    if skip is not None and not callable(skip):
        raise FeatpatchError(
            f"skip is a {type(skip).__name__}: expected a matrix [d_out, d_in] or a function of the activation"
        )
    return skip
