"""The HTML report in a real browser: what it says first, sorting and searching, widths, dark mode, loading time, escaping."""

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
from featpatch.page.charts import grid
from featpatch.page.page import write
from featpatch.reporting.conclusion import Conclusion, concluded, short_names, strongest
from featpatch.reporting.sections import Material, PairText, _shown, page_of

EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=6, seed=0)
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in hooks]
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
    assert names == ["answer", "features", "maps", "quadrants", "sites", "figure-0", "figure-1", "ranking", "stability",
                     "question", "provenance"]  # fmt: skip
    charts = browser.execute_script(
        "return [...document.querySelectorAll('figure.chart, table.grid')].map(c => c.closest('section').id)"
    )
    assert set(charts) == {"answer", "features", "maps", "quadrants", "sites", "figure-0", "figure-1"}
    assert path.stat().st_size <= 2_000_000
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
        "s.dispatchEvent(new Event('input', {bubbles: true}));", f"#{node.index} @ {node.position}"
    )  # fmt: skip
    time.sleep(0.5)
    assert any(cell.endswith(f"#{node.index} @ {node.position}") for cell in first_cells(browser, headers.index("feature")))
    assert len(first_cells(browser, 0)) < 15
    from selenium.webdriver.common.keys import Keys

    row = browser.find_element("css selector", "#ranking tr.opens")
    number = int(row.text.split()[1])
    card = browser.find_element("id", f"card-{number}")
    for act in (row.click, lambda: row.send_keys(Keys.ENTER)):
        browser.execute_script("arguments[0].open = false", card)
        act()
        assert card.get_attribute("open")
        for words in (f"#{node.index} @ {node.position}", "change written by", "promotes", node.site, "Effect in each pair"):
            assert words in card.text
        assert browser.switch_to.active_element.tag_name == "summary"
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    assert errors(browser) == []


@pytest.mark.parametrize("scripts", [True, False])
def test_without_javascript_the_report_says_so(study: dict[str, Any], browser: Any, tmp_path: Path, scripts: bool) -> None:
    """What a reader is shown, by the browser's tree for screen readers."""
    path = fp.report(study["effects"], tmp_path / "effects.html")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    try:
        browser.get(path.as_uri())
        end, tree = time.monotonic() + 20, {"nodes": []}
        while len(tree["nodes"]) < 100 and time.monotonic() < end:  # the tree is built after the page has loaded
            tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    shown = " ".join(" ".join(str(node.get("name", {}).get("value", "")) for node in tree["nodes"]).split())
    assert "ITables" not in shown
    for words in ("displayed without JavaScript", "writes next to its report", "allow scripts for this file"):
        assert (words in shown) != scripts
    assert "Which features of the model cause its answers in the task ioi?" in shown
    name = f"#{study['effects'].top(1).nodes[0].index} @"
    assert name in shown


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
        raises, lowers = (card.facts[name] for name in ("promotes", "suppresses"))
        assert raises.startswith(f"{model.tokenizer.decode([int(logits.argmax())])!r} ({float(logits.max()):+.2f})")
        assert lowers.startswith(f"{model.tokenizer.decode([int(logits.argmin())])!r} ({float(logits.min()):+.2f})")
        assert card.facts["differs"] == f"in {row.changed_pairs[0]} of 6 pairs"
    links = {card.link for node, card in given[0].features.items() if node.sae == study["saes"][0].cfg.metadata.hook_name}
    assert all(link.startswith("https://www.neuronpedia.org/demo/0/") for link in links)
    assert links


