"""Where what passes from sender to receiver goes through a dictionary: there its named nodes stand in between, and the rest.

    x = sum_j f_j d_j  [+ e, where the error is named]  + rest        f_j = enc(x_j), e = x_e - dec(enc(x_e))

Each node sees an input of its own, `x_j`, put together from its own edges. The rest is what the named nodes leave of the input
of the rest: features that aren't named, the decoder's bias, and the error unless it is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens
from featpatch.lens.behaviour import gain
from featpatch.pairs import Pairs
from featpatch.pairs.spans import spans
from featpatch.patch import Node

Place = tuple[int, Literal["pre", "attn", "mid", "mlp"]]
"""A block, and what is cut there: the stream at its entry or before its MLP, what its attention or its MLP adds."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A dictionary and the nodes that are named of it.

    Attributes:
        named: features, and the error if it stands by itself.
        rest: what they leave.
        directions: what a unit of each feature adds, in the order of `named`, `[features, d_model]`.
    """

    dictionary: Dictionary
    named: tuple[Node, ...]
    rest: Node
    directions: torch.Tensor

    @classmethod
    def of(cls, dictionary: Dictionary, named: Sequence[Node]) -> "Cut":
        """Raises FeatpatchError where features have no directions of their own."""
        if not dictionary.behaviour.linear:
            raise FeatpatchError(
                f"{dictionary.name} ({dictionary.codec.kind}): expected a dictionary whose decoder is linear, for edges"
            )
        indices = torch.tensor([node.index for node in named if node.index is not None], dtype=torch.long)
        rest = Node(dictionary.writes, "rest", None, "all", dictionary.name)
        return cls(dictionary, tuple(named), rest, dictionary.directions(indices))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The named ones, then the rest."""
        return *self.named, self.rest

    @property
    def place(self) -> Place:
        """Raises FeatpatchError where a dictionary reads or writes elsewhere."""
        reads, writes = self.dictionary.reads, self.dictionary.writes
        layer = sites.layer_of(writes)
        of_mlp = writes == sites.component(layer, "mlp_out") and sites.seen_at(reads) == (layer, "mid")
        if of_mlp and sites.layer_of(reads) == layer:
            return layer, "mlp"
        if reads == writes and writes == sites.component(layer, "attn_out"):
            return layer, "attn"
        found = sites.entry(writes)
        if reads == writes and sites.is_stream(writes) and found is not None:
            return found[0], "mid" if found[1] == "mid" else "pre"
        raise FeatpatchError(
            f"{self.dictionary.name} reads at {reads} and writes at {writes}: expected, for edges, a dictionary of the stream, "
            "of hook_attn_out or hook_mlp_out, or a transcoder of an MLP"
        )

    def shares(
        self,
        read: Float[torch.Tensor, "rows *shape pos d_in"],
        passing: Float[torch.Tensor, "rows *shape pos d_model"],
        which: Sequence[int],
        where: Bool[torch.Tensor, "named pairs pos"],
    ) -> dict[Node, torch.Tensor]:
        """What each node writes, `[*shape, pos, d_model]`, of its own input; with its gradient.

        Args:
            read: what the dictionary reads.
            passing: what it would write without error.
            which: the row of each node's input.
            where: the positions of the named nodes.
        """
        found: dict[Node, torch.Tensor] = {}
        for row, (x, y) in enumerate(zip(read, passing, strict=True)):
            of_row = [node for node, own in zip(self.nodes, which, strict=True) if own == row]
            parts = self._parts(self.named if self.rest in of_row else of_row, x, y, where)
            whole = parts | ({self.rest: y - sum(parts.values(), torch.zeros_like(y))} if self.rest in of_row else {})
            found |= {node: whole[node] for node in of_row}
        return {node: found[node] for node in self.nodes}

    def _parts(
        self, nodes: Sequence[Node], read: torch.Tensor, passing: torch.Tensor, where: torch.Tensor
    ) -> dict[Node, torch.Tensor]:
        """What some named nodes write of the same input."""
        codec = self.dictionary.codec
        code = codec.encode(read.flatten(0, -3))
        if read.requires_grad and not code.features.requires_grad:
            raise FeatpatchError(
                f"{self.dictionary.name} ({codec.kind}) encodes without a gradient: expected an SAE of sae-lens, or "
                "scores='exact'"
            )
        features = code.features * gain(codec, code.state) if self.dictionary.behaviour.scaled else code.features
        directions = dict(zip((node for node in self.named if node.kind == "feature"), self.directions, strict=True))
        found = {}
        for node in nodes:
            if node.kind == "error":
                value = passing.flatten(0, -3) - codec.decode(code.features, code.state).to(passing)
            else:
                value = (features[..., node.index, None] * directions[node].to(features)).to(passing)
            here = where[self.named.index(node)][..., None].to(passing.device)
            found[node] = value.unflatten(0, passing.shape[:-2]) * here
        return found

    def where(self, pairs: Pairs, some: Sequence[int]) -> Bool[torch.Tensor, "named pairs pos"]:
        """The positions of the named nodes in some equally long pairs.

        Raises:
            FeatpatchError: two nodes are the same feature or the error, at the same position.
        """
        found = torch.zeros(len(self.named), len(some), len(pairs[some[0]]), dtype=torch.bool)
        for n, node in enumerate(self.named):
            for slot, index in enumerate(some):
                found[n, slot, spans(pairs[index], [node.position])[node.position]] = True
        for one in self.named:
            same = [n for n, node in enumerate(self.named) if node.index == one.index]
            if (found[same].sum(0) > 1).any():
                raise FeatpatchError(
                    f"{', '.join(str(self.named[n]) for n in same)} share positions: expected each feature once at a position"
                )
        return found


def cuts(lens: Lens, nodes: Sequence[Node], found: Sequence[Dictionary]) -> dict[Place, Cut]:
    """The cuts that some features and error terms need, by place.

    Raises:
        FeatpatchError: a node that is none of a dictionary, a dictionary that can't stand in between, or two at one place.
    """
    by_name = {dictionary.name: dictionary for dictionary in found}
    for node in nodes:
        owner = by_name.get(node.sae)
        if node.kind not in ("feature", "error") or owner is None or owner.writes != node.site:
            raise FeatpatchError(
                f"node {str(node)!r}: expected a feature or an error of {sorted(by_name)}; embedding, heads and MLPs are among "
                "the edges anyway"
            )
    made: dict[Place, Cut] = {}
    for name in dict.fromkeys(node.sae for node in nodes):
        cut = Cut.of(by_name[name], [node for node in nodes if node.sae == name])
        if cut.place in made:
            raise FeatpatchError(
                f"{made[cut.place].dictionary.name} and {name} are at the same place: expected nodes of one dictionary there"
            )
        made[cut.place] = cut
    return made
