"""Which heads and which features carry a behaviour of the shipped model, where they agree, and what is in the error term.

python -m examples.components
"""

from rich.console import Console

import featpatch as fp
from featpatch.terminal import ranked, site_summary

TASKS = {"ioi": ["S2", "end"], "capitals": ["subject", "end"]}


def main(pairs: int = 32) -> None:
    """For each task: heads, features, both side by side, how many features it takes, and controls."""
    demo, console = fp.load_demo(), Console(width=170)
    for task, positions in TASKS.items():
        console.rule(task)
        drawn = demo.pairs(task, n=pairs)
        components = fp.rank_components(
            demo.model, drawn, sites=["z", "attn_out", "mlp_out", "resid_pre"], positions=positions, progress=False
        )
        features = fp.rank_features(demo.model, demo.saes, drawn, positions=positions, progress=False)
        console.print(ranked(components.top(8)))
        console.print(ranked(features.top(8)))
        console.print(site_summary(features))
        both = fp.compare(features, components, model=demo.model, saes=demo.saes, pairs=drawn, top=3)
        console.print(repr(both), highlight=False, markup=False)

        whole = features.where(kind="all_features").top(1, kind=None).nodes[0]
        sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == whole.sae)
        few = fp.select_features(demo.model, sae, drawn, position=whole.position, target=0.8, progress=False)
        console.print(f"{whole.sae} @ {whole.position}: {few}", highlight=False)
        controls = fp.random_controls(demo.model, sae, drawn, position=whole.position, progress=False)
        console.print(str(controls), highlight=False)
        bases = [sae, fp.identity(demo.model, whole.site), fp.pca(demo.model, whole.site, drawn)]
        curve = fp.cumulative(demo.model, bases, drawn, positions=[whole.position], most=16, progress=False).table()
        console.print(curve.pivot(index="k", columns="sae", values="recovery").round(2).to_string(), highlight=False)
        console.print(fp.diagnose(demo.model, demo.saes, drawn, features.top(5).nodes).round(2).to_string(), highlight=False)
        lost = fp.ablate(demo.model, drawn, sites="z", to="mean", positions=["end"], progress=False)
        console.print(ranked(lost.top(4)))


if __name__ == "__main__":
    main()
