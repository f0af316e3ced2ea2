"""Text of users and of foreign files: what it may do to a terminal, a spreadsheet and a figure, and what results say of a user."""

import ast
import csv
import json
import warnings
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from commands import run

import featpatch as fp
from featpatch.errors import FeatpatchWarning
from featpatch.pairs.checklist import Finding
from featpatch.patching.curves import Curve

FORMULA = "=HYPERLINK(0)"


@pytest.fixture(scope="module")
def inputs() -> dict[str, Path]:
    folder = fp.load_demo().folder
    return {"model": folder / "model", "sae": folder / "saes" / "blocks.3.hook_resid_post"}


def pairs_file(folder: Path, label: str, **tags: str) -> Path:
    """Two pairs whose answer has this label; and these tags."""
    lines = (fp.load_demo().folder / "pairs" / "capitals.jsonl").read_text().splitlines()[:2]
    pairs = [json.loads(line) for line in lines]
    for pair in pairs:
        pair["labels"][label] = pair["labels"].pop("end")
        pair["tags"] = {**pair["tags"], **tags}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder / "pairs.jsonl"


def number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_no_cell_of_a_csv_is_a_formula(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is one is text; numbers are those of the table, negative ones too."""
    pairs_file(tmp_path, FORMULA)
    options = ["--model", inputs["model"], "--pairs", "pairs.jsonl"]
    done = run("rank", *options, "--sae", inputs["sae"], "--positions", FORMULA, "--out", "r", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    detail = Finding
    monkeypatch.setattr("featpatch.pairs.checklist.Finding", lambda *given: detail(*given[:-1], "@SUM(1)"))
    run("check", *options, "--out", "found.csv", folder=tmp_path)
    for name, text in (("r/effects.csv", f"'{FORMULA}"), ("found.csv", "'@SUM(1)")):
        with (tmp_path / name).open(newline="") as file:
            cells = [value for row in csv.reader(file) for value in row]
        assert text in cells
        assert [value for value in cells if value[:1] in ("=", "+", "-", "@") and not number(value)] == []
    table = fp.Effects.load(tmp_path / "r" / "effects.safetensors")
    with (tmp_path / "r" / "effects.csv").open(newline="") as file:
        written = [float(row["recovery"]) for row in csv.DictReader(file)]
    assert written == pytest.approx(table.pooled("recovery").tolist())
    assert min(written) < 0
    assert table.nodes[0].position == FORMULA


def test_results_say_how_they_were_made_and_not_by_whom(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """No folder of the user is in a table or its report; what repeats the run is."""
    pairs = pairs_file(tmp_path, "end")
    given = {"--model": inputs["model"], "--sae": inputs["sae"], "--positions": "end", "--pairs": pairs, "--top": "3"}
    out = f"--out={tmp_path / 'r'}"
    done = run("rank", *[part for option in given.items() for part in option], out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    made = fp.Effects.load(tmp_path / "r" / "effects.safetensors")
    assert made.metadata["command"] == (
        "featpatch rank --model model --sae blocks.3.hook_resid_post --positions end --pairs pairs.jsonl --top 3 --out=r"
    )
    assert made.metadata["model"]["name"] == "model"
    folders = (str(tmp_path), str(inputs["model"].parent))
    for name in ("effects.safetensors", "effects.csv", "report.html"):
        content = (tmp_path / "r" / name).read_bytes()
        assert not [folder for folder in folders if folder.encode() in content]
    assert fp.verify(made, fp.load(inputs["model"]).model, fp.Pairs.from_jsonl(fp.load_demo().model, pairs),
                     saes=fp.load_demo().saes, rows=3, progress=False).ok  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/home/u/bin/featpatch", "rank", "--sae", "gpt2-small-res-jb/blocks.8.hook_resid_pre", "--pairs", "../u/p.jsonl"],
         "featpatch rank --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs p.jsonl"),
        (["/u/featpatch/__main__.py", "rank", "--model=C:\\u\\m", "--out=/u/a=/u/b", "--address", "ray://u:secret@h:1"],
         "featpatch rank '--model=m' --out=b --address ..."),
        (["featpatch", "rank", "--address=ray://u:secret@h:1", "--json", "--workers", "2"],
         "featpatch rank --address=... --json --workers 2"),
        (["/home/u/study.py", "--token", "hf_secret", "hf_secret"], "study.py"),
    ],
)  # fmt: skip
def test_the_command_that_a_table_names(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from shlex import split

    monkeypatch.setattr("sys.argv", arguments)
    made: Any = fp.load_demo()
    effects = fp.rank_features(made.model, made.saes[0], made.pairs("capitals", n=1), progress=False)
    assert split(effects.metadata["command"]) == split(said)


STEERING = "\x1b[31m\x1b]8;;http://a\x07\x9b2J\u202e\u2066\x08\x00[/bold][red]:smile:"
STEERS = {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\x08", "\x00"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> Path:
    """A folder with pairs, effects and a report whose label and tags steer a terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    pairs_file(folder, STEERING, kind=STEERING)
    loaded = fp.load(inputs["model"], inputs["sae"], check=False)
    pairs = fp.Pairs.from_jsonl(loaded.model, folder / "pairs.jsonl")
    effects = fp.rank_features(*loaded, pairs, positions=[STEERING], progress=False)
    replace(effects, metadata={**effects.metadata, "note": STEERING}).save(folder / "effects.safetensors")
    fp.rank_components(loaded.model, pairs, positions=[STEERING], progress=False).save(folder / "components.safetensors")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "effects.safetensors"],
        ["compare", "effects.safetensors", "components.safetensors"],
        ["check", "--pairs", "pairs.jsonl", "--model", "{model}", "--sae", "{sae}"],
        ["check", "--pairs", "pairs.jsonl", "--model", "{model}", "--sae", "{sae}", "--json"],
        ["rank", "--pairs", "pairs.jsonl", "--model", "{model}", "--sae", "{sae}", "--out", "[x]", "--positions", STEERING],
        ["rank", "--pairs", STEERING.replace("\x00", ""), "--model", "{model}", "--sae", "{sae}", "--out", "x"],
        ["rank", "--pairs", "pairs.jsonl", "--model", "[/red]", "--sae", "{sae}"],
        ["rank", "--pairs", "pairs.jsonl", "--model", "{model}", "--sae", "{sae}", "--positions", "\x1b[31m"],
        ["report", "effects.safetensors", "--out", "[red][/x].html"],
        ["demo", "--task", STEERING],
        ["demo", f"--{STEERING}"],
        [f"--{STEERING}"],
        [STEERING],
    ],
    ids=lambda arguments: arguments[0][:9].strip("\x1b"),
)
def test_a_terminal_is_not_steered(hostile: Path, inputs: dict[str, Path], arguments: list[str]) -> None:
    """No command raises or prints what steers; markup is shown as it is."""
    done = run(*[argument.format(**inputs) for argument in arguments], folder=hostile)
    assert [sign for sign in STEERS if sign in done.stdout + done.stderr] == []
    said = "".join((done.stdout + done.stderr).split())
    for text in arguments:
        if "[" in text and "{" not in text and "\x1b" not in text:
            assert text in said
    if (STEERING in arguments and arguments[0] != "rank") or arguments[0] == "info":  # tables cut long labels off
        assert "[/bold][red]" in said.replace("\u2502", "")


