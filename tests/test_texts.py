"""The text of every result: short enough to read in a terminal, without addresses, and with what it is about."""

from math import ceil
from typing import Any

import numpy as np
import pandas as pd
import pytest

import featpatch as fp
from featpatch.frame import Frame
from featpatch.reporting.conclusion import concluded
from featpatch.reporting.terminal import ranked

LINES, WIDTH = 25, 160
SAE = "blocks.1.hook_resid_pre"
SEVERAL = ("Comparison", "apart")
"""What shows several tables."""
HOOKS = ("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of every class that `fp` returns one, and every table, of the shipped model."""
    demo = fp.load_demo()
    model, pairs = demo.model, demo.pairs("ioi", n=4)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in HOOKS]
    last = saes[1]
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}
    effects = fp.rank_features(model, saes, pairs, **options)
    components = fp.rank_components(model, pairs, sites=["resid_pre", "mlp_out", "z"], **options)
    estimate = fp.rank_features(model, saes, pairs, method="atp", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featpatch.ranking.screen.USEFUL", 0.0)
        screened = fp.rank_features(model, saes, pairs, screen=fp.Screen(k=40, audit=40), **options)
    comparison = fp.compare(effects, components, model=model, saes=saes, pairs=pairs)
    curve = fp.top_k_curve(model, last, pairs, most=4, **options)
    fits = fp.check(model, saes, pairs)
    checked = pairs.check(model)
    nodes = effects.top(3).nodes
    heads = [node for node in components.nodes if node.kind == "head" and node.position == "end"]
    alike = fp.Pairs(tuple(pair for pair in demo.pairs("capitals", n=200) if len(pair) == 7))[:2]
    circuit = fp.find_circuit(model, alike, nodes=heads[:4], size=2, progress=False)
    return {
        "Demo": demo, "Loaded": fp.load(model, saes, check=False), "Pairs": pairs, "Pair": pairs[0], "Effects": effects,
        "components": components, "one pair": fp.rank_features(model, last, pairs[:1], **options), "estimate": estimate,
        "screened": screened, "Audit": screened.audit(), "stability": effects.stability("recovery"), "Comparison": comparison,
        "apart": fp.compare(effects, fp.rank_components(model, pairs, sites="z", **options)), "Curve": curve,
        "Check": fits, "Fit": fits.fits[0], "Checklist": checked, "Finding": checked.findings[0],
        "Plan": fp.plan(model, saes, pairs, positions="all"),
        "Calibration": fp.calibrate(estimate, effects), "Gradients": fp.Gradients(model, pairs), "Node": nodes[0],
        "Selection": fp.select_features(model, last, pairs, position="end", candidates=4, most=2, progress=False),
        "Controls": fp.random_controls(model, last, pairs, position="end", n=5, progress=False), "Noise": fp.Noise(["S2"]),
        "Patch": fp.Patch(nodes), "identity": fp.dictionaries.identity(model, HOOKS[0]), "neurons": fp.dictionaries.neurons(model, 1), "Ray": fp.Ray(),
        "pca": fp.dictionaries.pca(model, HOOKS[0], pairs), "sites": effects.sites(), "to_pandas": effects.to_pandas(),
        "by_tag": effects.by_tag("template", "recovery"), "table": comparison.table, "through": comparison.through,
        "writers": comparison.writers, "curve": curve.table(), "findings": checked.to_pandas(),
        "diagnose": fp.diagnose(model, saes, pairs, nodes),
        "interactions": fp.interactions(model, last, pairs, features=[173, 740, 538], position="end", progress=False),
        "circuits": circuit.compare(circuit), "calibration": fp.calibrate(estimate, effects).table(),
        "misses": fp.calibrate(estimate, effects).misses(),
        "Circuit": circuit, "Agreement": comparison.agreement["recovery"], "Edge": fp.Edge("s", "edge"),
        "Description": next(iter(fp.max_activating(model, saes, nodes, demo.text()[:60]).values())),
    }  # fmt: skip


def test_every_text_is_short_and_says_no_address(results: dict[str, Any]) -> None:
    """A sentence is broken by the terminal; the lines of a table would fall apart."""
    wrong = []
    for name, result in results.items():
        for shown in (repr(result), str(result)):
            lines = shown.splitlines()
            tall = sum(ceil(len(line) / WIDTH) for line in lines) > (2 if name in SEVERAL else 1) * LINES
            wide = max(map(len, lines)) > WIDTH and isinstance(result, (Frame, fp.Effects))
            words = set(shown.translate(str.maketrans(",=[]()", "      ")).split())
            if (
                tall
                or wide
                or " at 0x" in shown
                or (isinstance(result, Frame) and "..." in lines[0])
                or words & {"nan", "NaN", "<NA>"}
            ):
                wrong.append(f"{name}: {len(lines)} lines of up to {max(map(len, lines))}\n{shown[:600]}")
    assert not wrong, "\n".join(wrong)


def test_every_result_is_looked_at(results: dict[str, Any]) -> None:
    """Every class that `fp` names, but for those that are no results, or are made by tests of their own."""
    classes = {name for name in fp.__all__ if isinstance(getattr(fp, name), type)}
    others = {"FeatpatchError", "SlowPathWarning", "Hypothesis", "Stored", "Screen"}
    assert classes - {type(result).__name__ for result in results.values()} == others


def test_a_table_shows_all_of_its_columns_and_loses_none(results: dict[str, Any]) -> None:
    assert all(isinstance(result, Frame) for result in results.values() if isinstance(result, pd.DataFrame))
    table = results["sites"]
    shown = repr(table)
    for column in table.columns:
        assert column in shown
    assert "..." not in shown
    assert f"{table['degradation_interaction'][0]:.3g}" in shown
    assert isinstance(table[table["position"] == "S2"], Frame)
    assert table.to_csv().splitlines()[0].split(",")[1:] == list(table.columns)
    wide = Frame({f"column_{n}": range(30) for n in range(40)})
    printed = repr(wide)
    assert all(f"column_{n}" in printed for n in range(40))
    assert printed.endswith("more rows; to_string() shows them")
    assert len(printed.splitlines()) <= LINES
    assert repr(Frame({"x": [0.5, None], "x_low": [0.25, None], "x_high": [1.0, None]})).split() == ["x", "0.5", "[0.25,", "1]"]
    assert repr(pd.concat([table, table], axis=1)).count("recovery_error") == 2
    assert (repr(Frame({"a": []})), repr(Frame())) == ("no rows; columns a", "no rows")
    assert repr(Frame({"a": ["\x1b[31m"]})).split() == ["a", "\\x1b[31m"]


def denoised(nodes: Any, values: Any, unit: str = "gap") -> fp.Effects:
    """A table of these effects, `[rows]` over one pair or `[rows, pairs]`, with NaN where a row is the same in both runs."""
    effects = np.array(values).reshape(len(nodes), -1)
    rows, pairs = np.nonzero(~np.isnan(effects))
    metadata = {"metric": "m", "metrics": ["m"], "directions": ["denoising"], "unit": unit}
    gaps, known = np.ones(effects.shape[1]), effects[rows, pairs]
    return fp.Effects(tuple(nodes), gaps, 0 * gaps, rows, pairs, known, 1 - known, metadata)


def test_top_heads_tell_which_whole_activations_they_leave_out() -> None:
    """On the terminal too; not if they are among the rows, or in a table of features, whose whole activations are others."""
    nodes = (
        fp.head(1, 3, position="end"),
        fp.Node("blocks.1.hook_mlp_out", "activation", None, "end"),
        fp.head(0, 2, position="end"),
    )
    table = denoised(nodes, [0.3, 0.9, 0.1])
    note = "not shown: 1 whole activation, the largest of which is blocks.1.hook_mlp_out activation @ end (0.90)"
    assert repr(table.top(2)).endswith(f"{note}; effects.top(kind=None) ranks them too")
    assert note in table.top(2)._repr_html_()
    assert [node.kind for node in table.top(2, kind=None).nodes] == ["activation", "head"]
    assert table.where(kind="activation").top(5).nodes == nodes[1:2]
    for without in (table, table.top(2, kind=None), table.where(kind="activation")):
        assert "not shown" not in repr(without)


def test_a_large_error_is_told_wherever_the_table_is_shown() -> None:
    """With the share of all features; not if features have more, if the error's effect is small, or in a table of changes."""
    nodes = tuple(
        fp.Node(SAE, kind, index, "end", SAE) for kind, index in (("feature", 3), ("all_features", None), ("error", None))
    )
    large, note = denoised(nodes, [0.2, 0.2, 0.7]), f"{nodes[2]} has a larger effect than all features there (0.70 and 0.20)"
    notes, caveats = ranked(large.top(1)).notes, concluded(large, large.top(1)).caveats
    for shown in (repr(large.top(1)), large.top(1)._repr_html_(), "".join(notes), "".join(caveats)):
        assert note in shown
    for other in ([0.2, 0.7, 0.2], [0.01, 0.01, 0.05]):
        assert "larger effect" not in repr(denoised(nodes, other))
    assert "larger effect" not in repr(denoised(nodes, [0.2, 0.2, 0.7], unit="metric"))
    assert "larger effect" not in repr(denoised(nodes[::2], [0.2, 0.7]))  # that of all features was not measured


def test_rows_sorted_over_changed_pairs_show_that_column() -> None:
    nodes = tuple(fp.Node(SAE, "feature", index, "end", SAE) for index in (3, 5))
    table = denoised(nodes, [[0.5, np.nan], [0.3, 0.4]])
    rows = table.top(2, by="recovery_where_changed", least_changed=1)
    assert [node.index for node in rows.nodes] == [3, 5]
    assert "recovery_where_changed" in repr(rows)
    assert "recovery_where_changed" not in repr(table.top(2))


def test_a_table_is_as_wide_as_the_terminal(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for shown in (repr(results["sites"]), repr(results["Effects"])):
        assert max(map(len, shown.splitlines())) <= 80
        assert "degradation" in shown


def test_two_saes_at_one_hook_point_are_told_apart() -> None:
    nodes = [fp.Node("blocks.1.hook_resid_pre", "feature", 3, "end", f"blocks.1.hook_resid_pre{name}") for name in ("", "#2")]
    table = denoised(nodes, np.ones(2))
    assert "blocks.1.hook_resid_pre#2" in repr(table)
    assert " sae " not in repr(table.take([0]))


def test_a_loaded_model_is_told_in_a_few_lines(results: dict[str, Any]) -> None:
    lines = repr(results["Loaded"]).splitlines()
    assert len(lines) == 3
    assert "4 layers of width 128, 2 SAEs" in lines[0]
    assert lines[1].endswith(f"SAE, 1024 features, at {HOOKS[0]}")
