"""Which ranking predicts what steering does: causal recovery, attribution or activation, on the shipped model.

    python benchmarks/steering.py

For each task, all features of two SAEs of the residual stream that are active at the last token of the clean prompts are
steered there, by adding `DOSE` times their mean activation. The table shows Spearman's rank correlation of the mean size of the
change of the logit difference with four rankings at the same token: |exact recovery|, |exact degradation|, |estimated recovery|
(attribution patching), and the mean activation. Then, for the features that come first in each ranking, the mean size of the
change and the KL divergence that it costs.
"""

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import featpatch as fp

PAIRS, DOSE, FIRST = 32, 4.0, 5
TASKS = ("ioi", "capitals", "greater_than", "sentiment")
HOOKS = ("blocks.2.hook_resid_pre", "blocks.3.hook_resid_post")


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    demo = fp.load_demo(progress=False)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in HOOKS]
    print(f"Adding {DOSE:g} x the mean activation at the last token, {PAIRS} pairs per task\n")
    names = ("recovery", "degradation", "attribution", "activation")
    print(f"| task | features | {' | '.join(names)} |\n|---|---:|{'---:|' * len(names)}")
    firsts: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for task in TASKS:
        pairs = demo.pairs(task, n=PAIRS)
        exact = fp.rank_features(demo.model, saes, pairs, positions=["end"], progress=False).where(kind="feature")
        atp = fp.rank_features(demo.model, saes, pairs, positions=["end"], method="atp", progress=False)
        of_estimate = dict(zip(atp.nodes, atp.pooled("recovery"), strict=True))
        on = active(demo.model, saes, pairs)
        nodes = [node for node in exact.nodes if on[node.sae][node.index] > 0]
        rows = [exact.nodes.index(node) for node in nodes]
        rankings = {
            "recovery": np.abs(exact.pooled("recovery"))[rows],
            "degradation": np.abs(exact.pooled("degradation"))[rows],
            "attribution": np.abs([of_estimate[node] for node in nodes]),
            "activation": np.array([on[node.sae][node.index] for node in nodes]),
        }
        options = {"saes": saes, "unit": "mean", "reference": pairs, "positions": ["end"], "progress": False}
        doses = fp.dose_response(demo.model, pairs, nodes, [DOSE], **options)
        effect, kl = np.abs(doses.measured["effect"][:, 0]).mean(1), doses.measured["kl"][:, 0].mean(1)
        cells = [f"{spearmanr(ranking, effect).statistic:.2f}" for ranking in rankings.values()]
        print(f"| {task} | {len(nodes)} | {' | '.join(cells)} |")
        for name, ranking in rankings.items():
            first = np.argsort(-ranking, kind="stable")[:FIRST]
            firsts[name].append((effect[first].mean(), kl[first].mean()))
    print(f"\n| the {FIRST} features with the largest | change of the logit difference | KL divergence |\n|---|---:|---:|")
    for name, values in firsts.items():
        effect, kl = np.mean(values, axis=0)
        print(f"| {name} | {effect:.2f} | {kl:.2f} |")


def active(model: Any, saes: list[Any], pairs: fp.Pairs) -> dict[str, Any]:
    """Return the mean activation of each feature at the last token of the clean prompts, by hook point."""
    total: dict[str, Any] = {sae.cfg.metadata.hook_name: 0.0 for sae in saes}
    for pair in pairs:
        _, cache = model.run_with_cache(torch.tensor([pair.clean]))
        for sae in saes:
            name = sae.cfg.metadata.hook_name
            total[name] = total[name] + sae.encode(cache[name])[0, pair.labels["end"]].detach().numpy() / len(pairs)
    return total


if __name__ == "__main__":
    main()
