"""Estimates of the scores of all edges from the model's weights; `attribution` states the formulas.

One forward pass gives the clean runs and, in the same batch, the runs that the ablation values come from. One backward pass,
layer by layer from the last, gives the gradient at the residual stream and at what each receiver (a head's query, key or value,
an MLP, the logits) reads from it. The scores of a receiver's edges are one product of this with
the changes of all upstream senders; nothing is stored per edge. If a norm follows attention, a head's output is its part of the
norm's input, and its change is multiplied by the derivative of that norm at the point.

The model is causal, so before the first token that differs no sender changes. Only the clean runs have rows there, whose keys
and values the others share, and no gradient is computed there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
from jaxtyping import Bool, Float, Int

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING, Point
from featpatch.model.lens import Lens
from featpatch.model.projections import Projections, wide

MOVED_AT_ONCE = 100
"""Points share a pass until it has this many tokens. This bounds the memory for backpropagation; larger passes are hardly
faster."""

Put = Callable[[str, torch.Tensor], torch.Tensor]
"""A function from the name of a sender's hook point and the activation there to the one that replaces it."""


@dataclass(frozen=True)
class Inside:
    """The activations of a layer in some runs, `[runs, pos, ...]`, from a position on; keys and values are of all positions.

    Attributes:
        stream: the residual stream that enters the layer.
        q, k, v: the queries, keys and values of heads, as projected.
        z: the outputs of heads.
        read: what the MLP reads.
        inner: the inputs of the MLP's hidden layer, see `Layer.mlp_inner`.
        written: what the MLP writes; None if there is none.
    """

    stream: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    z: torch.Tensor
    read: torch.Tensor
    inner: tuple[torch.Tensor, ...] = ()
    written: torch.Tensor | None = None

    def after(self, first: int) -> "Inside":
        """Return the activations from a position on, of runs that hold all positions."""
        stream, q, z, read, *inner = (x[:, first:] for x in (self.stream, self.q, self.z, self.read, *self.inner))
        written = None if self.written is None else self.written[:, first:]
        return replace(self, stream=stream, q=q, z=z, read=read, inner=tuple(inner), written=written)


def sender_hooks(lens: Lens) -> list[str]:
    """Return the hook points whose activations determine what all senders write."""
    names = ("z",) if lens.attention_only else ("z", "mlp_out")
    return [sites.resid_pre(0), *(sites.component(layer, name) for layer in range(lens.n_layers) for name in names)]


