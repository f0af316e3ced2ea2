"""A pair as words, before tokenization."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Draft:
    """A clean and a corrupted prompt as text, with the words that may follow.

    Attributes:
        clean, corrupted: the texts of both prompts.
        correct, wrong: right and wrong words after the clean prompt, preceded by a space unless `glued`.
        ends: for each label, the character index at which its word ends in the clean and in the corrupted prompt.
        tags: a description of how the pair was made: task, template, corruption.
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
    """Fill a template such as `"When {IO} and {S1} left, {S2} waved at"` with the words of both prompts.

    Args:
        template: a text with slots in braces.
        clean, corrupted: the word for each slot of the two prompts.
        correct, wrong: right and wrong words after the clean prompt.
        labels: the slots that become labels of the pair.
        tags: a description of how the pair is made.
        glued: whether the answer follows without a space.
    """
    (one, here), (other, there) = fill(template, clean), fill(template, corrupted)
    ends = {label: (here[label], there[label]) for label in labels}
    return Draft(one, other, correct, wrong, ends, tags, glued)


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Return the filled template, and the character index at which each slot ends in it."""
    text, ends, last = "", {}, 0
    for slot in SLOT.finditer(template):
        text += template[last : slot.start()] + words[slot[1]]
        ends[slot[1]], last = len(text), slot.end()
    return text + template[last:], ends
