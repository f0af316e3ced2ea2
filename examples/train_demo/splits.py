"""What the training corpus never contains, so that it can be asked about afterwards."""

import zlib

from .grammar import BAD, GOOD, HATED, LIKED, STORIES

UNSEEN_FRAMES = frozenset({(0, 1), (1, 4), (4, 0), (6, 3), (5, 9), (9, 7), (2, 2), (7, 11)})
"""Combinations (pair template, gift template) of the indirect objects."""


def _hash(*key: object) -> int:
    return zlib.crc32(repr(key).encode())


def unseen_pair(a: str, b: str) -> bool:
    """Whether two people never stand in one sentence or story as a pair (24 of 276 pairs)."""
    return _hash(*sorted((a, b))) % 10 == 0


def unseen_fact(relation: str, country: str) -> int:
    """The one-sentence template (0 to 4) that never tells this fact."""
    return _hash("fact", relation, country) % 5


def unseen_story(relation: str, country: str) -> int:
    """The beginning of a story that is never followed by this fact."""
    return _hash("story", relation, country) % len(STORIES)


def unseen_start(century: int, year: int) -> bool:
    """Whether nothing starts in this year (about one year in six)."""
    return _hash("year", century, year) % 6 == 0


def unseen_opinion(noun: str, good: bool) -> tuple[str, str]:
    """The adjective and the verb of this opinion that are never said of the noun."""
    adjectives, verbs = (GOOD, LIKED) if good else (BAD, HATED)
    return adjectives[_hash(noun, good) % len(adjectives)], verbs[_hash(noun, good, "verb") % len(verbs)]
