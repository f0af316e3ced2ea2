"""Rank components by causal recovery: heads, what is inside them, MLPs, neurons, the stream; same pairs, metric and table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featpatch import sites as hooks
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens, dictionaries, identity, neurons, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import DIRECTIONS, Direction
from featpatch.patching.component_parts import HeadPart, NeuronPart, WholePart
from featpatch.patching.study import Asked, Metrics, Noise, Part, Study


def rank_components(
    model: Any,
    pairs: Pairs,
    *,
    sites: str | Sequence[str] = hooks.SHOWN,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Exact causal effect of components, in the same table as that of features.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: clean and corrupted prompts with their answers.
        sites: which components, of every layer: `"resid_pre"`, `"resid_mid"`, `"resid_post"`, `"attn_out"`, `"mlp_out"`
            (whole activations); by head `"z"` (the head's output; `"result"` is the same after W_O), `"q"`, `"k"`, `"v"`
            (before rotation; keys and values by the heads that they are shared by), `"pattern"` (a row: all that a position
            attends to) and `"pattern_entry"` (position `"end <- S2"`: what one attends of another); `"neurons"` of the MLPs.
        layers: which layers; all by default.
        positions, directions, metric, batch_rows, noise, journal, executor, progress: as in `rank_features`. For keys
            and values the position is that of the key or value.

    Returns:
        One row per component (and position) that differs in at least one pair: of kind `activation`, `head` or `neuron`.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
    """
    study = component_study(model, pairs, sites, layers, Asked(positions, directions, metric, batch_rows, noise))
    return study.run(journal, progress=progress, executor=executor)


def component_study(model: Any, pairs: Pairs, sites: str | Sequence[str], layers: Sequence[int] | None, asked: Asked) -> Study:
    """What `rank_components` with these arguments does, checked."""
    check_pairs(pairs)
    lens = wrap(model)
    return Study.of(lens, *component_parts(lens, sites, layers, asked.positions), pairs, asked)


def component_parts(
    lens: Lens, sites: str | Sequence[str], layers: Sequence[int] | None, positions: Positions
) -> tuple[list[Part], dict[str, Any]]:
    """The parts that hold these components, and what to note of them with the results.

    Raises:
        FeatpatchError: an unknown component or layer, or one that the model doesn't have; entries of the pattern at several
            positions together.
    """
    names, chosen = hooks.check_components(sites, positions), hooks.check_layers(layers, lens.n_layers)
    whole = [lens.site(hooks.component(layer, name)) for name in names if name in hooks.WHOLE for layer in chosen]
    parts: list[Part] = [WholePart(whole)] if whole else []
    for name in names:
        for layer in chosen:
            if name == "neurons":
                parts.append(NeuronPart(dictionaries(lens, _neurons(lens, layer))[0]))
            elif name not in hooks.WHOLE:
                lens.site(hooks.component(layer, "z" if name == "result" else name))
                parts.append(HeadPart(lens, layer, name))
    return parts, {"components": names, "layers": chosen}


def _neurons(lens: Lens, layer: int) -> Any:
    """Neurons through W_out where the MLP's output is that, else as coordinates at their hook, which is slower."""
    try:
        return neurons(lens.model, layer)
    except FeatpatchError:
        return identity(lens.model, hooks.component(layer, "neurons"))
