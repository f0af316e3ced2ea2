"""Features and heads compared on indirect objects, with the same pairs, the same metric and on the same scale.

Run with `python examples/features_and_heads.py`, or cell by cell.
"""

# %% Rank features, heads and MLPs
import featpatch as fp

demo = fp.load_demo()
pairs = demo.pairs("ioi", n=16, seed=0)
features = fp.rank_features(demo.model, demo.saes, pairs, positions=["S2", "end"], progress=False)
components = fp.rank_components(demo.model, pairs, sites=["z", "mlp_out"], positions=["S2", "end"], progress=False)

# %% Print the largest effects of both rankings
print(features.top(5))
print(components.top(5))

# %% Measure which head writes which feature
both = fp.compare(features, components, model=demo.model, saes=demo.saes, pairs=pairs)
writers = both.writers
print(writers[["site", "kind", "index", "sae", "feature", "share"]].head(8).round(2).to_string(index=False))

# %% Print the result
head, feature = components.top(1, kind="head"), features.top(1)
of_feature = writers[(writers["sae"] == feature.nodes[0].sae) & (writers["feature"] == feature.nodes[0].index)].iloc[0]
print(
    f"The best head, {head.nodes[0]}, brings back {head.pooled('recovery')[0]:.0%}, the best feature, {feature.nodes[0]}, "
    f"{feature.pooled('recovery')[0]:.0%}. Most of that feature's change is written by {of_feature['site']} "
    f"{of_feature['kind']} {of_feature['index']}: {of_feature['share']:.0%}."
)
