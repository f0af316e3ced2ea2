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

`edge_gradients` computes the gradients for edges, `node_graph` those for nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from featpatch import sites
from featpatch.model.backward import LIVE, RULES, Rules
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

EMBEDDING = Node(sites.EMBEDDING, "activation")
"""The sender of the first layer's input: the token embedding and, if the model adds them, position embeddings."""


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


def points_of(scores: Scores, steps: int, places: Callable[[], Sequence[tuple[Node, ...]]]) -> list[Point]:
    """Return the points of a way to score.

    Args:
        scores: the way to score.
        steps: the number of steps.
        places: returns the groups of nodes that are moved in turn for `"eap_ig_activations"`.
    """
    if scores == "eap_ig_inputs":
        return [Point((EMBEDDING,), step / steps) for step in range(steps)]
    if scores == "eap_ig_activations":
        return [Point(place, step / steps, local=True) for place in places() for step in range(1, steps + 1)]
    return [Point(rules=RULES.get(scores, LIVE))]
