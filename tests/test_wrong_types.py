"""Arguments of a wrong type or size, to every public function: one FeatpatchError, never another library's traceback."""

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from commands import run
from small import Small, small_bridge, small_hooked
from test_cross import simple_crosscoder

import featpatch as fp
from featpatch.cli.options import spans

SITE = "blocks.1.hook_resid_pre"
NODE, FEATURE = fp.Node(SITE, "activation"), fp.feature(SITE, 3)
WRONG: dict[str, Any] = {
    "None": None, "text": "x", "float": 3.5, "bool": True, "list": [], "huge": 10**30, "huger": 10**400, "negative": -1,
    "long": "y" * 5000, "digits": "9" * 5000, "object": object(), "mapping": {},
}  # fmt: skip


def done(small: Small, **changed: Any) -> None:
    options = {"patch": fp.Patch((NODE,)), "source": small.clean, "base": small.corrupted}
    fp.do(small.model, **(options | changed)).__enter__()


def pair(**changed: Any) -> fp.Pair:
    return fp.Pair(**({"clean": (1, 2), "corrupted": (1, 3), "correct": (4,), "wrong": (5,)} | changed))


def prompted(**options: Any) -> fp.Pairs:
    return fp.Pairs.from_prompts(lambda text: list(map(ord, text)), clean=["ab"], corrupted=["cb"], correct=["d"], **options)


def steered(small: Small, values: Any, **options: Any) -> None:
    with torch.no_grad(), fp.steer(small.model, values, saes=small.at(SITE), **options):
        small.model(small.clean)


def viewed(positions: Any) -> Any:
    graph = fp.diagram.graph([fp.Node(SITE, "activation", None, "end")], [0.1])
    return fp.diagram.viewer_json(graph, tokens=["a", "b"], slug="s", model="m", positions=positions)


