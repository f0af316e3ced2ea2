"""Circuits as DOT, figures, pages and attribution graphs: what they say, text of users, a real browser, viewers' fields."""

import json
import re
import time
import warnings
from collections import Counter
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

import featpatch as fp
from featpatch import Node
from featpatch.diagram.draw import dot, figure
from featpatch.diagram.viewers import interactive, viewer_json

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
MARKUP = "<b>bold</b> &amp; <br>"
TEXTS = [EVIL, MARKUP, 'a "quoted" name', "a: colon", "back\\slash\\", "two\nlines", "{|<port>|}", "%{x} $x$", "</script>", "ü→", "\\N \\G", ""]  # fmt: skip
EMBED, LOGITS = Node("hook_embed", "activation"), Node("logits", "activation")
MLP, LAST = (
    Node("blocks.1.hook_mlp_out", "activation", position="S2"),
    Node("blocks.3.hook_mlp_out", "activation", position="end"),
)
HEAD, OTHER = Node("blocks.3.attn.hook_z", "head", 5, "end"), Node("blocks.3.attn.hook_z", "head", 7, "end")
FEATURE = Node("blocks.2.hook_resid_pre", "feature", 121, "S2", sae="blocks.2.hook_resid_pre")
ERROR = Node("blocks.2.hook_resid_pre", "error", None, "S2", sae="blocks.2.hook_resid_pre")
NAMES = {
    EMBED: "embed",
    MLP: "L1 mlp @ S2",
    FEATURE: "L2 feature 121 of blocks.2.hook_resid_pre @ S2",
    ERROR: "L2 error of blocks.2.hook_resid_pre @ S2",
    HEAD: "L3 head 5 @ end",
    OTHER: "L3 head 7 @ end",
    LAST: "L3 mlp @ end",
    LOGITS: "logits",
}
EDGES = [
    (EMBED, MLP, 0.25),
    (MLP, FEATURE, 0.123456),
    (MLP, ERROR, -0.0625),
    (FEATURE, HEAD, -0.5),
    (FEATURE, OTHER, 0.0),
    (HEAD, LAST, 0.75),
    (HEAD, LOGITS, 1.0),
    (EMBED, LOGITS, -0.1),
]
TOKENS = ["<bos>", "When", " Mary", "\n", " John"]


def circuit() -> nx.DiGraph:
    graph = nx.DiGraph()
    for node in NAMES:
        graph.add_node(node)
    for node, effect in {MLP: 0.4, FEATURE: 0.3125, HEAD: -0.2}.items():
        graph.nodes[node]["effect"] = np.float64(effect)
    for source, target, effect in EDGES:
        graph.add_edge(source, target, effect=effect)
    return graph


def hostile() -> nx.DiGraph:
    """Every text as a dictionary's name and as a position, in a row of edges."""
    nodes = [replace(FEATURE, sae=text, position=text or "end", index=n) for n, text in enumerate(TEXTS)]
    graph = nx.DiGraph()
    for source, target in zip([EMBED, *nodes], [*nodes, LOGITS], strict=True):
        graph.add_edge(source, target, effect=0.5)
    return graph


def at_tokens() -> nx.DiGraph:
    return nx.relabel_nodes(
        circuit(), lambda node: replace(node, position={"S2": 2, "end": 4}.get(node.position, node.position))
    )


def parsed(text: str) -> Any:
    pydot = pytest.importorskip("pydot")
    with warnings.catch_warnings():  # pydot calls pyparsing by names that are going
        warnings.simplefilter("ignore", DeprecationWarning)
        (graph,) = pydot.graph_from_dot_data(text)
    return graph


def shown(quoted: str) -> str:
    """The text that Graphviz shows for a quoted string."""
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], quoted[1:-1])


def opened(browser: Any, path: Path, text: str) -> None:
    """The page is in the browser, its figure and table drawn."""
    browser.set_window_size(1280, 1400)
    path.write_text(text)
    for log in ("browser", "performance"):
        browser.get_log(log)
    start = time.perf_counter()
    browser.get(path.as_uri())
    ready = "return document.querySelectorAll('#graph g.node').length > 0 && document.querySelectorAll('table.dataTable tbody tr').length > 0"
    while not browser.execute_script(ready):
        assert time.perf_counter() - start < 30, browser.get_log("browser")
        time.sleep(0.05)


