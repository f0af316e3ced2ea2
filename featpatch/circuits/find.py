"""Find a circuit over nodes or over edges: by threshold, greedily, or by pruning from the output down (ACDC)."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from tqdm.auto import tqdm

from featpatch.circuits.attribution import STEPPED, STEPS, Scores
from featpatch.circuits.circuit import Circuit
from featpatch.circuits.clean_runs import Complement, check_complement
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.files import SEARCH, check_shape, from_eap_ig, read_circuit
from featpatch.circuits.graph import Graph
from featpatch.circuits.mediators import mediators_of
from featpatch.circuits.node_graph import NodeGraph
from featpatch.circuits.node_runs import Errors
from featpatch.circuits.regions import Regions
from featpatch.circuits.search import (
    TARGET,
    THRESHOLD,
    Method,
    acdc,
    along_edges,
    by_threshold,
    check_search,
    estimated_scores,
    exact_scores,
    greedily,
    run,
)
from featpatch.effects.collector import provenance
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_choices
from featpatch.metric_functions import Metric
from featpatch.metrics import Measures, one_metric
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import TOGETHER, Node, Patch, joint
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.summed import check_apart
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any
from featpatch.sae.nodes import check_nodes

EXACT_WORK = 3e12
"""The largest number of multiply-adds for which edge scores are exact by default: minutes on one CPU core, as timed by
`python benchmarks/circuits.py --limit 97`."""


def check_candidates(over: str, nodes: Any, saes: Any, errors: str | None) -> None:
    """Raise a FeatpatchError unless the arguments that determine the candidates fit together."""
    check_choices(("nodes", "edges"), over=over)
    check_choices(get_args(Errors), errors="in" if errors is None else errors)
    if nodes is None and (over == "nodes" or saes is not None):
        raise FeatpatchError(
            f"{'saes' if over == 'edges' else 'over=' + repr(over)} without nodes: expected candidates, such as "
            "nodes=effects.top(50), or, for the edges between heads and MLPs, neither nodes nor saes"
        )
    if errors is not None and saes is None:
        raise FeatpatchError(f"errors={errors!r} without saes: expected SAEs, to which error terms belong; leave errors out")
    if over == "edges" and nodes is not None and saes is None:
        raise FeatpatchError(
            "over='edges' with nodes, but without saes: expected the SAEs of the features among the nodes; pass saes too, or "
            "leave nodes out"
        )
    if over == "edges" and errors == "out":
        raise FeatpatchError(
            "over='edges' with errors='out': expected errors='in' (error terms belong to the complement) or errors='nodes' "
            "(they are candidates)"
        )


def check_region_free(over: str, nodes: Any, positions: Positions) -> None:
    """Raise a FeatpatchError if `positions` is combined with nodes, which have their own."""
    if nodes is not None and (not isinstance(positions, str) or positions != "all"):
        example = "fp.feature(sae, 7, position='S2')" if over == "edges" else "fp.head(1, 3, position='S2')"
        raise FeatpatchError(
            f"positions={positions!r} with nodes and over={over!r}: expected no positions, because nodes have their own; name "
            f"them there, e.g. {example}, or leave nodes out, for edges between components at positions"
        )


def find_circuit(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    over: Literal["nodes", "edges"] | None = None,
    nodes: Effects | Sequence[Node | Patch] | None = None,
    positions: Positions = "all",
    method: Method = "threshold",
    scores: Scores | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    size: int | None = None,
    target: float | None = None,
    to: Complement = "corrupted",
    reference: Pairs | None = None,
    seed: int | None = None,
    errors: Errors | None = None,
    metric: str | Metric | Sequence[str | Metric] = "logit_diff",
    journal: str | Path | None = None,
    progress: bool = True,
) -> Circuit:
    """Find the part of the model that by itself produces the behaviour in the clean runs, with its complement ablated.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of your own.
        pairs: clean and corrupted prompts with their answers.
        saes: the SAEs of the features and error terms among the nodes.
        over: `"nodes"`: the candidates are `nodes`. `"edges"`: the candidates are the edges between embedding, heads (by query,
            key and value), MLPs and logits. If features or errors are given, these are mediators, and so is the rest of their
            activation (`rest`). By default nodes if `nodes` are given, else edges.
        nodes: features, error terms, heads at `hook_z` and whole activations; or a table of effects whose rows are the nodes.
            The nodes of an `fp.Patch` are kept or ablated together, as one candidate (`groups.patches` of `fp.group_features`).
            At their hook points everything that is not kept is ablated. For edges: features and errors of dictionaries of the
            residual stream, `hook_z`, `hook_attn_out` or `hook_mlp_out`, or of MLP transcoders.
        positions: for edges between components: `"all"`: an edge is kept or ablated at all positions together. `"each"`, or
            labels and indices: separately at each of these positions, and at all others together (position `"elsewhere"`).
        method: `"threshold"`: keep the items with the largest |score|. `"greedy"`: until faithfulness reaches `target`, add
            the node that brings it closest to 1, starting from nothing, or the edge with the largest |score|, starting from
            the logits. `"acdc"`: from the output down, remove items whose removal changes faithfulness by less than
            `threshold` (Conmy et al. 2023).
        scores: for `"threshold"`, and for `"greedy"` over edges. `"exact"`: an item's score is the loss of faithfulness with
            only that item ablated. The others estimate that loss by gradients, with the formulas in
            `featpatch.circuits.attribution`, and miss items whose effect saturates. `"estimate"` takes the gradient where
            all items are kept (edge attribution patching); `"relp"`, `"relp_qk"` and `"gim"` do so with the backward pass of
            these methods, see `fp.Gradients`. The other two average it over `steps` runs between the ablation
            value and the clean value: `"eap_ig_inputs"` of the embedding (EAP-IG), and `"eap_ig_activations"` of each
            component or, for nodes, of each hook point. The default is `"exact"`, or `"estimate"` over edges if exact scores
            would take much longer than minutes (more than 3e12 multiply-adds) and the metric has a gradient in the clean run;
            the printed circuit says which.
        steps: the number of runs (per component or hook point) of integrated gradients; 5 by default.
        threshold: for `"threshold"` and `"acdc"`: a share of the behaviour; 0.01 by default.
        size: the number of items to keep, instead of the `threshold` of `"threshold"` or the `target` of `"greedy"`.
        target: the faithfulness at which `"greedy"` stops; 0.9 by default.
        to: the ablation values of the complement: those of the `"corrupted"` run, or `"zero"`, `"mean"`, `"mean_by_position"`
            or `"resample"` as in `fp.ablate`. For edges, what each sender writes is ablated, at every position. Nodes keep
            their values at special tokens, unless the ablation values come from a run.
        reference, seed: the prompts that are averaged or resampled, and the seed for resampling, as in `fp.ablate`.
        errors: only with `saes`: error terms are all kept (`"in"`, the default), all ablated (`"out"`), or candidates like
            other nodes (`"nodes"`). For edges, `"in"` means that errors are a part of the rest.
        metric: one metric; for estimates it must be differentiable. The gradient of `"neg_kl"` is zero in the clean run, so
            all but integrated gradients refuse it for edges. Answers of several tokens (`"sequence_log_prob"`,
            `"sequence_log_prob_diff"`) follow both prompts, and the complement is ablated at their tokens too.
        journal: a file to which every measured circuit is written, so that the same call resumes from there after a crash, a
            kill or Ctrl-C. Searches that differ only in `method`, `scores`, `steps`, `threshold`, `size` or `target` may share
            a file.
        progress: whether to show a progress bar.

    Returns:
        The circuit with its faithfulness, which is exact whatever the scores are. After Ctrl-C, `"greedy"` and `"acdc"` return
        the circuit of the last full step, and `circuit.finished` is False.

    Raises:
        FeatpatchError: the input is unusable, ablating everything hardly changes the metric, or the journal is that of another
            graph.
        KeyboardInterrupt: after Ctrl-C before the first step is finished or all items are scored.

    Examples:
        >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(10), size=5, progress=False)
        >>> len(circuit), circuit.faithfulness > 0.2
        (5, True)
    """
    check_complement(to, pairs)
    over = ("edges" if nodes is None else "nodes") if over is None else over
    check_candidates(over, nodes, saes, errors)
    check_region_free(over, nodes, positions)
    check_search(method, over, scores, steps, threshold, size, target)
    size, steps = (None if number is None else int(number) for number in (size, steps))  # NumPy numbers can't be saved as JSON
    threshold, target = (None if number is None else float(number) for number in (threshold, target))
    given: dict[str, Any] = {
        "saes": saes, "over": over, "nodes": nodes, "method": method, "scores": scores, "steps": steps, "threshold": threshold,
        "size": size, "target": target, "to": to, "errors": errors, "metric": metric, "progress": False,
        "positions": positions, "reference": reference, "seed": seed,
    }  # fmt: skip
    errors = errors or "in"
    threshold, target = THRESHOLD if threshold is None else threshold, TARGET if target is None else target
    lens = wrap(model)
    graph = _graph(lens, pairs, saes, over, nodes, to, errors, metric, positions, reference, seed)
    if size is not None and size > len(graph.items):
        raise FeatpatchError(f"size={size}: expected at most {len(graph.items)}, the number of {over}")
    scores = scores or _default_scores(graph, method, progress=progress)
    ranked, finished = np.zeros(0), True
    with graph.journal(journal):
        if method == "threshold" or (method == "greedy" and over == "edges"):
            ranked = (
                exact_scores(graph, journal, progress=progress)
                if scores == "exact"
                else estimated_scores(graph, scores, steps or STEPS, progress=progress)
            )
        if method == "threshold":
            numbers = by_threshold(ranked, threshold, size)
        elif method == "greedy" and over == "edges":
            numbers, finished = run(along_edges(graph, ranked, target, size), journal)
        elif method == "greedy":
            numbers, finished = run(greedily(graph, target, size, progress=progress), journal)
        else:
            numbers, finished = run(acdc(graph, threshold, np.ones(len(graph.items), dtype=bool), progress=progress), journal)
    metadata = {
        **graph.about(), "method": method, "metric": graph.name, "outside": to, "scores": scores if len(ranked) else None,
        "steps": (steps or STEPS) if scores in STEPPED else None, "threshold": threshold, "size": size, "target": target,
        "errors": errors, "ablation": {**graph.ablation.noted, "own": reference is None},
        "search": {name: given[name] for name in SEARCH},
        "finished": finished, **provenance(lens, pairs),
    }  # fmt: skip
    items = tuple(graph.items[number] for number in numbers)
    return Circuit(graph, items, ranked, metadata, lambda other: find_circuit(model, other, **given))


def load_circuit(
    path: str | Path,
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    to: Complement | None = None,
    reference: Pairs | None = None,
    metric: str | Metric | Sequence[str | Metric] | None = None,
) -> Circuit:
    """Read a circuit from a file, so that it can be measured, drawn and compared again, also on other pairs.

    Args:
        path: a JSON file written by `circuit.save`, or by `Graph.to_json` of EAP-IG.
        model: the model, as in `find_circuit`.
        pairs: the pairs on which the circuit is measured from now on.
        saes: the SAEs of the features and error terms among the nodes.
        to: the ablation values of the complement; by default those in the file, or `"corrupted"` for a file of EAP-IG.
        reference: the prompts that are averaged or resampled; required if the circuit was found with a `reference`.
        metric: one metric; by default that in the file, or `"logit_diff"` for a file of EAP-IG.

    Returns:
        The circuit, with the scores in the file. EAP-IG's scores have our sign if its metric was a loss.

    Raises:
        FeatpatchError: the file holds no circuit, the model has another shape than the one that the circuit was found in, or,
            for `positions="each"`, the prompts have other positions.

    Examples:
        >>> circuit = fp.find_circuit(model, pairs, scores="estimate", size=40, progress=False)
        >>> path = circuit.save(folder / "circuit.json", form="eap_ig")
        >>> again = fp.load_circuit(path, model, pairs)
        >>> set(again.items) == set(circuit.items), again.faithfulness == circuit.faithfulness
        (True, True)
    """
    content, lens = read_circuit(path), wrap(model)
    about: Mapping[str, Any] = content.get("metadata", {"over": "edges", "method": "EAP-IG's file"})
    to = about.get("outside", "corrupted") if to is None else to
    metric = about.get("metric", "logit_diff") if metric is None else metric
    check_complement(to, pairs)
    noted = about.get("ablation", {}) if to == about.get("outside") else {}
    if reference is None and not noted.get("own", True):
        raise FeatpatchError(
            f"this circuit's ablation values (to={to!r}) come from other prompts, which the file does not hold: expected them "
            "as reference=..., or another `to`"
        )
    over: Any = about.get("over")
    candidates, groups = content.get("candidates", ()), content.get("groups", {})
    nodes = [Patch(groups[node], node.site.removesuffix(TOGETHER)) if node in groups else node for node in candidates] or None
    errors = cast(Errors, about.get("errors") or "in")
    check_candidates(over, nodes, saes, errors if saes is not None else None)
    positions, seed = about.get("positions", "all"), noted.get("seed")
    graph = _graph(lens, pairs, saes, over, nodes, to, errors, metric, positions, reference, seed)
    if "edges" in content:
        items, scores = from_eap_ig(graph, content["edges"])
    else:
        check_shape(graph, content["graph"], over)
        if content["candidates"] != tuple(graph.candidates):
            raise FeatpatchError(
                f"{str(path)!r} is damaged: its candidates are not those of its groups: expected a file written by "
                "circuit.save; save the circuit again"
            )
        items, scores = content["items"], np.array(content["scores"], dtype=np.float64)
        graph.mask(items)
        if len(scores) not in (0, len(graph.items)):
            raise FeatpatchError(
                f"the file has {len(scores)} scores and {len(graph.items)} {over}: expected a score for each, or none; save "
                "the circuit again"
            )
    options = about.get("search")

    def again(other: Pairs) -> Circuit:
        if not isinstance(options, dict):
            raise FeatpatchError(
                "this circuit was found by EAP-IG: expected one that fp.find_circuit found, to find it again for other pairs"
            )
        given = {"to": to, "reference": reference, "seed": seed, "metric": metric, "positions": positions}
        found = find_circuit(model, other, saes=saes, over=over, nodes=nodes, progress=False, **given, **options)
        for threshold in about.get("refined", []):
            found = found.refine(threshold=threshold, progress=False)
        return found

    metadata = {**about, "metric": graph.name, "outside": to, **provenance(lens, pairs)}
    return Circuit(graph, items, scores, metadata, again)


def _graph(
    lens: Lens,
    pairs: Pairs,
    saes: Any,
    over: Any,
    nodes: Any,
    to: Complement,
    errors: Errors,
    metric: Any,
    positions: Positions,
    reference: Pairs | None,
    seed: int | None,
) -> Graph:
    """Return the graph of the candidates, after checking that circuits can be found in it."""
    measures, found = Measures.of(one_metric(metric)), dictionaries_if_any(lens, saes)
    candidates, groups = ((), {}) if nodes is None else _candidates(lens, check_pairs(pairs), nodes, found, errors)
    graph: Graph
    if over == "nodes":
        graph = NodeGraph(lens, pairs, to, measures, candidates, found, errors, groups, reference=reference, seed=seed)
    elif groups:
        raise FeatpatchError(
            f"{str(next(iter(groups)))!r} with over='edges': expected single nodes, because an edge ends at a node; name its "
            "members, or pass over='nodes'"
        )
    else:
        mediators, regions = mediators_of(candidates, found), Regions.of(positions, pairs)
        graph = EdgeGraph(lens, pairs, to, measures, mediators=mediators, regions=regions, reference=reference, seed=seed)
    graph.check()
    graph.check_gap()
    return graph


def exact_work(graph: Graph) -> int:
    """Return the number of multiply-adds of exact scores, if each item and token needs all layers; patches need fewer."""
    lens, tokens = graph.lens, sum(map(len, graph.pairs))
    return len(graph.items) * tokens * 12 * lens.n_layers * lens.d_model**2


def _default_scores(graph: Graph, method: Method, *, progress: bool) -> Scores:
    """Return the default kind of scores of a search; estimates are announced on the terminal."""
    if not isinstance(graph, EdgeGraph) or method == "acdc" or graph.reads_clean or exact_work(graph) <= EXACT_WORK:
        return "exact"
    if progress:
        count = len(graph.items) * len(graph.pairs)
        tqdm.write(
            f"scores are estimated by gradients, because exact ones need about {count:,} patches; "
            "estimates miss edges whose effect saturates, so compare the faithfulness, or pass scores='exact'",
            file=sys.stderr,
        )
    return "estimate"


def _candidates(
    lens: Lens, pairs: Pairs, nodes: Any, found: Sequence[Dictionary], errors: Errors
) -> tuple[tuple[Node, ...], dict[Node, tuple[Node, ...]]]:
    """Return the candidates among the nodes, and the members of those that are patches.

    Of a table, nodes without an SAE are left out at hook points with features.

    Raises:
        FeatpatchError: a node is invalid, two nodes of a patch overlap, or there are no candidates.
    """
    left_out = {"all_features"} if errors == "nodes" else {"all_features", "error"}
    entries = list(nodes) if isinstance(nodes, (list, tuple)) else []
    patches = [entry for entry in entries if isinstance(entry, Patch)]
    single = [entry for entry in entries if not isinstance(entry, Patch)] if patches else nodes
    kept = [] if patches and not single else check_nodes(lens, single, found, "nodes")
    kept = [node for node in kept if node.kind not in left_out]
    if isinstance(nodes, Effects):
        with_sae = {node.site for node in kept if node.sae}
        kept = [node for node in kept if node.sae or node.site not in with_sae]
    groups: dict[Node, tuple[Node, ...]] = {}
    for number, patch in enumerate(patches):
        members = tuple(check_nodes(lens, list(patch.nodes), found, f"the nodes of {patch.name or 'a patch'}"))
        if strange := next((node for node in members if node.kind in left_out), None):
            raise FeatpatchError(
                f"{str(strange)!r} is in a patch, with errors={errors!r}: expected nodes that can be kept or ablated; leave "
                "it out"
            )
        groups[joint(members, number, patch.name)] = members
    check_apart(groups, found, pairs)
    if not kept and not groups:
        raise FeatpatchError(
            f"nodes={nodes!r} with errors={errors!r}: expected no error terms among the candidates; leave them out, or pass "
            "errors='nodes'"
        )
    return (*kept, *groups), groups
