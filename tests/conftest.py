"""Shapes in annotations are checked while the tests run; all models here are small, random and float64.

There are two tiers. `pytest` runs a diagonal of every test that is parametrized over several things, in which every value of each
occurs, and few random examples of every property. A test that is parametrized over TransformerLens' two classes alone runs on one
of them, which differs from test to test, unless it is marked `both`. `make extended` also runs the other combinations and the tests
that are marked `extended` because they are slow, and draws more examples.
"""

import gc
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two tests run side by side
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets: printed tables have their full width
os.environ |= {"RAY_worker_niceness": "0"}  # by default Ray's workers wait for whatever else the machine does

gc.disable()  # until all is imported: nothing of it is garbage, and looking costs a fifth of the start

import jaxtyping
import typechecker

jaxtyping.jaxtyped = typechecker.checked
jaxtyping.install_import_hook("featpatch", "typechecker.check")

import drawn
import pytest

if TYPE_CHECKING:
    from small import Small  # imports torch and TransformerLens, which the process that only hands out tests does without

CLASSES = ("bridge", "hooked")
"""TransformerLens' two classes of models, as the fixture `small` names them."""


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not extended":
        drawn.default = drawn.FEW


def pytest_collection_finish() -> None:
    """Let the garbage collector never look at what libraries and test modules have made."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as extended what is not on the diagonal of its test."""
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("extended"):
            continue
        of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, cases in of_test.items():
        model = CLASSES[zlib.crc32(test.encode()) % 2]
        cases.sort(key=lambda item: parameters(item).get("small", model) != model)
        if parameters(cases[0]).keys() == {"small"} and not cases[0].get_closest_marker("both"):
            kept = {0}
        else:
            kept = diagonal([{(name, id(value)) for name, value in parameters(item).items()} for item in cases])
        for number, item in enumerate(cases):
            if number not in kept:
                item.add_marker("extended")


def parameters(item: pytest.Item) -> dict[str, Any]:
    """What a test is parametrized with."""
    return item.callspec.params if hasattr(item, "callspec") else {"": None}


def diagonal(cases: list[set[tuple[str, int]]]) -> set[int]:
    """Numbers of a few cases in which every value occurs: always the case that adds the most values, the first of equals."""
    missing, kept = set().union(*cases), set[int]()
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(missing & cases[number]), -number))
        kept.add(best)
        missing -= cases[best]
    return kept


@pytest.fixture(scope="session", params=CLASSES)
def small(request: pytest.FixtureRequest) -> "Small":
    """The same kind of small random transformer behind each of TransformerLens' two classes."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def bridge() -> "Small":
    from small import small_bridge

    return small_bridge()


@pytest.fixture(scope="session")
def hooked() -> "Small":
    from small import small_hooked

    return small_hooked()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hugging Face computes norms and softmax of a float64 model in float32; here it stays in float64, so that 1e-10 means something."""
    import torch
    import torch.nn.functional as F

    to, softmax, narrow = torch.Tensor.to, F.softmax, torch.Tensor.float

    def keep_wide(self: "torch.Tensor", *args: Any, **options: Any) -> "torch.Tensor":
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
