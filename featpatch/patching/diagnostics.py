"""Diagnose how far patches move activations off the model's distribution, and what the dictionary then reads there.

With x' = x_b + delta the patched activation and f' = enc(x') its features, summed over the places (pair and position) at which
the node's value differs between the runs:

    arrived      sum sign(f_s - f_b) (f' - f_b) / sum |f_s - f_b|   over the patched features
    leakage      sum |f' - f_b| / sum |f_s - f_b|                   over the other features
    moved        mean number of other features that change by more than rounding
    norm_ratio   sum |x'| / sum |x_b|
    outside      share of places at which |x'| is outside the range of |x| in both runs of all pairs, without special tokens

A feature that is patched alone need not arrive: the directions of an overcomplete dictionary overlap, so the encoder reads a
unit of one feature in other features too, and thresholds and TopK are applied anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float

from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, each
from featpatch.frame import Frame
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import DIRECTIONS, Direction, Node, Patch, check_directions
from featpatch.pairs.pairs import Pairs, check_counterfactual
from featpatch.patching.chosen import Chosen, Values, choose
from featpatch.patching.runs import chunks
from featpatch.sae.dictionary import dictionaries

ROUNDING = 64
"""The largest change that counts as rounding, in units in the last place of the largest value."""

KINDS = ("feature", "error", "all_features", "activation")
"""The kinds of nodes that can be diagnosed."""

SUMS = ("along", "intended", "leaked", "whole", "moved", "before", "after")
"""The terms that are summed over places: numerators and denominators of the ratios above, and the norms."""


@torch.no_grad()
def diagnose(
    model: Any, saes: Any, pairs: Pairs, nodes: Sequence[Node] | Effects, *, directions: Sequence[Direction] = DIRECTIONS
) -> pd.DataFrame:
    """Diagnose what patching single nodes does to the activation, and to the features that are read from it afterwards.

    The model is run only for its activations, without patches. Pairs in which a node has the same value in both runs are left
    out of that node's numbers.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: SAEs as in `rank_features`.
        pairs: clean and corrupted prompts; their answers are not used.
        nodes: the nodes to diagnose, or a table of effects such as `effects.top(20)`; of a kind in `KINDS`, at `"all"`, a label
            or an index.
        directions: `"denoising"`, `"noising"` or both.

    Returns:
        One row per node and direction: the node's fields, `direction`, `changed_pairs` and `pairs`, and

        * `arrived`: the share of the intended change of the patched features that the encoder finds in the patched activation;
            1 is all of it. NaN for an error, which has no features.
        * `leakage`: how much the other features change, as a share of their change between the runs; 0 is none. NaN for all
            features, because there are no others.
        * `moved`: how many other features change, on average over places.
        * `norm_ratio`: the mean norm of the patched activation divided by that of the base run's activation.
        * `outside`: the share of places at which that norm is smaller or larger than any in the clean and corrupted runs.

        `arrived`, `leakage` and `moved` are NaN if the patched activation can't be encoded again: for whole activations, which
        belong to no dictionary, and for dictionaries that read and write at different hook points (transcoders). All five are
        NaN for a node that differs in no pair.

    Raises:
        FeatpatchError: there are no nodes, or a hook point, dictionary, feature, position or direction is unknown.

    Examples:
        >>> table = fp.diagnose(model, saes, pairs, effects.top(3), directions=["denoising"])
        >>> table[["index", "arrived", "leakage", "norm_ratio", "outside"]].shape
        (3, 5)
    """
    check_counterfactual(pairs)
    ways = check_directions(directions)
    nodes = getattr(nodes, "nodes", nodes)
    if not isinstance(nodes, Sequence) or not nodes or not all(isinstance(node, Node) for node in nodes):
        raise FeatpatchError(
            f"nodes={nodes!r:.80}: expected a list of at least one fp.Node, or a table of effects, such as effects.top(20)"
        )
    others = sorted({node.kind for node in nodes} - set(KINDS))
    if others:
        raise FeatpatchError(
            f"nodes are of kind {', '.join(others)}: expected only nodes of kind {', '.join(KINDS)}; leave the others out"
        )
    lens = wrap(model)
    check_tokens(pairs, lens)
    found = dictionaries(lens, saes)
    chosen = [choose(lens, Patch((node,)), found, 1, lambda _: [0])[0] for node in nodes]
    spans = each(lambda pair: [pair.positions(node.position) for node in nodes], list(pairs))
    seen = _seen(lens, pairs, chosen, spans, ways)
    return _frame(nodes, chosen, seen, len(pairs))


@dataclass(frozen=True)
class _Seen:
    """The measurements of all pairs.

    Attributes:
        places: by node and direction, for each pair the terms of `SUMS` at its places, `[places, sums]`.
        norms: the smallest and the largest norm in the unpatched runs, by hook point.
    """

    places: Mapping[tuple[int, Direction], list[torch.Tensor]]
    norms: Mapping[str, tuple[float, float]]


def _seen(
    lens: Lens, pairs: Pairs, chosen: Sequence[Chosen], spans: Sequence[Sequence[list[int]]], ways: Sequence[Direction]
) -> _Seen:
    hooks = sorted({hook for one in chosen for hook in one.hooks})
    places: dict[tuple[int, Direction], list[torch.Tensor]] = {(node, way): [] for node in range(len(chosen)) for way in ways}
    norms: dict[str, list[torch.Tensor]] = {one.site: [] for one in chosen}
    for some in chunks(pairs):
        tokens = torch.tensor([*(pairs[index].clean for index in some), *(pairs[index].corrupted for index in some)])
        both = lens.read(tokens, hooks)
        for slot, index in enumerate(some):
            pair = pairs[index]
            clean, corrupted = ({hook: both[hook][row, None] for hook in hooks} for row in (slot, slot + len(some)))
            runs = {"denoising": (corrupted, clean), "noising": (clean, corrupted)}
            first = pair.first_difference if lens.causal else 0
            for (node, way), found in places.items():
                found.append(_places(chosen[node], *runs[way], [p for p in spans[index][node] if p >= first]))
            for site, of_site in norms.items():
                of_site.extend(_norms(run[site].flatten(2))[pair.positions("all")] for run in (clean, corrupted))
    eps = {site: torch.finfo(both[site].dtype).eps for site in norms}
    return _Seen(places, {site: _range(torch.cat(of_site), ROUNDING * eps[site]) for site, of_site in norms.items()})


def _places(chosen: Chosen, base: Values, source: Values, where: list[int]) -> Float[torch.Tensor, "places sums"]:
    """Return the terms of `SUMS` in a batch of one prompt, at those of the positions at which the node's value differs."""
    dictionary = chosen.dictionary
    if dictionary is None or dictionary.behaviour.rowwise:
        base, source = ({hook: values[:, where] for hook, values in run.items()} for run in (base, source))
        where = list(range(len(where)))
    old = base[chosen.site].flatten(2)
    here = torch.zeros(old.shape[1], dtype=torch.bool)
    here[where] = True
    chosen = replace(chosen, columns=chosen.columns & here[:, None], rest=chosen.rest & here)
    new = old + chosen.delta(base, source).to(old)
    changed = (new != old).any(2)[0].cpu()
    features = torch.full((old.shape[1], 5), torch.nan, dtype=torch.float64)
    if dictionary is not None:
        before, after = (dictionary.split(run).features[0] for run in (base, source))
        changed |= ((before != after).cpu() & chosen.columns).any(1)
        if dictionary.reads == chosen.site:
            eps = max(torch.finfo(old.dtype).eps, torch.finfo(before.dtype).eps)
            found = dictionary.split({chosen.site: new}).features[0]
            features = _features(before, after, found, chosen.columns, eps)
    return torch.cat([features, _norms(old)[:, None], _norms(new)[:, None]], dim=1)[changed]


