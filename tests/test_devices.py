"""Models that lie on several devices, as `device_map` puts them: the same numbers as on one.

Where no GPU is there the devices are pretended (see `devices`), and accelerate itself moves activations between them.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from devices import CPU, FIRST, SECOND, Placed, devices, place
from small import Small, dictionaries, small_hooked, standard
from torch.utils._python_dispatch import _disable_current_modes
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.utilities.multi_gpu import get_device_for_block_index

import featpatch as fp
from featpatch.engine import sweep as budget
from featpatch.model.transformer_lens import wrap

EXACT = 1e-10
GPUS = [torch.device("cuda", number) for number in range(min(2, torch.cuda.device_count()))]
PLACES = (FIRST, SECOND) if len(GPUS) < 2 else (GPUS[0], GPUS[1])
"""Of the split models: real devices where there are two."""

REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "sum": lambda a, b: a + b,
    "in place": lambda a, b: a.add_(b),
    "product": lambda a, b: a @ b.T,
    "linear": torch.nn.functional.linear,
    "norm": lambda a, b: torch.nn.functional.layer_norm(a, (4,), b[0]),
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "mask": lambda a, b: a.masked_fill(b > 0, 0.0),
    "select": lambda a, b: a.index_select(0, b[0].long() % 3),
    "put": lambda a, b: a.index_put((torch.tensor([0]),), b[:1]),
    "lookup": lambda a, b: torch.nn.functional.embedding(b.long() % 3, a),
    "equal": torch.equal,
}
FROM_CPU: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "index": lambda a, b: a[b[0].long() % 3],
    "boolean index": lambda a, b: a[b > 0],
    "number": lambda a, b: a * b.sum(),
    "assignment": lambda a, b: a.copy_(b),
}
"""What torch takes of the CPU; the last one of anywhere."""


def two() -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return one, other


@pytest.mark.parametrize("operation", [*REFUSED, *FROM_CPU])
def test_pretended_devices_do_not_mix(operation: str) -> None:
    run, a, b = {**REFUSED, **FROM_CPU}[operation], *two()
    with devices():
        assert run(a.to(FIRST), b.to(FIRST)) is not None
        if operation == "assignment":
            assert run(a.to(FIRST), b.to(SECOND)).device == FIRST
            return
        for here, there in ((FIRST, SECOND), (SECOND, FIRST), (CPU, FIRST)):
            with pytest.raises(RuntimeError, match="same device"):
                run(a.clone().to(here), b.to(there))
        if operation in FROM_CPU:
            assert run(a.to(FIRST), b).device == FIRST
            return
        with pytest.raises(RuntimeError, match="same device"):
            run(a.to(FIRST), b)


def test_pretended_devices_compute() -> None:
    """The same numbers as on the CPU, also of gradients through a change of the device; numbers are read as from a GPU."""
    a, b = two()
    expected = torch.autograd.grad(((a.requires_grad_() @ b.T).softmax(-1) ** 2).sum(), a)[0]
    with devices():
        x, y = (value.detach().to(FIRST) for value in (a, b))
        moved = (x.requires_grad_() @ y.T).to(SECOND)
        total = (moved.softmax(-1) ** 2).sum()
        (found,) = torch.autograd.grad(total, x)
        assert (moved.device, total.device, found.device) == (SECOND, SECOND, FIRST)
        assert torch.equal(found.cpu(), expected)
        assert type(found.cpu()) is torch.Tensor
        assert found.tolist() == expected.tolist()
        assert total.item() == float(total.detach())
        assert bool((y == y).all())
        with pytest.raises(TypeError, match="can't convert"):
            np.asarray(y)
        made = [torch.zeros(2, device=FIRST), torch.tensor([1.0], device=FIRST), y.new_ones(2), torch.arange(2, device=FIRST)]
        assert [value.device for value in made] == [FIRST] * 4
        y[1:, 0] = 7
        assert y[2, 0] == 7
        layer = torch.nn.Linear(4, 2)
        place(layer, SECOND)
        assert layer(b.to(SECOND)).device == SECOND
        with pytest.raises(RuntimeError, match="same device"):
            layer(b)


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """HookedTransformer compares types where it starts at a layer."""
    monkeypatch.setattr(sys.modules[HookedTransformer.__module__], "type", the_type, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with devices():
        yield
    torch.set_num_threads(threads)


def the_type(value: Any) -> type:
    return torch.Tensor if isinstance(value, Placed) else value.__class__


SHARED = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre",
          "blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]  # fmt: skip
"""Hooks that models of every architecture have."""
HEADS = {"reshape_activations": "hook_z"}


def on_one(name: str) -> Small:
    model = small_hooked().model if name == "hooked" else architectures.BRIDGES[name]()
    others = {"gpt2": "blocks.1.mlp.hook_in", "hooked": "blocks.1.ln2.hook_normalized"}
    more = [sae for sae in dictionaries(others[name]) if sae.cfg.metadata.hook_name not in SHARED] if name in others else []
    flat = [standard(hook, seed, **HEADS if hook.endswith("hook_z") else {}) for seed, hook in enumerate(SHARED)]
    return Small(model, [*flat, *more])


def on_two(name: str, saes: str) -> Small:
    """The same with the later blocks on the second device.

    Args:
        saes: where dictionaries are: `"cpu"`; `"own"`, the device of their block; `"other"`; or `"mixed"`, each elsewhere.
    """
    if name == "hooked":
        small = on_one(name)
        where = split_hooked(small.model)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(architectures, "bridge", dispatched)
            small, where = on_one(name), [PLACES[0], PLACES[1], PLACES[1]]
    for number, sae in enumerate(small.saes):
        own = where[int(sae.cfg.metadata.hook_name.split(".")[1])]
        other = PLACES[own == PLACES[0]]
        device = {"cpu": CPU, "own": own, "other": other, "mixed": (CPU, own, other)[number % 3]}[saes]
        place(sae, device)
        sae.device, sae.cfg.device = device, str(device)
    return small


def dispatched(hugging_face: Any) -> Any:
    """A bridge around what accelerate has split: all but the first block, and the head unless it is tied, are elsewhere."""
    hugging_face = hugging_face.double().eval()
    architectures.randomise(hugging_face)
    tied = hugging_face.get_output_embeddings().weight is hugging_face.get_input_embeddings().weight
    second = re.compile(r"(h|layers)\.[12]$|ln_f$|norm$" + ("" if tied else r"|lm_head$|embed_out$"))
    parts = [
        name for name, module in hugging_face.named_modules() if not [*module.children()] or re.search(r"(h|layers)\.\d$", name)
    ]
    inside = re.compile(r"(h|layers)\.\d\.")
    device_map = {name: PLACES[bool(second.search(name))] for name in parts if not inside.search(name)}
    dispatch_model(hugging_face, device_map, main_device=PLACES[0])
    name, config = type(hugging_face).__name__, hugging_face.config
    made = build_bridge_from_module(hugging_face, name, hf_config=config, tokenizer=None, device=str(PLACES[0]))
    made.cfg.n_devices = 2
    assert {parameter.device for parameter in made.parameters()} == {*PLACES}
    return made


def split_hooked(model: Any) -> list[torch.device]:
    """As TransformerLens' forward pass expects it."""
    model.cfg.device, model.cfg.n_devices = str(PLACES[0]), 2
    where = [get_device_for_block_index(layer, model.cfg) for layer in range(3)]
    assert where == [PLACES[0], PLACES[0], PLACES[1]]
    for part in (model.embed, model.pos_embed):
        place(part, where[0])
    for part, device in zip([*model.blocks, model.ln_final, model.unembed], [*where, where[-1], where[-1]], strict=True):
        place(part, device)
    return where


