"""How attention and MLPs of a TransformerLens model write to the residual stream, and what each of their heads reads.

Each form is compared with the activations of the model before it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.model.layer import Layer, Norm, UnsupportedError, norm_of
from featpatch.model.lens import Lens


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


@dataclass(frozen=True)
class Projections:
    """The projections of a layer's attention, split by head, so that each head can read an input of its own, and its MLP.

    Attributes:
        layer: the layer.
        into: the weights `[heads, d_model, d_head]` and biases `[heads, d_head]` of `"q"`, `"k"` and `"v"`.
        out: W_O, `[heads, d_head, d_model]`.
        bias: b_O, `[d_model]`.
    """

    layer: Layer
    into: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    out: torch.Tensor
    bias: torch.Tensor

    def project(
        self, name: str, streams: Float[torch.Tensor, "streams rows d_model"], which: Sequence[int]
    ) -> Float[torch.Tensor, "rows heads d_head"]:
        """Return the queries, keys or values of heads.

        Args:
            name: `"q"`, `"k"` or `"v"`.
            streams: different residual streams.
            which: the number of the residual stream that each head reads.
        """
        weight, bias = self.into[name]
        normed = self.layer.attention_input(streams.flatten(0, 1).to(weight)).unflatten(0, streams.shape[:2])
        return torch.baddbmm(bias[:, None], normed[list(which)], weight).transpose(0, 1)

    def pull(
        self, name: str, at: Float[torch.Tensor, "rows d_model"], gradient: Float[torch.Tensor, "rows heads d_head"]
    ) -> Float[torch.Tensor, "heads rows d_model"]:
        """Return the gradient with respect to what each head's query, key or value reads, from that with respect to itself."""
        weight, _ = self.into[name]
        of_normed = gradient.to(weight).transpose(0, 1) @ weight.transpose(1, 2)
        found = _pulled(self.layer.attention_input, at.to(weight).repeat(len(weight), 1), of_normed.flatten(0, 1))
        return found.unflatten(0, of_normed.shape[:2])

    def pull_mlp(
        self, at: Float[torch.Tensor, "rows d_model"], gradient: Float[torch.Tensor, "rows d_model"]
    ) -> Float[torch.Tensor, "rows d_model"]:
        """Return the gradient with respect to what the MLP reads, from that with respect to its output."""
        at = at.to(self.layer.device)
        return _pulled(self.layer.mlp_output, at, gradient.to(at))

    def outputs(self, z: Float[torch.Tensor, "rows heads d_head"]) -> Float[torch.Tensor, "heads rows d_model"]:
        """Return what each head writes, without the bias and in front of the norm after attention, if there is one."""
        return z.to(self.out).transpose(0, 1) @ self.out

    def first_order(
        self, z: Float[torch.Tensor, "rows heads d_head"], change: Float[torch.Tensor, "rows heads d_head"]
    ) -> Float[torch.Tensor, "heads rows d_model"]:
        """Return the change of the residual stream to first order if each head alone changes from `z` to `z + change`."""
        changes, norm = self.outputs(change), self.layer.post1
        return changes if norm is None else norm.push(changes, self.outputs(z).sum(0) + self.bias)


def _pulled(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient with respect to the argument of a function from that with respect to its value."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = at.clone().requires_grad_()
        value = function(leaf)
        return gradient if value is leaf else torch.autograd.grad(value, leaf, gradient.clone())[0]


@torch.no_grad()
def projections_of(lens: Lens, tokens: Int[torch.Tensor, "prompts pos"]) -> list[Projections] | None:
    """Return the projections of all layers; None if the model has no such form, or they do not give its activations.

    Args:
        tokens: prompts on which the projections are compared with the model.
    """
    try:
        layers = lens.stack(tokens.shape[1], tokens.shape[1]).layers
    except UnsupportedError:
        return None
    names = ["resid_pre", "q", "k", "v", "z", "attn_out", *(() if lens.attention_only else ("mlp_out",))]
    hooks = [[sites.component(layer, name) for name in names] for layer in range(len(layers))]
    read = lens.read(tokens, [hook for of_layer in hooks for hook in of_layer])
    found = []
    for layer, of_layer in zip(layers, hooks, strict=True):
        stream, *inside, z, output = (read[hook].flatten(0, 1) for hook in of_layer[:6])
        into = {}
        for name, values, linear in zip("qkv", inside, (layer.query, layer.key, layer.value), strict=True):
            heads = values.shape[1]
            weight, bias = (
                None if given is None else given.unflatten(-1, (-1, layer.d_head)) for given in (linear.weight, linear.bias)
            )
            assert weight is not None
            step = weight.shape[1] // heads  # weights of shared keys and values may be repeated for each head
            weight = weight[:, ::step].transpose(0, 1)
            into[name] = weight, weight.new_zeros(heads, layer.d_head) if bias is None else bias[::step]
        out = layer.out.weight.unflatten(0, (z.shape[1], -1))
        bias_out = out.new_zeros(out.shape[-1]) if layer.out.bias is None else layer.out.bias
        made = Projections(layer, into, out, bias_out)
        for name, values in zip("qkv", inside, strict=True):
            if not _close(made.project(name, stream[None], [0] * values.shape[1]), values):
                return None
        written = made.outputs(z).sum(0) + made.bias
        if not _close(written if layer.post1 is None else layer.post1(written), output):
            return None
        for hook in of_layer[6:]:
            below = stream if layer.parallel else stream + output.to(stream)
            if not _close(layer.mlp_output(below.to(layer.device)), read[hook].flatten(0, 1)):
                return None
        found.append(made)
    return found


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two activations are equal but for rounding."""
    one = one.to(other)
    return bool((one - other).abs().max() <= torch.finfo(other.dtype).eps ** 0.5 * other.abs().max())
