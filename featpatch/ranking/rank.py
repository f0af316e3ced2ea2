"""Rank features, components and paths by causal recovery: exactly, or by gradient estimates."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from featpatch.attribution.components import estimate_components
from featpatch.attribution.features import estimate_features
from featpatch.attribution.gradients import METHODS, Gradients, check_gradient, check_method, differentiable
from featpatch.attribution.paths import estimate_paths
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, FeatpatchWarning, counted, listed
from featpatch.metrics import METRIC, Metrics, find, leading, one_metric
from featpatch.nodes import DIRECTIONS, Combine, Direction, Edge, Node
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs
from featpatch.patching.components import component_study
from featpatch.patching.features import feature_study
from featpatch.patching.noise import Noise
from featpatch.patching.paths import Nodes, path_study
from featpatch.patching.study import Study
from featpatch.ranking.screen import Screen, screened
from featpatch.sites import DEFAULT_COMPONENTS, Route

Method = Literal["exact", "atp", "ig", "eap_ig_inputs", "grad_drop", "relp", "relp_qk", "gim"] | Gradients
"""`"exact"` runs every patch; all others estimate the effects from gradients."""

BUDGET = 20_000
"""The largest number of paths that are all patched by default; more paths are screened."""

MANY = Screen(k=2000, audit=500)
"""The screening of more than `BUDGET` paths."""


def rank_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics | None = None,
    method: Method = "exact",
    screen: Screen | None = None,
    combine: Combine | None = None,
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Rank SAE features, error terms and whole activations by their causal effect.

    Each feature is patched from the clean run into the corrupted run (denoising) and the other way round (noising); the SAE's
    reconstruction error and all other features keep their values in the run that is patched. A feature with the same value in
    both runs has exactly no effect and needs no forward pass.

    Ctrl-C returns what is finished: the pairs that are done or, during the first pairs, the features that are done
    (`effects.finished` is False). With a journal, the next call resumes from there.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, which may share a hook point; also cross-layer transcoders and
            crosscoders, as `fp.load_sae` returns them.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, patched at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry, where -1 is the last token of each prompt.
            `"all"` and `"each"` leave out special tokens.
        directions: `"denoising"`, `"noising"` or both.
        metric: the name of a metric or a function of `(logits, correct, wrong)`, or several, all measured in the same patched
            runs; the table is for the first, and `effects.for_metric(name)` is the table for another. By default `"logit_diff"`
            or, with `method=fp.Gradients(...)`, the metric of the gradients. For answers of several tokens
            use `"sequence_log_prob"` or `"sequence_log_prob_diff"`, which are teacher-forced and take one forward pass per
            token.
        method: `"exact"` to run every patch. `"atp"`, `"ig"`, `"eap_ig_inputs"`, `"grad_drop"`, `"relp"`, `"relp_qk"` and
            `"gim"` estimate the effects from gradients, at the cost of a few forward and backward passes per pair, whatever the
            number of features; see `fp.Gradients`, which can also be given as the method, to choose its options and to reuse
            what it has computed. Use `fp.calibrate` to find out how far estimates can be trusted.
        screen: estimate all features and patch only those that are likely to matter, with a random sample of the others.
        combine: what the patch of a feature that writes to several hook points means (cross-layer transcoders, crosscoders).
            `"add"`: each change is added to what arrives, which the changes below have moved already. `"set"`: the activation
            is set to its value in the base run plus the change. By default `"set"` for dictionaries of the residual stream,
            which at a higher hook point already contains what is written below, and `"add"` for outputs of MLPs or attention.
        batch_rows: rows (patches x positions) of one forward pass; by default chosen from the model's size and the free memory.
        noise: noise on the clean prompts' embeddings, which replaces the corrupted prompts (causal tracing).
        journal: a file to which every finished batch is written, and from which an interrupted call resumes.
        executor: `"ray"` or `fp.Ray(...)` to run the forward passes on several processes or machines; by default they run in
            this process.
        progress: whether to show a progress bar.

    Returns:
        One row per feature (and position) that differs in at least one pair; for each position also rows for `all_features` and
        `error` of each dictionary, and for the whole `activation` at each hook point. With screening, the features that were
        patched because of their estimates come first, then those drawn at random.

        In a table of estimates, `metadata["completeness_residual"]` is the largest |sum of features and error - whole
        activation| of any hook point, position and pair, as a share of the mean gap. It is due to rounding, unless what
        features add depends on other features or on state (a token's norm): what these change together belongs to none of them.
        `metadata["whole_residual"]` is the largest |estimate - patched run| over pairs, also as a share of the mean gap: for
        the residual stream that enters the first layer (how far from linear the model is) or, with `"ig"`, for any whole
        activation (the error left by the number of steps). It is None for `"grad_drop"`.

    Raises:
        FeatpatchError: the input is unusable; the message gives the value, what was expected and what to do next.

    Examples:
        >>> effects = fp.rank_features(model, saes, pairs, positions=["S2"], progress=False)
        >>> effects.top(5, by="recovery").to_pandas()[["site", "index", "recovery", "recovery_low", "recovery_high"]].shape
        (5, 5)
        >>> estimates = fp.rank_features(model, saes, pairs, positions=["S2"], method="atp", progress=False)
        >>> (effects.value, estimates.value)
        ('exact', 'estimate')
    """
    if not isinstance(screen, Screen | None):
        raise FeatpatchError(f"screen={screen!r}: expected None or an fp.Screen, such as fp.Screen(k=200, audit=100)")
    options = {"screen": screen, "batch_rows": batch_rows, "noise": noise, "journal": journal, "executor": executor}
    estimate = partial(
        estimate_features, saes=saes, positions=positions, directions=directions, combine=combine, progress=progress
    )
    if (gradients := gradients_of(method, model, pairs, metric, options)) is not None:
        return estimate(gradients)
    metric = METRIC if metric is None else metric
    study_of = partial(
        feature_study, model, saes, pairs, combine=combine,
        positions=positions, directions=directions, metric=metric, batch_rows=batch_rows, noise=noise,
    )  # fmt: skip
    run = partial(Study.run, journal=journal, progress=progress, executor=executor)
    if screen is None:
        return run(study_of()[0])
    if noise is not None:
        raise FeatpatchError(
            "screen=... with noise: expected no noise, because estimates need corrupted prompts; leave one of them out"
        )
    estimates = [estimate(of_method) for of_method in _screening(screen, model, pairs, metric)]
    return screened(screen, estimates, lambda only: study_of(only)[0], run)


