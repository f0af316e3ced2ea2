"""Mediators: the nodes of a dictionary through which senders act on receivers at one place in the model.

    x = sum_j f_j d_j  [+ e, where the error is named]  + rest        f_j = enc(x_j), e = x_e - dec(enc(x_e))

The mediators are the named features and error of the dictionary, and a node for the rest. Each has an input of its own, `x_j`,
the sum of its own edges. The rest is what remains of its own input without the named nodes: all other features, the decoder's
bias, and the error unless it is named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.nodes import Node, Position
from featpatch.sae.codec import gain
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.nodes import names_of

Place = tuple[int, Literal["pre", "z", "attn", "mid", "mlp"]]
"""A layer, and where its mediators are: in the residual stream before attention (`"pre"`) or before the MLP (`"mid"`), in the
concatenated head outputs before W_O (`"z"`), or in the output of attention (`"attn"`) or of the MLP (`"mlp"`)."""


@dataclass(frozen=True, eq=False)
class Mediators:
    """A dictionary whose nodes are mediators.

    Attributes:
        dictionary: the dictionary.
        named: the named nodes: features, and the error if it is a node of its own.
        rest: the node for everything else.
        directions: the direction of each named feature, `[d_model]`.
    """

    dictionary: Dictionary
    named: tuple[Node, ...]
    rest: Node
    directions: Mapping[Node, torch.Tensor]

    @classmethod
    def of(cls, dictionary: Dictionary, named: Sequence[Node]) -> "Mediators":
        """Make mediators of the named nodes of a dictionary; raise a FeatpatchError unless its decoder is linear."""
        if not dictionary.behaviour.linear:
            raise FeatpatchError(
                f"{dictionary.name} ({dictionary.codec.kind}): expected, for edges, a dictionary with a linear decoder; leave "
                "its nodes out"
            )
        features = [node for node in named if node.kind == "feature"]
        indices = torch.tensor([node.index for node in features], dtype=torch.long)
        rest = Node(dictionary.writes, "rest", None, "all", dictionary.name)
        return cls(dictionary, tuple(named), rest, dict(zip(features, dictionary.directions(indices), strict=True)))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The named nodes, then the rest."""
        return *self.named, self.rest

    @property
    def place(self) -> Place:
        """The place of the mediators; raises a FeatpatchError if the dictionary's hook points are not those of one."""
        reads, writes = self.dictionary.reads, self.dictionary.writes
        layer = sites.layer_of(writes)
        of_mlp = writes == sites.component(layer, "mlp_out") and sites.seen_at(reads) == (layer, "mid")
        if of_mlp and sites.layer_of(reads) == layer:
            return layer, "mlp"
        if reads == writes and writes == sites.component(layer, "attn_out"):
            return layer, "attn"
        if reads == writes and writes == sites.component(layer, "z"):
            return layer, "z"
        found = sites.entry(writes)
        if reads == writes and sites.is_stream(writes) and found is not None:
            return found[0], "mid" if found[1] == "mid" else "pre"
        raise FeatpatchError(
            f"{self.dictionary.name} reads at {reads} and writes at {writes}: expected, for edges, a dictionary of the "
            "residual stream, of hook_z, hook_attn_out or hook_mlp_out, or an MLP transcoder"
        )

    def shares(
        self,
        read: Float[torch.Tensor, "rows *shape pos d_in"],
        passing: Float[torch.Tensor, "rows *shape pos d_model"],
        which: Sequence[int],
        where: Bool[torch.Tensor, "named pairs pos"],
    ) -> dict[Node, torch.Tensor]:
        """Return the output of each node for its own input, `[*shape, pos, d_model]`, with its gradient.

        Args:
            read: the activations that the dictionary reads, one row per different input.
            passing: the activations that are the sum of features, error and rest, one row per different input.
            which: the row of each node's input.
            where: mask of the positions of the named nodes.
        """
        found: dict[Node, torch.Tensor] = {}
        for row, (x, y) in enumerate(zip(read, passing, strict=True)):
            of_row = [node for node, own in zip(self.nodes, which, strict=True) if own == row]
            parts = self._parts(self.named if self.rest in of_row else of_row, x, y, where)
            whole = parts | ({self.rest: y - sum(parts.values(), torch.zeros_like(y))} if self.rest in of_row else {})
            found |= {node: whole[node] for node in of_row}
        return {node: found[node] for node in self.nodes}

    def fixed(
        self, features: torch.Tensor, error: torch.Tensor, passing: torch.Tensor, where: Bool[torch.Tensor, "named pairs pos"]
    ) -> dict[Node, torch.Tensor]:
        """Return the output of each node, `[pairs, pos, d_model]`, for given features, error and whole activation.

        Args:
            features, error: `[1, pos, ...]`; the dictionary must not scale features.
            passing: the activation that is the sum of features, error and rest, `[1, pos, d_model]`.
            where: mask of the positions of the named nodes.
        """
        found = {}
        for node, here in zip(self.named, where, strict=True):
            value = error if node.kind == "error" else features[..., node.index, None] * self.directions[node].to(features)
            found[node] = value.to(passing) * here[..., None].to(passing.device)
        return found | {self.rest: passing - sum(found.values(), torch.zeros_like(passing))}

    def _parts(
        self, nodes: Sequence[Node], read: torch.Tensor, passing: torch.Tensor, where: torch.Tensor
    ) -> dict[Node, torch.Tensor]:
        """Return the outputs of some named nodes that have the same input."""
        codec, code = self.dictionary.codec, self.dictionary.encode(read.flatten(0, -3))
        features = code.features * gain(codec, code.state) if self.dictionary.behaviour.scaled else code.features
        found = {}
        for node in nodes:
            if node.kind == "error":
                value = passing.flatten(0, -3) - codec.decode(code.features, code.state).to(passing)
            else:
                value = (features[..., node.index, None] * self.directions[node].to(features)).to(passing)
            here = where[self.named.index(node)][..., None].to(passing.device)
            found[node] = value.unflatten(0, passing.shape[:-2]) * here
        return found

    def where(
        self, tokens_at: Callable[[int, Position], Sequence[int]], some: Sequence[int], length: int
    ) -> Bool[torch.Tensor, "named runs pos"]:
        """Return a mask of the positions of the named nodes in some equally long runs.

        Args:
            tokens_at: returns the token positions in a run that a node's position stands for.
            some: the indices of the runs.
            length: their number of tokens.

        Raises:
            FeatpatchError: two nodes are the same feature, or both the error, at the same position.
        """
        found = torch.zeros(len(self.named), len(some), length, dtype=torch.bool)
        for n, node in enumerate(self.named):
            for slot, index in enumerate(some):
                found[n, slot, list(tokens_at(index, node.position))] = True
        for one in self.named:
            same = [n for n, node in enumerate(self.named) if node.index == one.index]
            if (found[same].sum(0) > 1).any():
                raise FeatpatchError(
                    f"{', '.join(str(self.named[n]) for n in same)} overlap: expected each feature at most once per position; "
                    "remove one of them"
                )
        return found


def mediators_of(nodes: Sequence[Node], found: Sequence[Dictionary]) -> dict[Place, Mediators]:
    """Return the mediators for some features and error terms, by place.

    Raises:
        FeatpatchError: a node is not a feature or error of a dictionary, a dictionary can't provide mediators, or two
            dictionaries are at the same place.
    """
    by_name = {dictionary.name: dictionary for dictionary in found}
    for node in nodes:
        owner = by_name.get(node.sae)
        if node.kind not in ("feature", "error") or owner is None or owner.writes != node.site:
            raise FeatpatchError(
                f"node {str(node)!r}: expected a feature or error of {names_of(found)}; embedding, heads and MLPs need not "
                "be named, they always have edges"
            )
    made: dict[Place, Mediators] = {}
    for name in dict.fromkeys(node.sae for node in nodes):
        one = Mediators.of(by_name[name], [node for node in nodes if node.sae == name])
        if one.place in made:
            raise FeatpatchError(
                f"{made[one.place].dictionary.name} and {name} are at the same place in the model: expected nodes of one "
                "dictionary there; leave out the nodes of the other"
            )
        made[one.place] = one
    return made
