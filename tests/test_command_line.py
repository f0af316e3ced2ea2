"""Every command on small inputs: its files, its JSON, its exit codes, and a study that is written down."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import run, started
from safetensors.torch import load_file, save_file

import featpatch as fp
from featpatch.cli.app import app, in_options
from featpatch.cli.study import read
from featpatch.patching.study import Study

SITE = "blocks.3.hook_resid_post"
METADATA = {"metric": "logit_diff", "directions": ["denoising", "noising"]}
COMMANDS = (
    "demo",
    "rank",
    "components",
    "check",
    "plan",
    "compare",
    "report",
    "info",
    "run",
    "steer",
    "stream",
    "tasks",
    "verify",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three pairs, in which commands run."""
    path = tmp_path_factory.mktemp("study")
    lines = (fp.load_demo().folder / "pairs" / "capitals.jsonl").read_text().splitlines()[:3]
    (path / "pairs.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model() -> list[str]:
    return ["--model", str(fp.load_demo().folder / "model"), "--pairs", "pairs.jsonl", "--positions", "end"]


@pytest.fixture(scope="module")
def sae() -> list[str]:
    return ["--sae", str(fp.load_demo().folder / "saes" / SITE)]


def test_help(tmp_path: Path) -> None:
    text = run("--help", folder=tmp_path).stdout
    for command in COMMANDS:
        assert f" {command} " in text
    for command in COMMANDS:
        assert f"Example: featpatch {command}" in run(command, "--help", folder=tmp_path).stdout
    assert {info.name or info.callback.__name__ for info in app.registered_commands if info.callback} == set(COMMANDS)
    panels = re.findall(r"─ ([\w ]+) ─+╮(.*?)╰", text, re.DOTALL)
    commands = {title: set(re.findall(r"^│ (\w+) ", body, re.MULTILINE)) for title, body in panels}
    assert [title for title in commands if title != "Options"] == ["Start here", "Rank", "Inspect", "Scale"]
    assert commands["Start here"] == {"demo", "tasks", "check"}
    assert commands["Rank"] == {"rank", "components"}
    assert commands["Inspect"] == {"info", "report", "compare", "steer", "verify"}
    assert commands["Scale"] == {"plan", "stream", "run"}


def test_the_program_starts_without_the_models_libraries() -> None:
    """Help and refused options need none of them; they take seconds to import."""
    script = "import sys, featpatch.cli; print(sorted({'torch', 'transformer_lens', 'sae_lens', 'pandas', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_tasks(tmp_path: Path) -> None:
    """The list names every label that a drawn pair has; pairs are the library's, shown, written and as JSON."""
    demo = fp.load_demo()
    listed = json.loads(run("tasks", "--json", folder=tmp_path).stdout)
    assert [row["task"] for row in listed] == list(fp.tasks.TASKS)
    text = run("tasks", folder=tmp_path).stdout
    for row in listed:
        assert f"{row['task']}: {row['about']}" in " ".join(text.split())
        assert row["about"]
        drawn = fp.tasks.TASKS[row["task"]](demo.model, 3, seed=4)
        assert [label for label in drawn[0].labels if label not in row["labels"]] == []
        assert row["labels"].startswith("Labels: ")
        done = run("tasks", row["task"], "-n", "3", "--seed", "4", "--out", "pairs.jsonl", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "wrote 3 pairs to pairs.jsonl" in done.stdout
        assert fp.Pairs.from_jsonl(demo.model, tmp_path / "pairs.jsonl") == drawn
        assert demo.model.tokenizer.decode(drawn[2].corrupted, skip_special_tokens=True) in done.stdout
        assert ", ".join(f"{label} {position}" for label, position in drawn[2].labels.items()) in done.stdout
    given = run("tasks", "ioi", "--model", demo.folder / "model", "--json", folder=tmp_path)
    expected = fp.tasks.ioi(demo.model, 5)
    assert [row["labels"] for row in json.loads(given.stdout)] == [pair.labels for pair in expected]
    assert [row["correct"] for row in json.loads(given.stdout)] == [[demo.model.tokenizer.decode(p.correct)] for p in expected]
    for command, message in (
        (("nonsense",), "task 'nonsense' is unknown: expected one of capitals"),
        (("--out", "p"), "--out without a task"),
        (("-n", "3", "--seed", "7"), "-n, --seed without a task"),
        (("ioi", "--out", "."), "is a folder"),
    ):
        refused = run("tasks", *command, folder=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert message in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        (("report", "effects.safetensors"), ".html"),
        (("tasks", "ioi"), ".jsonl"),
        (("check", "--model", "nowhere/at-all", "--pairs", "nowhere.jsonl"), ".csv"),
    ],
)
def test_a_file_of_another_format_is_not_replaced(command: tuple[str, ...], ending: str, tmp_path: Path) -> None:
    """Nothing is read or loaded before; a device may have any name."""
    (tmp_path / "pairs.txt").write_text("the only copy")
    for name in ("pairs.txt", "new", "pairs.safetensors"):
        refused = run(*command, "--out", name, folder=tmp_path)
        assert refused.returncode == 2
        assert f"error: --out {name!r}: expected the path of a {ending} file" in " ".join(refused.stderr.split())
    for name in ("/dev/null", f"new{ending.upper()}"):
        assert "expected the path of" not in run(*command, "--out", name, folder=tmp_path).stderr
    assert (tmp_path / "pairs.txt").read_text() == "the only copy"


RANK = ("rank", "--sae", "nowhere/at-all")
STEER = ("steer", "--sae", "nowhere/at-all", "--prompt", "a", "--feature", "1")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*RANK, "--positions", "S9"), "--positions S9: 'pairs.jsonl' line 1 has no such label: expected country, end"),
        ((*RANK, "--positions", "end,only"), "--positions only: 'pairs.jsonl' line 3 has no such label"),
        (("stream", *RANK[1:], "--positions", "S9"), "--positions S9: 'pairs.jsonl' line 1"),
        (("components", "--positions", "S9"), "--positions S9: 'pairs.jsonl' line 1"),
        (("plan", "--positions", "S9"), "--positions S9: 'pairs.jsonl' line 1"),
        ((*RANK, "--positions", ","), "--positions ',': expected 'all', 'each', or labels and indices"),
        (("demo", "--pairs", "2", "--positions", "S9"), "--positions S9: pair 0 has no such label: expected end"),
        ((*RANK, "--metric", "logit_diff,prob"), "--metric logit_diff,prob: expected one of logit_diff"),
        (("stream", *RANK[1:], "--metric", "a"), "--metric a: expected one of logit_diff"),
        (
            (*RANK, "--metric", "prob", "--metric", "sequence_log_prob"),
            "--metric prob --metric sequence_log_prob: expected metrics of answers of several tokens",
        ),
        ((*RANK, "--metric", "neg_rank", "--method", "atp"), "expected one of logit_diff"),
        (
            (*RANK, "--method", "atp", "--screen"),
            "an estimate (--method atp) with --screen: expected it only with --method exact",
        ),
        ((*RANK, "--screen", "--k=-5"), "--k -5: expected an integer, 1 or more"),
        ((*RANK, "--screen", "--target", "4"), "--target 4.0: expected a fraction above 0, up to 1"),
        ((*RANK, "--executor", "threads"), "--executor threads: expected 'serial', 'ray'"),
        (("components", "--sites", "foo,z"), "--sites foo,z: expected some of resid_pre"),
        (("components", "--sites", "z,blocks.1.attn.hook_z"), "and nothing else; run the command once per layer"),
        (("verify", "nowhere"), "expected an effects.safetensors file of rank, components or demo"),
        (("compare", "c", "c"), "give the file of rank first, then that of components"),
        (("tasks", "ioi", "--seed", "-1"), "--seed -1: expected an integer, 0 or more"),
        (
            ("report", "c", "--out", "/proc/c/c.html"),
            "(No such file or directory): expected a folder that can be written to; give",
        ),
        (("demo", "--pairs", "999"), "'999' should be less than or equal to 256"),
        (("demo", "--task", "iio"), "Invalid value for '--task': 'iio' is not one of 'ioi'"),
        ((*STEER, "--dose", "four"), "Invalid value for '--dose': 'four' should be a valid number"),
        ((*STEER, "--dose", "inf"), "--dose inf: expected a finite number"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_errors_speak_of_options(command: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Nothing of Python is advised, and no model is looked for: there is none of this name."""
    rows = [{"clean": "a", "corrupted": "b", "correct": "c", "wrong": "d", "labels": {"country": 1, "end": 2}}] * 2
    rows = [*({**row, "labels": {**row["labels"], "only": 1}} for row in rows), *rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    node = fp.Node("blocks.0.attn.hook_z", "head", 0, "end")
    one = np.ones(1)
    fp.Effects((node,), one, 0 * one, np.zeros(1, int), np.zeros(1, int), one, one, METADATA).save(tmp_path / "c")
    needed = {"rank": 2, "stream": 2, "components": 2, "plan": 2, "verify": 2, "steer": 1}.get(command[0], 0)
    done = run(*command, *("--model", "nowhere/at-all", "--pairs", "pairs.jsonl")[: 2 * needed], folder=tmp_path)
    message = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2
    assert said in message
    assert "Value error" not in message
    assert re.findall(r"fp\.|\w=|\(\.\.\.\)|function|None|\[['{]", message) == []


def test_components_features_and_estimates(folder: Path, model: list[str], sae: list[str]) -> None:
    """The same numbers as the library's, as JSON and in files; then set side by side."""
    components = run("components", *model, "--sites", "z,mlp_out", "--json", "--top", "2", folder=folder)
    assert components.returncode == 0, components.stderr
    found = json.loads(components.stdout)
    table = fp.Effects.load(folder / "featpatch-components" / "effects.safetensors")
    assert [row["recovery"] for row in found["effects"]] == pytest.approx(table.top(2).pooled("recovery").tolist(), abs=1e-9)
    assert {node.site.split(".", 2)[2] for node in table.nodes} == {"attn.hook_z", "hook_mlp_out"}
    ranked = run("rank", *model, *sae, "--json", "--screen", "--k", "5", "--audit", "3", folder=folder)
    assert ranked.returncode == 0, ranked.stderr
    assert json.loads(ranked.stdout)["audit"]["screened"] == 5
    assert "self-check on" in ranked.stderr
    estimate = run("rank", *model, *sae, "--method", "ig", "--out", "ig", "--json", folder=folder)
    assert estimate.returncode == 0, estimate.stderr
    assert json.loads(estimate.stdout)["value"] == "estimate"
    about = json.loads(estimate.stdout)["metadata"]
    assert about["method"] == "ig"
    shown = run("rank", *model, *sae, "--method", "ig", "--out", "ig", folder=folder)
    said = " ".join(shown.stdout.split())
    assert (
        f"sum to the whole activation within {about['completeness_residual']:.1g} of the mean gap; the estimate for a whole "
        "activation" in said
    )
    assert f"differs from the exact effect by up to {about['whole_residual']:.2g} of the mean gap" in said
    full = run("rank", *model, *sae, "--out", "full", folder=folder)
    assert full.returncode == 0, full.stderr
    both = run("compare", "full/effects.safetensors", "featpatch-components/effects.safetensors", folder=folder)
    assert both.returncode == 0, both.stderr
    assert "feature" in both.stdout
    parts = fp.Effects.load(folder / "featpatch-components" / "effects.safetensors")
    for key, said in (("pairs", "expected the same pairs, since their effects"), ("model", "on models with different weights")):
        replace(
            parts, metadata={**parts.metadata, key: "0" * 64 if key == "pairs" else {"name": "m", "sha256": "0" * 64}}
        ).save(folder / "other.safetensors")
        refused = run("compare", "full/effects.safetensors", "other.safetensors", folder=folder)
        assert (refused.returncode, said in " ".join(refused.stderr.split()), "0" * 64 in refused.stderr) == (2, True, False)
    for command in (
        ("info", "full/effects.csv"),
        ("report", "full/effects.csv"),
        ("compare", "full", "full"),
        ("verify", "full"),
    ):
        needed = model[:4] if command[0] == "verify" else []
        refused = run(*command, *needed, folder=folder)
        assert refused.returncode == 2
        assert "give 'full/effects.safetensors', which is there" in " ".join(refused.stderr.split())
    cells = run("compare", "full/effects.safetensors", "featpatch-components/effects.safetensors", "--json", folder=folder)
    table = fp.compare(
        *(fp.Effects.load(folder / name / "effects.safetensors") for name in ("full", "featpatch-components"))
    ).table
    assert [row["position"] for row in json.loads(cells.stdout)] == table["position"].tolist()
    refused = run("compare", "featpatch-components/effects.safetensors", "full/effects.safetensors", folder=folder)
    assert refused.returncode == 2
    assert "error: the first table holds" in refused.stderr.replace("\n", " ")


@pytest.mark.parametrize("workers", [(), pytest.param(("--executor", "ray", "--workers", "1"), marks=pytest.mark.extended)])
def test_streams_and_workers(folder: Path, model: list[str], sae: list[str], workers: tuple[str, ...]) -> None:
    """Blocks of two pairs give what one sweep gives, here and by a worker of Ray."""
    streamed = run("stream", *model, *sae, "--block", "2", "--top", "3", "--json", folder=folder)
    assert streamed.returncode == 0, streamed.stderr
    rank = started if workers else run
    there = rank("rank", *model, *sae, *workers, "--top", "3", "--json", "--out", "there", folder=folder)
    assert there.returncode == 0, there.stderr
    found, expected = (json.loads(done.stdout)["effects"] for done in (streamed, there))
    assert [row["index"] for row in found] == [row["index"] for row in expected]
    for name in ("recovery", "degradation_low"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-5)
    assert fp.Stored(folder / "featpatch-stream").blocks == 2
    refused = run("rank", *model, *sae, "--workers", "2", folder=folder)
    assert refused.returncode == 2
    assert "expected --executor ray" in refused.stderr.replace("\n", " ")


@pytest.mark.extended
def test_plans_of_components_and_json_without_bars(
    folder: Path, model: list[str], sae: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts what the table has; a bar is shown only on a terminal, and none with --json."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    planned = json.loads(run("plan", *model, "--sites", "z", "--json", folder=folder).stdout)
    found = run("components", *model, "--sites", "z", "--json", "--out", "planned", folder=folder)
    assert planned["nodes"] == len(fp.Effects.load(folder / "planned" / "effects.safetensors"))
    assert found.stderr == ""
    command = ("components", *model, "--sites", "z", "--out", "planned")
    assert run(*command, folder=folder).stderr == ""
    monkeypatch.setattr(sys.modules["featpatch.cli.app"], "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    assert "patching: 100%" in run(*command, folder=folder).stderr
    assert run(*command, "--json", folder=folder).stderr == ""
    full = ("--sites", "blocks.1.attn.hook_z", "--positions", "-1", "--out", "named")
    run("components", *model, *full, folder=folder)
    nodes = fp.Effects.load(folder / "named" / "effects.safetensors").nodes
    assert {(node.site, node.position) for node in nodes} == {("blocks.1.attn.hook_z", -1)}
    refused = run("components", *model, "--sites", "z", *full[2:], folder=folder)
    assert "another study (layers differ)" in refused.stderr.replace("\n", " ")
    refused = run("plan", *model, *sae, "--sites", "z", folder=folder)
    assert "--sites with --sae: expected --sites for components" in refused.stderr


def test_plan_check_and_info(folder: Path, model: list[str], sae: list[str]) -> None:
    planned = json.loads(run("plan", *model, *sae, "--json", folder=folder).stdout)
    checked = run("check", *model[:4], "--json", folder=folder)
    assert {row["pair"] for row in json.loads(checked.stdout)} == {0, 1, 2}
    assert checked.returncode in (0, 1)
    run("rank", *model, *sae, "--out", "for-info", folder=folder)
    told = run("info", "for-info/effects.safetensors", folder=folder)
    effects = fp.Effects.load(folder / "for-info" / "effects.safetensors")
    assert f"{len(effects)} rows of exact effects, {planned['nodes']} ranked, 3 pairs" in told.stdout
    assert effects.metadata["model"]["sha256"] in told.stdout.replace("\n", "")
    in_json = json.loads(run("info", "for-info/effects.safetensors", "--json", "--top", "1", folder=folder).stdout)
    assert in_json["effects"][0]["index"] == effects.top(1).nodes[0].index
    options = ("--by", "degradation", "--threshold", "0.5")
    sorted_by = json.loads(run("info", "for-info/effects.safetensors", "--json", *options, folder=folder).stdout)["effects"]
    expected = effects.with_threshold(0.5).top(5, by="degradation")
    assert [(row["index"], row["quadrant"]) for row in sorted_by] == [
        (node.index, label) for node, label in zip(expected.nodes, expected.quadrants(), strict=True)
    ]
    assert len(expected) == 5
    assert expected.quadrants() != effects.take(expected.rows_in_whole()).quadrants()
    for wrong, said in ((("--threshold", "2"), "--threshold 2.0: expected a number between 0 and 1"),
                        (("--by", "recovery", "--direction", "noising"), "--by recovery: expected one of the measured effects")):  # fmt: skip
        refused = run("rank", *model, *sae, *wrong, "--out", "refused", folder=folder)
        assert refused.returncode == 2
        assert said in refused.stderr.replace("\n", " ")
        assert "loading" not in refused.stdout
    missing = run("info", "nowhere", folder=folder)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "error: there is no effects file 'nowhere'" in missing.stderr


def test_an_sae_that_explains_less_than_it_claims_ends_a_check_with_1(
    folder: Path, model: list[str], sae: list[str], tmp_path: Path
) -> None:
    """A JumpReLU SAE that was rebuilt as ReLU. As it is, on the same pairs, it ends it with 0."""
    fine = run("check", *model[:4], *sae, folder=folder)
    assert "self-check on" in fine.stdout
    assert fine.returncode == run("check", *model[:4], folder=folder).returncode == 0
    shutil.copytree(sae[1], tmp_path / "sae")
    settings = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**settings, "architecture": "standard"}))
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    del weights["threshold"]
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    short = run("check", *model[:4], "--sae", str(tmp_path / "sae"), folder=folder)
    assert short.returncode == 1
    assert "less than it claims" in short.stdout
    told = run("check", *model[:4], "--sae", str(tmp_path / "sae"), "--json", folder=folder)
    assert (told.returncode, len(json.loads(told.stdout)) > 0) == (1, True)
    assert "less than it claims" in told.stderr


@pytest.fixture(scope="module")
def finished(folder: Path, model: list[str], sae: list[str]) -> Path:
    """Results of a finished `rank`."""
    done = run("rank", *model, *sae, "--out", "finished", "--direction", "denoising", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "finished"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.filterwarnings("default::featpatch.errors.FeatpatchWarning")
def test_an_interrupted_command_replaces_nothing_and_exits_with_130(
    folder: Path, model: list[str], sae: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished of it is in a folder of its own; with nothing finished, there is none."""
    before, swept = bytes_of(finished), Study._swept
    again = ("rank", *model, *sae, "--out", "finished", "--direction", "denoising")

    def cut_short(*args: Any, **options: Any) -> fp.Effects:
        effects = swept(*args, **options).of_pairs([0])
        return replace(effects, metadata={**effects.metadata, "finished": False})

    def stopped(*args: Any, **options: Any) -> fp.Effects:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_swept", stopped)
    done = run(*again, folder=folder)
    assert (done.returncode, "interrupted" in done.stderr) == (130, True)
    assert sorted(path.name for path in finished.iterdir()) == sorted(before)
    monkeypatch.setattr(Study, "_swept", cut_short)
    done = run(*again, folder=folder)
    assert done.returncode == 130
    assert re.search(
        r"^warning: interrupted: the table holds \d+ rows over 1 of 3 pairs; pass --journal FILE to keep what is measured",
        " ".join(done.stderr.split()),
    )
    assert "to finished/unfinished/" in done.stdout
    assert bytes_of(finished) == before
    assert len(fp.Effects.load(finished / "unfinished" / "effects.safetensors").clean) == 1
    assert {path.name for path in (finished / "unfinished").iterdir()} == set(before)


@pytest.mark.extended
def test_results_of_another_study_are_not_replaced(
    folder: Path, model: list[str], sae: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are those that can't be read; the same study may be run again."""
    before, lines = bytes_of(finished), (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "two.jsonl").write_text("\n".join(lines[:2]))
    ranking, out = fp.rank_features, ("--out", "finished", "--direction", "denoising")
    monkeypatch.setattr(fp, "rank_features", lambda *args, **options: pytest.fail("it began to rank"))
    for command, what in (
        (("rank", *model[:3], "two.jsonl", *model[4:], *sae, *out), "pairs differ"),
        (("rank", *model, *sae, *out[:2]), "directions differ"),
        (("rank", *model, *sae, *out, "--metric", "prob"), "metrics differ"),
        (("rank", *model[:4], *sae, *out), "positions differ"),
        (("rank", *model, "--sae", sae[1].replace("3.hook_resid_post", "1.hook_resid_pre"), *out), "saes differ"),
        (("rank", *model, *sae, *out, "--screen"), "features, not screened features"),
        (("rank", *model, *sae, *out, "--method", "atp"), "features, not estimates by atp"),
        (("components", *model, *out), "components differ"),
        (("demo", "--pairs", "2", "--out", "finished"), "differ"),
    ):
        done = run(*command, folder=folder)
        assert done.returncode == 2, command
        assert what in " ".join(done.stderr.split()), command
    assert bytes_of(finished) == before
    monkeypatch.setattr(fp, "rank_features", ranking)
    done = run("rank", *model, *sae, *out, folder=folder)
    assert done.returncode == 0, done.stderr
    (finished / "effects.safetensors").write_bytes(b"damaged")
    done = run("rank", *model, *sae, *out, folder=folder)
    assert (done.returncode, "is damaged" in done.stderr) == (2, True)
    (finished / "effects.safetensors").write_bytes(before["effects.safetensors"])


@pytest.mark.parametrize("command", ["rank", "components", "demo", "stream"])
def test_the_folder_of_results_is_tried_out_first(command: str, tmp_path: Path) -> None:
    """Before a model is even looked for; a folder that another process writes to is refused."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file/within")
    (tmp_path / "busy").mkdir()
    study = [] if command == "demo" else ["--model", "nowhere/at-all", "--pairs", "none.jsonl"]
    study += ["--sae", "nowhere/at-all"] if command in ("rank", "stream") else []
    child = os.fork()
    if child == 0:
        fcntl.flock(os.open(tmp_path / "busy", os.O_RDONLY), fcntl.LOCK_EX)
        (tmp_path / "held").touch()
        time.sleep(300)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        for name, what in (("file", "is a file"), ("file/within", "can't be written"), ("link", "can't be written"),
                           ("n" * 300, "can't be accessed (File name too long)"), ("busy", "is in use by another command")):  # fmt: skip
            done = run(command, *study, "--out", name, folder=tmp_path)
            assert done.returncode == 2, name
            assert what in " ".join(done.stderr.split()), name
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(("full", "inside"), [("report.html", 2), ("effects.safetensors", 0), ("everywhere", 0)])
def test_results_that_cannot_be_written_in_the_end(
    full: str, inside: int, folder: Path, model: list[str], sae: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What fits stays in the folder; without the effects, all files are put elsewhere; the error says which are where."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    save, report = fp.Effects.save, fp.report

    def refuse(path: Path, name: str) -> None:
        if (Path(path).is_relative_to(out) and name == full) or full == "everywhere":
            raise OSError(28, "No space left on device")

    def saved(self: fp.Effects, path: Path) -> Path:
        refuse(path, "effects.safetensors")
        return save(self, path)

    def reported(effects: fp.Effects, path: Path, **options: Any) -> Path:
        refuse(path, "report.html")
        return report(effects, path, **options)

    monkeypatch.setattr(fp.Effects, "save", saved)
    monkeypatch.setattr(fp, "report", reported)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    done = run("rank", *model, *sae, "--out", out, folder=folder)
    assert done.returncode == 2
    assert "exact effects of" in done.stdout
    said = done.stderr.replace("\n", "")
    assert "No space left on device" in said
    assert len(list(out.iterdir())) == inside
    if full == "everywhere":
        assert "nothing was saved" in " ".join(done.stderr.split())
        return
    place = out if inside else next(elsewhere.iterdir())
    assert str(place) in said
    assert len(fp.Effects.load(place / "effects.safetensors")) > 0
    assert {path.name for path in place.iterdir()} >= {"effects.safetensors", "effects.csv"}
    assert (place / "report.html").exists() == (full != "report.html")


def test_an_interrupted_screening(folder: Path, model: list[str], sae: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown without an audit, which needs all of it; a second one is put beside the first."""
    ranking = fp.rank_features

    def cut_short(*args: Any, **options: Any) -> fp.Effects:
        effects = ranking(*args, **options)
        return replace(effects.take(range(len(effects) - 2)), taken_from=None, metadata={**effects.metadata, "finished": False})

    monkeypatch.setattr(fp, "rank_features", cut_short)
    for name, options in (("unfinished", []), ("unfinished-2", ["--json"])):
        done = run("rank", *model, *sae, "--screen", "--k", "5", "--audit", "3", "--out", "cut", *options, folder=folder)
        assert done.returncode == 130, done.stderr
        assert len(list((folder / "cut" / name).iterdir())) == 3
    assert [path.name for path in sorted((folder / "cut").iterdir())] == ["unfinished", "unfinished-2"]


def test_the_same_screening_alone_replaces_it(folder: Path, model: list[str], sae: list[str]) -> None:
    """Other numbers of features are another study; repeated positions are the same one."""
    command = ["rank", *model[:4], *sae, "--screen", "--out", "screened", "--direction", "denoising"]
    for options, code in ((["--k", "5", "--audit", "3", "--positions", "end"], 0), (["--k", "5", "--audit", "3", "--positions", "end,end"], 0),
                          (["--k", "4", "--audit", "3", "--positions", "end"], 2), (["--k", "5", "--audit", "2", "--positions", "end"], 2)):  # fmt: skip
        done = run(*command, *options, folder=folder)
        assert done.returncode == code, (options, done.stderr)
        assert code == 0 or "differ" in done.stderr
    refused = run("rank", *model, *sae, "--out", "j", "--journal", "j/effects.safetensors", folder=folder)
    assert (refused.returncode, "is the path of a result file" in " ".join(refused.stderr.split())) == (2, True)


def test_a_study_in_a_file_is_the_command(folder: Path, model: list[str], sae: list[str]) -> None:
    study = folder / "study.toml"
    study.write_text(
        f"command = 'rank'\nmodel = '{model[1]}'\nsae = ['{sae[1]}']\npairs = 'pairs.jsonl'\npositions = 'end'\n"
        "metric = ['logit_diff', 'prob']\ndirection = 'denoising'\ntop = 3\nout = 'from-file'\njson = true\n"
    )
    done = run("run", "study.toml", folder=folder)
    assert done.returncode == 0, done.stderr
    typed = run("rank", *model, *sae, "--metric", "logit_diff", "--metric", "prob", "--direction", "denoising", "--top", "3",
                "--out", "typed", "--json", folder=folder)  # fmt: skip
    from_file, from_line = json.loads(done.stdout), json.loads(typed.stdout)
    assert from_file["metadata"].pop("command").endswith("run study.toml")
    assert " rank --model " in from_line["metadata"].pop("command")
    for found in (from_file, from_line):
        del found["metadata"]["finished_at"]
    assert from_file == from_line
    study.write_text("command = 'info'\narguments = ['pairs.jsonl']\ntop = 3\njson = false\n")
    assert read(study) == ["info", "pairs.jsonl", "--top", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command = 'fly'", "command='fly' in 'study.toml': expected one of check"),
        ("command = 'run'", "command='run'"),
        ("model = 'x'", "command=None"),
        ("command = 'rank'\nmodel = {a = 1}", "model={'a': 1} in 'study.toml': expected the value of an option"),
        ("command = 'rank' =", "can't be read"),
        ("command = 'rank'\nmetrc = 'prob'", "did you mean 'metric'?"),
        ("command = 'rank'\npretty = 1", "pretty in 'study.toml': expected an option of rank, one of arguments, model, sae"),
        (None, "the study 'study.toml' does not exist: expected a TOML file"),
    ],
)
def test_studies_that_cannot_be_run(tmp_path: Path, text: str | None, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("study.toml").write_text(text)
    with pytest.raises(fp.FeatpatchError) as error:
        read(Path("study.toml"))
    assert message in str(error.value)


def test_the_version(tmp_path: Path) -> None:
    assert run("--version", folder=tmp_path).stdout == f"featpatch {version('featpatch')}\n"


def test_exit_codes_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("command = 'info'\narguments = ['nowhere']\n")
    done = run("run", "study.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "there is no effects file 'nowhere'" in done.stderr


def test_pairs_of_unequal_length(folder: Path, model: list[str], sae: list[str]) -> None:
    """Checked, ranked and reported label by label."""
    made: dict[str, Any] = {
        "clean": "Tom gave it to John . John gave it to", "corrupted": "Tom gave it to John , then later Tom gave it to",
        "correct": " Tom", "wrong": " John", "labels": {"end": 10}, "corrupted_labels": {"end": 12},
    }  # fmt: skip
    pairs = fp.Pairs.from_prompts(fp.load(model[1], progress=False).model, **made, align="labels")
    pairs.to_jsonl(folder / "unequal.jsonl")
    done = run("rank", *model, *sae, "--pairs", "unequal.jsonl", "--out", "unequal", folder=folder)
    assert done.returncode == 0, done.stderr
    report = (folder / "unequal" / "report.html").read_text()
    assert "labelled token" in report
    assert ">position 12, end<" in report.replace('"', "<").replace("=<", "=>")


def test_steered_texts_stand_side_by_side(tmp_path: Path) -> None:
    """The plain one first; the same texts in JSON, which are those of the library."""
    demo = fp.load_demo(progress=False)
    where = ["--model", str(demo.folder / "model"), "--sae", str(demo.folder / "saes" / SITE), "--feature", "888"]
    prompt = "The song was stupid . I despised the cast . In the end it was"
    options = [*where, "--prompt", prompt, "--tokens", "4", "--positions", "newest", "--dose", "20", "--dose=-20"]
    (found,) = json.loads(run("steer", *options, "--json", folder=tmp_path).stdout)
    assert [each["dose"] for each in found["steered"]] == [20.0, -20.0]
    ids, sae = demo.model.to_tokens(prompt), demo.saes[6]
    given = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "return_type": "tokens"}
    for text, dose in ((found["plain"], None), *((each["text"], each["dose"]) for each in found["steered"])):
        values = {fp.feature(sae, 888): dose or 0.0}
        with fp.steer(demo.model, values, saes=sae, positions="newest"):
            made = demo.model.generate(ids, **given)
        assert text == demo.model.tokenizer.decode(made[0, ids.shape[1] :])
    lines = run("steer", *options, folder=tmp_path).stdout
    assert lines.index("none") < lines.index(found["plain"]) < lines.index("-20")
    (tmp_path / "texts.txt").write_text("We hated the dialogue . The show was not great . The opinion is negative .\n")
    unit = ["--unit", "max", "--reference", "texts.txt"]
    assert run("steer", *options, *unit, folder=tmp_path).returncode == 0
    for wrong, said in (
        (["--reference", "texts.txt"], "expected no reference"),
        (["--unit", "max", "--reference", "nothing.txt"], "there is no file 'nothing.txt': expected a text file"),
        (["--unit", "max", "--reference", "."], "there is no file '.': expected a text file"),
        (["--dose", "nan"], "--dose nan: expected a finite number"),
        (["--feature", "99999"], "--feature 99999: expected a feature of 0 to 1023"),
    ):
        done = run("steer", *options, *wrong, folder=tmp_path)
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("k=-5: expected", "--k -5: expected"),
        ("saes=['a', 'b'] are", "--sae a --sae b are"),
        ("positions=['S2', 'end'] are", "--positions S2,end are"),
        ("'/tmp/my runs/set k=3/x.jsonl' line 1", "'/tmp/my runs/set k=3/x.jsonl' line 1"),
        ("'/tmp/a (seed=5).safetensors' is damaged", "'/tmp/a (seed=5).safetensors' is damaged"),
    ],
)
def test_only_arguments_become_options(said: str, shown: str) -> None:
    """Not what is quoted, such as a path."""
    assert in_options(said) == shown