def test_what_python_prints_does_not_steer(hostile: Path, inputs: dict[str, Path]) -> None:
    """Results, nodes and errors as text, and what `fp.load` returns."""
    model, sae = fp.load(inputs["model"], inputs["sae"], check=False)
    pairs = fp.Pairs.from_jsonl(model, hostile / "pairs.jsonl")
    effects, components = (fp.Effects.load(hostile / f"{name}.safetensors") for name in ("effects", "components"))
    options: dict[str, Any] = {"positions": [STEERING], "progress": False}
    estimates = fp.rank_features(model, sae, pairs, method="atp", **options)
    model.cfg.model_name = STEERING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the SAE may explain less than it claims
        loaded = fp.load(model, sae, pairs=pairs)
    with pytest.raises(fp.FeatpatchError) as error:
        raise fp.FeatpatchError(STEERING)
    verified = replace(fp.verify(effects, model, pairs, saes=sae, rows=1, progress=False), versions=(STEERING,))
    shown = [repr(loaded), repr(effects), repr(pairs), repr(fp.compare(effects, components)), str(effects.nodes[0]),
             repr(fp.calibrate(estimates, effects)), str(error.value),
             repr(fp.check(model, sae, pairs)), repr(verified)]  # fmt: skip
    assert [text for text in shown if STEERS & set(text)] == []
    assert all("\\x1b" in text for text in (shown[0], *shown[3:5], *shown[6:]))


LINK = "<a href='https://evil.example'>x</a><b>&lt;b&gt;"


def texts(content: Any) -> list[str]:
    """Every text in a figure's JSON."""
    if isinstance(content, dict):
        return [text for value in content.values() for text in texts(value)]
    return (
        [content]
        if isinstance(content, str)
        else [text for one in content for text in texts(one)]
        if isinstance(content, list)
        else []
    )


