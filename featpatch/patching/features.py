"""Rank SAE features by causal recovery: every feature that differs is swapped alone, exactly, in both directions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, dictionaries, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import DIRECTIONS, Direction, Position
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.noise import Noise
from featpatch.patching.readings import Metrics
from featpatch.patching.study import Study


def rank_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Effects:
    """Exact causal effect of every SAE feature, of the error terms and of the whole sites.

    A feature's value is taken from the clean run into the corrupted one (denoising) and the other way round (noising);
    the SAE's reconstruction error and all other features stay as they are in the run that is patched. A feature with the
    same value in both runs has exactly no effect and costs no forward pass.

    Ctrl-C returns what is finished: the pairs that are done, or, within the first ones, NaN where nothing is known
    (`effects.finished` is False). With a journal the next call goes on from there.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, also at the same hook.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, swapped at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry. Special tokens are never swapped by
            `"all"` and `"each"`.
        directions: `"denoising"`, `"noising"` or both.
        metric: name of a metric or a function of `(logits, correct, wrong)`, or several, all from the same patched runs;
            the table is that of the first, `effects.metric(name)` that of another. For answers of several tokens
            `"sequence_log_prob"` or `"sequence_log_prob_diff"`, teacher-forced, at one forward pass for each token.
        batch_rows: rows (patches x positions) of one forward pass; by default from the model's size and the free memory.
        noise: corrupts the clean prompts' embeddings, in the place of the corrupted prompts (causal tracing).
        journal: a file in which every finished batch is written down, and from which an interrupted call goes on.
        progress: show a bar.

    Returns:
        One row per feature (and position) that differs in at least one pair, and three rows per site and position:
        `all_features`, `error` and `activation`.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
    """
    study, _ = feature_study(model, saes, pairs, positions, directions, metric, batch_rows, noise)
    return study.run(Path(journal) if journal is not None else None, progress=progress)


def feature_study(
    model: Any,
    saes: Any,
    pairs: Pairs,
    positions: Positions,
    directions: Sequence[Direction],
    metric: Metrics,
    batch_rows: int | None,
    noise: Noise | None = None,
) -> tuple[Study, list[Dictionary]]:
    """What `rank_features` with these arguments does, checked, and the dictionaries in it."""
    check_pairs(pairs)
    lens = wrap(model)
    found = dictionaries(lens, saes)
    about = {"saes": {dictionary.name: dictionary.digest() for dictionary in found}}
    study = Study.of(
        lens,
        [FeaturePart(found)],
        about,
        pairs,
        positions=positions,
        directions=directions,
        metric=metric,
        batch_rows=batch_rows,
        noise=noise,
    )
    return study, found


def single_study(
    model: Any,
    sae: Any,
    pairs: Pairs,
    position: Position,
    directions: Sequence[Direction],
    metric: Metrics,
    batch_rows: int | None,
) -> tuple[Study, Dictionary]:
    """As `feature_study`, of one dictionary at one position.

    Raises:
        FeatpatchError: several dictionaries; unusable input.
    """
    positions: Positions = "all" if position == "all" else [position]
    study, found = feature_study(model, sae, pairs, positions, directions, metric, batch_rows)
    if len(found) != 1:
        raise FeatpatchError(f"there are {len(found)} dictionaries: expected one, whose features are swapped at one site")
    return study, found[0]
