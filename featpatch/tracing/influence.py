"""Influence in an attribution graph, and pruning by it, with the definitions of circuit-tracer.

The matrix A `[target, source]` of direct effects is made positive and each of its rows is scaled to a sum of 1. The influence
of a node on the logits is the sum over all paths, p (A + A^2 + ...), where p holds the probabilities of the logits (Ameisen et
al. 2025, `graph.py` of decoderesearch/circuit-tracer at 4bb8c0e).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from featpatch.errors import FeatpatchError

Matrix = Float[torch.Tensor, "target source"]
Vector = Float[torch.Tensor, " node"]

STEPS = 1000
"""Maximum length of a path; it is far below this because every edge leads to a higher layer."""


def normalised(matrix: Matrix) -> Matrix:
    """Return absolute values with each row scaled to a sum of 1; rows of zeros stay zeros."""
    size = matrix.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-10)


def influence(matrix: Matrix, weights: Vector) -> Vector:
    """Return the influence of each node on the logits.

    Args:
        matrix: direct effects, normalised.
        weights: the probability of each logit; 0 for other nodes.
    """
    return _powers(matrix, weights, torch.arange(len(weights), device=weights.device))


def partial_influence(
    rows: Float[torch.Tensor, "row source"], weights: Vector, which: Int[torch.Tensor, " row"]
) -> Float[torch.Tensor, " source"]:
    """Return the influence of each node through those targets whose rows are known.

    Args:
        rows: direct effects on some targets, not normalised.
        which: the number of the node that each row belongs to.
    """
    size = rows.abs()
    return _powers(size / size.sum(1, keepdim=True).clamp(min=1e-8), weights, which)


def _powers(matrix: torch.Tensor, weights: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    current, total = weights, torch.zeros_like(weights)
    for _ in range(STEPS):
        current = current[which] @ matrix
        if not current.any():
            return total
        total = total + current
    raise FeatpatchError(
        f"influence does not end after {STEPS} steps: expected a graph without cycles; check that the transcoders write above "
        "what they read"
    )


@dataclass(frozen=True)
class Kinds:
    """The number of nodes of each kind, in the order of the nodes."""

    features: int
    errors: int
    tokens: int
    logits: int

    @property
    def ends(self) -> int:
        """The number of tokens and logits, which are always kept."""
        return self.tokens + self.logits


def scores(matrix: Matrix, weights: Vector, kinds: Kinds) -> tuple[float, float]:
    """Return the replacement score and the completeness score.

    The replacement score is the share of the influence on the logits that begins at tokens rather than at errors. The
    completeness score is the share of each node's inputs that are not errors, averaged over nodes by their influence.
    """
    scaled = normalised(matrix)
    found = influence(scaled, weights)
    errors = slice(kinds.features, kinds.features + kinds.errors)
    tokens = slice(errors.stop, errors.stop + kinds.tokens)
    replaced = found[tokens].sum() / (found[tokens].sum() + found[errors].sum())
    output = found + weights
    complete = ((1 - scaled[:, errors].sum(1)) * output).sum() / output.sum()
    return float(replaced), float(complete)


def totals(matrix: Matrix, weights: Vector, values: Vector, kinds: Kinds) -> Vector:
    """Return what the logits, weighted, lose when each node is ablated, along all paths; features have these values.

    A feature that loses a share of its inputs loses this share of its activation. Features are in the order of their layers, so
    that their effects on one another form a triangular matrix.
    """
    own = slice(0, kinds.features)
    direct = weights @ matrix
    shares = matrix[own] / values[own, None]
    system = torch.eye(kinds.features, dtype=matrix.dtype, device=matrix.device) - shares[:, own].T
    through = torch.linalg.solve_triangular(system, direct[own, None], upper=True, unitriangular=True)[:, 0]
    return direct + through @ shares


def cumulative(found: Vector) -> Vector:
    """Return for each node the share of the total influence that it has together with all nodes of larger influence."""
    values, order = found.sort(descending=True, stable=True)
    shares = torch.zeros_like(found)
    shares[order] = values.cumsum(0) / values.sum()
    return shares


def _threshold(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return the smallest of the largest values that together have a share of the total."""
    largest = values.sort(descending=True).values
    shares = largest.cumsum(0) / largest.sum()
    return largest[min(int(torch.searchsorted(shares, share)), len(largest) - 1)]


def pruned(
    matrix: Matrix, weights: Vector, kinds: Kinds, nodes: float, edges: float
) -> tuple[Bool[torch.Tensor, " node"], Bool[torch.Tensor, "target source"]]:
    """Return which nodes and which edges have a share `nodes` and `edges` of the influence.

    Tokens and logits are kept. Features without an input or an output, and errors without an output, are removed until there
    are none.
    """
    found = influence(normalised(matrix), weights)
    kept = found >= _threshold(found, nodes)
    kept[len(kept) - kinds.ends :] = True
    inside = matrix * kept[:, None] * kept
    scaled = normalised(inside)
    strength = scaled * (influence(scaled, weights) + weights)[:, None]
    links = strength >= _threshold(strength.flatten(), edges)
    links &= (strength > 0) & kept[:, None] & kept
    middle = slice(0, len(kept) - kinds.ends)
    while True:
        before = int(kept.sum())
        kept[middle] &= links[:, middle].any(0)
        kept[: kinds.features] &= links[: kinds.features].any(1)
        links &= kept[:, None] & kept
        if int(kept.sum()) == before:
            return kept, links