def rank_components(
    model: Any,
    pairs: Pairs,
    *,
    sites: str | Sequence[str] = DEFAULT_COMPONENTS,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics | None = None,
    method: Method = "exact",
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Rank heads, MLPs, neurons and the residual stream by their causal effect, in the same kind of table as features.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: clean and corrupted prompts with their answers.
        sites: the components. Whole activations: `"resid_pre"`, `"resid_mid"`, `"resid_post"`, `"attn_out"`, `"mlp_out"`. By
            head: `"z"` (the head's output; `"result"` is the same after W_O), `"q"`, `"k"`, `"v"` (before rotation; one row per
            key or value head, which several query heads may share), `"pattern"` (one row of the pattern: the attention from a
            position to all others) and `"pattern_entry"` (the attention from each of the positions to each other; with
            `positions=["end", "S2"]` one of the rows is at `"end <- S2"`). `"neurons"`: the neurons of the MLPs.
        layers: the layers; all by default.
        positions, directions, metric, method, batch_rows, noise, journal, executor, progress: as in `rank_features`. For keys
            and values the position is that of the key or value.

    Returns:
        One row per component (and position) that differs in at least one pair, of kind `activation`, `head` or `neuron`.

    Raises:
        FeatpatchError: the input is unusable; the message gives the value, what was expected and what to do next.

    Examples:
        >>> heads = fp.rank_components(model, pairs, sites="z", positions=["end"], progress=False)
        >>> heads.top(1).nodes[0].kind
        'head'
    """
    options = {"batch_rows": batch_rows, "noise": noise, "journal": journal, "executor": executor}
    if (gradients := gradients_of(method, model, pairs, metric, options)) is not None:
        return estimate_components(gradients, sites, layers, positions, directions, progress=progress)
    metric = METRIC if metric is None else metric
    study = component_study(
        model, pairs, sites, layers,
        positions=positions, directions=directions, metric=metric, batch_rows=batch_rows, noise=noise,
    )  # fmt: skip
    return study.run(journal, progress=progress, executor=executor)


def rank_paths(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    senders: Nodes,
    receivers: Nodes,
    route: Route = "direct",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics | None = None,
    method: Method = "exact",
    screen: Screen | Literal["auto"] | None = "auto",
    batch_rows: int | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Rank paths from senders to receivers by their causal effect.

    This is path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023). In a first pass the sender takes its value from the
    source run, the components between sender and receiver keep their values from the base run or are recomputed, as the route
    says, and the receiver's new value is recorded. In a second pass the receiver alone is set to that value in the base run,
    and everything downstream of it is recomputed. Norms are recomputed. The effect is that of the receiver's change alone, on
    the scale of `rank_features`.

    Only attention moves information between positions. Where it is frozen (`"direct"` and `"through_mlps"`), a sender at one
    position has no effect on a receiver at another; heads that receive at `hook_q`, `hook_k`, `hook_v` or `hook_z` run
    their own attention and are the exception. `"logits"` are read at the answer, so the direct path of a sender at an earlier
    token into them is 0 by construction, not by measurement: a feature that acts by being moved there has its effect on
    `"through_attention"` or `"all"`. On the route `"all"`, the effect on `"logits"`, or on the residual stream after a layer
    that everything must pass, is the whole effect of patching the sender.

    The cost grows with senders times receivers; the number of paths is printed before the start.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of your own.
        pairs: clean and corrupted prompts with their answers.
        saes: the SAEs whose features and errors are among the senders and receivers, if any.
        senders: features, errors, heads at `hook_z`, whole activations (`Node("blocks.1.hook_mlp_out", "activation")`); or a
            table of effects whose rows are the senders.
        receivers: features and errors of SAEs; heads at `hook_q`, `hook_k`, `hook_v`, or `hook_z` for the three together; whole
            activations; `"logits"`. A receiver's change is patched at the receiver's position; `"all"` is everywhere. Estimates
            have no paths to errors.
        route: which components between sender and receiver are recomputed, the others being frozen at their values in the base
            run: `"direct"` (none: the residual stream alone), `"through_mlps"` (MLPs), `"through_attention"` (attention with
            its patterns, so queries, keys and values change), or `"all"` (both).
        method: `"exact"`, `"atp"`, `"relp"`, `"relp_qk"` or `"gim"`, or an `fp.Gradients` of one of these methods.
        screen: as in `rank_features`. `"auto"` screens if there are more than 20,000 paths, with `k=2000` and `audit=500`; None
            runs all paths.
        directions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Returns:
        One row of kind `edge` per path whose sender differs in at least one pair. The table, its `to_pandas` and its report
        name the route, which is also `metadata["route"]`.

    Raises:
        FeatpatchError: the input is unusable; the message gives the value, what was expected and what to do next.

    Examples:
        >>> senders = fp.rank_components(model, pairs, sites="z", positions=["end"], progress=False).top(2)
        >>> paths = fp.rank_paths(model, pairs, senders=senders, receivers=["logits"], progress=False)
        >>> len(paths)
        2
        >>> route = {"receivers": ["logits"], "progress": False}
        >>> early = fp.rank_components(model, pairs, sites="resid_pre", layers=[1], positions=["S2"], progress=False)
        >>> [
        ...     round(float(fp.rank_paths(model, pairs, senders=early, route=name, **route).pooled("recovery")[0]), 2)
        ...     for name in ("direct", "through_mlps", "through_attention", "all")
        ... ]
        [0.0, 0.0, 0.61, 1.0]
    """
    if not isinstance(screen, Screen | str | None) or (isinstance(screen, str) and screen != "auto"):
        raise FeatpatchError(f"screen={screen!r}: expected 'auto', None or an fp.Screen, such as fp.Screen(k=2000, audit=500)")
    options = {"screen": screen if isinstance(screen, Screen) else None, "batch_rows": batch_rows, "journal": journal}
    gradients = gradients_of(method, model, pairs, metric, {**options, "executor": executor})
    estimate: Callable[[Gradients], Effects] = partial(
        estimate_paths, saes=saes, senders=senders, receivers=receivers, route=route, directions=directions, progress=progress
    )
    if gradients is not None:
        return estimate(gradients)
    metric = METRIC if metric is None else metric
    paths_of = partial(
        path_study, model, pairs, saes, senders, receivers, route, directions=directions, metric=metric, batch_rows=batch_rows
    )
    study, part = paths_of()
    count = sum(map(len, part.edges.values()))
    chosen = (MANY if count > BUDGET else None) if isinstance(screen, str) else screen
    if progress:
        how = (
            "all are patched"
            if chosen is None
            else f"screened by gradient estimates; {chosen.k} of them, and {chosen.audit} of the others at random, are patched"
        )
        size = f"{counted(count, 'path')} in {counted(len(pairs), 'pair')} and {counted(len(study.directions), 'direction')}"
        tqdm.write(f"{size}: {how}", file=sys.stderr)
    run = partial(Study.run, journal=journal, progress=progress, executor=executor)
    if chosen is None:
        effects = run(study)
        if not len(effects) and effects.finished:
            warnings.warn(
                "the table has no rows, because both runs of every pair are the same at "
                f"{listed(list(map(str, part.senders.nodes)), 3)}: expected a sender that differs; choose another position or "
                "other senders",
                FeatpatchWarning,
                stacklevel=2,
            )
        return effects

    def study_of(only: frozenset[Node]) -> Study:
        edges = frozenset(edge for edge in only if isinstance(edge, Edge))
        return paths_of(edges)[0]

    return screened(chosen, [estimate(of_method) for of_method in _screening(chosen, model, pairs, metric)], study_of, run)


def check_estimation(method: str, metric: Metrics, directions: Sequence[Direction], options: Mapping[str, Any]) -> None:
    """Check what can be checked of a method of estimation before the model is loaded.

    Args:
        method: the name of the method; `"exact"` passes.
        metric, directions: as in `rank_features`.
        options: arguments that only exact runs have, by name; None if they are not given.

    Raises:
        FeatpatchError: the method is unknown, the metric has no gradient, or an option of exact runs is given.
    """
    if method == "exact":
        return
    _check_estimates(method, options)
    check_gradient(differentiable(metric), check_method(method), directions)


def _check_estimates(name: str, options: Mapping[str, Any]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise FeatpatchError(
            f"an estimate (method={name!r}) with {', '.join(given)}: expected {them} only with method='exact', because "
            f"estimates run no patches; leave {them} out, or use method='exact'"
        )


def _screening(screen: Screen, model: Any, pairs: Pairs, metric: Metrics) -> list[Gradients]:
    """Return the gradients from which a screen estimates, of the first metric, for each method."""
    return [Gradients(model, pairs, metric=leading(metric), method=method, keep=False) for method in screen.methods]


def gradients_of(
    method: Method, model: Any, pairs: Pairs, metric: Metrics | None, options: Mapping[str, Any]
) -> Gradients | None:
    """Return the gradients of a method of estimation, or None for `"exact"`.

    Args:
        options: arguments that only exact runs have, by name; None if they are not given.

    Raises:
        FeatpatchError: the method is unknown, the gradients are of another model, other pairs or another metric, or an estimate
            is given an option of exact runs.
    """
    if isinstance(method, str) and method == "exact":
        return None
    if not isinstance(method, Gradients):
        if not isinstance(method, str) or method not in METHODS:
            raise FeatpatchError(f"method={method!r}: expected 'exact', one of {', '.join(METHODS)}, or an fp.Gradients")
        _check_estimates(method, options)
        return Gradients(model, pairs, metric=METRIC if metric is None else metric, method=method, keep=False)
    _check_estimates(method.method, options)
    if method.model is not model or method.pairs != pairs:
        raise FeatpatchError(
            "the gradients belong to another model or other pairs: expected those of this model and these pairs; make them "
            "with fp.Gradients(model, pairs, ...)"
        )
    if metric is not None and find(one_metric(metric)).name != method.measure.name:
        raise FeatpatchError(
            f"metric={metric!r} with gradients of {method.measure.name!r}: expected the same metric; leave metric out"
        )
    return method
