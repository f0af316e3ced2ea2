"""Edge and node attribution patching: estimates of all scores from gradients at a few points.

    score(S -> R) = mean over points of the sum over positions of (a' - a) . dm/dx

a is what the sender S writes in the clean run, a' its ablation value, and x what the receiver R reads at the point. For a node,
a is its part of the activation at its hook point, and x that activation. Our scores are losses, so their sign is the opposite.
The points, with e the embedding's output:

    estimate             the unpatched clean run (EAP; Syed et al. 2023, arXiv 2310.10348)
    relp, relp_qk, gim   the same run, with the backward pass of these methods (`model.backward`); the gradients through a norm,
                         an MLP and attention follow their rules
    eap_ig_inputs        e is set to e' + k / steps (e - e'), for k = 0 ... steps - 1 (Hanna et al. 2024, arXiv 2403.17806)
    eap_ig_activations   what one component writes is set to a' + k / steps (a - a'), for k = 1 ... steps and for each
                         component in turn: the embedding, all heads of a layer, an MLP, all mediators at a place

These are the formulas of hannamw/EAP-IG (`get_scores_eap`, `get_scores_eap_ig`, `get_scores_ig_activations`): every point
counts for every edge. Over nodes, all candidates are kept at every point, as in exact scores, and the points of
`eap_ig_activations` move the activation at one hook point of the candidates and count only for the nodes there (integrated
gradients at each hook point; Marks et al. 2024, arXiv 2403.19647). With many steps, the scores of the embedding's edges by
`eap_ig_inputs` add up to the effect of ablating the embedding, and those of the nodes of one hook point by `eap_ig_activations`
to the effect of ablating all of them.

For edges, one forward and one backward pass give the gradients at all queries, keys, values and MLP outputs. From there they
are backpropagated through each receiver's own weights and norm to the residual stream that it reads. The scores of a receiver's
edges are then one product with the changes of all upstream senders; nothing is stored per edge. If a norm follows attention, a
head's output is its part of the norm's input, and a' - a is multiplied by the derivative of that norm at the point.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int

from featpatch import sites
from featpatch.model.backward import LIVE, RULES, Rules, modified, under
from featpatch.model.gradients import Differentiated, gradients
from featpatch.model.layer import head_from
from featpatch.model.lens import Edit, Lens
from featpatch.model.projections import Projections
from featpatch.nodes import Node

Scores = Literal["exact", "estimate", "eap_ig_inputs", "eap_ig_activations", "relp", "relp_qk", "gim"]
"""The name of a way to score nodes or edges; see `find_circuit`."""

STEPPED = ("eap_ig_inputs", "eap_ig_activations")
"""The scores that average over `steps` points."""

STEPS = 5
"""The default number of steps."""

ESTIMATED_AT_ONCE = 512
"""The largest number of tokens whose scores are estimated together, unless a single prompt is longer. It bounds the memory for
gradients and for the changes of all senders."""

MOVED_AT_ONCE = 100
"""The number of tokens from which on no further point joins a pass. It bounds the memory for backpropagation; larger passes are
hardly faster."""

EMBEDDING = Node(sites.EMBEDDING, "activation")
"""The sender of the first layer's input: the token embedding and, if the model adds them, position embeddings."""

INSIDE = ("q", "k", "v")
"""The inputs of an attention head that are receivers."""


