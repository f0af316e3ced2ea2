"""Activations of one prompt, and contrasts, which say which run is patched with values of which other run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from featpatch.lens import Dictionary, Split
from featpatch.patch import Direction


@dataclass(frozen=True, eq=False)
class Run:
    """The activations of one prompt.

    Attributes:
        activations: the activations `[pos, ...]`, by hook point.
    """

    activations: Mapping[str, torch.Tensor]

    def at(self, hook: str) -> torch.Tensor:
        """Return the activation `[pos, ...]` at a hook point."""
        return self.activations[hook]

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """Return features and error from position `start` on, as a batch of one."""
        return dictionary.split(self.at(dictionary.reads)[None, start:], self.at(dictionary.writes)[None, start:])


Ways = Mapping[Direction, tuple[Run, Run]]
"""By direction, the run that is patched (base) and the run that values are taken from (source)."""


class Contrast(ABC):
    """A choice of base and source runs for each direction.

    Attributes:
        everywhere: whether base and source can differ at positions before the first differing token.
    """

    everywhere: ClassVar[bool] = False

    @abstractmethod
    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return base and source by direction for the pair with this index, given its clean and corrupted runs."""

    def about(self) -> dict[str, Any]:
        """Return metadata to store with the results."""
        return {}


class Swap(Contrast):
    """A contrast in which each run of a pair is patched with values of the other."""

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return corrupted and clean as base and source of denoising, and the reverse for noising."""
        return {"denoising": (corrupted, clean), "noising": (clean, corrupted)}