def click(browser: Any, number: int) -> None:
    """On the marker of a node, where the figure has drawn it."""
    from selenium.webdriver.common.action_chains import ActionChains

    (marker,) = browser.find_elements("css selector", f'#graph g.node[data-number="{number}"] use')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", marker)
    ActionChains(browser).move_to_element(marker).click().perform()
    time.sleep(0.3)


def test_dot_says_what_the_graph_says() -> None:
    graph = parsed(dot(circuit()))
    names = {node.get_name(): shown(node.get_label()) for node in graph.get_nodes()}
    assert list(names.values()) == list(NAMES.values())
    lines = {(names[edge.get_source()], names[edge.get_destination()]): edge for edge in graph.get_edges()}
    assert set(lines) == {(NAMES[source], NAMES[target]) for source, target, _ in EDGES}
    for source, target, effect in EDGES:
        line = lines[NAMES[source], NAMES[target]]
        assert float(line.get("penwidth")) == pytest.approx(5 * abs(effect), abs=1e-4)
        assert line.get("color").strip('"') == ("#c0392b" if effect < 0 else "#2166ac")
        assert float(line.get("tooltip").strip('"')) == effect
    together = [sorted(names[node.get_name()] for node in part.get_nodes()) for part in graph.get_subgraphs()]
    assert all(part.get("rank") == "same" for part in graph.get_subgraphs())
    assert sorted([NAMES[HEAD], NAMES[OTHER]]) in together
    assert sorted([NAMES[FEATURE], NAMES[ERROR]]) in together
    assert [NAMES[LAST]] in together
    assert graph.get("rankdir") == "BT"


def test_dot_escapes() -> None:
    text = dot(hostile())
    assert "two\\nlines" in text
    graph = parsed(text)
    assert len(graph.get_nodes()) == len(TEXTS) + 2
    assert len(graph.get_edges()) == len(TEXTS) + 1
    labels = [shown(node.get_label()) for node in graph.get_nodes()][1:-1]
    assert labels == [f"L2 feature {n} of {text or FEATURE.site} @ {text or 'end'}" for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (Node("blocks.0.hook_attn_out", "activation", position=3), "L0 attention @ 3"),
        (Node("blocks.0.hook_resid_mid", "activation"), "L0 resid_mid @ all"),
        (Node("blocks.0.attn.hook_q", "head", 2, "end"), "L0 q head 2 @ end"),
        (Node("blocks.4.mlp.hook_post", "neuron", 9, "end"), "L4 neuron 9 @ end"),
        (Node("blocks.4.hook_mlp_out", "all_features", None, "end", "mine"), "L4 all features of mine @ end"),
        (Node("blocks.4.ln2.hook_normalized", "activation", None, 0), "L4 ln2.hook_normalized @ 0"),
        (replace(EMBED, position=2), "embed @ 2"),
    ],
)
def test_names(node: Node, name: str) -> None:
    graph = nx.DiGraph()
    graph.add_node(node)
    assert shown(parsed(dot(graph)).get_nodes()[0].get_label()) == name


def marks(drawn: Any) -> Any:
    (trace,) = [trace for trace in drawn.data if trace.customdata is not None]
    return trace


def test_places() -> None:
    """Layers upwards, positions across in the order in which they appear, no two nodes in one place."""
    drawn = figure(circuit())
    trace = marks(drawn)
    y = dict(zip(NAMES, trace.y, strict=True))
    x = dict(zip(NAMES, trace.x, strict=True))
    assert y[EMBED] < y[MLP] < y[FEATURE] == y[ERROR] < y[HEAD] == y[OTHER] < y[LAST] < y[LOGITS]
    assert abs(x[FEATURE] - x[ERROR]) == abs(x[HEAD] - x[OTHER]) == 1
    assert max(x[MLP], x[FEATURE], x[ERROR]) < min(x[HEAD], x[OTHER], x[LAST])
    assert list(drawn.layout.xaxis.ticktext) == ["S2", "end"]
    assert drawn.layout.xaxis.tickvals[0] == x[MLP]
    assert list(drawn.layout.yaxis.ticktext) == ["embed", "L1 mlp", "L2 resid_pre", "L3 heads", "L3 mlp", "logits"]
    assert len(set(zip(trace.x, trace.y, strict=True))) == len(NAMES)
    left, right = drawn.layout.xaxis.range
    assert all(left < place < right for place in trace.x)


