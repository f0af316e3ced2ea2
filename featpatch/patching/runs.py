"""Runs of a few pairs of equal length: activations, base and source of each direction, and where metrics are read.

If the prompts of a pair are patched label by label, only their labelled tokens are compared. These are numbered as places,
which are the same in both runs: place i is the token `tokens[i]` of each.

The corrupted run may also be the clean prompt with noise on the embeddings (noise.py).

Most metrics are read once, at the answer position. The log-probability of an answer of several tokens is teacher-forced: the
earlier tokens of the answer follow the prompt, in both the clean and the corrupted run.

    log p(a | prompt) = sum_i log p(a_i | prompt, a_1 ... a_(i-1))

So each reading is a pair with one-token answers: the pair itself, or the pair with earlier tokens of an answer at its end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int

from featpatch.engine.patches import BaseRun
from featpatch.engine.sweep import trace_bytes
from featpatch.errors import FeatpatchError, each
from featpatch.metrics import SEQUENCES, Measures
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.nodes import DIRECTIONS, Direction
from featpatch.pairs.pair import Pair, Wanted, check_answers
from featpatch.pairs.pairs import Pairs
from featpatch.patching.noise import Noise
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary


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
        return dictionary.split({hook: self.at(hook)[None, start:] for hook in dictionary.hooks})


@dataclass(frozen=True, eq=False)
class Labelled(Run):
    """A run of which only labelled tokens are seen, so that it corresponds to a run of a prompt of another length.

    Attributes:
        tokens: the token positions of the labels.
    """

    tokens: Int[torch.Tensor, " places"]

    def at(self, hook: str) -> torch.Tensor:
        """Return the activation `[place, ...]` of the labelled tokens at a hook point."""
        return self.activations[hook][self.tokens]

    def split(self, dictionary: Dictionary, start: int) -> Split:
        """Return features and error of the labelled tokens from place `start` on, encoded as part of the whole prompt."""
        return Run(self.activations).split(dictionary, 0).map(lambda values: values[:, self.tokens[start:]])


Ways = Mapping[Direction, tuple[Run, Run]]
"""By direction, the run that is patched (base) and the run that values are taken from (source)."""


@runtime_checkable
class Contrast(Protocol):
    """A choice of base and source runs other than clean and corrupted; the two may differ at every position."""

    def ways(self, index: int, clean: Run, corrupted: Run) -> Ways:
        """Return base and source by direction for the pair with this index, given its clean and corrupted runs."""
        ...

    def about(self) -> dict[str, Any]:
        """Return metadata to store with the results."""
        ...


CLEAN_FIRST = DIRECTIONS[::-1]
"""The order of runs: clean first, because what the lens learns from the first run of a model must not come from a noisy run."""

TOKENS_AT_ONCE = 512
"""The largest number of tokens in a forward pass that several pairs share."""

KEPT, KEPT_SHARE = 2**30, 1 / 8
"""The largest number of bytes of runs kept for reuse, and the largest share of the free memory."""

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class PairRuns:
    """Both runs of one pair.

    Attributes:
        pair: the pair.
        first: the first position (or place) at which the runs can differ.
        wanted: the positions (or places) at which nodes are patched.
        ways: base and source by direction.
        bases: the base run for the engine, by direction, for each reading.
        found: results that the parts of the study have computed from the runs, by part.
    """

    pair: Pair
    first: int
    wanted: Wanted
    ways: Ways
    bases: Mapping[Direction, Sequence[BaseRun]]
    found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def tokens(self, direction: Direction, span: Sequence[int]) -> list[int]:
        """Return the token positions of the base run at some positions (or places)."""
        base = self.ways[direction][0]
        return base.tokens[list(span)].tolist() if isinstance(base, Labelled) else list(span)

    def once(self, part: Any, find: Callable[[], Found]) -> Found:
        """Return the result that a part computes from the runs; `find` is called only the first time."""
        if part not in self.found:
            self.found[part] = find()
        return self.found[part]


def chunks(pairs: Pairs) -> Iterator[list[int]]:
    """Yield the indices of pairs that run together."""
    return pairs.chunks(TOKENS_AT_ONCE)


@dataclass(eq=False)
class Runner:
    """Runs pairs, and keeps the runs and everything computed from them as long as there is room.

    The first groups of pairs are kept, because every sweep goes through all groups in the same order; the latest group is kept
    too.

    Attributes:
        lens: the model.
        pairs: all pairs of the study.
        hooks: the hook points whose activations are kept.
        layers: the layers at whose input the residual stream is kept.
        wanted: the positions at which nodes are patched, by pair.
        readings: the readings of the metrics, by pair.
        contrast: the choice of base and source runs; None to patch each run of a pair with values of the other.
        noise: the noise on the embeddings of the clean prompts that replaces the corrupted prompts, if any.
        room: the number of bytes that may still be kept, in addition to the latest group.
    """

    lens: Lens
    pairs: Pairs
    hooks: Sequence[str]
    layers: Sequence[int]
    wanted: Sequence[Wanted]
    readings: Mapping[int, Sequence[Pair]]
    contrast: Contrast | None
    noise: Noise | None
    room: int
    _kept: dict[tuple[int, ...], list[PairRuns]] = field(default_factory=dict, init=False)
    _latest: tuple[int, ...] | None = field(default=None, init=False)

    def run(self, some: Sequence[int]) -> list[PairRuns]:
        """Return the runs of the clean and the corrupted prompts of some equally long pairs, from memory if they are there."""
        group = tuple(some)
        if group not in self._kept:
            if self._latest is not None:
                size = self._size(self._kept[self._latest])  # measured now, because results computed from the runs count too
                if size > self.room:
                    del self._kept[self._latest]
                else:
                    self.room -= size
            self._latest, self._kept[group] = group, self._run(group)
        return self._kept[group]

    def _size(self, runs: Sequence[PairRuns]) -> int:
        """Return the number of bytes of runs, with what the engine keeps of them."""
        tokens = sum(len(base.tokens) for run in runs for bases in run.bases.values() for base in bases)
        return held(runs) + trace_bytes(self.lens, self.layers) * tokens

    @torch.no_grad()
    def _run(self, some: tuple[int, ...]) -> list[PairRuns]:
        read = {direction: self._read(direction, some, (), self.hooks) for direction in CLEAN_FIRST}
        return [
            self._pair(
                index,
                {way: Run({hook: values[slot] for hook, values in kept.items()}) for way, (kept, _) in read.items()},
                {way: {layer: values[slot] for layer, values in entries.items()} for way, (_, entries) in read.items()},
            )
            for slot, index in enumerate(some)
        ]

    def _pair(
        self, index: int, kept: Mapping[Direction, Run], entries: Mapping[Direction, Mapping[int, torch.Tensor]]
    ) -> PairRuns:
        pair = self.pairs[index]
        first = pair.first_difference if self.noise is None else min(self.noise.at(pair))
        first = 0 if self.contrast is not None or not self.lens.causal else first
        bases: dict[Direction, list[BaseRun]] = {direction: [] for direction in CLEAN_FIRST}
        for number, reading in enumerate(self.readings[index]):
            for direction in bases:
                resid = entries[direction]
                if following := continuation(reading, pair):
                    _, longer = self._read(direction, (index,), following, [])
                    resid = {layer: values[0] for layer, values in longer.items()}
                base = BaseRun(
                    name=f"pair {index} {direction}{f' reading {number}' if number else ''}",
                    tokens=torch.tensor(self._prompt(direction, reading)),
                    resid=resid,
                    answer=self._answer(direction, reading),
                    correct=reading.correct,
                    wrong=reading.wrong,
                    clean=bases["noising"][number] if direction == "denoising" else None,
                )
                bases[direction].append(base)
        wanted = self.wanted[index]
        if self.labelled(pair):
            first, wanted, kept = self._places(pair, wanted, kept)
        clean, corrupted = kept["noising"], kept["denoising"]
        ways: Ways = {"denoising": (corrupted, clean), "noising": (clean, corrupted)}
        if self.contrast is not None:
            ways = self.contrast.ways(index, clean, corrupted)
        return PairRuns(pair, first, wanted, ways, bases)

    def labelled(self, pair: Pair) -> bool:
        """Return whether the two runs of a pair correspond only at its labels."""
        return pair.by_label and self.noise is None and self.contrast is None

    def _places(self, pair: Pair, wanted: Wanted, kept: Mapping[Direction, Run]) -> tuple[int, Wanted, Mapping[Direction, Run]]:
        """Return the first place at which the runs can differ, the wanted places, and the runs at these places."""
        every = sorted({place for label in wanted for place in pair.places(str(label))})
        same = [(one, other) for one, other in every if one == other < pair.first_difference and self.lens.causal]
        places = same + [place for place in every if place not in same]
        number = {place: index for index, place in enumerate(places)}
        found = {label: [number[place] for place in pair.places(str(label))] for label in wanted}
        clean, corrupted = torch.tensor(places).T
        tokens = {"noising": clean, "denoising": corrupted}
        return len(same), found, {way: Labelled(run.activations, tokens[way]) for way, run in kept.items()}

    def _read(
        self, direction: Direction, some: tuple[int, ...], following: tuple[int, ...], hooks: Sequence[str]
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Run a direction's base prompts; return activations `[pairs, pos, ...]` by hook point, and layer inputs by layer."""
        tokens = torch.tensor([self._prompt(direction, self.pairs[index]) + following for index in some])
        if direction == "noising" or self.noise is None:
            return self.lens.read_entering(tokens, hooks, self.layers)
        with self.noise.added(self.lens, [self.pairs[index] for index in some]):
            return self.lens.read_entering(tokens, hooks, self.layers)

    def _answer(self, direction: Direction, pair: Pair) -> int:
        """Return the position at which a base run is read; prompts that are patched by label are read at their ends."""
        return len(self._prompt(direction, pair)) - 1 if pair.by_label else pair.answer_position

    def _prompt(self, direction: Direction, pair: Pair) -> tuple[int, ...]:
        return pair.corrupted if direction == "denoising" and self.noise is None else pair.clean


