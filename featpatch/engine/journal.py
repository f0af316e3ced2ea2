"""Journals: append-only files of finished batches, from which an interrupted sweep resumes.

The first line says which sweep the journal belongs to, and each further line holds the values of one batch:

    {"format": ..., digests and options of the sweep ..., "baselines": [...], "rows": ...} sha256-prefix
    {"batch": key, "values": base64 of float64} sha256-prefix

A line is used only if its checksum matches and its content is valid, because a checksum detects damage but not wrong content.
Everything after the last good line, such as a line cut short by a crash, is removed; a bad line before it is skipped.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.files import Lock, as_path, check_writable, lock, read_json, writing

FORMAT = "featpatch journal 1"


@dataclass(frozen=True)
class Book:
    """The finished batches of a sweep, in memory.

    Attributes:
        rows: the row budget of the run that began it; resuming with the same budget reproduces its batches bit by bit.
        finished: the values of each batch, as the bytes of little-endian float64.
    """

    rows: int
    finished: dict[str, bytes] = field(default_factory=dict)

    @property
    def values(self) -> int:
        """The number of values of all finished batches."""
        return sum(map(len, self.finished.values())) // 8

    def get(self, key: str, count: int | None = None) -> Float[torch.Tensor, " values"] | None:
        """Return the values of a batch, which are `count` if that is given, or None if it is not finished.

        Raises:
            FeatpatchError: the batch has another number of values.
        """
        values = self.finished.get(key)
        if values is None:
            return None
        found = torch.from_numpy(np.frombuffer(values, "<f8").astype(np.float64))
        if count is not None and len(found) != count:
            raise FeatpatchError(
                f"the journal has {len(found)} values for batch {key}: expected {count}; delete the file to start over"
            )
        return found

    def put(self, key: str, values: Float[torch.Tensor, " values"]) -> None:
        """Store the values of a finished batch."""
        self.finished[key] = np.ascontiguousarray(values.numpy(), "<f8").tobytes()


class ClosedBook(Book):
    """The batches that an interrupted run finished; asking for any other batch raises KeyboardInterrupt again."""

    def get(self, key: str, count: int | None = None) -> Float[torch.Tensor, " values"] | None:
        """Return the values of a finished batch.

        Raises:
            KeyboardInterrupt: the batch is not finished.
        """
        values = super().get(key, count)
        if values is None:
            raise KeyboardInterrupt
        return values


@dataclass(frozen=True)
class Journal(Book):
    """A book that is also kept on disk, open in one thread of one process at a time.

    Attributes:
        path: the file.
        header: the first line, needed to write the file again if it is deleted during the run.
        lock: the lock on the file; None if files can't be locked.
    """

    path: Path = Path()
    header: Mapping[str, Any] = field(default_factory=dict, repr=False)
    lock: Lock | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path, subject: Mapping[str, Any], baselines: Sequence[float], rows: int) -> "Journal":
        """Begin a journal, or resume from an existing one.

        Args:
            subject: what the results depend on: digests of model, SAEs and pairs, metric, positions, directions.
            baselines: the metric of the unpatched runs, which differs in cases that the digests miss: another metric of the
                same name, hooks of the user, a model whose configuration was changed. Compared up to rounding.
            rows: the row budget of a new journal.

        Raises:
            FeatpatchError: the file is not a journal, belongs to another sweep, is open in another process or thread, or can't
                be written.
        """
        if os.path.isdir(path):
            raise FeatpatchError(f"the journal {str(path)!r} is a folder: expected the path of a file")
        header = json.loads(json.dumps({"format": FORMAT, **subject, "baselines": [*map(float, baselines)], "rows": int(rows)}))
        if not os.path.exists(path):
            check_writable(path)
            with _writing(path):
                path.touch()
        held = _locked(path) if path.is_file() else None
        content = path.read_bytes() if path.is_file() else b""
        lines, intact = _intact(content)
        if not lines:
            _check_torn(path, content, header)
            with _writing(path):
                path.write_bytes(b"")
            journal = cls(int(rows), {}, path, header, held)
            journal._append(header)
            return journal
        for line in (lines[0], *(line for line in lines[1:] if "format" in line)):
            _check_subject(path, line, header)
        if intact < len(content):
            with _writing(path):
                os.truncate(path, intact)
        finished = {line["batch"]: values for line in lines[1:] if (values := _values(line)) is not None}
        return cls(lines[0]["rows"], finished, path, lines[0], held)

    def put(self, key: str, values: Float[torch.Tensor, " values"]) -> None:
        """Append a finished batch to the file and flush it to the disk.

        Raises:
            FeatpatchError: the file can't be written, or another file has replaced the journal.
        """
        content = np.ascontiguousarray(values.numpy(), "<f8").tobytes()
        if not self._in_place():
            self._rewrite()
        self._append(_batch(key, content))
        self.finished[key] = content

    def close(self) -> None:
        """Let other threads and processes open the file, even while an exception still refers to this journal."""
        object.__setattr__(self, "lock", None)

    def _append(self, line: Mapping[str, Any]) -> None:
        with _writing(self.path), self.path.open("ab") as file:
            file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())

    def _in_place(self) -> bool:
        """Return whether the file at `path` is still the one that was opened."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return status.st_size > 0 and (self.lock is None or os.path.samestat(status, os.fstat(self.lock.file)))

    def _rewrite(self) -> None:
        """Write all finished batches again, after the file was deleted, emptied or replaced by a copy during the run.

        Raises:
            FeatpatchError: the file was replaced by something else.
        """
        if self.path.is_file() and self.path.stat().st_size:
            _locked(self.path)
            if not self.path.read_bytes().startswith(_encoded(self.header)):
                raise FeatpatchError(
                    f"the journal {str(self.path)!r} was replaced by another file while it was in use: expected it to stay in "
                    "place; run the sweep again with another path"
                )
        with writing(self.path) as file:
            lines = [self.header, *(_batch(key, values) for key, values in self.finished.items())]
            file.write_bytes(b"".join(map(_encoded, lines)))
        object.__setattr__(self, "lock", _locked(self.path))


