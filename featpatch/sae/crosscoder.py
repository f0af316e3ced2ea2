"""Crosscoders."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType

import torch

from featpatch.errors import FeatpatchError, check_kinds
from featpatch.files import as_path, writing
from featpatch.model.facts import dtype_named
from featpatch.sae.cross import Cross, Group, checked, hooks_of
from featpatch.sae.matrices import values_of, write_tensors


class Crosscoder(Cross):
    """A crosscoder: features that are read from several hook points together, and that write to several.

    a = act(sum over l of x_l W_enc_l + b_enc), and y_m = a W_dec_m + b_dec_m. Pass it as SAEs, except to `fp.do` and the like.

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
        name: the name in tables.
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
        name: str = "crosscoder",
        model: str | None = None,
    ) -> None:
        check_kinds(torch.Tensor, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec)
        check_kinds((torch.Tensor, NoneType), threshold=threshold, scale=scale)
        inputs, d_in, features = W_enc.shape if W_enc.ndim == 3 else (0, 0, 0)
        outputs, d_out = b_dec.shape if b_dec.ndim == 2 else (0, 0)
        if not inputs * d_in * features * outputs * d_out:
            raise FeatpatchError(
                f"W_enc is {list(W_enc.shape)} and b_dec {list(b_dec.shape)}: expected [inputs, d_in, features] and [outputs, "
                "d_out], at least 1 of each"
            )
        self.hook = hooks_of("hook", hook, inputs, distinct=False)
        self.hook_out = hooks_of("hook_out", hook if hook_out is None else hook_out, outputs, distinct=False)
        encoder = checked("W_enc", W_enc, (inputs, d_in, features)).flatten(0, 1).T
        decoder = checked("W_dec", W_dec, (outputs, features, d_out)).transpose(0, 1)
        bias = checked("b_enc", b_enc, (features,)).to(encoder.dtype)
        self.b_dec = checked("b_dec", b_dec, (outputs, d_out)).flatten()
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
        self._settle(activation, threshold, k, name, model)

    def save(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Save it as `crosscoder.safetensors` and `crosscoder.json`, which `fp.load_sae` reads again.

        Args:
            folder: the folder, which is made if it is not there.
            dtype: the dtype of the weights in the file; by default their own.

        Raises:
            FeatpatchError: the folder can't be written, or a weight is too large for the dtype.

        Examples:
            >>> import torch
            >>> hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
            >>> crosscoder = fp.dictionaries.Crosscoder(
            ...     torch.randn(2, 64, 8), torch.randn(2, 8, 64), torch.zeros(8), torch.zeros(2, 64), hook=hooks
            ... )
            >>> crosscoder.save(folder / "crosscoder", dtype="float16")
            >>> fp.load_sae(folder / "crosscoder")
            Crosscoder of 8 features, blocks.0.hook_resid_post to 1
        """
        first, root = self.parts[0], as_path(folder)
        decoders = [values_of(part.W_dec) for part in self.parts]
        tensors = {
            "W_enc": values_of(first.W_enc).T.unflatten(0, (len(self.hook), -1)),
            "W_dec": torch.cat(decoders, dim=1).unflatten(1, (len(self.hook_out), -1)).transpose(0, 1),
            "b_enc": first.b_enc,
            "b_dec": self.b_dec.unflatten(0, (len(self.hook_out), -1)),
        }
        for name in ("threshold", "scale"):
            if getattr(first, name) is not None:
                values = torch.stack([getattr(part, name) for part in self.parts])
                tensors[name] = values if self.groups > 1 else values[0]
        settings = {name: getattr(self, name) for name in ("hook", "hook_out", "activation", "k", "name", "model")}
        write_tensors(root / "crosscoder.safetensors", tensors, dtype_named(dtype) or first.W_enc.dtype)
        with writing(root / "crosscoder.json") as file:
            file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _by_output(
    what: str, value: torch.Tensor | None, outputs: int, features: int, several: bool, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return values by feature as `[groups, features]`."""
    if value is None:
        return None
    values: torch.Tensor = checked(what, value, (outputs, features) if value.ndim == 2 else (features,)).to(dtype)
    return values if values.ndim == 2 else values.expand(outputs if several else 1, features)
