"""Labels of features from Neuronpedia's files of explanations."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.files import as_path, read_json
from featpatch.nodes import Node
from featpatch.sae.nodes import feature

EXPECTED = "expected a file of Neuronpedia's explanations, JSON or JSON Lines with an `index` and a `description` per entry"


def load_labels(path: str | Path, sae: Any, *, layer: int | None = None) -> dict[Node, str]:
    """Read the labels of an SAE's features from a file of explanations, as Neuronpedia exports them.

    Neuronpedia offers such files for download at `/api/explanation/export?modelId=...&saeId=...` and as batches of JSON Lines.

    Args:
        path: a file with a list of explanations in JSON, or with one explanation per line; it may be compressed (`.gz`).
        sae: the SAE, as in `fp.feature`.
        layer: for a cross-layer transcoder, the layer whose features are labelled.

    Returns:
        The label of each feature in the file, by node (at all positions). Of several explanations of a feature, the first.

    Raises:
        FeatpatchError: the file can't be read, holds no explanations, or holds those of several SAEs.

    Examples:
        >>> import json
        >>> path = folder / "labels.json"
        >>> _ = path.write_text(json.dumps([{"layer": "1-res", "index": "433", "description": "a name that is repeated"}]))
        >>> fp.load_labels(path, saes[0])[fp.feature(saes[0], 433)]
        'a name that is repeated'
    """
    entries = _entries(as_path(path))
    sources = {str(entry.get("layer")) for entry in entries}
    if len(sources) > 1:
        raise FeatpatchError(
            f"{str(path)!r} has explanations for several SAEs ({', '.join(sorted(sources))[:80]}): expected those of one; keep "
            "the entries of this SAE in a file of their own"
        )
    labels: dict[Node, str] = {}
    for entry in entries:
        labels.setdefault(feature(sae, int(entry["index"]), layer=layer), entry["description"].strip())
    return labels


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return the explanations in a file.

    Raises:
        FeatpatchError: the file can't be read or holds none.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({str(error)[:100]}): {EXPECTED}") from error
    try:
        entries = (
            read_json(text)
            if text.lstrip().startswith("[")
            else [read_json(line) for line in text.split("\n") if line.strip()]  # a text may hold other line separators
        )
    except ValueError as error:
        raise FeatpatchError(f"{str(path)!r} is not JSON ({str(error)[:100]}): {EXPECTED}") from error
    strange = [entry for entry in entries if not _is_explanation(entry)]
    if strange or not entries:
        got = f"an entry {json.dumps(strange[0])[:80]}" if strange else "no entries"
        raise FeatpatchError(f"{str(path)!r} has {got}: {EXPECTED}")
    return entries


def _is_explanation(entry: Any) -> bool:
    index = entry.get("index") if isinstance(entry, dict) else None
    number = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    text = isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10
    return (number or text) and isinstance(entry.get("description"), str) and bool(entry["description"].strip())
