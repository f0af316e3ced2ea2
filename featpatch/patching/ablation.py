"""The contrast in which clean runs are patched with ablation values, to measure what is lost without features or components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from featpatch.errors import FeatpatchError, is_number
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import ActivationCache
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_unmixed
from featpatch.patching.ablation_values import AblationValues, Means, named_values
from featpatch.patching.changes import Part
from featpatch.patching.components import WholePart, component_parts
from featpatch.patching.features import FeaturePart
from featpatch.patching.runs import Contrast, Run, Ways
from featpatch.sae.dictionary import dictionaries, digests

To = str | float | ActivationCache | Mapping[str, torch.Tensor]
"""How ablation values are chosen: the name of one of `ABLATION_VALUES`, a number, or activations to average."""


@dataclass(frozen=True, eq=False)
class Ablation(Contrast):
    """A contrast in which ablation values replace those of the clean run."""

    ablation_values: AblationValues
    to: To

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return the clean run as the base and the run with ablation values as the source, under `"noising"`."""
        return {"noising": (clean, self.ablation_values.run(index, clean))}

    def about(self) -> dict[str, Any]:
        """Return metadata that says which ablation values were used."""
        to = self.to if isinstance(self.to, str | float) else "activations"
        return {"ablation": {"to": to, **self.ablation_values.noted}}


def ablated_parts(
    lens: Lens, saes: Any, components: str | Sequence[str], layers: Sequence[int] | None, positions: Positions
) -> tuple[list[Part], dict[str, Any]]:
    """Return the parts that are ablated, and the metadata to store with the results.

    Args:
        components: the argument `sites` of `ablate`.
        lens, saes, layers, positions: as in `ablate`.

    Raises:
        FeatpatchError: there is nothing to ablate, or the model lacks something.
    """
    parts: list[Part] = []
    about: dict[str, Any] = {}
    if saes is not None:
        found = dictionaries(lens, saes)
        parts.append(FeaturePart(found))
        about["saes"] = digests(found)
    if components:
        found_parts, noted = component_parts(lens, components, layers, positions)
        covered = {site for part in parts for site in part.sites}  # their whole activations are rows already
        found_parts = [
            WholePart([hook for hook in part.whole if hook not in covered]) if isinstance(part, WholePart) else part
            for part in found_parts
        ]
        parts, about = parts + found_parts, about | noted
    elif layers is not None:
        raise FeatpatchError(
            f"layers={layers} without sites: expected both or neither, because each SAE has its own layer; pass sites=..., or "
            "leave layers out"
        )
    if not parts:
        raise FeatpatchError("nothing to ablate: expected saes=..., sites=... or both")
    return parts, about


def ablation(lens: Lens, parts: Sequence[Part], pairs: Pairs, reference: Pairs | None, to: To, seed: int | None) -> Ablation:
    """Return the contrast in which these parts are ablated; the arguments are those of `ablate`.

    Raises:
        FeatpatchError: an argument is unknown or unused, only some pairs have a counterfactual, or the values would be the
            prompt's own.
    """
    check_unmixed(pairs)
    if isinstance(to, ActivationCache | Mapping):
        if reference is not None or seed is not None:
            raise FeatpatchError(
                f"to=activations with reference={reference!r}, seed={seed!r}: expected neither, because the values are given; "
                "leave them out"
            )
        return Ablation(Means(lens, to), to)
    hooks = sorted({hook for part in parts for hook in part.hooks})
    owners = [dictionary for part in parts for dictionary in part.owners]
    values = named_values(lens, pairs, to, reference, seed, hooks, owners)
    return Ablation(values, float(to) if is_number(to) else to)
