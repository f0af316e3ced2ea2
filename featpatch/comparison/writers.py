"""Writers to the residual stream: its initial value before layer 0, attention heads through W_O, and MLPs.

If a nonlinear step follows W_O (a norm of the attention output, as in Gemma 2), the outputs of the heads do not add up to what
the layer's attention writes; the attention of that layer is then a single writer. This is measured, not derived from the
architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.lens import Lens
from featpatch.pairs import Pair

ROUNDING = 8
"""The rounding error allowed in what a layer writes, as a share of the largest value, in units of the model's precision."""


@dataclass(frozen=True)
class Writer:
    """A writer to the residual stream, with fields as in `Node`: an activation that is added to it, or a head."""

    site: str
    kind: str
    index: int | None = None


@dataclass(frozen=True)
class Writers:
    """The writers to the residual stream of a model.

    Attributes:
        lens: the model.
        weights: W_O `[heads, d_head, d_model]` of each layer; None if the heads do not add up or the weights are quantised.
    """

    lens: Lens
    weights: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, lens: Lens, pair: Pair) -> "Writers":
        """Find the writers by running the prompts of one pair.

        The sum of the heads through W_O is compared with what attention adds, both without their means, which differ by a bias.
        """
        hooks = [(sites.component(layer, "z"), sites.component(layer, "attn_out")) for layer in range(lens.n_layers)]
        runs = lens.read(torch.tensor([pair.corrupted, pair.clean]), [hook for both in hooks for hook in both])
        found: list[torch.Tensor | None] = []
        for layer, both in enumerate(hooks):
            z, out = (_wide(runs[hook]).flatten(2).flatten(0, 1) for hook in both)
            readable = lens.output_weight(layer)
            if readable is None:
                found.append(None)
                continue
            weight = _wide(readable)
            heads = z @ weight.flatten(0, 1)
            differ = ((heads - heads.mean(0)) - (out - out.mean(0))).abs().max()
            adds_up = bool(differ <= rounding(lens) * torch.maximum(heads.abs().max(), out.abs().max()))
            found.append(weight if adds_up else None)
        return cls(lens, tuple(found))

    def before(self, reads: str) -> list[Writer]:
        """Return the writers upstream of a hook point of the residual stream; the first is the stream's initial value."""
        found = [Writer(sites.resid_pre(0), "activation")]
        for layer, weight in enumerate(self.weights):
            if weight is None:
                found.append(Writer(sites.component(layer, "attn_out"), "activation"))
            else:
                found += [Writer(sites.component(layer, "z"), "head", head) for head in range(len(weight))]
            if self.lens.has_mlp(layer):
                found.append(Writer(sites.component(layer, "mlp_out"), "activation"))
        return [writer for writer in found if _place(writer.site) <= _place(reads)]

    def output(self, writer: Writer, change: Mapping[str, torch.Tensor]) -> Float[torch.Tensor, "pos d_model"]:
        """Return the change in what a writer writes, given the changes `[pos, ...]` of the activations by hook point."""
        whole = change[writer.site]
        weight = self.weights[sites.layer_of(writer.site)]
        if writer.kind != "head" or weight is None:
            return whole
        return whole.reshape(len(whole), len(weight), -1)[:, writer.index] @ weight[writer.index].to(whole)


def on_stream(hook: str) -> bool:
    """Return whether a hook point is the residual stream itself."""
    return sites.entry(hook) is not None and sites.is_stream(hook)


def rounding(lens: Lens) -> float:
    """Return the rounding error allowed in what a layer writes, as a share of the largest value."""
    return max(1e-3, float(ROUNDING * torch.finfo(lens.dtype).eps))


def changes(runs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the change from the corrupted to the clean run of activations `[2, pos, ...]`, in float32 or wider."""
    return {hook: _wide(values[1]) - _wide(values[0]) for hook, values in runs.items()}


def _place(hook: str) -> tuple[int, bool]:
    """Return the place of a hook point along the residual stream: its layer, and whether it comes after the attention."""
    layer, place = sites.entry(hook) or (sites.layer_of(hook), "pre")
    return layer, place != "pre"


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