def pairs_of(small: Small, n: int = 1) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[:n], small.corrupted[:n], small.correct[:n], small.wrong[:n])


def feature(hook: str, index: int) -> fp.Node:
    return fp.Node(hook, "feature", index, "all", hook)


SENDERS = [*(feature(hook, index) for hook in (SHARED[0], SHARED[4], SHARED[5]) for index in range(2, 5)), fp.Node(SHARED[0], "error", None, "all", SHARED[0]),
           fp.Node("blocks.0.attn.hook_z", "head", 1), fp.Node("blocks.1.hook_mlp_out", "activation")]  # fmt: skip
RECEIVERS = [*(feature(SHARED[3], index) for index in range(2, 5)), fp.Node("blocks.2.attn.hook_q", "head", 2),
             fp.Node("blocks.1.attn.hook_k", "head", 1), fp.Node("blocks.2.hook_mlp_out", "activation"), fp.LOGITS]  # fmt: skip
NODES = [node for node in (*SENDERS, *RECEIVERS[:3]) if node.site != SHARED[4] or node.kind != "feature"]
"""Of one site either features or heads."""
INSIDE = ["z", "q", "k", "v", "pattern", "mlp_out", "resid_pre", "resid_post", "neurons"]
QUIET = {"progress": False}


def named(small: Small) -> list[Any]:
    """Those of the hooks above that are there."""
    return [sae for sae in small.saes if sae.cfg.metadata.hook_name in {node.site for node in (*SENDERS, *RECEIVERS)}]


