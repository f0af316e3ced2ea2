"""Arguments that the chosen method has no use for are refused, as is what is of the wrong kind; NumPy's numbers are accepted."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
from commands import run
from small import Small, small_bridge

import featpatch as fp
from featpatch.cli.options import MetricNames
from featpatch.effects.audit import audited
from featpatch.metrics import MEASURES, SEQUENCES

SITE = "blocks.1.hook_resid_pre"
HEAD = fp.Node("blocks.0.attn.hook_z", "head", 0)
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def small() -> Small:
    return small_bridge()


@pytest.fixture(scope="module")
def pairs(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


@pytest.fixture(scope="module")
def effects(small: Small, pairs: fp.Pairs) -> fp.Effects:
    return fp.rank_features(small.model, small.at(SITE), pairs, positions=[3], **QUIET)


Call = Callable[[Small, fp.Pairs, fp.Effects, Path], Any]


def paths(**changed: Any) -> Call:
    options: dict[str, Any] = {"senders": [HEAD], "receivers": ["logits"], **QUIET, **changed}
    return lambda small, pairs, effects, path: fp.rank_paths(small.model, pairs, **options)


def ablated(**options: Any) -> Call:
    return lambda small, pairs, effects, path: fp.ablate(small.model, pairs, sites="z", **options, **QUIET)


def reported(**options: Any) -> Call:
    return lambda small, pairs, effects, path: fp.report(effects, path, **options)


REFUSED: dict[str, tuple[Call, str]] = {
    "Gradients steps": (
        lambda s, pairs, e, p: fp.Gradients(s.model, pairs, steps=3),
        "steps=3 with method='atp': expected steps only with method='ig' or 'eap_ig_inputs'",
    ),
    "Gradients keep": (lambda s, pairs, e, p: fp.Gradients(s.model, pairs, keep="no"), "keep is of type str: expected bool"),
    "Gradients two": (
        lambda s, pairs, e, p: fp.Gradients(s.model, pairs, metric=["prob", "log_prob"]),
        "metric=['prob', 'log_prob']: expected one name or one function; call this once for each metric",
    ),
    "Gradients of another metric": (
        lambda s, pairs, e, p: fp.rank_features(
            s.model, s.at(SITE), pairs, metric="logit_diff", method=fp.Gradients(s.model, pairs, metric="prob"), **QUIET
        ),
        "metric='logit_diff' with gradients of 'prob': expected the same metric",
    ),
    "Gradients and two metrics": (
        lambda s, pairs, e, p: fp.rank_features(
            s.model, s.at(SITE), pairs, metric=["prob", "log_prob"], method=fp.Gradients(s.model, pairs, metric="prob"), **QUIET
        ),
        "metric=['prob', 'log_prob']: expected one name or one function",
    ),
    "Screen method": (lambda *_: fp.Screen(method="shap"), "method='shap': expected one of atp, ig, eap_ig_inputs, grad_drop"),
    "Screen bool": (lambda *_: fp.Screen(k=True), "k=True: expected an integer"),
    "paths sender": (paths(senders=["logits"]), "'logits' is among the senders: expected it only among the receivers"),
    "paths estimated sender": (
        paths(senders=["logits"], method="atp"),
        "'logits' is among the senders: expected it only among the receivers",
    ),
    "paths route": (paths(route=np.array(["direct", "x"])), "expected one of direct, through_mlps"),
    "paths screen": (paths(screen=np.array(["auto", "x"])), "expected 'auto', None or an fp.Screen"),
    "paths executor": (paths(executor=np.array(["ray", "x"])), "expected 'serial', 'ray', or an object"),
    "paths metric": (paths(metric=3.5), "metric=3.5: expected at least one metric"),
    "ablate seed": (ablated(seed=3), "to='mean' with seed=3: expected a seed only with to='resample'"),
    "ablate seed kind": (ablated(to="resample", seed="x"), "seed='x': expected an integer"),
    "ablate reference": (
        lambda s, pairs, e, p: fp.ablate(s.model, pairs, sites="z", to="zero", reference=pairs, **QUIET),
        "to='zero' with reference: expected no prompts",
    ),
    "interactions": (
        lambda s, pairs, e, p: fp.interactions(s.model, s.at(SITE), pairs, features=[1, 2], top=3, **QUIET),
        "top=3 with features: expected only one of them",
    ),
    "verify tolerance": (
        lambda s, pairs, e, p: fp.verify(e, s.model, pairs, saes=s.at(SITE), tolerance="much", **QUIET),
        "tolerance='much': expected a number, 0 or more",
    ),
    "report components": (
        lambda s, pairs, e, p: fp.report(e, p, components=e),
        "components is a table with rows of kind all_features, error, feature",
    ),
    "report question": (reported(question=3), "question is of type int: expected str"),
    "report top": (reported(top=3), "top=3 without saes"),
    "report estimate": (
        lambda s, pairs, e, p: fp.report(e, p, estimate=e),
        "estimate is a table of exact effects: expected estimates",
    ),
    "report estimates": (
        lambda s, pairs, e, p: fp.report(replace(e, value="estimate"), p, estimate=replace(e, value="estimate")),
        "effects is a table of estimates, and estimate=... is given too: expected exact effects",
    ),
    "load check": (lambda s, *_: fp.load(s.model, check="yes"), "check is of type str: expected bool"),
    "load pairs": (
        lambda s, pairs, e, p: fp.load(s.model, pairs=pairs),
        "pairs with no saes: expected pairs only for the check",
    ),
    "load unchecked": (
        lambda s, pairs, e, p: fp.load(s.model, s.at(SITE), pairs=pairs, check=False),
        "pairs with check=False: expected pairs only for the check",
    ),
    "load pairs kind": (lambda s, pairs, e, p: fp.load(s.model, s.at(SITE), pairs=[]), "expected"),
    "max_activating": (
        lambda s, pairs, e, p: fp.max_activating(s.model, s.at(SITE), e.nodes, ["a text"], contexts=0),
        "contexts=0: expected an integer, 1 or more",
    ),
    "Ray": (lambda *_: fp.Ray(cpus=float("nan")), "cpus=nan: expected a number for each worker"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(small: Small, pairs: fp.Pairs, effects: fp.Effects, tmp_path: Path, name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(fp.FeatpatchError, match=re.escape(message)):
        call(small, pairs, effects, tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_numbers_of_numpy(small: Small, pairs: fp.Pairs, effects: fp.Effects, tmp_path: Path, number: Any) -> None:
    """Exactly what Python's numbers give, also after saving."""
    options: dict[str, Any] = {"positions": [3], **QUIET}
    screens = [fp.Screen(k=kind(3), audit=kind(4), seed=kind(1), top=kind(2)) for kind in (int, number)]
    assert screens[0] == screens[1]
    for name, screen in (("plain", screens[0]), ("numpy", screens[1])):
        fp.rank_features(small.model, small.at(SITE), pairs, screen=screen, **options).save(tmp_path / name)
    saved = [fp.Effects.load(tmp_path / name) for name in ("plain", "numpy")]
    assert saved[0].metadata["screening"] == saved[1].metadata["screening"]
    np.testing.assert_array_equal(saved[0].noised, saved[1].noised)
    node = fp.Node(SITE, "feature", number(3), number(2))
    assert (type(node.index), type(node.position), node) == (int, int, fp.Node(SITE, "feature", 3, 2))
    assert fp.Pair((1, 2), (1, 3), (4,), (5,), answer_position=number(1)).answer_position == 1
    heads = [
        fp.rank_components(
            small.model,
            pairs,
            sites="z",
            layers=[kind(1)],
            batch_rows=np.int64(50) if kind is np.uint8 else kind(50),
            journal=tmp_path / kind.__name__,
            **options,
        )
        for kind in (int, number)
    ]
    np.testing.assert_array_equal(heads[0].denoised, heads[1].denoised)
    drawn = [fp.ablate(small.model, pairs, sites="z", to="resample", seed=kind(3), **options).noised for kind in (int, number)]
    np.testing.assert_array_equal(*drawn)
    features = [int(n) for n in effects.where(kind="feature").indices[:2]]
    two = [fp.interactions(small.model, small.at(SITE), pairs, features=[*map(kind, features)], position=3, progress=False)
           for kind in (int, number)]  # fmt: skip
    assert two[0].equals(two[1].astype(two[0].dtypes))


