"""Read untrusted files safely, and write files completely or not at all."""

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

MAX_DEPTH = 20
"""The deepest nesting of JSON that is read; more than any file of featpatch needs."""


def as_path(path: object) -> Path:
    """Convert an argument to a `Path` that the file system accepts, whether or not it exists.

    Raises:
        FeatpatchError: the argument is not a path, is too long, or is in a folder that can't be entered.
    """
    if not isinstance(path, (str, PathLike)):
        raise FeatpatchError(f"the path is of type {type(path).__name__}: expected a str or a pathlib.Path")
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # files to write need not exist, and whoever reads one says what was expected in it
    except (OSError, ValueError) as error:
        reason, name = getattr(error, "strerror", None) or error, str(path)
        shown = repr(name) if len(name) <= 200 else f"{name[:60]!r}... ({len(name)} characters)"
        raise FeatpatchError(
            f"the path {shown} can't be accessed ({reason}): expected the path of a file or a folder"
        ) from error
    return Path(path)


ENDINGS = frozenset(f".{ending}" for ending in (
    "bin", "csv", "docx", "gz", "htm", "html", "ipynb", "jpg", "json", "jsonl", "md", "ndjson", "npy", "npz", "parquet", "pdf",
    "pickle", "pkl", "png", "pt", "pth", "py", "safetensors", "svg", "toml", "tsv", "txt", "xlsx", "yaml", "yml", "zip",
))  # fmt: skip
"""The endings of names that say which format a file has."""


def path_to_write(path: object, *endings: str) -> Path:
    """Convert the name of a file of a fixed format to a `Path`; an ending of a known format is one of this format's.

    Devices, pipes and folders are left to the function that writes.

    Raises:
        FeatpatchError: the argument is not a path, or its ending is that of another format.
    """
    file = as_path(path)
    if file.suffix.lower() in ENDINGS.difference(endings) and (file.is_file() or not file.exists()):
        raise FeatpatchError(
            f"the path {str(file)[:200]!r} ends in {file.suffix!r}: expected {' or '.join(endings)}, the format of this file; "
            f"write {str(file.with_suffix(endings[0]))[:200]!r}"
        )
    return file


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces `path` if the context ends without an exception.

    At any moment `path` holds either the old file or the complete new one. Symbolic links are followed. A device or a pipe,
    such as /dev/stdout, is written to directly.

    Raises:
        FeatpatchError: the path is a folder or can't be written to; an old file is left unchanged.
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
    """Write a table as CSV, completely or not at all, without cells that a spreadsheet would run as formulas.

    Raises:
        FeatpatchError: the path is a folder or can't be written to.
    """
    with writing(path) as file:
        for_spreadsheets(frame).to_csv(file, index=False)


def check_writable(path: str | Path) -> None:
    """Check before a long computation that its result can be written, by writing one byte to a temporary file beside it.

    Raises:
        FeatpatchError: the path is a folder or can't be written to.
    """
    with _beside(as_path(path)) as (target, beside):
        if beside != target:
            beside.write_bytes(b" ")


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the file to write, and an empty temporary file beside it with the same permissions, deleted on exit.

    For a device or a pipe, both are the path itself.

    Raises:
        FeatpatchError: the path is a folder or can't be written to.
    """
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
            f"{str(path)[:200]!r} can't be written ({error.strerror or error}): expected a folder with write permission and "
            "free disk space; an existing file is left unchanged; free some space, or give another path"
        ) from error


@dataclass(eq=False)
class Lock:
    """A locked file; the lock is released when this object is deleted."""

    file: int

    def __del__(self) -> None:
        os.close(self.file)


HELD: WeakValueDictionary[tuple[int, int, int, int], Lock] = WeakValueDictionary()
"""The locks of this process, by process id (a forked process holds none), thread, device and inode."""


def lock(path: Path) -> Lock | None:
    """Lock a file or folder against other processes and threads for as long as the result exists.

    Returns:
        The lock; None if the platform or the file system has no locks.

    Raises:
        BlockingIOError: another process or thread holds the lock.
        OSError: the file does not exist.
    """
    if fcntl is None:
        return None
    found = Lock(os.open(path, os.O_RDONLY))
    status = os.fstat(found.file)
    try:
        found = HELD.setdefault((os.getpid(), get_ident(), status.st_dev, status.st_ino), found)
        fcntl.flock(found.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return None
    return found


def read_json(text: str) -> Any:
    """Parse JSON from an untrusted source.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or holds a lone surrogate, which can't be written to a file.
    """
    try:
        value = json.loads(text)
        _check(value, MAX_DEPTH)
    except RecursionError as error:
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep") from error
    return value


def read_yaml(text: str) -> Any:
    """Parse YAML from an untrusted source; no code in it is run.

    Raises:
        ValueError: the text is not YAML, is nested too deeply, holds a lone surrogate, or has aliases, with which a few lines
            can stand for billions of values.
    """
    import yaml  # type: ignore[import-untyped]

    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"lists and mappings are nested more than {MAX_DEPTH} deep")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, such as *a: expected each value to be written out")
        value = yaml.safe_load(text)
    except Exception as error:  # PyYAML raises KeyError, IndexError and others for a value that does not fit its tag
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    _check(value, MAX_DEPTH)
    return value


def _check(value: Any, depth: int) -> None:
    if not depth:
        raise RecursionError
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (list, tuple, set, dict)):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(part, depth - 1)
