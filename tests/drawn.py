"""How many random examples properties draw: few by default and more in `make extended`, always the same ones.

FEATPATCH_EXAMPLES=10000 draws as many in a file, or for each case of a test with `each`, other ones each time.
"""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

FEW, MANY = 100, 400
ASKED = os.environ.get("FEATPATCH_EXAMPLES")
default = MANY


def share(part: float) -> Any:
    """Settings of a test that makes this share of all examples; what hangs ends at the timeout of the whole test."""
    return settings(
        max_examples=max(3, round(int(ASKED or default) * part)), derandomize=ASKED is None, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip


def each(part: float) -> Any:
    """Settings of a test that makes this share of all examples, or as many as FEATPATCH_EXAMPLES asks for."""
    return share(part if ASKED is None else 1.0)
