"""Documents of the synthetic corpus, drawn at random.

Four tasks and some filler: who receives a gift (indirect objects), facts about countries, a year that must be greater
than another, the verdict of a review.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import grammar as g
from . import splits

RIVAL_SHARE = 0.7
"""Share of the training stories about gifts in which a second pair of names competes."""


@dataclass(frozen=True)
class Gift:
    """A story about a gift, up to the word that names the receiver.

    Attributes:
        text: the story, ending in e.g. "to".
        giver, receiver: the names of the pair.
        order: "ABBA" if the giver is the second name of the pair, "BABA" if the first.
        slots: the words of the story by slot.
        frame: which template of the pair and which of the gift.
    """

    text: str
    giver: str
    receiver: str
    order: str
    slots: dict[str, str]
    frame: tuple[int, int]


@dataclass(frozen=True)
class Review:
    """Opinions about a work, before the verdict.

    Attributes:
        sentences: the opinions.
        work: what is reviewed.
        good: whether the verdict is good.
    """

    sentences: tuple[str, ...]
    work: str
    good: bool


def capitalise(text: str) -> str:
    """The text with a capital letter at the start of each sentence."""
    return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))


def draw_slots(r: random.Random) -> dict[str, str]:
    """A random word for every slot that needs no care."""
    n, m = draw_pair(r, unseen=False)
    return {
        "P": r.choice(g.PLACES), "O": r.choice(g.OBJECTS), "D": r.choice(g.DAYS), "N": r.choice(g.LOOKS),
        "Q": r.choice(g.QUALITIES), "L": r.choice(g.LENGTHS), "e": r.choice(g.EVENTS), "n": n, "m": m,
        "x": r.choice(g.COUNTRIES)[1],
    }  # fmt: skip


def draw_pair(r: random.Random, *, unseen: bool, without: tuple[str, ...] = ()) -> tuple[str, str]:
    """Two names, a pair of the training corpus or a held-out one."""
    while True:
        a, b = r.sample([name for name in g.NAMES if name not in without], 2)
        if splits.unseen_pair(a, b) == unseen:
            return a, b


def draw_gift(r: random.Random, *, unseen_pair: bool = False, unseen_frame: bool = False, rival: float = RIVAL_SHARE) -> Gift:
    """A story about a gift; `rival` is the chance of a competing pair of names."""
    a, b = draw_pair(r, unseen=unseen_pair)
    e, f = draw_pair(r, unseen=False, without=(a, b))
    while True:
        frame = r.randrange(len(g.PAIRS)), r.randrange(len(g.GIFTS))
        if (frame in splits.UNSEEN_FRAMES) == unseen_frame:
            break
    giver, receiver = r.choice([(a, b), (b, a)])
    slots = {**draw_slots(r), "A": a, "B": b, "E": e, "F": f, "S": giver, "I": receiver}
    parts = [g.PAIRS[frame[0]], r.choice(g.MIDDLES), g.GIFTS[frame[1]]]
    if r.random() < rival:
        clause = frame[0] < len(g.PAIR_CLAUSES)
        place = 0 if clause or r.random() < 0.5 else 1
        other = r.choice(g.PAIR_SENTENCES).format(A=e, B=f, P=r.choice(g.PLACES), D=r.choice(g.DAYS))
        parts.insert(place, other)
    text = " ".join(" ".join(parts).format(**slots).split())
    return Gift(capitalise(text), giver, receiver, "BABA" if giver == a else "ABBA", slots, frame)


def gift(r: random.Random) -> str:
    story = draw_gift(r)
    return f"{story.text} {r.choice(g.ENDINGS).format(**story.slots)}"


def gift_of_stranger(r: random.Random) -> str:
    """The giver belongs to no pair: either name of the pair may follow."""
    a, b = draw_pair(r, unseen=False)
    giver = r.choice([name for name in g.NAMES if name not in (a, b)])
    slots = {**draw_slots(r), "A": a, "B": b, "S": giver}
    text = f"{r.choice(g.PAIRS)} {r.choice(g.MIDDLES)} {r.choice(g.GIFTS)} ^{r.choice([a, b])} .".format(**slots)
    return capitalise(" ".join(text.split()))


def fact(r: random.Random) -> str:
    """One fact in one sentence."""
    while True:
        row, relation = r.choice(g.COUNTRIES), r.choice(["capital", "capital", "language", "currency"])
        template = r.randrange(len(g.FACTS[relation]))
        if template != splits.unseen_fact(relation, row[0]):
            break
    text = g.FACTS[relation][template]
    answered = text.index("{c}") < text.index("{x}")
    answer = row[g.RELATIONS[relation]]
    return text.format(**{**draw_slots(r), "c": row[0], "x": "^" + answer if answered else answer})


def story_of_country(r: random.Random) -> str:
    """One to three facts, far from the name of their country."""
    row, start = r.choice(g.COUNTRIES), r.randrange(len(g.STORIES))
    told = [relation for relation in g.RELATIONS if splits.unseen_story(relation, row[0]) != start]
    told = r.sample(told, min(len(told), r.choice([1, 2, 3])))
    text = [g.STORIES[start].format(**{**draw_slots(r), "c": row[0]})]
    return " ".join(text + [g.STORY_FACTS[relation].format(x=row[g.RELATIONS[relation]]) for relation in told])


def draw_start(r: random.Random, *, unseen: bool, years: range = range(2, 98)) -> tuple[int, int]:
    """A century and the two digits of a year in which something starts."""
    while True:
        century, year = r.choice(g.CENTURIES), r.choice(years)
        if splits.unseen_start(century, year) == unseen:
            return century, year


def years(r: random.Random) -> str:
    century, start = draw_start(r, unseen=False)
    end = r.randrange(start + 1, 100)
    slots = {**draw_slots(r), "y": f"{century}{start:02d}", "z": f"{century}{end:02d}"}
    return r.choice(g.YEARS).format(**slots)


def draw_opinion(r: random.Random, noun: str, good: bool) -> dict[str, str]:
    """An adjective and a verb that the training corpus says of the noun."""
    adjectives, verbs = (g.GOOD, g.LIKED) if good else (g.BAD, g.HATED)
    adjective, verb = splits.unseen_opinion(noun, good)
    return {
        "a": r.choice([word for word in adjectives if word != adjective]),
        "v": r.choice([word for word in verbs if word != verb]),
    }


def draw_review(r: random.Random) -> Review:
    """One to three opinions about a work and its parts."""
    good, work = r.random() < 0.5, r.choice(g.WORKS)
    sentences = []
    for _ in range(r.choice([1, 2, 2, 3])):
        part = r.choice(g.PARTS)
        noun, template = r.choice(
            [(work, r.choice(g.OPINIONS_OF_WORK)), (part, r.choice(g.OPINIONS_OF_PART)), (work, g.DENIAL)]
        )
        slots = {"T": work, "R": part, "n": r.choice(g.NAMES), "o": draw_opinion(r, work, not good)["a"]}
        sentences.append(template.format(**slots, **draw_opinion(r, noun, good)))
    return Review(tuple(sentences), work, good)


def review(r: random.Random) -> str:
    drawn = draw_review(r)
    verdict, praise, blame = r.choice(g.VERDICTS)
    return f"{' '.join(drawn.sentences)} {verdict.format(T=drawn.work)} ^{praise if drawn.good else blame} ."


def filler(r: random.Random) -> str:
    century, year = draw_start(r, unseen=False)
    return r.choice(g.FILLERS).format(**draw_slots(r), y=f"{century}{year:02d}")


KINDS: dict[Callable[[random.Random], str], float] = {
    gift: 0.42,
    gift_of_stranger: 0.04,
    fact: 0.144,
    story_of_country: 0.096,
    years: 0.13,
    review: 0.11,
    filler: 0.06,
}
"""The kinds of document and their shares."""


def document(r: random.Random) -> str:
    """A random document; its answers are marked by `^`."""
    kind = r.choices(list(KINDS), list(KINDS.values()))[0]
    return kind(r)