def test_numbers_of_numpy_in_circuits(small: Small, pairs: fp.Pairs) -> None:
    heads = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(3)]
    options: dict[str, Any] = {"nodes": heads, **QUIET}
    for plain, numpy in (
        ({"size": 2}, {"size": np.int32(2)}),
        ({"size": 2, "scores": "eap_ig_inputs", "steps": 3}, {"size": 2, "scores": "eap_ig_inputs", "steps": np.int64(3)}),
        ({"threshold": 0.25}, {"threshold": np.float32(0.25)}),
        ({"method": "greedy", "target": 0.5}, {"method": "greedy", "target": np.float32(0.5)}),
    ):
        found = [fp.find_circuit(small.model, pairs, **chosen, **options) for chosen in (plain, numpy)]
        assert found[0].items == found[1].items
        assert [*map(repr, found[0].metadata.values())] == [*map(repr, found[1].metadata.values())]


def test_a_list_of_one_metric(small: Small, pairs: fp.Pairs) -> None:
    """It is that metric, also for estimates and circuits."""
    for metric in ("prob_diff", lambda logits, correct, wrong: logits[:, correct[0]]):
        one, listed = (
            fp.rank_features(small.model, small.at(SITE), pairs, metric=m, method="atp", **QUIET) for m in (metric, [metric])
        )
        np.testing.assert_array_equal(one.denoised, listed.denoised)
        assert one.metrics == listed.metrics
    circuits = [fp.find_circuit(small.model, pairs, nodes=[HEAD], size=1, metric=m, **QUIET) for m in ("prob", ["prob"])]
    assert circuits[0].faithfulness == circuits[1].faithfulness