def test_rows_of_a_layer_are_in_the_order_of_the_model() -> None:
    """Also for hooks that are no component; the last row of a layer is below the first of the next."""
    hooks = (
        "hook_mlp_out",
        "hook_resid_post",
        "ln2.hook_normalized",
        "attn.hook_z",
        "hook_attn_out",
        "hook_resid_pre",
        "attn.hook_q",
    )
    graph = nx.DiGraph()
    graph.add_nodes_from(Node(f"blocks.{layer}.{hook}", "activation", None, "end") for layer in (10, 9) for hook in hooks)
    rows = ["resid_pre", "q", "heads", "attention", "ln2.hook_normalized", "mlp", "resid_post"]
    assert list(figure(graph).layout.yaxis.ticktext) == [f"L{layer} {row}" for layer in (9, 10) for row in rows]


def test_token_indices_are_in_order() -> None:
    graph = nx.DiGraph()
    graph.add_nodes_from(replace(MLP, position=position) for position in (11, 2, "end", 5, "all"))
    assert list(figure(graph).layout.xaxis.ticktext) == ["2", "5", "11", "end", "all"]


def test_many_nodes_in_a_cell_are_apart() -> None:
    graph = nx.DiGraph()
    graph.add_nodes_from(replace(FEATURE, index=n) for n in range(9))
    graph.add_nodes_from(replace(FEATURE, index=n, position="end") for n in range(4))
    x = sorted(marks(figure(graph)).x)
    assert min(np.diff(x)) >= 1


def test_lines_and_numbers() -> None:
    """Width by size, colour by sign; six digits at nodes and at the middle of edges."""
    drawn = figure(circuit())
    trace = marks(drawn)
    points = list(zip(trace.x, trace.y, strict=True))
    number = {node: n for n, node in enumerate(NAMES)}
    lines = {((line.x[0], line.y[0]), (line.x[-1], line.y[-1])): line for line in drawn.data if line.hoverinfo == "skip"}
    (middles,) = [trace for trace in drawn.data if trace.hoverinfo == "text" and trace.customdata is None]
    texts = dict(zip(zip(middles.x, middles.y, strict=True), map(unescape, middles.hovertext), strict=True))
    assert len(lines) == len(EDGES)
    for source, target, effect in EDGES:
        line = lines[points[number[source]], points[number[target]]].line
        assert line.width == pytest.approx(max(7 * abs(effect), 0.6))
        assert line.color == ("#c0392b" if effect < 0 else "#2166ac")
        curve = lines[points[number[source]], points[number[target]]]
        assert texts[curve.x[1], curve.y[1]] == f"{NAMES[source]}<br>→ {NAMES[target]}<br>effect {effect:+.6g}"
    about = trace.hovertext[number[FEATURE]]
    assert about == f"{NAMES[FEATURE]}<br>effect +0.3125<br>edges: 1 in, 2 out"
    assert "effect none" in trace.hovertext[number[LOGITS]]
    assert trace.marker.color[number[HEAD]] == -0.2
    assert drawn.layout.coloraxis.cmax == -drawn.layout.coloraxis.cmin == 0.4


def test_curves_pass_beside_nodes() -> None:
    """An edge over a row with a node in between bends around it."""
    graph = nx.DiGraph()
    below, between, above = (replace(MLP, site=f"blocks.{layer}.hook_mlp_out") for layer in range(3))
    graph.add_nodes_from([below, between, above])
    graph.add_edge(below, above, effect=1.0)
    drawn = figure(graph)
    (line,) = [line for line in drawn.data if line.hoverinfo == "skip"]
    assert line.y[1] == 1
    assert abs(line.x[1] - marks(drawn).x[1]) >= 0.3
    graph.remove_node(between)
    (line,) = [line for line in figure(graph).data if line.hoverinfo == "skip"]
    assert line.x[0] == line.x[1]


def test_a_graph_without_effects_of_nodes_and_without_edges() -> None:
    graph = nx.DiGraph()
    graph.add_node(MLP)
    assert marks(figure(graph)).marker.color == "#f7f7f7"
    assert len(parsed(dot(graph)).get_nodes()) == 1
    assert "1 node, 0 edges" in interactive(graph, "one")


def test_a_click_shows_the_numbers_of_a_node(browser: Any, tmp_path: Path) -> None:
    """No error, nothing from the network; edges in and out, the largest first; a click beside nodes changes nothing."""
    opened(browser, tmp_path / "circuit.html", interactive(circuit(), "Who gets it?"))
    assert browser.title == "Who gets it?"
    panel = "return document.querySelector('#node').innerText"
    assert browser.execute_script(panel) == ""
    click(browser, list(NAMES).index(FEATURE))
    text = browser.execute_script(panel).split("\n")
    assert text == [
        NAMES[FEATURE], "effect", "+0.3125", "in (1)", f"+0.123456 from {NAMES[MLP]}", "out (2)", f"-0.5 to {NAMES[HEAD]}",
        f"+0 to {NAMES[OTHER]}",
    ]  # fmt: skip
    click(browser, list(NAMES).index(LOGITS))
    text = browser.execute_script(panel).split("\n")
    assert text == ["logits", "effect", "none", "in (2)", f"+1 from {NAMES[HEAD]}", "-0.1 from embed", "out (0)", "none"]
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.find_element("css selector", f'#graph g.node[data-number="{list(NAMES).index(HEAD)}"]').send_keys(Keys.ENTER)
    assert browser.execute_script(panel).startswith(NAMES[HEAD])
    Select(browser.find_element("id", "node-choice")).select_by_visible_text(NAMES[MLP])
    assert browser.execute_script(panel).startswith(f"{NAMES[MLP]}\neffect\n+0.4\nin (1)\n+0.25 from embed\nout (2)")
    first = browser.execute_script(
        "return [...document.querySelector('#edges table.dataTable tbody tr').cells].map(c => c.innerText)"
    )
    assert first == [NAMES[HEAD], "logits", "1"]
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in urls)
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_text_of_users_is_text(browser: Any, tmp_path: Path) -> None:
    """Names with markup in them run nothing and are shown as they are: in the figure, at nodes, in the panel."""
    opened(browser, tmp_path / "hostile.html", interactive(hostile(), EVIL))
    for number, text in enumerate(TEXTS, 1):
        click(browser, number)
        name = f"L2 feature {number - 1} of {text or FEATURE.site} @ {text or 'end'}"
        assert browser.execute_script("return document.querySelector('#node strong').textContent") == name
    shown = browser.execute_script("return [...document.querySelectorAll('#graph g.node > title')].map(t => t.textContent)")
    columns = browser.execute_script("return [...document.querySelectorAll('#graph .area > text')].map(t => t.textContent)")
    for text in (EVIL, MARKUP):
        assert any(f"of {text} @ {text}, effect" in title for title in shown)
        assert text in columns
    assert any(FEATURE.site in title for title in shown)
    (middles,) = [trace for trace in figure(hostile()).data if trace.hoverinfo == "text" and trace.customdata is None]
    assert all("<b>" not in text and "<img" not in text for text in middles.hovertext)
    assert browser.execute_script("return window.evil") is None
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert browser.title == EVIL
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def format_of_circuit_tracer() -> Any:
    """What circuit-tracer at 196e2ce says a graph is, with the types that JSON has."""
    pydantic = pytest.importorskip("pydantic")
    strict = pydantic.ConfigDict(strict=True)

    class Head(pydantic.BaseModel):
        model_config = strict
        slug: str
        scan: str
        transcoder_list: list[str]
        prompt_tokens: list[str]
        prompt: str
        node_threshold: float | None = None
        schema_version: int | None = 1

    class Query(pydantic.BaseModel):
        model_config = strict
        pinnedIds: list[str]  # noqa: N815
        supernodes: list[list[str]]
        linkType: str  # noqa: N815
        clickedId: str  # noqa: N815
        sg_pos: str

    class Vertex(pydantic.BaseModel):
        model_config = strict
        node_id: str
        feature: int
        layer: str
        ctx_idx: int
        feature_type: str
        token_prob: float
        is_target_logit: bool
        run_idx: int
        reverse_ctx_idx: int
        jsNodeId: str  # noqa: N815
        clerp: str
        influence: float | None
        activation: float | None

    class Link(pydantic.BaseModel):
        model_config = strict
        source: str
        target: str
        weight: float

    class Whole(pydantic.BaseModel):
        model_config = strict
        metadata: Head
        qParams: Query  # noqa: N815
        nodes: list[Vertex]
        links: list[Link]

    return Whole


