"""The laws of the design as properties of random models, dictionaries, prompts, sites and nodes, in float64.

What is true is worked out by plain TransformerLens, torch and numpy: `change` is the definition of section 1, `patched` one
hooked forward pass. Where a law compares the library with itself (order, batches, interruption), so does its property.
"""

import random
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, D_HEAD, VOCAB, hooked
from drawn import share
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kinds import AUTOENCODERS, TRANSCODERS, Squared
from numpy.typing import NDArray
from small import FEATURES

import featpatch as fp
from featpatch.effects.statistics import quadrant_labels
from featpatch.metrics import check_gap
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

pytestmark = [
    pytest.mark.usefixtures("wide"),
    # beartype and HookedTransformer use the global generator, which hypothesis seeds for every example
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),
]

EXACT = 1e-10
WAYS = ("denoising", "noising")
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "attn.hook_z", "hook_mlp_out", "hook_resid_post")
KINDS = [kind for kind in (*AUTOENCODERS, *TRANSCODERS) if kind not in ("BatchTopK", "Matryoshka")]
"""Those that need no training; the two others are JumpReLU once they are saved."""


# Random models, dictionaries, prompts and nodes.


@cache
def built(name: str, layers: int, heads: int, norm: str | None, blocks: str, positions: str) -> Any:
    """A bridge by its name, or a HookedTransformer of this shape."""
    if name in BRIDGES:
        return BRIDGES[name]()
    kind = {"parallel": {"parallel_attn_mlp": True}, "attention only": {"attn_only": True, "act_fn": None}}.get(blocks, {})
    rotary = {"rotary_dim": D_HEAD} if positions == "rotary" else {}
    shape = {"n_layers": layers, "n_heads": heads, "normalization_type": norm, "positional_embedding_type": positions}
    return hooked(**{"act_fn": "gelu", **shape, **kind, **rotary})


def models(names: list[str], norms: list[str | None]) -> st.SearchStrategy[Any]:
    return st.builds(
        built, st.sampled_from(names), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from(norms),
        st.sampled_from(["sequential", "parallel", "attention only"]), st.sampled_from(["standard", "rotary"]),
    )  # fmt: skip


MODELS = models([*["hooked"] * 6, "gpt2", "neox", "gemma2"], ["LN", "RMS", None])


def sites(model: Any) -> list[str]:
    names = [f"blocks.{layer}.{hook}" for layer in range(model.cfg.n_layers) for hook in HOOKS]
    missing = "mlp_out" if getattr(model.cfg, "attn_only", False) else "nothing"
    return [name for name in names if name in model.hook_dict and not name.endswith(missing)]


@cache
def dictionary(kind: str, hook: str, width: int, seed: int, normalisation: str, d_model: int) -> Any:
    if kind == "own":
        return fp.dictionaries.adapt(Squared(width, seed), hook, d_in=width)
    options = {"seed": seed, "normalize_activations": normalisation}
    if kind in TRANSCODERS:
        return TRANSCODERS[kind]("blocks.0.hook_resid_pre", d_model, hook, width, **options)
    return AUTOENCODERS[kind](hook, width, **options, reshape_activations="hook_z" if hook.endswith("hook_z") else "none")


@st.composite
def saes(draw: Any, model: Any, hook: str) -> Any:
    width = model.cfg.n_heads * model.cfg.d_head if hook.endswith("hook_z") else model.cfg.d_model
    kind, seed = draw(st.sampled_from([*KINDS, "own"])), draw(st.integers(0, 3))
    normalisation = draw(st.sampled_from(["none", "none", "constant_norm_rescale", "layer_norm"]))
    return dictionary(kind, hook, width, seed, normalisation, model.cfg.d_model)


@st.composite
def pair(draw: Any) -> fp.Pair:
    length = draw(st.integers(2, 5))
    clean = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
    changed = draw(st.sets(st.integers(0, length - 1), min_size=1))
    corrupted = [(token + draw(st.integers(1, VOCAB - 1))) % VOCAB if p in changed else token for p, token in enumerate(clean)]
    answers = draw(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=4, unique=True))
    answer = draw(st.integers(min(changed), length - 1))
    return fp.Pair(tuple(clean), tuple(corrupted), tuple(answers[:-1]), tuple(answers[-1:]), answer_position=answer)


@st.composite
def worlds(draw: Any, models: Any = MODELS, most: int = 2, least: int = 1) -> tuple[Any, list[Any], fp.Pairs]:
    """A model, up to so many dictionaries that write to different sites, and at least so many pairs, with a gap."""
    model = draw(models)
    hooks = draw(st.lists(st.sampled_from(sites(model)), min_size=1, max_size=most, unique=True))
    drawn = fp.Pairs(tuple(draw(st.lists(pair(), min_size=least, max_size=2))))
    assume(has_gap([baseline(model, one, "noising") for one in drawn], [baseline(model, one, "denoising") for one in drawn]))
    return model, [draw(saes(model, hook)) for hook in hooks], drawn


