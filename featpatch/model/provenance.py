"""Collect what results depend on and how they were made."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import featpatch
from featpatch.model.lens import Lens
from featpatch.pairs.pair import Positions, Wanted
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


def measured_places(
    lens: Lens, pairs: Pairs, positions: Positions, wanted: Sequence[Wanted], sites: Iterable[str]
) -> dict[str, Any]:
    """Return where a table of effects is measured, as plain data, so that a node without a row is known to be unchanged.

    Args:
        positions: the positions that were asked for.
        wanted: for each pair, the token positions that each of them stands for.
        sites: the hook points that are patched.

    Returns:
        `positions` and `sites`; unless positions are `"all"`, `places` with a list per pair: for `"each"` its token positions,
        for a list the first token of each entry; and `tokens`, the text of each token if all clean prompts are the same.
    """
    places = {} if positions == "all" else {"places": [[span[0] for span in of_pair.values()] for of_pair in wanted]}
    decode = getattr(lens.tokenizer, "decode", None)
    one = decode is not None and all(pair.clean == pairs[0].clean for pair in pairs)
    tokens = {"tokens": [decode([token]) for token in pairs[0].clean]} if one and decode is not None else {}
    listed = positions if isinstance(positions, str) else [*wanted[0]]
    return {"positions": listed, "sites": list(dict.fromkeys(sites)), **places, **tokens}


@cache
def code_digest() -> str:
    """Return the SHA-256 of the modules of this package, with their names."""
    package, total = Path(featpatch.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()
