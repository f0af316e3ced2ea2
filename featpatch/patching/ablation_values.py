"""Ablation values: a constant, a statistic over prompts, or the values in another prompt."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random
from typing import Any, Protocol

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError, counted, each, is_finite, is_integer
from featpatch.model.cached import cached
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.pairs.tokens import chunks
from featpatch.patching.runs import TOKENS_AT_ONCE, Run
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary

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
        hooks: the hook points whose activations are ablated.
        dictionaries: the dictionaries whose features and errors are ablated.
    """

    lens: Lens
    pairs: Pairs
    prompts: Sequence[Prompt]
    seed: int
    hooks: Sequence[str]
    dictionaries: Sequence[Dictionary]

    def digest(self) -> str:
        """Return a digest of the prompts."""
        return sha256(repr([(prompt.tokens, sorted(prompt.special)) for prompt in self.prompts]).encode()).hexdigest()


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
    def values(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return the ablation values.

        Args:
            of: the hook point whose activation is replaced, or the dictionary whose features and error are replaced.
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
        (value,) = self.ablation_values.values(hook, (like,), length)
        return value.to(like).expand_as(like)

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """Return ablation values of features and error, with the state of the original run."""
        assert start == 0, "ablated runs may differ at every position"
        like = Run(self.activations).split(dictionary, start)
        found = self.ablation_values.values(dictionary, (like.features[0], like.error[0]), like.features.shape[1])
        features, error = (value.to(each) for value, each in zip(found, (like.features, like.error), strict=True))
        return replace(like, features=features.expand_as(like.features), error=error.expand_as(like.error))


@dataclass(frozen=True)
class Constant(Everywhere):
    """One number as the ablation value everywhere."""

    value: float

    def values(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return tensors filled with the number."""
        return tuple(torch.full_like(each, self.value) for each in like)


class Reduction(Protocol):
    """A statistic over the first dimension of values that are added batch by batch."""

    def add(self, values: torch.Tensor) -> None:
        """Add values `[n, ...]`."""

    def value(self) -> torch.Tensor:
        """Return the statistic of all values added so far, `[...]`."""


class Mean:
    """A running mean, in float32 at least; its memory does not grow with the number of values."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def add(self, values: torch.Tensor) -> None:
        """Add values `[n, ...]`."""
        self.total = self.total + values.to(torch.promote_types(values.dtype, torch.float32)).sum(0)
        self.count += len(values)

    def value(self) -> torch.Tensor:
        """Return the mean `[...]`."""
        return self.total / self.count


class Statistic(Everywhere):
    """A statistic over prompts as the ablation value.

    All hook points and dictionaries are read in the same forward passes, each of which runs several prompts of equal length.

    Args:
        others: the prompts.
        reduction: makes an empty `Reduction`, such as `Mean`.
        by_position: whether to compute a statistic for every token index, over the prompts of the same length, rather than one
            over all positions.

    Raises:
        FeatpatchError: the prompts have only special tokens.
    """

    def __init__(self, others: Others, reduction: Callable[[], Reduction], *, by_position: bool = False) -> None:
        if all(len(prompt.special) == len(prompt.tokens) for prompt in others.prompts):
            raise FeatpatchError("the prompts to take means over hold only special tokens: expected words; give other prompts")
        self.others, self.reduction, self.by_position = others, reduction, by_position
        self.noted = {"reference": others.digest()}
        self._found: dict[int, dict[str | int, Values]] = {}

    def values(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return the statistics, `[pos, ...]` each if by position, otherwise without a position dimension.

        Raises:
            FeatpatchError: a statistic over all positions is asked for attention patterns, or one by position and no prompt has
                this length.
        """
        if isinstance(of, str) and not self._has_statistic(of):
            raise FeatpatchError(
                f"to='mean' for {of!r}: expected to='mean_by_position', 'zero' or 'resample', because a mean over all "
                "positions is not an attention pattern"
            )
        key = length if self.by_position else 0
        if key not in self._found:
            prompts = [p for p in self.others.prompts if len(p.tokens) == length or not self.by_position]
            if not prompts:
                raise FeatpatchError(
                    f"there is no prompt of {counted(length, 'token')} to take a mean by position over: expected at least one "
                    "in `reference`; add prompts of that length, or pass to='mean'"
                )
            self._found[key] = self._over(prompts)
        index = of if isinstance(of, str) else next(i for i, each in enumerate(self.others.dictionaries) if each is of)
        return self._found[key][index]

    def _has_statistic(self, hook: str) -> bool:
        return self.by_position or sites.by_position(hook)

    @torch.no_grad()
    def _over(self, prompts: Sequence[Prompt]) -> dict[str | int, Values]:
        """Return the statistics over prompts by hook point, and for features and error by the index of the dictionary."""
        reductions: dict[str | int, list[Reduction]] = {}
        for some in chunks([len(prompt.tokens) for prompt in prompts], TOKENS_AT_ONCE):
            batch = [prompts[index] for index in some]
            words = torch.tensor([[at not in prompt.special for at in range(len(prompt.tokens))] for prompt in batch])
            for key, values in self._read(torch.tensor([prompt.tokens for prompt in batch])):
                for one, value in zip(reductions.setdefault(key, [self.reduction() for _ in values]), values, strict=True):
                    one.add(value if self.by_position else value[words.to(value.device)])
        return {key: tuple(one.value() for one in several) for key, several in reductions.items()}

    def _read(self, tokens: torch.Tensor) -> Iterator[tuple[str | int, Values]]:
        """Run prompts of equal length and yield their values `[prompts, pos, ...]`, with the keys of `_over`."""
        dictionaries = self.others.dictionaries
        hooks = {*self.others.hooks, *(hook for each in dictionaries for hook in each.hooks)}
        read = self.others.lens.read(tokens, sorted(hooks))
        for hook in filter(self._has_statistic, self.others.hooks):
            yield hook, (read[hook],)
        for index, dictionary in enumerate(dictionaries):
            split = dictionary.split(read)
            yield index, (split.features, split.error)


class Means(Everywhere):
    """Given activations, averaged over their prompts and positions, as ablation values.

    Args:
        lens: the model.
        given: an `ActivationCache` or a mapping of activations, as in `model.cached`.
    """

    def __init__(self, lens: Lens, given: Any) -> None:
        self.lens, self.given = lens, dict(getattr(given, "cache_dict", given))
        tensors = {str(hook): values for hook, values in self.given.items() if isinstance(values, torch.Tensor)}
        sums = [(hook, str(values.shape), float(values.double().sum())) for hook, values in sorted(tensors.items())]
        self.noted = {"activations": sha256(repr(sums).encode()).hexdigest()}
        self._found: dict[str | tuple[str, str], Values] = {}

    def values(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return the means.

        Raises:
            FeatpatchError: the activations of a hook point are missing, do not have its shape, or are means themselves and
                those of features are needed.
        """
        key = of if isinstance(of, str) else ("features and error", of.name)
        if key not in self._found:
            self._found[key] = tuple(each.flatten(0, 1).mean(0) for each in self._read(of))
        return self._found[key]

    def _read(self, of: str | Dictionary) -> Values:
        """Return the given values `[batch, pos, ...]`, checked as `values` says."""
        if isinstance(of, str):
            if not sites.by_position(of):
                raise FeatpatchError(
                    f"to=activations for {of!r}: expected to='mean_by_position', 'zero' or 'resample', because a mean over all "
                    "positions is not an attention pattern"
                )
            return (cached(self.lens, "to", self.given, [of])[of],)
        found = cached(self.lens, "to", self.given, [of.reads, of.writes])
        if any(self.given.get(hook, values).ndim < values.ndim for hook, values in found.items()):
            raise FeatpatchError(
                f"to={{hook: tensor}} for the features of {of.name}: expected activations [batch, pos, ...], whose features "
                "have a mean; pass a cache, or to='mean' with reference"
            )
        split = of.split(found)
        return split.features, split.error


class OtherPrompts(AblationValues):
    """The values in another prompt of the same length as ablation values.

    Attributes:
        lens: the model.
        partners: the token ids of the other prompt of each pair.
    """

    def __init__(self, lens: Lens, partners: Sequence[tuple[int, ...]]) -> None:
        self.lens, self.partners = lens, partners

    def run(self, index: int, clean: Run) -> Run:
        """Return the activations of the other prompt."""
        read = self.lens.read(torch.tensor([self.partners[index]]), sorted(clean.activations))
        return Run({hook: values[0] for hook, values in read.items()})


class Resampled(OtherPrompts):
    """The values in another prompt of the same length, drawn for each pair, as ablation values.

    Raises:
        FeatpatchError: there is no other prompt of a pair's length.
    """

    def __init__(self, others: Others) -> None:
        self.others, self.noted = others, {"reference": others.digest(), "seed": others.seed}
        super().__init__(others.lens, [self._partner(index, pair.clean) for index, pair in enumerate(others.pairs)])

    def _partner(self, index: int, clean: tuple[int, ...]) -> tuple[int, ...]:
        """Draw another prompt as long as the clean one."""
        prompts = [prompt.tokens for prompt in self.others.prompts]
        fitting = [tokens for tokens in prompts if len(tokens) == len(clean) and tokens != clean]
        if not fitting:
            raise FeatpatchError(
                f"pair {index} has {counted(len(clean), 'token')}, and no other prompt has as many: expected one to resample "
                "from; pass more prompts as reference=..., or another `to`"
            )
        return Random(repr((self.others.seed, clean))).choice(fitting)


ABLATION_VALUES: dict[str, Callable[[Others], AblationValues]] = {
    "zero": lambda others: Constant(0.0),
    "mean": lambda others: Statistic(others, Mean),
    "mean_by_position": lambda others: Statistic(others, Mean, by_position=True),
    "resample": Resampled,
}
"""The ways to choose ablation values, by name."""


def named_values(
    lens: Lens,
    pairs: Pairs,
    to: str | float,
    reference: Pairs | None,
    seed: int | None,
    hooks: Sequence[str],
    dictionaries: Sequence[Dictionary],
) -> AblationValues:
    """Return ablation values by the name of one of `ABLATION_VALUES`, or a number.

    Args:
        lens, hooks, dictionaries: as in `Others`.
        pairs, to, reference, seed: as in `ablate`.

    Raises:
        FeatpatchError: an argument is unknown or unused, or the values would be the prompt's own.
    """
    number = is_finite(to)
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
        return Constant(float(to))
    if reference is not None:
        each(lambda given: check_tokens(check_pairs(given, by_label=True), lens), [reference], where=["reference"])
    of = pairs if reference is None else reference
    prompts = list(dict.fromkeys(Prompt(ids, pair.special) for pair in of for ids in (pair.clean, pair.corrupted)))
    if to == "mean_by_position" and [prompt.tokens for prompt in prompts] == [pairs[0].clean]:
        raise FeatpatchError(
            "to='mean_by_position' with one prompt, whose own values would be the ablation values: expected further prompts of "
            "the same length; pass reference=..., or to='mean'"
        )
    return ABLATION_VALUES[str(to)](Others(lens, pairs, prompts, int(seed or 0), hooks, dictionaries))
