"""Attribution graphs, against forward passes in which everything but one source is frozen, in float64."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, HOOKED, LAYERS, OTHERS, VOCAB, WIDTH
from graph_oracle import Frozen, frozen_norm
from sae_lens import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from small import at, randomised
from test_diagram import format_of_circuit_tracer
from tqdm import tqdm

import featpatch as fp
from featpatch.tracing.frozen import FrozenPath

EXACT = 1e-10
FEATURES = 6
EVERY = {"bridge": BRIDGES, "hooked": HOOKED}
MODELS = [(kind, name) for kind, models in EVERY.items() for name in models if name != "attention only"]


def reads(model: Any) -> str:
    return next(
        hook for hook in ("mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid") if f"blocks.0.{hook}" in model.hook_dict
    )


def transcoder(kind: Any, config: Any, layer: int, hook: str, seed: int, writes: str) -> Any:
    metadata = at(f"blocks.{layer}.{hook}", f"blocks.{layer}.{writes}")
    made = config(WIDTH, FEATURES, "float64", d_out=WIDTH, apply_b_dec_to_input=False, metadata=metadata)
    return randomised(kind(made), seed)


def transcoders(model: Any, writes: str = "hook_mlp_out") -> list[Any]:
    """One of each kind: ReLU, ReLU with a skip path, JumpReLU."""
    hook = reads(model)
    kinds = [
        (Transcoder, TranscoderConfig),
        (SkipTranscoder, SkipTranscoderConfig),
        (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    ]
    made = [transcoder(*kinds[layer], layer, hook, layer, writes) for layer in range(LAYERS)]
    with torch.no_grad():
        made[2].threshold.abs_()
    return made


def cross_layer(model: Any, skip: bool = False) -> Any:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    hook = reads(model)
    return fp.dictionaries.CrossLayerTranscoder(
        W_enc=draw(LAYERS, FEATURES, WIDTH), W_dec=[draw(FEATURES, LAYERS - layer, WIDTH) for layer in range(LAYERS)],
        b_enc=draw(LAYERS, FEATURES), b_dec=draw(LAYERS, WIDTH), skip=draw(LAYERS, WIDTH, WIDTH) if skip else None,
        hook=[f"blocks.{layer}.{hook}" for layer in range(LAYERS)],
        hook_out=[f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)],
    )  # fmt: skip


@dataclass
class Replaced:
    """The MLPs of a frozen prompt as features, errors and biases, by hand; `decode[layer]` lists what a feature writes, by layer."""

    frozen: Frozen
    encode: list[torch.Tensor]
    bias: list[torch.Tensor]
    thresholds: list[torch.Tensor]
    decode: list[list[torch.Tensor]]
    constant: list[torch.Tensor]

    @classmethod
    def of(cls, model: Any, tokens: torch.Tensor, given: Any) -> "Replaced":
        zero = torch.zeros(FEATURES, dtype=torch.float64)
        if isinstance(given, list):
            skips = {layer: each.W_skip for layer, each in enumerate(given) if hasattr(each, "W_skip")}
            return cls(
                Frozen(model, tokens, reads(model), skips), [each.W_enc.T for each in given], [each.b_enc for each in given],
                [getattr(each, "threshold", zero) for each in given],
                [[each.W_dec] for each in given], [each.b_dec for each in given],
            )  # fmt: skip
        skips = {} if given.skip is None else dict(enumerate(given.skip))
        return cls(
            Frozen(model, tokens, reads(model), skips), [part.W_enc for part in given.parts], [part.b_enc for part in given.parts],
            [zero] * LAYERS, [list(part.W_dec.unbind(1)) for part in given.parts], list(given.b_dec.unflatten(0, (LAYERS, WIDTH))),
        )  # fmt: skip

    def __post_init__(self) -> None:
        with torch.no_grad():
            self._settle()

    def _settle(self) -> None:
        frozen = self.frozen
        self.start = frozen.at(0, "hook_resid_pre")
        self.places = frozen.cache.get("hook_pos_embed", torch.zeros_like(self.start))
        self.inputs = [frozen.mlp_input(layer, frozen.mid(layer)) for layer in frozen.layers]
        self.acts = []
        for x, w, b, threshold in zip(self.inputs, self.encode, self.bias, self.thresholds, strict=True):
            pre = x @ w.T + b
            self.acts.append(pre * (pre > threshold.clamp(min=0)))
        self.errors = []
        for layer in frozen.layers:
            skipped = self.inputs[layer] @ frozen.skips[layer].T if layer in frozen.skips else 0
            self.errors.append(frozen.at(layer, "hook_mlp_out") - self.made(self.acts)[layer] - skipped)

    def made(self, acts: list[torch.Tensor]) -> list[torch.Tensor]:
        written = [self.constant[layer].expand_as(self.start).clone() for layer in self.frozen.layers]
        for layer, decoders in enumerate(self.decode):
            for later, decoder in enumerate(decoders):
                written[layer + later] += acts[layer] @ decoder
        return written

    def values(
        self, acts: list[torch.Tensor], errors: list[torch.Tensor], start: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The pre-activations of all features, and the logits minus their mean, with these features and errors held fixed."""
        with torch.no_grad():
            written = [one + other for one, other in zip(self.made(acts), errors, strict=True)]
            inputs, logits = self.frozen.run(start, written)
            pre = [x @ w.T + b for x, w, b in zip(inputs, self.encode, self.bias, strict=True)]
            return pre, logits - logits.mean()


