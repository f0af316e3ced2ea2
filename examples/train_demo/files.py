"""Small files: JSON, the held-out text, digests."""

import hashlib
import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_digests(root: Path) -> None:
    """Writes digests.json: the SHA-256 of every file below `root` except cards and itself."""
    skipped = {"README.md", "digests.json", "STATUS"}
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in skipped)
    digests = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    write_json(root / "digests.json", digests)


def dictionary_folders(root: Path) -> list[Path]:
    """Folders of all dictionaries that were measured: those of one layer first, then those over several."""
    folders = [path.parent for path in root.rglob("measurements.json") if path.parent.name != "model"]
    return sorted(folders, key=lambda folder: (folder.parent == root, folder))
