"""Shapes in annotations are checked while the tests run; all models here are small, random and float64."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: two tests run side by side
os.environ |= {"RAY_worker_niceness": "0"}  # by default Ray's workers wait for whatever else the machine does

from jaxtyping import install_import_hook

install_import_hook("featpatch", "typechecker.check")

import pytest
import torch
import torch.nn.functional as F
from small import Small, small_bridge, small_hooked

torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["bridge", "hooked"])
def small(request: pytest.FixtureRequest) -> Small:
    """The same kind of small random transformer behind each of TransformerLens' two classes."""
    return small_bridge() if request.param == "bridge" else small_hooked()


@pytest.fixture(scope="session")
def bridge() -> Small:
    return small_bridge()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hugging Face computes norms and softmax of a float64 model in float32; here it stays in float64, so that 1e-10 means something."""
    to, softmax, narrow = torch.Tensor.to, F.softmax, torch.Tensor.float

    def keep_wide(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        wanted = options.get("dtype", args[0] if args else None)
        return self if self.dtype == torch.float64 and wanted == torch.float32 else to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", keep_wide)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else narrow(self))
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, dtype=None, **o: softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype),
    )
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, which notes what it is asked for and what goes wrong."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("there is no chromedriver: install Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield running
    finally:
        running.quit()