@dataclass(frozen=True)
class Point:
    """A run in which gradients are taken.

    Attributes:
        place: the nodes whose values are moved towards their ablation values; none for the unpatched run.
        share: the weight of the clean value, from 0 (the ablation value) to 1.
        local: whether the place is one of several that are moved in turn.
        rules: the rules of the backward pass.
    """

    place: tuple[Node, ...] = ()
    share: float = 1.0
    local: bool = False
    rules: Rules = LIVE

    def between(self, ablated: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Return the value at this point."""
        return ablated.to(clean) + self.share * (clean - ablated.to(clean))


def points_of(scores: Scores, steps: int, places: Sequence[tuple[Node, ...]]) -> list[Point]:
    """Return the points of a way to score.

    Args:
        scores: the way to score.
        steps: the number of steps.
        places: the groups of nodes that are moved in turn for `"eap_ig_activations"`.
    """
    if scores == "eap_ig_inputs":
        return [Point((EMBEDDING,), step / steps) for step in range(steps)]
    if scores == "eap_ig_activations":
        return [Point(place, step / steps, local=True) for place in places for step in range(1, steps + 1)]
    return [Point(rules=RULES.get(scores, LIVE))]


def sender_hooks(lens: Lens) -> list[str]:
    """Return the hook points whose activations determine what all senders write."""
    names = ("z", *_mlps(lens))
    return [sites.resid_pre(0), *(sites.component(layer, name) for layer in range(lens.n_layers) for name in names)]


def _mlps(lens: Lens) -> list[str]:
    """Return the name of the output of an MLP, if the model has MLPs."""
    return [] if lens.attention_only else ["mlp_out"]


def _normed(projections: Sequence[Projections]) -> bool:
    """Return whether a norm follows attention."""
    return any(of_layer.layer.post1 for of_layer in projections)


@torch.no_grad()
def summed_scores(
    lens: Lens,
    projections: Sequence[Projections],
    tokens: Int[torch.Tensor, "pairs pos"],
    answers: Int[torch.Tensor, " pairs"],
    measure: Callable[[slice, torch.Tensor], torch.Tensor],
    points: Sequence[Point],
    ablated: Mapping[str, torch.Tensor],
    done: Callable[[int], object],
    regions: Bool[torch.Tensor, "pairs pos regions"] | None = None,
) -> Float[torch.Tensor, " edges"]:
    """Return the sum over points of the scores of all edges, by receiver and then by sender, in the order of a forward pass.

    Args:
        lens: the model.
        projections: the projections of each layer's attention.
        tokens, answers: the clean prompts and the positions of their answers.
        measure: a differentiable function from some points and their logits `[points, pairs, d_vocab]` to values whose sum is
            estimated.
        points: the runs in which gradients are taken; several share a forward pass.
        ablated: the ablation values at `sender_hooks`.
        done: a function that is called with the number of runs after each pass.
        regions: the tokens of each region; an edge then has a score for each of them, one after the other.
    """
    rules = points[0].rules  # the same for all points
    projections = [replace(of_layer, layer=under(of_layer.layer, rules)) for of_layer in projections]
    clean = lens.read(tokens, sender_hooks(lens)) if any(point.place for point in points) else {}
    changes, total = None, torch.zeros((), device=lens.device)
    size, normed = ceil(MOVED_AT_ONCE / tokens.numel()), _normed(projections)
    for part in (slice(start, start + size) for start in range(0, len(points), size)):
        found = _run(lens, tokens, answers, partial(measure, part), points[part], clean, ablated)
        if changes is None or normed:  # what a norm after attention makes of a change depends on the point
            changes = _changes(lens, projections, found.activations, clean or found.activations, ablated)
        total = total + _scores(lens, projections, found, changes, regions)
        del found  # the next pass needs its memory
        done(len(points[part]) * len(tokens))
    return total


def _run(
    lens: Lens,
    tokens: torch.Tensor,
    answers: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor],
    points: Sequence[Point],
    clean: Mapping[str, torch.Tensor],
    ablated: Mapping[str, torch.Tensor],
) -> Differentiated:
    """Return the gradients and activations that `_scores` needs at some points, `[points * pairs, pos, ...]`."""
    layers, count = range(lens.n_layers), len(tokens)
    hooks = [sites.component(layer, name) for layer in layers for name in (*INSIDE, *_mlps(lens))]
    reads = {*sender_hooks(lens), *(sites.component(layer, name) for layer in layers for name in ("resid_pre", "attn_out"))}
    last, head = sites.resid_post(lens.n_layers - 1), partial(under(head_from(lens.model), points[0].rules), columns=None)
    moved: dict[str, dict[int, torch.Tensor]] = {}
    for number, point in enumerate(points):
        for node in point.place[:1]:  # the other nodes are at the same hook point
            hook = sites.resid_pre(0) if node == EMBEDDING else node.site
            moved.setdefault(hook, {})[number] = point.between(ablated[hook], clean[hook])

    def moving(values: Mapping[int, torch.Tensor]) -> Edit:
        def change(activation: torch.Tensor) -> torch.Tensor:
            rows = activation.unflatten(0, (len(points), count)).unbind()
            return torch.cat([values[n].to(row) if n in values else row for n, row in enumerate(rows)])

        return change

    with ExitStack() as stack:
        stack.enter_context(modified(lens, points[0].rules))
        for hook, values in moved.items():
            stack.enter_context(lens.edit(hook, moving(values)))
        found = gradients(
            lens,
            tokens.repeat(len(points), 1),
            [*hooks, last],
            answers.repeat(len(points)),
            lambda x: measure(x.unflatten(0, (len(points), count))).flatten(),
            reads=sorted(reads),
            head=head,
        )
    cut = {hook: found.gradients[hook].clone() for hook in moved.keys() & found.gradients.keys()}
    for hook, gradient in cut.items():  # a component whose output is set passes no gradient to its input
        for number in moved[hook]:
            gradient[number * count : (number + 1) * count] = 0
    return replace(found, gradients={**found.gradients, **cut})


def _changes(
    lens: Lens,
    projections: Sequence[Projections],
    now: Mapping[str, torch.Tensor],
    clean: Mapping[str, torch.Tensor],
    ablated: Mapping[str, torch.Tensor],
) -> Float[torch.Tensor, "senders entries"]:
    """Return how ablation changes what each sender adds to the residual stream, to first order, in forward-pass order.

    Args:
        lens, projections, ablated: as in `summed_scores`.
        now: the activations at some points, which matter only if a norm follows attention.
        clean: the activations in the clean runs.

    Returns:
        The changes at all pairs and positions and, if a norm follows attention, at all points.
    """
    normed = _normed(projections)

    def moved(hook: str) -> torch.Tensor:
        change = _wide(lens, ablated[hook].to(clean[hook]) - clean[hook])
        return change.repeat(len(now[hook]) // len(change), *[1] * (change.dim() - 1)) if normed else change

    entering, mlps = moved(sites.resid_pre(0)), _mlps(lens)
    changes = entering.new_empty(1 + sum(len(of.out) + len(mlps) for of in projections), entering.numel())
    changes[0], filled = entering.flatten(), 1
    for layer, of_layer in enumerate(projections):
        below, filled, z = filled, filled + len(of_layer.out), sites.component(layer, "z")
        at = now[z] if normed else clean[z]
        changes[below:filled] = of_layer.first_order(at.flatten(0, 1), moved(z).flatten(0, 1)).flatten(1)
        for name in mlps:
            changes[filled], filled = moved(sites.component(layer, name)).flatten(), filled + 1
    return changes


def _scores(
    lens: Lens, projections: Sequence[Projections], found: Differentiated, changes: torch.Tensor, regions: torch.Tensor | None
) -> torch.Tensor:
    """Return the products of what senders change with the gradients at what receivers read, for all edges."""
    filled, scores = 1, []

    def score(gradients: torch.Tensor, senders: int) -> None:
        flat = _wide(lens, gradients).flatten(1).unflatten(1, (-1, changes.shape[1])).sum(1)  # over points that share changes
        if regions is None:
            scores.append((flat @ changes[:senders].T).flatten())
            return
        at = regions.flatten(0, 1)
        at = at.repeat(changes.shape[1] // (lens.d_model * len(at)), 1)
        by_row = torch.einsum(
            "rnd,snd->rsn", flat.unflatten(1, (-1, lens.d_model)), changes[:senders].unflatten(1, (-1, lens.d_model))
        )
        scores.append((by_row @ at.to(by_row)).flatten())

    for layer, of_layer in enumerate(projections):
        stream = found.activations[sites.resid_pre(layer)]
        for name in INSIDE:
            gradient = found.gradients[sites.component(layer, name)]
            score(of_layer.pull(name, stream.flatten(0, 1), gradient.flatten(0, 1)), filled)
        below, filled = filled, filled + len(of_layer.out)
        for output in (sites.component(layer, name) for name in _mlps(lens)):
            attention = found.activations[sites.component(layer, "attn_out")]
            read = stream if lens.parallel else stream + attention.to(stream)
            gradient = of_layer.pull_mlp(read.flatten(0, 1), found.gradients[output].flatten(0, 1))
            score(gradient[None], below if lens.parallel else filled)
            filled += 1
    score(found.gradients[sites.resid_post(lens.n_layers - 1)][None], filled)
    return torch.cat(scores)


def _wide(lens: Lens, x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in at least float32, on the model's device."""
    return x.to(lens.device, torch.promote_types(x.dtype, torch.float32))
