"""Predictions from sizes against counted operations, and sizes against public numbers of parameters."""

from typing import Any

import pytest
import torch
from sizes import SHAPES, Device, Shape, predict
from small import Small, standard

import featpatch as fp

PARAMETERS = {"gpt2-small": 124e6, "pythia-1.4b": 1.31e9, "gemma-2-2b": 2.61e9, "gemma-2-9b": 9.24e9, "gemma-2-27b": 27.2e9,
              "llama-3-8b": 7.5e9}  # fmt: skip
"""Embedding counted once; Llama 3 8B and Pythia have as much again, apart, for the unembedding."""


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_those_of_the_models(name: str) -> None:
    assert SHAPES[name].parameters == pytest.approx(PARAMETERS[name], rel=0.02)


def test_operations_are_those_that_are_counted(small: Small) -> None:
    """Of patches that all begin at the only position that differs, with the same number of them."""
    clean = torch.cat([small.clean[:, :6], small.clean[:, :1]], 1)
    corrupted = clean.clone()
    corrupted[:, 6] = (clean[:, 6] + 5) % 40
    pairs = fp.Pairs.from_tokens(clean, corrupted, small.correct, small.wrong)
    found = fp.plan(small.model, standard("blocks.1.hook_resid_pre", 3), pairs)
    shape = Shape(3, 16, 4, 4, 4, 32, 40)
    expected = predict(shape, features=24, pairs=3, active=8, tokens=7, changed=1, layers=1)
    assert found.flops / found.patches == pytest.approx(expected.flops / expected.patches, rel=0.01)


def test_what_grows_with_what() -> None:
    one = predict("gemma-2-2b", features=2**14, pairs=10, device="h100")
    more: dict[str, tuple[dict[str, Any], float]] = {
        "pairs": ({"pairs": 20}, 2.0), "directions": ({"directions": 1}, 0.5), "layers": ({"layers": [3, 4]}, 2.0),
        "active": ({"active": 128}, 2.0), "features": ({"features": 100}, 100 / 333),
    }  # fmt: skip
    for changed, factor in more.values():
        options = {"features": 2**14, "pairs": 10, "device": "h100", **changed}
        assert predict("gemma-2-2b", **options).patches == pytest.approx(factor * one.patches, rel=0.01)
    assert predict("gemma-2-2b", features=2**14, pairs=10, layers=0).flops > 1.8 * one.flops
    several = predict("gemma-2-2b", features=2**14, pairs=10, device="h100", workers=4)
    assert one.hours is not None
    assert several.hours == pytest.approx(one.hours / 4)
    own = predict("gemma-2-2b", features=2**14, pairs=10, device=Device({"float32": 67e12 * 0.4}, 1e9), utilisation=1.0)
    assert own.hours == pytest.approx(one.hours)
    assert (one.fits, own.fits, predict("gpt2-small", features=100, pairs=1).fits) == (True, False, None)


def test_bad_sizes() -> None:
    for changed, message in (
        ({"shape": "gpt5"}, "shape='gpt5'"), ({"device": "tpu"}, "device='tpu'"), ({"dtype": "int8"}, "dtype='int8'"),
        ({"utilisation": 0.0}, "utilisation=0.0"), ({"directions": 3}, "directions=3"), ({"layers": [3, 3]}, "each once"),
        ({"device": Device({"bfloat16": 1e12}, 1e9)}, "dtype='float32'"),
        ({"pairs": 0}, "pairs=0"), ({"changed": 30}, "changed=30"), ({"layers": [12]}, r"layers=\[12\]"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            predict(**{"shape": "gpt2-small", "features": 10, "pairs": 1, **changed})
