"""What ships: the checkpoints, their headline numbers, the command line, the wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file

import featpatch as fp
from featpatch import checkpoints
from featpatch.checkpoints import Demo

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fp.load_demo()


@pytest.fixture(scope="module")
def shipped(demo: Demo) -> dict[str, fp.Pairs]:
    """All pairs of each task."""
    return {task: demo.pairs(task, n=256) for task in checkpoints.TASKS}


def test_every_site_of_the_issue_is_there(demo: Demo) -> None:
    hooks = {sae.cfg.metadata.hook_name for sae in demo.saes}
    layers = demo.model.cfg.n_layers
    assert {f"blocks.{layer}.hook_resid_pre" for layer in range(layers)} <= hooks
    assert f"blocks.{layers - 1}.hook_resid_post" in hooks
    assert any(hook.endswith("hook_mlp_out") for hook in hooks)
    assert any(hook.endswith("attn.hook_z") for hook in hooks)
    assert any(sae.cfg.metadata.hook_name_out for sae in demo.saes)


def test_headline_numbers(demo: Demo) -> None:
    """What the README and the cards say of indirect objects, measured again."""
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in ("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")]
    effects = fp.rank_features(demo.model, saes, demo.pairs("ioi"), positions=["S2", "end"], progress=False)
    assert effects.clean.mean() == pytest.approx(11.40, abs=0.01)
    assert effects.corrupted.mean() == pytest.approx(-11.19, abs=0.01)
    sites = effects.sites().set_index(["site", "position"])
    for effect in ("recovery", "degradation"):
        whole = sites[f"{effect}_activation"]
        assert whole["blocks.1.hook_resid_pre", "S2"] == pytest.approx(1, abs=0.01)
        assert whole["blocks.1.hook_resid_pre", "end"] == pytest.approx(0, abs=0.01)
        assert whole["blocks.3.hook_resid_post", "end"] == pytest.approx(1, abs=1e-5)
        assert sites[f"{effect}_all_features"]["blocks.3.hook_resid_post", "end"] == pytest.approx(1, abs=0.015)
    first = effects.top(1)
    assert str(first.nodes[0]) == "blocks.3.hook_resid_post feature 160 @ end"
    assert (first.pooled("recovery")[0], first.pooled("degradation")[0]) == pytest.approx((0.09, 0.09), abs=0.005)
    assert effects.finished


@pytest.mark.extended
def test_the_shipped_model_does_its_tasks(demo: Demo, shipped: dict[str, fp.Pairs]) -> None:
    for task, least in (("ioi", 0.99), ("capitals", 0.95)):
        right: list[bool] = []
        for length in {len(pair) for pair in shipped[task]}:
            alike = [pair for pair in shipped[task] if len(pair) == length]
            with torch.no_grad():
                best = demo.model(torch.tensor([pair.clean for pair in alike]))[:, -1].argmax(-1).tolist()
            right += [token == pair.correct[0] for token, pair in zip(best, alike, strict=True)]
        assert sum(right) / len(shipped[task]) > least, task
    cards = json.loads((demo.folder / "model" / "measurements.json").read_text())
    assert len(cards["seeds"]) == 3
    for path in [path for kind in ("saes", "transcoders") for path in (demo.folder / kind).glob("*/measurements.json")]:
        least = 0.95 if "resid" in path.parent.name else 0.9
        assert json.loads(path.read_text())["explained_variance"] > least, path


def test_the_folder_is_small_and_has_cards(demo: Demo) -> None:
    files = [path for path in demo.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    cards = [demo.folder / name for name in ("model", "clt", "crosscoder")]
    cards += [path for kind in ("saes", "transcoders") for path in (demo.folder / kind).iterdir() if path.is_dir()]
    assert len(cards) == 3 + 8 + 3
    assert all((folder / "README.md").is_file() for folder in cards)
    named = set(json.loads((demo.folder / "digests.json").read_text()))
    written = {path.relative_to(demo.folder).as_posix() for path in files if path.name not in ("README.md", "digests.json")}
    assert named == written


def test_further_dictionaries_are_loaded_when_used(demo: Demo) -> None:
    """They are not among the SAEs, on whose list tests and documentation rely."""
    fresh = Demo(demo.model, demo.saes, None, demo.folder)
    assert not {"transcoders", "clt", "crosscoder"} & set(vars(fresh))
    layers = range(demo.model.cfg.n_layers)
    mlps = [f"blocks.{layer}.mlp.hook_in" for layer in layers], [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    found = [sae.cfg.metadata for sae in fresh.transcoders]
    assert ([each.hook_name for each in found], [each.hook_name_out for each in found]) == mlps
    assert fresh.transcoders[0] in fresh.saes
    assert len(fresh.saes) == 8
    assert (list(fresh.clt.hook), list(fresh.clt.hook_out)) == mlps
    stream = [f"blocks.{layer}.hook_resid_pre" for layer in layers] + [f"blocks.{len(layers) - 1}.hook_resid_post"]
    assert list(fresh.crosscoder.hook) == list(fresh.crosscoder.hook_out) == stream
    assert fresh.clt is fresh.clt
    assert {each.parts[0].W_enc.dtype for each in (fresh.clt, fresh.crosscoder)} == {torch.float32}


def clt_by_hand(folder: Path, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What a cross-layer transcoder makes of the inputs, from its files alone, and whether each feature is on."""
    made, on = [torch.zeros(1)] * len(x), []
    for layer, values in enumerate(x):
        held = load_file(folder / f"W_enc_{layer}.safetensors") | load_file(folder / f"W_dec_{layer}.safetensors")
        w = {name.rsplit("_", 1)[0]: tensor.float() for name, tensor in held.items()}
        pre = values @ w["W_enc"].T + w["b_enc"]
        features = pre * (pre > w["threshold"])
        on.append(features > 0)
        made[layer] = made[layer] + w["b_dec"]
        for above in range(layer, len(x)):
            made[above] = made[above] + features @ w["W_dec"][:, above - layer]
    return made, torch.cat(on, dim=-1)


