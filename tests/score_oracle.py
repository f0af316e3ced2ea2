"""Scores of edges and nodes by loops over points, with the gradient at each place from a number that is added there.

Imports nothing of ours but the other oracles: edges from forward passes put together by hand, nodes from plain hooks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from oracle import hooks
from torch import Tensor

Run = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]  # from what senders write and what is added, to logits
Measure = Callable[[Tensor], Tensor]  # from logits to a sum over pairs


def edge_scores(
    run: Run,
    edges: list[tuple[str, str]],
    now: dict[str, Tensor],
    other: dict[str, Tensor],
    groups: list[list[str]],
    scores: str,
    steps: int,
    measure: Measure,
) -> dict[tuple[str, str], float]:
    """The change of the measure with each edge ablated, as EAP-IG estimates it.

    Args:
        run: the clean run.
        edges: all edges, as sender and receiver.
        now, other: what senders write in the clean run, and their ablation values.
        groups: the senders that are moved together.
        scores, steps: as in `find_circuit`.
        measure: the metric.
    """
    puts: Iterable[dict[str, Tensor]] = [{}]
    if scores == "eap_ig_inputs":
        puts = [{"embed": other["embed"] + k / steps * (now["embed"] - other["embed"])} for k in range(steps)]
    elif scores == "eap_ig_activations":
        puts = [
            {name: (1 - k / steps) * other[name] + k / steps * now[name] for name in group}
            for group in groups
            for k in range(1, steps + 1)
        ]
    found, points = dict.fromkeys(edges, 0.0), list(puts)
    for put in points:
        pushes = {receiver: torch.zeros_like(now["embed"], requires_grad=True) for _, receiver in edges}
        gradients = torch.autograd.grad(measure(run(put, pushes)), list(pushes.values()), allow_unused=True)
        at = {name: g for name, g in zip(pushes, gradients, strict=True) if g is not None}
        for sender, receiver in edges:
            found[sender, receiver] += float(((other[sender] - now[sender]) * at.get(receiver, torch.zeros(()))).sum()) / len(
                points
            )
    return found


def node_scores(
    model: Any, tokens: Tensor, source: Tensor, saes: list[Any], nodes: list[Any], outside: Callable[[Tensor], Tensor],
    errors: str, scores: str, steps: int, measure: Measure, special: Sequence[int] = (),
) -> list[float]:  # fmt: skip
    """The change of the measure with each node ablated, in runs where everything else that is a candidate is kept.

    Args:
        tokens: the clean prompts.
        source: the prompts of the ablation values.
        outside: returns the ablation values, given those in all these prompts.
        saes: SAEs and transcoders with linear decoders.
        nodes: features, errors, heads and whole activations, of which no two share a feature, head or activation at a position.
        errors, scores, steps: as in `find_circuit`.
        measure: the metric.
        special: the positions that are never ablated.
    """
    special = list(special)
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        _, clean = model.run_with_cache(tokens)
    entry = "blocks.0.hook_resid_pre"
    owners = [(*hooks(sae), sae) for sae in saes]
    keys = {(reads if reads == writes else f"{reads} -> {writes}"): (reads, writes, sae) for reads, writes, sae in owners}
    keys |= {node.site: (node.site, node.site, None) for node in nodes if not node.sae}

    def own(key: str) -> list[Any]:
        return [node for node in nodes if (node.sae or node.site) == key]

    def value(key: str, x: Tensor, read: Tensor, kept: list[Any]) -> Tensor:
        """What is written if some of the candidates of a dictionary or hook point are kept."""
        reads, writes, sae = keys[key]
        if sae is None:
            now, mixed = x, outside(cache[writes]).clone()
        else:
            now, mixed = sae.encode(read), outside(sae.encode(cache[reads])).clone()
        mixed[:, special] = now[:, special]
        for node in kept:
            at = slice(None) if node.position == "all" else node.position
            if node.kind in ("feature", "head"):
                mixed[:, at, node.index] = now[:, at, node.index]
            elif node.kind == "activation":
                mixed[:, at] = now[:, at]
        if sae is None:
            return mixed
        error, error_other = x - sae.decode(now), outside(cache[writes] - sae.decode(sae.encode(cache[reads])))
        where = torch.full((x.shape[1], 1), errors == "in")
        where[special] = True
        for node in kept:
            if node.kind == "error":
                where[slice(None) if node.position == "all" else node.position] = True
        return sae.decode(mixed) + torch.where(where, error, error_other)

    def run(at_entry: Tensor | None, put: dict[str, Tensor], pushes: dict[str, Tensor], note: Callable[..., None]) -> Tensor:
        live: dict[str, Tensor] = {}

        def change(key: str) -> Any:
            def hook(x: Tensor, hook: Any) -> Tensor:
                read = live.get(keys[key][0], x)
                note(key, x, read)
                return (put[key] if key in put else value(key, x, read, own(key))) + pushes.get(key, 0)

            return hook

        points = [] if at_entry is None else [(entry, lambda x, hook: at_entry)]
        points += [
            (reads, lambda x, hook, reads=reads: live.update({reads: x}))
            for reads, writes, _ in keys.values()
            if reads != writes
        ]
        points += [(writes, change(key)) for key, (_, writes, _) in keys.items()]
        return measure(model.run_with_hooks(tokens, fwd_hooks=points))

    whole, gone, parts = dict[str, Tensor](), dict[str, Tensor](), dict[Any, Tensor]()

    def note(key: str, x: Tensor, read: Tensor) -> None:
        whole[key], gone[key] = value(key, x, read, own(key)), value(key, x, read, [])
        parts.update({node: value(key, x, read, [n for n in own(key) if n != node]) - whole[key] for node in own(key)})

    with torch.no_grad():
        run(None, {}, {}, note)
    runs: list[tuple[Tensor | None, dict[str, Tensor]]] = [(None, {})]
    if scores == "eap_ig_inputs":
        start = outside(cache[entry]).clone()
        start[:, special] = clean[entry][:, special]
        runs = [(start + k / steps * (clean[entry] - start), {}) for k in range(steps)]
    elif scores == "eap_ig_activations":
        runs = [(None, {key: gone[key] + k / steps * (whole[key] - gone[key])}) for key in keys for k in range(1, steps + 1)]
    found, count = dict.fromkeys(nodes, 0.0), steps if scores != "estimate" else 1
    for at_entry, put in runs:
        pushes = {key: torch.zeros_like(whole[key], requires_grad=True) for key in keys}
        value_of_run = run(at_entry, put, pushes, lambda *_: None)
        gradients = torch.autograd.grad(value_of_run, list(pushes.values()), allow_unused=True)
        for key, gradient in zip(pushes, gradients, strict=True):
            for node in own(key) if gradient is not None and (not put or key in put) else []:
                found[node] += float((parts[node] * gradient).sum()) / count
    return [found[node] for node in nodes]
