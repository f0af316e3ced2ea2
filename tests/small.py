"""Small random models with random dictionaries, in float64. Nothing here imports featpatch."""

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, WIDTH, HEADS, LAYERS, FEATURES = 40, 16, 4, 3, 24


@dataclass(frozen=True)
class Small:
    """A model with SAEs at every kind of site; `clean` and `corrupted` are token tensors `[pairs, pos]`."""

    model: Any
    saes: list[SAE] = field(repr=False)
    clean: torch.Tensor = field(default_factory=lambda: _tokens(0))
    corrupted: torch.Tensor = field(default_factory=lambda: _tokens(1))
    correct: torch.Tensor = field(default_factory=lambda: torch.tensor([3, 5, 7]))
    wrong: torch.Tensor = field(default_factory=lambda: torch.tensor([4, 6, 8]))

    def at(self, hook: str) -> SAE:
        """The dictionary that reads at a hook."""
        return next(sae for sae in self.saes if sae.cfg.metadata.hook_name == hook)


def _tokens(run: int) -> torch.Tensor:
    tokens = torch.randint(10, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    if run:
        tokens[:, 3] = (tokens[:, 3] + 3) % VOCAB
        tokens[0, 5] = (tokens[0, 5] + 1) % VOCAB
    return tokens


def small_bridge() -> Small:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=32, initializer_range=0.3,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hugging_face = GPT2LMHeadModel(config).double().eval()
    bridge = build_bridge_from_module(hugging_face, "GPT2LMHeadModel", hf_config=config, tokenizer=None, device="cpu")
    return Small(bridge, dictionaries("blocks.1.mlp.hook_in"))


def small_hooked() -> Small:
    torch.manual_seed(1)
    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=16, d_head=WIDTH // HEADS, n_heads=HEADS, d_mlp=32, d_vocab=VOCAB,
        act_fn="gelu", dtype=torch.float64, seed=1, init_weights=True, initializer_range=0.3,
    )  # fmt: skip
    return Small(HookedTransformer(config).eval(), dictionaries("blocks.1.ln2.hook_normalized"))


def dictionaries(transcoder_reads: str) -> list[SAE]:
    hooks = [
        "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post",
    ]  # fmt: skip
    saes: list[SAE] = [standard(hook, seed) for seed, hook in enumerate(hooks)]
    metadata = at("blocks.2.hook_resid_pre")
    topk = TopKSAEConfig(WIDTH, FEATURES, "float64", k=6, rescale_acts_by_decoder_norm=False, metadata=metadata)
    saes.append(randomised(TopKSAE(topk), 9))
    saes.append(standard("blocks.1.attn.hook_z", 10, reshape_activations="hook_z"))
    metadata = at(transcoder_reads, "blocks.1.hook_mlp_out")
    transcoder = TranscoderConfig(WIDTH, FEATURES, "float64", d_out=WIDTH, apply_b_dec_to_input=False, metadata=metadata)
    saes.append(randomised(Transcoder(transcoder), 11))
    return saes


def standard(hook: str, seed: int, **options: Any) -> SAE:
    return randomised(StandardSAE(StandardSAEConfig(WIDTH, FEATURES, "float64", metadata=at(hook), **options)), seed)


def at(hook: str, hook_out: str | None = None) -> SAEMetadata:
    return SAEMetadata(hook_name=hook, **({"hook_name_out": hook_out} if hook_out else {}))


def randomised(sae: SAE, seed: int) -> SAE:
    """Random weights and biases, far from any symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae
