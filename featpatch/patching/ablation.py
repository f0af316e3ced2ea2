"""Ablate features, error terms and components: what is lost when a value says nothing of its prompt?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens, check_tokens, dictionaries, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patching.components import component_parts
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.fillings import FILLINGS, Constant, Filling, Others, Prompt
from featpatch.patching.study import Asked, Metrics, Part, Study
from featpatch.patching.study.run import Contrast, Run, Ways

To = str | float
"""The name of one of `FILLINGS`, or a number."""


def ablate(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    sites: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    to: To = "mean",
    reference: Pairs | None = None,
    seed: int = 0,
    positions: Positions = "all",
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Exact effect of ablating features, error terms and components one by one in the clean run.

    degradation = mean(m_clean - m_ablated) / mean(m_clean - m_corrupted)

    1 where as much is lost as by the corrupted prompt. A zero or a pooled mean can take an activation off the model's
    distribution; "zero" of an error term leaves the SAE's reconstruction, and of all features its bias, so that features and
    error are not the whole activation here, and what `sites` calls their interaction holds the bias too.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: the clean prompts are ablated; the corrupted ones give the gap.
        saes: as in `rank_features`: features, all features, error and whole site of each.
        sites, layers: components as in `rank_components`.
        to: `"zero"`, or another number; `"mean"` over all positions of the `reference` prompts but special ones;
            `"mean_by_position"`: by token index, over those of the same length; `"resample"`: the values in another one of
            these prompts (it may be the pair's own corrupted one), of the same length, drawn for each pair. State that an SAE
            needs to decode (norms, skip paths) stays the base run's.
        reference: whose clean and corrupted prompts means are taken over and resampled from; `pairs` by default.
        seed: of the draws.
        positions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Raises:
        FeatpatchError: unusable input; nothing to ablate; no prompt to take a mean over or to draw.
    """
    check_pairs(pairs)
    lens = wrap(model)
    parts: list[Part] = []
    about: dict[str, Any] = {}
    if saes is not None:
        found = dictionaries(lens, saes)
        parts.append(FeaturePart(found))
        about["saes"] = {dictionary.name: dictionary.digest() for dictionary in found}
    if sites:
        found_parts, noted = component_parts(lens, sites, layers, positions)
        parts, about = parts + found_parts, about | noted
    elif layers is not None:
        raise FeatpatchError(f"layers={layers} without sites: expected both, or neither; the SAEs name their own layers")
    if not parts:
        raise FeatpatchError("nothing to ablate: expected saes=..., sites=... or both")
    if reference is not None:
        check_tokens(check_pairs(reference), lens)
    study = Study.of(
        lens,
        parts,
        about,
        pairs,
        Asked(positions, ["noising"], metric, batch_rows),
        _contrast(lens, pairs, pairs if reference is None else reference, to, seed),
    )
    return study.run(journal, progress=progress, executor=executor)


@dataclass(frozen=True, eq=False)
class Ablation(Contrast):
    """Values of the clean run are replaced."""

    everywhere: ClassVar[bool] = True

    filling: Filling
    to: To

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """The clean run, and the one with the replacements."""
        return {"noising": (clean, self.filling.run(index, clean))}

    def about(self) -> dict[str, Any]:
        """What the values are replaced by."""
        return {"ablation": {"to": self.to, **self.filling.noted}}


def _contrast(lens: Lens, pairs: Pairs, reference: Pairs, to: To, seed: int) -> Ablation:
    if isinstance(to, Real) and not isinstance(to, bool) and isfinite(to):
        return Ablation(Constant(float(to)), float(to))
    if not isinstance(to, str) or to not in FILLINGS:
        raise FeatpatchError(f"to={to!r}: expected {', '.join(map(repr, FILLINGS))} or a finite number")
    prompts = list(dict.fromkeys(Prompt(ids, pair.special) for pair in reference for ids in (pair.clean, pair.corrupted)))
    return Ablation(FILLINGS[to](Others(lens, pairs, prompts, seed)), to)
