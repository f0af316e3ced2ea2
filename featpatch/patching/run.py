"""One prompt's activations, and from which run values go into which."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

Contrast = Callable[[int, Run, Run], Ways]
"""From the index of a pair and its clean and corrupted run to the ways."""


def swapped(index: int, clean: Run, corrupted: Run) -> Ways:
    """Values go from one run of the pair into the other."""
    return {"denoising": (corrupted, clean), "noising": (clean, corrupted)}
