"""Properties of a TransformerLens model that are known without running it: its name, sizes, dtypes and weights."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from transformer_lens.utilities.quantization import quantization_method, unreadable_weight_reason


@dataclass(frozen=True)
class Model:
    """A TransformerBridge or a HookedTransformer."""

    model: Any

    @property
    def name(self) -> str:
        """The name of the model in its configuration."""
        return str(self.model.cfg.model_name)

    @property
    def kind(self) -> str:
        """The class of the model, such as `TransformerBridge`."""
        return type(self.model).__name__

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it has none."""
        return getattr(self.model, "tokenizer", None)

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return int(self.model.cfg.n_layers)

    @property
    def d_vocab(self) -> int:
        """The number of tokens that the model can answer with."""
        return int(self.model.unembed.W_U.shape[-1])

    @property
    def d_vocab_in(self) -> int:
        """The number of tokens that a prompt may hold."""
        return int(self.model.cfg.d_vocab)

    @property
    def n_ctx(self) -> int | None:
        """The maximum length of a prompt; None unless the model has learned positions, which end there."""
        cfg = self.model.cfg
        return int(cfg.n_ctx) if cfg.positional_embedding_type in ("standard", "shortformer") else None

    @property
    def adds_positions(self) -> bool:
        """Whether learned positions are added to the embedding."""
        return bool(self.model.cfg.positional_embedding_type == "standard")

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def d_mlp(self) -> int:
        """The number of neurons of an MLP; 0 for models without MLPs."""
        return int(self.model.cfg.d_mlp or 0)

    @property
    def n_heads(self) -> int:
        """The number of attention heads of a layer."""
        return int(self.model.cfg.n_heads)

    @property
    def d_head(self) -> int:
        """The width of an attention head."""
        return int(self.model.cfg.d_head)

    @property
    def weights_per_block(self) -> int:
        """The number of weights that a position is multiplied by in one layer, according to the configuration.

        A bridge may hold a joint matrix of queries, keys and values as well as the three that it is split into, so counting
        parameters would be wrong. Not exact for mixtures of experts whose experts have a size of their own.
        """
        cfg = self.model.cfg
        keys = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        attention = 2 * (cfg.n_heads + keys) * cfg.d_model * cfg.d_head
        experts = getattr(cfg, "experts_per_token", None) or 1
        return int(attention + (0 if cfg.attn_only else (3 if cfg.gated_mlp else 2) * cfg.d_model * cfg.d_mlp * experts))

    @property
    def attention_only(self) -> bool:
        """Whether the layers have no MLPs."""
        return bool(getattr(self.model.cfg, "attn_only", False))

    @cached_property
    def device(self) -> torch.device:
        """The device of the embedding, on which tokens must be."""
        return self.first_weight.device

    @cached_property
    def devices(self) -> set[torch.device]:
        """The devices that hold the weights of the model."""
        return {parameter.device for parameter in self.model.parameters()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not quantised."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.dtype.is_floating_point)

    @cached_property
    def quantised(self) -> str:
        """How the weights are quantised, so that they can be run but not read; empty if they are not."""
        parameters = self.model.parameters()
        reason = next((reason for each in parameters if (reason := unreadable_weight_reason(each))), None)
        return quantization_method(getattr(getattr(self.model, "original_model", None), "config", None)) or reason or ""

    @property
    def itemsize(self) -> int:
        """The number of bytes of a number in the first weight."""
        return int(self.first_weight.element_size())

    @property
    def first_weight(self) -> torch.Tensor:
        """The first weight, whose dtype and device are those of activations at the start of the model."""
        weight: torch.Tensor = next(self.model.parameters())
        return weight

    @property
    def unembedding(self) -> Float[torch.Tensor, "d_model d_vocab"]:
        """The matrix from the residual stream to logits."""
        weight: torch.Tensor = self.model.unembed.W_U
        return weight

    def has_mlp(self, layer: int) -> bool:
        """Return whether a layer has an MLP."""
        return getattr(self.model.blocks[layer], "mlp", None) is not None

    def output_weight(self, layer: int) -> torch.Tensor | None:
        """Return W_O of a layer, `[head, d_head, d_model]`; None if it is quantised, so that it can be run but not read."""
        try:
            weight: torch.Tensor = self.model.blocks[layer].attn.W_O
        except NotImplementedError:
            return None
        return weight
