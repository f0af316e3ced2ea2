"""Models of known shapes with random weights, in TransformerLens' model classes, and a random TopK dictionary."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from sae_lens import HookedSAETransformer, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2-like model and of a dictionary at hook_resid_pre of `layer`."""

    width: int
    layers: int
    heads: int
    vocab: int
    layer: int
    d_sae: int
    k: int

    @property
    def queries(self) -> int:
        """The width of the queries of all heads together."""
        return self.width

    @property
    def keys(self) -> int:
        """The width of the keys of all heads together, and of the values."""
        return self.width

    @property
    def mlp(self) -> int:
        """The multiply-adds of an MLP per row."""
        return 8 * self.width**2


@dataclass(frozen=True)
class Gemma2Shape(Shape):
    """The sizes of a Gemma-2-like model: heads share keys, MLPs are gated, and every second layer sees only a window."""

    kv_heads: int
    d_head: int
    d_mlp: int
    window: int

    @property
    def queries(self) -> int:
        """The width of the queries of all heads together."""
        return self.heads * self.d_head

    @property
    def keys(self) -> int:
        """The width of the keys of all heads together, and of the values."""
        return self.kv_heads * self.d_head

    @property
    def mlp(self) -> int:
        """The multiply-adds of an MLP per row."""
        return 3 * self.width * self.d_mlp


SHAPES = {
    "gpt2-small": Shape(768, 12, 12, 50257, 6, 24576, 32),
    "demo": Shape(128, 4, 8, 418, 2, 1024, 12),
    "2b": Shape(2304, 26, 18, 50257, 13, 16384, 64),
}
GEMMA2_SHAPES = {
    "gemma-2-2b": Gemma2Shape(2304, 26, 8, 256000, 13, 16384, 64, kv_heads=4, d_head=256, d_mlp=9216, window=4096),
    "gemma-2-demo": Gemma2Shape(128, 4, 4, 418, 2, 1024, 12, kv_heads=2, d_head=16, d_mlp=256, window=16),
}


def models(shape: Shape, context: int, device: str) -> dict[str, Any]:
    """Return a TransformerBridge and a HookedSAETransformer with the same random weights."""
    source = gpt2(shape, context).to(device)
    return {"TransformerBridge": bridged(source), "HookedTransformer": hooked(source, shape, context)}


def gpt2(shape: Shape, context: int) -> GPT2LMHeadModel:
    """Return a Hugging Face GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        attn_implementation="eager", initializer_range=0.05, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def gemma2(shape: Gemma2Shape, context: int) -> Gemma2ForCausalLM:
    """Return a Hugging Face Gemma 2 with random weights, and with its soft caps, sliding windows and norms after each part."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.d_head, query_pre_attn_scalar=shape.d_head,
        intermediate_size=shape.d_mlp, sliding_window=shape.window, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        max_position_embeddings=context, attn_implementation="eager", initializer_range=0.05, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def bridged(source: Any) -> Any:
    """Return a TransformerBridge around a Hugging Face model."""
    name, config, device = type(source).__name__, source.config, str(source.device)
    return build_bridge_from_module(source, name, hf_config=config, tokenizer=None, device=device)


def sae_bridge(source: Any) -> SAETransformerBridge:
    """Return SAELens' kind of TransformerBridge around a Hugging Face model; attaching SAEs replaces its hook points."""
    made = bridged(source)
    made.__class__ = SAETransformerBridge  # as SAELens does: it has no constructor for a model in memory
    made._acts_to_saes, made._transcoder_output_hooks = {}, {}
    return cast(SAETransformerBridge, made)


def hooked(source: GPT2LMHeadModel, shape: Shape, context: int) -> HookedSAETransformer:
    """Return a HookedSAETransformer with the weights of a Hugging Face GPT-2."""
    options = HookedTransformerConfig(
        n_layers=shape.layers, d_model=shape.width, n_ctx=context, d_head=shape.width // shape.heads, n_heads=shape.heads,
        d_mlp=4 * shape.width, d_vocab=shape.vocab, act_fn="gelu_new", device=str(source.device), dtype=source.dtype,
        init_weights=False,
    )  # fmt: skip
    made = HookedSAETransformer(options).eval()
    with torch.no_grad():
        copy_weights(source, made, shape)
    return made


def copy_weights(source: Any, target: Any, shape: Shape) -> None:
    """Copy the weights of a Hugging Face GPT-2 into a HookedTransformer."""
    d_head = shape.width // shape.heads
    target.embed.W_E.copy_(source.transformer.wte.weight)
    target.pos_embed.W_pos.copy_(source.transformer.wpe.weight)
    target.unembed.W_U.copy_(source.lm_head.weight.T)
    target.unembed.b_U.zero_()
    norms = [(source.transformer.ln_f, target.ln_final)]
    for theirs, ours in zip(source.transformer.h, target.blocks, strict=True):
        norms += [(theirs.ln_1, ours.ln1), (theirs.ln_2, ours.ln2)]
        weights = theirs.attn.c_attn.weight.view(shape.width, 3, shape.heads, d_head).permute(1, 2, 0, 3)
        biases = theirs.attn.c_attn.bias.view(3, shape.heads, d_head)
        for name, weight, bias in zip("QKV", weights, biases, strict=True):
            getattr(ours.attn, f"W_{name}").copy_(weight)
            getattr(ours.attn, f"b_{name}").copy_(bias)
        ours.attn.W_O.copy_(theirs.attn.c_proj.weight.view(shape.heads, d_head, shape.width))
        ours.attn.b_O.copy_(theirs.attn.c_proj.bias)
        ours.mlp.W_in.copy_(theirs.mlp.c_fc.weight)
        ours.mlp.b_in.copy_(theirs.mlp.c_fc.bias)
        ours.mlp.W_out.copy_(theirs.mlp.c_proj.weight)
        ours.mlp.b_out.copy_(theirs.mlp.c_proj.bias)
    for theirs, ours in norms:
        ours.w.copy_(theirs.weight)
        ours.b.copy_(theirs.bias)


def dictionary(shape: Shape, device: str) -> TopKSAE:
    """Return a random TopK dictionary."""
    torch.manual_seed(1)
    metadata = SAEMetadata(hook_name=f"blocks.{shape.layer}.hook_resid_pre")
    config = TopKSAEConfig(
        shape.width, shape.d_sae, k=shape.k, rescale_acts_by_decoder_norm=False, metadata=metadata, device=device
    )  # fmt: skip
    sae = TopKSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.eval()
