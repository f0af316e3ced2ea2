"""Which estimator to trust where: methods of estimation against patched runs of the shipped model, by hook point and task.

    python benchmarks/estimators.py [--pairs 32]

Every feature of the shipped SAEs that differs between the prompts of a pair is patched at all positions at once, in both
directions, for each of the four tasks, and estimated by every method. The tables show, in Markdown: the agreement by task; the
agreement by hook point; what a screen by one method, or by several, finds of the features with the largest effects; the
estimates of joint patches (all features of a hook point, its error, its whole activation); the agreement for components, on
half of the pairs; and the exact faithfulness of circuits of edges that scores by each method choose.
"""

import argparse
from typing import Any

import numpy as np
import torch

import featpatch as fp
from featpatch.effects.table import Effects
from featpatch.ranking.screen import by_best_rank

TASKS = ("ioi", "capitals", "greater_than", "sentiment")
METHODS = ("atp", "relp", "relp_qk", "gim", "ig", "eap_ig_inputs", "grad_drop")
SCREENS = (
    ("atp",), ("relp",), ("relp_qk",), ("gim",), ("ig",), ("grad_drop",),
    ("atp", "relp"), ("atp", "relp_qk"), ("atp", "gim"), ("relp", "relp_qk"), ("atp", "relp", "relp_qk"), ("atp", "ig"),
)  # fmt: skip
KEPT = (20, 40, 80, 160)
TOP, MOST = 20, 18
COMPONENTS = ("attn_out", "mlp_out", "z", "q", "k", "v", "neurons")
QUICK = ("atp", "relp", "relp_qk", "gim", "grad_drop")
SCORES = ("estimate", "relp", "relp_qk", "gim", "eap_ig_inputs")
EDGES = 40


def measured(demo: Any, task: str, pairs: int) -> dict[str, Effects]:
    """Return the exact effects of a task and the estimates of each method."""
    drawn, options = demo.pairs(task, n=pairs), {"progress": False}
    tables = {"exact": fp.rank_features(demo.model, demo.saes, drawn, **options)}
    for method in METHODS:
        tables[method] = fp.rank_features(demo.model, demo.saes, drawn, method=method, **options)
    return tables


def line(*cells: Any) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: str) -> list[str]:
    """Return the first two rows of a Markdown table."""
    return [line(*cells), "|" + "---|" * len(cells)]


def by_task(found: dict[str, dict[str, Effects]]) -> list[str]:
    """Return the agreement with the exact recovery of all features, by task."""
    rows = head("task", "features", *(f"`{method}`" for method in METHODS))
    for task, tables in found.items():
        agreement = [fp.calibrate(tables[method], tables["exact"]).table(TOP).iloc[0] for method in METHODS]
        rows.append(line(task, int(agreement[0]["rows"]), *(f"{of['pearson']:.2f}, {of['recall']:.2f}" for of in agreement)))
    return rows


def by_hook_point(found: dict[str, dict[str, Effects]]) -> list[str]:
    """Return the Pearson correlation with the exact recovery by hook point: the mean over tasks, and the lowest."""
    pearson: dict[str, dict[str, list[float]]] = {}
    for tables in found.values():
        for method in METHODS:
            table = fp.calibrate(tables[method], tables["exact"]).table(TOP)
            for site, value in zip(table["site"][1:], table["pearson"][1:], strict=True):
                pearson.setdefault(site, {}).setdefault(method, []).append(value)
    rows = head("SAE at", *(f"`{method}`" for method in METHODS))
    for site, of in sorted(pearson.items()):
        values = [of[method] for method in METHODS]
        best = max(round(float(np.mean(value)), 2) for value in values)
        cells = [f"{np.mean(value):.2f} ({min(value):.2f})" for value in values]
        marked = [
            f"**{cell}**" if round(float(np.mean(value)), 2) == best else cell
            for cell, value in zip(cells, values, strict=True)
        ]
        rows.append(line(f"`{site}`", *marked))
    return rows


def by_component(demo: Any, pairs: int) -> list[str]:
    """Return the Pearson correlation with the exact recovery of components at all positions, over the rows of all tasks."""
    rows = head("component", "rows", *(f"`{method}`" for method in QUICK))
    drawn = [demo.pairs(task, n=pairs) for task in TASKS]
    for name in COMPONENTS:
        options = {"sites": name, "directions": ["denoising"], "progress": False}
        exact = [fp.rank_components(demo.model, of_task, **options) for of_task in drawn]
        cells = []
        for method in QUICK:
            estimates = [fp.rank_components(demo.model, of_task, method=method, **options) for of_task in drawn]
            both = [fp.calibrate(*tables) for tables in zip(estimates, exact, strict=True)]
            x, y = (np.concatenate([getattr(found, part) for found in both]) for part in ("estimate", "exact"))
            cells.append(f"{np.corrcoef(x, y)[0, 1]:.2f}")
        rows.append(line(f"`{name}`", len(x), *cells))
    return rows


