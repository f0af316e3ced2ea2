"""First-order dependence of receivers on the residual stream: the hook point that each reads, and a gradient there.

With g = dm/dy at the activation that a receiver writes, the weights of the activation that it reads are chosen so that their
product with a change of that activation is the change of the metric. They derive from g for a whole activation, from g of one
head for a head, and from (d_j . g) for a feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.attribution.gradients import PairGradients
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens
from featpatch.pairs.spans import spans
from featpatch.patch import LOGITS, Direction, Node


@dataclass(frozen=True)
class Receiving:
    """A receiver of paths whose effects are estimated.

    Attributes:
        node: the node.
        reads: the hook point that the receiver reads.
        writes: the hook point at which the gradient of the metric is needed.
        dictionary: the dictionary of a feature; None for other nodes.
    """

    node: Node
    reads: str
    writes: str
    dictionary: Dictionary | None = None

    @classmethod
    def of(cls, lens: Lens, node: Node, found: Sequence[Dictionary]) -> "Receiving":
        """Return the receiver for a node.

        Raises:
            FeatpatchError: if paths into the node can't be estimated.
        """
        if node == LOGITS:
            last = sites.resid_post(lens.n_layers - 1)
            return cls(node, last, last)
        owner = next((d for d in found if d.name == node.sae and d.writes == node.site), None)
        if owner is not None and node.kind == "feature" and owner.behaviour.linear:
            return cls(node, owner.reads, owner.writes, owner)
        site = lens.site(node.site)
        whole = node.kind == "activation" and sites.entry(site) is not None
        head = node.kind == "head" and sites.is_component(site, "q", "k", "v", "z")
        if not whole and not head:
            raise FeatpatchError(
                f"receiver {str(node)!r}: expected a feature of {sorted(d.name for d in found)} with a linear decoder, a head "
                "at hook_q, hook_k, hook_v or hook_z, a whole activation, or 'logits', for estimates"
            )
        return cls(node, site, site)

    def weights(self, of_pair: PairGradients, direction: Direction) -> torch.Tensor:
        """Return the weights of the activation at `reads`, `[pos, ...]`; 0 at positions where the receiver isn't patched."""
        gradient = of_pair.gradients[direction][self.writes][0]
        position = self.node.position
        if self.node != LOGITS and position != "all":
            here = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
            here[spans(of_pair.pair, [position])[position]] = True
            gradient = gradient * here.reshape(-1, *[1] * (gradient.dim() - 1))
        if self.node.kind == "head":
            one = torch.zeros_like(gradient)
            one[:, self.node.index] = gradient[:, self.node.index]
            return one
        return gradient if self.dictionary is None else self._of_feature(of_pair, direction, gradient)

    def _of_feature(self, of_pair: PairGradients, direction: Direction, gradient: torch.Tensor) -> torch.Tensor:
        """Backpropagate the gradient through the feature's direction and the SAE's encoder."""
        dictionary, read = self.dictionary, of_pair.activations[direction][self.reads]
        assert dictionary is not None
        assert self.node.index is not None
        unit = dictionary.directions(torch.tensor([self.node.index]))[0]
        along = gradient.flatten(1).to(torch.float64) @ unit.to(gradient.device, torch.float64)
        if dictionary.behaviour.scaled:
            along = along * dictionary.gains(of_pair.split(dictionary)[direction]).to(along)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = read.detach().clone().requires_grad_()
            value = dictionary.codec.encode(leaf[None].flatten(2)).features[0, :, self.node.index]
            (found,) = torch.autograd.grad((value * along.clone().to(value)).sum(), leaf)
        return found