def circuit(small: Small, **options: Any) -> Any:
    found = fp.find_circuit(small.model, pairs_of(small), **options, **QUIET)
    return [str(item) for item in found.items], found.scores, found.faithfulness


def by_hand(small: Small) -> Any:
    """Logits within `do`, added and set, at two sites."""
    patch = fp.Patch(
        (feature(SHARED[3], 2), fp.Node(SHARED[3], "error"), fp.Node("blocks.1.hook_mlp_out", "activation", None, 3))
    )
    made, device = [], wrap(small.model).device
    tokens = {"source": small.clean, "base": small.corrupted}
    for options in ({**tokens, "how": "add"}, {"source": small.clean, "how": "set"}):
        saes = [sae for sae in small.saes if sae.cfg.metadata.hook_name == SHARED[3]]
        with torch.no_grad(), fp.do(small.model, patch, saes=saes, **options):
            made.append(small.model(small.corrupted.to(device)).cpu())
    return torch.stack(made)


def slow(small: Small) -> Any:
    """Sites inside an MLP, through the model's own forward pass."""
    with pytest.warns(fp.SlowPathWarning, match="inside a layer"):
        return fp.rank_features(
            small.model, fp.dictionaries.identity(small.model, "blocks.1.mlp.hook_post"), pairs_of(small), **QUIET
        )


TASKS: dict[str, Callable[[Small], Any]] = {
    "features": lambda s: fp.rank_features(s.model, s.saes, pairs_of(s), positions=[3], **QUIET),
    "features, neg_kl": lambda s: fp.rank_features(s.model, s.saes[-1], pairs_of(s), metric=["logit_diff", "neg_kl"], **QUIET),
    "features, slow": slow,
    "components": lambda s: fp.rank_components(s.model, pairs_of(s), sites=INSIDE, layers=[0, 1], **QUIET),
    "estimates": lambda s: fp.rank_features(s.model, s.saes, pairs_of(s, 2), method="atp", positions=[3, 5], **QUIET),
    "integrated": lambda s: fp.rank_features(s.model, s.saes[:3], pairs_of(s), method=fp.Gradients(s.model, pairs_of(s), method="ig", steps=1), **QUIET),
    "estimates of components": lambda s: fp.rank_components(s.model, pairs_of(s), method="atp", sites=INSIDE, layers=[0, 1], **QUIET),
    "paths": lambda s: fp.rank_paths(s.model, pairs_of(s), saes=named(s), senders=SENDERS, receivers=RECEIVERS, **QUIET),
    "paths through MLPs": lambda s: fp.rank_paths(
        s.model, pairs_of(s), saes=named(s), senders=SENDERS, receivers=RECEIVERS, route="through_mlps", **QUIET),
    "paths along all": lambda s: fp.rank_paths(
        s.model, pairs_of(s), saes=named(s), senders=SENDERS, receivers=RECEIVERS, route="all", **QUIET),
    "estimates of paths along all": lambda s: fp.rank_paths(
        s.model, pairs_of(s), method="atp", saes=named(s), senders=SENDERS, receivers=RECEIVERS, route="all", **QUIET),
    "estimates of paths": lambda s: fp.rank_paths(s.model, pairs_of(s), method="atp", saes=named(s), senders=SENDERS, receivers=RECEIVERS, **QUIET),
    "estimates of paths through MLPs": lambda s: fp.rank_paths(s.model, pairs_of(s), method="atp", saes=named(s), senders=SENDERS, receivers=RECEIVERS, route="through_mlps", **QUIET),
    "nodes": lambda s: circuit(s, saes=named(s), nodes=NODES, size=12, errors="nodes"),
    "edges": lambda s: circuit(s, over="edges", size=20),
    "edges, estimated": lambda s: circuit(s, over="edges", size=20, scores="estimate"),
    "edges of features": lambda s: circuit(
        s, over="edges", saes=named(s), nodes=[*SENDERS[:3], *RECEIVERS[:3]], size=20, scores="estimate", errors="nodes"),
    "ablated": lambda s: fp.ablate(s.model, pairs_of(s, 2), saes=s.saes[:2], sites=["z", "mlp_out"], to="mean", **QUIET),
    "resampled": lambda s: fp.ablate(s.model, pairs_of(s, 2), saes=s.saes, to="resample", **QUIET),
    "by hand": by_hand,
}  # fmt: skip


VARIANTS = {
    "features, neg_kl", "integrated", "paths through MLPs", "estimates of paths through MLPs", "edges",
    "edges, estimated", "resampled", "dropped", "inputs", "controls", "neurons", "principal components",
    "estimates of components", "nodes", "noise", "cumulative", "paths along all", "estimates of paths along all",
    "estimates of paths", "ablated",
}  # fmt: skip
"""What differs little from another task: extended."""


