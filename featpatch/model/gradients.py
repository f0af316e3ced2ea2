"""Gradients of a metric, or of an activation inside a layer, by backpropagation through the model's own forward pass."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.errors import FeatpatchError
from featpatch.model.lens import Edit, Lens, answering, check_read, copying


@dataclass(frozen=True)
class Differentiated:
    """The result of a run with the gradients of a metric.

    Attributes:
        values: the metric of each prompt, `[batch]`.
        gradients, activations: gradients and activations `[batch, pos, ...]` by hook point.
    """

    values: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    activations: Mapping[str, torch.Tensor]


def gradients(
    lens: Lens,
    tokens: Int[torch.Tensor, "batch pos"],
    hooks: Sequence[str],
    answers: Int[torch.Tensor, " batch"],
    measure: Callable[[Float[torch.Tensor, "batch d_vocab"]], Float[torch.Tensor, " batch"]],
    *,
    reads: Sequence[str] = (),
    stopped: Sequence[str] = (),
) -> Differentiated:
    """Apply `measure` to the logits at each prompt's answer, and compute its gradients at some hook points.

    Gradients are taken where a change of the activation would be added (see `Lens.carrier`). The stored gradients of the
    weights (`grad`) are not changed.

    Args:
        answers: the answer position of each prompt.
        measure: a differentiable function from logits to one value per prompt.
        reads: hook points whose activations are returned too.
        stopped: hook points whose activations pass no gradient on.

    Raises:
        FeatpatchError: a hook did not fire, or the measure has no gradient.
    """
    leaves: dict[str, torch.Tensor] = {}
    activations: dict[str, torch.Tensor] = {}

    def leaf(name: str) -> Edit:
        def keep(activation: torch.Tensor) -> torch.Tensor:
            leaves[name] = activation.clone().requires_grad_()
            return leaves[name].clone()

        return keep

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        tokens, answers = tokens.clone().to(lens.device), answers.clone().to(lens.device)
        for name in reads:
            stack.enter_context(lens.edit(name, copying(name, activations)))
        carried = [name for name in hooks if lens.carrier(name) != name]
        for name in (name for name in hooks if name not in carried):
            stack.enter_context(lens.edit(name, leaf(name)))
        for name in stopped:
            stack.enter_context(lens.edit(name, torch.Tensor.detach))
        for name in carried:
            stack.enter_context(lens.edit(lens.carrier(name), leaf(name)))
        with answering(lens.model.unembed, answers):
            values = measure(lens.run(tokens)[:, 0])
        total = values.sum()
    check_read(reads, activations)
    if set(leaves) != set(hooks) or not (values.requires_grad or stopped):
        raise FeatpatchError(
            f"no gradient of the metric at {', '.join(hooks)}: expected hook points that every forward pass reaches, and "
            "a differentiable metric (ranks and accuracies are not)"
        )
    found: Sequence[torch.Tensor | None] = [None] * len(leaves)
    if values.requires_grad:
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    kept = zip(leaves.items(), found, strict=True)
    gradients = {name: torch.zeros_like(x, requires_grad=False) if g is None else g for (name, x), g in kept}
    return Differentiated(values.detach(), gradients, activations)


def pull(
    lens: Lens,
    layer: int,
    resid: Float[torch.Tensor, "rows pos d_model"],
    tokens: Int[torch.Tensor, "rows pos"],
    hook: str,
    weights: torch.Tensor,
    put: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the gradient of `(weights * activation at the hook point).sum()` for `resid` and for values inside the layer.

    Args:
        put: the values that replace activations inside the layer, by hook point.

    Returns:
        The gradient with respect to `resid`, and the gradients with respect to the values in `put`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [value.detach().clone().requires_grad_() for value in (resid, *put.values())]
        with lens.put(dict(zip(put, leaves[1:], strict=True))):
            value = lens.differentiable_through(layer, leaves[0], tokens.clone().to(lens.device), hook)
        total = (value * weights.clone().to(value.device).reshape(value.shape)).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    first, *others = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return first.detach(), dict(zip(put, others, strict=True))
