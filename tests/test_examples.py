"""Every example runs, and tells a result in prose at its end."""

import runpy
from pathlib import Path

import pytest

from featpatch.checkpoints import Demo

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "quickstart": "it stands for one name",
    "own_model": "What an SAE does not explain shows in its error term.",
    "features_and_heads": "Most of that feature's change is written by blocks.3.attn.hook_z head",
    "both_directions": "A low effect can still hide a backup",
    "screening": "of the true top 20 were patched; the audit guaranteed at least",
    "local_folder": "the difference between the two capitals",
}


@pytest.mark.parametrize("most", [2, pytest.param(256, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", SAID)
def test_it_runs(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder, with few pairs; the last line is a sentence with the numbers of this run."""
    pairs = Demo.pairs
    monkeypatch.setattr(Demo, "pairs", lambda demo, task="ioi", n=32, seed=0: pairs(demo, task, n=min(n, most), seed=seed))
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / f"{name}.py"
    assert path.read_text().count("# %%") >= 4
    runpy.run_path(str(path))
    last = capsys.readouterr().out.splitlines()[-1]
    assert SAID[name] in last
    assert any(character.isdecimal() for character in last)
