"""Accuracy of gradient estimates on the shipped model, for features and components, method by method, against patched runs.

Run with `python -m examples.estimates`.
"""

from typing import Any

import pandas as pd
from rich.console import Console

import featpatch as fp
from examples.places import place
from featpatch.attribution.calibration import Calibration

METHODS = {
    "atp": "`atp`",
    "ig": "`ig`, 10 steps",
    "eap_ig_inputs": "`eap_ig_inputs`, 10 steps",
    "grad_drop": "`grad_drop`, against the size of the effect",
}


def main(pairs: int = 32) -> None:
    """Compare estimates with patched runs of the same nodes, and audit a screened ranking."""
    demo, console = fp.load_demo(), Console(width=140)
    drawn = demo.pairs("ioi", n=pairs)
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}

    exact = fp.rank_features(demo.model, demo.saes, drawn, **options)
    estimates = {
        method: fp.rank_features(demo.model, demo.saes, drawn, method=method, **options)
        for method in METHODS
    }  # fmt: skip
    for effect in ("recovery", "degradation"):
        found = fp.calibrate(estimates["atp"], exact, effect=effect)
        console.print(repr(found), highlight=False)
        console.print(found.misses(5).round(3).to_string(index=False), highlight=False)
    console.print("features, all hook points together", highlight=False)
    of_features = agreement(estimates, exact)
    console.print(of_features.round(3).to_string(), highlight=False)

    heads = {"sites": ["q", "k", "v", "z", "pattern"], **options}
    exact_heads = fp.rank_components(demo.model, drawn, **heads)
    named = {
        f"{method}{'' if fix else ' without the QK fix'}": fp.rank_components(
            demo.model, drawn, method=fp.Gradients(demo.model, drawn, method=method, qk_fix=fix), **heads
        )
        for method, fix in (("atp", False), ("atp", True), ("ig", True), ("grad_drop", True))
    }
    console.print("queries, keys, values, outputs and patterns of heads", highlight=False)
    of_heads = agreement(named, exact_heads)
    console.print(of_heads.round(3).to_string(), highlight=False)

    audit = fp.rank_features(demo.model, demo.saes, drawn, screen=fp.Screen(k=200, audit=400), **options).audit()
    console.print(repr(audit), highlight=False)
    print(told(fp.calibrate(estimates["atp"], exact), of_features, of_heads, pairs))
    print(f'Here, with {audit.screened} + {audit.sampled} of {audit.candidates} patched: "{repr(audit).split("each: ")[1]}".')


def agreement(estimates: dict[str, fp.Effects], exact: fp.Effects) -> pd.DataFrame:
    """Return the agreement of estimated and exact recovery over all rows, with a line per method."""
    return pd.DataFrame(
        {name: fp.calibrate(estimate, exact).table(20).iloc[0].drop("site") for name, estimate in estimates.items()}
    ).T.astype(float)


def told(atp: Calibration, features: pd.DataFrame, heads: pd.DataFrame, pairs: int) -> str:
    """Return the result in the words of the README."""
    sites, last = atp.table().set_index("site"), ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post")
    early = [site for site in sites.index if site.startswith("blocks.0.") or site == "blocks.1.hook_resid_pre"]
    most = max((value, row) for row, value in enumerate(atp.exact) if atp.nodes[row].sae in early)[1]
    node, pearson = atp.nodes[most], sites["pearson"]
    rows = (
        f"| {title} | {features.pearson[name]:.2f} | {features.spearman[name]:.2f} | {features.recall[name]:.2f} |"
        for name, title in METHODS.items()
    )
    return "\n".join(
        [
            f"`python -m examples.estimates` compares them with exact runs of the shipped model on {pairs} pairs of indirect "
            f"objects. Attribution patching correlates with the exact recovery at {pearson[last[0]]:.2f} and "
            f"{pearson[last[1]]:.2f} at the hook points before and after the last layer (after it with a slope of "
            f"{sites.slope[last[1]]:.1f}), and at {pearson[early].min():.2f} to {pearson[early].max():.2f} at the hook points "
            f"of layer 0 and before layer 1: the feature with the largest recovery there ({node.index} {place(node.site)}, "
            f"{atp.exact[most]:.3f}) is estimated at {atp.estimate[most]:.3f}. Over all {len(atp.nodes)} features:",
            "| estimate of recovery | Pearson | Spearman | recall of the top 20 |",
            "|---|---|---|---|",
            *rows,
            f"For queries, keys, values, outputs and patterns of heads ({heads.rows['atp']:.0f} rows) Pearson is "
            f"{heads.pearson['atp']:.2f} by `atp`, {heads.pearson['ig']:.2f} by `ig`, and {heads.pearson['grad_drop']:.2f} by `grad_drop`; "
            f"the QK fix lifts the rank correlation of `atp` from {heads.spearman['atp without the QK fix']:.2f} to "
            f"{heads.spearman['atp']:.2f}.",
            f"Pearson correlation with exact effects here: AtP {features.pearson['atp']:.2f}, IG {features.pearson['ig']:.2f}",
        ]
    )


if __name__ == "__main__":
    main()