REFUSING: dict[str, Callable[[Small, fp.Pairs, fp.Effects, Any], Any]] = {
    "report": lambda small, pairs, effects, x: fp.report(x, "r.html", model=small.model, pairs=pairs),
    "report pairs": lambda small, pairs, effects, x: fp.report(effects, "r.html", model=small.model, pairs=x),
    "report curve": lambda small, pairs, effects, x: fp.report(effects, "r.html", model=small.model, pairs=pairs, curve=x or 1),
    "report circuit": lambda small, pairs, effects, x: fp.report(effects, "r", model=small.model, pairs=pairs, circuit=x or 1),
    "calibrate": lambda small, pairs, effects, x: fp.calibrate(x, effects),
    "Gradients metric": lambda small, pairs, effects, x: fp.Gradients(small.model, pairs, metric=[x]),
    "compare": lambda small, pairs, effects, x: fp.compare(x, effects),
    "compare components": lambda small, pairs, effects, x: fp.compare(effects, x),
    "verify": lambda small, pairs, effects, x: fp.verify(x, small.model, pairs=pairs),
    "rank_features model": lambda small, pairs, effects, x: fp.rank_features(x, small.at(SITE), pairs),
    "rank_features saes": lambda small, pairs, effects, x: fp.rank_features(small.model, x, pairs),
    "rank_features pairs": lambda small, pairs, effects, x: fp.rank_features(small.model, small.at(SITE), x),
    "rank_features directions": lambda small, pairs, effects, x: fp.rank_features(
        small.model, small.at(SITE), pairs, directions=[x]
    ),
    "rank_paths senders": lambda small, pairs, effects, x: fp.rank_paths(small.model, pairs, senders=x, receivers=[NODE]),
    "rank_nodes": lambda small, pairs, effects, x: fp.rank_nodes(small.model, pairs, x),
    "rank_nodes together": lambda small, pairs, effects, x: fp.rank_nodes(
        small.model, pairs, [NODE], together=x if x and x is not True else 1
    ),
    "rank_nodes to": lambda small, pairs, effects, x: fp.rank_nodes(small.model, pairs, [NODE], to=x or "x", seed=[]),
    "rank_nodes directions of an ablation": lambda small, pairs, effects, x: fp.rank_nodes(
        small.model, pairs, [NODE], to="zero", directions=x
    ),
    "Noise": lambda small, pairs, effects, x: fp.Noise(x if isinstance(x, str | int) else [x]),
    "Noise scale": lambda small, pairs, effects, x: fp.Noise([0], x if x not in (3.5, 10**30, 10**400) else -x),
    "Noise seed": lambda small, pairs, effects, x: fp.Noise([0], seed=x),
    "ablate to": lambda small, pairs, effects, x: fp.ablate(
        small.model, pairs, sites="z", layers=[0], to={"blocks.0.attn.hook_z": x}
    ),
    "from_prompts labels": lambda small, pairs, effects, x: prompted(labels=[x] if x != {} else 3),
    "from_prompts filler": lambda small, pairs, effects, x: prompted(
        align="labels", filler=3 if isinstance(x, str) else x or 3
    ),
    "max_activating": lambda small, pairs, effects, x: fp.max_activating(small.model, small.at(SITE), x or [1], ["text"]),
    "direction": lambda small, pairs, effects, x: fp.direction(x, SITE),
    "head": lambda small, pairs, effects, x: fp.head(x if x else None, 0),
    "feature": lambda small, pairs, effects, x: fp.feature(x, 0),
    "feature index": lambda small, pairs, effects, x: fp.feature(SITE, x),
    "do pair": lambda small, pairs, effects, x: done(small, pair=x or 1),
    "scrub": lambda small, pairs, effects, x: fp.scrub(small.model, pairs, x),
    "do patch": lambda small, pairs, effects, x: done(small, patch=x),
    "do source": lambda small, pairs, effects, x: done(small, source=x),
    "do base": lambda small, pairs, effects, x: done(small, base=x),
    "Patch": lambda small, pairs, effects, x: fp.Patch((x,)),
    "Pair clean": lambda small, pairs, effects, x: pair(clean=x),
    "Pair clean holds": lambda small, pairs, effects, x: pair(clean=(x, x) if x != -1 else x),
    "Pair correct": lambda small, pairs, effects, x: pair(correct=x),
    "Pair correct_sequences": lambda small, pairs, effects, x: pair(correct=(), wrong=(), correct_sequences=x),
    "Pair labels": lambda small, pairs, effects, x: pair(labels={"a": x if x != -1 else -9}),
    "Pairs": lambda small, pairs, effects, x: fp.Pairs(x),
    "Pairs holds": lambda small, pairs, effects, x: fp.Pairs((x,)),
    "Pairs.check": lambda small, pairs, effects, x: pairs.check(x),
    "Pairs.drop": lambda small, pairs, effects, x: pairs.drop(x),
    "from_tokens": lambda small, pairs, effects, x: fp.Pairs.from_tokens(x, x, [3], [4]),
    "from_tokens answers": lambda small, pairs, effects, x: fp.Pairs.from_tokens(
        small.clean, small.corrupted, [] if x is None else x, x or [3]
    ),
    "from_prompts": lambda small, pairs, effects, x: fp.Pairs.from_prompts(small.model, clean=x, corrupted=x, correct=x),
    "from_jsonl": lambda small, pairs, effects, x: fp.Pairs.from_jsonl(small.model, x),
    "from_csv": lambda small, pairs, effects, x: fp.Pairs.from_csv(small.model, x),
    "Effects.load": lambda small, pairs, effects, x: fp.Effects.load(x),
    "Stored": lambda small, pairs, effects, x: fp.Stored(x),
    "logit_attribution": lambda small, pairs, effects, x: fp.logit_attribution(x, pairs, progress=False),
    "logit_attribution pairs": lambda small, pairs, effects, x: fp.logit_attribution(small.model, x, progress=False),
    "logit_attribution metric": lambda small, pairs, effects, x: fp.logit_attribution(
        small.model, pairs, metric=x, progress=False
    ),
    "logit_attribution run": lambda small, pairs, effects, x: fp.logit_attribution(small.model, pairs, run=x, progress=False),
    "loss_recovered": lambda small, pairs, effects, x: fp.loss_recovered(x, small.saes[0], pairs, progress=False),
    "loss_recovered texts": lambda small, pairs, effects, x: fp.loss_recovered(small.model, small.saes[0], x, progress=False),
    "pca hook": lambda small, pairs, effects, x: fp.dictionaries.pca(small.model, x, pairs),
    "pca pairs": lambda small, pairs, effects, x: fp.dictionaries.pca(small.model, SITE, x),
    "diagram.graph": lambda small, pairs, effects, x: fp.diagram.graph(x, [0.1]),
    "diagram.graph holds": lambda small, pairs, effects, x: fp.diagram.graph([x], [0.1]),
    "diagram.graph effects": lambda small, pairs, effects, x: fp.diagram.graph([NODE], x),
    "viewer_json positions": lambda small, pairs, effects, x: viewed(x),
    "viewer_json tokens": lambda small, pairs, effects, x: fp.diagram.viewer_json(
        fp.diagram.graph([NODE], [0.1]), tokens=x, slug="s", model="m"
    ),
    "viewer_json label": lambda small, pairs, effects, x: viewed({"end": x}),
    "group_features nodes": lambda small, pairs, effects, x: fp.group_features(small.model, small.at(SITE), pairs, x),
    "group_features of one's own": lambda small, pairs, effects, x: fp.group_features(
        small.model, small.at(SITE), pairs, {"a": x}
    ),
    "group_features labels": lambda small, pairs, effects, x: fp.group_features(
        small.model, small.at(SITE), pairs, [FEATURE], labels=x or {FEATURE: 1}
    ),
    "group_features size": lambda small, pairs, effects, x: fp.group_features(
        small.model, small.at(SITE), pairs, [FEATURE], size=2 if x is None else x
    ),
    "load_labels": lambda small, pairs, effects, x: fp.load_labels(x, small.at(SITE)),
    "steer": lambda small, pairs, effects, x: steered(small, x),
    "steer number": lambda small, pairs, effects, x: steered(small, {FEATURE: "x" if x in (3.5, -1, 10**30) else x}),
    "steer positions": lambda small, pairs, effects, x: steered(small, {FEATURE: 1.0}, positions=x),
    "steer position": lambda small, pairs, effects, x: steered(small, {FEATURE: 1.0}, positions=[50 if x == -1 else x]),
    "steer reference": lambda small, pairs, effects, x: steered(small, {FEATURE: 1.0}, unit="max", reference=x),
    "steer pair": lambda small, pairs, effects, x: steered(small, {FEATURE: 1.0}, pair=x or 1),
    "steer mask": lambda small, pairs, effects, x: steered(small, {FEATURE: 1.0}, attention_mask=1 if x is None else x),
    "dose_response": lambda small, pairs, effects, x: fp.dose_response(small.model, pairs, x, [1.0], saes=small.at(SITE)),
    "dose_response doses": lambda small, pairs, effects, x: fp.dose_response(
        small.model, pairs, [FEATURE], x, saes=small.at(SITE)
    ),
    "attribution_graph prompt": lambda small, pairs, effects, x: fp.attribution_graph(small.model, small.saes[8], x),
    "attribution_graph targets": lambda small, pairs, effects, x: fp.attribution_graph(
        small.model, small.saes[8], [1, 2], targets=[x]
    ),
    "graph_effects": lambda small, pairs, effects, x: fp.graph_effects(small.model, small.saes[8], x),
    "qk_attribution layer": lambda small, pairs, effects, x: fp.qk_attribution(
        small.model, small.at(SITE), [1, 2], x, 0, key=0
    ),
    "qk_attribution key": lambda small, pairs, effects, x: fp.qk_attribution(
        small.model, small.at(SITE), [1, 2], 1, 0, key=50 if x == -1 else x
    ),
    "qk_attribution query": lambda small, pairs, effects, x: fp.qk_attribution(
        small.model, small.at(SITE), [1, 2], 1, 0, query=50 if x == -1 else x, key=0
    ),
    "load_sae": lambda small, pairs, effects, x: fp.load_sae(x if x != "x" else "./x"),
    "load": lambda small, pairs, effects, x: fp.load(x if x != "x" else "./x"),
    "rank_components pattern entries": lambda small, pairs, effects, x: fp.rank_components(
        small.model, pairs, sites="pattern_entry", positions=x
    ),
    "Crosscoder threshold": lambda small, pairs, effects, x: simple_crosscoder(threshold=x or [0.1] * 6),
    "identity hook": lambda small, pairs, effects, x: fp.dictionaries.identity(small_hooked().model, x),
    "neurons layer": lambda small, pairs, effects, x: fp.dictionaries.neurons(small.model, x),
    "stability seed": lambda small, pairs, effects, x: effects.stability("recovery", seed=-1 if x == 10**30 else x),
    "Pairs.drop verdicts": lambda small, pairs, effects, x: pairs.drop(pairs.check(small.model), [x]),
    "tasks.ioi templates": lambda small, pairs, effects, x: fp.tasks.ioi(list, 2, templates=x),
    "tasks.ioi template": lambda small, pairs, effects, x: fp.tasks.ioi(list, 2, templates=[x]),
    "tasks.ioi names": lambda small, pairs, effects, x: fp.tasks.ioi(list, 2, names=x),
    "load dtype": lambda small, pairs, effects, x: fp.load("./nowhere", dtype=x or "x"),
    "load processing": lambda small, pairs, effects, x: fp.load("./nowhere", processing=x or "x"),
    "load_sae dtype": lambda small, pairs, effects, x: fp.load_sae("./nowhere", dtype=x or "x"),
    "tasks.ioi corruptions": lambda small, pairs, effects, x: fp.tasks.ioi(list, 2, corruptions=x),
    "diagnose": lambda small, pairs, effects, x: fp.diagnose(small.model, small.at(SITE), pairs, x),
}


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def ranked() -> tuple[Small, fp.Pairs, fp.Effects]:
    small = small_bridge()
    pairs = fp.Pairs.from_tokens(small.clean[:1], small.corrupted[:1], small.correct[:1], small.wrong[:1])
    return small, pairs, fp.rank_components(small.model, pairs, sites="z", layers=[0], progress=False)