@st.composite
def nodes(draw: Any, sae: Any, length: int) -> list[fp.Node]:
    """Any of a dictionary's nodes, at any positions."""
    feature = st.tuples(st.just("feature"), st.integers(0, FEATURES - 1))
    kind = feature | feature | st.just(("error", None)) | st.just(("all_features", None))
    chosen = draw(st.lists(st.tuples(kind, st.just("all") | st.integers(0, length - 1)), min_size=1, max_size=4, unique=True))
    return [fp.Node(oracle.hooks(sae)[1], name, index, position) for (name, index), position in chosen]


# What is true of them.


def tokens(pair: fp.Pair, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and source of a direction."""
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    return (corrupted, clean) if way == "denoising" else (clean, corrupted)


def metric(logits: torch.Tensor, pair: fp.Pair) -> torch.Tensor:
    at = logits[0, pair.answer_position]
    return at[list(pair.correct)].mean() - at[list(pair.wrong)].mean()


@torch.no_grad()
def baseline(model: Any, pair: fp.Pair, way: str) -> float:
    return float(metric(model(tokens(pair, way)[0]), pair))


def has_gap(clean: Any, corrupted: Any) -> bool:
    return bool(abs(np.mean(clean) - np.mean(corrupted)) > 0.02 * max(np.abs(clean).mean(), np.abs(corrupted).mean()))


def carrier(model: Any, hook: str) -> str:
    """Where a change of the stream is added: a bridge's `hook_resid_mid` is the input of a norm."""
    return hook.replace("resid_mid", "attn_out") if hasattr(model, "original_model") else hook


@torch.no_grad()
def change(sae: Any, nodes: list[fp.Node], x: Any, y: Any, x_source: Any, y_source: Any) -> torch.Tensor:
    """x' - x_b = dec(f_b with f_s in S) - dec(f_b) [+ e_s - e_b]; a state of the decoder goes with the error.

    A dictionary reads `x` and writes `y`.
    """
    f, f_source = oracle.encode(sae, x), oracle.encode(sae, x_source)
    columns, rest = torch.zeros_like(f, dtype=torch.bool), torch.zeros(y.shape[1], dtype=torch.bool)
    for node in nodes:
        where = slice(None) if node.position == "all" else node.position
        rest[where] |= node.kind in ("error", "activation")
        columns[0, where, slice(None) if node.index is None else node.index] |= node.kind != "error"
    new = torch.where(columns, f_source, f)
    kept = y + oracle.decode(sae, new, x, y) - oracle.decode(sae, f, x, y)
    taken = oracle.decode(sae, new, x_source, y) + y_source - oracle.decode(sae, f_source, x_source, y_source)
    return torch.where(rest.reshape(-1, *[1] * (y.dim() - 2)), taken, kept) - y


@torch.no_grad()
def patched(model: Any, base: Any, source: Any, swaps: list[tuple[Any, list[fp.Node]]], how: str = "add") -> torch.Tensor:
    """Logits of the base run with nodes of dictionaries taken from the source run: one hooked forward pass."""
    live, there, hooks = dict(oracle.activations(model, base)), oracle.activations(model, source), []
    for sae, chosen in swaps:
        reads, writes = oracle.hooks(sae)
        moved = partial(change, sae, chosen, x_source=there[reads], y_source=there[writes])
        if how == "add":
            delta = moved(live[reads], live[writes])
            hooks.append((carrier(model, writes), lambda y, hook, delta=delta: y + delta))
        else:
            hooks.append((reads, lambda x, hook, reads=reads: live.update({reads: x})))
            hooks.append((writes, lambda y, hook, moved=moved, reads=reads: y + moved(live[reads], y)))
    return model.run_with_hooks(base, fwd_hooks=hooks)


def of_node(saes: list[Any], node: fp.Node) -> Any:
    return next(sae for sae in saes if oracle.hooks(sae)[1] == node.site)


def some(effects: fp.Effects, seed: int, most: int = 4) -> list[tuple[fp.Node, int, dict[str, float]]]:
    """A few entries: node, pair, and the metric of the patched runs."""
    drawn = random.Random(seed).sample(range(len(effects.row)), min(most, len(effects.row)))
    values = {"denoising": effects.denoised, "noising": effects.noised}
    return [
        (effects.nodes[effects.row[entry]], int(effects.pair[entry]), {way: values[way][entry] for way in WAYS})
        for entry in drawn
    ]


def requests(pairs: fp.Pairs) -> st.SearchStrategy[Any]:
    index = st.integers(0, min(map(len, pairs)) - 1)
    return st.sampled_from(["all", "each"]) | st.lists(index, min_size=1, max_size=2, unique=True)


SEEDS = st.integers(0, 999)
ROWS = st.integers(10, 300)


# Section 1: the operation. Laws 1 to 4 and 9.


@share(0.025)
@given(st.data())
def test_a_patch_is_its_definition(data: Any) -> None:
    """Any nodes of one or two dictionaries, at any positions, in either run, added and set."""
    model, several, (pair, *_) = data.draw(worlds())
    base, source = tokens(pair, data.draw(st.sampled_from(WAYS)))
    swaps = [(sae, data.draw(nodes(sae, len(pair)))) for sae in several]
    how = data.draw(st.sampled_from(["add", "set"]))
    assume(how == "add" or all(carrier(model, oracle.hooks(sae)[1]) == oracle.hooks(sae)[1] for sae in several))
    patch = fp.Patch(tuple(node for _, chosen in swaps for node in chosen))
    runs = {"source": source, **({"base": base} if how == "add" else {})}
    with torch.no_grad(), fp.do(model, patch, saes=several, how=how, **runs):
        found = model(base)
    torch.testing.assert_close(found, patched(model, base, source, swaps, how), rtol=0, atol=EXACT)


@share(0.02)
@given(st.data())
def test_an_empty_patch_leaves_every_bit(data: Any) -> None:
    """Laws 1 and 3: features and error are the activation, and whatever goes from a run into itself changes nothing."""
    model, several, (pair, *_) = data.draw(worlds())
    base, _ = tokens(pair, data.draw(st.sampled_from(WAYS)))
    for sae, split_by in zip(several, dictionaries(wrap(model), several), strict=True):
        x, y = (oracle.activations(model, base)[hook] for hook in oracle.hooks(sae))
        split = split_by.split({split_by.reads: x, split_by.writes: y})
        assert torch.equal(split.features, oracle.encode(sae, x).detach())
        merged = split_by.decode(split.features, split.state) + split.error
        torch.testing.assert_close(merged, y.flatten(2), rtol=0, atol=EXACT)
    patch = fp.Patch(tuple(node for sae in several for node in data.draw(nodes(sae, len(pair)))))
    with torch.no_grad():
        before = model(base)
        with fp.do(model, patch, source=base, base=base, saes=several):
            assert torch.equal(model(base), before)


@share(0.015)
@given(st.data())
def test_all_features_and_the_error_are_the_whole_activation(data: Any) -> None:
    """Law 2, at any positions: the same from plain TransformerLens."""
    model, (sae,), (pair, *_) = data.draw(worlds(most=1))
    base, source = tokens(pair, data.draw(st.sampled_from(WAYS)))
    everywhere = list(range(len(pair)))
    where = data.draw(st.just(["all"]) | st.lists(st.sampled_from(everywhere), min_size=1, unique=True))
    site = oracle.hooks(sae)[1]
    whole = oracle.patched_activation_logits(model, site, base, source, everywhere if where == ["all"] else where)
    for kinds in (("all_features", "error"), ("activation",)):
        patch = fp.Patch(tuple(fp.Node(site, kind, None, position) for kind in kinds for position in where))
        with torch.no_grad(), fp.do(model, patch, source=source, base=base, saes=sae):
            torch.testing.assert_close(model(base), whole, rtol=0, atol=EXACT)


@share(0.012)
@given(st.data())
def test_the_whole_stream_brings_everything_back(data: Any) -> None:
    """Law 3."""
    model, _, pairs = data.draw(worlds())
    stream = data.draw(st.sampled_from([site for site in sites(model) if "resid" in site]))
    name, layer = stream.rsplit("hook_", 1)[1], int(stream.split(".")[1])
    effects = fp.rank_components(model, pairs, sites=name, layers=[layer], progress=False)
    for effect in ("recovery", "degradation"):
        np.testing.assert_allclose(effects.pooled(effect), 1, atol=EXACT)
        np.testing.assert_allclose(effects.changes(effect).toarray(), effects.gap[None], atol=EXACT)


@share(0.016)
@given(st.data())
def test_every_row_is_one_hooked_forward(data: Any) -> None:
    """Law 4, batched, packed and resumed, of pairs of several lengths; and what has no row has no effect."""
    model, several, pairs = data.draw(worlds())
    positions, seed = data.draw(requests(pairs)), data.draw(SEEDS)
    effects = fp.rank_features(model, several, pairs, positions=positions, batch_rows=data.draw(ROWS), progress=False)
    for slot, pair in enumerate(pairs):
        assert effects.clean[slot] == pytest.approx(baseline(model, pair, "noising"), abs=EXACT)
        assert effects.corrupted[slot] == pytest.approx(baseline(model, pair, "denoising"), abs=EXACT)
    for node, slot, values in some(effects, seed):
        for way in WAYS:
            logits = patched(model, *tokens(pairs[slot], way), [(of_node(several, node), [node])])
            assert values[way] == pytest.approx(float(metric(logits, pairs[slot])), abs=EXACT), (node, way)
    stored = {(effects.nodes[row], slot) for row, slot in zip(effects.row, effects.pair, strict=True)}
    (sae, *_), slot = several, seed % len(pairs)
    where = "all" if positions == "all" else seed % len(pairs[slot]) if positions == "each" else positions[0]
    node = fp.Node(oracle.hooks(sae)[1], "feature", seed % FEATURES, where, dictionaries(wrap(model), sae)[0].name)
    if (node, slot) not in stored:
        logits = patched(model, *tokens(pairs[slot], "denoising"), [(sae, [node])])
        assert effects.corrupted[slot] == pytest.approx(float(metric(logits, pairs[slot])), abs=EXACT)


@share(0.01)
@given(st.data())
def test_every_component_is_one_hooked_forward(data: Any) -> None:
    """Law 4: heads, neurons and whole activations."""
    model, _, pairs = data.draw(worlds(models([*["hooked"] * 5, "gpt2", "neox"], ["LN", "RMS", None])))
    names = {site.rsplit("hook_", 1)[1] for site in sites(model)} | {"q", "k", "v"}
    names |= set() if getattr(model.cfg, "attn_only", False) else {"neurons"}
    chosen = data.draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=2, unique=True))
    effects = fp.rank_components(
        model, pairs, sites=chosen, positions=data.draw(requests(pairs)), batch_rows=data.draw(ROWS), progress=False
    )
    for node, slot, values in some(effects, data.draw(SEEDS)):
        for way in WAYS:
            base, source = tokens(pairs[slot], way)
            old, there = (oracle.activations(model, run)[node.site] for run in (base, source))
            new, where = old.clone(), slice(None) if node.position == "all" else node.position
            part = (0, where) if node.index is None else (0, where, node.index)
            new[part] = there[part]
            with torch.no_grad():
                expected = float(metric(oracle.replaced(model, base, node.site, old, new), pairs[slot]))
            assert values[way] == pytest.approx(expected, abs=EXACT), (node, way)


