"""Where gradient estimates can be trusted on the shipped model: attribution patching against exact effects, site by site.

python -m examples.estimates
"""

import time

from rich.console import Console

import featpatch as fp


def main(pairs: int = 32) -> None:
    """Estimates and patched runs of the same features, their agreement, and the worst misses."""
    demo, console = fp.load_demo(), Console(width=140)
    drawn, asked = demo.pairs("ioi", n=pairs), {"positions": ["S2", "end"], "progress": False}
    start = time.perf_counter()
    estimate = fp.estimate_features(demo.model, demo.saes, drawn, **asked)
    between = time.perf_counter()
    exact = fp.rank_features(demo.model, demo.saes, drawn, **asked)
    console.print(f"estimates {between - start:.1f} s, exact {time.perf_counter() - between:.1f} s")
    for effect in ("recovery", "degradation"):
        found = fp.calibrate(estimate, exact, effect)
        console.print(repr(found), highlight=False)
        console.print(found.misses(5).round(3).to_string(index=False), highlight=False)


if __name__ == "__main__":
    main()
