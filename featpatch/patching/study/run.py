"""One prompt's activations, and from which run values go into which."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from featpatch.lens import Dictionary, Split
from featpatch.patch import Direction


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt's activations `[pos, ...]` by hook."""

    activations: Mapping[str, torch.Tensor]

    def at(self, hook: str) -> torch.Tensor:
        """The activation `[pos, ...]`."""
        return self.activations[hook]

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """Features and error from position `start` on, in a batch of one."""
        return dictionary.split(self.at(dictionary.reads)[None, start:], self.at(dictionary.writes)[None, start:])


Ways = Mapping[Direction, tuple[Run, Run]]
"""By direction the run that is patched, and the one that values are taken from."""


class Contrast(ABC):
    """From which run values go into which.

    Attributes:
        everywhere: whether runs can differ before the prompts do.
    """

    everywhere: ClassVar[bool] = False

    @abstractmethod
    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Of the pair with this index, from its runs."""

    def about(self) -> dict[str, Any]:
        """What to note of it with the results."""
        return {}


class Swap(Contrast):
    """Values go from one run of the pair into the other."""

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Clean into corrupted, and corrupted into clean."""
        return {"denoising": (corrupted, clean), "noising": (clean, corrupted)}
