"""Convert a TransformerLens model to row-wise functions, and determine how its weights were processed.

Both model classes use the same names for weights. The processing steps are determined by measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.model.layer import ACTIVATIONS, Head, Layer, Linear, Mlp, Norm, Rotation, Stack, UnsupportedError
from featpatch.model.lens import Lens


@dataclass(frozen=True)
class Attention:
    """Attention settings that TransformerBridge and HookedTransformer keep in different places.

    Attributes:
        scale: the factor on the attention scores.
        softcap: the soft-cap of the scores; None or 0 for none.
        window: how many positions back a query sees; None for all.
        rotation: the rotary position embedding; None if positions are not rotary.
    """

    scale: float
    softcap: float | None
    window: int | None
    rotation: Rotation | None


def build(model: Any, attentions: list[Attention]) -> Stack:
    """Return a model as row-wise functions.

    Args:
        attentions: the attention settings of each layer.

    Raises:
        UnsupportedError: a layer does not have the form described in `layer`.
    """
    cfg = model.cfg
    if cfg.positional_embedding_type not in ("standard", "rotary"):
        raise UnsupportedError(f"position embeddings of type {cfg.positional_embedding_type!r}")
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise UnsupportedError("bidirectional attention")
    layers = [_layer(block, cfg, attention) for block, attention in zip(model.blocks, attentions, strict=True)]
    return Stack(tuple(layers), _head(model))


def head_of(lens: Lens) -> Head:
    """Return the map from the final residual stream to logits; unlike the layers, every model has one of this form."""
    return _head(lens.model)


def _head(model: Any) -> Head:
    cfg, bias = model.cfg, getattr(model.unembed, "b_U", None)
    return Head(norm_of(getattr(model, "ln_final", None), cfg), model.unembed.W_U, bias, _positive(cfg.output_logits_soft_cap))


@dataclass(frozen=True)
class AttentionOutput:
    """The way in which a layer adds its heads to the residual stream: `norm(sum of z W_O + b_O)`, or the same without a norm.

    Attributes:
        weight: W_O, `[heads, d_head, d_model]`.
        bias: b_O.
        norm: the norm after attention.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm | None

    def in_front(self, z: Float[torch.Tensor, "rows heads d_head"]) -> Float[torch.Tensor, "rows d_model"]:
        """Return what goes into the norm, in the dtype and on the device of `z`."""
        out = z.flatten(1) @ self.weight.to(z).flatten(0, 1)
        return out if self.bias is None else out + self.bias.to(z)


ROUNDING = 8
"""The accepted deviation of a sum from what the model computes, as a share of the largest value, in units of its precision; at
least 0.001, because models compute norms in float32."""


def rounding(lens: Lens) -> float:
    """Return the accepted deviation of a sum from what a model computes, as a share of the largest value."""
    return max(1e-3, float(ROUNDING * torch.finfo(lens.dtype).eps))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 at least, without its gradient."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def attention_outputs(lens: Lens, tokens: Int[torch.Tensor, "prompts pos"]) -> list[AttentionOutput | None]:
    """Return the way in which each layer adds its heads to the residual stream; None if it has another one.

    Which norm follows attention is measured, because the norm in front of attention (GPT-2) and the one after it (OLMo 2) can
    have the same name. Quantised weights can't be read.

    Args:
        tokens: prompts on which the outputs are compared with the model.
    """
    parts = [(sites.component(layer, "z"), sites.component(layer, "attn_out")) for layer in range(lens.n_layers)]
    read = lens.read(tokens, [hook for both in parts for hook in both])
    found: list[AttentionOutput | None] = []
    for layer, (z, out) in enumerate(parts):
        block, weight = lens.model.blocks[layer], lens.output_weight(layer)
        norms = [norm_of(getattr(block, name, None), lens.model.cfg) for name in ("ln1_post", "ln1")]
        outputs = [] if weight is None else [
            AttentionOutput(weight, getattr(block.attn, "b_O", None), norm)
            for norm in [None, *(norm for norm in norms if norm is not None)]
        ]  # fmt: skip
        flat = read[z].flatten(0, 1), read[out].flatten(0, 1)
        found.append(next((output for output in outputs if _adds(output, *flat, rounding(lens))), None))
    return found


def _adds(output: AttentionOutput, z: torch.Tensor, out: torch.Tensor, tolerance: float) -> bool:
    """Return whether heads `[rows, ...]` that are added in this way give what attention adds, `[rows, d_model]`."""
    wide = torch.promote_types(z.dtype, torch.float32)
    raw = output.in_front(z.to(output.weight.device, wide).reshape(len(z), *output.weight.shape[:2]))
    found = raw if output.norm is None else output.norm(raw.to(output.weight.dtype)).to(wide)
    expected = out.to(raw)
    return bool((found - expected).abs().max() <= tolerance * torch.maximum(raw.abs().max(), expected.abs().max()))