@pytest.mark.parametrize("name", REFUSING)
def test_wrong_types_are_refused(ranked: tuple[Small, fp.Pairs, fp.Effects], name: str) -> None:
    raised = {}
    for what, wrong in WRONG.items():
        try:
            raised[what] = f"none, but {REFUSING[name](*ranked, wrong)!r}"
        except fp.FeatpatchError:
            raised[what] = "FeatpatchError"
        except Exception as error:
            raised[what] = f"{type(error).__name__}: {str(error)[:200]}"
    assert raised == dict.fromkeys(WRONG, "FeatpatchError")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"index": 5.0}, "index=5.0: expected an integer"),
        ({"index": "5"}, "index='5': expected an integer"),
        ({"index": True}, "index=True: expected an integer"),
        ({"index": 10**30}, "index is an integer of 100 bits: expected at most"),
        ({"position": True}, "position=True: expected a token index, 'all' or the label"),
        ({"position": None}, "position=None: expected a token index"),
        ({"position": 2.0}, "position=2.0: expected a token index"),
        ({"site": None}, "site is of type NoneType: expected str"),
        ({"kind": ["feature"]}, "kind is of type list: expected str"),
    ],
)
def test_nodes_of_wrong_types(node: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=re.escape(message)):
        fp.Node(**({"site": SITE, "kind": "feature", "index": 1} | node))


