"""Ablate features, error terms and components, to measure what is lost without the information that they carry.

Ablation values are a constant, a statistic over prompts, or the values in another prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch

from featpatch import sites
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, is_integer, is_number
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import ActivationCache, wrap
from featpatch.model.vocabulary import check_tokens
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.changes import Contrast, Run, Ways
from featpatch.patching.components import component_parts
from featpatch.patching.features import FeaturePart
from featpatch.patching.parts import Part
from featpatch.patching.readings import Metrics
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import Dictionary, Split, dictionaries

Values = tuple[torch.Tensor, ...]
"""Several activations, or parts of one, each `[pos, ...]`."""


@dataclass(frozen=True)
class Prompt:
    """A prompt from whose activations ablation values are computed.

    Attributes:
        tokens: the token ids.
        special: the positions that pooled statistics leave out.
    """

    tokens: tuple[int, ...]
    special: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Others:
    """The prompts that ablation values may be taken from.

    Attributes:
        lens: the model.
        pairs: the pairs that are ablated.
        prompts: the prompts whose activations give the ablation values.
        seed: the seed for resampling.
    """

    lens: Lens
    pairs: Pairs
    prompts: Sequence[Prompt]
    seed: int

    def digest(self) -> str:
        """Return a digest of the prompts."""
        return sha256(repr([(prompt.tokens, sorted(prompt.special)) for prompt in self.prompts]).encode()).hexdigest()

    def run(self, tokens: Sequence[int], hooks: Sequence[str]) -> Run:
        """Run the model on a prompt and return its activations at some hook points."""
        read = self.lens.read(torch.tensor([tokens]), sorted(set(hooks)))
        return Run({hook: values[0] for hook, values in read.items()})


class AblationValues(ABC):
    """A way to choose ablation values.

    Attributes:
        noted: metadata to store with the results, in addition to the name.
    """

    noted: Mapping[str, Any] = {}

    @abstractmethod
    def run(self, index: int, clean: Run) -> Run:
        """Return the run whose values replace those of the clean run of the pair with this index."""


class Everywhere(AblationValues):
    """Ablation values that are the same in every prompt."""

    def run(self, index: int, clean: Run) -> Run:
        """Return the clean run with every value replaced by its ablation value."""
        return Filled(clean.activations, self)

    @abstractmethod
    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """Return the ablation values.

        Args:
            name: names the values; the same name gives the same ablation values.
            hooks: the hook points whose activations `parts` needs.
            parts: takes the values to replace from a run.
            like: the values to replace.
            length: the number of tokens of the prompt.
        """


@dataclass(frozen=True, eq=False)
class Filled(Run):
    """A run in which any value that is read is an ablation value; state that decoding needs is that of the original run."""

    ablation_values: Everywhere

    def at(self, hook: str) -> torch.Tensor:
        """Return the ablation value of the activation at a hook point, at every position."""
        like = self.activations[hook]
        length = like.shape[0 if sites.by_position(hook) else -1]
        (value,) = self.ablation_values.values(hook, [hook], lambda run: (run.at(hook),), (like,), length)
        return value.to(like).expand_as(like)

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """Return ablation values of features and error from position `start` on, with the state of the original run."""
        like = Run(self.activations).split(dictionary, start)
        name, hooks = f"features of {dictionary.name}", [dictionary.reads, dictionary.writes]

        def parts(run: Run) -> Values:
            split = run.split(dictionary, 0)
            return split.features[0], split.error[0]

        length = start + like.features.shape[1]
        found = self.ablation_values.values(name, hooks, parts, (like.features[0], like.error[0]), length)
        features, error = (value[-(length - start) :] if value.ndim > 1 else value for value in found)
        return replace(like, features=features.expand_as(like.features), error=error.expand_as(like.error))


@dataclass(frozen=True)
class Constant(Everywhere):
    """One number as the ablation value everywhere."""

    value: float

    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """Return tensors filled with the number."""
        return tuple(torch.full_like(each, self.value) for each in like)


class Statistic(Everywhere):
    """A statistic over prompts as the ablation value, computed once.

    Args:
        others: the prompts.
        of: computes the statistic `[...]` of values `[n, ...]`.
        by_position: whether to compute a statistic for every token index, over the prompts of the same length, rather than one
            over all positions.

    Raises:
        FeatpatchError: if the prompts have only special tokens.
    """

    def __init__(self, others: Others, of: Callable[[torch.Tensor], torch.Tensor], *, by_position: bool = False) -> None:
        if all(len(prompt.special) == len(prompt.tokens) for prompt in others.prompts):
            raise FeatpatchError("the prompts to take means over hold only special tokens: expected words; give other prompts")
        self.others, self.of, self.by_position, self.noted = others, of, by_position, {"reference": others.digest()}
        self._found: dict[tuple[str, int], Values] = {}

    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """Return the statistics, `[pos, ...]` each if by position, otherwise without a position dimension.

        Raises:
            FeatpatchError: if a statistic over all positions is asked for attention patterns, or one by position and no prompt
                has this length.
        """
        if not self.by_position and not all(map(sites.by_position, hooks)):
            raise FeatpatchError(
                f"to='mean' for {name!r}: expected to='mean_by_position', 'zero' or 'resample', because a mean over all "
                "positions is not an attention pattern"
            )
        key = name, length if self.by_position else 0
        if key not in self._found:
            prompts = [p for p in self.others.prompts if len(p.tokens) == length or not self.by_position]
            if not prompts:
                raise FeatpatchError(
                    f"there is no prompt of {length} tokens to take a mean by position over: expected at least one in "
                    "`reference`; add prompts of that length, or pass to='mean'"
                )
            found = [parts(self.others.run(prompt.tokens, hooks)) for prompt in prompts]
            self._found[key] = tuple(self.of(self._joined(prompts, values)) for values in zip(*found, strict=True))
        return self._found[key]

    def _joined(self, prompts: Sequence[Prompt], values: Values) -> torch.Tensor:
        """Stack the values of the prompts if by position; otherwise concatenate them without special tokens."""
        if self.by_position:
            return torch.stack(values)
        kept = [[at for at in range(len(prompt.tokens)) if at not in prompt.special] for prompt in prompts]
        return torch.cat([value[rows] for value, rows in zip(values, kept, strict=True)])


class Means(Everywhere):
    """Given activations, averaged over their prompts and positions, as ablation values.

    Args:
        lens: the model.
        given: an `ActivationCache` or a mapping of activations, as in `Lens.cached`.
    """

    def __init__(self, lens: Lens, given: Any) -> None:
        self.lens, self.given = lens, dict(getattr(given, "cache_dict", given))
        sums = [(hook, str(self.given[hook].shape), float(self.given[hook].double().sum())) for hook in sorted(self.given)]
        self.noted = {"activations": sha256(repr(sums).encode()).hexdigest()}

    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """Return the means.

        Raises:
            FeatpatchError: if the activations of a hook point are missing, do not have its shape, or are means themselves and
                those of features are needed.
        """
        if not all(map(sites.by_position, hooks)):
            raise FeatpatchError(
                f"to=activations for {name!r}: expected to='mean_by_position', 'zero' or 'resample', because a mean over all "
                "positions is not an attention pattern"
            )
        found = self.lens.cached("to", self.given, hooks)
        if name not in hooks and any(self.given.get(hook, values).ndim < values.ndim for hook, values in found.items()):
            raise FeatpatchError(
                f"to={{hook: tensor}} for the {name}: expected activations [batch, pos, ...], whose features have a mean; pass "
                "a cache, or to='mean' with reference"
            )
        runs = [Run({hook: values[row] for hook, values in found.items()}) for row in range(len(found[hooks[0]]))]
        return tuple(mean(torch.cat(values)) for values in zip(*map(parts, runs), strict=True))


class Resampled(AblationValues):
    """The values in another prompt of the same length, drawn for each pair, as ablation values.

    Raises:
        FeatpatchError: if there is no other prompt of a pair's length.
    """

    def __init__(self, others: Others) -> None:
        self.others, self.noted = others, {"reference": others.digest(), "seed": others.seed}
        self.partners = [self._partner(index, pair.clean) for index, pair in enumerate(others.pairs)]

    def run(self, index: int, clean: Run) -> Run:
        """Return the activations of the resampled prompt."""
        return self.others.run(self.partners[index], list(clean.activations))

    def _partner(self, index: int, clean: tuple[int, ...]) -> tuple[int, ...]:
        """Draw another prompt as long as the clean one."""
        prompts = [prompt.tokens for prompt in self.others.prompts]
        fitting = [tokens for tokens in prompts if len(tokens) == len(clean) and tokens != clean]
        if not fitting:
            raise FeatpatchError(
                f"pair {index} has {len(clean)} tokens, and no other prompt has as many: expected one to resample from; pass "
                "more prompts as reference=..., or another `to`"
            )
        return Random(repr((self.others.seed, clean))).choice(fitting)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over the first dimension."""
    return values.mean(0)


