"""Four measurements on a real language model, SmolLM2-135M-Instruct, with 95 % bootstrap intervals over pairs.

    python -m examples.real_model --download      # once: prepares the model
    python benchmarks/real_model.py --part estimates
    python benchmarks/real_model.py --part edges
    python benchmarks/real_model.py --part counts
    python benchmarks/real_model.py --part stability

The tasks are capitals ("The capital of France is") and indirect objects ("When Mary and John went to the store, John gave a
drink to"), with the corrupted prompts of the same length that name another country or another giver. Only pairs are used in
which the model prefers the right answer in both prompts. Effects are recoveries of the logit difference (denoising). Each part
prints a Markdown table; intervals are in brackets.

    estimates   correlation of AtP, integrated gradients and RelP with exact effects, for components and SAE features at the
                positions where the prompts differ and at the last word; components in every third layer
    edges       CPR and CMD, as the MIB benchmark defines them, of rankings of the edges of indirect objects: at random, by EAP,
                by EAP-IG over inputs, and by the latter with exact scores of the edges that it ranks first
    counts      how many features, coordinates of the residual stream and MLP neurons, patched together at all positions, bring
                back 0.8 of the behaviour; of features, with the error term of the corrupted run and with that of the clean run
    stability   the Jaccard index of the first features and edges with those that are found on pairs drawn with replacement
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from estimators import head, line
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata

import featpatch as fp
from examples.real_model.findings import SAES, saes_in
from examples.real_model.prepare import LABEL, MODEL, load
from examples.real_model.tasks import capitals
from featpatch.circuits.curve import SHARES, ranking, sizes_of
from featpatch.cli.app import clear_errors
from featpatch.effects.statistics import RESAMPLES, SEED, expanded
from featpatch.patching.paths import path_study
from featpatch.tasks.ioi import TEMPLATES

POSITIONS: Mapping[str, list[str | int]] = {"capitals": ["subject", -1], "indirect objects": ["S2", "end"]}
DRAWN = 32
"""The number of pairs of indirect objects that are drawn; those that the model gets wrong are left out."""
USED = {"estimates": 8, "edges": 8, "counts": 16, "stability": 16}
"""The default number of pairs of each task that a part uses."""
ESTIMATORS = {"AtP": "atp", "IG": "ig", "RelP": "relp"}
COMPONENTS = {"residual stream": "resid_post", "attention heads": "z", "MLPs": "mlp_out"}
EVERY, STEPS = 3, 5
"""Components of one layer in this many are compared; the number of steps of integrated gradients."""
SUBSET, DRAWS = 400, 3
"""The number of edges whose scores are measured exactly, and of random rankings."""
ENOUGH, SETS, NEURONS = 0.8, 30, 8192
"""The recovery that sets have to reach, the largest number of set sizes, and of neurons of all layers."""
TOP_FEATURES, TOP_EDGES = 20, (20, 100, 500)
QUIET: dict[str, Any] = {"progress": False}
DENOISED: dict[str, Any] = {"directions": ["denoising"], **QUIET}

Array = NDArray[np.float64]


def resampled(pairs: int) -> Array:
    """Return how often each pair is drawn in each bootstrap sample, `[pairs, samples]`."""
    drawn = np.random.default_rng(SEED).integers(pairs, size=(RESAMPLES, pairs))
    return np.stack([np.bincount(sample, minlength=pairs) for sample in drawn], axis=1).astype(np.float64)


def ends(samples: Array, pairs: int) -> tuple[float, float]:
    """Return the ends of the interval of a statistic, given its values in the bootstrap samples of so many pairs."""
    tail = 50 * (1 - expanded(pairs))
    low, high = np.percentile(samples, [tail, 100 - tail], method="closest_observation")
    return float(low), float(high)


def shown(value: float, samples: Array, pairs: int) -> str:
    """Return a statistic with its interval as text."""
    low, high = ends(samples, pairs)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def tasks(model: Any, used: int) -> dict[str, fp.Pairs]:
    """Return the pairs of both tasks in which the model prefers the right answer in both prompts; print how many they are."""
    every = {"capitals": capitals(model), "indirect objects": fp.tasks.ioi(model, DRAWN, templates=TEMPLATES[:2])}
    found = {}
    for name, pairs in every.items():
        checked = pairs.check(model)
        right = [p for p, one, other in zip(pairs, checked.clean, checked.corrupted, strict=True) if one > 0 > other]
        found[name] = fp.Pairs(tuple(right[:used]), pairs.tokenizer)
        print(f"{name}: right in both prompts of {len(right)} of {len(pairs)} pairs, {len(found[name])} used; {found[name]}")
    return found


def aligned(tables: Sequence[fp.Effects]) -> list[Array]:
    """Return the changes `[nodes, pairs]` of the ranked nodes of several tables; a node that a table lacks changes nothing."""
    nodes = dict.fromkeys(node for table in tables for node in table.take(table.ranked).nodes)
    rows = {node: row for row, node in enumerate(nodes)}
    found = []
    for table in tables:
        table, changes = table.take(table.ranked), np.zeros((len(rows), len(table.clean)))
        changes[[rows[node] for node in table.nodes]] = table.changes("recovery").toarray()
        found.append(changes)
    return found


def correlation(x: Array, y: Array) -> Array:
    """Return Pearson's correlation of the columns of two matrices."""
    result: Array = pearsonr(x, y, axis=0).statistic
    return result


