"""English text that a machine without a network holds: manuals, documentation of packages, docstrings, Python's reference.

Which text this is depends on what is installed. It is gathered once and kept in a file, so that a run can be repeated.
"""

import ast
import gzip
import hashlib
import json
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from featpatch.errors import FeatpatchError

MANUALS = (Path("/usr/share/doc"), Path("/usr/share/common-licenses"))
ENDINGS = ("", ".txt", ".md", ".rst", ".gz")
MARKS = ("@", "://", "</", "---", "===", ">>>", "<|")
"""Marks of addresses, markup, rules and code; a paragraph with one of them is left out."""
LETTERS = 0.85
"""The smallest share of letters and spaces in a paragraph that counts as prose."""
SHORTEST = 300
"""The smallest number of characters of a document."""
LONGEST = 3000
"""The largest number of characters that are taken from one file."""
HELD_OUT = 10
"""One document of this many is held out."""


def gather(file: Path, characters: int, sources: Mapping[str, Sequence[Path]] | None = None) -> None:
    """Write documents as JSON lines `{"kind", "text"}` until they have enough characters; an existing file is kept.

    Kinds of sources take turns. A paragraph that has been seen, in any document, is left out.

    Args:
        file: the file to write.
        characters: the number of characters to gather.
        sources: the files of each kind; by default those of this machine.

    Raises:
        FeatpatchError: this machine does not hold so much text.
    """
    if file.is_file():
        return
    kinds = found_sources() if sources is None else sources
    orders = {kind: random.Random(kind).sample(sorted(paths), len(paths)) for kind, paths in kinds.items()}
    streams = [labelled(kind, paths) for kind, paths in orders.items()]
    seen, lines, total = set[bytes](), list[str](), 0
    for kind, text in (document for turn in zip_longest(*streams) for document in turn if document is not None):
        if kept := prose(text, seen):
            lines.append(json.dumps({"kind": kind, "text": kept}))
            total += len(kept)
        if total >= characters:
            break
    else:
        raise FeatpatchError(
            f"this machine holds {total:,} characters of text: expected {characters:,}; ask for fewer tokens, or install "
            "packages with documentation"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def labelled(kind: str, paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the texts of files, each with the kind of its source."""
    for path in paths:
        for text in texts(path):
            yield kind, text


def documents(files: Sequence[Path], *, held_out: bool) -> list[str]:
    """Return the documents of some files that are held out, or all others, in an order that mixes the files."""
    chosen = [
        json.loads(line)["text"]
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines())
        if (number % HELD_OUT == 0) == held_out
    ]
    return random.Random(0).sample(chosen, len(chosen))


def amounts(files: Sequence[Path]) -> dict[str, int]:
    """Return the number of characters of each kind of source."""
    counts = Counter[str]()
    for line in (line for file in files for line in file.read_text(encoding="utf-8").splitlines()):
        document = json.loads(line)
        counts[document["kind"]] += len(document["text"])
    return dict(counts)


def found_sources() -> dict[str, list[Path]]:
    """Return the files of this machine that may hold text, by kind."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    folders = {packages, Path(torch.__file__).parent.parent}  # packages can be in several places
    manuals = [
        path for folder in MANUALS for path in folder.rglob("*") if path.suffix in ENDINGS and "changelog" not in path.name
    ]
    written = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in ENDINGS[1:4] or path.name == "METADATA"
    ]
    code = [path for folder in (library, *folders) for path in folder.rglob("*.py") if "tests" not in path.parts]
    reference = library / "pydoc_data" / "topics.py"
    return {
        "manuals of the system": [path for path in manuals if path.is_file()],
        "documentation of packages": [path for path in written if path.is_file()],
        "docstrings": sorted(set(code) - {reference}),
        "Python's reference": [reference] if reference.is_file() else [],
    }


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file: its docstrings, the topics of Python's reference, or all that is in it."""
    try:
        content = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if path.suffix != ".py":
        yield content.partition("\n\n")[2] if path.name == "METADATA" else content
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the code of others
            tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    if path.parent.name == "pydoc_data":
        for topic in ast.walk(tree):
            if isinstance(topic, ast.Constant) and isinstance(topic.value, str):
                yield topic.value
        return
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, described)]
    yield "\n\n".join(text for text in found if text)


def prose(text: str, seen: set[bytes]) -> str:
    """Return the new paragraphs of a text that are prose, or an empty text if they are too short to be a document.

    Args:
        seen: the digests of all paragraphs so far, to which those of this text are added.
    """
    kept = []
    for paragraph in text[:LONGEST].split("\n\n"):
        line = " ".join(paragraph.split())
        digest = hashlib.blake2b(line.lower().encode(), digest_size=12).digest()
        if digest not in seen and len(line) > 80 and is_prose(line):
            kept.append(line)
            seen.add(digest)
    made = "\n\n".join(kept)
    return made if len(made) >= SHORTEST else ""


def is_prose(line: str) -> bool:
    """Return whether a paragraph consists mostly of letters and has no address, markup or code that `MARKS` tell."""
    letters = sum(character.isalpha() or character == " " for character in line)
    return letters >= LETTERS * len(line) and not any(mark in line for mark in MARKS)
