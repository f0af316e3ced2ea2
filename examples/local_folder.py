"""A ranking without a network: a Hugging Face model and its SAE are loaded from local folders.

Run with `python examples/local_folder.py`, or cell by cell.
"""

# %% Load folders in the formats of save_pretrained (Hugging Face) and save_model (sae-lens)
from pathlib import Path

import featpatch as fp

folder = Path(__file__).parent.parent / "checkpoints"
model, saes = fp.load(folder / "model", saes=[folder / "saes" / "blocks.2.hook_resid_pre"], check=False)

# %% Read pairs from a JSON-lines file, check the SAE on them, and run the checklist
pairs = fp.Pairs.from_jsonl(model, folder / "pairs" / "capitals.jsonl")[:12]
print(fp.check(model, saes, pairs))
checked = pairs.check(model)
print(checked)

# %% Rank features at the subject and at the last word
effects = fp.rank_features(model, saes, pairs, positions=["subject", "end"], progress=False)
best = effects.top(1)
print(effects.top(3))

# %% Print the result
print(
    f"{'Every pair passes' if checked.ok else 'Not every pair passes'} the checklist. {best.nodes[0]} brings back "
    f"{best.pooled('recovery')[0]:.0%} of the difference between the two capitals, and {best.pooled('degradation')[0]:.0%} is lost "
    "without it."
)
