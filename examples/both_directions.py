"""Denoising and noising compared: a sufficient component need not be necessary, and the quadrants tell the cases apart.

Run with `python examples/both_directions.py`, or cell by cell.
"""

# %% Rank heads, attention outputs and MLPs at the second name and the last word, in both directions
from collections import Counter
from pathlib import Path

import featpatch as fp

demo = fp.load_demo()
pairs = demo.pairs("ioi", n=24, seed=0)
components = fp.rank_components(demo.model, pairs, sites=["attn_out", "mlp_out", "z"], positions=["S2", "end"], progress=False)
components = components.with_threshold(0.05)

# %% Print their quadrants, which depend on whether both 95 % intervals lie above 5 % of the behaviour
table = components.to_pandas()
print(table.sort_values("recovery", ascending=False)[["site", "index", "position", "recovery", "degradation", "quadrant"]]
      .head(10).round(2).to_string(index=False))  # fmt: skip

# %% Plot both effects
Path("featpatch-examples").mkdir(exist_ok=True)
components.plot.quadrants().write_html("featpatch-examples/both_directions.html")

# %% Print the result
counts = Counter(components.quadrants())
print(
    f"Of {len(components)} components, {counts['both directions']} restore more than 5 % of the behaviour by themselves and also "
    f"cost more than 5 % when corrupted, {counts['denoising only']} do only the former, {counts['noising only']} only the latter, and "
    f"{counts['below threshold']} stay within 5 % in both directions; {len(pairs)} pairs leave {counts['undecided']} undecided. A low effect can still hide a "
    "backup: patch both together before calling anything unimportant."
)
