"""HookedTransformer: TransformerLens' own models."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.lens.lens import Lens


@dataclass(frozen=True)
class HookedLens(Lens):
    """A `transformer_lens.HookedTransformer`."""

    @torch.no_grad()
    def resume(
        self, layer: int, resid: Float[torch.Tensor, "rows pos d_model"], tokens: Int[torch.Tensor, "rows pos"]
    ) -> Float[torch.Tensor, "rows pos d_vocab"]:
        """`start_at_layer` of HookedTransformer; the token ids are not needed."""
        return self.model(resid, start_at_layer=layer)
