"""What writes to the residual stream: the stream that enters block 0, heads through W_O, and MLPs.

Where something between W_O and the stream is not linear (a norm of what attention adds, as in Gemma 2), heads do not add up
one by one; then the attention of that block is one writer. Whether it is so is found out, not read off the architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.lens import Lens
from featpatch.pairs import Pair

ROUNDING = 8
"""In units of the model's precision: how far what a block writes may be off, as a share of the largest value."""


@dataclass(frozen=True)
class Writer:
    """Something that writes to the stream, named as in a `Node`: an activation that is added to it, or a head."""

    site: str
    kind: str
    index: int | None = None


@dataclass(frozen=True)
class Writers:
    """The writers of a model.

    Attributes:
        weights: W_O `[heads, d_head, d_model]` of each block; None where heads do not add up one by one, or it is quantised.
    """

    lens: Lens
    weights: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, lens: Lens, pair: Pair) -> "Writers":
        """Found out on the prompts of one pair, by comparing heads through W_O with what attention adds, less the means."""
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
        """All that write to the stream before the hook `reads` of it; first the stream that enters block 0."""
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
        """How what it writes changes, from the changes `[pos, ...]` of the activations."""
        whole = change[writer.site]
        weight = self.weights[sites.layer_of(writer.site)]
        if writer.kind != "head" or weight is None:
            return whole
        return whole.reshape(len(whole), len(weight), -1)[:, writer.index] @ weight[writer.index].to(whole)


def on_stream(hook: str) -> bool:
    """Whether a hook is the residual stream itself."""
    return sites.entry(hook) is not None and sites.is_stream(hook)


def rounding(lens: Lens) -> float:
    """How far what one block writes may be off, as a share of the largest value."""
    return max(1e-3, float(ROUNDING * torch.finfo(lens.dtype).eps))


def changes(runs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the corrupted to the clean run `[2, pos, ...]`, at least in float32."""
    return {hook: _wide(values[1]) - _wide(values[0]) for hook, values in runs.items()}


def _place(hook: str) -> tuple[int, bool]:
    """Where a hook is along the stream: the block, and whether behind its attention."""
    layer, place = sites.entry(hook) or (sites.layer_of(hook), "pre")
    return layer, place != "pre"


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