def crosscoder_by_hand(folder: Path, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same of a crosscoder."""
    w = {name: tensor.float() for name, tensor in load_file(folder / "crosscoder.safetensors").items()}
    pre = w["b_enc"] + sum(values @ w["W_enc"][n] for n, values in enumerate(x))
    features = pre * (pre > w["threshold"])
    return [features @ w["W_dec"][m] + w["b_dec"][m] for m in range(len(x))], features > 0


@pytest.mark.parametrize("name", ["clt", "crosscoder"])
def test_what_the_cards_say_of_dictionaries_over_several_layers(demo: Demo, name: str) -> None:
    """On a part of the held-out text, from the tensors in the files."""
    by_hand = {"clt": clt_by_hand, "crosscoder": crosscoder_by_hand}[name]
    settings = json.loads((demo.folder / name / "training.json").read_text())["settings"]
    measured = json.loads((demo.folder / name / "measurements.json").read_text())
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for text in demo.text()[:60]:
        wanted = {*settings["reads"], *settings["writes"]}
        _, cache = demo.model.run_with_cache(demo.model.to_tokens(text), names_filter=list(wanted), return_type=None)
        inputs.append(torch.stack([cache[hook][0, 1:] for hook in settings["reads"]]))
        outputs.append(torch.stack([cache[hook][0, 1:] for hook in settings["writes"]]))
    x, y = torch.cat(inputs, dim=1), torch.cat(outputs, dim=1)
    made, on = by_hand(demo.folder / name, list(x))
    assert on.shape[1] == measured["features"]
    assert on.sum(1).float().mean().item() == pytest.approx(measured["l0"], rel=0.05)
    assert list(measured["hook_points"]) == settings["writes"]
    for m, (hook, said) in enumerate(measured["hook_points"].items()):
        left, whole = (y[m] - made[m]).pow(2).sum(), (y[m] - y[m].mean(0)).pow(2).sum()
        assert 1 - (left / whole).item() == pytest.approx(said["explained_variance"], abs=0.015), hook
        assert said["explained_variance"] > (0.95 if "resid" in hook else 0.9), hook


def test_headline_numbers_of_the_cross_layer_transcoder(demo: Demo) -> None:
    """All its features together do nearly what the MLPs do, and the strongest is active on late start years."""
    positions = {"ioi": ["S2"], "greater_than": ["start_year", "end"]}
    for task, where in positions.items():
        pairs = demo.pairs(task, n=4)
        effects = fp.rank_features(demo.model, demo.clt, pairs, positions=where, directions=["denoising"], progress=False)
        sites = effects.sites()
        together = sites[sites["site"].str.endswith("together")]
        assert len(together) == len(where)
        assert together["recovery_activation"].min() > 0.9
        assert (together["recovery_all_features"] - together["recovery_activation"]).abs().max() < 0.04
    first = effects.top(1).nodes[0]
    assert (first.index, first.position) == (104, "start_year")
    described = fp.max_activating(demo.model, demo.clt, [first], demo.text()[:120])[first]
    years = [int(token) for token in re.findall(r"\[(\d\d)\]", " ".join(described.contexts))]
    assert years
    assert min(years) > 50


def test_pairs_are_drawn_by_a_seed(demo: Demo) -> None:
    """Some of a task's pairs, the same ones by the same seed, as the whole file has them."""
    pairs, again, others = (demo.pairs("ioi", n=64, seed=seed) for seed in (1, 1, 2))
    assert pairs == again
    assert pairs != others
    whole = fp.Pairs.from_jsonl(demo.model, demo.folder / "pairs" / "ioi.jsonl")
    assert all(pair in whole.pairs for pair in pairs)


@pytest.mark.extended
@pytest.mark.parametrize("task", checkpoints.TASKS)
def test_no_pair_is_shipped_twice(shipped: dict[str, fp.Pairs], task: str) -> None:
    pairs = shipped[task]
    assert len({(pair.clean, pair.corrupted) for pair in pairs}) == 256
    assert all("end" in pair.labels and pair.special == {0} for pair in pairs)


TAGS: dict[str, dict[str, set[str]]] = {
    "ioi": {"template": set(map(str, range(10))), "gift": set(map(str, range(12))), "order": {"ABBA", "BABA"}},
    "capitals": {"template": {f"sentence_{n}" for n in range(5)} | {f"story_{n}" for n in range(4)}},
    "greater_than": {"template": set(map(str, range(6)))},
    "sentiment": {"template": set(map(str, range(4))), "verdict": {"praise", "blame"}},
}


@pytest.mark.extended
@pytest.mark.parametrize("task", checkpoints.TASKS)
def test_pairs_say_what_they_were_made_by(shipped: dict[str, fp.Pairs], task: str) -> None:
    pairs = shipped[task]
    assert {name: {pair.tags[name] for pair in pairs} for name in TAGS[task]} == TAGS[task]
    assert all(pair.tags["task"] == task and set(pair.tags) == {"task", "corruption", *TAGS[task]} for pair in pairs)


@pytest.mark.extended
def test_tags_are_true(demo: Demo, shipped: dict[str, fp.Pairs]) -> None:
    """Read off the prompts themselves."""
    for pair in shipped["ioi"]:
        assert pair.tags["order"] == ("ABBA" if pair.labels["IO"] < pair.labels["S1"] else "BABA")
        assert pair.tags["corruption"] == "swap_s2"
        changed = [p for p, (one, other) in enumerate(zip(pair.clean, pair.corrupted, strict=True)) if one != other]
        assert changed == [pair.labels["S2"]]
        clean = demo.model.tokenizer.decode(pair.clean)
        assert (pair.tags["gift"] == "6") == ("said hello to" in clean)
        assert (pair.tags["template"] == "1") <= ("orking at the" in clean)
    for pair in shipped["capitals"]:
        story = "there is" in demo.model.tokenizer.decode(pair.clean)
        assert pair.tags["template"].startswith("story" if story else "sentence")
    for pair in shipped["sentiment"]:
        right = demo.model.tokenizer.decode(list(pair.correct))
        assert (pair.tags["verdict"] == "praise") == (right in ("good", "positive"))
        assert (pair.tags["template"] in "01") == (right in ("good", "bad"))


def test_effects_by_tag_of_the_shipped_pairs(demo: Demo) -> None:
    sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post")
    pairs = demo.pairs("ioi", n=8)
    effects = fp.rank_features(demo.model, sae, pairs, positions=["end"], progress=False)
    for tag in ("template", "order"):
        values = {pair.tags[tag] for pair in pairs}
        assert {f"recovery_{value}" for value in values} <= set(effects.by_tag(tag, "recovery").columns)


def test_pairs_that_are_not_there(demo: Demo) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"task 'induction' is unknown: expected one of capitals"):
        demo.pairs("induction")
    with pytest.raises(fp.FeatpatchError, match=r"n=100000 pairs of 'ioi': expected an integer from 1 to \d+"):
        demo.pairs(n=100_000)
    with pytest.raises(fp.FeatpatchError, match=r"n=0 pairs"):
        demo.pairs(n=0)


