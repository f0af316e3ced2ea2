"""Your own model and SAE: a small Hugging Face model in memory, a sae-lens SAE, and a dictionary of any other kind.

python examples/own_model.py, or cell by cell.
"""

# %% A model: here GPT-2 with random weights, so that nothing is downloaded
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import GPT2Config, GPT2LMHeadModel

import featpatch as fp

torch.manual_seed(0)
hugging_face = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=3, n_head=4)).eval()
tokenizer = fp.load_demo().model.tokenizer

# %% An SAE that says at which hook it belongs
hook = "blocks.1.hook_resid_pre"
sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, metadata=SAEMetadata(hook_name=hook)))

# %% Loaded together; the self-check says how well the SAE fits (a random one does not)
model, saes = fp.load(hugging_face, saes=sae, tokenizer=tokenizer, check=False)

# %% Pairs as token ids; fp.Pairs.from_prompts takes texts
clean = torch.randint(4, 100, (8, 10), generator=torch.Generator().manual_seed(1))
clean[:, 0] = tokenizer.bos_token_id  # which model(text) puts first
corrupted = clean.clone()
corrupted[:, 4] = 4 + (clean[:, 4] - 3) % 96
pairs = fp.Pairs.from_tokens(clean, corrupted, correct=torch.full((8,), 7), wrong=torch.full((8,), 9))


# %% The SAE beside a dictionary of your own: any object with encode and decode
class Halves(torch.nn.Module):
    """Positive and negative half of every coordinate."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.relu(), (-x).relu()], dim=-1)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        up, down = features.chunk(2, dim=-1)
        return up - down


halves = fp.adapt(Halves(), hook, d_in=32, name="halves")
effects = fp.rank_features(model, [*saes, halves], pairs, progress=False)
print(effects.top(5))

# %% The result
sites = effects.sites().set_index("sae")
print(
    f"At {hook} the whole activation brings back {sites.loc['halves', 'recovery_activation']:.2f}. The random SAE's features bring "
    f"back {sites.loc[hook, 'recovery_all_features']:.2f} and its error {sites.loc[hook, 'recovery_error']:.2f}; the halves, which "
    f"reconstruct everything, {sites.loc['halves', 'recovery_all_features']:.2f} and {sites.loc['halves', 'recovery_error']:.2f}. "
    "What an SAE does not explain shows in its error term."
)