@share(0.015)
@given(st.data())
def test_every_patch_counts_how_often_it_fired(data: Any) -> None:
    """Law 9: once for each site and call; a site that a call ends before never fires, which is an error."""
    model, several, (pair, *_) = data.draw(worlds())
    base, source = tokens(pair, "denoising")
    patch = fp.Patch(tuple(node for sae in several for node in data.draw(nodes(sae, len(pair)))))
    calls, stop = data.draw(st.integers(0, 3)), data.draw(st.none() | st.integers(0, model.cfg.n_layers))
    options = {} if stop is None or hasattr(model, "original_model") else {"stop_at_layer": stop}
    layers = [int(oracle.hooks(sae)[1].split(".")[1]) for sae in several]
    reached = [layer for layer in layers if calls and layer < options.get("stop_at_layer", 99)]
    silent = pytest.raises(fp.FeatpatchError, match="was never applied") if len(reached) < len(layers) else nullcontext()
    with silent, torch.no_grad(), fp.do(model, patch, source=source, base=base, saes=several) as firing:
        for _ in range(calls):
            model(base, **options)
        assert firing.count == calls * len(reached)


# Section 1: what is made of the measured values.


QUARTERS = st.integers(-12, 12).map(lambda n: n / 4)


@st.composite
def tables(draw: Any, least: int = 1, most: int = 5, positive: bool = False) -> fp.Effects:
    """Any measured values, not all of them stored; sums of them are exact."""
    rows, pairs = draw(st.integers(1, 4)), draw(st.integers(least, most))
    corrupted = draw(arrays(np.float64, pairs, elements=QUARTERS))
    gap = draw(arrays(np.float64, pairs, elements=QUARTERS.filter(lambda x: x > 0) if positive else QUARTERS))
    assume(gap.sum())
    row, pair = np.nonzero(draw(arrays(np.bool_, (rows, pairs))))
    denoised, noised = (draw(arrays(np.float64, len(row), elements=QUARTERS)) for _ in range(2))
    made = tuple(fp.Node("blocks.0.hook_resid_pre", "feature", index) for index in range(rows))
    metadata = {"metric": "m", "directions": list(WAYS)}
    return fp.Effects(made, corrupted + gap, corrupted, row, pair, denoised, noised, metadata)


