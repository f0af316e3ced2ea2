"""What a change of the stream makes of it further up, while attention stays as it is in the base run.

The first pass of path patching (Wang et al. 2022, Goldowsky-Dill et al. 2023): a sender is changed, every component between it
and the receiver is frozen at its value in the base run, or only attention is and MLPs are recomputed; what then reaches the
receiver is read. Norms are recomputed.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float

from featpatch import sites
from featpatch.lens import Lens, added
from featpatch.patching.study.run import Run

Route = Literal["direct", "through_mlps"]
"""See `sites.ROUTES`."""

Place = tuple[int, str]
"""A block, and `"pre"` or `"mid"`: before its attention, or between attention and MLP."""


@dataclass(frozen=True)
class Stream:
    """Changes of the stream of one base run, one row each, as they go up.

    Attributes:
        base: activations of the run at every `resid_pre` and `attn_out` on the way.
        tokens: `[pos]`.
        entering: where each row's change comes in.
        changes: what comes in there, `[rows, pos, d_model]`, all on one device.
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
        """Whose changes come in at the place or before it."""
        return torch.tensor([sites.order(entry) <= sites.order(place) for entry in self.entering])

    def at(self, place: Place) -> Float[torch.Tensor, "rows pos d"]:
        """How much each row has changed the stream there; 0 where it comes in later."""
        if self.route == "direct":
            return self.changes * self.reached(place).to(self.changes)[:, None, None]
        if place not in self._at:
            self._at[place] = self._below(place) + self.changes * self._here(place).to(self.changes)[:, None, None]
        return self._at[place]

    def read(self, hook: str) -> Float[torch.Tensor, "rows_and_base pos ..."]:
        """An activation that sees the changed stream: that of the base run first, then of each row.

        Attention of the hook's own block is frozen too where the hook lies behind it. The last hook's values are kept, as
        receivers often share one.
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
        """What comes from the place before, through the MLP in between if there is one."""
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
