"""How many examples properties draw: FEATPATCH_EXAMPLES=10000 makes as many in a file; 400 by default, always the same ones."""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("FEATPATCH_EXAMPLES", "400"))


def share(part: float, deadline: int | None = 5000) -> Any:
    """Settings of a test that makes this share of all examples, each within so many milliseconds."""
    return settings(
        max_examples=max(3, round(EXAMPLES * part)), derandomize=EXAMPLES == 400, deadline=deadline, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )  # fmt: skip
