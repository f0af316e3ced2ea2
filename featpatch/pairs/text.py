"""Pairs as text, for pages and notebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from featpatch.pairs.pair import LabelPosition, Pair, positions_of


@dataclass(frozen=True)
class PairText:
    """A pair as text.

    Attributes:
        clean, corrupted: the text of each token; `corrupted` is empty if the prompt has no counterfactual.
        differs: for each token of the clean and of the corrupted prompt, whether it is not in the other prompt.
        titles: for each token of both prompts, a tooltip with its position and labels.
        correct, wrong: the texts of the right and wrong answers.
    """

    clean: Sequence[str]
    corrupted: Sequence[str]
    differs: tuple[Sequence[bool], Sequence[bool]]
    titles: tuple[Sequence[str], Sequence[str]]
    correct: Sequence[str]
    wrong: Sequence[str]

    @classmethod
    def of(cls, pair: Pair, tokenizer: Any) -> "PairText":
        """Decode a pair; token ids stand for its tokens if the tokenizer is None or can't decode."""
        decode = getattr(tokenizer, "decode", None) or (lambda ids: " ".join(map(str, ids)))
        correct, wrong = ([decode(list(answer)) for answer in side] for side in pair.answers)
        return cls(
            clean=[decode([token]) for token in pair.clean],
            corrupted=[decode([token]) for token in pair.corrupted] if pair.has_counterfactual else [],
            differs=_differing(pair),
            titles=(_titles(len(pair.clean), pair.labels), _titles(len(pair.corrupted), pair.corrupted_labels or pair.labels)),
            correct=correct,
            wrong=wrong,
        )


def _differing(pair: Pair) -> tuple[list[bool], list[bool]]:
    """Return for each token of both prompts whether it differs; tokens of unequal prompts are matched in their order."""
    if not pair.by_label:
        differs = [one != other for one, other in zip(pair.clean, pair.corrupted, strict=True)]
        return differs, differs
    here, there = [True] * len(pair.clean), [True] * len(pair.corrupted)
    for block in SequenceMatcher(None, pair.clean, pair.corrupted, autojunk=False).get_matching_blocks():
        here[block.a : block.a + block.size] = there[block.b : block.b + block.size] = [False] * block.size
    return here, there


def _titles(length: int, labels: Mapping[str, LabelPosition]) -> list[str]:
    """Return for each token of a prompt its position and labels as text."""
    names: dict[int, list[str]] = {}
    for label, position in labels.items():
        for p in positions_of(position):
            names.setdefault(p, []).append(label)
    return [", ".join([f"position {position}", *names.get(position, [])]) for position in range(length)]
