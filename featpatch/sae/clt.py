"""Cross-layer transcoders (CLTs)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from featpatch import sites
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.files import as_path, writing
from featpatch.model.facts import dtype_named
from featpatch.sae.cross import Cross, Group, checked, hooks_of
from featpatch.sae.matrices import Matrix, Stored, values_of, write_tensors


class CrossLayerTranscoder(Cross):
    """A cross-layer transcoder (CLT): the features of a layer read there, and write there and to every higher layer.

    a_l = act(W_enc_l x_l + b_enc_l), and y_m = sum over l <= m of W_dec_lm a_l + b_dec_m. Feature number k belongs to layer
    k // features per layer. Pass it as SAEs, except to functions of one hook point, such as `fp.do`.

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
        name: the name in tables.
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
        name: str = "clt",
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
        self.hook, self.hook_out = (hooks_of(way, given, layers, distinct=True)
                                    for way, given in (("hook", hook), ("hook_out", hook_out)))  # fmt: skip
        for reads, writes in zip(self.hook, self.hook_out, strict=True):
            if sites.layer_of(reads) > sites.layer_of(writes):
                raise FeatpatchError(
                    f"hook {reads!r} and hook_out {writes!r}: expected each layer to write at or above its own"
                )
        encoders, decoders = (_matrices(way, given, layers) for way, given in (("W_enc", W_enc), ("W_dec", W_dec)))
        d_in = encoders[0].shape[-1]
        for layer, (encoder, decoder) in enumerate(zip(encoders, decoders, strict=True)):
            checked(f"W_enc[{layer}]", encoder, (features, d_in))
            checked(f"W_dec[{layer}]", decoder, (features, layers - layer, d_out))
        checked("b_dec", b_dec, (layers, d_out))
        own = encoders[0].dtype
        bias, above = (None if value is None else checked(what, value, (layers, features)).to(own)
                       for what, value in (("b_enc", b_enc), ("threshold", threshold)))  # fmt: skip
        self.skip = None if skip is None else checked("skip", skip, (layers, d_out, d_in))
        self.b_dec = b_dec.detach().flatten()
        assert bias is not None
        self.parts = tuple(
            Group(
                slice(layer * d_in, (layer + 1) * d_in), slice(layer * d_out, layers * d_out), encoders[layer], decoders[layer],
                bias[layer], None if above is None else above[layer],
            )
            for layer in range(layers)
        )  # fmt: skip
        self._settle(activation, threshold, k, name, model)

    def save(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Save it as a folder of circuit-tracer, which `fp.load_sae` reads again.

        A layer at a time is in memory. circuit-tracer reads what has no threshold as ReLU, so also what is saved as `"topk"`.

        Args:
            folder: the folder, which is made if it is not there.
            dtype: the dtype of the weights in the files; by default their own.

        Raises:
            FeatpatchError: the folder can't be written, or circuit-tracer has no form for this transcoder: it has a skip path,
                or its hook points are not the same in each layer from 0 on.

        Examples:
            >>> import torch
            >>> hooks, outs = (
            ...     [f"blocks.{layer}.{name}" for layer in range(2)] for name in ("hook_resid_mid", "hook_mlp_out")
            ... )
            >>> encoders, decoders = torch.randn(2, 8, 64), [torch.randn(8, 2, 64), torch.randn(8, 1, 64)]
            >>> clt = fp.dictionaries.CrossLayerTranscoder(
            ...     encoders, decoders, torch.zeros(2, 8), torch.zeros(2, 64), hook=hooks, hook_out=outs
            ... )
            >>> clt.save(folder / "clt", dtype="float16")
            >>> fp.load_sae(folder / "clt")
            CrossLayerTranscoder of 2 x 8 features, blocks.0.hook_resid_mid to 1 -> blocks.0.hook_mlp_out to 1
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


def _matrices(way: str, given: Any, layers: int) -> list[Matrix]:
    """Return matrices by layer as a list; raise a FeatpatchError unless there is one for each layer."""
    listed = list(given) if isinstance(given, (list, tuple, torch.Tensor, torch.nn.ParameterList)) else []
    if len(listed) != layers or not all(isinstance(each, (torch.Tensor, Stored)) and len(each.shape) >= 2 for each in listed):
        found = f"{len(listed)} of them" if listed else f"a {type(given).__name__}"
        raise FeatpatchError(f"{way} is {found}: expected one matrix for each of the {layers} layers")
    return [each.detach() if isinstance(each, torch.Tensor) else each for each in listed]