@share(0.15)
@given(tables())
def test_effects_are_shares_of_the_gap(table: fp.Effects) -> None:
    """Ratio of means over all pairs, change over gap in each; never clipped, and no ratio where there is no gap."""
    found = {effect: (table.pooled(effect), table.per_pair(effect)) for effect in ("recovery", "degradation")}
    for row in range(len(table)):
        for effect, (pooled, each) in found.items():
            total = 0.0
            for slot, (clean, corrupted) in enumerate(zip(table.clean, table.corrupted, strict=True)):
                entry = np.flatnonzero((table.row == row) & (table.pair == slot))
                x = table.denoised[entry] - corrupted if effect == "recovery" else clean - table.noised[entry]
                total += float(x.sum())
                expected = float(x.sum()) / (clean - corrupted) if clean != corrupted else np.nan
                assert each[row, slot] == pytest.approx(expected, nan_ok=True)
            assert pooled[row] == pytest.approx(total / (table.clean - table.corrupted).sum())


@share(0.1)
@given(arrays(np.float64, (2, 4), elements=QUARTERS))
def test_a_gap_near_zero_is_refused(baselines: NDArray[np.float64]) -> None:
    clean, corrupted = baselines
    if clean.sum() != corrupted.sum():
        check_gap("m", clean, corrupted)
        return
    for share_of_size in (0.0, 1e-4, -1e-4):
        with pytest.raises(fp.FeatpatchError, match="expected a gap large enough to normalise effects by"):
            check_gap("m", clean + share_of_size * np.abs(clean).mean(), corrupted)


