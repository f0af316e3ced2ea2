"""The HTML report in a real browser: no errors, sorting and searching, widths, loading time, escaping."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import Small
from test_sets import SITE, pairs_of

import featpatch as fp
from featpatch.page.page import write
from featpatch.reporting.sections import Material, PairText, _shown, page_of

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=6, seed=0)
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}
    saes = [sae for sae in demo.saes if "hook_resid" in sae.cfg.metadata.hook_name]
    saes[0].cfg.metadata.neuronpedia_id = "demo/0"
    return {
        "effects": fp.rank_features(demo.model, saes, pairs, **options),
        "model": demo.model,
        "pairs": pairs,
        "saes": saes,
        "components": fp.rank_components(demo.model, pairs, **options),
        "estimate": fp.rank_features(demo.model, saes, pairs, method="atp", **options),
        "curve": fp.top_k_curve(demo.model, saes[0], pairs, most=4, **options),
    }


def opened(browser: Any, path: Path, width: int = 1280) -> None:
    """Open a report and wait until every table and figure is there."""
    browser.set_window_size(width, 1000)
    browser.get_log("browser")
    start = time.perf_counter()
    browser.get(path.as_uri())
    ready = "return document.querySelectorAll('table.dataTable tbody tr').length > 0 && !document.body.innerText.includes('Loading ITables')"
    while not browser.execute_script(ready):
        assert time.perf_counter() - start < 30, browser.get_log("browser")
        time.sleep(0.05)


def errors(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def first_cells(browser: Any, column: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#ranking table.dataTable tbody tr')].map(r => r.cells[arguments[0]].innerText)"
    )
    return list(browser.execute_script(script, column))


def test_the_report_of_a_study(study: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """Every section, nothing from the network, no error; the table is sorted, sorts and searches; features open."""
    options = dict(study)
    effects = options.pop("effects")
    path = fp.report(effects, tmp_path / "folder" / "ioi.html", question="Who gets it?", top=5, **options)
    browser.get_log("performance")
    opened(browser, path)
    names = browser.execute_script("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert names == ["question", "ranking", "quadrants", "sites", "maps", "figure-0", "figure-1", "stability",
                     "provenance"]  # fmt: skip
    assert browser.execute_script("return document.querySelectorAll('.js-plotly-plot .main-svg').length") >= 9
    assert browser.title == "Who gets it?"
    facts = browser.execute_script("return document.querySelector('#provenance').innerText")
    assert Path(sys.argv[0]).name in facts
    assert "finished_at" in facts
    assert "seed 0" in facts
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    features = effects.take(effects.ranked)
    best = f"{features.pooled('recovery').max():.4f}".rstrip("0")
    headers = browser.execute_script("return [...document.querySelectorAll('#ranking thead th')].map(h => h.innerText.trim())")
    column = headers.index("recovery")
    assert float(first_cells(browser, column)[0]) == float(best)
    assert browser.execute_script("return document.querySelector('#ranking .dt-info').innerText").endswith(
        f"of {len(features)} entries"
    )
    header = browser.find_elements("css selector", "#ranking thead th .dt-column-order")[column]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", header)
    for _ in range(2):  # from largest first to unsorted to smallest first
        header.click()
        time.sleep(0.3)
    assert float(first_cells(browser, column)[0]) == pytest.approx(features.pooled("recovery").min(), abs=1e-4)
    node = effects.top(1).nodes[0]
    browser.execute_script(
        "const s = document.querySelector('#ranking input[type=search]'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}));", f"{node.sae} feature {node.index}"
    )  # fmt: skip
    time.sleep(0.5)
    assert str(node.index) in first_cells(browser, headers.index("index"))
    assert len(first_cells(browser, 0)) < 15
    from selenium.webdriver.common.keys import Keys

    opened_text = "const r = document.querySelector('#ranking tr.opened'); return r && r.innerText"
    row = browser.find_element("css selector", "#ranking tr.opens")
    for act in (row.click, lambda: row.send_keys(Keys.ENTER)):
        assert browser.execute_script(opened_text) is None
        act()
        text = browser.execute_script(opened_text)
        assert str(node) in text
        assert "change written by" in text
        assert "raises (direct path" in text
        row.click()
    assert errors(browser) == []


@pytest.mark.parametrize("scripts", [True, False])
def test_without_javascript_the_report_says_so(study: dict[str, Any], browser: Any, tmp_path: Path, scripts: bool) -> None:
    """What a reader is shown, by the browser's tree for screen readers."""
    path = fp.report(study["effects"], tmp_path / "effects.html")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    try:
        browser.get(path.as_uri())
        tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    shown = " ".join(" ".join(str(node.get("name", {}).get("value", "")) for node in tree["nodes"]).split())
    for words in ("displayed without JavaScript", "effects.csv", "allow scripts for this file"):
        assert (words in shown) != scripts
    assert "Which SAE features cause this?" in shown


