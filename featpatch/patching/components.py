"""Rank heads, their queries, keys, values and patterns, MLPs, neurons and the residual stream by causal recovery."""

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
    """Measure the exact causal effect of components, in the same kind of table as for features.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: clean and corrupted prompts with their answers.
        sites: the components. Whole activations: `"resid_pre"`, `"resid_mid"`, `"resid_post"`, `"attn_out"`, `"mlp_out"`. By
            head: `"z"` (the head's output; `"result"` is the same after W_O), `"q"`, `"k"`, `"v"` (before rotation; one row per
            key or value head, which several query heads may share), `"pattern"` (one row of the pattern: the attention from a
            position to all others) and `"pattern_entry"` (position `"end <- S2"`: the attention from one position to another).
            `"neurons"`: the neurons of the MLPs.
        layers: the layers; all by default.
        positions, directions, metric, batch_rows, noise, journal, executor, progress: as in `rank_features`. For keys
            and values the position is that of the key or value.

    Returns:
        One row per component (and position) that differs in at least one pair, of kind `activation`, `head` or `neuron`.

    Raises:
        FeatpatchError: if the input is unusable; the message gives the value, what was expected and what to do next.
    """
    study = component_study(model, pairs, sites, layers, Asked(positions, directions, metric, batch_rows, noise))
    return study.run(journal, progress=progress, executor=executor)


def component_study(model: Any, pairs: Pairs, sites: str | Sequence[str], layers: Sequence[int] | None, asked: Asked) -> Study:
    """Return the validated experiment that `rank_components` runs with these arguments."""
    check_pairs(pairs)
    lens = wrap(model)
    return Study.of(lens, *component_parts(lens, sites, layers, asked.positions), pairs, asked)


def component_parts(
    lens: Lens, sites: str | Sequence[str], layers: Sequence[int] | None, positions: Positions
) -> tuple[list[Part], dict[str, Any]]:
    """Return the parts of a study that cover these components, and the metadata to store with the results.

    Raises:
        FeatpatchError: if a component or layer is unknown or absent from the model, or pattern entries are asked for at several
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
    """Return a dictionary of neurons with W_out as its decoder or, if the MLP's output is not that, of coordinates (slower)."""
    try:
        return neurons(lens.model, layer)
    except FeatpatchError:
        return identity(lens.model, hooks.component(layer, "neurons"))