def read_by_viewers(data: dict[str, Any]) -> None:
    """What the viewers' code takes for granted beyond types: circuit-tracer's util-cg.js, Neuronpedia's utils.ts."""
    nodes, tokens = data["nodes"], data["metadata"]["prompt_tokens"]
    ids = [node["node_id"] for node in nodes]
    assert len(set(ids)) == len(ids)
    assert not any("," in name or "supernode" in name for name in ids)  # joined by commas in an address
    same = Counter((node["layer"], node["feature"], node["ctx_idx"]) for node in nodes)  # hovered, named and dropped together
    assert max(same.values()) == 1
    assert len({node["jsNodeId"] for node in nodes}) == len(ids)
    assert all(node["layer"] == "E" or node["layer"].isdigit() for node in nodes)
    assert all(0 <= node["ctx_idx"] < len(tokens) for node in nodes)
    for link in data["links"]:
        assert {link["source"], link["target"]} <= set(ids)
    for node in nodes:
        assert "<" not in node["clerp"]  # put in as HTML
        if node["feature_type"] == "logit":
            assert node["clerp"].split('"')[1] == "logits"
            assert node["clerp"].split("(p=")[1].split(")")[0] == "?"
    assert "node_threshold" not in data["metadata"]  # a number starts pruning by influence; null breaks Neuronpedia's schema


