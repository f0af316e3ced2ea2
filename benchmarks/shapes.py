"""Models of known shapes with random weights, in both of TransformerLens' model classes, and a random TopK dictionary."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import HookedSAETransformer, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel


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


SHAPES = {
    "gpt2-small": Shape(768, 12, 12, 50257, 6, 24576, 32),
    "demo": Shape(128, 4, 8, 418, 2, 1024, 12),
    "2b": Shape(2304, 26, 18, 50257, 13, 16384, 64),
}


def models(shape: Shape, context: int, device: str) -> dict[str, Any]:
    """Return a TransformerBridge and a HookedSAETransformer with the same random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab, n_positions=context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        attn_implementation="eager", initializer_range=0.05, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hugging_face = GPT2LMHeadModel(config).eval().to(device)
    options = HookedTransformerConfig(
        n_layers=shape.layers, d_model=shape.width, n_ctx=context, d_head=shape.width // shape.heads, n_heads=shape.heads,
        d_mlp=4 * shape.width, d_vocab=shape.vocab, act_fn="gelu_new", device=device, init_weights=False,
    )  # fmt: skip
    hooked = HookedSAETransformer(options).eval()
    with torch.no_grad():
        copy_weights(hugging_face, hooked, shape)
    bridge = build_bridge_from_module(hugging_face, "GPT2LMHeadModel", hf_config=config, tokenizer=None, device=device)
    return {"TransformerBridge": bridge, "HookedTransformer": hooked}


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