def test_a_list_within_a_list_is_no_metric(ranked: tuple[Small, fp.Pairs, fp.Effects]) -> None:
    small, pairs, _ = ranked
    for call in (fp.find_circuit, fp.rank_components, fp.Gradients):
        with pytest.raises(fp.FeatpatchError, match=re.escape("metric=[['prob']]: expected")):
            call(small.model, pairs, metric=[["prob"]])


def test_blocks_of_a_huge_size(ranked: tuple[Small, fp.Pairs, fp.Effects], tmp_path: Any) -> None:
    with pytest.raises(fp.FeatpatchError, match="size is an integer of 100 bits"):
        next(iter(fp.Pairs.blocks_from_jsonl(ranked[0].model, tmp_path / "none.jsonl", size=10**30)))


@pytest.mark.parametrize(("clean", "said"), [((1,) * 17, "fails on 17 tokens"), ((1, 40), "ids from 1 to 40")])
def test_the_checklist_of_prompts_that_the_model_does_not_take(small: Small, clean: tuple[int, ...], said: str) -> None:
    """The model has 16 positions and 40 tokens."""
    pairs = fp.Pairs((pair(clean=clean, corrupted=(2, *clean[1:])),))
    with pytest.raises(
        fp.FeatpatchError, match=f"{said}.*expected ids of the model's own tokenizer, and prompts no longer than its context"
    ):
        pairs.check(small.model)


