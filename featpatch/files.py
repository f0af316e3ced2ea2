"""Files: what others wrote is checked as it is read, and what we write is there whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from featpatch.errors import FeatpatchError
from featpatch.untrusted import for_spreadsheets

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEVELS = 20
"""Lists and objects within one another, at most; nothing that is read here needs as many."""


def as_path(path: object) -> Path:
    """A path that the file system can look at, whether or not something is there.

    Raises:
        FeatpatchError: it is no path, too long, or behind a folder that can't be entered.
    """
    if not isinstance(path, (str, PathLike)):
        raise FeatpatchError(f"the path is of type {type(path).__name__}: expected a text or a pathlib.Path")
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason, name = getattr(error, "strerror", None) or error, str(path)
        shown = repr(name) if len(name) <= 200 else f"{name[:60]!r}... ({len(name)} characters)"
        raise FeatpatchError(
            f"the path {shown} can't be looked at ({reason}): expected the path of a file or a folder"
        ) from error
    return Path(path)


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes the place of `path` once the block has ended without an exception.

    Whatever happens, whoever reads `path` finds the old file or the new one. A link is followed; a device or a pipe, such as
    /dev/stdout, is written to directly.

    Raises:
        FeatpatchError: the path is a folder, or nothing can be written there; what was there before is left as it was.
    """
    with _beside(as_path(path)) as (target, beside):
        mode = beside.stat().st_mode
        yield beside
        if beside != target:
            beside.chmod(mode)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)


def write_csv(path: str | Path, frame: "pd.DataFrame") -> None:
    """Write a table as CSV, whole or not at all, with no cell that a spreadsheet takes for a formula.

    Raises:
        FeatpatchError: the path is a folder, or nothing can be written there.
    """
    with writing(path) as file:
        for_spreadsheets(frame).to_csv(file, index=False)


def check_writable(path: str | Path) -> None:
    """Find out before a long computation whether its result can be written, by writing a byte beside it.

    Raises:
        FeatpatchError: it can't.
    """
    with _beside(as_path(path)) as (target, beside):
        if beside != target:
            beside.write_bytes(b" ")


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """Where a file belongs, and an empty one in the same folder with its permissions, which is gone in the end."""
    try:
        if path.is_dir():
            raise FeatpatchError(f"{str(path)!r} is a folder: expected the path of a file")
        if path.exists() and not path.is_file():
            yield path, path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".featpatch-{os.getpid()}-{get_ident()}")
        try:
            beside.touch()
            if target.exists():
                shutil.copymode(target, beside)
            yield target, beside
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise FeatpatchError(
            f"{str(path)[:200]!r} can't be written ({error.strerror or error}): expected a path in a folder that can be "
            "written to, on a disk with room; what was there before is left as it was; make room, or give another path"
        ) from error


@dataclass(eq=False)
class Lock:
    """An open file that is closed, and so unlocked, with the last object that refers to it."""

    file: int

    def __del__(self) -> None:
        os.close(self.file)


HELD: WeakValueDictionary[tuple[int, int, int], Lock] = WeakValueDictionary()
"""By process (a fork has none), device and inode."""


def lock(path: Path) -> Lock | None:
    """Keep other processes off a file or folder for as long as the result lives; None where files can't be locked.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there is no such file.
    """
    if fcntl is None:
        return None
    found = Lock(os.open(path, os.O_RDONLY))
    status = os.fstat(found.file)
    try:
        found = HELD.setdefault((os.getpid(), status.st_dev, status.st_ino), found)
        fcntl.flock(found.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return None
    return found


def sha256(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds half a character (a lone surrogate), which no file can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"more than {LEVELS} lists and objects within one another") from error
    _check(value, LEVELS)
    return value


def _check(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError(f"more than {LEVELS} lists and objects within one another")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (list, dict)):
        for part in value if isinstance(value, list) else (*value, *value.values()):
            _check(part, levels - 1)
