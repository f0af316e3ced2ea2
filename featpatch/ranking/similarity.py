"""The similarity of features: of their effects, of their estimated effects, of what they write, or of where they are active.

Each feature has a profile, and the similarity of two features is the cosine of their profiles.

- `effects`: the exact change of the metric in every pair and direction.
- `attribution`: the same, estimated by gradients (attribution patching).
- `decoder`: what the feature writes, added up over the hook points of a dictionary that writes to several.
- `coactivation`: the activation on every token of a text.

Features are clustered by average linkage (Sokal & Michener 1958, from scipy): groups are joined, the most similar first, while
the mean similarity of their members is large enough.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, fcluster, linkage
from scipy.spatial.distance import squareform

from featpatch.attribution.features import estimate_features
from featpatch.attribution.gradients import Gradients
from featpatch.descriptions import read_features
from featpatch.effects.audit import Array
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.metrics import Metrics, leading
from featpatch.model.lens import Lens
from featpatch.nodes import Combine, Direction, Node
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs
from featpatch.sae.dictionary import Dictionary


def effect_profiles(effects: Effects, nodes: Sequence[Node]) -> Array:
    """Return the change of the metric by each node in every pair and direction, `[nodes, pairs * directions]`; or 0."""
    number = {node: row for row, node in enumerate(effects.nodes)}
    changes = np.hstack([effects.changes(effect).toarray() for effect in effects.directions_run()])
    rows = np.vstack([changes, np.zeros((1, changes.shape[1]))])
    return rows[[number.get(node, -1) for node in nodes]]


def attribution_profiles(
    model: Any,
    saes: Any,
    pairs: Pairs,
    nodes: Sequence[Node],
    metric: Metrics,
    directions: Sequence[Direction],
    combine: Combine | None,
    *,
    progress: bool,
) -> Array:
    """Return the estimated changes of the metric by each node in every pair and direction, `[nodes, pairs * directions]`."""
    gradients = Gradients(model, pairs, metric=leading(metric), method="atp")
    profiles: dict[Node, Array] = {}
    for position in dict.fromkeys(node.position for node in nodes):
        at: Positions = "all" if position == "all" else [position]
        estimates = estimate_features(gradients, saes, at, directions, combine, progress=progress)
        here = [node for node in nodes if node.position == position]
        profiles |= zip(here, effect_profiles(estimates, here), strict=True)
    return np.stack([profiles[node] for node in nodes])


def decoder_profiles(nodes: Sequence[Node], found: Sequence[Dictionary]) -> Array:
    """Return what a unit of each feature adds to an activation, `[nodes, d]`.

    Raises:
        FeatpatchError: a feature adds no fixed direction, or the dictionaries write activations of different widths.
    """
    profiles: dict[Node, Array] = {}
    for owner in found:
        own = [node for node in nodes if node.sae == owner.name]
        if own and not owner.behaviour.linear:
            raise FeatpatchError(
                f"similarity='decoder' with {owner.name!r} ({owner.codec.kind}), whose features add no fixed direction: "
                "expected an SAE with a linear decoder; use another similarity, such as 'effects'"
            )
        if own:
            parts = owner.by_output(owner.directions(torch.tensor([owner.number(node) for node in own])))
            profiles |= zip(own, torch.stack(list(parts.values())).sum(0).double().cpu().numpy(), strict=True)
    widths = {len(profile) for profile in profiles.values()}
    if len(widths) > 1:
        raise FeatpatchError(
            f"similarity='decoder' with activations of {', '.join(map(str, sorted(widths)))} dimensions: expected the same "
            "for all features; group the features of each hook point by themselves, or use another similarity"
        )
    return np.stack([profiles[node] for node in nodes])


def activation_profiles(
    lens: Lens, nodes: Sequence[Node], found: Sequence[Dictionary], prompts: Sequence[tuple[int, ...]]
) -> Array:
    """Return the activations of each feature on all tokens of some prompts, `[nodes, tokens]`."""
    read = read_features(lens, found, nodes, list(map(torch.tensor, prompts)))
    return torch.cat(read).T.double().cpu().numpy()


def cosines(profiles: Array) -> Array:
    """Return the cosine of every two profiles, `[nodes, nodes]`; 0 with a profile that is 0 everywhere."""
    length = np.linalg.norm(profiles, axis=1, keepdims=True)
    unit = np.divide(profiles, length, out=np.zeros_like(profiles), where=length > 0)
    return np.clip(unit @ unit.T, -1.0, 1.0)


def clusters(similarity: Array, *, least: float, count: int | None) -> list[int]:
    """Return the number of the cluster of each node, `[nodes]`.

    Args:
        similarity: the similarity of every two nodes.
        least: the least mean similarity of two clusters that are joined.
        count: the number of clusters, which replaces `least`.
    """
    if len(similarity) < 2:
        return [0] * len(similarity)
    distance = 1 - (similarity + similarity.T) / 2
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    found = fcluster(tree, 1 - least, "distance") if count is None else cut_tree(tree, count)[:, 0]
    return [int(number) for number in found]