def _features(
    before: Float[torch.Tensor, "pos d_sae"],
    wanted: Float[torch.Tensor, "pos d_sae"],
    found: Float[torch.Tensor, "pos d_sae"],
    patched: Bool[torch.Tensor, "pos d_sae"],
    eps: float,
) -> Float[torch.Tensor, "pos 5"]:
    """Return the five terms of `SUMS` that are about features, at every position."""
    before, wanted, found = (features.cpu().double() for features in (before, wanted, found))
    intended, actual = wanted - before, found - before
    rounding = ROUNDING * eps * torch.maximum(before.abs(), wanted.abs()).amax(1, keepdim=True)
    terms = (
        actual * intended.sign() * patched,
        intended.abs() * patched,
        actual.abs() * ~patched,
        intended.abs() * ~patched,
        (actual.abs() > rounding) & ~patched,
    )
    return torch.stack([term.sum(1, dtype=torch.float64) for term in terms], dim=1)


def _norms(x: Float[torch.Tensor, "1 pos d"]) -> Float[torch.Tensor, " pos"]:
    """Return the norm at each position of a batch of one prompt."""
    return x[0].cpu().double().norm(dim=1)


def _range(norms: Float[torch.Tensor, " n"], rounding: float) -> tuple[float, float]:
    """Return the smallest and the largest norm, with a tolerance for rounding; an empty range if every position is special."""
    return (float(norms.min()) * (1 - rounding), float(norms.max()) * (1 + rounding)) if len(norms) else (torch.inf, -torch.inf)


def _frame(nodes: Sequence[Node], chosen: Sequence[Chosen], seen: _Seen, pairs: int) -> pd.DataFrame:
    rows = []
    for (number, way), of_pairs in seen.places.items():
        places, (low, high) = torch.cat(of_pairs), seen.norms[chosen[number].site]
        total = dict(zip(SUMS, places.sum(0), strict=True))
        norms = places[:, SUMS.index("after")]
        numbers = {
            "arrived": total["along"] / total["intended"],
            "leakage": total["leaked"] / total["whole"],
            "moved": total["moved"] / len(places),
            "norm_ratio": total["after"] / total["before"],
            "outside": ((norms < low) | (norms > high)).double().mean(),
        }
        changed = sum(bool(len(found)) for found in of_pairs)
        node = {name: getattr(nodes[number], name) for name in Node.__dataclass_fields__}
        rows.append(
            {**node, "direction": way, "changed_pairs": changed, "pairs": pairs}
            | {name: float(value) for name, value in numbers.items()}
        )
    table = Frame(rows)
    table["index"] = table["index"].astype("Int64")
    return table
