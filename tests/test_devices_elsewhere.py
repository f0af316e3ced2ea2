"""More of the tools on a model that lies on two devices, see `test_devices`: graphs, steering, groups, dictionaries of many layers."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import test_graphs
import torch
from architectures import LAYERS, WIDTH
from devices import CPU, place
from small import Small
from test_devices import QUIET, SHARED, circuit, feature, named, on_one, on_two, pairs_of, pretended, same
from torch.utils._python_dispatch import _disable_current_modes

import featpatch as fp
from featpatch.model.transformer_lens import wrap

RESID = SHARED[1]
__all__ = ["pretended"]


def places(small: Small) -> list[torch.device]:
    """The devices of a model: one, or two that are pretended."""
    return sorted(wrap(small.model).devices, key=str)


def one_sae(small: Small) -> Any:
    return next(sae for sae in small.saes if sae.cfg.metadata.hook_name == RESID)


def transcoders(small: Small) -> list[Any]:
    made = test_graphs.transcoders(small.model)
    for number, each in enumerate(made):
        device = places(small)[number % len(places(small))]
        if device != CPU:
            place(each, device)
            each.device, each.cfg.device = device, str(device)
    return made


def graph(small: Small, given: list[Any]) -> Any:
    return fp.attribution_graph(small.model, given, small.clean[0].tolist(), size=30, **QUIET)


def graph_effects(small: Small) -> Any:
    given = transcoders(small)
    found = fp.graph_effects(small.model, given, graph(small, given), pair=pairs_of(small)[0], edges=4, **QUIET)
    return found.to_pandas().select_dtypes("float").fillna(0.0)


def drawn(small: Small, *shape: int) -> torch.Tensor:
    """Random weights on the last device of a model."""
    return (0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).to(places(small)[-1])


def transcoder_of_all_layers(small: Small) -> Any:
    return fp.dictionaries.CrossLayerTranscoder(
        drawn(small, LAYERS, 8, WIDTH), [drawn(small, 8, LAYERS - layer, WIDTH) for layer in range(LAYERS)],
        drawn(small, LAYERS, 8), drawn(small, LAYERS, WIDTH),
        hook=[f"blocks.{layer}.mlp.hook_in" for layer in range(LAYERS)],
        hook_out=[f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)],
    )  # fmt: skip


def crosscoder(small: Small) -> Any:
    hooks = ["blocks.0.hook_resid_pre", RESID]
    weights = drawn(small, 2, WIDTH, 8), drawn(small, 2, 8, WIDTH), drawn(small, 8), drawn(small, 2, WIDTH)
    return fp.dictionaries.Crosscoder(*weights, hook=hooks)


def steered(small: Small) -> Any:
    """Logits with a feature and a head set, scaled, and a feature added."""
    tokens, made = small.clean.to(wrap(small.model).device), []
    moved = feature(RESID, 3)
    for how, values in (
        ("set", {moved: 2.0, fp.head(1, 1): 0.5}),
        ("scale", {moved: 2.0, fp.head(1, 1): 0.5}),
        ("add", {moved: 2.0}),
    ):
        with torch.no_grad(), fp.steer(small.model, values, saes=one_sae(small), how=how):
            made.append(small.model(tokens).cpu())
    return torch.stack(made)


def streamed(small: Small) -> fp.Effects:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "stream"
        return fp.stream_features(small.model, small.saes[1:2], [pairs_of(small, 2)], path, **QUIET).load()


def grouped(small: Small) -> fp.Effects:
    effects = fp.rank_features(small.model, one_sae(small), pairs_of(small, 2), **QUIET)
    return fp.group_features(small.model, [one_sae(small)], pairs_of(small, 2), effects, **QUIET).effects


def compared(small: Small) -> Any:
    effects = fp.rank_features(small.model, one_sae(small), pairs_of(small), **QUIET)
    components = fp.rank_components(small.model, pairs_of(small), sites=["z", "mlp_out"], **QUIET)
    found = fp.compare(effects, components, model=small.model, saes=one_sae(small), pairs=pairs_of(small))
    return found.writers.select_dtypes("float")


TASKS: dict[str, Callable[[Small], Any]] = {
    "graph": lambda s: graph(s, transcoders(s)).adjacency,
    "graph effects": graph_effects,
    "queries and keys": lambda s: fp.qk_attribution(
        s.model, one_sae(s), s.clean[0].tolist(), 1, 1, query=5, key=2).to_pandas().select_dtypes("float"),
    "logits": lambda s: fp.logit_attribution(s.model, pairs_of(s, 2), saes=named(s), **QUIET).values,
    "CLT": lambda s: fp.rank_features(s.model, transcoder_of_all_layers(s), pairs_of(s), **QUIET),
    "CLT, set": lambda s: fp.rank_features(s.model, transcoder_of_all_layers(s), pairs_of(s), combine="set", **QUIET),
    "CLT, estimates": lambda s: fp.rank_features(s.model, transcoder_of_all_layers(s), pairs_of(s), method="atp", **QUIET),
    "crosscoder": lambda s: fp.rank_features(s.model, crosscoder(s), pairs_of(s), **QUIET),
    "joint patches": lambda s: fp.rank_nodes(
        s.model, pairs_of(s), [feature(SHARED[3], 2), fp.Patch((fp.head(0, 1), feature(SHARED[3], 3)))], saes=named(s), **QUIET),
    "relevance": lambda s: fp.rank_features(s.model, s.saes[:3], pairs_of(s), method="relp", **QUIET),
    "gim": lambda s: fp.rank_components(s.model, pairs_of(s), method="gim", sites=["z", "mlp_out"], **QUIET),
    "screen": lambda s: fp.rank_features(s.model, s.saes[:3], pairs_of(s, 2), screen=fp.Screen(k=8, audit=8), **QUIET),
    "long answers": lambda s: fp.rank_features(
        s.model, s.saes[1], fp.Pairs.from_tokens(s.clean[:1], s.corrupted[:1], [[3, 5]], [[4, 6]]),
        metric="sequence_log_prob_diff", **QUIET),
    "steering": steered,
    "doses": lambda s: fp.dose_response(
        s.model, pairs_of(s, 2), [feature(RESID, 2)], [0.5, 2.0], saes=one_sae(s), **QUIET).table().select_dtypes("float"),
    "losses": lambda s: fp.loss_recovered(s.model, named(s)[1:3], pairs_of(s, 2), **QUIET).to_pandas().select_dtypes("float"),
    "stream": streamed,
    "groups": grouped,
    "writers": compared,
    "direction": lambda s: fp.rank_features(s.model, fp.direction(drawn(s, WIDTH), RESID), pairs_of(s), **QUIET),
    "curve": lambda s: [*fp.find_circuit(s.model, pairs_of(s), over="edges", scores="estimate", size=20, **QUIET).curve().faithfulness],
    "means": lambda s: circuit(s, over="edges", size=8, scores="estimate", to="mean"),
    "edges, integrated": lambda s: circuit(s, over="edges", size=8, scores="eap_ig_activations", steps=2),
}  # fmt: skip
OFTEN = {"graph", "CLT", "steering", "doses", "losses"}


@pytest.mark.parametrize("task", [pytest.param(task, marks=[pytest.mark.extended] * (task not in OFTEN)) for task in TASKS])
def test_tools_elsewhere(task: str) -> None:
    with _disable_current_modes():
        expected = TASKS[task](on_one("gpt2"))
    same(TASKS[task](on_two("gpt2", "mixed")), expected)