ABLATION_VALUES: dict[str, Callable[[Others], AblationValues]] = {
    "zero": lambda others: Constant(0.0),
    "mean": lambda others: Statistic(others, mean),
    "mean_by_position": lambda others: Statistic(others, mean, by_position=True),
    "resample": Resampled,
}
"""The ways to choose ablation values, by name."""


To = str | float | ActivationCache | Mapping[str, torch.Tensor]
"""How ablation values are chosen: the name of one of `ABLATION_VALUES`, a number, or activations to average."""


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
            the pair's own corrupted prompt). An `ActivationCache` of TransformerLens, or `{hook: tensor}`: the mean of these
            activations over all prompts and positions (also special tokens), or a tensor `[d_model]` as it is.
            State that an SAE needs to decode (norms, skip paths) is kept from the base run.
        reference: pairs whose clean and corrupted prompts are averaged or resampled; `pairs` by default. Not for a number.
        seed: the seed for resampling; 0 by default.
        positions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Returns:
        One row per feature, error term or component, with its degradation.

    Raises:
        FeatpatchError: if the input is unusable, there is nothing to ablate, or there is no prompt to average or resample.

    Example:
        >>> ablated = fp.ablate(model, pairs, sites="z", layers=[1], positions=["S2"], to="zero", progress=False)
        >>> ablated.directions_run(), len(ablated.where(kind="head"))
        (['degradation'], 8)
    """
    check_pairs(pairs, by_label=True)
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
        raise FeatpatchError(
            f"layers={layers} without sites: expected both or neither, because each SAE has its own layer; pass sites=..., or "
            "leave layers out"
        )
    if not parts:
        raise FeatpatchError("nothing to ablate: expected saes=..., sites=... or both")
    if reference is not None:
        check_tokens(check_pairs(reference, by_label=True), lens)
    study = Study.of(
        lens,
        parts,
        about,
        pairs,
        Options(positions, ["noising"], metric, batch_rows),
        _contrast(lens, pairs, reference, to, seed),
    )
    return study.run(journal, progress=progress, executor=executor)


@dataclass(frozen=True, eq=False)
class Ablation(Contrast):
    """A contrast in which ablation values replace those of the clean run."""

    everywhere: ClassVar[bool] = True

    ablation_values: AblationValues
    to: To

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return the clean run as the base and the run with ablation values as the source, under `"noising"`."""
        return {"noising": (clean, self.ablation_values.run(index, clean))}

    def about(self) -> dict[str, Any]:
        """Return metadata that says which ablation values were used."""
        to = self.to if isinstance(self.to, str | float) else "activations"
        return {"ablation": {"to": to, **self.ablation_values.noted}}


