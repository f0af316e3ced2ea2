"""Dictionaries that read and write several hook points: cross-layer transcoders and crosscoders.

    a_l = act(W_enc_l x_l + b_enc_l)       y_m = sum over l <= m of W_dec_lm a_l + b_dec_m       cross-layer transcoder (CLT)
    a = act(sum over l of W_enc_l x_l + b_enc)          y_m = W_dec_m a + b_dec_m                crosscoder

Both are groups of features: a group reads some of the hook points and writes to some. A CLT has a group for each layer, which
reads one hook point and writes to those of its layer and above; a crosscoder has one group that reads and writes everything.

The decoders of a CLT are far larger than the features that a prompt activates. They stay in their files (`Stored`), from which
only the rows of active features are read, so that memory grows with these and not with the dictionary.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices, check_kinds, is_integer
from featpatch.files import as_path, writing
from featpatch.model.digest import TYPES, check_finite
from featpatch.sae.matrices import Matrix, Stored, values_of, write_tensors
from featpatch.sae.weights import dtype_named
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
        name: a name for tables; if empty, the names of the hook points are used.
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
        ends = [f"{hooks[0]} to {sites.layer_of(hooks[-1])}" for hooks in dict.fromkeys((self.hook, self.hook_out))]
        return visible(f"{type(self).__name__} of {size} features, {' -> '.join(ends)}")

    def _set(self, activation: str | None, threshold: Any, k: Any, name: str, model: str | None) -> None:
        """Check and set what cross-layer transcoders and crosscoders have in common, after their groups.

        Raises:
            FeatpatchError: an argument is not valid, or a weight in memory is not finite.
        """
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


class CrossLayerTranscoder(Cross):
    """A cross-layer transcoder (CLT): the features of a layer read there, and write there and to every higher layer.

    a_l = act(W_enc_l x_l + b_enc_l), and y_m = sum over l <= m of W_dec_lm a_l + b_dec_m. Feature number k belongs to layer
    k // features per layer. Pass it wherever SAEs are expected.

    Args:
        W_enc: the encoders, `[layers, features, d_in]`, or a list with one `[features, d_in]` for each layer.
        W_dec: the decoders, a list with one `[features, layers - l, d_out]` for each layer l.
        b_enc: `[layers, features]`.
        b_dec: `[layers, d_out]`.
        hook, hook_out: the hook points that the layers read and write, one for each layer, from the lowest up.
        threshold: `[layers, features]`, for `"jumprelu"` and `"jump"`.
        activation: `"relu"`, `"jumprelu"` (0 at or below the threshold, and never negative), `"jump"` (the same, but negative
            values above a negative threshold are kept) or `"topk"` (the k largest of each layer, if positive); by default the
            one that `threshold` or `k` belongs to, else `"relu"`.
        k: the number of features of each layer that `"topk"` keeps.
        skip: the matrices `[layers, d_out, d_in]` of a skip path, which adds `x_l @ skip[l].T` to y_l.
        name: a name for tables; by default the names of the hook points.
        model: the model's name, for `save`.

    Raises:
        FeatpatchError: a shape, a hook point or an option is not valid, or a weight is not finite.

    Examples:
        >>> import torch
        >>> layers, features, d = range(model.cfg.n_layers), 8, model.cfg.d_model
        >>> clt = fp.dictionaries.CrossLayerTranscoder(
        ...     W_enc=torch.randn(4, features, d), b_enc=torch.zeros(4, features),
        ...     W_dec=[torch.randn(features, 4 - layer, d) for layer in layers], b_dec=torch.zeros(4, d),
        ...     hook=[f"blocks.{layer}.hook_resid_mid" for layer in layers],
        ...     hook_out=[f"blocks.{layer}.hook_mlp_out" for layer in layers],
        ... )
        >>> clt
        CrossLayerTranscoder of 4 x 8 features, blocks.0.hook_resid_mid to 3 -> blocks.0.hook_mlp_out to 3
    """

    def __init__(
        self,
        W_enc: torch.Tensor | Sequence[Matrix],
        W_dec: Sequence[Matrix],
        b_enc: torch.Tensor,
        b_dec: torch.Tensor,
        *,
        hook: Sequence[str],
        hook_out: Sequence[str],
        threshold: torch.Tensor | None = None,
        activation: str | None = None,
        k: int | None = None,
        skip: torch.Tensor | None = None,
        name: str = "",
        model: str | None = None,
    ) -> None:
        check_kinds(torch.Tensor, b_enc=b_enc, b_dec=b_dec)
        layers, features = b_enc.shape if b_enc.ndim == 2 else (0, 0)
        d_out = b_dec.shape[-1] if b_dec.ndim == 2 else 0
        if not layers * features * d_out:
            raise FeatpatchError(
                f"b_enc is {list(b_enc.shape)} and b_dec {list(b_dec.shape)}: expected [layers, features] and [layers, d_out], "
                "at least 1 of each"
            )
        self.hook, self.hook_out = (_hooks(way, given, layers, distinct=True)
                                    for way, given in (("hook", hook), ("hook_out", hook_out)))  # fmt: skip
        for reads, writes in zip(self.hook, self.hook_out, strict=True):
            if sites.layer_of(reads) > sites.layer_of(writes):
                raise FeatpatchError(
                    f"hook {reads!r} and hook_out {writes!r}: expected each layer to write at or above its own"
                )
        encoders, decoders = (_matrices(way, given, layers) for way, given in (("W_enc", W_enc), ("W_dec", W_dec)))
        d_in = encoders[0].shape[-1]
        for layer, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
            _check(f"W_enc[{layer}]", encoder, (features, d_in))
            _check(f"W_dec[{layer}]", decoder, (features, layers - layer, d_out))
        _check("b_dec", b_dec, (layers, d_out))
        own = encoders[0].dtype
        bias, above = (None if value is None else _check(what, value, (layers, features)).to(own)
                       for what, value in (("b_enc", b_enc), ("threshold", threshold)))  # fmt: skip
        self.skip = None if skip is None else _check("skip", skip, (layers, d_out, d_in))
        self.b_dec = b_dec.detach().flatten()
        assert bias is not None
        self.parts = tuple(
            Group(
                slice(layer * d_in, (layer + 1) * d_in), slice(layer * d_out, layers * d_out), encoders[layer], decoders[layer],
                bias[layer], None if above is None else above[layer],
            )
            for layer in range(layers)
        )  # fmt: skip
        self._set(activation, threshold, k, name, model)

    def save(self, folder: str | Path, *, dtype: str | None = None) -> None:
        """Save it as a folder of circuit-tracer, which `fp.load_sae` reads again.

        A layer at a time is in memory. circuit-tracer reads what has no threshold as ReLU, so also what is saved as `"topk"`.

        Args:
            folder: the folder, which is made if it is not there.
            dtype: the dtype of the weights in the files; by default their own.

        Raises:
            FeatpatchError: the folder can't be written, or circuit-tracer has no form for this transcoder: it has a skip path,
                or its hook points are not the same in each layer from 0 on.

        Examples:
            >>> clt = fp.load_sae(folder)  # doctest: +SKIP
            >>> clt.save("clt-half", dtype="float16")  # doctest: +SKIP
        """
        places = [{sites.within(hook) for hook in hooks} for hooks in (self.hook, self.hook_out)]
        layers = [[sites.layer_of(hook) for hook in hooks] for hooks in (self.hook, self.hook_out)]
        if self.skip is not None or any(len(each) > 1 for each in places) or layers != [list(range(len(self.hook)))] * 2:
            raise FeatpatchError(
                f"{self!r}{' with a skip path' if self.skip is not None else ''}: expected no skip path, and the same hook "
                "point in every layer from 0 on, which is all that circuit-tracer's folders can hold"
            )
        own, root = dtype_named(dtype) or self.parts[0].W_enc.dtype, as_path(folder)
        width = len(self.b_dec) // len(self.parts)
        for layer, group in enumerate(self.parts):
            bias = self.b_dec[layer * width : (layer + 1) * width]
            parts = {"W_enc": values_of(group.W_enc), "b_enc": group.b_enc, "b_dec": bias}
            if group.threshold is not None:  # there, values above a negative threshold are kept even if they are negative
                parts["threshold"] = group.threshold.clamp(min=0) if self.activation == "jumprelu" else group.threshold
            write_tensors(root / f"W_enc_{layer}.safetensors", {f"{part}_{layer}": value for part, value in parts.items()}, own)
            decoder = values_of(group.W_dec).unflatten(1, (-1, width))
            write_tensors(root / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoder}, own)
        settings = {"model_kind": "cross_layer_transcoder", "model_name": self.model, "feature_input_hook": places[0].pop(),
                    "feature_output_hook": places[1].pop(), "activation": self.activation, "k": self.k}  # fmt: skip
        with writing(root / "config.yaml") as file:
            file.write_text(
                yaml.safe_dump({name: value for name, value in settings.items() if value is not None}), encoding="utf-8"
            )


class Crosscoder(Cross):
    """A crosscoder: features that are read from several hook points together, and that write to several.

    a = act(sum over l of x_l W_enc_l + b_enc), and y_m = a W_dec_m + b_dec_m. Pass it wherever SAEs are expected.

    In some crosscoders a feature can be on at one hook point and off at another, because its pre-activation is compared after
    a factor that differs between them. Each of these values is a feature of its own: with a `threshold` or `scale` `[outputs,
    features]`, number k writes only to the hook point k // features.

    Args:
        W_enc: the encoders, `[inputs, d_in, features]`.
        W_dec: the decoders, `[outputs, features, d_out]`.
        b_enc: `[features]`.
        b_dec: `[outputs, d_out]`.
        hook: the hook points that it reads, from the lowest layer up.
        hook_out: the hook points that it writes; by default the same.
        threshold: `[features]` or `[outputs, features]`, for `"jumprelu"` and `"jump"`.
        activation, k: as in `CrossLayerTranscoder`; `"topk"` keeps k of all features.
        scale: a factor on pre-activations when they are compared with the threshold or with each other, `[features]` or
            `[outputs, features]`, such as the norms of the decoder.
        name: a name for tables; by default the names of the hook points.
        model: the model's name, for `save`.

    Raises:
        FeatpatchError: a shape, a hook point or an option is not valid, or a weight is not finite.

    Examples:
        >>> import torch
        >>> hooks, d = [f"blocks.{layer}.hook_resid_post" for layer in range(3)], model.cfg.d_model
        >>> crosscoder = fp.dictionaries.Crosscoder(
        ...     W_enc=torch.randn(3, d, 8), b_enc=torch.zeros(8),
        ...     W_dec=torch.randn(3, 8, d), b_dec=torch.zeros(3, d), hook=hooks,
        ... )
        >>> crosscoder
        Crosscoder of 8 features, blocks.0.hook_resid_post to 2
    """

    def __init__(
        self,
        W_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor,
        *,
        hook: Sequence[str],
        hook_out: Sequence[str] | None = None,
        threshold: torch.Tensor | None = None,
        activation: str | None = None,
        k: int | None = None,
        scale: torch.Tensor | None = None,
        name: str = "",
        model: str | None = None,
    ) -> None:
        check_kinds(torch.Tensor, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec)
        inputs, d_in, features = W_enc.shape if W_enc.ndim == 3 else (0, 0, 0)
        outputs, d_out = b_dec.shape if b_dec.ndim == 2 else (0, 0)
        if not inputs * d_in * features * outputs * d_out:
            raise FeatpatchError(
                f"W_enc is {list(W_enc.shape)} and b_dec {list(b_dec.shape)}: expected [inputs, d_in, features] and [outputs, "
                "d_out], at least 1 of each"
            )
        self.hook = _hooks("hook", hook, inputs, distinct=False)
        self.hook_out = _hooks("hook_out", hook if hook_out is None else hook_out, outputs, distinct=False)
        encoder = _check("W_enc", W_enc, (inputs, d_in, features)).flatten(0, 1).T
        decoder = _check("W_dec", W_dec, (outputs, features, d_out)).transpose(0, 1)
        bias = _check("b_enc", b_enc, (features,)).to(encoder.dtype)
        self.b_dec = _check("b_dec", b_dec, (outputs, d_out)).flatten()
        several = any(value is not None and value.ndim == 2 for value in (threshold, scale))
        above, factor = (_by_output(what, value, outputs, features, several, encoder.dtype)
                         for what, value in (("threshold", threshold), ("scale", scale)))  # fmt: skip
        writes = [slice(m * d_out, (m + 1) * d_out) for m in range(outputs)] if several else [slice(0, outputs * d_out)]
        self.parts = tuple(
            Group(
                slice(0, inputs * d_in), place, encoder, decoder[:, m] if several else decoder, bias,
                None if above is None else above[m], None if factor is None else factor[m],
            )
            for m, place in enumerate(writes)
        )  # fmt: skip
        self._set(activation, threshold, k, name, model)


def _hooks(way: str, given: Any, count: int, *, distinct: bool) -> tuple[str, ...]:
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


def _matrices(way: str, given: Any, layers: int) -> list[Matrix]:
    """Return matrices by layer as a list.

    Raises:
        FeatpatchError: they are not one for each layer.
    """
    listed = list(given) if isinstance(given, (list, tuple, torch.Tensor, torch.nn.ParameterList)) else []
    if len(listed) != layers or not all(isinstance(each, (torch.Tensor, Stored)) and len(each.shape) >= 2 for each in listed):
        found = f"{len(listed)} of them" if listed else f"a {type(given).__name__}"
        raise FeatpatchError(f"{way} is {found}: expected one matrix for each of the {layers} layers")
    return [each.detach() if isinstance(each, torch.Tensor) else each for each in listed]


def _check(what: str, tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor without its gradient, after checking it.

    Raises:
        FeatpatchError: it has another shape, or is of no floating-point dtype.
    """
    if not isinstance(tensor, (torch.Tensor, Stored)) or tuple(tensor.shape) != shape or tensor.dtype not in TYPES:
        found = f"{list(tensor.shape)} of {tensor.dtype}" if hasattr(tensor, "shape") else f"a {type(tensor).__name__}"
        raise FeatpatchError(
            f"{what} is {found}: expected a tensor {list(shape)} of one of {', '.join(map(str, TYPES))}; the shapes of all "
            "weights have to agree"
        )
    return tensor.detach() if isinstance(tensor, torch.Tensor) else tensor


def _by_output(
    what: str, value: torch.Tensor | None, outputs: int, features: int, several: bool, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return values by feature as `[groups, features]`."""
    if value is None:
        return None
    check_kinds(torch.Tensor, **{what: value})
    checked: torch.Tensor = _check(what, value, (outputs, features) if value.ndim == 2 else (features,)).to(dtype)
    return checked if checked.ndim == 2 else checked.expand(outputs if several else 1, features)
