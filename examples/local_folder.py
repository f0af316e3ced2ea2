"""A Hugging Face model from a local folder, with its SAEs from folders: what you get without a network.

python examples/local_folder.py, or cell by cell.
"""

# %% Folders as save_pretrained and save_model write them
from pathlib import Path

import featpatch as fp

folder = Path(__file__).parent.parent / "checkpoints"
model, saes = fp.load(folder / "model", saes=[folder / "saes" / "blocks.2.hook_resid_pre"])

# %% Pairs from JSON lines, and the checklist
pairs = fp.Pairs.from_jsonl(model, folder / "pairs" / "capitals.jsonl")[:12]
checked = pairs.check(model)
print(checked)

# %% Features at the subject
effects = fp.rank_features(model, saes, pairs, positions=["subject", "end"], progress=False)
best = effects.top(1)
print(effects.top(3))

# %% The result
print(
    f"{'Every pair passes' if checked.ok else 'Not every pair passes'} the checklist. {best.nodes[0]} brings back "
    f"{best.pooled('recovery')[0]:.0%} of the difference between the two capitals, and {best.pooled('degradation')[0]:.0%} is lost "
    "without it."
)
