"""Receivers of paths: nodes that read the residual stream, and how they change with it.

A receiver's new value is recorded in the first pass and patched into the base run in the second, so features that are inactive
in the base run can be receivers too. A query, key or value acts through its head's z, as in `component_parts`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens
from featpatch.patch import LOGITS, Node
from featpatch.patching.paths.route import Place, Stream


@dataclass(frozen=True, eq=False)
class Receiver(ABC):
    """A node that reads the residual stream.

    Attributes:
        node: the node.
        reads: the hook points from which the receiver's new value is computed.
        writes: the hook point at which the receiver's change is patched.
    """

    node: Node
    reads: tuple[str, ...]
    writes: str

    @property
    def place(self) -> Place:
        """The last place in the residual stream that the receiver depends on."""
        return max((sites.seen_at(hook) for hook in self.reads), key=sites.order)

    def sees(self, site: str) -> bool:
        """Return whether the receiver reads what is written at a hook point."""
        return any(sites.reaches(site, hook) for hook in self.reads)

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations in the base run the receiver needs."""
        blocks = {sites.layer_of(hook) for hook in self.reads if not sites.is_stream(hook)}
        return {*self.reads, self.writes, *map(sites.resid_pre, blocks)}

    @abstractmethod
    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of the flat activation at `writes` for some changes of the residual stream, `[rows, pos, d]`.

        Args:
            stream: the changes of the residual stream.
            rows: the rows of `stream.read` to use; row 0 is the base run.
            where: mask `[pos]` of the positions at which the receiver takes its new value.
        """


class WholeReceiver(Receiver):
    """A whole activation: an MLP's output, a layer's attention output, the residual stream or, after the last layer, logits."""

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of the activation."""
        values = stream.read(self.writes).flatten(2)
        return (values[rows] - values[0]) * where[:, None].to(values)


@dataclass(frozen=True, eq=False)
class CodeReceiver(Receiver):
    """A feature of a dictionary, or the dictionary's error term."""

    dictionary: Dictionary

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return what the feature's new value adds along its direction, or how the error changes."""
        read = stream.read(self.dictionary.reads)
        if self.node.index is None:
            error = self.dictionary.split(read, stream.read(self.writes)).error
            return (error[rows] - error[0]) * where[:, None].to(error)
        written = stream.base.at(self.writes)[None]
        split = self.dictionary.split(read, written.expand(len(read), *written.shape[1:]))
        feature = torch.tensor([self.node.index])
        value = split.features[rows, :, self.node.index] - split.features[0, :, self.node.index]
        if self.dictionary.behaviour.scaled:
            value = value * self.dictionary.gains(self.dictionary.split(stream.base.at(self.dictionary.reads)[None], written))
        return (value * where.to(value))[..., None] * self.dictionary.directions(feature)[0]


@dataclass(frozen=True, eq=False)
class HeadReceiver(Receiver):
    """An attention head: its query, key or value or, at `hook_z`, all three together."""

    lens: Lens
    head: int

    def change(self, stream: Stream, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Return the change of z of the heads that use the value; for a key or value, at all positions that attend to it."""
        (hook,) = self.reads
        values = torch.cat([stream.read(hook)[:1], stream.read(hook)[rows]])
        changed = values[:1].repeat(len(values), *[1] * (values.dim() - 1))
        at = where.nonzero()[:, 0].to(values.device)
        changed[:, at, self.head] = values[:, at, self.head]
        if hook == self.writes:
            z = changed
        else:
            layer = sites.layer_of(hook)
            z = self.lens.through(
                layer, stream.base.at(sites.resid_pre(layer))[None], stream.tokens, self.writes, {hook: changed}
            )
        change = torch.zeros_like(z[1:])
        change[:, :, self._users] = z[1:, :, self._users] - z[0, :, self._users]
        return change.flatten(2)

    @property
    def _users(self) -> list[int]:
        """The heads that use the query, key or value: several if keys and values are shared."""
        shared = self.lens.heads(self.writes) // self.lens.heads(self.reads[0])
        return list(range(self.head * shared, (self.head + 1) * shared))


def receiver(lens: Lens, node: Node, found: Sequence[Dictionary]) -> Receiver:
    """Return the receiver for a node.

    Raises:
        FeatpatchError: if no path can end at the node, or its dictionary is not among those given.
    """
    if node == LOGITS:
        last = sites.resid_post(lens.n_layers - 1)
        return WholeReceiver(node, (last,), last)
    owner = next((dictionary for dictionary in found if dictionary.name == node.sae), None)
    if owner is not None and owner.writes == node.site and node.kind in ("feature", "error"):
        if node.kind == "feature" and not owner.behaviour.linear:
            raise FeatpatchError(f"receiver {str(node)!r}: expected a feature of a dictionary whose decoder is linear")
        both = tuple(dict.fromkeys((owner.reads, owner.writes)))
        return CodeReceiver(node, (owner.reads,) if node.kind == "feature" else both, owner.writes, owner)
    site = lens.site(node.site)
    z = sites.component(sites.layer_of(site), "z")
    if node.kind == "activation" and sites.entry(site) is not None:
        return WholeReceiver(node, (site,), site)
    if node.kind == "head" and (site == z or sites.is_component(site, "q", "k", "v")) and node.index is not None:
        return HeadReceiver(node, (site,), z, lens, node.index)
    raise FeatpatchError(
        f"receiver {str(node)!r}: expected a feature or error of {sorted(d.name for d in found)}, a head at hook_q, hook_k, "
        "hook_v or hook_z, a whole activation such as hook_mlp_out, or 'logits'"
    )