def test_a_complex_metric_is_refused(ranked: tuple[Small, fp.Pairs, fp.Effects]) -> None:
    small, pairs, _ = ranked
    for metric in (
        lambda logits, correct, wrong: torch.complex(logits[:, 0], logits[:, 1]),
        lambda logits: torch.complex(logits[0, -1, 0], logits[0, -1, 1]),
        lambda logits: torch.complex(logits[0, -1, 0], logits[0, -1, 1]).item(),
        lambda logits: torch.complex(logits[:, -1, 0], logits[:, -1, 1]).mean() if len(logits) > 1 else logits[0, -1, 0],
    ):
        with pytest.raises(fp.FeatpatchError, match="returned .*complex"):
            fp.rank_features(small.model, small.at(SITE), pairs, metric=metric, progress=False)


LONG = "y" * 5000
ONE = ["--model", "m", "--sae", "s", "--pairs", "p.jsonl"]


@pytest.mark.parametrize(
    "command",
    [
        ["check", *ONE, "--model", LONG],
        ["check", *ONE, "--model", f"./{LONG}"],
        ["rank", *ONE, "--out", LONG],
        ["components", "--model", "m", "--pairs", "p.jsonl", "--out", LONG],
        ["report", LONG],
        ["compare", LONG, LONG],
        ["info", LONG],
        ["run", LONG],
        ["verify", LONG, "--model", "m", "--pairs", "p.jsonl"],
    ],
    ids=lambda command: " ".join(part[:12] for part in command),
)
def test_options_of_5000_characters(tmp_path: Any, command: list[str]) -> None:
    done = run(*command, folder=tmp_path)
    assert done.returncode == 2
    assert "rror" in done.stderr


def test_positions_on_the_command_line() -> None:
    """By hand: a part in quotes is a label, whatever it looks like."""
    assert spans("S2,end,3,-1,-x,--2") == ["S2", "end", 3, -1, "-x", "--2"]
    assert spans('"3","a,b",end, "say ""so""",4') == ["3", "a,b", "end", 'say "so"', 4]
    assert spans("all") == "all"
    assert spans('"all"') == ["all"]
    assert spans("9" * 5000) == ["9" * 5000]
    for text in ('"3', '"a"b', 'a"b"'):
        with pytest.raises(fp.FeatpatchError, match="expected a comma or the end of the text after a label in double quotes"):
            spans(text)