def agreement(estimate: fp.Effects, exact: fp.Effects) -> list[str]:
    """Return the number of nodes, and Pearson's and Spearman's correlation of estimated with exact effects."""
    x, y = aligned([estimate, exact])
    weights = np.concatenate([np.ones((x.shape[1], 1)), resampled(x.shape[1])], axis=1)
    pearson = correlation(x @ weights, y @ weights)
    spearman = correlation(rankdata(x @ weights, axis=0), rankdata(y @ weights, axis=0))
    return [str(len(x)), *(shown(values[0], values[1:], x.shape[1]) for values in (pearson, spearman))]


def estimates(model: Any, saes: list[Any], of_task: dict[str, fp.Pairs]) -> Iterator[str]:
    """Return the agreement of estimates with exact effects, by task, kind of node and method."""
    yield from head("task", "effects of", "method", "nodes", "Pearson", "Spearman")
    layers = range(model.cfg.n_layers)[::-EVERY]
    for task, pairs in of_task.items():
        options = {"positions": POSITIONS[task], **DENOISED}

        def components(site: str, options: Any = options, pairs: fp.Pairs = pairs, **method: Any) -> fp.Effects:
            return fp.rank_components(model, pairs, sites=site, layers=layers, **options, **method)

        def features(sae: Any, options: Any = options, pairs: fp.Pairs = pairs, **method: Any) -> fp.Effects:
            return fp.rank_features(model, sae, pairs, **options, **method)

        ranked: dict[str, tuple[Callable[..., fp.Effects], Any]] = {name: (components, at) for name, at in COMPONENTS.items()}
        ranked |= {f"features of `{sae.cfg.metadata.hook_name}`": (features, sae) for sae in saes}
        for name, (rank, of) in ranked.items():
            exact = rank(of)
            for shown_as, method in ESTIMATORS.items():
                steps = {"steps": STEPS} if method == "ig" else {}
                found = rank(of, method=fp.Gradients(model, pairs, method=method, keep=False, **steps))
                yield line(task, name, shown_as, *agreement(found, exact))


