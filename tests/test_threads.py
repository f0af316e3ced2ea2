"""One model in several threads, and within `fp.do`."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small, small_hooked

import featpatch as fp
from featpatch.model.transformer_lens import wrap

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
        lambda: fp.rank_features(small.model, saes, pairs, method="atp", progress=False),
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
    "estimates of features": lambda small, pairs: fp.rank_features(small.model, small.at(SITE), pairs, method="atp"),
    "estimates of components": lambda small, pairs: fp.rank_components(small.model, pairs, method="atp"),
    "ablate": lambda small, pairs: fp.ablate(small.model, pairs),
    "find_circuit": lambda small, pairs: fp.find_circuit(small.model, pairs, over="edges"),
    "interactions": lambda small, pairs: fp.interactions(small.model, small.at(SITE), pairs),
    "cumulative": lambda small, pairs: fp.top_k_curve(small.model, small.at(SITE), pairs),
    "diagnose": lambda small, pairs: fp.diagnose(small.model, small.at(SITE), pairs, WHOLE.nodes),
    "describe": lambda small, pairs: fp.max_activating(small.model, small.at(SITE), nodes=WHOLE.nodes, texts=["a"]),
    "plan": lambda small, pairs: fp.plan(small.model, small.at(SITE), pairs),
    "check": lambda small, pairs: fp.check(small.model, small.at(SITE), pairs),
    "pca": lambda small, pairs: fp.dictionaries.pca(small.model, SITE, pairs, components=2),
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


def elsewhere(call: Callable[[], Any]) -> None:
    """Run something in another thread, from start to end."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def halve(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    return activation * 0.5


OTHERS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "run_with_hooks": lambda model, tokens: model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_pre", halve)]),
    "run_with_cache": lambda model, tokens: model.run_with_cache(tokens),
    "add_hook": lambda model, tokens: model.hook_dict["blocks.2.hook_resid_pre"].add_hook(halve),
    "backward": lambda model, tokens: model.hook_dict["blocks.2.hook_resid_pre"].add_hook(lambda grad, hook: None, dir="bwd"),
}


@pytest.fixture
def unhooked(small: Small) -> Iterator[None]:
    yield
    for point in small.model.hook_dict.values():
        point.remove_hooks("both", including_permanent=True)


@pytest.mark.filterwarnings("ignore:.*hooks attached by you:featpatch.SlowPathWarning")
@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("other", OTHERS)
def test_hooks_of_another_thread_within_a_pass_are_refused(small: Small, other: str, number: int) -> None:
    """In the second pass a hook of the user, which is allowed, starts the other thread and waits for its end."""
    passes, busy = [0], [False]

    def trigger(activation: torch.Tensor, hook: Any) -> None:
        passes[0] += not busy[0]
        if passes[0] == 2 and not busy[0]:
            busy[0] = True
            elsewhere(lambda: OTHERS[other](small.model, small.corrupted))
            busy[0] = False

    pairs = pairs_of(small)
    shorter = fp.Pair(pairs[0].clean[:-1], pairs[0].corrupted[:-1], pairs[0].correct, pairs[0].wrong)
    measure = [*measurements(small), lambda: fp.Pairs((*pairs, shorter)).check(small.model)][number]
    small.model.hook_dict["blocks.0.hook_resid_pre"].add_hook(trigger)
    with pytest.raises(fp.FeatpatchError, match="another thread attached hooks to the model or removed them"):
        measure()
    assert passes[0] == 2


@pytest.mark.usefixtures("unhooked")
def test_hooks_that_another_thread_leaves_between_two_passes_are_refused(small: Small) -> None:
    """The metric starts the other thread; the table without that is the oracle of the call after."""
    armed = [False]

    def metric(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if armed.pop():
            elsewhere(lambda: OTHERS["add_hook"](small.model, small.clean))
        armed.append(False)
        return logits[:, 3]

    def measure() -> fp.Effects:
        return fp.rank_components(small.model, pairs_of(small), sites=["v"], metric=metric, progress=False)

    before = measure()
    armed[:] = [True]
    with pytest.raises(fp.FeatpatchError, match="another thread attached hooks to the model or removed them"):
        measure()
    small.model.reset_hooks()
    armed[:] = [False]
    np.testing.assert_array_equal(measure().denoised, before.denoised)


def test_another_thread_may_hook_another_model(small: Small) -> None:
    other = small_hooked()
    expected = fp.rank_components(small.model, pairs_of(small), sites=["v"], progress=False)
    done = Event()

    def calls() -> None:
        while not done.is_set():
            OTHERS["run_with_hooks"](other.model, other.clean)

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(calls)
        try:
            found = fp.rank_components(small.model, pairs_of(small), sites=["v"], progress=False)
        finally:
            done.set()
        beside.result()
    np.testing.assert_array_equal(found.denoised, expected.denoised)


@pytest.mark.usefixtures("unhooked")
def test_gradients_that_are_kept_follow_the_hooks_of_the_user(small: Small) -> None:
    """Hooks attached between two calls are no hooks of another thread; the oracle is a `Gradients` made anew."""
    pairs = pairs_of(small)
    kept = fp.Gradients(small.model, pairs)
    estimate = partial(fp.rank_components, small.model, pairs, method="atp", sites=["v"], progress=False)
    estimate(method=kept)
    small.model.hook_dict["blocks.0.hook_resid_pre"].add_hook(halve)
    np.testing.assert_array_equal(estimate(method=kept).denoised, estimate().denoised)


def test_a_hook_of_ours_is_never_seen_as_one_of_the_user(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the two moments at which it is attached and not yet, or no longer, known."""
    seen: list[Any] = []
    point = small.model.hook_dict[SITE]
    lens, add = wrap(small.model), point.add_hook

    with ThreadPoolExecutor(1) as pool:

        def adding(*args: Any, **options: Any) -> None:
            add(*args, **options)
            seen.append(pool.submit(lambda: lens.hooked))
            wait(seen, timeout=0.05)

        monkeypatch.setattr(point, "add_hook", adding)
        with lens.edit(SITE, lambda activation: None):
            assert not lens.hooked
        assert [future.result() for future in seen] == [False]
    assert not point.fwd_hooks
    assert not point._forward_hooks


def test_a_journal_is_open_in_one_thread(bridge: Small, tmp_path: Path) -> None:
    """The metric of the first sweep starts the second one; afterwards another thread may resume."""
    journal, refusals = tmp_path / "sweep.journal", []

    def metric(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if journal.exists() and not refusals:
            refusals.append(None)
            with pytest.raises(
                fp.FeatpatchError, match=r"sweep\.journal' is in use by another process or thread: expected only one"
            ):
                elsewhere(measure)
            raise ValueError("stop here")
        return logits[:, 3]

    def measure() -> fp.Effects:
        return fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge), metric=metric, journal=journal, progress=False)

    with pytest.raises(fp.FeatpatchError, match="stop here"):
        measure()
    assert refusals == [None]
    elsewhere(measure)
