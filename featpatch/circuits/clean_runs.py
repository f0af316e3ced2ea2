"""The clean runs of some pairs: their metric, and the values to which activations are ablated in them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError, check_choices
from featpatch.metrics import Measures
from featpatch.model.lens import Lens
from featpatch.nodes import Position
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_counterfactual, check_pairs, check_unmixed
from featpatch.patching.ablation_values import AblationValues, Everywhere, OtherPrompts, Values, named_values
from featpatch.patching.runs import combined, continuation, readings_of
from featpatch.sae.dictionary import Dictionary

Array = NDArray[np.float64]

Complement = Literal["corrupted", "zero", "mean", "mean_by_position", "resample"]
"""The ablation values of the complement: those of the pair's corrupted run (`"corrupted"`), or as in `fp.ablate`."""


def check_complement(to: object, pairs: object) -> None:
    """Raise a FeatpatchError unless these are ablation values of a complement, and pairs that have what these need."""
    check_choices(get_args(Complement), to=to)
    if to == "corrupted":
        check_counterfactual(pairs)
    else:
        check_unmixed(check_pairs(pairs))


@dataclass(eq=False, repr=False)
class CleanRuns(ABC):
    """The clean runs of some pairs, one for each reading of the metric.

    Attributes:
        lens: the model.
        pairs: the clean and corrupted prompts.
        to: the ablation values of the complement.
        measures: the metric that is measured.
        reference: pairs whose prompts are averaged or resampled; None for `pairs`.
        seed: the seed for resampling.
    """

    lens: Lens
    pairs: Pairs
    to: Complement
    measures: Measures
    reference: Pairs | None = field(default=None, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)
    _clean: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Raise a FeatpatchError if hooks are attached to the model, or the complement can't be ablated in this way."""
        if self.to == "mean_by_position" and any(map(self.continuation, range(len(self.runs)))):
            raise FeatpatchError(
                f"to={self.to!r} with metric {self.name!r} and answers of several tokens: expected another `to`, such as "
                "'mean', because there are no prompts with other answers to average at the positions of the answer"
            )
        assert self.ablation
        self.lens.check_unhooked()

    @cached_property
    def ablation(self) -> AblationValues:
        """The ablation values of the complement; raises a FeatpatchError if an argument is not used or prompts are lacking."""
        if self.to != "corrupted":
            return named_values(self.lens, self.pairs, self.to, self.reference, self.seed, *self.ablated())
        if self.reference is not None or self.seed is not None:
            raise FeatpatchError(
                f"to='corrupted' with reference={self.reference!r}, seed={self.seed!r}: expected neither, because each pair "
                "has its own corrupted prompt; leave them out, or pass another `to`"
            )
        return OtherPrompts(self.lens, [pair.corrupted for pair in self.pairs])

    @abstractmethod
    def ablated(self) -> tuple[Sequence[str], Sequence[Dictionary]]:
        """Return the hook points and the dictionaries whose ablation values are needed."""

    def others(self, some: Sequence[int]) -> torch.Tensor | None:
        """Return the prompts `[runs, pos]` whose activations are the ablation values of some equally long runs.

        The continuation of a run follows these prompts too. None if ablation values are the same in all runs.
        """
        if not isinstance(self.ablation, OtherPrompts):
            return None
        partners = self.ablation.partners
        return torch.tensor([partners[self.readings[number][0]] + self.continuation(number) for number in some])

    def everywhere(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return the ablation values `[pos, ...]`, the same in all runs of a length, in the shapes of `like`."""
        assert isinstance(self.ablation, Everywhere)
        found = self.ablation.values(of, like, length)
        return tuple(value.to(each).expand_as(each) for value, each in zip(found, like, strict=True))

    @property
    def name(self) -> str:
        """The name of the metric."""
        return self.measures.names[0]

    @property
    def reads_clean(self) -> bool:
        """Whether the metric compares with the clean run; its gradient is then zero there."""
        return self.measures.reads_clean

    @cached_property
    def readings(self) -> list[tuple[int, Pair]]:
        """The readings, each with the index of its pair, in the order of the pairs."""
        readings = readings_of(self.measures, self.pairs, self.lens)
        return [(index, reading) for index, of_pair in readings.items() for reading in of_pair]

    @cached_property
    def runs(self) -> Pairs:
        """The readings alone; labels keep their positions."""
        return Pairs(tuple(reading for _, reading in self.readings))

    def continuation(self, run: int) -> tuple[int, ...]:
        """Return the tokens that follow the prompts of the pair in a run."""
        return continuation(self.runs[run], self.pairs[self.readings[run][0]])

    def tokens_at(self, index: int, position: Position) -> list[int]:
        """Return the token positions that a node's position stands for in a run.

        Labels and indices are positions in the prompt, so that -1 is its last token; `"all"` includes the continuation.
        """
        run, pair = self.runs[index], self.pairs[self.readings[index][0]]
        return (run if position == "all" else pair).positions(position)

    def combined(self, values: Float[torch.Tensor, " runs"]) -> Float[torch.Tensor, " pairs"]:
        """Combine the values of the runs into one value per pair, with its gradient."""
        counts = np.bincount([index for index, _ in self.readings]).tolist()
        each = zip(self.pairs, values.split(counts), strict=True)
        return torch.stack([combined(self.measures, pair, of_pair[:, None, None])[0, 0] for pair, of_pair in each])

    @cached_property
    def whole_runs(self) -> Float[torch.Tensor, " runs"]:
        """The metric of each unpatched clean run."""
        values = torch.zeros(len(self.runs), dtype=torch.float64)
        for group in self._groups():
            values[group] = self.metric_of(self._logits(group)[None], group)[0].cpu()
        return values

    @cached_property
    def whole(self) -> Array:
        """The metric of each pair in the unpatched clean run."""
        return self.combined(self.whole_runs).numpy()

    def metric_of(self, logits: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Compute the metric `[circuits, runs]` of logits `[circuits, runs, d_vocab]`, with its gradient."""
        return self.metric_from(
            lambda slot, columns: logits[:, slot] if columns is None else logits[:, slot, list(columns)], some
        )

    def metric_from(self, read: Callable[[int, Sequence[int] | None], torch.Tensor], some: Sequence[int]) -> torch.Tensor:
        """Compute the metric `[circuits, runs]`, with its gradient, from the logits that it reads.

        Args:
            read: a function from the number of a run among `some`, and the columns of the vocabulary or None for all, to
                logits `[circuits, columns]`.
            some: the indices of some equally long runs.
        """
        (measure,) = self.measures.parts
        self._note_clean(some)
        values = []
        for slot, index in enumerate(some):
            correct, wrong = self.runs[index].correct, self.runs[index].wrong
            of_run = read(slot, measure.columns(correct, wrong))
            values.append(measure.of(of_run, correct, wrong, self._clean.get(index)))
        return torch.stack(values, 1).double()

    def _note_clean(self, some: Sequence[int]) -> None:
        """Store the logits of some equally long clean runs if the metric compares with them; the model must not be edited."""
        if self.reads_clean and some[0] not in self._clean:
            self._clean |= dict(zip(some, self._logits(some).split(1), strict=True))

    def _logits(self, some: Sequence[int]) -> torch.Tensor:
        """Return the logits `[runs, d_vocab]` of some equally long unpatched runs."""
        return self.lens.answer(*self.prompts(some))

    def prompts(self, some: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean tokens `[runs, pos]` and the answer positions `[runs]` of some equally long runs."""
        answers = torch.tensor([self.runs[index].answer_position for index in some])
        return torch.tensor([self.runs[index].clean for index in some]), answers

    def _groups(self) -> list[list[int]]:
        """Return the indices of the runs by length; equally long runs stay together, as some ablation values require."""
        return list(self.runs.by_length().values())
