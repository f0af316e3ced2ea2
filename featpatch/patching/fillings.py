"""What ablated values are replaced by: a constant, or means over a set of prompts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, Split
from featpatch.patching.study.run import Run


class Filling(ABC):
    """Values for activations, and for features and error terms."""

    @abstractmethod
    def activation(self, hook: str, like: torch.Tensor) -> torch.Tensor:
        """For an activation `[pos, ...]`."""

    @abstractmethod
    def split(self, dictionary: Dictionary, like: Split, start: int) -> Split:
        """For features and error from position `start` on; what else decoding needs stays as it is."""


@dataclass(frozen=True)
class Constant(Filling):
    """The same number everywhere."""

    value: float

    def activation(self, hook: str, like: torch.Tensor) -> torch.Tensor:
        """Full of it."""
        return torch.full_like(like, self.value)

    def split(self, dictionary: Dictionary, like: Split, start: int) -> Split:
        """Full of it."""
        return replace(like, features=torch.full_like(like.features, self.value), error=torch.full_like(like.error, self.value))


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the positions that pooled means leave out."""

    tokens: tuple[int, ...]
    special: frozenset[int] = frozenset()


Parts = Callable[[Run], tuple[torch.Tensor, ...]]
"""From a run to tensors `[pos, ...]`."""


@dataclass(frozen=True)
class Mean(Filling):
    """Means over prompts.

    Attributes:
        by_position: a mean for every token index, over the prompts of the same length; else one over all positions.
    """

    lens: Lens
    prompts: Sequence[Prompt]
    by_position: bool
    _means: dict[tuple[str, int], tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False)

    def activation(self, hook: str, like: torch.Tensor) -> torch.Tensor:
        """The mean, at every position.

        Raises:
            FeatpatchError: the pooled mean of an attention pattern, which is none.
        """
        pattern = hook == sites.component(sites.layer_of(hook), "pattern")
        if pattern and not self.by_position:
            raise FeatpatchError(
                f"the mean of {hook!r} over all positions is no pattern: expected to='mean_by_position', 'zero' or 'resample'"
            )
        (mean,) = self._mean(hook, [hook], like.shape[-1 if pattern else 0], lambda run: (run.at(hook),))
        return mean.to(like).expand_as(like)

    def split(self, dictionary: Dictionary, like: Split, start: int) -> Split:
        """Means of features and of the error."""

        def parts(run: Run) -> tuple[torch.Tensor, ...]:
            split = run.split(dictionary, 0)
            return split.features[0], split.error[0]

        name, hooks = f"features of {dictionary.name}", [dictionary.reads, dictionary.writes]
        means = self._mean(name, hooks, start + like.features.shape[1], parts)
        features, error = (mean[start:] if self.by_position else mean for mean in means)
        return replace(like, features=features.expand_as(like.features), error=error.expand_as(like.error))

    def _mean(self, name: str, hooks: Sequence[str], length: int, parts: Parts) -> tuple[torch.Tensor, ...]:
        key = name, length if self.by_position else 0
        if key not in self._means:
            prompts = [p for p in self.prompts if len(p.tokens) == length] if self.by_position else self.prompts
            if not prompts:
                raise FeatpatchError(
                    f"no prompt of {length} tokens to take a mean by position over: expected some in `reference`; "
                    "give to='mean', or prompts of that length"
                )
            found = [self._kept(prompt, parts(self._run(prompt, hooks))) for prompt in prompts]
            self._means[key] = tuple(self._over(values) for values in zip(*found, strict=True))
        return self._means[key]

    def _run(self, prompt: Prompt, hooks: Sequence[str]) -> Run:
        read = self.lens.read(torch.tensor([prompt.tokens]), sorted(set(hooks)))
        return Run({hook: values[0] for hook, values in read.items()})

    def _kept(self, prompt: Prompt, values: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Without the special positions where means are pooled."""
        if self.by_position:
            return list(values)
        rows = [position for position in range(len(prompt.tokens)) if position not in prompt.special]
        return [value[rows] for value in values]

    def _over(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Over prompts where they are by position, else over all rows."""
        return torch.stack(list(values)).mean(0) if self.by_position else torch.cat(list(values)).mean(0)