def figures(effects: fp.Effects, components: fp.Effects, estimates: fp.Effects) -> dict[str, Any]:
    """All kinds of a table whose names and labels are links."""
    features = effects.take(effects.ranked)
    drawn = fp.diagram.graph(features.nodes[:2], features.pooled("recovery")[:2].tolist())
    key = (features.nodes[0].sae, features.nodes[0].position)
    sets = replace(features.take([0]), nodes=(replace(features.nodes[0], kind="set", index=0),), taken_from=None)
    curve = Curve({key: [0]}, effects, sets, {key: [1]})
    return {
        "quadrants": effects.plot.quadrants(), "sites": effects.plot.sites(), "heatmap": effects.plot.heatmap(),
        "features": effects.plot.heatmap(kind="feature"), "comparison": fp.compare(effects, components).plot(),
        "calibration": fp.calibrate(estimates, effects).plot(), "curve": curve.plot(), "diagram": fp.diagram.figure(drawn),
    }  # fmt: skip


@pytest.fixture(scope="module")
def linked(inputs: dict[str, Path]) -> tuple[fp.Effects, fp.Effects, fp.Effects]:
    """Exact effects of features and of components, and estimates, with links in names and labels."""
    loaded, made = fp.load(inputs["model"], inputs["sae"], check=False), fp.load_demo()
    pairs = made.pairs("capitals", n=2)
    options: dict[str, Any] = {"positions": ["end"], "progress": False}
    tables = (fp.rank_features(*loaded, pairs, **options), fp.rank_components(loaded.model, pairs, sites=["resid_post"], **options),
              fp.rank_features(*loaded, pairs, method="atp", **options))  # fmt: skip
    return tuple(
        replace(t, nodes=tuple(replace(n, position=LINK, sae=n.sae and n.sae + LINK) for n in t.nodes)) for t in tables
    )  # type: ignore[return-value]


def test_no_figure_holds_a_link_of_others(linked: tuple[fp.Effects, fp.Effects, fp.Effects]) -> None:
    """Not even as text: what reaches Plotly shows as it was given, tags of ours (line ends) aside."""
    for name, figure in figures(*linked).items():
        found = [text for text in texts(json.loads(figure.to_json())) if "href" in text]
        assert found, name
        assert [text for text in found if "<a" in text or "<b>" in text] == [], name
        assert all("&amp;lt;b&amp;gt;" in text for text in found), name


def test_a_browser_shows_names_as_they_are(
    linked: tuple[fp.Effects, fp.Effects, fp.Effects], browser: Any, tmp_path: Path
) -> None:
    """No link but those of the page itself; the axis of the sites reads what the label says."""
    effects, components, _ = linked
    path = fp.report(effects, tmp_path / "links.html", components=components)
    browser.get(path.as_uri())
    ready = "return document.querySelectorAll('table.dataTable tbody tr').length > 0"
    for _ in range(600):
        if browser.execute_script(ready):
            break
        sleep(0.05)
    links = "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href') || '')"
    assert [link for link in browser.execute_script(links) if "evil" in link] == []
    ticks = browser.execute_script("return [...document.querySelectorAll('#sites .bar .name')].map(t => t.textContent)")
    assert any(LINK in tick for tick in ticks)


@pytest.mark.parametrize("name", ["javascript:alert(1)", "a\"onclick='x'<b>", "../..//evil.example", "x?y#z", ["a"], None])
def test_links_go_to_neuronpedia_alone(name: Any) -> None:
    """Whatever a foreign configuration says its identifier is."""
    from types import SimpleNamespace
    from urllib.parse import urlsplit

    from featpatch.reporting.report import _link

    source = SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(neuronpedia_id=name)))
    link = _link(source, fp.Node("blocks.0.hook_resid_post", "feature", 3))
    if not isinstance(name, str):
        assert link == ""
        return
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("https", "www.neuronpedia.org", "", "")
    assert not set(link) & set("\"'<> ")
    assert link.endswith("/3")


def test_warnings_do_not_steer_either() -> None:
    """All of ours are of a class that shows control characters escaped."""
    assert str(FeatpatchWarning("a\x1b[31mb")) == "a\\x1b[31mb"
    assert issubclass(fp.SlowPathWarning, FeatpatchWarning)
    for path in Path(fp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                assert ast.unparse(node.args[1]) in ("FeatpatchWarning", "PairsWarning", "SlowPathWarning"), path
