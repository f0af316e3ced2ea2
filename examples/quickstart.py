"""Quickstart: which features make the shipped model give things to the right person?

Run with `python examples/quickstart.py`, or cell by cell in an editor that supports `# %%`.
"""

# %% Load a model, its SAEs, and pairs of prompts that differ in one name
import featpatch as fp

demo = fp.load_demo()
pairs = demo.pairs("ioi", n=16, seed=0)
print(demo.model.tokenizer.decode(pairs[0].clean))
print(demo.model.tokenizer.decode(pairs[0].corrupted))

# %% Patch every feature that differs, one at a time, in both directions, at the second name and at the last word
effects = fp.rank_features(demo.model, demo.saes, pairs, positions=["S2", "end"], progress=False)
print(effects.top(5))

# %% Describe the words on which the first features are active
best = effects.top(3)
for node, description in fp.max_activating(demo.model, demo.saes, best.nodes, demo.text()).items():
    print(node, "fires", description)

# %% Write everything to one HTML file
fp.report(effects, "featpatch-examples/quickstart.html", model=demo.model, saes=demo.saes, pairs=pairs)

# %% Print the result
sites = effects.sites().set_index(["sae", "position"])
early, late = (
    sites.loc[key, "recovery_all_features"] for key in (("blocks.1.hook_resid_pre", "S2"), ("blocks.3.hook_resid_post", "end"))
)
print(
    f"All features at the second name before layer 1 bring back {early:.0%} of the behaviour, all at the last word after "
    f"layer 3 {late:.0%}. The best single feature brings back {best.pooled('recovery')[0]:.0%}: it stands for one name, and "
    f"matters in {best.changed_pairs[0]} of {len(pairs)} pairs only."
)