def _layer(block: Any, cfg: Any, attention: Attention) -> Layer:
    attn = block.attn
    try:
        projections = [
            _flat(weight, bias) for weight, bias in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        ]
        out = Linear(attn.W_O.flatten(0, 1), attn.b_O)
    except AttributeError as error:
        raise UnsupportedError(f"attention without separate weights ({error})") from error
    except NotImplementedError as error:
        raise UnsupportedError("quantised weights, which can be run but not read") from error
    return Layer(
        norm1=norm_of(getattr(block, "ln1", None), cfg),
        query=projections[0],
        key=projections[1],
        value=projections[2],
        query_norm=norm_of(getattr(attn, "q_norm", None), cfg),
        key_norm=norm_of(getattr(attn, "k_norm", None), cfg),
        rotation=attention.rotation,
        d_head=int(cfg.d_head),
        scale=attention.scale,
        softcap=_positive(attention.softcap),
        window=attention.window,
        out=out,
        post1=norm_of(getattr(block, "ln1_post", None), cfg),
        norm2=norm_of(getattr(block, "ln2", None) or (getattr(block, "ln1", None) if cfg.parallel_attn_mlp else None), cfg),
        mlp=_mlp(getattr(block, "mlp", None), cfg),
        post2=norm_of(getattr(block, "ln2_post", None), cfg),
        parallel=bool(cfg.parallel_attn_mlp),
    )


def _mlp(mlp: Any, cfg: Any) -> Mlp | None:
    if mlp is None:
        return None
    if cfg.act_fn not in ACTIVATIONS:
        raise UnsupportedError(f"activation function {cfg.act_fn!r}")
    try:
        gate = getattr(mlp, "W_gate", None)
        into, out = Linear(mlp.W_in, mlp.b_in), Linear(mlp.W_out, mlp.b_out)
    except AttributeError as error:
        raise UnsupportedError(f"an MLP without the standard weights ({error})") from error
    except NotImplementedError as error:
        raise UnsupportedError("quantised weights, which can be run but not read") from error
    if into.weight is None or into.weight.dim() != 2:
        raise UnsupportedError("a mixture-of-experts MLP")
    return Mlp(ACTIVATIONS[cfg.act_fn], None if gate is None else Linear(gate, None), into, out)


def norm_of(module: Any, cfg: Any) -> Norm | None:
    """Convert a norm module; None if there is no norm.

    Norms of HookedTransformer hold `w` and `b`; those of a TransformerBridge wrap a Hugging Face module.
    """
    if module is None or isinstance(module, torch.nn.Identity):
        return None
    original = getattr(module, "original_component", None)
    if original is None:
        centred = type(module).__name__.startswith("LayerNorm")
        return Norm(centred, getattr(module, "w", None), getattr(module, "b", None), float(cfg.eps))
    centred = not module.uses_rms_norm
    eps = getattr(original, "eps", getattr(original, "variance_epsilon", cfg.eps))
    weight = original.weight + 1 if not centred and getattr(cfg, "rmsnorm_uses_offset", False) else original.weight
    return Norm(centred, weight, getattr(original, "bias", None), float(eps))


def _flat(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Convert a projection of weights `[heads, d_model, d_head]` to a map to `[heads * d_head]`."""
    return Linear(weight.permute(1, 0, 2).flatten(1), None if bias is None else bias.flatten())


def _positive(softcap: float | None) -> float | None:
    return float(softcap) if softcap is not None and softcap > 0 else None


CENTRED = 1e-3
"""Maximum mean over coordinates of a residual stream that counts as centred, as a fraction of its root mean square."""


def processing_steps(lens: Lens) -> Sequence[str]:
    """Return the processing steps that the weights have gone through: `fold_ln`, `center_writing_weights`, both or neither."""
    done = []
    if trivial_norms(lens):
        done.append("fold_ln")
    stream = lens.read(torch.tensor([[0, 1, 2]]), [sites.resid_pre(lens.n_layers - 1)])[sites.resid_pre(lens.n_layers - 1)]
    stream = stream.double()
    if bool((stream.mean(-1).abs() <= CENTRED * stream.square().mean(-1).sqrt()).all()):
        done.append("center_writing_weights")
    return done


def trivial_norms(lens: Lens) -> bool:
    """Return whether the norms before attention and MLP have no weight other than 1.

    The weight may be folded, or was never trained.
    """
    norms = _norms(lens)
    return bool(norms) and all(norm.weight is None or bool((norm.weight == 1).all()) for norm in norms)


def folded(lens: Lens) -> bool:
    """Return whether the weights of the norms before attention and MLP are folded into the weights that read their output."""
    gone = all(norm.weight is None for norm in _norms(lens)) or getattr(lens.model, "_weights_processed", False)
    return trivial_norms(lens) and bool(gone)


def _norms(lens: Lens) -> list[Norm]:
    cfg = lens.model.cfg
    found = [norm_of(getattr(block, name, None), cfg) for block in lens.model.blocks for name in ("ln1", "ln2")]
    return [norm for norm in found if norm is not None]