@share(0.01)
@given(st.data())
def test_directions_swap_roles_with_the_runs(data: Any) -> None:
    """Recovery of clean and corrupted is degradation of corrupted and clean."""
    model, several, pairs = data.draw(worlds())
    mirrored = fp.Pairs(tuple(replace(pair, clean=pair.corrupted, corrupted=pair.clean) for pair in pairs))
    one, other = (fp.rank_features(model, several, some, positions="each", progress=False) for some in (pairs, mirrored))
    assert set(one.nodes) == set(other.nodes)
    for effect, opposite in (("recovery", "degradation"), ("degradation", "recovery")):
        found, expected = (dict(zip(t.nodes, t.pooled(e), strict=True)) for t, e in ((one, effect), (other, opposite)))
        assert found == pytest.approx(expected, abs=1e-8)


@share(0.05)
@given(tables(least=2, most=4))
def test_the_interval_is_a_bootstrap_over_pairs(table: fp.Effects) -> None:
    """Against all resamples of the pairs, within 5 standard errors of the 999 that are drawn."""
    every = np.array(list(product(range(len(table.clean)), repeat=len(table.clean))))
    gaps = table.gap[every].sum(1)
    assume((gaps != 0).all())
    error = 5 * np.sqrt(0.025 * 0.975 / 999)
    for effect in ("recovery", "degradation"):
        for change, (low, high) in zip(table.changes(effect).toarray(), table.interval(effect), strict=True):
            ratios = change[every].sum(1) / gaps
            assert (ratios < low - EXACT).mean() <= 0.025 + error
            assert (ratios <= low + EXACT).mean() >= 0.025 - error
            assert (ratios > high + EXACT).mean() <= 0.025 + error
            assert (ratios >= high - EXACT).mean() >= 0.025 - error


@share(0.05)
@given(tables(least=2, most=12, positive=True), st.sampled_from([-2.0, -0.5, 0.25, 3.0]))
def test_intervals_go_with_their_effects(table: fp.Effects, factor: float) -> None:
    """Within the ratios of single pairs; a share that is the same in all pairs has no width; factors and shifts go through."""
    for effect in ("recovery", "degradation"):
        low, high = table.interval(effect).T
        each = table.per_pair(effect)
        assert (each.min(1) - EXACT <= low).all()
        assert (low <= high).all()
        assert (high <= each.max(1) + EXACT).all()
        alone = np.concatenate([table.take([row]).interval(effect) for row in range(len(table))])
        np.testing.assert_allclose(alone, table.interval(effect), rtol=0, atol=EXACT)
    row, pair = np.nonzero(np.ones((len(table), len(table.clean))))
    change = factor * table.changes("recovery").toarray()[row, pair]
    scaled = replace(
        table, row=row, pair=pair, denoised=table.corrupted[pair] + change, noised=table.clean[pair] - factor * table.gap[pair]
    )
    expected = np.sort(factor * table.interval("recovery"), axis=1)
    np.testing.assert_allclose(scaled.interval("recovery"), expected, rtol=0, atol=EXACT)
    np.testing.assert_allclose(scaled.interval("degradation"), factor, rtol=0, atol=EXACT)


ENDS = st.tuples(QUARTERS, QUARTERS).map(sorted) | st.just([float("nan")] * 2)