def batch_key(names: Iterable[str]) -> str:
    """Return a short name for a batch, computed from the names of its patches."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]


def beside(path: str | Path | None, ending: str) -> str | None:
    """Return the path of another journal of the same work, with something at the end of its name; None without a journal."""
    return None if path is None else f"{as_path(path)}{ending}"


def to_resume(path: str | Path | None) -> str:
    """Return a sentence on how to resume interrupted work with a journal, or without one."""
    if path is None:
        return "pass journal='work.journal' to keep what is measured and to resume from there"
    return f"the journal {str(path)!r} has what is measured: the same call with it resumes from there"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError in this context into a FeatpatchError that says what to do."""
    try:
        yield
    except OSError as error:
        raise FeatpatchError(
            f"the journal {str(path)!r} can't be written ({error.strerror}): expected a folder with write permission and free "
            "disk space; finished batches are kept; free some space, then run the same sweep again to resume"
        ) from error


def _locked(path: Path) -> Lock | None:
    try:
        return lock(path)
    except BlockingIOError as error:
        raise FeatpatchError(
            f"the journal {str(path)!r} is in use by another process or thread: expected only one user at a time; wait for it "
            "to finish, or give another path"
        ) from error


def _batch(key: str, values: bytes) -> dict[str, str]:
    """Return the line that stores a batch."""
    return {"batch": key, "values": base64.b64encode(values).decode()}


def _encoded(line: Mapping[str, Any]) -> bytes:
    """Encode a line as it is written to the file, with its checksum."""
    text = json.dumps(line)
    return f"{text} {_checksum(text)}\n".encode()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _intact(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the intact lines, and the offset at which the last of them ends; no lines if the first is damaged."""
    lines, end, intact = [], 0, 0
    for raw in content.split(b"\n")[:-1]:
        end += len(raw) + 1
        line = _line(raw)
        if line is not None:
            lines.append(line)
            intact = end
        elif not lines:
            return [], 0
    return lines, intact


def _line(raw: bytes) -> dict[str, Any] | None:
    """Parse a line; None if its checksum is wrong or it is not a JSON object."""
    text, _, checksum = raw.decode(errors="replace").rpartition(" ")
    try:
        content = read_json(text) if checksum == _checksum(text) else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _values(line: Mapping[str, Any]) -> bytes | None:
    """Decode the values of a batch; None if the line is not a batch or its values are not finite float64."""
    try:
        values = base64.b64decode(line["values"], validate=True)
        sound = isinstance(line["batch"], str) and np.isfinite(np.frombuffer(values, "<f8")).all()
    except (KeyError, TypeError, ValueError):
        return None
    return values if sound else None


def _check_torn(path: Path, content: bytes, header: Mapping[str, Any]) -> None:
    """Check that a file may be overwritten: it is the torn first line of this journal, up to the row budget.

    Raises:
        FeatpatchError: the file holds something else.
    """
    expected = json.dumps({**header, "rows": None}).encode().removesuffix(b"null}")
    if b"\n" in content or not (expected.startswith(content) or content.startswith(expected)):
        raise FeatpatchError(
            f"{str(path)!r} is not a journal of this sweep, or its first line is damaged: expected a new path or a journal of "
            "the same sweep; give another path, or delete the file to start over"
        )


def _check_subject(path: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    keys = sorted({*header, *found} - {"rows", "baselines"})
    differing = [key for key in keys if found.get(key) != header.get(key)]
    if not differing and not _close(found.get("baselines"), header["baselines"]):
        differing = ["the metric of the unpatched runs"]
    if not differing and not (type(found.get("rows")) is int and 0 < found["rows"] < 2**63):
        differing = ["the row budget"]
    if differing:
        raise FeatpatchError(
            f"the journal {str(path)!r} belongs to another sweep: {', '.join(differing)} differ; expected the same model, "
            "SAEs, pairs and options; give another path, or delete the file to start over"
        )


def _close(found: object, expected: Sequence[float]) -> bool:
    """Return whether a list holds the expected numbers, up to rounding."""
    numbers = isinstance(found, list) and len(found) == len(expected) and all(type(value) is float for value in found)
    return numbers and np.allclose(found, expected, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]
