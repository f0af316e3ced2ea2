"""Ablate features, error terms and components, with or without a counterfactual: exactly, or by gradient estimates.

With `v` as the ablation value of an activation `a`, and the gradient g = dm/da of the metric in the clean run, the estimate of
an ablation is

    m_ablated - m_clean = (v - a) . g

It is exact where the metric is linear in the activation. For a feature, `a` and `v` are its values times its direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featpatch.attribution.components import component_estimators
from featpatch.attribution.estimates import Estimator, estimated
from featpatch.attribution.features import FeatureEstimator
from featpatch.attribution.gradients import METHODS, STEPPED, PairGradients
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.metrics import METRIC, Metrics
from featpatch.model.transformer_lens import wrap
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.ablation import Ablation, To, ablated_parts, ablation
from featpatch.patching.changes import Part
from featpatch.patching.runs import Run
from featpatch.patching.study import Study
from featpatch.ranking.rank import Method, gradients_of
from featpatch.sae.dictionary import Dictionary

OF_THE_CLEAN_RUN = tuple(method for method in METHODS if method not in STEPPED)
"""The methods of estimation whose gradients are those of the clean run, and need no corrupted run."""


def ablate(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    sites: str | Sequence[str] = (),
    layers: Sequence[int] | None = None,
    to: To = "mean",
    reference: Pairs | None = None,
    seed: int | None = None,
    positions: Positions = "all",
    metric: Metrics | None = None,
    method: Method = "exact",
    batch_rows: int | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Measure the effect of ablating features, error terms and components, one at a time, in the clean run.

    degradation = mean(m_clean - m_ablated) / mean(m_clean - m_corrupted)

    A degradation of 1 means that as much is lost as by the corrupted prompt. If the prompts have no counterfactual, there is no
    such gap, and the degradation is the change of the metric in its own units, mean(m_clean - m_ablated); `effects.unit` says
    which of the two it is. A positive value means that the node supports the answer.

    Zeros and pooled means can move an activation off the model's distribution. With the error term at zero the SAE's
    reconstruction remains, and with all features at zero the SAE's bias remains. So features and error do not add up to the
    whole activation here, and their interaction in `Effects.sites` also contains the bias.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: pairs whose clean prompts are ablated, all with corrupted prompts, which give the gap, or all without.
        saes: SAEs as in `rank_features`; for each, its features, all features, its error and the whole activation are ablated.
        sites, layers: components as in `rank_components`.
        to: the ablation values. `"zero"` or another number; `"mean"`: the mean over all positions of the `reference` prompts
            except special tokens; `"mean_by_position"`: the mean at each token index, over `reference` prompts of the same
            length; `"resample"`: the values in another `reference` prompt of the same length, drawn for each pair (it may be
            the pair's own corrupted prompt). An `ActivationCache` of TransformerLens, or `{hook: tensor}`: the mean of these
            activations over all prompts and positions (also special tokens), or a tensor `[d_model]` as it is. State that an
            SAE needs to decode (norms, skip paths) is kept from the base run.
        reference: pairs whose clean and corrupted prompts are averaged or resampled; `pairs` by default. Not for a number.
        seed: the seed for resampling; 0 by default.
        method: `"exact"` to run every ablation; `"atp"`, `"grad_drop"`, `"relp"`, `"relp_qk"` or `"gim"` to estimate all of
            them from one gradient per prompt, (ablation value - value) . gradient. It can also be an `fp.Gradients` with one of
            these methods.
        positions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Returns:
        One row per feature, error term or component, with its degradation.

    Raises:
        FeatpatchError: the input is unusable, there is nothing to ablate, or there is no prompt to average or resample.

    Examples:
        >>> ablated = fp.ablate(model, pairs, sites="z", layers=[1], positions=["S2"], to="zero", progress=False)
        >>> ablated.directions_run(), len(ablated.where(kind="head"))
        (['degradation'], 8)
        >>> prompt = fp.Pairs.from_prompts(model, clean="Mary gave it to John . John gave it to", correct=" Mary")
        >>> pushing = fp.ablate(model, prompt, saes=saes, to="zero", metric="logit", method="atp", progress=False)
        >>> pushing.unit, pushing.value
        ('of logit', 'estimate')
    """
    check_pairs(pairs, by_label=True, model=model)
    options = {"batch_rows": batch_rows, "journal": journal, "executor": executor}
    gradients = gradients_of(method, model, pairs, metric, options)
    lens = wrap(model)
    parts, about = ablated_parts(lens, saes, sites, layers, positions)
    contrast = ablation(lens, parts, pairs, reference, to, seed)
    if gradients is None:
        study = Study.of(
            lens, parts, about, pairs, contrast,
            positions=positions, directions=["noising"], metric=METRIC if metric is None else metric, batch_rows=batch_rows,
        )  # fmt: skip
        return study.run(journal, progress=progress, executor=executor)
    if gradients.method not in OF_THE_CLEAN_RUN:
        raise FeatpatchError(
            f"method={gradients.method!r} of an ablation: expected one of {', '.join(OF_THE_CLEAN_RUN)}, because the others "
            "integrate up to a corrupted run, or method='exact'"
        )
    if gradients.measure.needs == "clean":
        raise FeatpatchError(
            f"metric {gradients.measure.name!r} with method={gradients.method!r} of an ablation: expected a metric whose "
            "gradient in the clean run is not zero, as this one's is; use method='exact', or another metric"
        )
    dictionaries = [] if saes is None else list(parts[0].owners)
    estimators: list[Estimator] = [FeatureEstimator(dictionary) for dictionary in dictionaries]
    if sites:
        more, noted = component_estimators(gradients, sites, layers, positions)
        estimators, about = estimators + more, about | noted
    about, ablated = about | contrast.about(), _ablated(contrast, parts, dictionaries)
    return estimated(gradients, estimators, about, positions, ["noising"], progress=progress, ablated=ablated)


def _ablated(
    contrast: Ablation, parts: Sequence[Part], dictionaries: Sequence[Dictionary]
) -> Callable[[PairGradients], PairGradients]:
    """Return a function that replaces the corrupted run of a pair by its clean run with ablation values."""
    needed = {hook for part in parts for hook in part.hooks}

    def ablated(of_pair: PairGradients) -> PairGradients:
        clean = Run(of_pair.activations["noising"])
        source = contrast.ablation_values.run(of_pair.index, clean)
        return replace(
            of_pair,
            first=0,
            activations={
                "noising": clean.activations,
                "denoising": {hook: source.at(hook) for hook in needed & set(clean.activations)},
            },
            ends={"noising": {}},
            splits={each.name: {"noising": clean.split(each, 0), "denoising": source.split(each, 0)} for each in dictionaries},
        )

    return ablated
