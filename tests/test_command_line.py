"""Every command on small inputs: its files, its JSON, its exit codes, and a study that is written down."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import run, started
from safetensors.torch import load_file, save_file

import featpatch as fp
from featpatch.cli import app
from featpatch.cli.study import read

SITE = "blocks.3.hook_resid_post"
COMMANDS = (
    "demo",
    "rank",
    "components",
    "attribute",
    "check",
    "plan",
    "predict",
    "compare",
    "report",
    "info",
    "run",
    "stream",
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


def test_components_features_and_estimates(folder: Path, model: list[str], sae: list[str]) -> None:
    """The same numbers as the library's, as JSON and in files; then set side by side."""
    components = run("components", *model, "--sites", "z,mlp_out", "--json", "--top", "2", folder=folder)
    assert components.returncode == 0, components.stderr
    found = json.loads(components.stdout)
    table = fp.Effects.load(folder / "featpatch-components" / "effects.safetensors")
    assert [row["recovery"] for row in found["effects"]] == pytest.approx(table.top(2).pooled("recovery").tolist(), abs=1e-9)
    assert {node.site.split(".", 2)[2] for node in table.nodes} == {"attn.hook_z", "hook_mlp_out"}
    ranked = run("rank", *model, *sae, "--json", "--exact", "screened", "--k", "5", "--audit", "3", folder=folder)
    assert ranked.returncode == 0, ranked.stderr
    assert json.loads(ranked.stdout)["audit"]["screened"] == 5
    assert "self-check on" in ranked.stderr
    estimate = run("attribute", *model, *sae, "--method", "ig", "--json", folder=folder)
    assert estimate.returncode == 0, estimate.stderr
    assert json.loads(estimate.stdout)["value"] == "estimate"
    about = json.loads(estimate.stdout)["metadata"]
    assert about["method"] == "ig"
    shown = run("attribute", *model, *sae, "--method", "ig", folder=folder)
    said = " ".join(shown.stdout.split())
    assert f"add up to the whole site within {about['completeness_residual']:.1g} of the mean gap; that of a whole site" in said
    assert f"is up to {about['whole_residual']:.2g} of the mean gap off its patched run" in said
    full = run("rank", *model, *sae, "--out", "full", folder=folder)
    assert full.returncode == 0, full.stderr
    both = run("compare", "full/effects.safetensors", "featpatch-components/effects.safetensors", folder=folder)
    assert both.returncode == 0, both.stderr
    assert "feature" in both.stdout
    cells = run("compare", "full/effects.safetensors", "featpatch-components/effects.safetensors", "--json", folder=folder)
    table = fp.compare(
        *(fp.Effects.load(folder / name / "effects.safetensors") for name in ("full", "featpatch-components"))
    ).table
    assert [row["position"] for row in json.loads(cells.stdout)] == table["position"].tolist()
    refused = run("compare", "featpatch-components/effects.safetensors", "full/effects.safetensors", folder=folder)
    assert refused.returncode == 2
    assert "error: features holds" in refused.stderr.replace("\n", " ")


def test_streams_and_workers(folder: Path, model: list[str], sae: list[str]) -> None:
    """Blocks of two pairs, and a worker of Ray, give what one sweep here gives."""
    streamed = run("stream", *model, *sae, "--block", "2", "--top", "3", "--json", folder=folder)
    assert streamed.returncode == 0, streamed.stderr
    workers = ("--executor", "ray", "--workers", "1")
    there = started("rank", *model, *sae, *workers, "--top", "3", "--json", "--out", "there", folder=folder)
    assert there.returncode == 0, there.stderr
    found, expected = (json.loads(done.stdout)["effects"] for done in (streamed, there))
    assert [row["index"] for row in found] == [row["index"] for row in expected]
    for name in ("recovery", "degradation_low"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-5)
    assert fp.Stored(folder / "featpatch-stream").blocks == 2
    refused = run("rank", *model, *sae, "--workers", "2", folder=folder)
    assert refused.returncode == 2
    assert "expected --executor ray" in refused.stderr.replace("\n", " ")


def test_plan_check_and_info(folder: Path, model: list[str], sae: list[str]) -> None:
    planned = json.loads(run("plan", *model, *sae, "--json", folder=folder).stdout)
    checked = run("check", *model[:4], "--json", folder=folder)
    assert {row["pair"] for row in json.loads(checked.stdout)} == {0, 1, 2}
    assert checked.returncode in (0, 1)
    run("rank", *model, *sae, "--out", "for-info", folder=folder)
    told = run("info", "for-info/effects.safetensors", folder=folder)
    effects = fp.Effects.load(folder / "for-info" / "effects.safetensors")
    assert f"{len(effects)} rows of exact effects, {planned['features']} ranked, 3 pairs" in told.stdout
    assert effects.metadata["model"]["sha256"] in told.stdout.replace("\n", "")
    in_json = json.loads(run("info", "for-info/effects.safetensors", "--json", "--top", "1", folder=folder).stdout)
    assert in_json["effects"][0]["index"] == effects.top(1).nodes[0].index
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
    study.write_text("command = 'info'\narguments = ['pairs.jsonl']\nmodel = 'm'\nas_it_is = false\n")
    assert read(study) == ["info", "pairs.jsonl", "--model", "m"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command = 'fly'", "command='fly' in 'study.toml': expected one of attribute, check"),
        ("command = 'run'", "command='run'"),
        ("model = 'x'", "command=None"),
        ("command = 'rank'\nmodel = {a = 1}", "model={'a': 1} in 'study.toml': expected a text, a number"),
        ("command = 'rank' =", "can't be read"),
        (None, "the study 'study.toml' can't be read"),
    ],
)
def test_studies_that_cannot_be_run(tmp_path: Path, text: str | None, message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("study.toml").write_text(text)
    with pytest.raises(fp.FeatpatchError) as error:
        read(Path("study.toml"))
    assert message in str(error.value)


def test_exit_codes_of_a_study(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("command = 'info'\narguments = ['nowhere']\n")
    done = run("run", "study.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "there is no effects file 'nowhere'" in done.stderr
