"""Find a circuit over nodes or over edges."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from featpatch.circuits.circuit import Circuit
from featpatch.circuits.cuts import cuts
from featpatch.circuits.edges import EdgeGraph
from featpatch.circuits.graph import Graph
from featpatch.circuits.nodes import Errors, NodeGraph
from featpatch.circuits.outside import Outside
from featpatch.circuits.search import acdc, alone, along_edges, by_threshold, check_search, greedily
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, check_nodes, dictionaries_if_any, provenance, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs, check_pairs
from featpatch.patch import Node
from featpatch.patching.study.readings import readout

Method = Literal["threshold", "greedy", "acdc"]
"""The name of a search method; see `find_circuit`."""


def find_circuit(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    over: Literal["nodes", "edges"] = "nodes",
    nodes: Effects | Sequence[Node] | None = None,
    method: Method = "threshold",
    scores: Literal["exact", "estimate"] = "exact",
    threshold: float | None = None,
    size: int | None = None,
    target: float = 0.9,
    to: Outside = "corrupted",
    errors: Errors = "in",
    metric: str | Metric = "logit_diff",
    progress: bool = True,
) -> Circuit:
    """Find the part of the model that produces the behaviour by itself in the clean runs, with its complement ablated.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of your own.
        pairs: clean and corrupted prompts with their answers.
        saes: the SAEs of the features and error terms among the nodes.
        over: `"nodes"`: the candidates are `nodes`. `"edges"`: the candidates are the edges between embedding, heads (by query,
            key and value), MLPs and logits and, if features or errors are given, these as mediators, with the rest of their
            activation as a mediator too (`rest`).
        nodes: features, error terms, heads at `hook_z` and whole activations; or a table of effects whose rows are the nodes.
            At their hook points everything that is not kept is ablated. For edges: features and errors of dictionaries of the
            residual stream, of `hook_attn_out` or `hook_mlp_out`, or transcoders of an MLP.
        method: `"threshold"`: keep the items with the largest score. `"greedy"`: until faithfulness reaches `target`, add the
            node that brings it closest to 1, starting from nothing, or the edge with the largest score, starting from the
            logits. `"acdc"`: from the output down, remove items that change faithfulness by less than `threshold` (Conmy et
            al. 2023).
        scores: `"exact"`: an item's score is the loss of faithfulness with only that item ablated. `"estimate"` (only for
            edges): the score is an estimate of that loss by gradient (edge attribution patching).
        threshold: a share of the behaviour; 0.01 by default.
        size: the number of items to keep, instead of `threshold` or `target`.
        target: the faithfulness at which `"greedy"` stops.
        to: the ablation values of the complement: `"corrupted"`, `"mean"` or `"resample"` (the latter two from the clean runs
            of equally long pairs).
        errors: error terms are all kept (`"in"`), all ablated (`"out"`), or candidates like other nodes (`"nodes"`). For edges
            `"in"` means that errors are a part of the rest.
        metric: one metric; for estimates it must be differentiable and not `"neg_kl"`, whose gradient is zero in the whole
            model. Answers of several tokens (`"sequence_log_prob"`, `"sequence_log_prob_diff"`) follow both prompts, and the
            complement is ablated at their tokens too.
        progress: whether to show a progress bar.

    Returns:
        The circuit with its faithfulness, which is exact whatever the scores are.

    Raises:
        FeatpatchError: if the input is unusable, or ablating everything hardly changes the metric.
    """
    check_pairs(pairs)
    for name, value, known in (("over", over, ("nodes", "edges")), ("scores", scores, ("exact", "estimate")),
                               ("errors", errors, get_args(Errors))):  # fmt: skip
        if value not in known:
            raise FeatpatchError(f"{name}={value!r}: expected one of {', '.join(known)}")
    check_search(method, over, scores, threshold, size, target)
    if over == "edges" and errors == "out":
        raise FeatpatchError("over='edges' with errors='out': expected 'in', a part of the rest, or 'nodes', among the nodes")
    if over == "edges" and (nodes is None) != (saes is None):
        raise FeatpatchError("over='edges' with nodes or saes alone: expected both, for edges of features, or neither")
    if over == "nodes" and nodes is None:
        raise FeatpatchError("over='nodes' without nodes: expected candidates, e.g. nodes=effects.top(50), or over='edges'")
    lens, read = wrap(model), readout(metric, single=True)
    graph: Graph
    found = dictionaries_if_any(lens, saes)
    candidates = () if nodes is None else _candidates(lens, nodes, found, errors)
    if over == "nodes":
        graph = NodeGraph(lens, pairs, to, read, candidates, dictionaries=found, errors=errors)
    else:
        graph = EdgeGraph(lens, pairs, to, read, cuts=cuts(lens, candidates, found))
    graph.check()
    graph.check_gap()
    if size is not None and size > len(graph.items):
        raise FeatpatchError(f"size={size}: expected at most {len(graph.items)}, the {over} that there are")
    ranked = np.zeros(0)
    if method == "threshold" or (method == "greedy" and over == "edges"):
        ranked = _estimated(graph) if scores == "estimate" else alone(graph, progress=progress)
    if method == "threshold":
        items = by_threshold(graph, ranked, threshold or 0.01, size)
    elif method == "greedy" and over == "edges":
        items = along_edges(graph, ranked, target, size)
    elif method == "greedy":
        items = greedily(graph, target, size, progress=progress)
    else:
        items = acdc(graph, threshold or 0.01, graph.items[::-1], progress=progress)
    options: dict[str, Any] = {
        "saes": saes, "over": over, "nodes": nodes, "method": method, "scores": scores, "threshold": threshold, "size": size,
        "target": target, "to": to, "errors": errors, "metric": metric, "progress": False,
    }  # fmt: skip
    metadata = {
        **graph.about(), "method": method, "metric": graph.name, "outside": to, "scores": scores if len(ranked) else None,
        "threshold": threshold or 0.01, "size": size, "target": target, **provenance(lens, pairs),
    }  # fmt: skip
    return Circuit(graph, tuple(items), ranked, metadata, lambda other: find_circuit(model, other, **options))


def _estimated(graph: Graph) -> Any:
    assert isinstance(graph, EdgeGraph)
    return graph.estimates() / (graph.whole.mean() - graph.empty.mean())


def _candidates(lens: Lens, nodes: Any, found: Sequence[Dictionary], errors: Errors) -> tuple[Node, ...]:
    kept = [
        n
        for n in check_nodes(lens, nodes, found, "nodes")
        if n.kind != "all_features" and (errors == "nodes" or n.kind != "error")
    ]
    if isinstance(nodes, Effects):
        with_sae = {node.site for node in kept if node.sae}
        kept = [node for node in kept if node.sae or node.site not in with_sae]
    if not kept:
        raise FeatpatchError(f"nodes={nodes!r} with errors={errors!r}: expected candidates that are no error terms")
    return tuple(kept)