def prompt(length: int = 6) -> torch.Tensor:
    return torch.randint(1, VOCAB - 1, (1, length), generator=torch.Generator().manual_seed(3))


def read_off(graph: Any, found: tuple[list[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """The values of the graph's targets in a run of the oracle."""
    pre, logits = found
    values = []
    for number in graph.targets:
        node = graph.nodes[number]
        if node.kind == "logit":
            values.append(float(logits[node.index]))
        else:
            values.append(float(pre[int(node.site.split(".")[1])][node.position, node.index]))
    return np.array(values)


def without(replaced: Replaced, node: fp.Node) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Features, errors and start with one source set to zero."""
    acts, errors, start = ([x.clone() for x in replaced.acts], [x.clone() for x in replaced.errors], replaced.start.clone())
    if node.site == "hook_embed":
        start[node.position] = replaced.places[node.position]
    elif node.kind == "feature":
        acts[int(node.site.split(".")[1])][node.position, node.index] = 0
    else:
        errors[int(node.site.split(".")[1])][node.position] = 0
    return acts, errors, start


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind_of", ["per layer", "cross-layer"])
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_inputs_sum_to_values_and_edges_are_frozen_ablations(kind: str, name: str, kind_of: str) -> None:
    """Laws (a) and (b). The oracle first has to give the model's own logits."""
    model = EVERY[kind][name]()
    given = transcoders(model) if kind_of == "per layer" else cross_layer(model, skip=name in ("gpt2", "neox"))
    tokens = prompt()
    graph = fp.attribution_graph(model, given, tokens[0].tolist(), size=None, progress=False)
    replaced = Replaced.of(model, tokens, given)
    whole = replaced.values(replaced.acts, replaced.errors, replaced.start)
    with torch.no_grad():
        own, cap = model(tokens)[0, -1], getattr(model.cfg, "output_logits_soft_cap", None) or 0
    own = cap * torch.atanh(own / cap) if cap > 0 else own
    assert (whole[1] - (own - own.mean())).abs().max() < EXACT
    at = graph.targets
    active = {(layer, int(p), int(i)) for layer, acts in enumerate(replaced.acts) for p, i in acts.nonzero()}
    features = [node for node in graph.nodes if node.kind == "feature"]
    assert {(int(node.site.split(".")[1]), node.position, node.index) for node in features} == active
    assert len(graph.nodes) == len(active) + (LAYERS + 1) * tokens.shape[1] + len(graph.probabilities)
    assert abs(graph.values[at] - read_off(graph, whole)).max() < EXACT
    assert abs(graph.residual()).max() < EXACT
    assert abs(graph.others[at]).max() == 0
    none = replaced.values(
        [torch.zeros_like(x) for x in replaced.acts], [torch.zeros_like(x) for x in replaced.errors], replaced.places
    )
    assert abs(graph.biases[at] - read_off(graph, none)).max() < EXACT
    for number, node in enumerate(graph.nodes):
        if node.kind != "logit":
            change = read_off(graph, replaced.values(*without(replaced, node))) - read_off(graph, whole)
            assert abs(change + graph.adjacency[at, number]).max() < EXACT, node
    assert abs(graph.adjacency).max() > 0.1


@pytest.mark.usefixtures("wide")
def test_transcoders_in_front_of_a_norm() -> None:
    """Of a model with a norm after its MLPs. Without a skip path, by hand: one source at a time through the norm as it is."""
    model, tokens = BRIDGES["gemma2"](), prompt()
    given = transcoders(model, "mlp.hook_out")
    graph = fp.attribution_graph(model, given, tokens[0].tolist(), progress=False)
    assert abs(graph.residual()).max() < EXACT
    whole = fp.attribution_graph(model, transcoders(model), tokens[0].tolist(), progress=False)
    ends = [n for n, node in enumerate(graph.nodes) if node.kind == "logit"]
    others = [n for n, node in enumerate(whole.nodes) if node.kind == "logit"]
    last = [n for n, node in enumerate(graph.nodes) if node.site == "blocks.2.mlp.hook_out" and node.position == 5]
    frozen = Frozen(model, tokens, reads(model))
    raw, added = frozen.at(2, "mlp.hook_out"), frozen.at(2, "hook_mlp_out")
    unembed = model.unembed.W_U - model.unembed.W_U.mean(1, keepdim=True)
    final = frozen.at(2, "hook_resid_post")
    with torch.no_grad():
        for n in last:
            node = graph.nodes[n]
            vector = (
                graph.values[n] * given[2].W_dec[node.index]
                if node.kind == "feature"
                else raw[5] - given[2](frozen.at(2, reads(model)))[5]
            )
            after = frozen_norm(model.blocks[2].ln2_post, raw[5] - vector, raw[5], frozen.eps)
            lost = added[5] - after
            through = [frozen_norm(model.ln_final, x, final[5], frozen.eps) for x in (final[5], final[5] - lost)]
            for target in ends:
                change = float((through[0] - through[1]) @ unembed[:, graph.nodes[target].index])
                assert abs(change - graph.adjacency[target, n]) < EXACT, node
    assert len(last) > 1
    assert abs(graph.values[ends] - whole.values[others]).max() < EXACT


@pytest.fixture(scope="module")
def demo() -> Any:
    return fp.load_demo(progress=False)


@pytest.fixture(scope="module")
def graph() -> Any:
    model = BRIDGES["gpt2"]()
    return fp.attribution_graph(model, transcoders(model), prompt(5)[0].tolist(), targets=[3, 7, 9], size=None, progress=False)


def shares(matrix: np.ndarray) -> list[list[float]]:
    """The size of each effect as a share of its row."""
    return [[abs(x) / max(sum(map(abs, row)), 1e-10) for x in row] for row in matrix.tolist()]


def by_paths(matrix: list[list[float]], weights: list[float]) -> list[float]:
    """Influence by following every edge from the logits down: a node passes on what it has once all above it are done."""
    n, total = len(matrix), [0.0] * len(matrix)
    users = {source: [target for target in range(n) if matrix[target][source]] for source in range(n)}
    done: dict[int, float] = {}

    def reached(node: int) -> float:
        if node not in done:
            done[node] = sum((reached(user) + weights[user]) * matrix[user][node] for user in users[node])
        return done[node]

    for node in range(n):
        total[node] = reached(node)
    return total


def weights_of(graph: Any) -> list[float]:
    return [0.0] * (len(graph.nodes) - len(graph.probabilities)) + graph.probabilities.tolist()


def test_influence_and_scores(graph: Any) -> None:
    scaled, weights = shares(graph.adjacency), weights_of(graph)
    expected = by_paths(scaled, weights)
    assert abs(graph.influence - expected).max() < EXACT
    errors = [n for n, node in enumerate(graph.nodes) if node.kind == "error"]
    tokens = [n for n, node in enumerate(graph.nodes) if node.site == "hook_embed"]
    from_tokens, from_errors = (sum(expected[n] for n in some) for some in (tokens, errors))
    assert abs(graph.replacement_score - from_tokens / (from_tokens + from_errors)) < EXACT
    known = [1 - sum(row[n] for n in errors) for row in scaled]
    reach = [one + other for one, other in zip(expected, weights, strict=True)]
    assert abs(graph.completeness_score - sum(a * b for a, b in zip(known, reach, strict=True)) / sum(reach)) < EXACT
    for n, share in enumerate(graph.cumulative):
        above = sum(x for x in expected if x > expected[n] + 1e-15) + expected[n]
        if expected[n]:
            assert abs(share - above / sum(expected)) < 1e-8


def smallest_kept(values: list[float], share: float) -> float:
    total, so_far = sum(values), 0.0
    for value in sorted(values, reverse=True):
        so_far += value
        if so_far >= share * total - 1e-14:
            return value
    return min(values)


def test_totals_follow_all_paths() -> None:
    """By going down from the logits, one node at a time."""
    model = BRIDGES["gpt2"]()
    graph = fp.attribution_graph(model, transcoders(model), prompt(4)[0].tolist(), progress=False)
    matrix = graph.adjacency
    first = len(graph.nodes) - len(graph.probabilities)

    def lost(node: int) -> float:
        if node not in known:
            direct = float(graph.probabilities @ matrix[first:, node])
            users = [t for t in range(first) if matrix[t, node]]
            known[node] = direct + sum(matrix[t, node] / graph.values[t] * lost(t) for t in users)
        return known[node]

    known: dict[int, float] = {}
    expected = [lost(n) for n in range(first)]
    assert np.allclose(graph.totals[:first], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.4, 0.6), (0.9, 0.3), (1.0, 1.0)])
def test_pruning(graph: Any, nodes: float, edges: float) -> None:
    n, weights = len(graph.nodes), weights_of(graph)
    found = by_paths(shares(graph.adjacency), weights)
    least = smallest_kept(found, nodes)
    always = {i for i, node in enumerate(graph.nodes) if node.kind == "logit" or node.site == "hook_embed"}
    kept = {i for i in range(n) if found[i] >= least} | always
    inside = np.array([[graph.adjacency[t, s] if {t, s} <= kept else 0 for s in range(n)] for t in range(n)])
    scaled = shares(inside)
    reach = [one + other for one, other in zip(by_paths(scaled, weights), weights, strict=True)]
    strength = {(t, s): scaled[t][s] * reach[t] for t in range(n) for s in range(n)}
    smallest = smallest_kept(list(strength.values()), edges)
    links = {ends for ends, value in strength.items() if value >= smallest and value > 0}
    while True:
        loose = {i for i in kept - always if not any(s == i for _, s in links)}
        loose |= {i for i in kept if graph.nodes[i].kind == "feature" and not any(t == i for t, _ in links)}
        if not loose:
            break
        kept, links = kept - loose, {(t, s) for t, s in links if not {t, s} & loose}
    pruned = graph.prune(nodes, edges)
    assert pruned.nodes == tuple(graph.nodes[i] for i in sorted(kept))
    expected = np.array([[graph.adjacency[t, s] if (t, s) in links else 0 for s in sorted(kept)] for t in sorted(kept)])
    assert np.array_equal(pruned.adjacency, expected)
    assert abs(pruned.residual()).max() < EXACT
    assert pruned.left_out == graph.kinds.features - pruned.kinds.features
    assert np.array_equal(pruned.influence, graph.influence[sorted(kept)])
    with pytest.raises(fp.FeatpatchError, match="pruned already: expected a complete one"):
        pruned.prune()


@pytest.mark.usefixtures("wide")
def test_size_keeps_the_most_influential_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen in steps of 4, each by the influence through the rows that are known; what others contribute is told."""
    monkeypatch.setattr("featpatch.tracing.graph.CHOSEN", 4)
    model = HOOKED["gpt2"]()
    whole = fp.attribution_graph(model, transcoders(model), prompt()[0].tolist(), targets=[3, 7], size=None, progress=False)
    monkeypatch.setattr("featpatch.tracing.frozen.VALUES", 1)  # a target at a time, with the positions up to its own
    small = fp.attribution_graph(model, transcoders(model), prompt()[0].tolist(), targets=[3, 7], size=10, progress=False)
    logits = [n for n, node in enumerate(whole.nodes) if node.kind == "logit"]
    features, picked = whole.kinds.features, []
    while len(picked) < 10:
        rows = [*logits, *picked]
        known = np.array([[x if t in rows else 0.0 for x in row] for t, row in enumerate(whole.adjacency.tolist())])
        reach = by_paths(shares(known), weights_of(whole))
        rest = sorted((n for n in range(features) if n not in picked), key=lambda n: -reach[n])
        picked += rest[: min(4, 10 - len(picked))]
    kept = [*sorted(picked), *range(features, len(whole.nodes))]
    assert small.nodes == tuple(whole.nodes[n] for n in kept)
    assert abs(small.adjacency - whole.adjacency[np.ix_(kept, kept)]).max() < EXACT
    assert abs(small.residual()).max() < EXACT
    assert abs(small.others[small.targets]).max() > 0.1
    assert small.left_out == features - 10


@pytest.mark.usefixtures("wide")
def test_after_ctrl_c_it_is_the_graph_of_the_features_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featpatch.tracing.graph.CHOSEN", 4)
    model, of_batch, calls = HOOKED["gpt2"](), FrozenPath._batch, []
    given, tokens = transcoders(model), prompt()[0].tolist()
    whole = fp.attribution_graph(model, given, tokens, targets=[3, 7], progress=False)
    assert whole.finished

    def interrupted(*args: Any) -> Any:
        if len(calls) == 1 + 2 * 4 + 2:  # the logits, then two steps of 4 features and half of the third
            raise KeyboardInterrupt
        calls.append(args)
        return of_batch(*args)

    monkeypatch.setattr("featpatch.tracing.frozen.VALUES", 1)  # a target at a time, but for targets of the same layer
    monkeypatch.setattr(FrozenPath, "_batch", interrupted)
    stopped = fp.attribution_graph(model, given, tokens, targets=[3], progress=False)
    monkeypatch.setattr(FrozenPath, "_batch", of_batch)
    sized = fp.attribution_graph(model, given, tokens, targets=[3], size=8, progress=False)
    assert (stopped.finished, sized.finished) == (False, True)
    assert stopped.nodes == sized.nodes
    assert np.array_equal(stopped.adjacency, sized.adjacency)
    assert stopped.left_out == sized.left_out == whole.kinds.features - 8
    assert repr(stopped).endswith("; interrupted")
    assert not repr(sized).endswith("; interrupted")
    calls[:] = [()] * 9
    monkeypatch.setattr(FrozenPath, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.attribution_graph(model, given, tokens, targets=[3], progress=False)


def test_the_progress_bar_moves_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr("featpatch.tracing.graph.tqdm", Bar)
    monkeypatch.setattr("featpatch.tracing.frozen.VALUES", 1)
    model = HOOKED["gpt2"]()
    graph = fp.attribution_graph(model, transcoders(model), prompt()[0].tolist(), targets=[3, 7], progress=False)
    assert moved == [1] * graph.kinds.features


def test_targets_and_special_tokens(demo: Any) -> None:
    """By default the fewest logits that have 0.95 of the probability; special tokens have no features and errors."""
    pair = demo.pairs("ioi", n=1)[0]
    model, given = demo.model, demo.transcoders
    found = fp.attribution_graph(model, given, pair, size=50, progress=False)
    with torch.no_grad():
        shares = model(torch.tensor([pair.clean]))[0, pair.answer_position].softmax(0)
    largest = shares.topk(10)
    n = int((largest.values.cumsum(0) < 0.95).sum()) + 1
    assert [node.index for node in found.nodes if node.kind == "logit"] == largest.indices[:n].tolist()
    assert abs(found.probabilities - largest.values[:n].numpy()).max() < 1e-6
    names = [model.tokenizer.decode([token]) for token in (*pair.correct, *pair.wrong)]
    named = fp.attribution_graph(model, given, list(pair.clean), targets=names, size=50, progress=False)
    assert [node.index for node in named.nodes if node.kind == "logit"] == [*pair.correct, *pair.wrong]
    assert 0 in pair.special
    of_first = [node for node in found.nodes if node.position == 0]
    assert [node.site for node in of_first] == ["hook_embed"]
    both = fp.attribution_graph(model, given, pair, size=None, special=True, progress=False)
    assert sum(node.position == 0 and node.kind == "error" for node in both.nodes) == model.cfg.n_layers
    for each in (found, named, both):
        assert abs(each.residual()).max() < 1e-3
    assert 0 < len(repr(found)) < 400
    assert f"of '...{'b' * 60}'" in repr(replace(found, text="a" + "b" * 60)), "a long prompt is cut, and shown as cut"


def test_what_is_refused(demo: Any) -> None:
    model, given, text = demo.model, demo.transcoders, "John gave"
    for call, message in (
        (lambda: fp.attribution_graph(model, demo.saes[0], text), "expected transcoders, which write to the output of an MLP"),
        (
            lambda: fp.attribution_graph(model, demo.crosscoder, text),
            "expected transcoders, which write to the output of an MLP",
        ),
        (lambda: fp.attribution_graph(model, [*given, given[1]], text), "both write to the MLP of layer 1: expected one"),
        (lambda: fp.attribution_graph(model, given, ""), "it is empty: expected a text"),
        (lambda: fp.attribution_graph(model, given, []), "expected a text, token ids of one prompt, or a pair"),
        (lambda: fp.attribution_graph(model, given, text, targets=[]), "expected a list of tokens"),
        (lambda: fp.attribution_graph(model, given, text, targets=[10**6]), "expected different tokens, or ids from 0 to"),
        (lambda: fp.attribution_graph(model, given, text, size=0), "size=0: expected"),
        (lambda: fp.attribution_graph(OTHERS["olmoe"](), given, [1, 2]), "do not have the standard form"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def required(given: Any, *names: tuple[str, Any]) -> None:
    for name, kind in names:
        assert isinstance(given[name], kind), (name, given.get(name))


def test_files_for_viewers(demo: Any) -> None:
    """The schemas of circuit-tracer and Neuronpedia, and every edge by the names of its ends."""
    pair = demo.pairs("ioi", n=1)[0]
    graph = fp.attribution_graph(
        demo.model, demo.transcoders, pair, targets=[*pair.correct, *pair.wrong], size=200, progress=False
    )
    graph = graph.prune(0.7, 0.9)
    feature, other = [node for node in graph.nodes if node.kind == "feature"][:2]
    given = graph.to_viewer("ioi", groups=[fp.Patch((feature, other), name="first")], source_set="my-set")
    data = json.loads(json.dumps(given, allow_nan=False))
    format_of_circuit_tracer().model_validate(data)
    required(
        data["metadata"], ("slug", str), ("scan", str), ("prompt_tokens", list), ("prompt", str), ("node_threshold", float)
    )
    assert data["metadata"]["feature_details"] == {"neuronpedia_source_set": "my-set"}
    assert data["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}
    assert data["metadata"]["prompt_tokens"] == [demo.model.tokenizer.decode([token]) for token in pair.clean]
    named = {}
    for node in data["nodes"]:
        required(node, ("node_id", str), ("feature", int), ("layer", str), ("ctx_idx", int), ("jsNodeId", str), ("clerp", str))
        layer, index, position = node["node_id"].split("_")
        assert (layer, int(position)) == (node["layer"], node["ctx_idx"])
        named[node["node_id"]] = node
        if node["feature_type"] == "cross layer transcoder":
            pair_of = int(layer) + int(index)
            assert node["feature"] == pair_of * (pair_of + 1) // 2 + int(index)
            assert node["activation"] > 0
        if node["feature_type"] == "logit":
            assert (layer, node["feature"]) == ("5", int(index))
            assert node["clerp"].startswith(f'Output "{demo.model.tokenizer.decode([int(index)])}" (p=0.')
        if node["feature_type"] == "embedding":
            assert (layer, int(index)) == ("E", pair.clean[node["ctx_idx"]])
        if node["feature_type"] == "mlp reconstruction error":
            assert (index, node["feature"], node["jsNodeId"]) == ("-1", -1, f"{layer}_-1-{position}")
    assert len(named) == len({node["jsNodeId"] for node in data["nodes"]}) == len(data["nodes"])
    assert [node["is_target_logit"] for node in data["nodes"] if node["feature_type"] == "logit"] == [True, False]
    weights = {(link["source"], link["target"]): link["weight"] for link in data["links"]}
    assert len(weights) == len(data["links"]) == (graph.adjacency != 0).sum()
    for (source, target), weight in weights.items():
        ends = [number_of(graph, named[name]) for name in (source, target)]
        assert weight == graph.adjacency[ends[1], ends[0]]
    (group,) = data["qParams"]["supernodes"]
    assert group[0] == "first"
    assert [number_of(graph, named[name]) for name in group[1:]] == [graph.number(feature), graph.number(other)]
    with pytest.raises(fp.FeatpatchError, match="slug='a/b': expected letters"):
        graph.to_viewer("a/b")


def number_of(graph: Any, vertex: Any) -> int:
    """The node of the graph that a vertex of a viewer stands for."""

    def same(node: fp.Node) -> bool:
        if node.position != vertex["ctx_idx"]:
            return False
        kinds = {"cross layer transcoder": "feature", "mlp reconstruction error": "error", "logit": "logit"}
        if vertex["feature_type"] == "embedding":
            return node.site == "hook_embed"
        if node.kind != kinds[vertex["feature_type"]]:
            return False
        layer, index, _ = vertex["node_id"].split("_")
        return (node.kind == "logit" and node.index == int(index)) or (
            node.site.startswith(f"blocks.{layer}.") and node.index in (int(index), None)
        )

    (found,) = [n for n, node in enumerate(graph.nodes) if same(node)]
    return found


def test_tables_and_networkx(graph: Any) -> None:
    pruned = graph.prune(0.6, 0.8)
    made = pruned.to_networkx()
    targets, sources = pruned.adjacency.nonzero()
    assert made.number_of_edges() == len(targets)
    for target, source in zip(targets, sources, strict=True):
        assert made.edges[pruned.nodes[source], pruned.nodes[target], ""]["effect"] == pruned.adjacency[target, source]
    assert len(fp.diagram.interactive(made, title="graph")) > 1000
    assert "logit" in fp.diagram.dot(made)
    edges = pruned.to_pandas(5, of="edges")
    assert abs(edges["effect"].to_numpy()).tolist() == sorted(abs(pruned.adjacency).flatten(), reverse=True)[:5]
    nodes = pruned.to_pandas()
    assert nodes["influence"].tolist() == sorted(pruned.influence, reverse=True)
    assert set(nodes["kind"]) == {"feature", "error", "token", "logit"}
    with pytest.raises(fp.FeatpatchError, match="is not in the graph: expected one of graph.nodes"):
        graph.number(fp.LOGITS)


def test_models_in_bfloat16_are_refused() -> None:
    model = BRIDGES["gpt2"]().to(torch.bfloat16)
    with pytest.raises(fp.FeatpatchError, match="computes in torch.bfloat16: expected float32"):
        fp.attribution_graph(model, transcoders(model), [5, 9, 3, 7], progress=False)


def test_names_of_unknown_nodes() -> None:
    model = BRIDGES["gpt2"]()
    graph = fp.attribution_graph(model, transcoders(model), [5, 9, 3], progress=False)
    for number in (-1, len(graph.nodes), 10**9):
        with pytest.raises(fp.FeatpatchError, match="number"):
            graph.name(number)
