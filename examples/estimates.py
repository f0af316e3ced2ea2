"""Where gradient estimates can be trusted on the shipped model: features and components, method by method, against patched runs.

python -m examples.estimates
"""

from typing import Any

import pandas as pd
from rich.console import Console

import featpatch as fp

METHODS = ("atp", "ig", "eap_ig_inputs", "grad_drop")


def main(pairs: int = 32) -> None:
    """Estimates and patched runs of the same nodes, their agreement, the worst misses, and a screened ranking with its audit."""
    demo, console = fp.load_demo(), Console(width=140)
    drawn = demo.pairs("ioi", n=pairs)
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}

    exact = fp.rank_features(demo.model, demo.saes, drawn, **options)
    estimates = {
        method: fp.estimate_features(demo.model, demo.saes, drawn, method=method, **options)
        for method in METHODS
    }  # fmt: skip
    for effect in ("recovery", "degradation"):
        found = fp.calibrate(estimates["atp"], exact, effect)
        console.print(repr(found), highlight=False)
        console.print(found.misses(5).round(3).to_string(index=False), highlight=False)
    console.print("features, all sites together", highlight=False)
    console.print(agreement(estimates, exact), highlight=False)

    heads = {"sites": ["q", "k", "v", "z", "pattern"], **options}
    exact_heads = fp.rank_components(demo.model, drawn, **heads)
    named = {
        f"{method}{'' if fix else ' without the QK fix'}": fp.estimate_components(
            demo.model, drawn, method=method, qk_fix=fix, **heads
        )
        for method, fix in (("atp", False), ("atp", True), ("ig", True), ("grad_drop", True))
    }
    console.print("queries, keys, values, outputs and patterns of heads", highlight=False)
    console.print(agreement(named, exact_heads), highlight=False)

    screened = fp.rank_features(demo.model, demo.saes, drawn, exact="screened", k=200, audit=400, **options)
    console.print(repr(screened.audit()), highlight=False)


def agreement(estimates: dict[str, fp.Effects], exact: fp.Effects) -> str:
    """Recovery, estimated and exact, of all rows; a line per method."""
    rows = [
        {"method": name, **fp.calibrate(estimate, exact).table(20).iloc[0].drop("site")} for name, estimate in estimates.items()
    ]
    return str(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