@torch.no_grad()
def summed_scores(
    lens: Lens,
    projections: Sequence[Projections],
    tokens: Int[torch.Tensor, "pairs pos"],
    answers: Int[torch.Tensor, " pairs"],
    measure: Callable[[slice, torch.Tensor], torch.Tensor],
    points: Sequence[Point],
    ablated: Int[torch.Tensor, "pairs pos"] | Mapping[str, torch.Tensor],
    done: Callable[[int], object],
    regions: Bool[torch.Tensor, "pairs pos regions"] | None = None,
) -> Float[torch.Tensor, " edges"]:
    """Return the sum over points of the scores of all edges, by receiver and then by sender, in the order of a forward pass.

    Args:
        lens: the model.
        projections: the projections of each layer's attention.
        tokens, answers: the clean prompts and the positions of their answers.
        measure: a differentiable function from some points and their final residual stream at the answers, `[points, pairs,
            d_model]`, to values whose sum is estimated.
        points: the runs in which gradients are taken; several share a forward pass.
        ablated: the prompts in which senders have their ablation values, or these values `[pairs or 1, pos, ...]` at
            `sender_hooks`.
        done: a function that is called with the number of runs after each pass.
        regions: the tokens of each region; an edge then has a score for each of them, one after the other.
    """
    projections = [of_layer.under(points[0].rules) for of_layer in projections]  # the same rules for all points
    first, pairs = _first(tokens, answers, ablated), len(tokens)
    clean, final, values = _clean_runs(lens, projections, tokens, ablated, first)
    regions = None if regions is None else regions[:, first:].flatten(0, 1)
    moves = {hook: wide(value.to(now) - now).to(lens.device) for hook, (now, value) in values.items()}
    unmoved, total = [each.after(first) for each in clean], torch.zeros((), device=lens.device)
    normed = any(of_layer.layer.post1 for of_layer in projections)  # what the norm makes of a change depends on the point
    shared = None if normed else _changes(projections, unmoved, moves)
    size = ceil(MOVED_AT_ONCE / tokens.numel())
    for part in (slice(start, start + size) for start in range(0, len(points), size)):
        moved = _moved(points[part], values)
        runs, ends = unmoved, final[:, first:]
        if moved:
            put, entering = _put(moved, pairs), values[sites.resid_pre(0)][0]
            runs, ends = _run(projections, put(sites.resid_pre(0), entering.repeat(len(points[part]), 1, 1)), clean, put)
        changes = _changes(projections, runs, moves) if shared is None else shared
        at = torch.arange(len(ends), device=ends.device), (answers - first).repeat(len(ends) // pairs).to(ends.device)
        gradient = torch.zeros_like(ends)
        gradient[at] = _gradient(partial(measure, part), ends[at].unflatten(0, (-1, pairs))).flatten(0, 1)
        total = total + _scores(projections, runs, gradient, _put(_cut(moved), pairs), changes, regions)
        del runs, ends, gradient, changes  # the next pass needs their memory
        done(len(points[part]) * pairs)
    return total


def _moved(
    points: Sequence[Point], values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, dict[int, torch.Tensor]]:
    """Return the values that senders are set to, by hook point and number of the point."""
    moved: dict[str, dict[int, torch.Tensor]] = {}
    for number, point in enumerate(points):
        for node in point.place[:1]:  # the other nodes are at the same hook point
            hook = sites.resid_pre(0) if node == EMBEDDING else node.site
            now, value = values[hook]
            moved.setdefault(hook, {})[number] = point.between(value, now)
    return moved


def _cut(moved: Mapping[str, Mapping[int, torch.Tensor]]) -> dict[str, dict[int, torch.Tensor]]:
    """Return the gradients that what senders write passes on where it is set: zeros."""
    return {hook: {number: torch.zeros_like(x) for number, x in of_hook.items()} for hook, of_hook in moved.items()}


def _first(tokens: torch.Tensor, answers: torch.Tensor, ablated: torch.Tensor | Mapping[str, torch.Tensor]) -> int:
    """Return the first position at which a sender can change, or that of an answer before it."""
    if not isinstance(ablated, torch.Tensor):
        return 0
    differ = (tokens != ablated).any(0).nonzero()
    return min([*differ.flatten().tolist()[:1], *answers.tolist()])


def _clean_runs(
    lens: Lens,
    projections: Sequence[Projections],
    tokens: torch.Tensor,
    ablated: torch.Tensor | Mapping[str, torch.Tensor],
    first: int,
) -> tuple[list[Inside], torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return the clean runs, their final residual stream, and the clean and the ablated values of senders from `first` on."""
    others = ablated if isinstance(ablated, torch.Tensor) else tokens[:0]
    stream, *streams = lens.embedded(torch.cat([tokens, others])).split(len(tokens))
    streams = [stream, *(other[:, first:] for other in streams)]
    found = [{sites.resid_pre(0): x} for x in streams]
    clean: list[Inside] = []
    for layer, of_layer in enumerate(projections):
        streams, runs = _through(layer, of_layer, streams, None, lambda hook, x: x)
        clean.append(runs[0])
        for values, inside in zip(found, runs, strict=True):
            values[sites.component(layer, "z")] = inside.z
            if inside.written is not None:
                values[sites.component(layer, "mlp_out")] = inside.written
    now, *other = found
    to = other[0] if other else {hook: value[:, first:] for hook, value in dict(ablated).items()}
    return clean, streams[0], {hook: (x[:, first:], to[hook]) for hook, x in now.items()}


def _run(
    projections: Sequence[Projections], stream: torch.Tensor, clean: Sequence[Inside], put: Put
) -> tuple[list[Inside], torch.Tensor]:
    """Run all layers at the positions from which on runs differ from clean ones, and return the final residual stream too."""
    found = []
    for layer, (of_layer, before) in enumerate(zip(projections, clean, strict=True)):
        [stream], [inside] = _through(layer, of_layer, [stream], before, put)
        found.append(inside)
    return found, stream


def _through(
    layer: int, of_layer: Projections, streams: Sequence[torch.Tensor], before: Inside | None, put: Put
) -> tuple[list[torch.Tensor], list[Inside]]:
    """Run a layer.

    Args:
        layer, of_layer: the layer.
        streams: residual streams `[runs, pos, d_model]` that share all products of matrices. Those that hold only the last
            positions have the keys and values of the first one, or of `before`, at the others.
        before: the runs that the streams continue.
        put: the function that replaces what senders write.

    Returns:
        The residual streams after the layer, and the activations inside it.
    """
    at = of_layer.layer
    shapes = [stream.shape[:2] for stream in streams]

    def apart(x: torch.Tensor) -> list[torch.Tensor]:
        each = zip(x.split([runs * length for runs, length in shapes]), shapes, strict=True)
        return [part.unflatten(0, shape) for part, shape in each]

    x = torch.cat([stream.flatten(0, 1) for stream in streams]).to(of_layer.out)
    q, *keys_values = (apart(values) for values in of_layer.heads(x))
    known = [values[0] for values in keys_values] if before is None else [before.k, before.v]
    k, v = ([_continued(first, part) for part in parts] for first, parts in zip(known, keys_values, strict=True))
    z = [put(sites.component(layer, "z"), of_layer.attend(*each)) for each in zip(q, k, v, strict=True)]
    mid = x + at.attention_output(torch.cat([part.flatten(0, 1).flatten(1) for part in z]))
    read = x if at.parallel else mid
    found = [Inside(*each) for each in zip(apart(x), q, k, v, z, apart(read), strict=True)]
    if at.mlp is None:
        return apart(mid), found
    inner = at.mlp_inner(read)
    written = [put(sites.component(layer, "mlp_out"), part) for part in apart(at.mlp_written(inner))]
    ends = [stream + part for stream, part in zip(apart(mid), written, strict=True)]
    parts = zip(found, zip(*map(apart, inner), strict=True), written, strict=True)
    return ends, [replace(of_runs, inner=of_inner, written=part) for of_runs, of_inner, part in parts]


def _continued(known: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return keys or values of all positions, from those of whole runs and those that other runs have at the last positions."""
    start = known.shape[1] - own.shape[1]
    return torch.cat([known[:, :start].repeat(len(own) // len(known), 1, 1, 1), own], 1) if start else own


def _put(moved: Mapping[str, Mapping[int, torch.Tensor]], pairs: int) -> Put:
    """Return the function that sets what senders write at some points, given by hook point and number of the point."""

    def put(hook: str, x: torch.Tensor) -> torch.Tensor:
        if hook not in moved:
            return x
        return torch.cat([moved[hook].get(number, rows).to(x) for number, rows in enumerate(x.split(pairs))])

    return put


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the sum of a function's values."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def _changes(
    projections: Sequence[Projections], runs: Sequence[Inside], moves: Mapping[str, torch.Tensor]
) -> Float[torch.Tensor, "senders entries"]:
    """Return how ablation changes what each sender adds to the residual stream, to first order, in forward-pass order.

    Args:
        projections: as in `summed_scores`.
        runs: the runs at some points, which matter only if a norm follows attention.
        moves: the changes at `sender_hooks`, `[pairs, pos, ...]`.

    Returns:
        The changes at all pairs and positions and, if a norm follows attention, at all points.
    """
    points = len(runs[0].z) // len(moves[sites.resid_pre(0)])

    def moved(hook: str) -> torch.Tensor:
        return moves[hook].repeat(points, *[1] * (moves[hook].dim() - 1))

    entering = moved(sites.resid_pre(0))
    changes = entering.new_empty(
        1 + sum(len(each.out) + (each.layer.mlp is not None) for each in projections), entering.numel()
    )
    changes[0], filled = entering.flatten(), 1
    for layer, (of_layer, inside) in enumerate(zip(projections, runs, strict=True)):
        below, filled = filled, filled + len(of_layer.out)
        z = moved(sites.component(layer, "z"))
        changes[below:filled] = of_layer.first_order(inside.z.flatten(0, 1), z.flatten(0, 1)).flatten(1)
        if of_layer.layer.mlp is not None:
            changes[filled], filled = moved(sites.component(layer, "mlp_out")).flatten(), filled + 1
    return changes


def _scores(
    projections: Sequence[Projections],
    runs: Sequence[Inside],
    gradient: torch.Tensor,
    cut: Put,
    changes: torch.Tensor,
    regions: torch.Tensor | None,
) -> torch.Tensor:
    """Return the products of what senders change with the gradients at what receivers read, for all edges.

    Args:
        gradient: the gradient at the residual stream after the last layer.
        cut: the function that stops gradients.
    """
    scores: list[torch.Tensor] = []

    def score(gradients: torch.Tensor, senders: int) -> None:
        flat = wide(gradients).to(changes.device).flatten(1)
        flat = flat.unflatten(1, (-1, changes.shape[1])).sum(1)  # over points that share changes
        if regions is None:
            scores.append((flat @ changes[:senders].T).flatten())
            return
        by_row = torch.einsum("rnd,snd->rsn", *(x.unflatten(1, (-1, width)) for x in (flat, changes[:senders])))
        at = regions.repeat(by_row.shape[2] // len(regions), 1)
        scores.append((by_row @ at.to(by_row)).flatten())

    senders, width, stream = len(changes), gradient.shape[-1], gradient.flatten(0, 1)
    score(stream[None], senders)
    for layer, of_layer, inside in reversed([*zip(range(len(runs)), projections, runs, strict=True)]):
        stream, below = stream.to(of_layer.out), senders - len(of_layer.out) - (inside.written is not None)
        of_mlp = torch.zeros_like(stream)
        if inside.written is not None:
            passing = cut(sites.component(layer, "mlp_out"), stream.view_as(inside.stream)).flatten(0, 1)
            of_mlp = of_layer.pull_mlp(inside.read.flatten(0, 1), [x.flatten(0, 1) for x in inside.inner], passing)
            score(of_mlp[None], below if of_layer.layer.parallel else senders - 1)
        mid = stream if of_layer.layer.parallel else stream + of_mlp
        of_z = of_layer.pull_outputs(inside.z.flatten(0, 1), mid).view_as(inside.z)
        of_heads = of_layer.pull_attention(inside.q, inside.k, inside.v, cut(sites.component(layer, "z"), of_z))
        length = inside.q.shape[1]
        each = of_layer.pull(inside.stream.flatten(0, 1), [x[:, -length:].flatten(0, 1) for x in of_heads])
        score(each, below)
        stream, senders = stream + of_mlp + each.sum(0), below
    return torch.cat(scores[::-1])
