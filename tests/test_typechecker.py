"""The type checker of these tests refuses what it should."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, jaxtyped
from torch import Tensor
from typechecker import decorate

import featpatch as fp
from featpatch.engine.patches import Deltas


@jaxtyped(typechecker=None)
def product(x: Float[Tensor, "rows width"], y: Float[Tensor, " width"], rows: int | None = None) -> Float[Tensor, " rows"]:
    return (x @ y)[:rows]


def test_an_axis_has_one_size() -> None:
    """In arguments and in what is returned, anew in every call, also of functions within functions."""
    x, y = torch.ones(2, 3), torch.ones(3)

    def inner(x: Float[Tensor, "rows width"], y: Float[Tensor, " width"]) -> Tensor:
        return x @ y

    for function in (product, decorate(inner)):
        assert function(x, y).tolist() == [3, 3]
        assert function(x[:, :2], y[:2]).tolist() == [2, 2]
        with pytest.raises(BeartypeCallHintViolation, match="the size of dimension width is 2"):
            function(x, y[:2])
    with pytest.raises(BeartypeCallHintViolation, match="the size of dimension rows is 1"):
        product(x, y, 1)


def test_the_package_is_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="Node.*site=3"):
        fp.Node(3, "feature")  # type: ignore[arg-type]
    one, two = torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    with pytest.raises(BeartypeCallHintViolation, match="Deltas.*the size of dimension"):
        Deltas(patches=1, patch=one, position=two, direction=one, coefficient=torch.ones(1), directions=torch.ones(1, 4))