def areas(circuit: fp.Circuit, order: Any) -> list[str]:
    """Return CPR and CMD of `Circuit.curve`, with intervals."""
    graph, sizes, ranked = circuit.graph, sizes_of(len(circuit.scores), SHARES), ranking(circuit.scores, order)
    masks = np.zeros((len(sizes), len(ranked)), dtype=bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[ranked[:size]] = True
    weights, values = resampled(len(graph.pairs)), graph.of_masks(graph.pruned(masks))
    faithfulness = ((values - graph.empty) @ weights) / ((graph.whole - graph.empty) @ weights)
    samples = [np.trapezoid(of, SHARES, axis=0) for of in (faithfulness, np.abs(1 - faithfulness))]
    curve = next(each for each in circuit.curve().both if each.order == order)
    return [
        f"{v:.3f} [{a:.3f}, {b:.3f}]"
        for v, (a, b) in zip((curve.cpr, curve.cmd), (ends(s, len(graph.pairs)) for s in samples), strict=True)
    ]


def measured_exactly(circuit: fp.Circuit, model: Any, pairs: fp.Pairs) -> fp.Circuit:
    """Return the circuit with exact scores of the `SUBSET` edges with the largest |scores|; the others keep their scores."""
    numbers, stream = ranking(circuit.scores, "absolute")[:SUBSET], fp.Node("blocks.0.hook_resid_pre", "activation")
    chosen: list[Any] = [circuit.graph.items[number] for number in numbers]
    paths = [fp.Edge.of(stream if e.sender.site == "hook_embed" else e.sender, e.receiver) for e in chosen]
    senders, receivers = ([*dict.fromkeys(getattr(path, end) for path in paths)] for end in ("sender", "receiver"))
    study, _ = path_study(model, pairs, None, senders, receivers, "direct", frozenset(paths), directions=["noising"])
    effects = study.run(None, progress=False)
    exact = dict(zip(effects.nodes, effects.pooled("degradation"), strict=True))
    scores = circuit.scores.copy()
    scores[numbers] = [exact.get(path, 0.0) for path in paths]
    estimated, true = circuit.scores[numbers], scores[numbers]
    print(f"Scores of these {SUBSET} edges by EAP-IG and exactly: Pearson {pearsonr(estimated, true).statistic:.2f}.")
    return replace(circuit, scores=scores)


def edges(model: Any, saes: list[Any], of_task: dict[str, fp.Pairs]) -> Iterator[str]:
    """Return CPR and CMD of rankings of the edges of indirect objects, in both orders of the scores."""
    pairs = of_task["indirect objects"]
    options: dict[str, Any] = {"size": SUBSET, **QUIET}
    eap = fp.find_circuit(model, pairs, scores="estimate", **options)
    integrated = fp.find_circuit(model, pairs, scores="eap_ig_inputs", steps=STEPS, **options)
    generator, count = np.random.default_rng(SEED), len(eap.scores)
    found = {f"random, draw {draw + 1}": replace(eap, scores=generator.random(count)) for draw in range(DRAWS)}
    found |= {"EAP": eap, f"EAP-IG-inputs, {STEPS} steps": integrated}
    found[f"the same, {SUBSET} edges exact"] = measured_exactly(integrated, model, pairs)
    print(f"{count:,} edges, {len(pairs)} pairs, shares {', '.join(map(str, SHARES))}; complement at corrupted values\n")
    yield from head("edges ranked", "order", "CPR", "CMD")
    for name, circuit in found.items():
        for order in ("absolute",) if name.startswith("random") else ("signed", "absolute"):
            yield line(name, order, *areas(circuit, order))


def reached(model: Any, pairs: fp.Pairs, saes: Any, ranked: Sequence[fp.Node], always: Sequence[fp.Node]) -> list[str]:
    """Return how many of the ranked nodes reach `ENOUGH` together with some others, and the largest recovery of a set.

    Args:
        saes: the dictionary of the nodes at one hook point, whose changes are added up, or None for nodes of many layers, each
            of which is set to its clean value.
    """
    if not ranked:
        return ["never", "none differs"]
    sizes = np.unique(np.geomspace(1, len(ranked), SETS).round().astype(int))
    sizes = np.concatenate([[0], sizes]) if always else sizes
    patches = [fp.Patch((*ranked[:size], *always), name=str(size)) for size in sizes]
    found = fp.rank_nodes(model, pairs, patches, saes=saes, combine=None if saes is None else "add", **DENOISED)
    changes, recovery = found.changes("recovery").toarray(), found.pooled("recovery")
    samples = (changes @ resampled(len(pairs))) / (found.gap @ resampled(len(pairs)))
    numbers = [*first(recovery[:, None], sizes), *ends(first(samples, sizes), len(pairs))]
    said = ["never" if np.isinf(number) else f"{number:.0f}" for number in numbers]
    best = int(recovery.argmax())
    largest = shown(float(recovery[best]), samples[best], len(pairs))
    return ["{} [{}, {}]".format(*said), f"{largest} with {sizes[best]}"]


def first(recovery: Array, sizes: NDArray[np.int64]) -> Array:
    """Return the smallest size of the sets that reach `ENOUGH`, for each column of `[sets, samples]`; infinity if none does."""
    enough = recovery >= ENOUGH
    return np.where(enough.any(0), sizes[enough.argmax(0)].astype(np.float64), np.inf)


def counts(model: Any, saes: list[Any], of_task: dict[str, fp.Pairs]) -> Iterator[str]:
    """Return how many nodes reach `ENOUGH`, by task, hook point and kind of node; nodes are ranked on the same pairs."""
    yield from head("task", "nodes", "error term", "nodes that differ", f"number that reaches {ENOUGH}", "largest recovery")
    for task, pairs in of_task.items():
        for sae in saes:
            hook = sae.cfg.metadata.hook_name
            layer = int(hook.split(".")[1])
            dictionaries = {
                f"features of `{hook}`": sae,
                f"coordinates of `{hook}`": fp.dictionaries.identity(model, hook),
                f"neurons of layer {layer}": fp.dictionaries.neurons(model, layer),
            }
            for name, dictionary in dictionaries.items():
                single = fp.rank_features(model, dictionary, pairs, **DENOISED)
                nodes, error = single.top(len(single), kind="feature").nodes, single.where(kind="error").nodes
                ways = {"kept": (), "patched in": error} if dictionary is sae else {"none": ()}
                for of_error, always in ways.items():
                    yield line(task, name, of_error, len(nodes), *reached(model, pairs, dictionary, nodes, always))
        estimated = fp.rank_components(model, pairs, sites="neurons", method="atp", **DENOISED)
        nodes, name = estimated.top(NEURONS).nodes, f"neurons of all layers, the first {NEURONS:,} by AtP"
        yield line(task, name, "none", len(estimated), *reached(model, pairs, None, nodes, ()))


def jaccard(changes: Array, top: int) -> str:
    """Return the mean Jaccard index of the nodes with the largest effects and those in bootstrap samples, with its interval."""

    def best(effects: Array) -> set[int]:
        return set(np.argsort(-np.abs(effects), kind="stable")[:top].tolist())

    true, samples = best(changes.sum(1)), (changes @ resampled(changes.shape[1])).T
    found = np.array([len(true & some) / len(true | some) for some in map(best, samples)])
    return shown(float(found.mean()), found, changes.shape[1])


def edge_changes(model: Any, pairs: fp.Pairs, scores: Any, steps: int | None) -> Array:
    """Return the scores `[edges, pairs]` of all edges in each pair, as changes of the metric."""
    columns = []
    for pair in pairs:
        alone = fp.find_circuit(model, fp.Pairs((pair,)), scores=scores, steps=steps, size=1, **QUIET)
        columns.append(alone.scores * (alone.graph.whole - alone.graph.empty).mean())
    return np.stack(columns, axis=1)


def stability(model: Any, saes: list[Any], of_task: dict[str, fp.Pairs]) -> Iterator[str]:
    """Return how stable the first features (exact effects) and edges (estimates) are."""
    yield from head("task", "ranked", "of", "top", "Jaccard index")
    for task, pairs in of_task.items():
        for sae in saes:
            (changes,) = aligned([fp.rank_features(model, sae, pairs, **DENOISED)])
            name = f"features of `{sae.cfg.metadata.hook_name}`, exact"
            yield line(task, name, f"{len(changes):,}", TOP_FEATURES, jaccard(changes, TOP_FEATURES))
        for name, scores, steps in (("EAP", "estimate", None), ("EAP-IG-inputs", "eap_ig_inputs", STEPS)):
            changes = edge_changes(model, pairs, scores, steps)
            for top in TOP_EDGES:
                yield line(task, f"edges, {name}", f"{len(changes):,}", top, jaccard(changes, top))


PARTS = {"estimates": estimates, "edges": edges, "counts": counts, "stability": stability}


def main() -> None:
    """Print the table of one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-p", "--part", choices=PARTS, required=True)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the prepared model")
    parser.add_argument("--saes", type=Path, default=SAES, help="folder of the SAEs, one folder per hook point")
    parser.add_argument("-n", "--pairs", type=int, help="number of pairs of each task; by default that of the part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with clear_errors():
        start, clock = time.process_time(), time.perf_counter()
        model = load(options.model)
        saes = [] if options.part == "edges" else saes_in(options.saes)
        print(f"{LABEL}, {options.part}")
        of_task = tasks(model, options.pairs or USED[options.part])
        print()
        for row in PARTS[options.part](model, saes, of_task):
            print(row, flush=True)
        spent = f"{time.process_time() - start:.0f} s of one core, {time.perf_counter() - clock:.0f} s in all"
        print(f"\nMeasured in {spent}.")


if __name__ == "__main__":
    main()
