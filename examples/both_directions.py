"""Noising against denoising: sufficient is not necessary, and the quadrants say which.

python examples/both_directions.py, or cell by cell.
"""

# %% Heads and sites at the last word, in both directions
from collections import Counter
from pathlib import Path

import featpatch as fp

demo = fp.load_demo()
pairs = demo.pairs("ioi", n=24, seed=0)
components = fp.rank_components(demo.model, pairs, sites=["attn_out", "mlp_out", "z"], positions=["S2", "end"], progress=False)

# %% Each with its quadrant, decided by both 95 % intervals at 5 % of the behaviour
table = components.to_pandas()
table["quadrant"] = components.quadrants(0.05)
print(table.sort_values("recovery", ascending=False)[["site", "index", "position", "recovery", "degradation", "quadrant"]]
      .head(10).round(2).to_string(index=False))  # fmt: skip

# %% The same as a figure
Path("featpatch-examples").mkdir(exist_ok=True)
components.plot.quadrants(0.05).write_html("featpatch-examples/both_directions.html")

# %% The result
counts = Counter(components.quadrants(0.05))
print(
    f"Of {len(components)} components, {counts['necessary and sufficient']} are necessary and sufficient for at least 5 % of the "
    f"behaviour, {counts['sufficient but redundant']} sufficient but redundant, {counts['necessary but not sufficient']} necessary "
    f"but not sufficient, {counts['irrelevant']} irrelevant; {len(pairs)} pairs leave {counts['undecided']} undecided. A low effect can "
    "still hide a backup: patch both together before calling anything unimportant."
)
