"""The tasks that are studied on the real model, and the pairs of each that it masters."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import featpatch as fp
from featpatch.tasks.template import Draft, draft, draw, usable

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Greece": "Athens",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Hungary": "Budapest",
    "Russia": "Moscow", "Egypt": "Cairo", "Iran": "Tehran", "China": "Beijing", "Japan": "Tokyo",
}  # fmt: skip
"""Countries and capitals that are one token each in SmolLM2's vocabulary."""
PROMPT = "The capital of {} is"
NOUNS = (
    ("author", "authors"), ("farmer", "farmers"), ("teacher", "teachers"), ("guard", "guards"), ("doctor", "doctors"),
    ("student", "students"), ("king", "kings"), ("lawyer", "lawyers"), ("singer", "singers"), ("pilot", "pilots"),
    ("key", "keys"), ("book", "books"), ("letter", "letters"), ("picture", "pictures"), ("car", "cars"), ("dog", "dogs"),
)  # fmt: skip
OTHERS = ("senator", "senators", "table", "tables", "boy", "boys", "house", "houses", "tree", "trees")
AGREEMENT = ("The {subject} near the {other}", "The {subject} behind the {other}", "The {subject} that the {other} saw")
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
"""Verbs that agree with a singular and with a plural subject."""


def capitals(model: Any) -> fp.Pairs:
    """Make a pair for each country, with the next country of the list in the corrupted prompt."""
    countries = list(CAPITALS)
    others = [*countries[1:], countries[0]]
    return fp.Pairs.from_prompts(
        model,
        clean=[PROMPT.format(country) for country in countries],
        corrupted=[PROMPT.format(country) for country in others],
        correct=[f" {CAPITALS[country]}" for country in countries],
        wrong=[f" {CAPITALS[country]}" for country in others],
        labels=[{"subject": country} for country in countries],
    )


def agreement(model: Any, n: int = 24, *, seed: int = 0, templates: Sequence[str] = AGREEMENT) -> fp.Pairs:
    """Make `n` pairs whose corrupted subject has the other number (Linzen et al. 2016, arXiv 1611.01368).

    Labels: subject, other (a noun between subject and verb, of either number) and end.
    """
    others = usable(model, OTHERS, 1)
    singular, plural = (list(forms) for forms in zip(*VERBS, strict=True))

    def make(random: Random) -> Draft:
        nouns, number, template = random.choice(NOUNS), random.randrange(2), random.randrange(len(templates))
        shared = {"other": random.choice(others)}
        return draft(
            templates[template],
            {"subject": nouns[number], **shared},
            {"subject": nouns[1 - number], **shared},
            correct=plural if number else singular,
            wrong=singular if number else plural,
            labels=("subject", "other"),
            tags={"task": "agreement", "template": str(template)},
        )

    return draw(model, make, n=n, seed=seed)


def indirect_objects(model: Any) -> fp.Pairs:
    """Make pairs of indirect-object identification in which the other person is the giver in the corrupted prompt."""
    return fp.tasks.ioi(model, 24)


def greater_than(model: Any) -> fp.Pairs:
    """Make pairs of a later year whose first digit must be larger than that of the year before."""
    return fp.tasks.greater_than(model, 24)


TASKS: dict[str, Callable[[Any], fp.Pairs]] = {
    "capitals": capitals,
    "indirect objects": indirect_objects,
    "agreement": agreement,
    "greater than": greater_than,
}