def check_labelled(runner: Runner) -> None:
    """Raise a FeatpatchError unless pairs which are patched label by label are patched at labels alone."""
    for index, (pair, wanted) in enumerate(zip(runner.pairs, runner.wanted, strict=True)):
        others = [position for position in wanted if position == "all" or not isinstance(position, str)]
        if others and runner.labelled(pair):
            at = "'all'" if others[0] == "all" else f"token index {others[0]}"
            raise FeatpatchError(
                f"pair {index} has {pair.lengths[0]} tokens in the clean and {pair.lengths[1]} in the corrupted prompt, and "
                f"{at} is not the same place in both: expected labels, which have a place in each prompt, such as "
                f"positions={list(pair.labels)[:2]}"
            )


def held(what: Any) -> int:
    """Return the bytes of memory behind all tensors in nested dataclasses and containers, except in dictionaries."""
    storages = (tensor.untyped_storage() for tensor in _tensors(what, set()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(what: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield each tensor in nested dataclasses and containers once, see `held`."""
    if id(what) in seen:
        return
    seen.add(id(what))
    if isinstance(what, torch.Tensor):
        yield what
    elif isinstance(what, (Mapping, list, tuple)):
        for each_one in what.values() if isinstance(what, Mapping) else what:
            yield from _tensors(each_one, seen)
    elif is_dataclass(what) and not isinstance(what, Dictionary):
        yield from _tensors(vars(what), seen)


def readings_of(measures: Measures, pairs: Pairs, lens: Lens) -> dict[int, list[Pair]]:
    """Return the readings of every pair, by its index, after checking that the model accepts its tokens.

    Raises:
        FeatpatchError: the metrics do not read answers of this kind, a token is unknown, a prompt is too long, or an answer
            would follow the prompt of a model that attends in both directions.
    """
    found = dict(enumerate(each(partial(readings, measures), list(pairs))))
    following = {index: [continuation(read, pairs[index]) for read in of_pair] for index, of_pair in found.items()}
    check_tokens(pairs, lens, following)
    if any(any(of_pair) for of_pair in following.values()) and not lens.causal:
        raise FeatpatchError(
            f"metric {', '.join(measures.names)} reads answers that follow the prompt, but {lens.name!r} has bidirectional "
            "attention: expected a causal model, or one-token answers"
        )
    return found


def readings(measures: Measures, pair: Pair) -> list[Pair]:
    """Return the readings of a pair: the pair itself or, for answers of several tokens, a pair for each token of each answer.

    Raises:
        FeatpatchError: a metric reads one token and the pair's answers have several, or the pair lacks answers.
    """
    if measures.by_token:
        return [
            _before(pair, answer, token) for side in _sides(measures, pair) for answer in side for token in range(len(answer))
        ]
    need = [part.name for part in measures.parts if part.of_answers]
    check_answers(pair, need)
    if need and not pair.correct:
        raise FeatpatchError(
            f"its answers {pair.answers} have several tokens, and {', '.join(need)} reads one: expected the metric "
            f"{' or '.join(SEQUENCES)}, or one-token answers"
        )
    return [pair]


def continuation(read: Pair, pair: Pair) -> tuple[int, ...]:
    """Return the tokens that follow the prompts of a pair in one of its readings."""
    return read.clean[len(pair.clean) :]


def combined(
    measures: Measures, pair: Pair, values: Float[torch.Tensor, "readings patches metrics"]
) -> Float[torch.Tensor, "patches metrics"]:
    """Return the metrics of a pair from their values at each reading.

    For answers of several tokens, the log-probabilities of the tokens of an answer are added up, then the probabilities of the
    correct answers. For a difference, the same is done for the wrong answers, and the logarithms are subtracted.
    """
    if not measures.by_token:
        return values[0]
    sides = []
    for answers in _sides(measures, pair):
        tokens = [len(answer) for answer in answers]
        parts, values = values[: sum(tokens)].split(tokens), values[sum(tokens) :]
        sides.append(torch.stack([part.sum(0) for part in parts]).logsumexp(0))
    found = {"sequence_log_prob": sides[0], "sequence_log_prob_diff": sides[0] - sides[-1]}
    return torch.stack([found[name][:, column] for column, name in enumerate(measures.names)], dim=1)


def _before(pair: Pair, answer: tuple[int, ...], token: int) -> Pair:
    """Return a pair with the tokens of an answer before one of its tokens, which is the answer of the new pair."""
    before = answer[:token]
    return replace(
        pair,
        clean=pair.clean + before,
        corrupted=pair.corrupted + before,
        correct=(answer[token],),
        wrong=(),
        answer_position=pair.answer_position + token,
        correct_sequences=(),
        wrong_sequences=(),
    )


def _sides(measures: Measures, pair: Pair) -> tuple[Sequence[tuple[int, ...]], ...]:
    """Return the correct answers and, if a metric needs them, the wrong ones; raise a FeatpatchError if there are none."""
    check_answers(pair, measures.names)
    if "sequence_log_prob_diff" not in measures.names:
        return pair.answers[:1]
    if not pair.answers[1]:
        raise FeatpatchError(
            "metric 'sequence_log_prob_diff' compares correct with wrong answers, and a pair has no wrong answers: "
            "expected at least one; give wrong=..., or use metric='sequence_log_prob'"
        )
    return pair.answers