def _contrast(lens: Lens, pairs: Pairs, reference: Pairs | None, to: To, seed: int | None) -> Ablation:
    if isinstance(to, ActivationCache | Mapping):
        if reference is not None or seed is not None:
            raise FeatpatchError(
                f"to=activations with reference={reference!r}, seed={seed!r}: expected neither, because the values are given; "
                "leave them out"
            )
        return Ablation(Means(lens, to), to)
    number = is_number(to) and isfinite(to)
    if not number and (not isinstance(to, str) or to not in ABLATION_VALUES):
        raise FeatpatchError(
            f"to={to!r}: expected one of {', '.join(map(repr, ABLATION_VALUES))}, a finite number, or activations"
        )
    if reference is not None and (number or to == "zero"):
        raise FeatpatchError(f"to={to!r} with reference: expected no prompts, because a constant needs none; leave it out")
    if seed is not None and to != "resample":
        raise FeatpatchError(
            f"to={to!r} with seed={seed!r}: expected a seed only with to='resample', which draws; leave it out"
        )
    if seed is not None and not is_integer(seed):
        raise FeatpatchError(f"seed={seed!r}: expected an integer, so that the draws can be repeated")
    if number:
        return Ablation(Constant(float(to)), float(to))
    of = pairs if reference is None else reference
    prompts = list(dict.fromkeys(Prompt(ids, pair.special) for pair in of for ids in (pair.clean, pair.corrupted)))
    return Ablation(ABLATION_VALUES[str(to)](Others(lens, pairs, prompts, int(seed or 0))), to)
