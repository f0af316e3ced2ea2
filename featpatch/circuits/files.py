"""Files of circuits: our own JSON, and the JSON of EAP-IG (github.com/hannamw/EAP-IG), which the MIB benchmark reads too.

EAP-IG names senders `input`, `a0.h3` (a head) and `m0` (an MLP), and edges `m0->a1.h2<q>` or `a0.h3->logits`. It has no heads
that share keys and values, so an edge into shared keys or values is written once for each head that uses them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpatch import sites
from featpatch.circuits.curve import ranking
from featpatch.circuits.graph import Graph
from featpatch.effects.storage import nodes_of
from featpatch.errors import FeatpatchError, is_finite
from featpatch.files import as_path, path_to_write, read_json, writing
from featpatch.nodes import LOGITS, Edge, Node

FORMAT = "featpatch circuit"
"""The key that marks our own files; its value is the format version."""

VERSION = 2

SEARCH = ("method", "scores", "steps", "threshold", "size", "target", "errors")
"""The options of a search that are stored, so that it can be repeated for other pairs."""


GRAPH = {"layers": int, "heads": int, "width": int, "items": int, "positions": list}
"""The shape of the graph in our own files, with the types of its values."""

METADATA: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(["over", "method", "metric", "outside"], lambda value: isinstance(value, str)),
    "positions": lambda value: value is None or isinstance(value, str | list),
    "ablation": lambda value: isinstance(value, dict) and isinstance(value.get("own"), bool),
    "search": lambda value: isinstance(value, dict) and value.keys() == set(SEARCH),
    "refined": lambda value: value is None or (isinstance(value, list) and all(map(is_finite, value))),
    "finished": lambda value: isinstance(value, bool),
}
"""What is read from the metadata in our own files, with a test of its value, which is None where it is missing."""


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write plain data as JSON, completely or not at all, to a file whose name ends in `.json`; return the path."""
    with writing(path_to_write(path, ".json")) as beside:
        beside.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    return Path(path)


