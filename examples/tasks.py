"""The four tasks on the shipped model: does every pair pass the checklist, and would other pairs give the same ranking?

Run with `python -m examples.tasks`.
"""

from importlib import import_module

from rich.console import Console

import featpatch as fp
from featpatch.reporting.terminal import totals

SITES = ("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")
METRICS = {"capitals": "logit_diff", "greater_than": "prob_diff", "ioi": "logit_diff", "sentiment": "logit_diff"}


def main(pairs: int = 32) -> None:
    """Draw pairs with every corruption, drop those that fail the checklist, and rank the features at two hook points."""
    demo, console = fp.load_demo(), Console(width=140)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in SITES]
    for task, metric in METRICS.items():
        corruptions = import_module(f"featpatch.tasks.{task}").CORRUPTIONS
        drawn = getattr(fp.tasks, task)(demo.model, pairs, corruptions=corruptions)
        found = drawn.check(demo.model, metric=metric)
        console.rule(task)
        console.print(totals(found))
        effects = fp.rank_features(demo.model, saes, drawn.drop(found), metric=metric, progress=False)
        for effect in effects.directions_run():
            console.print(f"{effect}: {effects.stability(effect)}")


if __name__ == "__main__":
    main()