def test_viewer_json() -> None:
    data = viewer_json(at_tokens(), tokens=TOKENS, slug="ioi-1", model="demo")
    data = json.loads(json.dumps(data, allow_nan=False))
    format_of_circuit_tracer().model_validate(data)
    read_by_viewers(data)
    assert data["metadata"]["prompt"] == "<bos>When Mary\n John"
    assert data["metadata"]["prompt_tokens"] == ["<bos>", "When", " Mary", "\n", " John"]
    assert (data["metadata"]["slug"], data["metadata"]["scan"], data["metadata"]["schema_version"]) == ("ioi-1", "demo", 1)
    found = {node["clerp"]: node for node in data["nodes"]}
    fields = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "is_target_logit", "jsNodeId")
    rows = {name: tuple(node[field] for field in fields) for name, node in found.items()}
    assert rows == {
        "embed": ("E_0_0", 0, "E", 0, "whole embedding", False, "E_0-0"),
        "L1 mlp @ 2": ("1_0_2", 1, "1", 2, "activation", False, "1_0-2"),
        "L2 feature 121 of blocks.2.hook_resid_pre @ 2": ("2_121_2", 123 * 124 // 2 + 121, "2", 2, "cross layer transcoder", False, "2_121-2"),
        "L2 error of blocks.2.hook_resid_pre @ 2": ("2_-1_2", -1, "2", 2, "reconstruction error", False, "2_-1-2"),
        "L3 head 5 @ 4": ("3_5_4", 8 * 9 // 2 + 5, "3", 4, "attention head", False, "3_5-4"),
        "L3 head 7 @ 4": ("3_7_4", 10 * 11 // 2 + 7, "3", 4, "attention head", False, "3_7-4"),
        "L3 mlp @ 4": ("3_1000_4", 1003 * 1004 // 2 + 1000, "3", 4, "activation", False, "3_1000-4"),
        'Output "logits" (p=?)': ("5_0_4", 15, "5", 4, "logit", True, "5_0-4"),
    }  # fmt: skip
    name_of = {node["node_id"]: name for name, node in found.items()}
    weights = {(name_of[link["source"]], name_of[link["target"]]): link["weight"] for link in data["links"]}
    assert len(weights) == len(EDGES)
    assert weights["embed", "L1 mlp @ 2"] == 0.25
    assert weights["L2 feature 121 of blocks.2.hook_resid_pre @ 2", "L3 head 5 @ 4"] == -0.5
    assert weights["L3 head 5 @ 4", 'Output "logits" (p=?)'] == 1.0
    assert found["L1 mlp @ 2"]["effect"] == 0.4
    assert "effect" not in found["embed"]


def test_features_keep_their_index() -> None:
    """Whatever comes before them in the graph."""
    graph = nx.DiGraph()
    graph.add_nodes_from([Node("blocks.2.attn.hook_z", "head", 11, 0), replace(FEATURE, position=0)])
    head, feature = attribution(graph)["nodes"]
    assert (head["node_id"], feature["node_id"]) == ("2_1011_0", "2_121_0")


def test_numbers_of_a_viewer_are_unique() -> None:
    """Where a layer has several dictionaries, heads, neurons, errors, and features of the embedding."""
    graph = nx.DiGraph()
    kinds = ("feature", "neuron", "head", "error", "activation", "all_features")
    for site in ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "hook_embed"):
        for kind in kinds:
            for index in (0, 9, 10) if kind in ("feature", "neuron", "head") else (None,):
                for sae in ("a,b", EVIL):
                    for position in (0, 1):
                        graph.add_node(Node(site, kind, index, position, sae))
    data = viewer_json(graph, tokens=TOKENS, slug="s", model="demo")
    format_of_circuit_tracer().model_validate(data)
    read_by_viewers(data)
    assert {node["feature_type"] for node in data["nodes"]} == {
        "cross layer transcoder", "neuron", "attention head", "mlp reconstruction error", "reconstruction error", "activation",
        "embedding", "all features",
    }  # fmt: skip


@pytest.mark.parametrize("show", [dot, figure, lambda graph: interactive(graph, "t"), lambda graph: attribution(graph)])
def test_graphs_that_are_refused(show: Any) -> None:
    named = nx.DiGraph([("a", "b")])
    bare, infinite, outside = circuit(), circuit(), nx.DiGraph()
    del bare.edges[EMBED, MLP]["effect"]
    infinite.nodes[MLP]["effect"] = float("inf")
    outside.add_node(Node("ln_final.hook_normalized", "activation", position=0))
    for graph, message in (
        (nx.Graph(), "graph is a Graph: expected a networkx.DiGraph"),
        (nx.MultiDiGraph(), "graph is empty: expected nodes such as"),
        (nx.DiGraph(), "graph is empty: expected nodes such as"),
        (named, "graph has a node 'a': expected nodes such as"),
        (bare, "hook_embed activation @ all -> .* is None: expected a finite number"),
        (infinite, "hook_mlp_out activation @ S2 is inf: expected a finite number"),
        (outside, "'ln_final.hook_normalized' is not inside a layer"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            show(graph)


def attribution(graph: Any, **changes: Any) -> Any:
    return viewer_json(graph, **{"tokens": TOKENS, "slug": "s", "model": "demo", **changes})


def test_labels_and_all_positions_are_placed_at_tokens() -> None:
    """A label where the pair has it, a span at its last token, all positions at the last token, the embedding at the first."""
    labelled = nx.relabel_nodes(circuit(), {HEAD: replace(HEAD, position="all")})
    data = attribution(labelled, positions={"S2": (1, 2), "end": 3})
    known = {node["clerp"]: node["ctx_idx"] for node in data["nodes"]}
    expected = {EMBED: 0, MLP: 2, FEATURE: 2, ERROR: 2, OTHER: 3, LAST: 3}
    assert known == {**{NAMES[node]: at for node, at in expected.items()}, "L3 head 5 @ all": 4, 'Output "logits" (p=?)': 4}
    format_of_circuit_tracer().model_validate(data)
    read_by_viewers(data)


def test_graphs_of_what_is_no_list_of_nodes_are_refused() -> None:
    for items, effects in (([MLP, MLP], [0.1, 0.2]), ([MLP, HEAD], [0.1]), ([MLP], [float("nan")])):
        with pytest.raises(fp.FeatpatchError, match=r"expected (a list of nodes or of edges, each once|a finite number)"):
            fp.diagram.graph(items, effects)


def test_graphs_that_viewers_are_refused() -> None:
    two = at_tokens()
    two.add_node(replace(LOGITS, position=3))
    for call, message in (
        (
            lambda: attribution(circuit()),
            r"is at position 'S2': expected a token index from 0 to 4, .*positions=pairs\[0\].labels",
        ),
        (lambda: attribution(circuit(), positions={"S2": 9, "end": 4}), "is at position 9: expected a token index from 0 to 4"),
        (lambda: attribution(at_tokens(), tokens=TOKENS[:3]), "is at position 4: expected a token index from 0 to 2"),
        (
            lambda: attribution(nx.compose(at_tokens(), circuit()), positions={"S2": 2, "end": 4}),
            "@ 2 and .* @ S2 are both placed at token 2: expected one node there",
        ),
        (lambda: attribution(nx.relabel_nodes(at_tokens(), {EMBED: replace(EMBED, position=-1)})), "position -1"),
        (lambda: attribution(at_tokens(), tokens="text"), "tokens='text': expected the tokens of the prompt as a list"),
        (lambda: attribution(at_tokens(), tokens=[]), "expected the tokens"),
        (lambda: attribution(at_tokens(), slug="../x"), "slug='../x': expected letters"),
        (lambda: attribution(at_tokens(), model=""), "model='': expected the name"),
        (lambda: attribution(two), "2 output nodes: expected at most one"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            call()
