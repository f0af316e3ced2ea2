"""Small random models of many architectures, float64, weights far from any symmetry. Nothing here imports featpatch."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, WIDTH, LAYERS, HEADS, D_HEAD = 40, 16, 3, 4, 4
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 24,
    "num_key_value_heads": 2, "attn_implementation": "eager", "max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": D_HEAD, "query_pre_attn_scalar": 7, "sliding_window": 3}


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)


def bridge(hugging_face: Any) -> Any:
    hugging_face = hugging_face.double().eval()
    randomise(hugging_face)
    name, config = type(hugging_face).__name__, hugging_face.config
    return build_bridge_from_module(hugging_face, name, hf_config=config, tokenizer=None, device="cpu")


class Int8(torch.nn.Module):
    """A linear map as bitsandbytes quantises it: weights, and each activation too, are rounded to 8 bits."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight, scale = self.rounded(linear.weight.detach())
        self.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
        self.scale = torch.nn.Buffer(scale)

    @staticmethod
    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / scale).round(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded, scale = self.rounded(x)
        return torch.nn.functional.linear(rounded * scale, self.weight.to(x) * self.scale.to(x), self.bias)


def quantised(hugging_face: Any) -> Any:
    """A bridge to a model whose blocks are quantised."""
    hugging_face = hugging_face.double().eval()
    randomise(hugging_face)
    for module in [*hugging_face.model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8(child))
    hugging_face.config.quantization_config = {"quant_method": "bitsandbytes"}
    name, config = type(hugging_face).__name__, hugging_face.config
    return build_bridge_from_module(hugging_face, name, hf_config=config, tokenizer=None, device="cpu")


def hooked(**options: Any) -> HookedTransformer:
    common = {
        "n_layers": LAYERS, "d_model": WIDTH, "n_ctx": 32, "d_head": D_HEAD, "n_heads": HEADS, "d_mlp": 24, "d_vocab": VOCAB,
        "dtype": torch.float64, "seed": 1, "init_weights": True,
    }  # fmt: skip
    model = HookedTransformer(HookedTransformerConfig(**{**common, **options})).eval()
    randomise(model)
    return model


BRIDGES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: bridge(
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=24,
                                   attn_implementation="eager", bos_token_id=0, eos_token_id=0))),
    "neox": lambda: bridge(
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                                         intermediate_size=24, rotary_pct=0.5, attn_implementation="eager"))),
    "neox, sequential": lambda: bridge(
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                                         intermediate_size=24, use_parallel_residual=False, attn_implementation="eager"))),
    "llama": lambda: bridge(LlamaForCausalLM(LlamaConfig(**LLAMA))),
    "qwen2": lambda: bridge(Qwen2ForCausalLM(Qwen2Config(**LLAMA))),
    "qwen3": lambda: bridge(Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=D_HEAD))),
    "gemma2": lambda: bridge(
        Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0))),
    "gemma3": lambda: bridge(Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA))),
}  # fmt: skip

EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
OTHERS: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: bridge(Olmo2ForCausalLM(Olmo2Config(**LLAMA))),
    "olmoe": lambda: bridge(OlmoeForCausalLM(OlmoeConfig(**LLAMA, **EXPERTS, num_experts=4))),
    "qwen3 moe": lambda: bridge(
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=D_HEAD, num_experts=4, moe_intermediate_size=8))),
    "gptj": lambda: bridge(
        GPTJForCausalLM(GPTJConfig(vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, rotary_dim=2))),
    "gpt-oss": lambda: bridge(GptOssForCausalLM(GptOssConfig(**LLAMA, **EXPERTS, head_dim=D_HEAD, num_local_experts=4))),
}  # fmt: skip

UNUSUAL: dict[str, Callable[[], Any]] = {
    "olmo": lambda: bridge(OlmoForCausalLM(OlmoConfig(**LLAMA))),
    "cohere": lambda: bridge(CohereForCausalLM(CohereConfig(**LLAMA, logit_scale=0.25, pad_token_id=0))),
}
"""Norms without weights, and logits that are scaled after the unembedding."""

ROTARY_RMS = {
    "act_fn": "silu", "normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": D_HEAD,
    "n_key_value_heads": 2, "final_rms": True, "rotary_adjacent_pairs": False,
}  # fmt: skip
HOOKED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hooked(act_fn="gelu_new"),
    "neox": lambda: hooked(
        act_fn="gelu", positional_embedding_type="rotary", rotary_dim=2, parallel_attn_mlp=True, rotary_adjacent_pairs=False),
    "gptj": lambda: hooked(
        act_fn="gelu_new", positional_embedding_type="rotary", rotary_dim=4, parallel_attn_mlp=True, rotary_adjacent_pairs=True),
    "llama": lambda: hooked(**ROTARY_RMS),
    "gemma2": lambda: hooked(
        **{**ROTARY_RMS, "act_fn": "gelu_pytorch_tanh"}, use_normalization_before_and_after=True, attn_scores_soft_cap=2.0,
        output_logits_soft_cap=3.0, use_local_attn=True, window_size=3, attn_types=["global", "local", "global"]),
    "attention only": lambda: hooked(attn_only=True, act_fn=None),
    "no norms": lambda: hooked(act_fn="relu", normalization_type=None),
    "fewer outputs than inputs": lambda: hooked(act_fn="gelu", d_vocab_out=20),
}  # fmt: skip

APART = {"bridge neox", "bridge llama", "bridge gemma3", "hooked gemma2", "hooked attention only", "hooked no norms",
         "hooked fewer outputs than inputs"}  # fmt: skip
"""Families with parts that no other has. The others are tested at length in `test_architectures`; here they are extended."""


def families(model_class: str, names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(model_class, name, marks=[pytest.mark.extended] * (f"{model_class} {name}" not in APART)) for name in names
    ]


FAMILIES = families("bridge", BRIDGES) + families("hooked", HOOKED)
