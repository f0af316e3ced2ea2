"""The README's Python runs as it stands there, on fewer pairs."""

import re
from pathlib import Path
from typing import Any

import pytest

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_using_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks that need nothing but the shipped model, one after the other."""
    monkeypatch.chdir(tmp_path)
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "demo" in block or "ioi.safetensors" in block
    ]
    assert len(blocks) == 4
    assert blocks[0].count("n=32") == 1
    found: dict[str, Any] = {}
    exec("\n".join(blocks).replace("n=32", "n=2").replace("n=64", "n=4"), found)
    assert (tmp_path / "ioi.safetensors").is_file()
    assert "features bring back" in capsys.readouterr().out
    assert len(found["both"].writers)
