"""Rank SAE features by causal recovery: every feature that differs is swapped alone, exactly, in both directions."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from featpatch import metrics
from featpatch.effects import Collector, Effects, check_gap
from featpatch.engine import BATCH_ROWS, sweep
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, dictionaries, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction, Position
from featpatch.patching.runs import Runs, chunks
from featpatch.patching.swaps import Positions, spans


def rank_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: str | Metric = "logit_diff",
    batch_rows: int = BATCH_ROWS,
    progress: bool = True,
) -> Effects:
    """Exact causal effect of every SAE feature, of the error terms and of the whole sites.

    A feature's value is taken from the clean run into the corrupted one (denoising) and the other way round (noising);
    the SAE's reconstruction error and all other features stay as they are in the run that is patched. A feature with the
    same value in both runs has exactly no effect and costs no forward pass.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, also at the same hook.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, swapped at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry. Special tokens are never swapped by
            `"all"` and `"each"`.
        directions: `"denoising"`, `"noising"` or both.
        metric: name of a metric or a function of `(logits, correct, wrong)`.
        batch_rows: token rows (patches x positions) of one forward pass; less needs less memory.
        progress: show a bar.

    Returns:
        One row per feature (and position) that differs in at least one pair, and three rows per site and position:
        `all_features`, `error` and `activation`.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
    """
    metric_name, measured = metrics.find(metric)
    if not directions or not set(directions) <= set(DIRECTIONS):
        raise FeatpatchError(f"directions={tuple(directions)}: expected 'denoising', 'noising' or both")
    wanted = [spans(pair, positions) for pair in pairs]
    lens = wrap(model)
    found = dictionaries(lens, saes)
    clean, corrupted, patches = _survey(lens, pairs, measured, found, wanted)
    check_gap(clean, corrupted)
    collector = Collector()
    with tqdm(total=patches * len(directions), unit="patch", desc="patching", disable=not progress) as bar:
        for some in chunks(pairs):
            runs = Runs.of(lens, [pairs[index] for index in some], measured, found)
            swaps = [runs.swaps(slot, wanted[index], found) for slot, index in enumerate(some)]
            values = {
                direction: iter(sweep(lens, runs.blocks(swaps, direction), measured, batch_rows=batch_rows, done=bar.update))
                for direction in directions
            }
            for index, of_pair in zip(some, swaps, strict=True):
                for swap in of_pair:
                    collector.add(index, swap.nodes, {direction: next(column).numpy() for direction, column in values.items()})
    metadata = {
        "metric": metric_name,
        "directions": sorted(directions),
        "positions": positions if isinstance(positions, str) else list(positions),
        "pairs": pairs.digest(),
        "model": {"name": str(lens.model.cfg.model_name), "sha256": lens.digest()},
        "saes": {dictionary.name: dictionary.digest() for dictionary in found},
        "versions": {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")},
    }
    return collector.effects(clean, corrupted, metadata)


def _survey(
    lens: Lens, pairs: Pairs, metric: Metric, found: list[Dictionary], wanted: list[dict[Position, list[int]]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The metric of the clean and of the corrupted runs, `[pairs]` each, and the number of patches to one direction."""
    clean, corrupted, patches = np.zeros(len(pairs)), np.zeros(len(pairs)), 0
    for some in chunks(pairs):
        runs = Runs.of(lens, [pairs[index] for index in some], metric, found)
        clean[some], corrupted[some] = runs.clean.metric, runs.corrupted.metric
        for slot, index in enumerate(some):
            patches += sum(len(swap.deltas) for swap in runs.swaps(slot, wanted[index], found))
    return clean, corrupted, patches
