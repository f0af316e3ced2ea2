"""Heads and features that carry a behaviour of the shipped model, how far they agree, and what is in the error term.

Run with `python -m examples.components`.
"""

from dataclasses import dataclass

import pandas as pd
from rich.console import Console

import featpatch as fp
from examples.places import at_most, listed, place
from featpatch.comparison.compare import Comparison
from featpatch.patching.controls import Controls
from featpatch.patching.sets import Selection
from featpatch.reporting.terminal import ranked, site_summary

TASKS = {"ioi": ["S2", "end"], "capitals": ["subject", "end"]}
WHERE = {"end": "at the last word", "subject": "at the subject", "S2": "at the second name"}
FEW = 12
"""The number of features, and of principal components, at which the two are compared."""


@dataclass(frozen=True)
class Found:
    """The results for one behaviour."""

    components: fp.Effects
    features: fp.Effects
    both: Comparison
    few: Selection
    controls: Controls
    curve: pd.DataFrame

    def heads(self, n: int) -> list[fp.Node]:
        """Return the heads with the largest recovery."""
        return list(self.components.top(n, kind="head").nodes)

    def carried(self, n: int) -> str:
        """Return the heads with the largest recovery, and their recovery, in words."""
        nodes, values = self.heads(n), self.components.top(n, kind="head").pooled("recovery")
        names = [f"{node.site.split('.')[1]}.{node.index}" for node in nodes]
        first, *more = [f"{name} {value:.2f}" for name, value in zip(names, values, strict=True)]
        return ", ".join([first.replace(" ", " brings back "), *more])

    def blocks(self, n: int) -> str:
        """Return the layers of the heads with the largest recovery, in words."""
        return listed(sorted({node.site.split(".")[1] for node in self.heads(n)}))

    def errors(self) -> pd.Series:
        """Return the largest recovery of the error term of each dictionary, largest first."""
        return self.features.sites().groupby("sae")["recovery_error"].max().sort_values(ascending=False)

    def written(self, n: int) -> str:
        """Return, in words, the shares of the top feature's change that the first heads write."""
        node, table = self.features.top(1).nodes[0], self.both.writers
        of_node = table[(table["sae"] == node.sae) & (table["feature"] == node.index)].set_index(["site", "index"])["share"]
        return listed([f"{of_node[head.site, head.index].max():.0%}".replace("%", " %") for head in self.heads(n)])

    def against_principal_components(self) -> list[float]:
        """Return the recovery of `FEW` principal components, and of as many features of the SAE."""
        at = self.curve[self.curve["k"] == FEW].set_index("sae")["recovery"]
        site = self.few.effects.nodes[0].site
        return [at[f"principal components of {site}"], at[site]]

    def reached(self) -> int:
        """Return the number of random directions with an effect at least as large as the top feature's."""
        return round(self.controls.share() * len(self.controls.random))


def main(pairs: int = 32) -> None:
    """Rank, compare and control heads and features for each task, and print the result in prose."""
    demo, console = fp.load_demo(), Console(width=170)
    found = {}
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
        bases = [sae, fp.dictionaries.identity(demo.model, whole.site), fp.dictionaries.pca(demo.model, whole.site, drawn)]
        curve = fp.top_k_curve(demo.model, bases, drawn, positions=[whole.position], most=16, progress=False).table()
        console.print(curve.pivot(index="k", columns="sae", values="recovery").round(2).to_string(), highlight=False)
        console.print(fp.diagnose(demo.model, demo.saes, drawn, features.top(5).nodes).round(2).to_string(), highlight=False)
        lost = fp.ablate(demo.model, drawn, sites="z", to="mean", positions=["end"], progress=False)
        console.print(ranked(lost.top(4)))
        found[task] = Found(components, features, both, few, controls, curve)
    print(told(found["ioi"], found["capitals"], pairs))


def told(ioi: Found, capitals: Found, pairs: int) -> str:
    """Return the result in the words of the README."""
    top, few, errors = capitals.features.top(1).nodes[0], ioi.few.effects.nodes[0], capitals.errors()
    place_of, agreed = place(errors.index[0]), [found.both.agreement["recovery"].correlation for found in (ioi, capitals)]
    reached = ioi.reached() + capitals.reached()
    of_capitals, of_ioi = ("{:.2f} against {:.2f}".format(*found.against_principal_components()) for found in (capitals, ioi))
    return (
        f"`python -m examples.components` does all of this for two behaviours of the shipped model, with {pairs} pairs each. "
        f"Indirect objects are carried by heads of layer {ioi.blocks(3)} {WHERE[ioi.heads(1)[0].position]} "
        f"({ioi.carried(3)}), and by features {place(few.site)} that stand for one name each, of which "
        f"{len(ioi.few.features)} together bring back {100 * ioi.few.effects.pooled('recovery')[-1]:.0f} % (greedy, on the "
        f"same pairs); no error term recovers more than {at_most(ioi.errors().max(), 2)}. Capitals are carried by two heads "
        f"of layer {capitals.blocks(2)} ({capitals.carried(2)}), which write {capitals.written(2)} of the change of the "
        f"feature that matters most ({top.index} {place(top.site)}); there the SAE {place_of} explains less: its error term "
        f"recovers {errors.iloc[0]:.2f}, against {errors.iloc[1]:.2f} {place(errors.index[1])}. Over hook points and "
        "positions, the effects of whole activations and the summed effects of their features have rank correlations of "
        f"{agreed[0]:.3f} and {agreed[1]:.3f} (Spearman). {reached or 'No'} random direction out of "
        f"{len(ioi.controls.random)} has as large an effect as the top feature of either task. Small sets of principal "
        f"components recover more than equally many SAE features for capitals {WHERE[capitals.few.effects.nodes[0].position]} "
        f"({FEW}: {of_capitals}) and less for indirect objects {place(few.site)} ({of_ioi})."
    )


if __name__ == "__main__":
    main()
