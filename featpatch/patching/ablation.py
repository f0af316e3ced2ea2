"""Ablate features, error terms and components: what is lost when a value says nothing of its prompt?"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from numbers import Real
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch

from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, Split, check_tokens, dictionaries, wrap
from featpatch.pairs import Pairs, check_pairs
from featpatch.pairs.spans import Positions
from featpatch.patching.components import component_parts
from featpatch.patching.feature_part import FeaturePart
from featpatch.patching.fillings import Constant, Filling, Mean, Prompt
from featpatch.patching.study import Asked, Metrics, Part, Study
from featpatch.patching.study.run import Contrast, Run, Ways

To = str | float
"""`"zero"`, `"mean"`, `"mean_by_position"`, `"resample"` or a number."""


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
class Ablated(Run):
    """A run whose values are replaced, whichever is asked for."""

    filling: Filling

    def at(self, hook: str) -> torch.Tensor:
        """The replacement."""
        return self.filling.activation(hook, self.activations[hook])

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """The replacements, beside the state of the run."""
        return self.filling.split(dictionary, Run(self.activations).split(dictionary, start), start)


@dataclass(frozen=True, eq=False)
class Ablation(Contrast):
    """Values of the clean run are replaced."""

    everywhere: ClassVar[bool] = True

    filling: Filling
    noted: dict[str, Any]

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """The clean run, as it is and filled."""
        return {"noising": (clean, Ablated(clean.activations, self.filling))}

    def about(self) -> dict[str, Any]:
        """What the values are replaced by."""
        return {"ablation": self.noted}


@dataclass(frozen=True, eq=False)
class Resampling(Contrast):
    """Values of the clean run are those of another prompt, by pair."""

    everywhere: ClassVar[bool] = True

    lens: Lens
    partners: Sequence[tuple[int, ...]]
    noted: dict[str, Any]

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """The clean run and the partner's."""
        read = self.lens.read(torch.tensor([self.partners[index]]), sorted(clean.activations))
        return {"noising": (clean, Run({hook: values[0] for hook, values in read.items()}))}

    def about(self) -> dict[str, Any]:
        """What the values are replaced by."""
        return {"ablation": self.noted}


def _contrast(lens: Lens, pairs: Pairs, reference: Pairs, to: To, seed: int) -> Contrast:
    noted: dict[str, Any] = {"to": to}
    if isinstance(to, Real) and not isinstance(to, bool) and isfinite(to):
        return Ablation(Constant(float(to)), {"to": float(to)})
    if to == "zero":
        return Ablation(Constant(0.0), noted)
    prompts = list(dict.fromkeys(Prompt(ids, pair.special) for pair in reference for ids in (pair.clean, pair.corrupted)))
    noted["reference"] = sha256(repr([(prompt.tokens, sorted(prompt.special)) for prompt in prompts]).encode()).hexdigest()
    if to in ("mean", "mean_by_position"):
        if all(len(prompt.special) == len(prompt.tokens) for prompt in prompts):
            raise FeatpatchError("all tokens of the prompts to take means over are special: expected others")
        return Ablation(Mean(lens, prompts, to == "mean_by_position"), noted)
    if to == "resample":
        return Resampling(lens, _partners(pairs, prompts, seed), {**noted, "seed": seed})
    raise FeatpatchError(f"to={to!r}: expected 'zero', 'mean', 'mean_by_position', 'resample' or a finite number")


def _partners(pairs: Pairs, prompts: Sequence[Prompt], seed: int) -> list[tuple[int, ...]]:
    """For each pair another prompt of the same length."""
    if not isinstance(seed, int):
        raise FeatpatchError(f"seed={seed!r}: expected an integer, so that the draws can be repeated")
    partners = []
    for index, pair in enumerate(pairs):
        others = [prompt.tokens for prompt in prompts if len(prompt.tokens) == len(pair) and prompt.tokens != pair.clean]
        if not others:
            raise FeatpatchError(
                f"pair {index} has {len(pair)} tokens and no other prompt has: expected one to resample from; give more "
                "prompts as reference=..., or another `to`"
            )
        partners.append(Random(repr((seed, pair.clean))).choice(others))
    return partners
