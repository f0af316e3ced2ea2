"""The attention of each layer split by head, and the MLP, as functions of a model's weights.

They give what each head adds to the residual stream if it reads an input of its own, and the gradient with respect to what a
head's query, key or value or the MLP reads, from that with respect to what the layer adds.

The functions are compared with the activations of the model before they are used.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.model.backward import LIVE, Rules, attend, under
from featpatch.model.facts import once, settings
from featpatch.model.layer import Layer, Norm, UnsupportedError, close, norm_of
from featpatch.model.lens import Lens

INSIDE = ("q", "k", "v")
"""The inputs of an attention head that are receivers."""


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
    """Return the way in which each layer adds its heads to the residual stream, compared on these prompts; None for others.

    Which norm follows attention is measured, because the norm in front of attention (GPT-2) and the one after it (OLMo 2) can
    have the same name. Quantised weights can't be read.
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
    raw = output.in_front(wide(z).to(output.weight.device).reshape(len(z), *output.weight.shape[:2]))
    found = raw if output.norm is None else output.norm(raw.to(output.weight.dtype)).to(raw)
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
        rules: the rules of the backward pass.
    """

    layer: Layer
    into: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    out: torch.Tensor
    bias: torch.Tensor
    rules: Rules = LIVE

    def under(self, rules: Rules) -> "Projections":
        """Return the same layer with the gradients of rules."""
        return replace(self, layer=under(self.layer, rules), rules=rules)

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

    def heads(self, x: Float[torch.Tensor, "rows d_model"]) -> list[Float[torch.Tensor, "rows _ d_head"]]:
        """Return the queries, keys and values of all heads, which read the same residual stream."""
        y, layer = self.layer.attention_input(x), self.layer
        found = [linear(y).unflatten(-1, (-1, layer.d_head)) for linear in (layer.query, layer.key, layer.value)]
        counts = [len(self.into[name][0]) for name in INSIDE]  # weights of shared keys and values may be repeated
        return [values[:, :: values.shape[1] // count] for values, count in zip(found, counts, strict=True)]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the outputs of heads from queries, keys and values as projected, see `attend`."""
        return attend(self.layer, q, k, v, self.rules)

    def pull(
        self, at: Float[torch.Tensor, "rows d_model"], gradients: Sequence[Float[torch.Tensor, "rows _ d_head"]]
    ) -> Float[torch.Tensor, "receivers rows d_model"]:
        """Return the gradient with respect to what each query, key and value reads, from those with respect to themselves."""
        of_normed = torch.cat(
            [gradient.transpose(0, 1) @ self.into[name][0].transpose(1, 2)
             for name, gradient in zip(INSIDE, gradients, strict=True)]
        )  # fmt: skip
        (found,) = pulled(self.layer.attention_input, [at.repeat(len(of_normed), 1)], of_normed.flatten(0, 1))
        return found.unflatten(0, of_normed.shape[:2])

    def pull_attention(
        self,
        q: Float[torch.Tensor, "prompts queries heads d_head"],
        k: Float[torch.Tensor, "prompts pos kv_heads d_head"],
        v: Float[torch.Tensor, "prompts pos kv_heads d_head"],
        gradient: Float[torch.Tensor, "prompts queries heads d_head"],
    ) -> list[torch.Tensor]:
        """Return the gradients with respect to queries, keys and values from that with respect to the outputs of heads."""
        return pulled(self.attend, [q, k, v], gradient)

    def pull_outputs(
        self, z: Float[torch.Tensor, "rows heads d_head"], gradient: Float[torch.Tensor, "rows d_model"]
    ) -> Float[torch.Tensor, "rows heads d_head"]:
        """Return the gradient with respect to the outputs of heads from that with respect to what attention adds."""
        layer = self.layer
        if layer.post1 is not None:
            (gradient,) = pulled(layer.post1, [layer.out(z.flatten(1))], gradient)
        return (gradient @ layer.out.weight.T).view_as(z)

    def pull_mlp(
        self,
        at: Float[torch.Tensor, "rows d_model"],
        inner: Sequence[Float[torch.Tensor, "rows d_mlp"]],
        gradient: Float[torch.Tensor, "rows d_model"],
    ) -> Float[torch.Tensor, "rows d_model"]:
        """Return the gradient with respect to what the MLP reads, from that with respect to its output.

        Args:
            at: what it reads.
            inner: the inputs of its activation function and of the other factor, see `Layer.mlp_inner`.
            gradient: the gradient with respect to its output.
        """
        layer, mlp = self.layer, self.layer.mlp
        assert mlp is not None
        if layer.post2 is not None:
            (gradient,) = pulled(layer.post2, [mlp.written(inner)], gradient)
        of_inner = pulled(lambda *inputs: mlp.hidden(inputs), inner, gradient @ mlp.out.weight.T)
        of_normed = sum(of @ linear.weight.T for of, linear in zip(of_inner, mlp.inputs, strict=True))
        assert isinstance(of_normed, torch.Tensor)
        return of_normed if layer.norm2 is None else pulled(layer.norm2, [at], of_normed)[0]

    def outputs(self, z: Float[torch.Tensor, "rows heads d_head"]) -> Float[torch.Tensor, "heads rows d_model"]:
        """Return what each head writes, without the bias and in front of the norm after attention, if there is one."""
        return z.to(self.out).transpose(0, 1) @ self.out

    def first_order(
        self, z: Float[torch.Tensor, "rows heads d_head"], change: Float[torch.Tensor, "rows heads d_head"]
    ) -> Float[torch.Tensor, "heads rows d_model"]:
        """Return the change of the residual stream to first order if each head alone changes from `z` to `z + change`."""
        changes, norm = self.outputs(change), self.layer.post1
        return changes if norm is None else norm.push(changes, self.outputs(z).sum(0) + self.bias)


