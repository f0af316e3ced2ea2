"""A graph as an HTML page, and as JSON for the attribution-graph viewers of circuit-tracer and Neuronpedia."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from featpatch import sites
from featpatch.diagram.draw import middles
from featpatch.diagram.graph import INPUTS, Content, content, digits, is_end, is_group, label, layout, short
from featpatch.errors import FeatpatchError, check_kinds, counted, is_integer
from featpatch.nodes import LOGITS, Node, Patch
from featpatch.page.page import Block, Section, block, page, table


def viewer_json(
    graph: Any,
    *,
    tokens: Sequence[str],
    slug: str,
    model: str,
    positions: Mapping[str, int | tuple[int, ...]] | None = None,
    groups: Sequence[Patch] = (),
    source_set: str = "",
) -> dict[str, Any]:
    r"""Convert a graph to a dictionary that `json.dump` can write to a file `{slug}.json`.

    The fields are those of circuit-tracer 0.4.1 with the later names of error nodes (`frontend/graph_models.py` at 196e2ce, and
    what its `frontend/assets` read) and of Neuronpedia's `graph-schema.json` at ebb8426.

    Neuronpedia accepts the file as an upload. For circuit-tracer's server, put
    the file into its data folder, and `metadata` into the list `graphs` of the file `graph-metadata.json` there.

    - The `weight` of a link is the effect of the edge. Viewers know one link from a node to another, so the effects of edges
      into the query, key and value of a head are added up; the other formats keep them apart. The effect of a node, if it is
      known, is stored as `effect`, which no viewer interprets.
    - `feature` is the Cantor pairing of layer and index, `(l + i) (l + i + 1) / 2 + i`, as `schema_version` 1 requires. Viewers
      treat equal numbers as the same feature, so nodes that are not of the first dictionary of a layer get indices after those
      in use, and errors count down from -1.
    - A viewer that has feature pages for `model` shows these for the features of the graph; on Neuronpedia `source_set` says
      which. If the features are of other dictionaries, give `model` another name.
    - Fields that do not apply to a circuit are empty: `influence` (a share of a pruned graph; so there is no `node_threshold`
      either), `activation`, `transcoder_list`, `pinnedIds`, `clickedId`, `sg_pos`. `token_prob` is 0, and the
      probability in the text of the output is a question mark, because the output is a metric and not a token. `run_idx` and
      `reverse_ctx_idx` are 0, as circuit-tracer writes them.
    - Viewers insert `clerp`, the text of a node, into the page as HTML, so `<` is replaced by its full-width form.
    - Neuronpedia refuses graphs with no node above layer 0, and circuit-tracer shows no graph for a prompt of one token.

    Args:
        graph: a `networkx.DiGraph` or `MultiDiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known,
            on nodes. Nodes at `"all"` positions are placed at the last token, the embedding at the first; their text says
            `@ all`.
        tokens: the tokens of the prompt to which the indices refer.
        slug: the name of the file, and of the graph in a viewer's address.
        model: the name that viewers call the scan, such as `"gpt2-small"`.
        positions: the token index of each label at which the graph has nodes, such as `pairs[0].labels`; a label of several
            tokens is placed at its last one.
        groups: patches with names, such as `groups.patches` of `fp.group_features`; their nodes in the graph become supernodes.
        source_set: the set of sources on Neuronpedia whose dashboards are shown for the features, such as
            `"gemmascope-res-16k"`.

    Raises:
        FeatpatchError: a position is not that of a token, two nodes that differ only in the name of their position are placed
            at one token, the slug does not fit into an address, there is more than one output, or the graph can't be shown.

    Examples:
        >>> import json
        >>> mlps = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation", None, 27) for layer in range(2)]
        >>> graph = fp.diagram.graph([fp.Edge.of(mlps[0], mlps[1]), fp.Edge.of(mlps[1], fp.LOGITS)], [0.5, 0.2])
        >>> tokens = model.tokenizer.convert_ids_to_tokens(pairs[0].clean)
        >>> viewed = fp.diagram.viewer_json(graph, tokens=tokens, slug="ioi", model="demo")
        >>> _ = (folder / "ioi.json").write_text(json.dumps(viewed))
        >>> len(viewed["nodes"]), len(viewed["links"])
        (3, 2)
    """
    said = content(graph)
    if not isinstance(tokens, list | tuple) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FeatpatchError(f"tokens={tokens!r}: expected the tokens of the prompt as a list of strings")
    check_slug(slug)
    check_kinds(str, source_set=source_set)
    if not isinstance(model, str) or not model:
        raise FeatpatchError(f"model={model!r}: expected the name of the model, such as 'gpt2-small'")
    if group := next((node for node in said.nodes if is_group(node)), None):
        raise FeatpatchError(
            f"{str(group)!r} is a group, which belongs to no layer: expected a graph of its members; pass the group as "
            "groups=..."
        )
    outputs = [node for node in said.nodes if node.site == LOGITS.site]
    if len(outputs) > 1:
        raise FeatpatchError(f"the graph has {len(outputs)} output nodes: expected at most one node at {LOGITS.site!r}")
    if not isinstance(positions, Mapping | None):
        raise FeatpatchError(f"positions={positions!r}: expected the token index of each label, such as pairs[0].labels")
    placed = [_position(node, len(tokens), positions or {}) for node in said.nodes]
    layers, numbers = _layers(said), _numbers(said)
    ids = [f"{layer}_{number}_{at}" for layer, number, at in zip(layers, numbers, placed, strict=True)]
    twice = next((n for n, name in enumerate(ids) if name in ids[:n]), None)
    if twice is not None:
        raise FeatpatchError(
            f"{said.nodes[ids.index(ids[twice])]} and {said.nodes[twice]} are both placed at token {placed[twice]}: expected "
            "one node there; leave one of them out of the graph"
        )
    links: dict[tuple[str, str], float] = defaultdict(float)
    for edge in said.edges:
        links[ids[edge.source], ids[edge.target]] += edge.effect
    nodes = [
        {
            "node_id": ids[n],
            "feature": number if number < 0 else cantor(int(layers[n]) if layers[n] != "E" else 0, number),
            "layer": layers[n],
            "ctx_idx": placed[n],
            "feature_type": _type(said.nodes[n]),
            "token_prob": 0.0,
            "is_target_logit": said.nodes[n].site == LOGITS.site,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{layers[n]}_{number}-{placed[n]}",
            "clerp": _text(said.nodes[n]),
            "influence": None,
            "activation": None,
            **({} if said.effects[n] is None else {"effect": said.effects[n]}),
        }
        for n, number in enumerate(numbers)
    ]
    metadata = head_of_file(slug, model, tokens, "".join(tokens), source_set)
    weights = [(source, target, weight) for (source, target), weight in links.items()]
    return graph_file(metadata, nodes, weights, supernodes(groups, said.nodes, ids))


def check_slug(slug: Any) -> None:
    """Raise a FeatpatchError unless the name of a graph fits into an address."""
    if not isinstance(slug, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", slug):
        raise FeatpatchError(f"slug={slug!r}: expected letters, digits, '-', '_' and '.', such as 'ioi-circuit'")


def head_of_file(slug: str, scan: str, tokens: Sequence[str], prompt: str, source_set: str) -> dict[str, Any]:
    """Return the metadata of a graph file."""
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(tokens),
        "prompt": prompt,
        "schema_version": 1,
        "info": {"generator": {"name": "featpatch"}},
        **({"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}),
    }


def graph_file(
    metadata: dict[str, Any], nodes: list[dict[str, Any]], links: Sequence[tuple[str, str, float]], groups: list[list[str]]
) -> dict[str, Any]:
    """Return the content of a graph file: links are source, target and weight; no node is pinned or chosen."""
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": source, "target": target, "weight": weight} for source, target, weight in links],
    }


def supernodes(groups: Sequence[Patch], nodes: Sequence[Node], ids: Sequence[str]) -> list[list[str]]:
    """Return groups of nodes as supernodes, those that have a node in the graph: the name, then the ids of nodes.

    Raises:
        FeatpatchError: a group is not a patch.
    """
    check_kinds((list, tuple), groups=groups)
    check_kinds(Patch, **{f"groups[{number}]": patch for number, patch in enumerate(groups)})
    of_group = [[name for node, name in zip(nodes, ids, strict=True) if node in patch.nodes] for patch in groups]
    return [[patch.name, *members] for patch, members in zip(groups, of_group, strict=True) if members]


def _position(node: Node, n_tokens: int, labels: Mapping[str, int | tuple[int, ...]]) -> int:
    """Return the token index at which a node is placed.

    Raises:
        FeatpatchError: its position is neither a token index of the prompt nor a known label.
    """
    place: Any = labels.get(node.position, node.position) if isinstance(node.position, str) else node.position
    if place == "all":
        return 0 if node.site == sites.EMBEDDING else n_tokens - 1
    last = place[-1] if isinstance(place, tuple) and place else place
    if not is_integer(last) or not 0 <= last < n_tokens:
        raise FeatpatchError(
            f"{node} is at position {place!r}: expected a token index from 0 to {n_tokens - 1}, because viewers place "
            "nodes at tokens; for labels, pass the indices in one prompt, such as positions=pairs[0].labels"
        )
    return int(last)


def _layers(said: Content) -> list[str]:
    """Return the layer of each node as text: E for the embedding, and for the output two more than the highest layer."""
    above = max((sites.layer_of(node.site) for node in said.nodes if not is_end(node)), default=-1) + 2
    ends = {sites.EMBEDDING: "E", LOGITS.site: str(above)}
    return [ends[node.site] if is_end(node) else str(sites.layer_of(node.site)) for node in said.nodes]


def _numbers(said: Content) -> list[int]:
    """Return a number for each node that is unique within its layer and position.

    Features of the first dictionary of a layer keep their index.
    """
    power = 10 ** len(str(max(node.index or 0 for node in said.nodes)))
    places: dict[tuple[str, bool], dict[tuple[str, ...], int]] = {}
    numbers = [0] * len(said.nodes)
    layers = _layers(said)
    for n in sorted(range(len(said.nodes)), key=lambda n: said.nodes[n].kind != "feature"):
        node, error = said.nodes[n], said.nodes[n].kind == "error"
        ranks = places.setdefault((layers[n], error), {})
        rank = ranks.setdefault((node.site, node.kind, node.sae), len(ranks))
        numbers[n] = -1 - rank if error else (node.index or 0) + power * rank
    return numbers


def cantor(layer: int, index: int) -> int:
    """Return the Cantor pairing of a layer and an index."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _type(node: Node) -> str:
    """Return the type of a node, by which viewers choose its marker and text; unknown types are drawn as circles."""
    if node.site == LOGITS.site:
        return "logit"
    if node.kind == "feature":
        return "cross layer transcoder"
    if node.kind == "error":
        mlp = not is_end(node) and node.site == sites.component(sites.layer_of(node.site), "mlp_out")
        return "mlp reconstruction error" if mlp else "reconstruction error"
    if node.site == sites.EMBEDDING and node.kind == "activation":
        return "whole embedding" if node.position == "all" else "embedding"
    return "attention head" if node.kind == "head" else node.kind.replace("_", " ")


def _text(node: Node) -> str:
    """Return the text of a node; for the output, in the format that viewers parse."""
    return f'Output "{LOGITS.site}" (p=?)' if node.site == LOGITS.site else escaped(label(node))


def escaped(text: str) -> str:
    """Return text that viewers can insert into a page as HTML."""
    return text.replace("<", "\uff1c")


def interactive(graph: Any, title: str, *, answer: str = "") -> str:
    """Return a graph as one HTML file that needs no network; a click on a node shows its effect and those of its edges.

    Args:
        graph: a `networkx.DiGraph` or `MultiDiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known,
            on nodes.
        title: the title of the page as plain text.
        answer: what the graph shows, in a sentence above the figure, as plain text.

    Returns:
        The content of the file.

    Raises:
        FeatpatchError: the graph is not of this kind, an effect is not a finite number, or a text is not a string.

    Examples:
        >>> strongest = components.top(5)
        >>> graph = fp.diagram.graph(strongest.nodes, strongest.pooled("recovery").tolist())
        >>> page = fp.diagram.interactive(graph, title="Heads at S2")
        >>> "Heads at S2" in page
        True
    """
    check_kinds(str, title=title, answer=answer)
    said = content(graph)
    first = [Section("answer", "", "", [block("answer.html", answer=answer, figures=())])] if answer else []
    return page(title, f"{counted(len(said.nodes), 'node')}, {counted(len(said.edges), 'edge')}", [*first, *sections(graph)])


def sections(graph: Any) -> list[Section]:
    """Return two sections of a page: the figure with the panel of numbers, and the table of all edges, or nodes without edges.

    Examples:
        >>> strongest = components.top(5)
        >>> graph = fp.diagram.graph(strongest.nodes, strongest.pooled("recovery").tolist())
        >>> [section.title for section in fp.diagram.sections(graph)]
        ['Graph', 'Nodes']
    """
    said = content(graph)
    names = [label(node) for node in said.nodes]
    if said.edges:
        ends = [(names[edge.source], edge.to(names[edge.target]), _four(edge.effect)) for edge in _largest_first(said)]
        rows = table(pd.DataFrame(ends, columns=["from", "to", "effect"]))
        every = Section("edges", "Edges", "All edges, sorted by the size of their effect.", [rows])
    else:
        alone = sorted(zip(names, map(_four, said.effects), strict=True), key=lambda row: -abs(row[1] or 0.0))
        rows = table(pd.DataFrame(alone, columns=["node", "effect"]))
        every = Section(
            "nodes", "Nodes", str(graph.graph.get("note", "All nodes, sorted by the size of their effect.")), [rows]
        )
    text = (
        "Hook points from bottom (early layers) to top, positions from left to right. The width of a line shows the size of "
        "the effect; positive effects are blue, negative ones orange and dashed. Choose a node, by click or Enter, to see its "
        "numbers below the figure."
    )
    return [Section("graph", "Graph", text, [drawing(said), block("nodes.html", nodes=_all_numbers(said, names))]), every]


def _four(effect: float | None) -> float | None:
    """Return an effect with four significant digits."""
    return None if effect is None else float(f"{effect:.4g}")


SHAPES = {"feature": 0, "error": 1, "head": 2, "neuron": 3, "activation": 6}
"""The number of the shape in `page/templates/shapes.html` for each kind of node; others are circles."""

ROW, COLUMN, LABELS = 64, 60, 110
"""The height of a row, the least width of a column and the width of the names of rows, in pixels."""

WIDEST, THINNEST = 7.0, 0.8
"""The width in pixels of the line of the largest effect, and the least width of a line."""


def drawing(said: Content) -> Block:
    """Return the figure of a graph as SVG, with a curve for each edge and a marker that can be focused for each node."""
    places, names = layout(said.nodes), [label(node) for node in said.nodes]
    left, right = min(places.borders[0], *places.x) - 0.5, max(places.borders[-1], *places.x) + 0.5
    height = ROW * len(places.rows)

    def across(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        return round(height - ROW * (y + 0.5), 1)

    centres = [(x, float(y)) for x, y in zip(places.x, places.y, strict=True)]
    edges = sorted(said.edges, key=lambda edge: abs(edge.effect))
    drawn = []
    for edge, (x, y) in zip(edges, middles([(edge.source, edge.target) for edge in edges], centres), strict=True):
        (x0, y0), (x1, y1) = centres[edge.source], centres[edge.target]
        bend = 2 * x - (x0 + x1) / 2, 2 * y - (y0 + y1) / 2
        drawn.append(
            {
                "sign": "negative" if edge.effect < 0 else "positive",
                "width": round(max(THINNEST, said.width(edge, WIDEST)), 1),
                "path": f"M{across(x0)} {down(y0)}Q{across(bend[0])} {down(bend[1])} {across(x1)} {down(y1)}",
                "text": f"{names[edge.source]} \u2192 {edge.to(names[edge.target])}: effect {digits(edge.effect)}",
            }
        )
    largest = max((abs(effect) for effect in said.effects if effect is not None), default=0.0) or 1.0
    nodes = [
        {
            "x": across(x),
            "y": down(y),
            "shape": SHAPES.get(node.kind, 0),
            "name": short(node),
            "text": f"{name}, effect {digits(effect)}",
            "sign": "" if effect is None else "negative" if effect < 0 else "positive",
            "share": 0 if effect is None else round(80 * abs(effect) / largest),
        }
        for node, name, effect, (x, y) in zip(said.nodes, names, said.effects, centres, strict=True)
    ]
    kinds = dict.fromkeys(node.kind for node in said.nodes)
    return block(
        "graph.html",
        height=height,
        width=LABELS + COLUMN * math.ceil(right - left),
        bands=[(down(high + 0.5), ROW * (high - low + 1)) for low, high in places.bands],
        borders=[across(border) for border in places.borders[1:-1]],
        rows=[(down(y), name) for y, name in enumerate(places.rows)],
        columns=[(across(middle), name) for middle, name in places.columns],
        edges=drawn,
        nodes=nodes,
        kinds=[(kind.replace("_", " "), SHAPES.get(kind, 0)) for kind in kinds],
    )


def _largest_first(said: Content) -> list[Any]:
    return sorted(said.edges, key=lambda edge: -abs(edge.effect))


def _all_numbers(said: Content, names: list[str]) -> list[dict[str, Any]]:
    """Return the name, effect and edges that the page shows for each node, in the order of the nodes."""
    about: list[dict[str, Any]] = [
        {"name": name, "effect": digits(effect), "arriving": [], "leaving": []}
        for name, effect in zip(names, said.effects, strict=True)
    ]
    for edge in _largest_first(said):
        into = f" into {INPUTS[edge.through]}" if edge.through else ""
        about[edge.target]["arriving"].append({"node": f"from {names[edge.source]}{into}", "effect": digits(edge.effect)})
        about[edge.source]["leaving"].append({"node": f"to {edge.to(names[edge.target])}", "effect": digits(edge.effect)})
    return about
