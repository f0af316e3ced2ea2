"""A pair as words, before any tokenizer has seen it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Draft:
    """Two filled templates and the words that may follow.

    Attributes:
        clean, corrupted: the prompts.
        correct, wrong: words that follow the clean prompt, after a space unless `glued`.
        ends: by label, where in the clean and in the corrupted prompt its word ends, in characters.
        tags: what it was made by: task, template, corruption.
        glued: whether the answer follows without a space, as the rest of a year does.
    """

    clean: str
    corrupted: str
    correct: Sequence[str]
    wrong: Sequence[str]
    ends: Mapping[str, tuple[int, int]]
    tags: Mapping[str, str]
    glued: bool = False


def draft(
    template: str,
    clean: Mapping[str, str],
    corrupted: Mapping[str, str],
    *,
    correct: Sequence[str],
    wrong: Sequence[str],
    labels: Sequence[str],
    tags: Mapping[str, str],
    glued: bool = False,
) -> Draft:
    """A template such as `"When {IO} and {S1} left, {S2} waved at"` filled twice; the slots named by `labels` are labelled."""
    (one, here), (other, there) = fill(template, clean), fill(template, corrupted)
    ends = {label: (here[label], there[label]) for label in labels}
    return Draft(one, other, correct, wrong, ends, tags, glued)


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """The text, and where each slot ends in it."""
    text, ends, last = "", {}, 0
    for slot in SLOT.finditer(template):
        text += template[last : slot.start()] + words[slot[1]]
        ends[slot[1]], last = len(text), slot.end()
    return text + template[last:], ends
