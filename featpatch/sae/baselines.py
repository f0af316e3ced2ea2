"""Dictionaries that need no training, as baselines for SAEs: coordinates, MLP neurons and principal components."""

import hashlib
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.model.transformer_lens import wrap
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.sae.adapted import Adapted


class _Affine(torch.nn.Module):
    """An affine encoder and decoder: `encode(x) = (x - mean) @ into`, `decode(f) = f @ out + bias`."""

    mean: torch.Tensor
    into: torch.Tensor | None
    out: torch.Tensor | None
    bias: torch.Tensor

    def __init__(self, mean: torch.Tensor, into: torch.Tensor | None, out: torch.Tensor | None, bias: torch.Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("into", into), ("out", out), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().clone())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.mean if self.into is None else (x - self.mean) @ self.into

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.bias if self.out is None else features @ self.out + self.bias


def identity(model: Any, hook: str) -> Adapted:
    """Make a dictionary in which every coordinate of the activation at a hook point is a feature; its error is 0.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        hook: the hook point, such as `"blocks.1.hook_resid_pre"`.

    Raises:
        FeatpatchError: the model has no such hook point.

    Examples:
        >>> coordinates = fp.dictionaries.identity(model, "blocks.1.hook_resid_pre")
        >>> ranked = fp.rank_features(model, coordinates, pairs, positions=["S2"], progress=False)
        >>> len(ranked.where(kind="feature")) == model.cfg.d_model
        True
    """
    x = _activations(model, hook, torch.zeros(1, 1, dtype=torch.long))
    zero = x.new_zeros(x.shape[1])
    return Adapted(_Affine(zero, None, None, zero), hook, hook, len(zero), f"coordinates of {hook}", linear=True)


def neurons(model: Any, layer: int) -> Adapted:
    """Make a dictionary of an MLP's neurons, read after the nonlinearity and written at `hook_mlp_out` through `W_out`.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        layer: the index of the layer.

    Raises:
        FeatpatchError: the layer has no MLP, or one whose output is not `neurons @ W_out + b_out` (experts, a norm after it),
            or whose weights are quantised.

    Examples:
        >>> neurons = fp.dictionaries.neurons(model, layer=1)
        >>> ranked = fp.rank_features(model, neurons, pairs, positions=["S2"], progress=False)
        >>> len(ranked.where(kind="feature")) == model.cfg.d_mlp
        True
    """
    check_numbers(0, layer=layer)
    reads, writes = sites.component(layer, "neurons"), sites.component(layer, "mlp_out")
    tokens = torch.zeros(1, 1, dtype=torch.long)
    x, y = _activations(model, reads, tokens), _activations(model, writes, tokens)
    mlp = model.blocks[layer].mlp
    try:
        weight, bias = mlp.W_out, mlp.b_out
        coder = _Affine(x.new_zeros(x.shape[1]), None, weight, y.new_zeros(y.shape[1]) if bias is None else bias)
        exact = torch.allclose(coder.decode(x), y, rtol=1e-2, atol=1e-2 * float(y.abs().max()))
    except NotImplementedError as error:
        raise FeatpatchError(
            f"the MLP of layer {layer} has quantised weights, which can be run but not read: expected plain weights; use "
            f"fp.dictionaries.identity(model, {reads!r}), which gives the same neurons but is slower"
        ) from error
    except (AttributeError, RuntimeError):
        exact = False
    if not exact:
        raise FeatpatchError(
            f"the MLP of layer {layer} does not write neurons @ W_out + b_out at {writes!r}: expected a plain MLP; use "
            f"fp.dictionaries.identity(model, {reads!r}), which gives the same neurons but is slower"
        )
    return Adapted(coder, reads, writes, x.shape[1], f"neurons of layer {layer}", linear=True)


def pca(model: Any, hook: str, pairs: Pairs, *, components: int | None = None) -> Adapted:
    """Make a dictionary of principal components of the activations at a hook point.

    They are computed over all prompts of the pairs, without special tokens.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        hook: the hook point, such as `"blocks.1.hook_resid_pre"`.
        pairs: the pairs whose clean and corrupted prompts are used.
        components: how many components to keep, largest variance first; all by default. The remaining ones make up the error.

    Raises:
        FeatpatchError: the model has no such hook point, or it has fewer coordinates than the components asked for.

    Examples:
        >>> principal = fp.dictionaries.pca(model, "blocks.1.hook_resid_pre", pairs, components=10)
        >>> ranked = fp.rank_features(model, principal, pairs, positions=["S2"], progress=False)
        >>> len(ranked.where(kind="feature"))
        10
    """
    rows = []
    check_numbers(1, components=1 if components is None else components)
    for pair in check_pairs(pairs):
        kept = pair.positions("all")
        rows += [_activations(model, hook, torch.tensor([tokens]))[kept] for tokens in (pair.clean, pair.corrupted)]
    x = torch.cat(rows)
    wide = x.double()
    mean = wide.mean(0)
    _, directions = torch.linalg.eigh((wide - mean).T @ (wide - mean))
    count = len(mean) if components is None else components
    if count > len(mean):
        raise FeatpatchError(f"components={components}: expected 1 to {len(mean)}, the width of {hook!r}")
    into = directions.flip(1)[:, :count].to(x)
    coder = _Affine(mean.to(x), into, into.T, mean.to(x))
    return Adapted(coder, hook, hook, len(mean), f"principal components of {hook}", linear=True)


def direction(vector: Any, hook: str, *, name: str = "") -> Adapted:
    """Make a dictionary of a single direction d at a hook point, such as a probe or a steering vector.

    Its only feature is `f = x . d`, with d scaled to length 1; the rest of the activation is the error. It can be passed
    wherever SAEs are expected, and its node is `fp.feature(direction, 0)`.

    Args:
        vector: the direction, as wide as the activation; with the heads of `hook_z` side by side.
        hook: the hook point.
        name: a name for tables; by default one that differs between directions.

    Raises:
        FeatpatchError: the vector is not one-dimensional, or not finite, or 0.

    Examples:
        >>> towards = model.W_U[:, pairs[0].correct[0]] - model.W_U[:, pairs[0].wrong[0]]
        >>> answer = fp.direction(towards, "blocks.3.hook_resid_post", name="answer")
        >>> node = fp.feature(answer, 0, "end")
        >>> alone = fp.rank_nodes(model, pairs, [node], saes=answer, together=False, progress=False)
        >>> bool(alone.pooled("recovery")[0] > 0.5)
        True
    """
    check_kinds(str, hook=hook, name=name)
    try:
        d = torch.as_tensor(vector).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FeatpatchError(f"vector is a {type(vector).__name__}: expected a tensor [d] of numbers") from error
    d = d.to(torch.promote_types(d.dtype, torch.float32)) if not d.is_complex() else d
    if d.ndim != 1 or d.is_complex() or not torch.isfinite(d).all() or not d.any():
        raise FeatpatchError(
            f"vector is a tensor {list(d.shape)} of {d.dtype}: expected finite numbers [d], one for each coordinate of the "
            "activation, not all of them 0"
        )
    d = d / torch.linalg.vector_norm(d)
    zero = torch.zeros_like(d)
    known = hashlib.sha256(d.double().cpu().numpy().tobytes()).hexdigest()[:6]
    return Adapted(
        _Affine(zero, d[:, None], d[None], zero), hook, hook, len(d), name or f"direction {known} of {hook}", linear=True
    )


def _activations(model: Any, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the activations `[pos, d]` of one prompt at a hook point."""
    lens = wrap(model)
    return lens.read(tokens, [lens.site(hook)])[lens.site(hook)].flatten(2)[0]