def test_a_damaged_or_missing_checkpoint_is_refused(demo: Demo, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(demo.folder, copy)
    checkpoints.verify(copy)
    weights = copy / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(fp.FeatpatchError, match=r"model.safetensors' has SHA-256 .*damaged, restore"):
        checkpoints.verify(copy)
    weights.unlink()
    with pytest.raises(fp.FeatpatchError, match=r"model.safetensors' is missing: expected .* restore"):
        checkpoints.verify(copy)


def test_rank_on_the_command_line_equals_the_library(demo: Demo, tmp_path: Path) -> None:
    lines = (demo.folder / "pairs" / "capitals.jsonl").read_text().splitlines()[:3]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    site = f"blocks.{demo.model.cfg.n_layers - 1}.hook_resid_post"
    done = run(
        "rank", "--model", demo.folder / "model", "--sae", demo.folder / "saes" / site, "--pairs", "pairs.jsonl",
        "--positions", "end", "--direction", "denoising", "--out", "results", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    effects = fp.Effects.load(tmp_path / "results" / "effects.safetensors")
    pairs = fp.Pairs.from_jsonl(demo.model.tokenizer, tmp_path / "pairs.jsonl")
    sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == site)
    again = fp.rank_features(demo.model, sae, pairs, positions=["end"], directions=["denoising"])
    assert again.nodes == effects.nodes
    assert abs(again.pooled("recovery") - effects.pooled("recovery")).max() < 1e-5
    assert again.metadata["model"]["sha256"] == effects.metadata["model"]["sha256"]
    for text in ("exact", "resid_post", "wrote effects.safetensors"):
        assert text in done.stdout
    assert (tmp_path / "results" / "effects.csv").read_text().startswith("site,kind,index")
    text = (tmp_path / "results" / "report.html").read_text()
    for part in ("<html", 'id="question"', 'id="card-1"', f"#{effects.top(1).nodes[0].index} @ end"):
        assert part in text
    written = run("report", "results/effects.safetensors", "--out", "alone.html", folder=tmp_path)
    assert "wrote alone.html" in written.stdout, written.stderr
    alone = (tmp_path / "alone.html").read_text()
    assert 'id="ranking"' in alone
    assert 'id="question"' not in alone


def test_answers_of_several_tokens_on_the_command_line(demo: Demo, tmp_path: Path) -> None:
    """With the words that follow the answer; both metrics of whole answers in one table."""
    lines = [json.loads(line) for line in (demo.folder / "pairs" / "capitals.jsonl").read_text().splitlines()[:2]]
    longer = [{**line, "correct": line["correct"] + " .", "wrong": line["wrong"] + " ."} for line in lines]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, longer)))
    site, metrics = "blocks.1.hook_resid_pre", ("sequence_log_prob_diff", "sequence_log_prob")
    checked = run(
        "check", "--pairs", "pairs.jsonl", "--model", demo.folder / "model", "--metric", metrics[0], folder=tmp_path
    )  # fmt: skip
    assert "checklist of 2 pairs" in checked.stdout, checked.stderr
    done = run(
        "rank", "--model", demo.folder / "model", "--sae", demo.folder / "saes" / site, "--pairs", "pairs.jsonl",
        "--positions", "subject", "--metric", metrics[0], "--metric", metrics[1], folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    effects = fp.Effects.load(tmp_path / "featpatch-out" / "effects.safetensors")
    assert effects.metrics == list(metrics)
    pairs = fp.Pairs.from_jsonl(demo.model.tokenizer, tmp_path / "pairs.jsonl", long_answers=True)
    assert {len(answer) for pair in pairs for side in pair.answers for answer in side} == {2}
    assert pairs.check(demo.model).clean == pytest.approx(effects.clean.tolist(), abs=1e-4)
    for name in metrics:
        assert f"metric {name}: clean" in done.stdout
    assert f"{metrics[1]}_recovery" in (tmp_path / "featpatch-out" / "effects.csv").read_text().splitlines()[0]


def test_plan_and_journal_on_the_command_line(demo: Demo, tmp_path: Path) -> None:
    lines = (demo.folder / "pairs" / "ioi.jsonl").read_text().splitlines()[:2]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    options = [
        "--model", demo.folder / "model", "--sae", demo.folder / "saes" / "blocks.1.hook_resid_pre", "--pairs", "pairs.jsonl",
        "--positions", "S2",
    ]  # fmt: skip
    planned = run("plan", *options, folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    for text in ("estimated cost of the sweep", "patches (one exact run each)", "floating-point operations", "MiB", "fast"):
        assert text in planned.stdout
    first = run("rank", *options, "--journal", "journal", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    size = (tmp_path / "journal").stat().st_size
    again = run("rank", *options, "--journal", "journal", folder=tmp_path)
    assert again.stdout == first.stdout
    assert (tmp_path / "journal").stat().st_size == size
    screened = run("rank", *options, "--screen", "--k", "10", "--audit", "5", "--target", "0.01", "--out", "screened",
                   folder=tmp_path)  # fmt: skip
    assert screened.returncode == 0, screened.stderr
    assert "All 10 candidates" in " ".join(screened.stdout.split()) or "confidence each: at least" in " ".join(
        screened.stdout.split()
    )
    assert re.search(r"estimates, then (all|200 \+ \d+ of) \d+ features", planned.stdout)
    other = run("rank", *options, "--journal", "journal", "--direction", "noising", "--out", "other", folder=tmp_path)
    assert other.returncode == 2
    assert "belongs to another sweep: directions differ" in other.stderr.replace("\n", " ")


def by_hand(demo: Demo, pairs: fp.Pairs, first: fp.Node, features: list[int]) -> tuple[float, float]:
    """Recovery and degradation of features that are patched together, one pair after the other."""
    gap, gained, lost = 0.0, 0.0, 0.0
    for pair in pairs:
        (at,) = pair.positions(first.position)
        patch = fp.Patch(tuple(fp.Node(first.site, "feature", index, at, first.sae) for index in features))
        clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])

        def metric(tokens: torch.Tensor, pair: fp.Pair = pair) -> float:
            with torch.no_grad():
                logits = demo.model(tokens)[0, -1].double()
            return float(logits[list(pair.correct)].mean() - logits[list(pair.wrong)].mean())

        ends = metric(clean), metric(corrupted)
        gap += ends[0] - ends[1]
        with fp.do(demo.model, patch, source=clean, base=corrupted, saes=demo.saes):
            gained += metric(corrupted) - ends[1]
        with fp.do(demo.model, patch, source=corrupted, base=clean, saes=demo.saes):
            lost += ends[0] - metric(clean)
    return gained / gap, lost / gap


OTHERS = [pytest.param(task, marks=pytest.mark.extended) for task in checkpoints.TASKS if task != "sentiment"]


@pytest.mark.parametrize("task", ["sentiment", *OTHERS])
def test_the_demo_command_begins_with_a_conclusion(demo: Demo, task: str, tmp_path: Path) -> None:
    """What it says of the features that it chose is what a patch of all of them does, by `fp.do`; in at most 100 columns."""
    done = run("demo", "--task", task, "--pairs", "2", "--top", "3", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    paragraphs = [" ".join(part.split()) for part in done.stdout.split("\n\n")]
    assert paragraphs[0].startswith("loading the demo model and its SAEs, drawing 2 pairs of")
    told = re.match(
        r"(\d+) features? at (.+?) @ (\w+)(?: \(after the last layer\))? brings? back (\d+) %.* and (\d+) % .* of it is lost",
        paragraphs[1],
    )
    assert told, paragraphs[1]
    effects = fp.Effects.load(tmp_path / "featpatch-demo" / "effects.safetensors")
    first = effects.top(1).nodes[0]
    assert (told[2].split()[-1], told[3]) == (first.sae.split("hook_")[-1], first.position)
    steps = next(part for part in paragraphs if part.startswith("features needed to bring back 80%"))
    shown = [int(index) for index in re.findall(r"(\d+) \(", steps)]
    pairs = demo.pairs(task, n=2)
    if len(shown) == int(told[1]):
        recovery, degradation = by_hand(demo, pairs, first, shown)
        assert float(told[4]) == pytest.approx(100 * recovery, abs=0.51)
        assert float(told[5]) == pytest.approx(100 * degradation, abs=0.51)
    assert "short of 80%" in told[0] or int(told[4]) >= 80
    rows = [line for line in done.stdout.splitlines() if re.match(r"L\d \S+", line) and ":" not in line]
    assert [int(re.split(r"\s{2,}", line)[1]) for line in rows] == [node.index for node in effects.top(3).nodes]
    assert "exact effects of 3 nodes" in done.stdout
    assert "blocks." not in done.stdout
    assert "  featpatch rank --help" in done.stdout
    assert {path.name for path in (tmp_path / "featpatch-demo").iterdir()} == {
        "effects.safetensors",
        "effects.csv",
        "report.html",
    }


@pytest.mark.extended
@pytest.mark.filterwarnings("default:token index 0 has no rows")
def test_the_demo_command_at_positions_without_a_difference(tmp_path: Path) -> None:
    done = run("demo", "--task", "capitals", "--pairs", "2", "--positions", "0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No feature differs between the runs at these positions" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "missing.jsonl"], "error: there is no file 'missing.jsonl'"),
        (["--sae", "nowhere"], "error: there is no SAE 'nowhere': expected a folder with cfg.json"),
        (["--model", "nowhere"], "error: the model 'nowhere' can't be loaded"),
        (["--positions", "S9"], "error: --positions S9: "),
        (["--metric", "vibes"], "error: --metric vibes: expected one of logit_diff"),
    ],
)
def test_errors_on_the_command_line_are_one_line(demo: Demo, tmp_path: Path, arguments: list[str], message: str) -> None:
    line = json.loads((demo.folder / "pairs" / "ioi.jsonl").read_text().splitlines()[0])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    options = {
        "--model": demo.folder / "model",
        "--sae": demo.folder / "saes" / "blocks.1.hook_resid_pre",
        "--pairs": "pairs.jsonl",
    }
    options |= {arguments[0]: arguments[1]}
    done = run("rank", *[part for option in options.items() for part in option], folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_package_and_the_checkpoints(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "featpatch", "checkpoints"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    present = [name for name in tracked if (REPOSITORY / name).exists()]
    assert {re.sub("^checkpoints/", "featpatch/_checkpoints/", name) for name in present} <= held


@pytest.mark.extended
def test_the_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    program = (
        "import featpatch as fp; demo = fp.load_demo(); print(demo.folder); "
        "print(len(fp.rank_features(demo.model, demo.saes[1], demo.pairs(n=1), progress=False)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    folder, rows = done.stdout.split()[-2:]
    assert folder == str(tmp_path / "installed" / "featpatch" / "_checkpoints")
    assert int(rows) > 3


def test_what_a_feature_of_a_higher_layer_is_active_on(demo: Demo) -> None:
    """Examples, active features and cards of features of any layer are those of that layer, not of the same index below."""
    layer, text = 2, demo.text()[0]
    _, cache = demo.model.run_with_cache(demo.model.to_tokens(text))
    held = load_file(demo.folder / "clt" / f"W_enc_{layer}.safetensors")
    w = {name.rsplit("_", 1)[0]: tensor.float() for name, tensor in held.items()}
    pre = cache[f"blocks.{layer}.mlp.hook_in"][0, 1:] @ w["W_enc"].T + w["b_enc"]
    peaks = (pre * (pre > w["threshold"])).max(0).values
    index = int(peaks.argmax())
    node = fp.feature(demo.clt, index, layer=layer)
    with pytest.warns(UserWarning, match="too little text"):
        described = fp.max_activating(demo.model, demo.clt, [node], [text])[node]
    assert described.examples[0].value == pytest.approx(float(peaks[index]), abs=1e-4)
    table = fp.active_features(demo.model, demo.clt, text, per_token=40)
    row = table.query(f"site == 'blocks.{layer}.hook_mlp_out' and feature == {index}").sort_values("value").iloc[-1]
    assert row["value"] == pytest.approx(float(peaks[index]), abs=1e-4)
