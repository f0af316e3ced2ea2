"""Propagate changes of the residual stream downstream, with attention frozen at its values in the base run.

This is the first pass of path patching (Wang et al. 2022, Goldowsky-Dill et al. 2023): a sender is changed, all components
between it and the receiver are frozen at their values in the base run (or only attention is, and MLPs are recomputed), and what
then reaches the receiver is read. Norms are recomputed.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.lens import Lens, added
from featpatch.patching.study.run import Run

Route = Literal["direct", "through_mlps"]
"""The way from a sender to a receiver; see `sites.ROUTES`."""

Place = tuple[int, str]
"""A place in the residual stream: a layer, and `"pre"` (before its attention) or `"mid"` (between attention and MLP)."""


@dataclass(frozen=True)
class Stream:
    """Changes of the residual stream of one base run, one row per change, as they propagate downstream.

    Attributes:
        lens: the model.
        base: activations of the base run at every `resid_pre` and `attn_out` that the changes pass.
        tokens: token ids of the base run, `[pos]`.
        route: which components are frozen.
        entering: the place at which each change enters the residual stream.
        changes: the changes `[rows, pos, d_model]` where they enter, all on one device.
    """

    lens: Lens
    base: Run
    tokens: torch.Tensor
    route: Route
    entering: tuple[Place, ...]
    changes: Float[torch.Tensor, "rows pos d"]
    _at: dict[Place, torch.Tensor] = field(default_factory=dict, init=False)
    _read: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    def reached(self, place: Place) -> Bool[torch.Tensor, " rows"]:
        """Return a mask of the changes that enter at the place or before it."""
        return torch.tensor([sites.order(entry) <= sites.order(place) for entry in self.entering])

    def at(self, place: Place) -> Float[torch.Tensor, "rows pos d"]:
        """Return how much each row changes the residual stream at a place; 0 for rows that enter later."""
        if self.route == "direct":
            return self.changes * self.reached(place).to(self.changes)[:, None, None]
        if place not in self._at:
            self._at[place] = self._below(place) + self.changes * self._here(place).to(self.changes)[:, None, None]
        return self._at[place]

    def read(self, hook: str) -> Float[torch.Tensor, "rows_and_base pos ..."]:
        """Return the activation at a hook point that reads the changed residual stream: first the base run's, then each row's.

        Attention in the hook point's own layer is frozen too if the hook point comes after it. The values of the last call are
        kept, because receivers often share a hook point.
        """
        if hook not in self._read:
            values = self._run_upto(hook)
            self._read.clear()
            self._read[hook] = values
        return self._read[hook]

    def _run_upto(self, hook: str) -> torch.Tensor:
        place = sites.seen_at(hook)
        change = torch.cat([torch.zeros_like(self.changes[:1]), self.at(place)])
        if sites.is_stream(hook):
            return added(self.base.at(hook), change)
        layer, behind = place[0], place[1] == "mid"
        below = torch.cat([torch.zeros_like(self.changes[:1]), self.at((layer, "pre"))]) if behind else change
        attention = sites.component(layer, "attn_out")
        put = {attention: added(self.base.at(attention), change - below)} if behind else {}
        return self.lens.through(layer, added(self.base.at(sites.resid_pre(layer)), below), self.tokens, hook, put)

    def _here(self, place: Place) -> Bool[torch.Tensor, " rows"]:
        return torch.tensor([entry == place for entry in self.entering])

    def _below(self, place: Place) -> torch.Tensor:
        """Return the change that arrives from the place before, through the MLP in between if there is one."""
        layer, where = place
        if where == "mid":
            return self.at((layer, "pre"))
        before = (layer - 1, "mid")
        if layer <= min(entry[0] for entry in self.entering):
            return torch.zeros_like(self.changes)
        change, mlp = self.at(before), sites.component(layer - 1, "mlp_out")
        if self.lens.attention_only or not bool(self.reached(before).any()):
            return change
        outputs = self.read(mlp)
        return change + (outputs[1:] - outputs[0]).to(change.device)
