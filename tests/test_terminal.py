"""Tables for a terminal: never wider than the console, a line for each row, and a conclusion that says what the numbers do."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import featpatch as fp
from featpatch.console import Fitted, PlainConsole
from featpatch.descriptions import Description
from featpatch.effects.frames import number
from featpatch.pairs.checklist import Checklist, Finding
from featpatch.patching.sets import Selection
from featpatch.ranking.plan import Plan
from featpatch.reporting import terminal
from featpatch.selfcheck import Check, Fit

HOOKS = ("blocks.0.mlp.hook_in", "blocks.3.hook_resid_post")


def printed(table: Any, width: int = 100) -> list[str]:
    console = Console(width=width, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.fixture(scope="module")
def ranked() -> fp.Effects:
    """The effects of a transcoder, whose name is the longest, and of another SAE, by three metrics."""
    demo = fp.load_demo(progress=False)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in HOOKS]
    return fp.rank_features(
        demo.model,
        saes,
        demo.pairs("ioi", n=4),
        positions=["S2", "end"],
        metric=["logit_diff", "prob", "log_prob"],
        progress=False,
    )


@pytest.mark.parametrize("width", [80, 100, 300])
def test_effects_fit_every_console(ranked: fp.Effects, width: int) -> None:
    """Each row is on one line with its index and its recovery; columns are left out from the least important one on."""
    top = ranked.top(12)
    lines = printed(terminal.ranked(top), width)
    assert max(map(len, lines)) <= width
    rule = next(n for n, line in enumerate(lines) if set(line.strip()) == {"─"})
    for node, value, line in zip(top.nodes, top.pooled("recovery"), lines[rule + 1 :], strict=False):
        assert re.split(r"\s{2,}", line)[1] == str(node.index)
        assert f" {number(value)} [" in line
    text = " ".join(" ".join(lines).split())
    assert ("left out of this table for lack of space: recovery where changed, degradation log_prob" in text) == (width <= 100)
    assert ("where changed: over these pairs only" in text) == (width > 100)
    assert "blocks." not in text
    summary = printed(terminal.site_summary(ranked), width)
    assert max(map(len, summary)) <= width
    assert sum(line.startswith(("L0 mlp.in -> mlp_out", "L3 resid_post")) for line in summary) == len(ranked.sites())


def test_a_table_leaves_out_columns_and_then_cuts_off_names() -> None:
    table = Fitted(
        "numbers", {"name": ["a name of twenty-two"], "value": ["0.25"], "more": ["0.125"]}, numbers=["value", "more"],
        spare=["more"], legend={"more": "eighths", "value": "quarters"}, notes=["a note"],
    )  # fmt: skip
    assert printed(table, 60) == [
        "numbers", "name                  value   more", "──────────────────────────────────",
        "a name of twenty-two   0.25  0.125", "more: eighths", "value: quarters", "a note",
    ]  # fmt: skip
    narrow = [line.rstrip() for line in printed(table, 27)]
    assert narrow[3:] == [
        "a name of twenty-two   0.25",
        "value: quarters",
        "a note",
        "left out of this table for",
        "lack of space: more",
    ]
    assert printed(table, 22)[3].startswith("a name of twen…")
    assert printed(table, 22)[3].rstrip().endswith(" 0.25")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_counts_agree_with_their_nouns(ranked: fp.Effects, number: int) -> None:
    """One of a thing has no s; intervals are announced where some are shown, and no plan patches more than there is."""
    title = printed(terminal.ranked(ranked.of_pairs([0]).take(range(number))), 300)[0]
    assert title == (
        f"exact effects of {number} node{'s' * (number != 1)}, pooled over 1 pair: 0 is none, 1 is the whole behaviour"
    )
    assert ("[95 % interval]" in printed(terminal.ranked(ranked.take(range(number))), 300)[0]) == (number > 0)
    fit = Fit("blocks.3.hook_resid_post", 0.0, 0.0, 1.0, None, 1.0, "", ())
    assert printed(terminal.checked(Check("m", "raw", number, (fit,) * number)))[0].startswith(
        f"self-check on {number} position{'s' * (number != 1)};"
    )
    clean = [Finding(pair, "difference", "fail", "same") for pair in range(number)]
    found = printed(terminal.by_pair(Checklist(tuple(clean), (1.0,) * number, (0.0,) * number), "prompt {}".format))
    assert found == [
        f"{number} pair{'s' * (number > 1)} to look at" if number else "every pair passes",
        *(line for pair in range(number) for line in (f"pair {pair}, fail: prompt {pair}", "  difference: same")),
    ]
    plan = Plan(1, 1, 1, 1, 1, 1.0, True, nodes=number, estimate_seconds=1.0, counted=2, pairs=2)
    assert f"estimates, then all {number} feature{'s' * (number != 1)} " in "\n".join(printed(terminal.planned(plan)))


def test_at_80_columns_a_direction_is_left_out_before_a_number_is_cut(ranked: fp.Effects) -> None:
    """The direction that rows are sorted by stays, whole; names of hook points of one SAE and quadrants stay too."""
    rows = ranked.where(site=HOOKS[1]).top(5)
    for by, left_out in (("recovery", "degradation"), ("degradation", "recovery")):
        lines = printed(terminal.ranked(rows, by), 80)
        assert f" {left_out}" not in lines[1]
        assert "for lack of space: " in " ".join(lines)
        assert left_out in " ".join(lines).partition("for lack of space: ")[2]
        assert not any("…" in line for line in lines)
        assert sum("L3 resid_post" in line for line in lines) == 5


def test_the_layers_of_a_cross_layer_dictionary_are_told_apart() -> None:
    """One whose name is not that of a hook point keeps it; one at a single hook point is named by that."""
    sites = [f"blocks.{layer}.hook_mlp_out" for layer in (0, 1)]
    owned = [("clt", sites[0]), ("clt", sites[1]), ("clt", "clt together"), ("", sites[0]), (sites[0], sites[0])]
    assert terminal._places(owned) == ["clt L0 mlp_out", "clt L1 mlp_out", "clt together", "L0 mlp_out", "L0 mlp_out"]
    assert terminal._places([(sites[0], site) for site in sites]) == ["L0 mlp_out", "L1 mlp_out"]


def test_a_plan_patches_no_more_features_than_there_are() -> None:
    plan = Plan(1, 1, 1, 1, 1, 1.0, True, nodes=250, estimate_seconds=1.0, counted=2, pairs=2)
    for nodes, said in ((250, "200 + 50 of 250 features"), (200, "all 200 features"), (1000, "200 + 100 of 1,000 features")):
        assert f"estimates, then {said}" in "\n".join(printed(terminal.planned(replace(plan, nodes=nodes))))


def test_output_that_goes_to_no_terminal_is_100_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole().print("word " * 50)
    PlainConsole(stderr=True).print("word " * 50)
    for text in capsys.readouterr():
        assert max(len(line.rstrip()) for line in text.splitlines()) == 99


def selection(recovery: list[list[float]], degradation: list[float], target: float = 0.8) -> Selection:
    """Sets of one, two, ... features with these recoveries per pair, and the last of them with these degradations; gaps of 1."""
    denoised = np.array(recovery)
    noised = 1 - np.array([[0.0] * len(degradation)] * (len(recovery) - 1) + [degradation])
    row, pair = np.indices(denoised.shape).reshape(2, -1)
    nodes = tuple(fp.Node("blocks.3.hook_resid_post", "set", n, "end") for n in range(len(recovery)))
    effects = fp.Effects(
        nodes, np.ones(denoised.shape[1]), np.zeros(denoised.shape[1]), row, pair, denoised.ravel(), noised.ravel(),
        {"metric": "m", "directions": ["denoising", "noising"]},
    )  # fmt: skip
    return Selection([7, 8, 9][: len(recovery)], [], effects, "recovery", target, float(denoised[-1].mean()) >= target)


SAME = Description("on", "word", 0.5, 10, 100, ("the [word] that",))


def test_a_feature_at_two_positions_is_described_once() -> None:
    nodes = [fp.Node(HOOKS[1], "feature", index, position, HOOKS[1]) for index, position in ((3, "S2"), (3, "end"), (4, "end"))]
    lines = terminal.detected(dict.fromkeys(nodes, SAME))
    assert [line.partition(":")[0] for line in lines] == ["L3 resid_post 3", "L3 resid_post 4"]


NEVER = replace(SAME, word="", f1=0.0, fired=0, contexts=())

ALL, NONE, MIXED = [0.9] * 8, [0.0] * 8, [1.0, -1.0] * 4


@pytest.mark.parametrize(
    ("recovery", "degradation", "said"),
    [
        ([[0.5] * 8, ALL], [0.8] * 8, "2 features at here bring back 90 % [90, 90] of the behaviour, and 80 % [80, 80] of it is "
         "lost without them: they are sufficient and necessary for this part of it."),
        ([ALL], NONE, "1 feature at here brings back 90 % [90, 90] of the behaviour, and 0 % [0, 0] of it is lost without it: it "
         "is sufficient for this part of it, but not necessary, because something else does the job as well."),
        ([[0.3] * 8], ALL, "1 feature at here brings back 30 % [30, 30] of the behaviour, short of 80%, and 90 % [90, 90] of it "
         "is lost without it: it is sufficient and necessary for this part of it."),
        ([NONE], ALL, "it is necessary for this part of it, but not sufficient."),
        ([NONE], NONE, "1 feature at here brings back 0 % [0, 0] of the behaviour, short of 80%, and 0 % [0, 0] of it is lost "
         "without it: it is neither sufficient nor necessary."),
        ([MIXED], ALL, "it is not shown to be both sufficient and necessary by these pairs."),
        ([[0.9]], [0.9], "1 feature at here brings back 90 % of the behaviour, and 90 % of it is lost without it: it is not shown "
         "to be both sufficient and necessary by these pairs."),
        ([[-0.5] * 8], ALL, "it is working against it in at least one direction."),
    ],
)  # fmt: skip
def test_the_conclusion_says_what_the_numbers_do(recovery: list[list[float]], degradation: list[float], said: str) -> None:
    chosen = selection(recovery, degradation)
    assert terminal.selected_together(chosen, "here", [NEVER] * len(recovery)).endswith(said)
    fires = [SAME, *[NEVER] * (len(recovery) - 1)]
    assert terminal.selected_together(chosen, "here", fires).endswith(f'{said} Most active: 7 on "the [word] that".')


def test_the_steps_of_a_selection() -> None:
    assert terminal.steps(selection([[0.5] * 8, ALL], ALL)) == (
        "features needed to bring back 80%, chosen one by one on these pairs: 7 (0.50) + 8 (0.90)"
    )
    twelve = selection([[n / 12] * 8 for n in range(1, 13)], ALL)
    shown = terminal.steps(replace(twelve, features=range(12))).split(": ")[1].split(" + ")
    assert (len(shown), shown[0], shown[-3:]) == (9, "0 (0.083)", ["6 (0.58)", "4 more", "11 (1.00)"])
