"""Dictionaries that read and write several hook points: cross-layer transcoders and crosscoders.

    a_l = act(W_enc_l x_l + b_enc_l)       y_m = sum over l <= m of W_dec_lm a_l + b_dec_m       cross-layer transcoder (CLT)
    a = act(sum over l of W_enc_l x_l + b_enc)          y_m = W_dec_m a + b_dec_m                crosscoder

Both are groups of features: a group reads some of the hook points and writes to some. A CLT has a group for each layer, which
reads one hook point and writes to those of its layer and above; a crosscoder has one group that reads and writes everything.

The decoders of a CLT are far larger than the features that a prompt activates. They stay in their files (`Stored`), from which
only the rows of active features are read, so that memory grows with these and not with the dictionary.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices, check_kinds, is_integer
from featpatch.model.facts import TYPES, check_finite
from featpatch.sae.matrices import Matrix, Stored
from featpatch.untrusted import visible


@dataclass(frozen=True)
class Group:
    """Features that read the same hook points and write to the same.

    Attributes:
        reads, writes: where these hook points lie among all that the dictionary reads or writes, side by side.
        W_enc, W_dec: the encoder `[n, ...]` and the decoder `[n, ...]`, whose rows are as wide as `reads` and `writes`.
        b_enc: the bias of the encoder, `[n]`.
        threshold: the threshold of each feature `[n]`, for the activations "jumprelu" and "jump".
        scale: the factor `[n]` on pre-activations when they are compared with the threshold or with each other; None is 1.
    """

    reads: slice
    writes: slice
    W_enc: Matrix
    W_dec: Matrix
    b_enc: torch.Tensor
    threshold: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class Cross:
    """A dictionary over several hook points; see `CrossLayerTranscoder` and `Crosscoder`.

    Attributes:
        hook, hook_out: the names of the hook points that it reads and writes, from the lowest layer up.
        parts: its groups of features.
        b_dec: the biases of all outputs side by side.
        activation: a key of `ACTIVATIONS`.
        k: the number of features of a group that "topk" keeps.
        skip: the matrices `[hook points, d_out, d_in]` of a skip path, which adds `x @ skip.T` at each hook point; or None.
        name: the name in tables; if empty, those of the lowest hook points.
        model: the model's name, if known.
    """

    hook: tuple[str, ...]
    hook_out: tuple[str, ...]
    parts: tuple[Group, ...]
    b_dec: torch.Tensor
    activation: str
    k: int | None = None
    skip: torch.Tensor | None = None
    name: str = ""
    model: str | None = None

    @property
    def groups(self) -> int:
        """The number of groups of features, see `Codec.groups`."""
        return len(self.parts)

    def to(self, dtype: torch.dtype | None, device: str) -> Any:
        """Return the same dictionary on another device and in another dtype; None keeps its own dtype."""
        own, known = dtype or self.parts[0].W_enc.dtype, {}

        def converted(value: Any) -> Any:
            if value is not None and id(value) not in known:  # groups can share an encoder
                known[id(value)] = value.to(dtype=own, device=device)
            return known.get(id(value))

        made, names = copy(self), ("W_enc", "W_dec", "b_enc", "threshold", "scale")
        made.parts = tuple(replace(part, **{name: converted(getattr(part, name)) for name in names}) for part in self.parts)
        made.b_dec, made.skip = converted(self.b_dec), converted(self.skip)
        return made

    def __repr__(self) -> str:
        features = len(self.parts[0].b_enc)
        size = f"{len(self.parts)} x {features}" if len(self.parts) > 1 else str(features)
        ends = [
            f"{hooks[0]} to {sites.layer_of(hooks[-1])}" if len(hooks) > 1 else hooks[0]
            for hooks in dict.fromkeys((self.hook, self.hook_out))
        ]
        return visible(f"{type(self).__name__} of {size} features, {' -> '.join(ends)}")

    def _settle(self, activation: str | None, threshold: Any, k: Any, name: str, model: str | None) -> None:
        """Set what CLTs and crosscoders have in common; raise a FeatpatchError unless it is valid and weights are finite."""
        check_kinds(str, name=name)
        if activation is None:
            activation = "topk" if k is not None else "relu" if threshold is None else "jumprelu"
        check_choices(("relu", "jumprelu", "jump", "topk"), activation=activation)
        size = len(self.parts[0].b_enc)
        if (activation == "topk") != (k is not None) or not (k is None or (is_integer(k) and 1 <= k <= size)):
            raise FeatpatchError(f"activation={activation!r}, k={k!r}: expected k from 1 to {size} with 'topk', and only there")
        if (activation in ("jumprelu", "jump")) != (threshold is not None):
            raise FeatpatchError(
                f"activation={activation!r} {'without' if threshold is None else 'with'} threshold: expected a threshold for "
                "'jumprelu' and 'jump', and only for these"
            )
        self.activation, self.k, self.name, self.model = activation, None if k is None else int(k), name, model
        held: dict[str, Any] = {"b_dec": self.b_dec, "skip": self.skip}
        for number, group in enumerate(self.parts):
            held |= {f"{part}[{number}]": getattr(group, part) for part in ("W_enc", "W_dec", "b_enc", "threshold", "scale")}
        check_finite(f"the {type(self).__name__}", held)


def hooks_of(way: str, given: Any, count: int, *, distinct: bool) -> tuple[str, ...]:
    """Return the names of hook points as a tuple, after checking them.

    Raises:
        FeatpatchError: they are not as many names as expected, each once and in the order of their layers.
    """
    listed = list(given) if isinstance(given, (list, tuple)) else []
    if len(listed) != count or not all(isinstance(name, str) and name for name in listed):
        raise FeatpatchError(
            f"{way}={given!r}: expected a list of {count} names of hook points, such as {sites.resid_post(0)!r}, from the "
            "lowest layer up"
        )
    layers = [sites.layer_of(name) for name in listed]
    if len(set(listed)) < count or layers != sorted(layers) or (distinct and len(set(layers)) < count):
        raise FeatpatchError(
            f"{way}={listed}: expected different hook points{', one for each layer,' if distinct else ''} from the lowest "
            "layer up, in the order of the weights"
        )
    return tuple(listed)


def checked(what: str, tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor without its gradient; raise a FeatpatchError unless it has this shape and a floating-point dtype."""
    if not isinstance(tensor, (torch.Tensor, Stored)) or tuple(tensor.shape) != shape or tensor.dtype not in TYPES:
        found = f"{list(tensor.shape)} of {tensor.dtype}" if hasattr(tensor, "shape") else f"a {type(tensor).__name__}"
        raise FeatpatchError(
            f"{what} is {found}: expected a tensor {list(shape)} of one of {', '.join(map(str, TYPES))}; the shapes of all "
            "weights have to agree"
        )
    return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor
