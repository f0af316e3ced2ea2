"""Edge attribution patching: estimate the effects of all edges between components from gradients of the unpatched clean runs.

    score(S -> R) = sum over positions of (output of S when ablated - output of S) . dm / d(input of R)

(Syed et al. 2023, arXiv 2310.10348.) One forward and one backward pass give the gradients at all queries, keys, values and MLP
outputs. From there they are propagated to the residual stream that each receiver reads, through its own weights and norm alone.
The scores of a receiver's edges are then one product with the changes of all senders before it; nothing is stored per edge.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int

from featpatch import sites
from featpatch.model.lens import Lens
from featpatch.model.stack import Projections, head_of

INSIDE = ("q", "k", "v")
"""The inputs of an attention head that are receivers."""


def sender_hooks(lens: Lens) -> list[str]:
    """Return the hook points whose activations determine what all senders write."""
    mlps = [] if lens.attention_only else ["mlp_out"]
    return [sites.resid_pre(0), *(sites.component(layer, name) for layer in range(lens.n_layers) for name in ("z", *mlps))]


@torch.no_grad()
def summed_scores(
    lens: Lens,
    projections: Sequence[Projections],
    tokens: Int[torch.Tensor, "pairs pos"],
    answers: Int[torch.Tensor, " pairs"],
    measure: Callable[[torch.Tensor], torch.Tensor],
    ablated: Mapping[str, torch.Tensor],
    regions: Bool[torch.Tensor, "pairs pos regions"] | None = None,
) -> Float[torch.Tensor, " edges"]:
    """Return the scores of all edges, receiver by receiver and each with its senders, in the order of the forward pass.

    Args:
        lens: the model.
        projections: the projections of each layer's attention.
        tokens, answers: the clean prompts and the positions of their answers.
        measure: a differentiable function from logits to one value per prompt, of which the sum is estimated.
        ablated: the ablation values at `sender_hooks`.
        regions: the tokens of each region; an edge then has a score for each of them, one after the other.
    """
    names = ["attn_out", *(() if lens.attention_only else ("mlp_out",))]
    layers, last = range(lens.n_layers), sites.resid_post(lens.n_layers - 1)
    hooks = [sites.component(layer, name) for layer in layers for name in (*INSIDE, *names[1:])]
    reads = {*sender_hooks(lens), *(sites.component(layer, name) for layer in layers for name in ("resid_pre", names[0]))}
    head = partial(head_of(lens), columns=None)
    found = lens.gradients(tokens, [*hooks, last], answers, measure, reads=sorted(reads), head=head)

    def moved(hook: str) -> torch.Tensor:
        clean = found.activations[hook]
        return wide(ablated[hook].to(clean) - clean)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.to(lens.device, torch.promote_types(x.dtype, torch.float32))

    entering = moved(sites.resid_pre(0))
    heads = [len(of_layer.out) for of_layer in projections]
    changes = entering.new_empty(1 + sum(heads) + len(names[1:]) * lens.n_layers, entering.numel())
    changes[0], filled = entering.flatten(), 1
    scores = []

    def score(gradients: torch.Tensor, senders: int) -> None:
        if regions is None:
            scores.append((wide(gradients).flatten(1) @ changes[:senders].T).flatten())
            return
        flat = regions.flatten(0, 1)
        by_row = torch.einsum("rnd,snd->rsn", wide(gradients).flatten(1, -2), changes[:senders].unflatten(1, (len(flat), -1)))
        scores.append((by_row @ flat.to(by_row)).flatten())

    for layer, of_layer in enumerate(projections):
        stream = found.activations[sites.resid_pre(layer)]
        for name in INSIDE:
            gradient = found.gradients[sites.component(layer, name)]
            score(of_layer.pull(name, stream.flatten(0, 1), gradient.flatten(0, 1)), filled)
        below, filled = filled, filled + heads[layer]
        z = sites.component(layer, "z")
        changes[below:filled] = of_layer.first_order(*(x.flatten(0, 1) for x in (found.activations[z], moved(z)))).flatten(1)
        for output in (sites.component(layer, name) for name in names[1:]):
            attention = found.activations[sites.component(layer, "attn_out")]
            read = stream if lens.parallel else stream + attention.to(stream)
            gradient = of_layer.pull_mlp(read.flatten(0, 1), found.gradients[output].flatten(0, 1))
            score(gradient[None], below if lens.parallel else filled)
            changes[filled], filled = moved(output).flatten(), filled + 1
    score(found.gradients[last][None], filled)
    return torch.cat(scores)