def content_of(graph: Graph, items: Iterable[Node], scores: NDArray[np.float64], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a circuit as plain data."""
    content: dict[str, Any] = {
        "candidates": list(map(_fields, graph.candidates)),
        "items": list(map(_fields, items)),
        "scores": scores.tolist(),
    }
    groups = [[_fields(node) for node in graph.members_of(item)] for item in graph.candidates]
    if any(groups):
        content["groups"] = groups
    return {FORMAT: VERSION, "graph": _shape(graph), **content, "metadata": metadata}


def _shape(graph: Graph) -> dict[str, Any]:
    """Return what two graphs must have in common if an item of one is to mean the same in the other."""
    lens, positions = graph.lens, list(dict.fromkeys(item.position for item in graph.items))
    sizes = {"layers": lens.n_layers, "heads": lens.heads(sites.component(0, "z")), "width": lens.d_model}
    return {**sizes, "items": len(graph.items), "positions": positions}


def check_shape(graph: Graph, found: Mapping[str, Any], over: str) -> None:
    """Check that a circuit that was found in a graph of some shape can be a circuit of this graph.

    Args:
        graph: the graph.
        found: the shape of the graph in which the circuit was found, from its file.
        over: what the items are.

    Raises:
        FeatpatchError: the model has another shape, or the prompts have other positions.
    """
    here = _shape(graph)
    if any(found[name] != here[name] for name in ("layers", "heads", "width")):
        said = ("{layers} layers, {heads} heads and width {width}".format(**shape) for shape in (found, here))
        raise FeatpatchError(
            "the circuit was found in a model of {}, and this model has {}: expected the same; pass such a model".format(*said)
        )
    strange = [name for name in (*found["positions"], *here["positions"])
               if (name in found["positions"]) != (name in here["positions"])]  # fmt: skip
    if strange:
        raise FeatpatchError(
            "the circuit was found with positions='each' on prompts with other positions than these pairs: only one of the two "
            f"has {', '.join(map(str, strange))[:80]}: expected prompts as long, with special tokens at the same positions; "
            "pass such pairs, or find a circuit at labels"
        )
    if found["items"] != here["items"]:
        raise FeatpatchError(
            f"the circuit was found among {found['items']} {over}, and this model has {here['items']}: expected as many; pass "
            "the model that the circuit was found in"
        )


def read_circuit(path: str | Path) -> dict[str, Any]:
    """Read a file of a circuit: `graph`, `candidates`, `items`, `scores` and `metadata`, or `edges` of EAP-IG.

    Raises:
        FeatpatchError: the file can't be read, or is of neither format.
    """
    expected = "expected a file written by circuit.save or by EAP-IG's Graph.to_json"
    file = as_path(path)
    try:
        content = read_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({error.strerror}): {expected}") from error
    except ValueError as error:
        raise FeatpatchError(f"{str(path)!r} is not JSON ({str(error)[:100]}): {expected}") from error
    if isinstance(content, dict) and isinstance(content.get("edges"), dict) and isinstance(content.get("nodes"), dict):
        return {"edges": content["edges"]}
    fits = isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in (("metadata", dict), ("graph", dict), ("scores", list))
    )
    if not fits or content.get(FORMAT) != VERSION or not all(map(is_finite, content["scores"])):
        raise FeatpatchError(f"{str(path)!r} holds no circuit: {expected}")
    if any(type(content["graph"].get(name)) is not kind for name, kind in GRAPH.items()):
        raise FeatpatchError(
            f"{str(path)!r} is damaged: its graph is {str(content['graph'])[:80]}: {expected}; save the circuit again"
        )
    strange = next((name for name, fits in METADATA.items() if not fits(content["metadata"].get(name))), None)
    if strange is not None:
        raise FeatpatchError(
            f"{str(path)!r} is damaged: its metadata have {strange}={str(content['metadata'].get(strange))[:80]}: {expected}; "
            "save the circuit again"
        )
    candidates, items = (nodes_of(content.get(name)) for name in ("candidates", "items"))
    groups = content.get("groups", [[]] * len(candidates))
    if not isinstance(groups, list) or len(groups) != len(candidates):
        raise FeatpatchError(f"{str(path)!r} is damaged: expected the members of {len(candidates)} candidates; save it again")
    members = {node: nodes_of(some) for node, some in zip(candidates, groups, strict=True) if some}
    return {**content, "candidates": candidates, "items": items, "groups": members}


def to_eap_ig(graph: Graph, items: Iterable[Node], scores: NDArray[np.float64]) -> dict[str, Any]:
    """Return a circuit of edges as the content of EAP-IG's JSON.

    Raises:
        FeatpatchError: the graph has items that EAP-IG's format can't hold.
    """
    lens = graph.lens
    strange = next((i for i in graph.items if not isinstance(i, Edge) or graph.candidates or i.position != "all"), None)
    if strange is not None or lens.attention_only:
        what = "a model without MLPs" if strange is None else f"{str(strange)!r}"
        raise FeatpatchError(
            f"form='eap_ig' with {what}: expected a circuit of edges between embedding, heads, MLPs and logits, without "
            "features and at all positions together; save it with form='featpatch'"
        )
    kept, values = set(items), scores if len(scores) else np.zeros(len(graph.items))
    edges, nodes = {}, dict.fromkeys(["input", "logits"], True)
    for item, score in zip(graph.items, values.tolist(), strict=True):
        for name in eap_ig_names(graph, item):
            edges[name] = {"score": score, "in_graph": item in kept}
            sender, receiver = name.split("<")[0].split("->")
            for node in (sender, receiver):
                nodes[node] = nodes.get(node, False) or item in kept
    sizes = {"n_layers": lens.n_layers, "n_heads": lens.heads(sites.component(0, "z")), "d_model": lens.d_model}
    return {
        "cfg": {**sizes, "parallel_attn_mlp": lens.parallel},
        "nodes": {name: {"in_graph": is_kept} for name, is_kept in nodes.items()},
        "edges": edges,
    }


def from_eap_ig(graph: Graph, edges: Mapping[str, Any]) -> tuple[tuple[Node, ...], NDArray[np.float64]]:
    """Return the items of a circuit and the scores of all items from EAP-IG's edges.

    An edge into shared keys or values is kept if it is for any head that uses them, and its score is the sum of theirs.

    Raises:
        FeatpatchError: an edge is not in the graph, or its entry is not one of EAP-IG's.
    """
    numbers = {name: number for number, item in enumerate(graph.items) for name in eap_ig_names(graph, item)}
    scores, kept = np.zeros(len(graph.items)), np.zeros(len(graph.items), dtype=bool)
    for name, entry in edges.items():
        if name not in numbers:
            raise FeatpatchError(
                f"edge {name[:80]!r} is not in this model: expected a circuit of a model with the same layers and heads; pass "
                "that model"
            )
        if not isinstance(entry, dict) or not is_finite(entry.get("score")) or not isinstance(entry.get("in_graph"), bool):
            raise FeatpatchError(
                f"the entry of edge {name!r} is {str(entry)[:80]}: expected a finite score, and in_graph, true or false"
            )
        scores[numbers[name]] += entry["score"]
        kept[numbers[name]] |= entry["in_graph"]
    missing = next((name for name in numbers if name not in edges), None)
    if missing is not None:
        raise FeatpatchError(
            f"the file has {len(edges)} edges and this model {len(numbers)}, of which {missing!r} is not in the file: expected "
            "all of them, as in a circuit of a model with the same layers and heads; pass that model"
        )
    return tuple(graph.items[number] for number in ranking(scores, "absolute") if kept[number]), scores


def eap_ig_names(graph: Graph, item: Node) -> list[str]:
    """Return EAP-IG's names of an edge, several if heads share the receiver."""
    assert isinstance(item, Edge)
    suffix = f"<{item.receiver.site[-1]}>" if item.receiver.kind == "head" else ""
    return [f"{_eap_ig_name(item.sender)}->{_eap_ig_name(user)}{suffix}" for user in graph.users(item.receiver)]


def _eap_ig_name(node: Node) -> str:
    if node == LOGITS:
        return "logits"
    if node.site == sites.EMBEDDING:
        return "input"
    layer = sites.layer_of(node.site)
    return f"m{layer}" if node.index is None else f"a{layer}.h{node.index}"


def _fields(node: Node) -> list[Any]:
    """Return the fields of a node, and those of its sender and receiver if it is an edge, as `nodes_of` parses them."""
    ends: Sequence[Node] = (node.sender, node.receiver) if isinstance(node, Edge) else ()
    return [node.site, node.kind, node.index, node.position, node.sae, *map(_fields, ends)]
