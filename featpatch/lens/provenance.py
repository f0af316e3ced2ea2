"""What results depend on, and where they come from, whichever way they were made."""

from importlib.metadata import version
from typing import Any

from featpatch.lens.lens import Lens
from featpatch.pairs import Pairs


def provenance(lens: Lens, pairs: Pairs) -> dict[str, Any]:
    """Digests of the pairs and of the model's weights, tags of the pairs if they have any, versions."""
    tags = {"tags": [dict(pair.tags) for pair in pairs]} if any(pair.tags for pair in pairs) else {}
    return {
        "pairs": pairs.digest(),
        **tags,
        "model": {"name": str(lens.model.cfg.model_name), "sha256": lens.digest()},
        "versions": {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")},
    }
