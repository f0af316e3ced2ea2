"""featpatch: which SAE features cause this behaviour?

Names are imported when they are first used, so that `import featpatch` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featpatch import diagram as diagram
    from featpatch import tasks as tasks
    from featpatch.attribution import Calibration, Gradients, calibrate, estimate_components, estimate_features, estimate_paths
    from featpatch.checkpoints import Demo, load_demo
    from featpatch.circuits import Circuit, FaithfulnessCurve, Hypothesis, Scrubbed, find_circuit, scrub
    from featpatch.comparison import Comparison, compare
    from featpatch.effects import Audit, Effects
    from featpatch.engine import SlowPathWarning
    from featpatch.errors import FeatpatchError
    from featpatch.execution import Ray
    from featpatch.firing import Description, describe
    from featpatch.forecast import Plan
    from featpatch.lens import adapt, identity, load_sae, neurons, pca
    from featpatch.loading import Loaded, load
    from featpatch.pairs import Pair, Pairs
    from featpatch.patch import LOGITS, Edge, Node, Patch
    from featpatch.patching import (
        Controls,
        Curve,
        Noise,
        Selection,
        ablate,
        cumulative,
        diagnose,
        do,
        interactions,
        random_controls,
        rank_components,
        select_features,
    )
    from featpatch.prediction import Prediction, predict
    from featpatch.reporting import report
    from featpatch.screening import plan, rank_features, rank_paths
    from featpatch.selfcheck import check
    from featpatch.streaming import Stored, stream_features
    from featpatch.verdict import Check
    from featpatch.verifying import Verified, verify

HOMES = {
    "Audit": "effects",
    "Calibration": "attribution",
    "Check": "verdict",
    "Circuit": "circuits",
    "Comparison": "comparison",
    "Controls": "patching",
    "Curve": "patching",
    "Demo": "checkpoints",
    "Description": "firing",
    "Edge": "patch",
    "Effects": "effects",
    "FaithfulnessCurve": "circuits",
    "FeatpatchError": "errors",
    "LOGITS": "patch",
    "Gradients": "attribution",
    "Hypothesis": "circuits",
    "Loaded": "loading",
    "Node": "patch",
    "Noise": "patching",
    "Pair": "pairs",
    "Pairs": "pairs",
    "Patch": "patch",
    "Plan": "forecast",
    "Prediction": "prediction",
    "Ray": "execution",
    "Selection": "patching",
    "Scrubbed": "circuits",
    "Stored": "streaming",
    "Verified": "verifying",
    "SlowPathWarning": "engine",
    "ablate": "patching",
    "adapt": "lens",
    "calibrate": "attribution",
    "check": "selfcheck",
    "compare": "comparison",
    "cumulative": "patching",
    "describe": "firing",
    "diagnose": "patching",
    "diagram": "diagram",
    "do": "patching",
    "estimate_components": "attribution",
    "estimate_features": "attribution",
    "estimate_paths": "attribution",
    "find_circuit": "circuits",
    "identity": "lens",
    "interactions": "patching",
    "load": "loading",
    "load_demo": "checkpoints",
    "load_sae": "lens",
    "neurons": "lens",
    "pca": "lens",
    "plan": "screening",
    "predict": "prediction",
    "random_controls": "patching",
    "rank_components": "patching",
    "rank_features": "screening",
    "rank_paths": "screening",
    "report": "reporting",
    "scrub": "circuits",
    "select_features": "patching",
    "stream_features": "streaming",
    "tasks": "tasks",
    "verify": "verifying",
}

__all__ = [
    "LOGITS", "Audit", "Calibration", "Check", "Circuit", "Comparison", "Controls", "Curve", "Demo", "Description", "Edge",
    "Effects", "FaithfulnessCurve", "FeatpatchError", "Gradients", "Hypothesis", "Loaded", "Node", "Noise", "Pair", "Pairs",
    "Patch", "Plan", "Prediction", "Ray", "Scrubbed", "Selection", "SlowPathWarning", "Stored", "Verified", "ablate", "adapt",
    "calibrate", "check", "compare", "cumulative", "describe", "diagnose", "diagram", "do", "estimate_components",
    "estimate_features", "estimate_paths", "find_circuit", "identity", "interactions", "load", "load_demo", "load_sae",
    "neurons", "pca", "plan", "predict", "random_controls", "rank_components", "rank_features", "rank_paths", "report", "scrub",
    "select_features", "stream_features", "tasks", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'featpatch' has no attribute {name!r}: expected one of {', '.join(HOMES)}")
    home = import_module(f"featpatch.{HOMES[name]}")
    return home if name == HOMES[name] else getattr(home, name)


def __dir__() -> list[str]:
    return list(__all__)
