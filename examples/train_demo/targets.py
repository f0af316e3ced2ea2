"""What the checkpoints should reach, compared with what was measured."""

from dataclasses import dataclass
from typing import Any

RESIDUAL_VARIANCE = 0.95
OTHER_VARIANCE = 0.9
SHARE_OF_A_STEP = 0.1
"""A head takes part in a task if patching it alone recovers this much."""


@dataclass(frozen=True)
class Target:
    """A goal, the measured value, and whether it was reached."""

    goal: str
    value: str
    reached: bool


def heads(steps: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Heads that take part in a task, as "layer.head", the strongest first, with their recoveries."""
    found = []
    for hook, places in steps["recovery"].items():
        if hook.endswith("hook_z"):
            layer = hook.split(".")[1]
            found += [(f"{layer}.{name.removeprefix('head ')}", recovery) for name, recovery in places.items()]
    strong = [head for head in found if head[1][0] > SHARE_OF_A_STEP]
    return sorted(strong, key=lambda head: -head[1][0])


def model_targets(measured: dict[str, Any]) -> list[Target]:
    """The targets of the language model."""
    accuracy, ioi = measured["accuracy"], measured["steps"]["ioi"]
    found = []
    for task, score in accuracy.items():
        if task.startswith("IOI"):
            found.append(Target(f"{task}: accuracy > .99", f"{score:.3f}", score > 0.99))
        elif task.startswith("Facts"):
            found.append(Target(f"{task}: accuracy > .95", f"{score:.3f}", score > 0.95))
    after_first = ioi["recovery"]["blocks.1.hook_resid_pre"]
    giver, end = after_first["S2"][0], after_first["end"][0]
    found.append(Target("IOI: S2 after the first layer recovers > .5", f"{giver:.2f}", giver > 0.5))
    found.append(Target("IOI: the last word after the first layer recovers < .5", f"{end:.2f}", end < 0.5))
    names = [name for name, _ in heads(ioi)]
    layers = {name.split(".")[0] for name in names}
    found.append(Target("IOI: heads of different layers take part", ", ".join(names) or "none", len(layers) > 1))
    return found


def dictionary_targets(site: str, measured: dict[str, Any]) -> list[Target]:
    """The targets of a dictionary."""
    goal = RESIDUAL_VARIANCE if "resid" in site else OTHER_VARIANCE
    value = measured["explained_variance"]
    return [Target(f"explained variance > {goal}", f"{value:.3f}", value > goal)]


def best_seed(seeds: dict[str, dict[str, Any]]) -> str:
    """The seed that reaches most targets; among equals the one with the best mean accuracy."""

    def rank(seed: str) -> tuple[int, float]:
        measured = seeds[seed]["measured"]
        reached = sum(target.reached for target in model_targets(measured))
        return reached, sum(measured["accuracy"].values()) / len(measured["accuracy"])

    return max(seeds, key=rank)
