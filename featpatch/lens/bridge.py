"""TransformerBridge: Hugging Face models behind TransformerLens hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch.lens.lens import Lens


@dataclass(frozen=True)
class BridgeLens(Lens):
    """A `transformer_lens.model_bridge.TransformerBridge`."""

    @torch.no_grad()
    def resume(
        self, layer: int, resid: Float[torch.Tensor, "rows pos d_model"], tokens: Int[torch.Tensor, "rows pos"]
    ) -> Float[torch.Tensor, "rows pos d_vocab"]:
        """Blocks below `layer` return their input and block `layer` is given `resid`.

        The bridge has no `start_at_layer`. Run this way, Hugging Face itself does masks, rotary embeddings, soft-caps
        and the final norm.
        """
        with _entering(self.model.blocks, layer, resid):
            return self.model(tokens)


@contextmanager
def _entering(blocks: Any, layer: int, resid: torch.Tensor) -> Iterator[None]:
    def unchanged(*args: Any, **kwargs: Any) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def enter(_block: Any, args: Any, kwargs: Any) -> Any:
        return ((resid, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": resid})

    below = [blocks[index] for index in range(layer)]
    handle = blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for block in below:
            block.__dict__["forward"] = unchanged
        yield
    finally:
        handle.remove()
        for block in below:
            block.__dict__.pop("forward", None)
