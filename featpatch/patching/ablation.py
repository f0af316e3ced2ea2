"""Ablate features, error terms and components, to measure what is lost without the information that they carry."""

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
"""How ablation values are chosen: the name of one of `FILLINGS`, or a number to use as the value."""


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
    """Measure the exact effect of ablating features, error terms and components, one at a time, in the clean run.

    degradation = mean(m_clean - m_ablated) / mean(m_clean - m_corrupted)

    A degradation of 1 means that as much is lost as by the corrupted prompt. Zeros and pooled means can move an activation off
    the model's distribution. With the error term at zero the SAE's reconstruction remains, and with all features at zero the
    SAE's bias remains. So features and error do not add up to the whole activation here, and their interaction in
    `Effects.sites` also contains the bias.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: pairs whose clean prompts are ablated; the corrupted prompts give the gap.
        saes: SAEs as in `rank_features`; for each, its features, all features, its error and the whole activation are ablated.
        sites, layers: components as in `rank_components`.
        to: the ablation values. `"zero"` or another number; `"mean"`: the mean over all positions of the `reference` prompts
            except special tokens; `"mean_by_position"`: the mean at each token index, over `reference` prompts of the same
            length; `"resample"`: the values in another `reference` prompt of the same length, drawn for each pair (it may be
            the pair's own corrupted prompt). State that an SAE needs to decode (norms, skip paths) is kept from the base run.
        reference: pairs whose clean and corrupted prompts are averaged or resampled; `pairs` by default.
        seed: the seed for resampling.
        positions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Raises:
        FeatpatchError: if the input is unusable, there is nothing to ablate, or there is no prompt to average or resample.
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
    """A contrast in which ablation values replace those of the clean run."""

    everywhere: ClassVar[bool] = True

    filling: Filling
    to: To

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return the clean run as the base and the run with ablation values as the source, under `"noising"`."""
        return {"noising": (clean, self.filling.run(index, clean))}

    def about(self) -> dict[str, Any]:
        """Return metadata that says which ablation values were used."""
        return {"ablation": {"to": self.to, **self.filling.noted}}


def _contrast(lens: Lens, pairs: Pairs, reference: Pairs, to: To, seed: int) -> Ablation:
    if isinstance(to, Real) and not isinstance(to, bool) and isfinite(to):
        return Ablation(Constant(float(to)), float(to))
    if not isinstance(to, str) or to not in FILLINGS:
        raise FeatpatchError(f"to={to!r}: expected {', '.join(map(repr, FILLINGS))} or a finite number")
    prompts = list(dict.fromkeys(Prompt(ids, pair.special) for pair in reference for ids in (pair.clean, pair.corrupted)))
    return Ablation(FILLINGS[to](Others(lens, pairs, prompts, seed)), to)
