"""What is finished, on disk: an append-only file of checksummed lines from which an interrupted sweep goes on.

    sha256-prefix {"format": ..., "rows": ..., "model": ..., "saes": ..., "pairs": ...}      what the journal belongs to
    sha256-prefix {"batch": key, "values": base64 of float64}                                one line per forward pass

A line counts only if its checksum is right. A torn last line, left by a crash, is cut off; nothing of it is trusted.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError

FORMAT = "featpatch journal 1"


@dataclass(frozen=True)
class Journal:
    """An open journal.

    Attributes:
        rows: the budget of rows of the run that began it; going on with the same one repeats its batches bit by bit.
        finished: values by batch.
    """

    path: Path
    rows: int
    finished: dict[str, bytes]

    @classmethod
    def open(cls, path: Path, subject: Mapping[str, Any], rows: int) -> "Journal":
        """Begins a journal, or goes on with the one that is there.

        Args:
            subject: what the results depend on: digests of model, SAEs and pairs, metric, positions, directions.
            rows: budget of rows, if the journal is new.

        Raises:
            FeatpatchError: the file is no journal, or that of another sweep.
        """
        header = {"format": FORMAT, "rows": rows, **subject}
        lines = _intact(path) if path.is_file() else []
        if not lines:
            if path.is_file() and path.stat().st_size and not path.read_bytes()[:16].isalnum():
                raise FeatpatchError(f"{str(path)!r} is not a journal of featpatch: expected a new path or one that it wrote")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            journal = cls(path, rows, {})
            journal._append(header)
            return journal
        found = lines[0]
        differing = [key for key in header if key != "rows" and found.get(key) != json.loads(json.dumps(header[key]))]
        if differing:
            raise FeatpatchError(
                f"the journal {str(path)!r} belongs to another sweep: {', '.join(differing)} differ; "
                "expected the same model, SAEs, pairs and options; give another path, or delete the file to begin anew"
            )
        return cls(path, int(found["rows"]), {line["batch"]: base64.b64decode(line["values"]) for line in lines[1:]})

    def get(self, key: str) -> Float[torch.Tensor, " patches"] | None:
        """The values of a batch, if it is finished."""
        values = self.finished.get(key)
        return None if values is None else torch.from_numpy(np.frombuffer(values, "<f8").astype(np.float64))

    def put(self, key: str, values: Float[torch.Tensor, " patches"]) -> None:
        """Writes down a finished batch, to the disk itself."""
        content = np.ascontiguousarray(values.numpy(), "<f8").tobytes()
        self._append({"batch": key, "values": base64.b64encode(content).decode()})
        self.finished[key] = content

    def _append(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, sort_keys=True)
        with self.path.open("ab") as file:
            file.write(f"{_checksum(text)} {text}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def batch_key(names: Iterable[str]) -> str:
    """A short name of a batch, made of the names of what it computes."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _intact(path: Path) -> list[dict[str, Any]]:
    """The lines whose checksum is right; what follows the last of them is cut off the file."""
    lines, end, intact = [], 0, 0
    for raw in path.read_bytes().splitlines(keepends=True):
        end += len(raw)
        checksum, _, text = raw.decode(errors="replace").rstrip("\n").partition(" ")
        if raw.endswith(b"\n") and checksum == _checksum(text):
            lines.append(json.loads(text))
            intact = end
        elif not lines:
            return []
    if intact < end:
        os.truncate(path, intact)
    return lines