def test_greedy_keeps_as_many_as_asked(small: Small, pairs: fp.Pairs) -> None:
    """A size replaces the target, over nodes as over edges, even where fewer would reach it."""
    heads = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", n) for layer in range(2) for n in range(3)]
    for size in (1, 4, 6):
        assert len(fp.find_circuit(small.model, pairs, nodes=heads, method="greedy", size=size, **QUIET).items) == size


def test_an_audit_of_everything() -> None:
    """Nothing is left to be confident about."""
    everything = audited(np.ones(3), np.zeros(2), 5, top=np.int64(2), confidence=np.float32(0.5), share=0.05, looks=1)
    assert everything.complete
    assert repr(everything) == "All 5 candidates were patched: none was missed, and the top 2 are exact"
    part = audited(np.ones(3), np.zeros(2), 6, top=2, confidence=0.95, share=0.05, looks=1)
    assert not part.complete
    assert "confidence" in repr(part)


STUDY = ["--model", "./no-such-model", "--sae", "./no-such-sae", "--pairs", "p.jsonl"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["rank", *STUDY, "--method", "atp", "--screen"], "with --screen: expected it only with --method exact"),
        (["rank", *STUDY, "--method", "atp", "--journal", "j"], "with --journal: expected it only with --method exact"),
        (
            ["rank", *STUDY, "--method", "atp", "--metric", "prob", "--metric", "log_prob"],
            "--metric prob --metric log_prob: expected one metric; run",
        ),
        (["rank", *STUDY, "--method", "ig", "--metric", "accuracy"], "not supported for estimates"),
        (["rank", *STUDY, "--screen", "--metric", "accuracy"], "not supported for estimates"),
        (["rank", *STUDY, "--method", "atp", "--metric", "neg_kl"], "zero at the clean run"),
        (["rank", *STUDY, "--screen", "--k", "0"], "--k 0: expected an integer, 1 or more"),
        (["rank", *STUDY, "--metric", "magic"], "--metric magic: expected one of"),
        (["rank", *STUDY, "--positions", '"a'], "expected a comma or the end of the text"),
        (["rank", *STUDY[:-1], "none.jsonl"], "there is no file 'none.jsonl'"),
        (["stream", *STUDY, "--metric", "magic"], "--metric magic: expected one of"),
        (["check", *STUDY[:-1], "none.jsonl"], "there is no file 'none.jsonl'"),
        (["components", *STUDY[:2], *STUDY[4:], "--sites", "zz"], "--sites zz: expected some of"),
        (["plan", *STUDY, "--sites", "z"], "--sites with --sae"),
        (["plan", *STUDY, "--metric", "magic"], "--metric magic: expected one of"),
    ],
)
def test_before_a_model_is_loaded(tmp_path: Path, command: list[str], said: str) -> None:
    """There is no model to load, and the message is about the options."""
    (tmp_path / "p.jsonl").touch()
    done = run(*command, folder=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_the_help_names_every_metric() -> None:
    (option,) = MetricNames.__metadata__
    assert ", ".join((*MEASURES, *SEQUENCES)) in option.help.replace(" or, for answers of several tokens,", ",")