@share(0.2)
@given(ENDS, ENDS, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_a_quadrant_is_decided_by_both_intervals(recovery: list[float], degradation: list[float], threshold: float) -> None:
    def size(low: float, high: float) -> str:
        if low > threshold:
            return "high"
        if -threshold <= low <= high <= threshold:
            return "low"
        return "opposing" if high < -threshold else "unknown"

    sizes = size(*recovery), size(*degradation)
    expected = {
        ("high", "high"): "both directions", ("high", "low"): "denoising only",
        ("low", "high"): "noising only", ("low", "low"): "below threshold",
    }.get(sizes, "undecided" if "unknown" in sizes else "opposing")  # fmt: skip
    for carried in (1.0, -0.5):  # the hook point carries half as much, with the other sign: half the share
        assert quadrant_labels(
            [np.array([recovery]), np.array([degradation])], [np.full(1, carried)] * 2, threshold / abs(carried)
        ) == [expected]


@share(0.03)
@given(tables(), st.sampled_from([0.1, 0.25, 0.5]), st.sets(st.sampled_from(WAYS), min_size=1))
def test_quadrants_of_a_table(table: fp.Effects, threshold: float, run: set[str]) -> None:
    table = replace(table, metadata={**table.metadata, "directions": sorted(run)})
    both = [table.interval(effect) for effect in ("recovery", "degradation")]
    carried = [np.ones(len(table))] * 2
    expected = quadrant_labels(both, carried, threshold) if len(run) == 2 else ["undecided"] * len(table)
    assert table.with_threshold(threshold).quadrants() == expected


# Laws 5, 7 and 8.


def by_entry(effects: fp.Effects, order: Any) -> dict[tuple[fp.Node, int], tuple[float, float]]:
    entries = zip(effects.row, effects.pair, effects.denoised, effects.noised, strict=True)
    return {(effects.nodes[row], order[pair]): (denoised, noised) for row, pair, denoised, noised in entries}


@share(0.013)
@given(st.data())
def test_order_batches_and_neighbours_change_nothing(data: Any) -> None:
    """Law 5."""
    model, several, pairs = data.draw(worlds(least=2))
    positions = data.draw(requests(pairs))
    together = fp.rank_features(model, several, pairs, positions=positions, progress=False)
    order = data.draw(st.lists(st.sampled_from(range(len(pairs))), min_size=1, unique=True))
    assume(has_gap(together.clean[order], together.corrupted[order]))
    others = fp.rank_features(
        model, data.draw(st.permutations(several)), fp.Pairs(tuple(pairs[k] for k in order)), positions=positions,
        batch_rows=data.draw(ROWS), progress=False,
    )  # fmt: skip
    expected, found = by_entry(together, range(len(pairs))), by_entry(others, order)
    assert found.keys() == {key for key in expected if key[1] in order}
    for key, values in found.items():
        assert values == pytest.approx(expected[key], abs=EXACT), key


class Clock:
    """Stops whatever runs at the n-th tick."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error = at, error

    def tick(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("stop here")

    def metric(self, logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        self.tick()
        return logits[:, list(correct)].mean(-1) - logits[:, list(wrong)].mean(-1)


class Ticking(Squared):
    """A dictionary that may stop in the middle."""

    def __init__(self, width: int, clock: Clock) -> None:
        super().__init__(width)
        self.clock = clock

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.tick()
        return super().encode(x)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        self.clock.tick()
        return super().decode(features)


def condition(model: Any) -> Any:
    """Everything that a call may leave behind on a model, and what is global."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks")
    modules = [
        (name, module.training, "forward" in vars(module), [len(getattr(module, kind, ())) for kind in hooks])
        for name, module in model.named_modules()
    ]
    parameters = [(parameter.grad is None, parameter.requires_grad) for parameter in model.parameters()]
    return modules, parameters, torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()


@share(0.025)
@given(st.data())
def test_whatever_stops_it_a_call_leaves_nothing_behind(data: Any) -> None:
    """Law 7: anything may fail at any time: a module of the model, the metric, a dictionary, the user within `do`."""
    built.cache_clear()  # what one example leaves behind is not to meet the next
    model, _, pairs = data.draw(worlds())
    clock = Clock(data.draw(st.integers(0, 40)), data.draw(st.sampled_from([RuntimeError, KeyboardInterrupt])))
    site = data.draw(st.sampled_from([site for site in sites(model) if not site.endswith("hook_z")]))
    own = fp.dictionaries.adapt(Ticking(model.cfg.d_model, clock), site, d_in=model.cfg.d_model)
    operation = data.draw(st.sampled_from(["rank", "components", "estimate", "do"]))
    method = data.draw(st.sampled_from(["atp", "ig", "eap_ig_inputs", "grad_drop"]))
    how = data.draw(st.sampled_from(["add", "set"]))
    base, source = tokens(pairs[0], "denoising")
    options = {"metric": clock.metric, "progress": False}
    with torch.no_grad():
        logits, before = model(base), condition(model)
    handle = data.draw(st.sampled_from([module for _, module in model.named_modules()])).register_forward_hook(clock.tick)
    try:
        with suppress(RuntimeError, KeyboardInterrupt, fp.FeatpatchError, fp.SlowPathWarning):
            if operation == "rank":
                fp.rank_features(model, own, pairs, **options)
            elif operation == "components":
                fp.rank_components(model, pairs, sites=["q", "pattern", site.rsplit("hook_", 1)[1]], **options)
            elif operation == "estimate":
                fp.rank_features(
                    model,
                    own,
                    pairs,
                    method=fp.Gradients(model, pairs, method=method, steps=1 if "ig" in method else None),
                    **options,
                )
            else:
                patch = fp.Patch((fp.Node(site, "all_features"),))
                with fp.do(model, patch, source=source, saes=own, how=how, **({"base": base} if how == "add" else {})):
                    model(base)
                    clock.tick()
    finally:
        handle.remove()
    with torch.no_grad():
        assert condition(model) == before
        assert torch.equal(model(base), logits)