def test_examples_on_a_card(study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents on which sae-lens finds the feature most active, with its activations there."""
    given: list[Material] = []
    monkeypatch.setattr("featpatch.reporting.report.page_of", lambda _, material, components: given.append(material) or "")
    texts = fp.load_demo().text()[:20]
    known = {name: study[name] for name in ("model", "pairs", "saes")}
    fp.report(study["effects"], tmp_path / "r.html", top=3, texts=texts, **known)
    model = study["model"]
    node, card = next((n, c) for n, c in given[0].features.items() if c.examples)
    sae = next(sae for sae in study["saes"] if sae.cfg.metadata.hook_name == node.sae)
    peaks = []
    for text in texts:
        tokens = model.to_tokens(text)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
            values = sae.encode(cache[node.site])[0, :, node.index]
        peaks.append(float(values[tokens[0] != model.tokenizer.bos_token_id].max()))
    assert [max(values) for _, values in card.examples] == pytest.approx(
        sorted(peaks, reverse=True)[: len(card.examples)], abs=1e-4
    )


@pytest.fixture(scope="module")
def written(study: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all that the command line gives."""
    path = tmp_path_factory.mktemp("written") / "r.html"
    return fp.report(study["effects"], path, curve=study["curve"], **{k: study[k] for k in ("model", "pairs", "saes")})


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_widths(written: Path, browser: Any, width: int) -> None:
    """Neither the page nor a table or chart in it is wider than the window."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
    )
    try:
        opened(browser, written, 1280)
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        script = (
            "return [...document.querySelectorAll('body *:not(svg *)')].filter(e => e.checkVisibility() &&"
            "e.getBoundingClientRect().right > arguments[0] + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert browser.execute_script(script, width) == []
        assert errors(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_first_screen(study: dict[str, Any], written: Path, browser: Any) -> None:
    """The conclusion, both values of the metric and the chart, whose ends of intervals are those of the table."""
    opened(browser, written)
    bottom = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    for part in ("p.answer", "dl.figures", "#answer figure.bars"):
        assert 0 < browser.execute_script(bottom, part) <= 1000
    effects = study["effects"]
    shown = browser.find_element("id", "answer").text
    assert f"{effects.clean.mean():.3g}" in shown
    assert f"{effects.corrupted.mean():.3g}" in shown
    frame = effects.take(effects.ranked).to_pandas()
    frame["size"] = frame[["recovery", "degradation"]].abs().max(axis=1)
    order = frame.sort_values("size", ascending=False, kind="stable").head(10)
    names = browser.execute_script("return [...document.querySelectorAll('#answer .bar .name')].map(n => n.innerText)")[:-1]
    assert [name.split("#")[1] for name in names] == [f"{row['index']} @ {row['position']}" for _, row in order.iterrows()]
    ends = browser.execute_script(
        "return [...document.querySelectorAll('#answer .whisker')].map(l => [l.getAttribute('x1'), l.getAttribute('x2')])"
    )
    drawn = np.array([[float(end.rstrip("%")) for end in pair] for pair in ends])
    wanted = np.array([[row[f"{e}_low"], row[f"{e}_high"]] for _, row in order.iterrows() for e in ("recovery", "degradation")])
    slope, offset = np.polyfit(wanted.ravel(), drawn.ravel(), 1)
    np.testing.assert_allclose(drawn, slope * wanted + offset, atol=0.02)
    assert slope > 0


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = colour => {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = e => { while (e && rgb(getComputedStyle(e).backgroundColor)[3] < 255) e = e.parentElement; return e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255]; };
return [...document.querySelectorAll("h1, h2, h3, h4, p, li, dt, dd, a, span, td, th, .chart text")].filter(e => e.checkVisibility() && e.textContent.trim()
    && !e.closest(".disabled") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const style = getComputedStyle(e), one = light(rgb(e.closest("svg") ? style.fill : style.color).slice(0, 3)), other = light(behind(e).slice(0, 3));
  return [(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), e.outerHTML.slice(0, 90)];
}).sort((a, b) => a[0] - b[0]).slice(0, 3);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(written: Path, browser: Any, scheme: str) -> None:
    """Every text has the contrast that WCAG 2 AA asks for, 4.5 : 1, in both colour schemes, which differ."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        opened(browser, written)
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        worst = browser.execute_script(CONTRASTS)
        assert worst
        assert worst[0][0] >= 4.5, worst
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_conclusion_is_the_tables(study: dict[str, Any]) -> None:
    """The count, the strongest row and its numbers, from the data frame."""
    effects = study["effects"]
    frame = effects.take(effects.ranked).to_pandas()
    both = frame[frame["quadrant"] == "both directions"]
    best = both.loc[both[["recovery", "degradation"]].abs().max(axis=1).idxmax()]
    said = concluded(effects, strongest(effects)).answer.replace("\N{NO-BREAK SPACE}", " ")
    assert said.startswith(
        f"{len(both)} of {len(frame):,} features are both sufficient and necessary for part of the behaviour."
    )
    assert f"#{best['index']} @ {best['position']}: alone it brings back {100 * best['recovery']:.2g} % [" in said
    assert f"without it {100 * best['degradation']:.2g} % [" in said


@pytest.mark.extended
def test_what_is_not_decided_is_not_concluded(study: dict[str, Any], small: Small, tmp_path: Path) -> None:
    """A strict threshold, one pair, one direction, estimates, a screened table, and no gap each say so."""
    effects = study["effects"]

    def said_of(table: fp.Effects) -> Conclusion:
        return concluded(table, strongest(table))

    strict = said_of(effects.with_threshold(0.99))
    assert strict.answer.startswith("No single feature of ")
    assert "is shown to be both sufficient and necessary by 6 pairs. The largest effect is that of L" in strict.answer
    single = said_of(effects.of_pairs([0]))
    assert single.answer.startswith("No single feature")
    assert "[" not in single.answer
    assert any("single pair gives no interval" in caveat for caveat in single.caveats)
    assert any("estimates from gradients" in caveat for caveat in said_of(study["estimate"]).caveats)
    equal = replace(effects, corrupted=effects.clean.copy(), denoised=effects.denoised * 0, taken_from=None)
    assert "there is no behaviour to attribute" in said_of(equal).answer
    known = {name: study[name] for name in ("model", "pairs", "saes")}
    assert "there is no behaviour to attribute" in fp.report(equal, tmp_path / "equal.html", **known).read_text()
    options: dict[str, Any] = {"positions": "each", "progress": False}
    one = fp.rank_features(small.model, small.at(SITE), pairs_of(small), directions=["noising"], **options)
    said = said_of(one)
    assert "brings back" not in said.answer
    assert any(caveat.startswith("Only one direction was run") for caveat in said.caveats)
    screened = fp.rank_features(small.model, small.at(SITE), pairs_of(small), screen=fp.Screen(k=8, audit=4), **options)
    assert any(caveat.startswith("8 of ") for caveat in said_of(screened).caveats)
    assert "of the features that were run" in said_of(screened).answer


def test_short_names() -> None:
    """As a person would write them; an SAE is named only where two write to one hook point."""
    post = "blocks.3.hook_resid_post"
    nodes = [
        fp.Node(post, "feature", 160, "end", post), fp.Node(post, "error", None, "end", post), fp.Node(post, "activation", None, 3),
        fp.Node("blocks.1.attn.hook_z", "head", 5, "S2"), fp.Node("blocks.0.hook_mlp_out", "feature", 1, "all", "other"),
    ]  # fmt: skip
    assert short_names(nodes) == ["L3 resid_post #160 @ end", "L3 resid_post error term @ end", "L3 resid_post @ 3",
                                  "L1 head 5 @ S2", "L0 mlp_out #1"]  # fmt: skip
    second = fp.Node(post, "feature", 160, "end", "wide")
    assert short_names([nodes[0], second]) == [f"L3 resid_post #160 of {post} @ end", "L3 resid_post #160 of wide @ end"]
    assert short_names([second], among=nodes) == ["L3 resid_post #160 of wide @ end"]


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
    titles = [EVIL + '"']
    prompt = PairText([EVIL], [EVIL], ([True], [True]), (titles, titles), [EVIL], [EVIL])
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
    total = sum(np.nansum(np.array(trace.z, dtype=float)) for trace in maps.data)
    assert total == pytest.approx(features.pooled("recovery").sum())
    assert maps.data[0].z[0][0] == pytest.approx(
        features.where(site="blocks.0.hook_resid_pre", position="S2").pooled("recovery").sum()
    )


@pytest.mark.extended
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
            "differs from that of the effects",
        ),
        (lambda: fp.report(effects, tmp_path / "r", texts=["a"]), "texts without saes: expected SAEs"),
        (
            lambda: fp.report(effects, tmp_path / "r", model=model, pairs=pairs, saes=study["saes"], texts="text"),
            "texts is a str: expected a list of at least one text",
        ),
        (lambda: effects.plot.heatmap(kind="neuron"), "no row of kind 'neuron': expected one of"),
        (lambda: effects.with_threshold(3.0), "threshold=3.0: expected a number between 0 and 1"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def test_a_grid_has_empty_cells_where_nothing_is_known() -> None:
    table = grid([[1.0, None], [float("nan"), float("inf")]], ["a", "b"], ["c", "d"], title="")
    assert str(table).count('class="none"') == 3


def test_cards_without_writers(study: dict[str, Any], tmp_path: Path) -> None:
    """Of transcoders, and of the rows of some pairs, no writers are known: the cards leave them out."""
    demo, pairs, options = fp.load_demo(), study["pairs"], {"positions": ["S2"], "progress": False}
    transcoder = demo.transcoders[1]
    crosscoder = demo.crosscoder
    components = fp.rank_components(study["model"], pairs, sites="z", **options)
    for effects, saes in (
        (fp.rank_features(study["model"], transcoder, pairs, **options), transcoder),
        (fp.rank_features(study["model"], crosscoder, pairs, **options), crosscoder),
        (study["effects"].of_pairs([0, 1]), study["saes"]),
    ):
        page = fp.report(
            effects, tmp_path / "r.html", model=study["model"], pairs=pairs, saes=saes, components=components
        ).read_text()
        assert "change written by" not in page


def test_named_nodes_have_no_section_of_whole_activations(study: dict[str, Any], tmp_path: Path) -> None:
    nodes = study["effects"].top(3, kind="feature").nodes
    table = fp.rank_nodes(study["model"], study["pairs"], list(nodes), saes=study["saes"], progress=False)
    assert "Whole activation, features, error" in fp.report(study["effects"].top(5), tmp_path / "part.html").read_text()
    assert "Whole activation, features, error" not in fp.report(table, tmp_path / "nodes.html").read_text()
