"""One model in several threads, and within `fp.do`."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small

import featpatch as fp

SITE = "blocks.1.hook_resid_pre"
WHOLE = fp.Patch((fp.Node(SITE, "activation"),))


@pytest.fixture(autouse=True)
def _switching() -> Iterator[None]:
    """Threads take turns fifty times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def measurements(small: Small) -> list[Callable[[], fp.Effects]]:
    """Features by our own pass, two kinds of patches by the model's own pass, and gradients."""
    saes, pairs = [small.at(SITE), small.at("blocks.1.attn.hook_z"), small.saes[6]], pairs_of(small)
    return [
        lambda: fp.rank_features(small.model, saes, pairs, progress=False),
        lambda: fp.rank_components(small.model, pairs, sites=["q", "v"], progress=False),
        lambda: fp.estimate_features(small.model, saes, pairs, progress=False),
    ]


def test_threads_that_measure_one_model_do_not_disturb_each_other(small: Small) -> None:
    """Nor a plain call beside them; the oracle is the same calls one after another."""
    alone = [measure() for measure in measurements(small)]
    with torch.no_grad():
        plain = small.model(small.clean)
    done = Event()

    def calls() -> int:
        count = 0
        while not done.is_set() or count < 10:
            with torch.no_grad():
                assert torch.equal(small.model(small.clean), plain)
            count += 1
        return count

    with ThreadPoolExecutor(7) as pool:
        beside = pool.submit(calls)
        try:
            found = [[pool.submit(measure) for measure in measurements(small)] for _ in range(2)]
            tables = [[future.result() for future in row] for row in found]
        finally:
            done.set()
        assert beside.result() >= 10
    for row in tables:
        for one, expected in zip(row, alone, strict=True):
            assert one.nodes == expected.nodes
            for name in ("denoised", "noised"):
                np.testing.assert_allclose(getattr(one, name), getattr(expected, name), rtol=0, atol=1e-10)
    assert not any(point.fwd_hooks for point in small.model.hook_dict.values())


def test_do_acts_in_its_own_thread(small: Small) -> None:
    """Another thread's calls, and its own `do`, are what they are without; `reset_hooks` there takes nothing away."""
    clean, corrupted = small.clean[:1], small.corrupted[:1]
    logits = oracle.patched_activation_logits(small.model, SITE, corrupted, clean, list(range(7)))[0]
    plain = small.model(corrupted)

    def elsewhere() -> torch.Tensor:
        small.model.reset_hooks()
        fp.rank_features(small.model, small.at(SITE), pairs_of(small), progress=False)
        with fp.do(small.model, WHOLE, source=corrupted, base=corrupted):
            return small.model(corrupted)

    with fp.do(small.model, WHOLE, source=clean, base=corrupted) as firing, ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(elsewhere).result(), plain)
        assert torch.allclose(small.model(corrupted)[0], logits, rtol=0, atol=1e-10)
        assert firing.count == 1


CALLS: dict[str, Callable[[Small, fp.Pairs], Any]] = {
    "rank_features": lambda small, pairs: fp.rank_features(small.model, small.at(SITE), pairs),
    "rank_components": lambda small, pairs: fp.rank_components(small.model, pairs),
    "rank_paths": lambda small, pairs: fp.rank_paths(small.model, pairs, senders=WHOLE.nodes, receivers=[fp.LOGITS]),
    "estimate_features": lambda small, pairs: fp.estimate_features(small.model, small.at(SITE), pairs),
    "estimate_components": lambda small, pairs: fp.estimate_components(small.model, pairs),
    "ablate": lambda small, pairs: fp.ablate(small.model, pairs),
    "find_circuit": lambda small, pairs: fp.find_circuit(small.model, pairs, over="edges"),
    "interactions": lambda small, pairs: fp.interactions(small.model, small.at(SITE), pairs),
    "cumulative": lambda small, pairs: fp.cumulative(small.model, small.at(SITE), pairs),
    "diagnose": lambda small, pairs: fp.diagnose(small.model, small.at(SITE), pairs, WHOLE.nodes),
    "describe": lambda small, pairs: fp.describe(small.model, small.at(SITE), nodes=WHOLE.nodes, texts=["a"]),
    "plan": lambda small, pairs: fp.plan(small.model, small.at(SITE), pairs),
    "check": lambda small, pairs: fp.check(small.model, small.at(SITE), pairs),
    "pca": lambda small, pairs: fp.pca(small.model, SITE, pairs, components=2),
    "Gradients": lambda small, pairs: fp.Gradients(small.model, pairs),
    "Pairs.check": lambda small, pairs: pairs.check(small.model),
    "do": lambda small, pairs: fp.do(small.model, WHOLE, source=small.clean, base=small.corrupted).__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_else_is_measured_within_do(small: Small, name: str) -> None:
    with fp.do(small.model, WHOLE, source=small.clean, base=small.corrupted):
        small.model(small.corrupted)
        with pytest.raises(fp.FeatpatchError, match="the model is patched already: expected an unpatched model"):
            CALLS[name](small, pairs_of(small))