def ranks(tables: dict[str, Effects], methods: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Return the ranks, in ascending order, that a screen gives to the features with the largest exact effects."""
    exact = tables["exact"].take(tables["exact"].ranked)
    truth = {exact.nodes[row] for row in np.argsort(-exact.sizes(), kind="stable")[:TOP]}
    order = by_best_rank([tables[method] for method in methods])
    return np.array([rank for rank, node in enumerate(order) if node in truth])


def screens(found: dict[str, dict[str, Effects]]) -> list[str]:
    """Return what screens find of the true top, on average over the tasks and in the worst of them."""
    rows = head("screened by", *(f"k={k}" for k in KEPT), f"k for {MOST} of {TOP}: mean", *TASKS)
    for methods in SCREENS:
        of_tasks = [ranks(tables, methods) for tables in found.values()]
        shares = [[int((of_task < k).sum()) for of_task in of_tasks] for k in KEPT]
        needed = [int(of_task[MOST - 1]) + 1 for of_task in of_tasks]
        cells = [f"{np.mean(of_k):.1f} ({min(of_k)})" for of_k in shares]
        named = " + ".join(f"`{method}`" for method in methods)
        rows.append(line(named, *cells, round(float(np.mean(needed))), *needed))
    return rows


def joint(found: dict[str, dict[str, Effects]]) -> list[str]:
    """Return the agreement with the exact recovery of joint patches: all features, the error and the whole activation."""
    rows = head("estimates of joint patches", "rows", "Pearson", "mean absolute difference", "mean absolute effect")
    for method in METHODS:
        if found[TASKS[0]][method].metadata["unsigned"]:
            continue
        one, other = [], []
        for tables in found.values():
            exact = tables["exact"].take(~tables["exact"].ranked)
            values = dict(zip(tables[method].nodes, tables[method].pooled("recovery"), strict=True))
            one += [values[node] for node in exact.nodes]
            other += list(exact.pooled("recovery"))
        x, y = np.array(one), np.array(other)
        rows.append(
            line(
                f"`{method}`",
                len(x),
                f"{np.corrcoef(x, y)[0, 1]:.2f}",
                f"{np.abs(x - y).mean():.2f}",
                f"{np.abs(y).mean():.2f}",
            )
        )
    return rows


def circuits(demo: Any, pairs: int) -> list[str]:
    """Return the faithfulness of circuits of the edges with the largest scores, by task."""
    rows = head(f"faithfulness of {EDGES} edges", *TASKS)
    drawn = {task: demo.pairs(task, n=pairs) for task in TASKS}
    for scores in SCORES:
        options = {"scores": scores, "method": "threshold", "size": EDGES, "progress": False}
        found = [fp.find_circuit(demo.model, drawn[task], **options).faithfulness for task in TASKS]
        rows.append(line(f"`{scores}`", *(f"{value:.2f}" for value in found)))
    return rows


def told(found: dict[str, dict[str, Effects]]) -> str:
    """Return what a union of estimators gains, as a sentence for the documentation."""
    mean = {methods: np.mean([(ranks(tables, methods) < KEPT[0]).sum() for tables in found.values()]) for methods in SCREENS}
    needed = {methods: [int(ranks(tables, methods)[MOST - 1]) + 1 for tables in found.values()] for methods in SCREENS}
    single = [methods for methods in SCREENS if len(methods) == 1]
    best = min(single, key=lambda methods: max(needed[methods]))
    union = ("atp", "relp")
    return (
        f"To find {MOST} of the true top {TOP} in every one of the four tasks, `atp` needs k={max(needed['atp',])}, `relp` "
        f"k={max(needed['relp',])}, the best single method (`{best[0]}`) k={max(needed[best])}, and `atp` with `relp` "
        f"k={max(needed[union])}; with k={KEPT[0]} they find {mean['atp',]:.1f}, {mean['relp',]:.1f}, {mean[best]:.1f} and "
        f"{mean[union]:.1f} on average."
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demo = fp.load_demo(progress=False)
    found = {task: measured(demo, task, options.pairs) for task in TASKS}
    of_model = by_component(demo, options.pairs // 2), circuits(demo, options.pairs)
    for rows in (by_task(found), by_hook_point(found), screens(found), joint(found), *of_model):
        print("\n".join(rows), end="\n\n")
    print(told(found))


if __name__ == "__main__":
    main()
