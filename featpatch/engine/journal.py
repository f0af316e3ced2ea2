"""What is finished, on disk: an append-only file of checksummed lines from which an interrupted sweep goes on.

    {"format": ..., what the sweep is about ..., "baselines": [...], "rows": ...} sha256-prefix       what it belongs to
    {"batch": key, "values": base64 of float64} sha256-prefix                                          a forward pass each

A line counts only if its checksum is right. What follows the last good line, such as one torn by a crash, is cut off;
a bad line in between is left out. Nothing of them is trusted.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError

FORMAT = "featpatch journal 1"


@dataclass(frozen=True)
class Book:
    """What is finished, in memory.

    Attributes:
        rows: the budget of rows of the run that began it; going on with the same one repeats its batches bit by bit.
        finished: values by batch.
    """

    rows: int
    finished: dict[str, bytes] = field(default_factory=dict)

    def get(self, key: str) -> Float[torch.Tensor, " values"] | None:
        """The values of a batch, if it is finished."""
        values = self.finished.get(key)
        return None if values is None else torch.from_numpy(np.frombuffer(values, "<f8").astype(np.float64))

    def put(self, key: str, values: Float[torch.Tensor, " values"]) -> None:
        """Notes a finished batch."""
        self.finished[key] = np.ascontiguousarray(values.numpy(), "<f8").tobytes()


class ClosedBook(Book):
    """Of an interrupted run: nothing is added."""

    def get(self, key: str) -> Float[torch.Tensor, " values"] | None:
        """The values of a batch; where they are not there, the interruption goes on."""
        values = super().get(key)
        if values is None:
            raise KeyboardInterrupt
        return values


@dataclass(frozen=True)
class Journal(Book):
    """A book on disk."""

    path: Path = Path()

    @classmethod
    def open(cls, path: Path, subject: Mapping[str, Any], baselines: Sequence[float], rows: int) -> "Journal":
        """Begins a journal, or goes on with the one that is there.

        Args:
            subject: what the results depend on: digests of model, SAEs and pairs, metric, positions, directions.
            baselines: the metric of the unpatched runs, which tells apart what digests can't: another metric of the same
                name, hooks of the user, a model whose configuration was changed. Compared up to rounding.
            rows: budget of rows, if the journal is new.

        Raises:
            FeatpatchError: the file is no journal, or that of another sweep.
        """
        if path.is_dir():
            raise FeatpatchError(f"the journal {str(path)!r} is a folder: expected the path of a file")
        header = json.loads(json.dumps({"format": FORMAT, **subject, "baselines": [*baselines], "rows": rows}))
        content = path.read_bytes() if path.is_file() else b""
        lines, intact = _intact(content)
        if not lines:
            _check_torn(path, content, header)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            journal = cls(rows, {}, path)
            journal._append(header)
            return journal
        _check_subject(path, lines[0], header)
        if intact < len(content):
            os.truncate(path, intact)
        finished = {line["batch"]: base64.b64decode(line["values"]) for line in lines[1:]}
        return cls(int(lines[0]["rows"]), finished, path)

    def put(self, key: str, values: Float[torch.Tensor, " values"]) -> None:
        """Writes down a finished batch, to the disk itself."""
        content = np.ascontiguousarray(values.numpy(), "<f8").tobytes()
        self._append({"batch": key, "values": base64.b64encode(content).decode()})
        super().put(key, values)

    def _append(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content)
        with self.path.open("ab") as file:
            file.write(f"{text} {_checksum(text)}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def batch_key(names: Iterable[str]) -> str:
    """A short name of a batch, made of the names of what it computes."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _intact(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines whose checksum is right, and where the last of them ends; none where the first is wrong."""
    lines, end, intact = [], 0, 0
    for raw in content.split(b"\n")[:-1]:
        end += len(raw) + 1
        text, _, checksum = raw.decode(errors="replace").rpartition(" ")
        if checksum == _checksum(text):
            lines.append(json.loads(text))
            intact = end
        elif not lines:
            return [], 0
    return lines, intact


def _check_torn(path: Path, content: bytes, header: Mapping[str, Any]) -> None:
    """Refuses to begin anew on what is not the torn beginning of this very journal; it may differ in the budget of rows."""
    expected = json.dumps({**header, "rows": None}).encode().removesuffix(b"null}")
    if b"\n" in content or not (expected.startswith(content) or content.startswith(expected)):
        raise FeatpatchError(
            f"{str(path)!r} is not a journal of this sweep, or its first line is damaged: expected a new path or such a "
            "journal; give another path, or delete the file to begin anew"
        )


def _check_subject(path: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    keys = sorted({*header, *found} - {"rows", "baselines"})
    differing = [key for key in keys if found.get(key) != header.get(key)]
    if not differing and not np.allclose(found["baselines"], header["baselines"], rtol=1e-3, atol=1e-6):
        differing = ["the metric of the unpatched runs"]
    if differing:
        raise FeatpatchError(
            f"the journal {str(path)!r} belongs to another sweep: {', '.join(differing)} differ; "
            "expected the same model, SAEs, pairs and options; give another path, or delete the file to begin anew"
        )
