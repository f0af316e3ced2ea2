"""What ablated values are replaced by: a constant, a statistic over prompts, or the values in another prompt."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, Split
from featpatch.pairs import Pairs
from featpatch.patching.study.run import Run

Values = tuple[torch.Tensor, ...]
"""Tensors `[pos, ...]`."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the positions that pooled statistics leave out."""

    tokens: tuple[int, ...]
    special: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Others:
    """What values may be taken from.

    Attributes:
        pairs: those that are ablated.
        prompts: whose activations there are.
        seed: of draws.
    """

    lens: Lens
    pairs: Pairs
    prompts: Sequence[Prompt]
    seed: int

    def digest(self) -> str:
        """Of the prompts."""
        return sha256(repr([(prompt.tokens, sorted(prompt.special)) for prompt in self.prompts]).encode()).hexdigest()

    def run(self, tokens: Sequence[int], hooks: Sequence[str]) -> Run:
        """The activations of a prompt."""
        read = self.lens.read(torch.tensor([tokens]), sorted(set(hooks)))
        return Run({hook: values[0] for hook, values in read.items()})


class Filling(ABC):
    """A way to ablate.

    Attributes:
        noted: what to note of it with the results, besides its name.
    """

    noted: Mapping[str, Any] = {}

    @abstractmethod
    def run(self, index: int, clean: Run) -> Run:
        """The run that values go from into the clean run of the pair with this index."""


class Everywhere(Filling):
    """The same values in every prompt."""

    def run(self, index: int, clean: Run) -> Run:
        """The clean run, filled."""
        return Filled(clean.activations, self)

    @abstractmethod
    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """In the place of what `parts` makes of a run, the same for the same name, in a prompt of some length."""


@dataclass(frozen=True, eq=False)
class Filled(Run):
    """A run whose values are replaced, whichever are asked for; what else decoding needs stays as it is."""

    filling: Everywhere

    def at(self, hook: str) -> torch.Tensor:
        """The replacement, at every position."""
        like = self.activations[hook]
        length = like.shape[0 if sites.by_position(hook) else -1]
        (value,) = self.filling.values(hook, [hook], lambda run: (run.at(hook),), (like,), length)
        return value.to(like).expand_as(like)

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """The replacements, beside the state of the run."""
        like = Run(self.activations).split(dictionary, start)
        name, hooks = f"features of {dictionary.name}", [dictionary.reads, dictionary.writes]

        def parts(run: Run) -> Values:
            split = run.split(dictionary, 0)
            return split.features[0], split.error[0]

        length = start + like.features.shape[1]
        found = self.filling.values(name, hooks, parts, (like.features[0], like.error[0]), length)
        features, error = (value[-(length - start) :] if value.ndim > 1 else value for value in found)
        return replace(like, features=features.expand_as(like.features), error=error.expand_as(like.error))


@dataclass(frozen=True)
class Constant(Everywhere):
    """The same number everywhere."""

    value: float

    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """Full of it."""
        return tuple(torch.full_like(each, self.value) for each in like)


class Statistic(Everywhere):
    """A statistic over prompts, worked out once.

    Args:
        of: from values `[n, ...]` to theirs `[...]`.
        by_position: one for every token index, over the prompts of the same length; else one over all positions.

    Raises:
        FeatpatchError: there is nothing to take it over.
    """

    def __init__(self, others: Others, of: Callable[[torch.Tensor], torch.Tensor], *, by_position: bool = False) -> None:
        if all(len(prompt.special) == len(prompt.tokens) for prompt in others.prompts):
            raise FeatpatchError("all tokens of the prompts to take means over are special: expected others")
        self.others, self.of, self.by_position, self.noted = others, of, by_position, {"reference": others.digest()}
        self._found: dict[tuple[str, int], Values] = {}

    def values(self, name: str, hooks: Sequence[str], parts: Callable[[Run], Values], like: Values, length: int) -> Values:
        """`[pos, ...]` each by position, else one row; an attention pattern has none over all positions."""
        if not self.by_position and not all(map(sites.by_position, hooks)):
            raise FeatpatchError(
                f"the mean of {name!r} over all positions is no pattern: expected to='mean_by_position', 'zero' or 'resample'"
            )
        key = name, length if self.by_position else 0
        if key not in self._found:
            prompts = [p for p in self.others.prompts if len(p.tokens) == length or not self.by_position]
            if not prompts:
                raise FeatpatchError(
                    f"no prompt of {length} tokens to take a mean by position over: expected some in `reference`; "
                    "give to='mean', or prompts of that length"
                )
            found = [parts(self.others.run(prompt.tokens, hooks)) for prompt in prompts]
            self._found[key] = tuple(self.of(self._joined(prompts, values)) for values in zip(*found, strict=True))
        return self._found[key]

    def _joined(self, prompts: Sequence[Prompt], values: Values) -> torch.Tensor:
        """Prompt by prompt where they are by position, else row by row without the special ones."""
        if self.by_position:
            return torch.stack(values)
        kept = [[at for at in range(len(prompt.tokens)) if at not in prompt.special] for prompt in prompts]
        return torch.cat([value[rows] for value, rows in zip(values, kept, strict=True)])


class Resampled(Filling):
    """The values in another prompt of the same length, drawn for each pair.

    Raises:
        FeatpatchError: the seed is none, or a pair has no other prompt.
    """

    def __init__(self, others: Others) -> None:
        if not isinstance(others.seed, int):
            raise FeatpatchError(f"seed={others.seed!r}: expected an integer, so that the draws can be repeated")
        self.others, self.noted = others, {"reference": others.digest(), "seed": others.seed}
        self.partners = [self._partner(index, pair.clean) for index, pair in enumerate(others.pairs)]

    def run(self, index: int, clean: Run) -> Run:
        """The partner's."""
        return self.others.run(self.partners[index], list(clean.activations))

    def _partner(self, index: int, clean: tuple[int, ...]) -> tuple[int, ...]:
        prompts = [prompt.tokens for prompt in self.others.prompts]
        fitting = [tokens for tokens in prompts if len(tokens) == len(clean) and tokens != clean]
        if not fitting:
            raise FeatpatchError(
                f"pair {index} has {len(clean)} tokens and no other prompt has: expected one to resample from; give more "
                "prompts as reference=..., or another `to`"
            )
        return Random(repr((self.others.seed, clean))).choice(fitting)


def mean(values: torch.Tensor) -> torch.Tensor:
    """Over the first dimension."""
    return values.mean(0)


FILLINGS: dict[str, Callable[[Others], Filling]] = {
    "zero": lambda others: Constant(0.0),
    "mean": lambda others: Statistic(others, mean),
    "mean_by_position": lambda others: Statistic(others, mean, by_position=True),
    "resample": Resampled,
}
"""By name."""
