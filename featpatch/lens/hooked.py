"""The lens for HookedTransformer, the model class of TransformerLens itself."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens.layer import Rotation, Stack, UnsupportedError
from featpatch.lens.lens import Lens, answering
from featpatch.lens.stack import Attention, build


@dataclass(frozen=True)
class HookedLens(Lens):
    """A lens for a `transformer_lens.HookedTransformer`."""

    def site(self, name: str) -> str:
        """Resolve the name of a hook point, see `Lens.site`.

        The output of a module is read where it is added to the residual stream, because HookedTransformer has no hook point for
        it.

        Raises:
            FeatpatchError: the model has no such hook point, or has a norm after the module.
        """
        added = sites.of_output(name)
        if added is None or name in self.hook_points or added not in self.hook_points:
            return super().site(name)
        if getattr(self.model.cfg, "use_normalization_before_and_after", False):
            raise FeatpatchError(
                f"the model has no hook {name!r}, and {added!r} comes after another norm: expected a model that has both; load "
                "it as a TransformerBridge, with fp.load"
            )
        return super().site(added)

    def resume(
        self,
        layer: int,
        resid: Float[torch.Tensor, "rows pos d_model"],
        tokens: Int[torch.Tensor, "rows pos"],
        answers: Int[torch.Tensor, " rows"],
    ) -> Float[torch.Tensor, "rows d_vocab"]:
        """Resume a run with `start_at_layer`, see `Lens.resume`; the token ids are not needed."""
        with answering(self.model.unembed, answers):
            return self._call(resid, start_at_layer=layer)[:, 0]

    def _run_upto(self, layer: int, tokens: Int[torch.Tensor, "batch pos"], **options: torch.Tensor) -> None:
        """Run the model with `stop_at_layer`."""
        self._call(tokens, stop_at_layer=None if layer == self.n_layers - 1 else layer + 1, **options)

    def _run_alone(self, layer: int, resid: Float[torch.Tensor, "rows pos d"], tokens: Int[torch.Tensor, "rows pos"]) -> None:
        """Run one layer with `start_at_layer` and `stop_at_layer`."""
        self._call(resid, start_at_layer=layer, stop_at_layer=layer + 1)

    def stack(self, shortest: int, longest: int) -> Stack:
        """Return the model as row-wise functions, see `Lens.stack`."""
        if getattr(self.model.cfg, "use_dynamic_ntk_rope", False):
            raise UnsupportedError("rotary positions that depend on the length of the prompt")
        return build(self.model, [self._attention(block.attn, longest) for block in self.model.blocks])

    def _attention(self, attn: Any, length: int) -> Attention:
        cfg = self.model.cfg
        rotary = cfg.positional_embedding_type == "rotary"
        return Attention(
            scale=1 / float(attn.attn_scale),
            softcap=cfg.attn_scores_soft_cap,
            window=cfg.window_size if attn.attn_type == "local" else None,
            rotation=Rotation(attn.rotary_cos[:length], attn.rotary_sin[:length], adjacent=bool(cfg.rotary_adjacent_pairs))
            if rotary
            else None,
        )
