"""An attribution graph as JSON for the viewers of circuit-tracer and Neuronpedia."""

from collections.abc import Sequence
from typing import Any

from featpatch import sites
from featpatch.diagram.viewers import cantor, check_slug, escaped, graph_file, head_of_file, supernodes
from featpatch.errors import check_kinds
from featpatch.nodes import Patch
from featpatch.tracing.result import AttributionGraph


def viewer(
    graph: AttributionGraph, slug: str, *, scan: str = "", source_set: str = "", groups: Sequence[Patch] = ()
) -> dict[str, Any]:
    """Return a graph as a dictionary for viewers; `AttributionGraph.to_viewer` describes the arguments."""
    check_slug(slug)
    check_kinds(str, scan=scan, source_set=source_set)
    nodes = [_node(graph, number) for number in range(len(graph.nodes))]
    targets, sources = graph.adjacency.nonzero()
    ids = [node["node_id"] for node in nodes]
    connected = {*targets.tolist(), *sources.tolist()}
    kept = [n for n, node in enumerate(nodes) if n in connected or node["feature_type"] in ("embedding", "logit")]
    words = graph.words or tuple(map(str, graph.prompt))
    own_scan, own_set = graph.source_set.partition("/")[::2]
    name = graph.model.rstrip("/").rpartition("/")[2]  # the model can be a folder
    source_set = source_set or ("" if scan else own_set)
    metadata = head_of_file(slug, scan or own_scan or name, words, graph.text or "".join(words), source_set)
    metadata["generation_settings"] = {"max_n_logits": graph.kinds.logits, "max_feature_nodes": graph.kinds.features}
    if graph.pruning is not None:
        metadata["node_threshold"] = graph.pruning[0]
        metadata["pruning_settings"] = dict(zip(("node_threshold", "edge_threshold"), graph.pruning, strict=True))
    links = [
        (ids[source], ids[target], float(graph.adjacency[target, source]))
        for target, source in zip(targets, sources, strict=True)
    ]
    named = supernodes(groups, [graph.nodes[n] for n in kept], [ids[n] for n in kept])
    return graph_file(metadata, [nodes[n] for n in kept], links, named)


def _node(graph: AttributionGraph, number: int) -> dict[str, Any]:
    """Return the fields of a node, see `graph_models.py` of circuit-tracer."""
    node, at = graph.nodes[number], int(graph.nodes[number].position)
    influence: float | None = float(graph.cumulative[number])
    text, probability, activation = "", 0.0, None
    if node.kind == "logit":
        logit = number - (len(graph.nodes) - graph.kinds.logits)
        layer, index, feature, kind = str(_layers(graph) + 1), node.index, node.index, "logit"
        probability, influence = float(graph.probabilities[logit]), None
        text = f'Output "{graph.answers[logit] if graph.answers else node.index}" (p={probability:.3f})'
    elif node.site == sites.EMBEDDING:
        layer, index, feature, kind = "E", graph.prompt[at], at, "embedding"
    else:
        above = sites.layer_of(node.site)
        layer, index, feature, kind = str(above), -1, -1, "mlp reconstruction error"
        if node.kind == "feature":
            assert node.index is not None
            index, feature, kind = node.index, cantor(above, node.index), "cross layer transcoder"
            activation = float(graph.values[number])
    return {
        "node_id": f"{layer}_{index}_{at}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": at,
        "feature_type": kind,
        "token_prob": probability,
        "is_target_logit": node.kind == "logit" and number == len(graph.nodes) - graph.kinds.logits,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if kind == 'logit' else layer}_{index}-{at}",
        "clerp": escaped(text),
        "influence": influence,
        "activation": activation,
    }


def _layers(graph: AttributionGraph) -> int:
    """Return the number of layers of the model or, if it is unknown, of those up to the highest one that has a node."""
    inside = [node.site for node in graph.nodes if node.kind != "logit" and node.site != sites.EMBEDDING]
    return graph.n_layers or 1 + max(map(sites.layer_of, inside), default=0)
