"""Adapt any object with `encode` and `decode` as a dictionary at a hook point."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.facts import TYPES, digest
from featpatch.sae import cross_formats
from featpatch.sae.codec import Code, Codec, State
from featpatch.sae.cross import Cross
from featpatch.sae.formats import of_object
from featpatch.sae.weights import Coder, Weights
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
        kind = type(self.coder).__name__
        kind = "dictionary" if kind.startswith("_") else kind  # that of a baseline or a direction
        return visible(f"{kind} at {named}, width {self.d_in}{', with a skip path' if self.skip else ''}")


def adapt(
    coder: Any,
    hook: str | Sequence[str] | None = None,
    *,
    d_in: int | None = None,
    hook_out: str | Sequence[str] | None = None,
    name: str = "",
    linear: bool = False,
    skip: Any = None,
) -> Adapted | SAE[Any] | Cross:
    """Wrap an object of your own as a dictionary that can be passed wherever SAEs are expected.

    For an SAE or transcoder of dictionary_learning, sparsify or circuit-tracer, only the hook point (and `hook_out`) is needed:
    its weights are copied into a sae-lens object that computes the same, if there is one. A cross-layer transcoder (CLT) of
    circuit-tracer needs no hook point, and a crosscoder of dictionary_learning a list of them; both share their weights.

    Args:
        coder: an object (a `torch.nn.Module` or not) with `encode(x)`, from activations `[batch, pos, d_in]` (heads of
            `hook_z` side by side) to features `[batch, pos, d_sae]`, and `decode(features)` to `[batch, pos, d_out]`.
            `decode` may be nonlinear, but receives only the features, not the activation (see `skip`); `encode` may
            look at earlier positions.
        hook: the hook point that it reads; for a CLT or a crosscoder, a list from the lowest layer up.
        d_in: width of the activation there; known for objects of the libraries named above. An object of a subclass is adapted
            through its `encode` and `decode`, and needs `d_in`.
        hook_out: the hook point that it writes, for a transcoder; or a list.
        name: a name for tables; by default the name of the hook point.
        linear: whether `decode` is a fixed linear map plus a constant, as in nearly every SAE. If so, the direction that a
            feature adds is computed once; otherwise every patch is decoded, which is correct for any decoder but slower.
        skip: the skip path of a transcoder, a matrix `[d_out, d_in]` or a function from `[batch, pos, d_in]` to
            `[batch, pos, d_out]`, position by position: the error is x_out - decode(f) - skip(x).

    Returns:
        A sae-lens object if sae-lens has a class that computes the same; a `CrossLayerTranscoder` or a `Crosscoder` of
        `fp.dictionaries`; otherwise an `Adapted`.

    Raises:
        FeatpatchError: the object has no `encode` or no `decode`, is a class or a sae-lens object, or a hook point, the width
            or the skip path is not valid.

    Examples:
        >>> import torch
        >>> class Halves:  # two features for each coordinate: its positive and its negative part
        ...     def encode(self, x):
        ...         return torch.cat([x.relu(), (-x).relu()], dim=-1)
        ...     def decode(self, features):
        ...         positive, negative = features.chunk(2, dim=-1)
        ...         return positive - negative
        >>> halves = fp.dictionaries.adapt(Halves(), "blocks.1.hook_resid_pre", d_in=model.cfg.d_model)
        >>> ranked = fp.rank_features(model, halves, pairs, positions=["S2"], progress=False)
        >>> ranked.where(kind="all_features").pooled("recovery").round(1).tolist()
        [1.0]
    """
    if isinstance(coder, type):
        raise FeatpatchError(f"{coder.__name__} is a class: expected an instance of it")
    if isinstance(coder, SAE):
        raise FeatpatchError(
            f"{type(coder).__name__} is a sae-lens object: expected an object of another library; pass this one without "
            "adapt, and set cfg.metadata.hook_name (and hook_name_out) to use it at another hook point"
        )
    if isinstance(coder, (Adapted, Cross)):
        raise FeatpatchError(
            f"{type(coder).__name__} is a dictionary already: expected an object of another library; pass it without adapt"
        )
    if (across := cross_formats.of_object(coder, (hook, hook_out), name)) is not None:
        return across
    weights = of_object(coder)
    own_width = None if weights is None else int(weights.tensors["W_enc"].shape[0])
    valid = own_width is not None if d_in is None else type(d_in) is int and d_in >= 1
    if not isinstance(hook, str) or not isinstance(hook_out, str | None) or "" in (hook, hook_out) or not valid:
        raise FeatpatchError(
            f"hook={hook!r}, hook_out={hook_out!r}, d_in={d_in!r}: expected names of hook points and a width of 1 or more; "
            "d_in may be left out only for the classes of dictionary_learning, sparsify and circuit-tracer"
        )
    if weights is not None:
        if d_in not in (None, own_width) or skip is not None:
            raise FeatpatchError(
                f"{weights.origin} reads {own_width} values and {'has its own' if 'W_skip' in weights.tensors else 'no'} skip "
                f"path: expected the same d_in (not {d_in!r}) and no skip=; leave them out"
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
                f"{self.kind} encodes to {self.d_sae} features and decodes to {self.d_out} values: expected at least 1 of each"
            )
        width = self.d_out if self.skip is None else self._call("skip", torch.zeros(1, 1, self.d_in)).shape[2]
        if width != self.d_out:
            raise FeatpatchError(
                f"the skip path of {self.kind} returns {width} values and decode returns {self.d_out}: expected equal "
                f"numbers; pass a matrix [{self.d_out}, {self.d_in}], or a function that returns as many values as decode"
            )

    @staticmethod
    def hooks(source: Any) -> tuple[str, str] | None:
        """Return the hook points that were passed to `adapt`; None for any other object."""
        return (source.hook, source.hook_out) if isinstance(source, Adapted) else None

    def encode(self, x: torch.Tensor) -> Code:
        """Return the features and, if there is a skip path, its value as the state."""
        return Code(self._call("encode", x), {} if self.skip is None else {"skip": self._call("skip", x)})

    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """Return the object's own reconstruction plus the skip path."""
        decoded = self._call("decode", features)
        return decoded + state["skip"] if "skip" in state else decoded

    def encoders(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the encoder's vectors and biases, see `Codec.encoders`, if its weights are in featpatch's own layout."""
        coder = self.coder
        if not isinstance(coder, Coder):
            return None
        at = features.to(coder.W_enc.device)
        rows, biases = coder.W_enc[:, at].T.to(coder.W_dec), coder.b_enc[at].to(coder.W_dec)
        return rows, biases - rows @ coder.b_dec if coder.centred else biases

    def pull_skip(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient through the skip path, if its weights are in featpatch's own layout."""
        if self.skip is None or not isinstance(self.coder, Coder):
            return None
        return gradient @ self.coder.W_skip.to(gradient)

    def digest(self) -> str:
        """Return a digest of the weights, if any, and of results on random activations, which also depend on the settings."""
        weights = digest(self.coder) if isinstance(self.coder, torch.nn.Module) else ""
        x = torch.randn(1, PROBES, self.d_in, generator=torch.Generator().manual_seed(0))
        code = self.encode(x)
        made = torch.cat([code.features.flatten(), self.decode(code.features, code.state).flatten()]).double().cpu()
        return hashlib.sha256(f"{self.kind} {weights}".encode() + made.numpy().tobytes()).hexdigest()

    def _call(self, verb: str, x: torch.Tensor) -> torch.Tensor:
        """Call a method on a copy, because it may work in place, and return a dense floating-point result."""
        given = x.to(device=self._like.device, dtype=self._like.dtype, copy=True)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
                made = (self.skip if verb == "skip" and self.skip else getattr(self.coder, verb))(given)
        except Exception as error:
            raise FeatpatchError(
                f"{self.kind}.{verb} fails on a tensor {list(x.shape)} of {given.dtype} ({type(error).__name__}: {error}): "
                f"expected an object that accepts activations of width {self.d_in}"
            ) from error
        if not isinstance(made, torch.Tensor) or made.ndim != 3 or made.shape[:2] != x.shape[:2]:
            found = list(made.shape) if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
            raise FeatpatchError(
                f"{self.kind}.{verb} returns {found} for a tensor {list(x.shape)}: expected a tensor [{x.shape[0]}, "
                f"{x.shape[1]}, n], one row per position"
            )
        dense = made.to_dense() if made.is_sparse else made
        return dense if dense.is_floating_point() else dense.to(given.dtype)