@share(0.012)
@given(st.data())
def test_interrupted_and_resumed_is_uninterrupted(tmp_path_factory: Any, data: Any) -> None:
    """Law 8, bit by bit, however often it is stopped and wherever its journal is torn; and what is returned early is right."""
    model, several, pairs = data.draw(worlds())
    rows = data.draw(st.integers(8, 40))
    options = {"positions": data.draw(requests(pairs)), "batch_rows": rows, "progress": False}
    endless = Clock(10**9, KeyboardInterrupt)
    whole = fp.rank_features(model, several, pairs, metric=endless.metric, **options)
    ticks = 10**9 - endless.left
    expected = by_entry(whole, range(len(pairs)))
    journal: Path = tmp_path_factory.mktemp("journals") / "journal"
    for stop in data.draw(st.lists(st.integers(ticks // 3, ticks - 1), min_size=1, max_size=2)):
        with suppress(KeyboardInterrupt):
            clock = Clock(stop, KeyboardInterrupt)
            part = fp.rank_features(model, several, pairs, metric=clock.metric, journal=journal, **options)
            for key, values in by_entry(part, part.metadata.get("of_pairs", range(len(pairs)))).items():
                assert values == expected[key]
        if journal.exists():
            content = journal.read_bytes()
            journal.write_bytes(content[: len(content) - data.draw(st.sampled_from([0, 0, 1, 30]))])
    resumed = fp.rank_features(model, several, pairs, metric=endless.metric, journal=journal, **options)
    assert resumed.nodes == whole.nodes
    assert resumed.finished
    for column in ("clean", "corrupted", "row", "pair", "denoised", "noised"):
        assert np.array_equal(getattr(resumed, column), getattr(whole, column)), column


# Section 5 and law 6: gradients.


def gradient(model: Any, pair: fp.Pair, way: str, hook: str, points: list[float]) -> torch.Tensor:
    """Mean of d metric / d activation over points of the line from base to source of one site, all others as they run."""
    base, source = tokens(pair, way)
    y, there = (oracle.activations(model, run)[hook] for run in (base, source))
    found = []
    for point in points:
        leaf = (point * (there - y)).requires_grad_()
        logits = model.run_with_hooks(base, fwd_hooks=[(carrier(model, hook), lambda x, hook, leaf=leaf: x + leaf)])
        found += torch.autograd.grad(metric(logits, pair), leaf)
    return torch.stack(found).mean(0)


def adds_up(sae: Any) -> bool:
    """Whether each feature adds its own direction and decoding needs nothing else."""
    if hasattr(sae, "coder") or hasattr(sae, "W_skip") or sae.cfg.architecture() == "temporal":
        return False
    return bool(sae.cfg.normalize_activations == "none")


@share(0.02)
@given(st.data())
def test_estimates_are_changes_times_gradients(data: Any) -> None:
    """IE = (x' - x_b) . g in the unmodified model; features and error add up to (x_s - x_b) . g.

    Along the whole stream IG of noising is minus IG of denoising; elsewhere the streams beside the site differ.
    """
    model, several, pairs = data.draw(worlds())
    steps = data.draw(st.integers(0, 2))
    options: dict[str, Any] = {"method": "ig", "steps": steps} if steps else {"method": "atp"}
    points = [(step + 0.5) / steps for step in range(steps)] or [0.0]
    positions = data.draw(requests(pairs))
    effects = fp.rank_features(
        model, several, pairs, method=fp.Gradients(model, pairs, **options), positions=positions, progress=False
    )
    measured = {"denoising": (effects.corrupted, effects.denoised), "noising": (effects.clean, effects.noised)}
    if all(map(adds_up, several)):
        assert effects.metadata["completeness_residual"] < 1e-9
    for node, slot, values in some(effects, data.draw(SEEDS), 2):
        sae, where = of_node(several, node), slice(None) if node.position == "all" else node.position
        beside = [n.site == node.site and n.position == node.position and n.kind in ("feature", "error") for n in effects.nodes]
        for way, (base, patched_runs) in measured.items():
            g = gradient(model, pairs[slot], way, node.site, points)
            runs = [oracle.activations(model, run)[hook] for run in tokens(pairs[slot], way) for hook in oracle.hooks(sae)]
            expected = float((change(sae, [node], *runs) * g).sum())
            assert values[way] - base[slot] == pytest.approx(expected, abs=EXACT), (node, way)
            if adds_up(sae):
                total = (patched_runs - base[slot])[np.array(beside)[effects.row] & (effects.pair == slot)].sum()
                assert total == pytest.approx(float(((runs[3] - runs[1]) * g)[0, where].sum()), abs=EXACT)
        if steps and adds_up(sae) and "resid" in node.site:
            there, back = values["denoising"] - effects.corrupted[slot], values["noising"] - effects.clean[slot]
            assert there == pytest.approx(-back, abs=EXACT)


@share(0.015)
@given(st.data())
def test_estimates_are_exact_where_the_metric_is_linear(data: Any) -> None:
    """Law 6: without norms, at sites that only the unembedding reads; against hooked forward passes."""
    model, _, pairs = data.draw(worlds(models(["hooked"], [None])))
    last = f"blocks.{model.cfg.n_layers - 1}."
    linear = [f"{last}hook_resid_post"]
    linear += [] if model.cfg.attn_only else [f"{last}hook_mlp_out"]
    if model.cfg.attn_only or model.cfg.parallel_attn_mlp:
        linear += [f"{last}hook_attn_out", f"{last}attn.hook_z"]
    sae = data.draw(st.sampled_from(linear).flatmap(lambda hook: saes(model, hook)))
    options = data.draw(st.sampled_from([{"method": "atp"}, {"method": "ig", "steps": 1}, {"method": "ig", "steps": 2}]))
    effects = fp.rank_features(
        model, sae, pairs, method=fp.Gradients(model, pairs, **options), positions=data.draw(requests(pairs)), progress=False
    )
    for node, slot, values in some(effects, data.draw(SEEDS)):
        for way in WAYS:
            logits = patched(model, *tokens(pairs[slot], way), [(sae, [node])])
            assert values[way] == pytest.approx(float(metric(logits, pairs[slot])), abs=EXACT), (node, way)


@share(0.005)
@given(st.data())
def test_integrated_gradients_reach_the_whole_site(data: Any) -> None:
    """Law 6: the error of the midpoint rule falls with the square of the steps; the metadata says how large it is."""
    model, _, pairs = data.draw(worlds(models(["hooked"], ["LN", "RMS", None])))
    site = data.draw(st.sampled_from(sites(model)))
    everything = fp.dictionaries.identity(model, site)
    left = []
    for steps in (8, 24):
        effects = fp.rank_features(
            model, everything, pairs, method=fp.Gradients(model, pairs, method="ig", steps=steps), progress=False
        )
        errors = [0.0]
        for _, slot, values in some(effects.where(kind="activation"), 0):
            for way in WAYS:
                whole = oracle.patched_activation_logits(model, site, *tokens(pairs[slot], way), list(range(len(pairs[slot]))))
                errors.append(abs(values[way] - float(metric(whole, pairs[slot]))))
        left.append(max(errors))
        assert effects.metadata["whole_residual"] == pytest.approx(left[-1] / abs(effects.gap.mean()), abs=EXACT)
    assert left[1] <= left[0] / 4 + 1e-9


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SPANS = st.tuples(st.integers(0, 1), st.integers(0, 2)).map(lambda ends: tuple(range(ends[0], sum(ends) + 1)))


@st.composite
def written_pair(draw: Any) -> fp.Pair:
    """A pair with all that it can have, of tokens that need not be words of a tokenizer that reads them again."""
    plain = draw(pair())
    labels = st.dictionaries(TEXTS.filter(lambda name: name not in ("all", "each")), st.integers(0, 1) | SPANS, max_size=2)
    fields = {
        "labels": {name: of for name, of in draw(labels).items() if isinstance(of, int) or max(of) < len(plain)},
        "special": draw(st.frozensets(st.integers(0, 4), max_size=2)),
        "tags": draw(st.dictionaries(TEXTS, TEXTS, max_size=2)),
    }
    if draw(st.booleans()):
        return replace(plain, **fields)
    sequences = draw(st.lists(st.lists(st.integers(0, VOCAB), min_size=1, max_size=3).map(tuple), min_size=1, unique=True))
    some = draw(st.integers(1, len(sequences)))
    return replace(
        plain, correct=(), wrong=(), correct_sequences=tuple(sequences[:some]), wrong_sequences=tuple(sequences[some:]),
        answer_position=-1, **fields,
    )  # fmt: skip


class Numbered:
    """A tokenizer of numbered words, of which token 7 is special, and which can't write token 5."""

    all_special_ids = (7,)

    def __call__(self, text: str, **_: object) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join("w6" if token == 5 else f"w{token}" for token in ids)


@share(1)
@given(st.lists(written_pair(), min_size=1, max_size=3), st.booleans())
def test_pairs_are_read_as_they_were_written(several: list[fp.Pair], with_texts: bool) -> None:
    pairs, tokenizer = fp.Pairs(tuple(several)), Numbered()
    with TemporaryDirectory() as folder:
        path = pairs.to_jsonl(Path(folder) / "pairs.jsonl", tokenizer=tokenizer if with_texts else None)
        read = fp.Pairs.from_jsonl(tokenizer, path)
        again = read.to_jsonl(Path(folder) / "again.jsonl").read_bytes()
        assert pairs.to_jsonl(path).read_bytes() == again
    assert read == pairs
    assert read.digest() == pairs.digest()
