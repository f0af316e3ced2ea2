"""Your own model and SAEs: a Hugging Face model in memory, a sae-lens SAE, and a dictionary of any other kind.

Run with `python examples/own_model.py`, or cell by cell.
"""

# %% Make a model, here GPT-2 with random weights, so that nothing is downloaded
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import GPT2Config, GPT2LMHeadModel

import featpatch as fp

torch.manual_seed(0)
hugging_face = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=3, n_head=4)).eval()
tokenizer = fp.load_demo().model.tokenizer

# %% Make an SAE whose configuration names its hook point
hook = "blocks.1.hook_resid_pre"
sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, metadata=SAEMetadata(hook_name=hook)))

# %% Load both; check=False skips the self-check, because a random SAE does not fit
model, saes = fp.load(hugging_face, saes=sae, tokenizer=tokenizer, check=False)

# %% Make pairs from token ids; fp.Pairs.from_prompts makes them from texts
clean = torch.randint(4, 100, (8, 10), generator=torch.Generator().manual_seed(1))
clean[:, 0] = tokenizer.bos_token_id  # model(text) puts BOS first too
corrupted = clean.clone()
corrupted[:, 4] = 4 + (clean[:, 4] - 3) % 96
pairs = fp.Pairs.from_tokens(clean, corrupted, correct=torch.full((8,), 7), wrong=torch.full((8,), 9))


# %% Rank features of the SAE and of a dictionary of your own, which can be any object with encode and decode
class Halves(torch.nn.Module):
    """A dictionary whose features are the positive and the negative part of every coordinate."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.relu(), (-x).relu()], dim=-1)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        up, down = features.chunk(2, dim=-1)
        return up - down


halves = fp.dictionaries.adapt(Halves(), hook, d_in=32, name="halves")
effects = fp.rank_features(model, [*saes, halves], pairs, progress=False)
print(effects.top(5))

# %% Print the result
sites = effects.sites().set_index("sae")
print(
    f"At {hook} the whole activation brings back {sites.loc['halves', 'recovery_activation']:.2f}. The random SAE's features bring "
    f"back {sites.loc[hook, 'recovery_all_features']:.2f} and its error {sites.loc[hook, 'recovery_error']:.2f}; the halves, which "
    f"reconstruct everything, {sites.loc['halves', 'recovery_all_features']:.2f} and {sites.loc['halves', 'recovery_error']:.2f}. "
    "What an SAE does not explain shows in its error term."
)
