"""Sweeps, checks and estimates where matrix products round float32 to TF32, as those of a GPU do if PyTorch allows it.

The rounding is done by hand here, because a CPU has no TF32. Products with a single row or column are not rounded, as on a GPU,
where they are other functions; so rows that are computed together differ from rows that are computed alone.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from architectures import BRIDGES, VOCAB
from test_architectures import narrowed, oracle_value, pairs
from test_graphs import transcoders
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import featpatch as fp
from featpatch.model.layer import product_rounding
from featpatch.model.projections import attention_outputs, projections_of
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Products, and the index of their first factor."""
BITS = 13
"""The number of bits of a float32's mantissa that TF32 leaves out."""

Found = TypeVar("Found")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest number of TF32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (BITS - 1))) >> BITS << BITS).view(torch.float32)


class Rounding(TorchDispatchMode):
    """Products whose factors are rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func)
        if (
            first is not None
            and args[first].dtype == torch.float32
            and 1 not in (args[first].shape[-2], args[first + 1].shape[-1])
        ):
            args = (*args[:first], *map(rounded, args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def products() -> Iterator[Rounding]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Rounding() as mode:
            yield mode
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_rounding(products: Rounding) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = x @ torch.eye(64)
    assert 2**-13 < ((found - x) / x).abs().max() <= 2**-11
    assert torch.equal(found @ torch.eye(64), found)
    assert torch.equal(x[:1] @ torch.eye(64), x[:1])
    assert torch.equal(torch.nn.functional.linear(x, torch.eye(64)), found)


@pytest.mark.parametrize(("kind", "name"), [("bridge", "gpt2"), ("bridge", "gemma2"), ("bridge", "llama"), ("hooked", "gpt2")])
@torch.no_grad()
def test_sweeps(kind: str, name: str) -> None:
    """Warnings are errors: the fast path is taken. What is left is the rounding of products."""
    model, saes = narrowed(kind, name, torch.float32)
    drawn = pairs(VOCAB)
    effects = fp.rank_features(model, saes, drawn, progress=False)
    at = {sae.cfg.metadata.hook_name: sae for sae in saes}
    largest = max(float(model(torch.tensor([pair.clean])).abs().max()) for pair in drawn)
    for entry in range(0, len(effects.row), len(effects.row) // 16):
        node, pair = effects.nodes[effects.row[entry]], drawn[int(effects.pair[entry])]
        expected = oracle_value(model, at[node.site], node, pair, "denoising")
        assert abs(effects.denoised[entry] - expected) < 2**-7 * largest, node


def test_dictionaries_are_linear() -> None:
    """And their directions are rows of the weights, which are not rounded, up to one factor."""
    model, saes = narrowed("bridge", "gpt2", torch.float32)
    for dictionary in dictionaries(wrap(model), saes):
        assert dictionary.behaviour.linear, dictionary.name
        features = torch.arange(min(16, dictionary.d_sae))
        weights = dictionary.codec.rows(features)
        assert weights is not None
        ratios = dictionary.directions(features) / weights
        torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios), rtol=1e-6, atol=0)
        assert abs(ratios.mean() - 1) < 2**-9


@pytest.mark.parametrize("setting", ["high", "medium", "backend", "highest"])
def test_the_rounding_that_is_expected(setting: str) -> None:
    """Also where it was allowed for one backend alone."""
    if setting == "backend":
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            pytest.skip("this PyTorch has no setting for one backend alone")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(setting)
    found = [product_rounding(dtype, 80) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert found == [80 * 2**-52, {"highest": 80 * 2**-23, "medium": 2**-4}.get(setting, 2**-7), 2**-4]


def with_and_without(run: Callable[[], Found]) -> tuple[Found, Found]:
    """The result with rounded products, and that with the products of float32."""
    with _disable_current_modes():
        torch.set_float32_matmul_precision("highest")
        plain = run()
    torch.set_float32_matmul_precision("high")
    return run(), plain


def same(found: fp.Effects, plain: fp.Effects) -> None:
    """Check that two tables have nearly the same entries, and nearly the same metrics in those that both have."""
    for way in ("denoised", "noised"):
        one, other = (
            {
                (table.nodes[row], pair): value
                for row, pair, value in zip(table.row, table.pair, getattr(table, way), strict=True)
            }
            for table in (found, plain)
        )
        both = one.keys() & other.keys()
        assert len(both) > 0.98 * len(one.keys() | other.keys()), "a feature near its threshold may be active in one alone"
        assert max(abs(one[entry] - other[entry]) for entry in both) < 2**-7 * max(map(abs, other.values()))


def test_estimates() -> None:
    model, saes = narrowed("bridge", "gpt2", torch.float32)
    same(*with_and_without(lambda: fp.rank_features(model, saes, pairs(VOCAB), method="atp", progress=False)))
    same(*with_and_without(lambda: fp.rank_components(model, pairs(VOCAB), method="atp", progress=False)))


@pytest.mark.parametrize(("kind", "name"), [("bridge", "gpt2"), ("bridge", "gemma2"), ("bridge", "llama"), ("hooked", "gpt2")])
def test_layers_are_recognised(kind: str, name: str) -> None:
    """What is computed per head is compared with the model's own values of all heads together."""
    lens = wrap(narrowed(kind, name, torch.float32)[0])
    tokens = torch.tensor([pairs(VOCAB)[0].clean])
    assert lens.causal
    assert all(output is not None for output in attention_outputs(lens, tokens))
    assert projections_of(lens, tokens) is not None


def test_components_and_circuits() -> None:
    model, _ = narrowed("bridge", "gpt2", torch.float32)
    drawn = pairs(VOCAB)[:1]
    same(*with_and_without(lambda: fp.rank_components(model, drawn, sites=["z", "q", "pattern", "mlp_out"], progress=False)))
    circuit, plain = with_and_without(
        lambda: fp.find_circuit(model, drawn, over="edges", scores="estimate", size=5, progress=False)
    )
    assert circuit.items == plain.items
    one, other = (each.scores * (each.graph.whole - each.graph.empty).mean() for each in (circuit, plain))  # the gap is small
    assert abs(one - other).max() < 2**-6 * abs(other).max()


def test_graphs() -> None:
    model = BRIDGES["gpt2"]()
    given = [sae.float() for sae in transcoders(model)]
    for sae in given:
        sae.cfg.dtype, sae.dtype = "float32", torch.float32
    model = model.to(torch.float32)
    model.cfg.dtype = torch.float32
    graph, plain = with_and_without(
        lambda: fp.attribution_graph(model, given, pairs(VOCAB)[0].clean, targets=[3, 7], progress=False)
    )
    assert graph.nodes == plain.nodes
    assert abs(graph.adjacency - plain.adjacency).max() < 2**-7 * abs(plain.adjacency).max()


def test_checks() -> None:
    """Rounding is not taken for a bug."""
    model, saes = narrowed("bridge", "gpt2", torch.float32)
    for fit in fp.check(model, saes, pairs(VOCAB)).fits:
        assert "bug" not in str(fit.misfit)
