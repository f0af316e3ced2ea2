"""Collect what results depend on and how they were made."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import featpatch
from featpatch.model.lens import Lens
from featpatch.pairs.pairs import Pairs
from featpatch.untrusted import without_folder


def provenance(lens: Lens, pairs: Pairs) -> dict[str, Any]:
    """Return what results depend on, as plain data.

    These are digests of the pairs, of the model's weights and of this library's code, the tags of pairs if there are any, and
    versions of packages.
    """
    tags = {"tags": [dict(pair.tags) for pair in pairs]} if any(pair.tags for pair in pairs) else {}
    versions = {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")}
    return {
        "pairs": pairs.digest(),
        **tags,
        "model": {"name": without_folder(str(lens.model.cfg.model_name)), "sha256": lens.digest()},
        "versions": {**versions, "featpatch's code": code_digest()},
    }


@cache
def code_digest() -> str:
    """Return the SHA-256 of the modules of this package, with their names."""
    package, total = Path(featpatch.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()