def pulled(function: Callable[..., torch.Tensor], at: Iterable[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients with respect to the arguments of a function from that with respect to its value."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().clone().requires_grad_() for x in at]
        value = function(*leaves)
        found = torch.autograd.grad(value, leaves, gradient.clone().to(value), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@torch.no_grad()
def projections_of(
    lens: Lens, tokens: Int[torch.Tensor, "prompts pos"], compared: int | None = None
) -> list[Projections] | None:
    """Return the projections of all layers; None if the model has no such form, or they do not give its activations.

    Args:
        tokens: prompts on which the projections, attention and MLPs are compared with the model.
        compared: the number of first tokens that are compared; by default, and if attention has a window, all of them. The
            comparison is made once for prompts of a length, until weights, settings or hooks change.
    """
    length = tokens.shape[1]
    try:
        layers = lens.stack(min(length, compared or length), length).layers
    except UnsupportedError:
        return None
    if not any(layer.window for layer in layers):
        tokens = tokens[:, :compared]
    names = ["resid_pre", *INSIDE, "z", "attn_out", *(() if lens.attention_only else ("mlp_out",))]
    hooks = [[sites.component(layer, name) for name in names] for layer in range(len(layers))]

    def compare(_: torch.nn.Module) -> list[list[int]] | None:
        """Return the numbers of queries, keys, values and outputs of each layer if the projections give the activations."""
        read = lens.read(tokens, [hook for of_layer in hooks for hook in of_layer])
        counts = [[read[hook].shape[2] for hook in of_layer[1:5]] for of_layer in hooks]
        parts = zip(layers, counts, hooks, strict=True)
        same = all(_gives(_split(layer, *heads), [read[hook] for hook in of_layer]) for layer, heads, of_layer in parts)
        return counts if same else None

    counts = once(lens.model, compare, "projections", *tokens.shape, length, settings(lens.model))
    return None if counts is None else [_split(layer, *heads) for layer, heads in zip(layers, counts, strict=True)]


def _split(layer: Layer, queries: int, keys: int, values: int, outputs: int) -> Projections:
    """Return the projections of a layer, given the numbers of queries, keys, values and outputs of its heads."""
    into = {}
    for name, heads, linear in zip(INSIDE, (queries, keys, values), (layer.query, layer.key, layer.value), strict=True):
        weight, bias = (None if of is None else of.unflatten(-1, (-1, layer.d_head)) for of in (linear.weight, linear.bias))
        assert weight is not None
        step = weight.shape[1] // heads
        weight = weight[:, ::step].transpose(0, 1)
        into[name] = weight, weight.new_zeros(heads, layer.d_head) if bias is None else bias[::step]
    out = layer.out.weight.unflatten(0, (outputs, -1))
    return Projections(layer, into, out, out.new_zeros(out.shape[-1]) if layer.out.bias is None else layer.out.bias)


def _gives(made: Projections, read: Sequence[torch.Tensor]) -> bool:
    """Return whether a layer gives the activations of the model, in the order of `projections_of`."""
    entering, *inside, z, output = read[:6]
    stream, layer = entering.flatten(0, 1).to(made.out), made.layer
    for name, expected in zip(INSIDE, inside, strict=True):
        if not close(made.project(name, stream[None], [0] * expected.shape[2]), expected.flatten(0, 1)):
            return False
    if not close(made.attend(*(x.to(made.out) for x in inside)), z):
        return False
    written = made.outputs(z.flatten(0, 1)).sum(0) + made.bias
    if not close(written if layer.post1 is None else layer.post1(written), output.flatten(0, 1)):
        return False
    below = stream if layer.parallel else stream + output.flatten(0, 1).to(stream)
    return all(close(layer.mlp_output(below), x.flatten(0, 1)) for x in read[6:])
