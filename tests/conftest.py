"""Shapes in annotations are checked while the tests run; all models here are small, random and float64."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("featpatch", "typechecker.check")

import pytest
import torch
from small import Small, small_bridge, small_hooked

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["bridge", "hooked"])
def small(request: pytest.FixtureRequest) -> Small:
    """The same kind of small random transformer behind each of TransformerLens' two classes."""
    return small_bridge() if request.param == "bridge" else small_hooked()


@pytest.fixture(scope="session")
def bridge() -> Small:
    return small_bridge()