def tiers(tasks: Any, variants: Any = VARIANTS) -> list[Any]:
    return [pytest.param(task, marks=pytest.mark.extended) if task in variants else task for task in tasks]


@cache
def expected(name: str, task: str) -> Any:
    """What a task gives without a second device, and without pretending."""
    with _disable_current_modes():
        return {**TASKS, **OTHERS}[task](on_one(name))


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, fp.Effects):
        assert found.nodes == wanted.nodes
        assert len(found)
        for name in ("row", "pair", "clean", "corrupted", "denoised", "noised"):
            same(getattr(found, name), getattr(wanted, name))
    elif isinstance(wanted, (tuple, list)) and not isinstance(wanted[0], str):
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, list):
        assert found == wanted
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=EXACT)


@pytest.mark.parametrize("task", tiers(TASKS))
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "hooked"])
def test_a_model_on_two_devices(name: str, task: str) -> None:
    """Warnings are errors: all but sites inside an MLP take the fast path."""
    same(TASKS[task](on_two(name, "mixed")), expected(name, task))


@pytest.mark.parametrize(
    "task",
    tiers(
        ["features", "estimates", "paths", "estimates of paths", "nodes", "edges of features", "by hand"],
        ["paths", "estimates of paths", "nodes", "edges of features"],
    ),
)
@pytest.mark.parametrize("saes", ["cpu", "other"])
def test_dictionaries_anywhere(saes: str, task: str) -> None:
    same(TASKS[task](on_two("gpt2", saes)), expected("gpt2", task))


OTHERS: dict[str, Callable[[Small], Any]] = {
    "check": lambda s: [fit.explained_variance for fit in fp.check(s.model, s.saes, pairs_of(s, 2)).fits],
    "diagnose": lambda s: fp.diagnose(s.model, named(s), pairs_of(s, 2), SENDERS[:4]).select_dtypes("float"),
    "interactions": lambda s: fp.interactions(
        s.model, s.saes[1], pairs_of(s), top=3, **QUIET).select_dtypes("float"),
    "cumulative": lambda s: fp.top_k_curve(s.model, s.saes[2], pairs_of(s), most=3, **QUIET).table().select_dtypes("float"),
    "controls": lambda s: fp.random_controls(s.model, s.saes[1], pairs_of(s), feature=3, n=5, **QUIET).random,
    "dropped": lambda s: fp.rank_features(s.model, s.saes[:3], pairs_of(s), method="grad_drop", **QUIET),
    "inputs": lambda s: fp.rank_features(s.model, s.saes[:3], pairs_of(s), method=fp.Gradients(s.model, pairs_of(s), method="eap_ig_inputs", steps=2), **QUIET),
    "noise": lambda s: fp.rank_features(s.model, s.saes[1], pairs_of(s), noise=fp.Noise([3]), **QUIET),
    "neurons": lambda s: fp.rank_features(s.model, fp.dictionaries.neurons(s.model, 1), pairs_of(s), **QUIET),
    "principal components": lambda s: fp.rank_features(
        s.model, fp.dictionaries.pca(s.model, SHARED[1], pairs_of(s, 2), components=3), pairs_of(s), **QUIET),
    "scrub": lambda s: fp.scrub(s.model, pairs_of(s, 2), fp.Hypothesis({
        fp.LOGITS: {fp.Node("blocks.2.hook_mlp_out", "activation"): len},
        fp.Node("blocks.2.hook_mlp_out", "activation"): {fp.Node("blocks.1.attn.hook_z", "head", 1): len},
        fp.Node("blocks.1.attn.hook_v", "head", 1): {fp.Node("blocks.0.attn.hook_z", "head", 1): len},
    }), draws=1).values,
}  # fmt: skip


@pytest.mark.parametrize("task", tiers(OTHERS))
def test_other_tools(task: str) -> None:
    same(OTHERS[task](on_two("gpt2", "mixed")), expected("gpt2", task))


def test_the_fullest_device_decides_how_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model lay on that one alone."""
    lens = wrap(on_two("gpt2", "own").model)
    assert lens.devices == {*PLACES}
    memory = {PLACES[0]: 2**40, PLACES[1]: 2**20}
    monkeypatch.setattr(budget, "free_memory", memory.get)
    expected_rows = int(budget.SHARE * 2**20) // budget.row_bytes(lens, 7, 2)
    assert budget.row_budget(lens, 7, 2) == expected_rows < budget.LEAST
    memory[PLACES[0]], memory[PLACES[1]] = memory[PLACES[1]], memory[PLACES[0]]
    assert budget.row_budget(lens, 7, 2) == expected_rows
