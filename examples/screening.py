"""A screened ranking: estimates choose the features that are patched, and a random sample bounds how many were missed.

Run with `python examples/screening.py`, or cell by cell.
"""

# %% Estimate the effects of all features from one forward and backward pass per run
import featpatch as fp

demo = fp.load_demo()
pairs = demo.pairs("ioi", n=16, seed=0)
where = {"positions": ["S2", "end"], "progress": False}
estimate = fp.rank_features(demo.model, demo.saes, pairs, method="atp", **where)
print(estimate.top(3))

# %% Patch the 150 features with the largest estimates and 300 others, drawn at random
screened = fp.rank_features(demo.model, demo.saes, pairs, screen=fp.Screen(k=150, audit=300), **where)
print(screened.top(5))
audit = screened.audit()
print(audit)

# %% Compare with the full sweep, which is affordable here
full = fp.rank_features(demo.model, demo.saes, pairs, **where)
truth = set(full.take(full.ranked).take((-full.take(full.ranked).sizes()).argsort()[:20]).nodes)
found = len(truth & set(screened.nodes))
agreement = fp.calibrate(estimate, full).table().set_index("site")["pearson"]

# %% Print the result
print(
    f"{found} of the true top 20 were patched; the audit guaranteed at least {audit.recall:.0%}. The estimates correlate with "
    f"the exact effects at {agreement['all']:.2f} over all hook points, at {agreement['blocks.3.hook_resid_post']:.2f} after "
    f"the last layer and at {agreement['blocks.1.hook_resid_pre']:.2f} before layer 1. Here estimates are not reliable far "
    "from the output."
)