def test_what_a_card_says(study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair where a feature matters most, its activations there and its top logits, by sae-lens."""
    effects, model, pairs = study["effects"], study["model"], study["pairs"]
    given: list[Material] = []
    monkeypatch.setattr("featpatch.reporting.report.page_of", lambda _, material, components: given.append(material) or "")
    fp.report(effects, tmp_path / "r.html", top=40, **{name: study[name] for name in ("model", "pairs", "saes")})
    cards = {node: card for node, card in given[0].features.items() if node.site == "blocks.3.hook_resid_post"}
    assert len({card.pair for card in cards.values()}) > 1
    sae = next(sae for sae in study["saes"] if sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post")
    for node, card in cards.items():
        row = effects.take([effects.nodes.index(node)])
        size = abs(row.per_pair("recovery")[0] * row.gap) + abs(row.per_pair("degradation")[0] * row.gap)
        assert card.pair == size.argmax()
        with torch.no_grad():
            for tokens, values in ((pairs[card.pair].clean, card.clean), (pairs[card.pair].corrupted, card.corrupted)):
                _, cache = model.run_with_cache(torch.tensor([tokens]))
                np.testing.assert_allclose(values, sae.encode(cache[node.site])[0, :, node.index], atol=1e-4)
            logits = sae.W_dec[node.index] @ model.unembed.W_U
        raises, lowers = (card.facts[f"{name} (direct path, without the final norm)"] for name in ("raises", "lowers"))
        assert raises.startswith(f"{model.tokenizer.decode([int(logits.argmax())])!r} ({float(logits.max()):+.2f})")
        assert lowers.startswith(f"{model.tokenizer.decode([int(logits.argmin())])!r} ({float(logits.min()):+.2f})")
        assert card.facts["differs"] == f"in {row.changed_pairs[0]} of 6 pairs"
    links = {card.link for node, card in given[0].features.items() if node.sae == study["saes"][0].cfg.metadata.hook_name}
    assert all(link.startswith("https://www.neuronpedia.org/demo/0/") for link in links)
    assert links


@pytest.mark.parametrize("width", [1280, 390])
def test_widths(study: dict[str, Any], browser: Any, tmp_path: Path, width: int) -> None:
    """Nothing but what scrolls by itself is wider than the window."""
    path = fp.report(study["effects"], tmp_path / "r.html", **{k: study[k] for k in ("model", "pairs", "saes")})
    opened(browser, path, width)
    script = (
        "const w = document.documentElement.clientWidth; return [...document.querySelectorAll('body *')]"
        ".filter(e => !e.closest('.block') && e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.execute_script(script) == []
    assert errors(browser) == []


@pytest.mark.parametrize("rows", [2_000, pytest.param(20_000, marks=pytest.mark.extended)])
def test_many_rows(hooked: Small, browser: Any, tmp_path: Path, rows: int) -> None:
    """A report of 20,000 rows opens in a browser and counts them all."""
    base = fp.rank_features(hooked.model, hooked.at(SITE), pairs_of(hooked), progress=False)
    node = next(node for node in base.nodes if node.kind == "feature")
    generator = np.random.default_rng(0)
    large = replace(
        base, nodes=tuple(replace(node, index=n) for n in range(rows)), row=np.arange(rows), pair=np.zeros(rows, dtype=np.int64),
        denoised=generator.standard_normal(rows), noised=generator.standard_normal(rows),
    )  # fmt: skip
    path = fp.report(large, tmp_path / "large.html")
    opened(browser, path)
    assert browser.execute_script("return document.querySelector('#ranking .dt-info').innerText").endswith(
        f"of {rows:,} entries"
    )
    assert errors(browser) == []


def test_more_rows_than_are_shown(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest, in the order of the table; the page says so."""
    monkeypatch.setattr("featpatch.reporting.sections.ROWS", 3)
    effects = fp.rank_features(small.model, small.at(SITE), pairs_of(small), progress=False)
    text = fp.report(effects, tmp_path / "r.html").read_text()
    ranked = effects.take(effects.ranked)
    assert f"Shown are the 3 rows with the largest effects, of {len(ranked)} in the table." in text
    shown = _shown(effects)
    assert set(shown.nodes) == {ranked.nodes[row] for row in np.argsort(-ranked.sizes())[:3]}
    assert [effects.nodes.index(node) for node in shown.nodes] == sorted(effects.nodes.index(node) for node in shown.nodes)


def test_text_of_users_is_text(study: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """Names, notes and questions with markup in them run nothing."""
    effects = study["effects"]
    rows = effects.take(effects.ranked)
    nodes = tuple(replace(node, index=n, sae=EVIL + node.sae, position=EVIL) for n, node in enumerate(rows.nodes))
    metadata = {**effects.metadata, "note": EVIL, "tags": [{EVIL: str(n)} for n in range(len(effects.clean))]}
    hostile = replace(rows, nodes=nodes, metadata=metadata, taken_from=None)
    prompt = PairText([EVIL], [EVIL], [True], [EVIL + '"'], [EVIL], [EVIL])
    path = write(tmp_path / "hostile.html", page_of(hostile, Material(EVIL, [prompt]), None))
    opened(browser, path)
    time.sleep(0.5)
    assert browser.execute_script("return window.evil") is None
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert browser.title == EVIL


def test_the_report_of_a_screened_table(small: Small, tmp_path: Path) -> None:
    """Says so, and adds nothing up that was not run."""
    options: dict[str, Any] = {"positions": "each", "progress": False}
    table = fp.rank_features(small.model, small.at(SITE), pairs_of(small), screen=fp.Screen(k=8, audit=4), **options)
    text = fp.report(table, tmp_path / "screened.html").read_text()
    assert "Not all features were patched. 8 of" in text
    assert 'id="maps"' not in text
    assert '"seed": 0' in text.replace("&#34;", '"')
    assert "estimates" not in text.split('id="provenance"')[1]
    assert "report written" in text


def test_plots_say_what_the_table_says(study: dict[str, Any]) -> None:
    effects = study["effects"]
    features = effects.take(effects.ranked)
    scatter = effects.plot.quadrants()
    assert sorted(x for trace in scatter.data for x in trace.x) == sorted(features.pooled("recovery"))
    bars = effects.plot.sites("degradation")
    assert [trace.name for trace in bars.data] == ["whole activation", "all features", "error term"]
    np.testing.assert_allclose(bars.data[2].y, effects.sites()["degradation_error"])
    maps = effects.plot.heatmap(kind="feature")
    total = sum(float(np.nansum(trace.z)) for trace in maps.data)
    assert total == pytest.approx(features.pooled("recovery").sum())
    assert maps.data[0].z[0][0] == pytest.approx(
        features.where(site="blocks.0.hook_resid_pre", position="S2").pooled("recovery").sum()
    )


def test_figures_and_tables_as_files(study: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """PNG and SVG by kaleido and the browser; CSV, Parquet and LaTeX by pandas."""
    pytest.importorskip("kaleido")
    figure, table = study["effects"].plot.quadrants(), pd.DataFrame(study["effects"].top(5).to_pandas())
    for name, starts in (("q.png", b"\x89PNG"), ("q.svg", b"<svg")):
        figure.write_image(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(starts)
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=[""]), table, check_dtype=False
    )
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    assert table.to_latex(index=False).count("S2") + table.to_latex(index=False).count("end") >= 5


def test_errors(study: dict[str, Any], tmp_path: Path) -> None:
    effects, model, pairs = study["effects"], study["model"], study["pairs"]
    for call, message in (
        (lambda: fp.report(effects, tmp_path), "is a folder: expected the path of a file"),
        (
            lambda: fp.report(effects, tmp_path / "r", model=model, pairs=pairs[:2]),
            "the pairs differ from those of the effects",
        ),
        (
            lambda: fp.report(effects, tmp_path / "r", model=model, pairs=pairs, saes=fp.dictionaries.identity(model, SITE)),
            "differ from those",
        ),
        (lambda: effects.plot.heatmap(kind="neuron"), "no row of kind 'neuron': expected one of"),
        (lambda: effects.with_threshold(3.0), "threshold=3.0: expected a number between 0 and 1"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            call()
