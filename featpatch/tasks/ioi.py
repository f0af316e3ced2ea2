"""Indirect-object identification (Wang et al. 2022, arXiv 2211.00593): which of two people is given something?"""

from collections.abc import Sequence
from random import Random

from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import Tokenizer
from featpatch.tasks.template import Draft, check_templates, chosen, draft, draw, usable

NAMES = (
    "John", "James", "Tom", "Mark", "Paul", "Jack", "Adam", "Peter", "David", "Simon", "Henry", "Luke", "Mary", "Anna", "Lucy",
    "Emma", "Kate", "Jane", "Alice", "Sarah", "Laura", "Helen", "Julia", "Grace", "Michael", "Robert", "Daniel", "Steven",
    "Kevin", "Jason", "Jessica", "Amy", "Rachel", "Michelle", "Lisa", "Andrew", "Brian", "Richard", "George", "Anthony",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "office", "garden", "market", "station", "library", "museum", "hospital", "restaurant", "bank",
)  # fmt: skip
OBJECTS = ("book", "drink", "ball", "ring", "letter", "key", "cake", "basket", "phone", "watch", "hat", "coat")
TEMPLATES = (
    "When {IO} and {S1} went to the {place}, {S2} gave a {object} to",
    "When {S1} and {IO} went to the {place}, {S2} gave a {object} to",
    "While {IO} and {S1} were working at the {place}, {S2} handed the new {object} to",
    "While {S1} and {IO} were working at the {place}, {S2} passed a {object} to",
    "Then {IO} and {S1} went to the {place}. Later {S2} gave the {object} to",
    "Then {S1} and {IO} went to the {place}. Later {S2} offered the {object} to",
    "The other day {IO} and {S1} met at the {place}. Then {S2} showed the {object} to",
    "The other day {S1} and {IO} met at the {place}. Then {S2} sold the {object} to",
)
CORRUPTIONS = ("swap_s2", "swap_names", "fresh_names")


def ioi(
    tokenizer: Tokenizer,
    n: int = 32,
    *,
    seed: int = 0,
    corruptions: str | Sequence[str] = "swap_s2",
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = NAMES,
) -> Pairs:
    """Make `n` pairs of indirect-object identification: which of two people is given something?

    The clean prompt names the receiver IO once and the giver S twice (Wang et al. 2022, arXiv 2211.00593).

    Labels: IO, S1, S2 and end.

    Args:
        tokenizer: the model or its tokenizer, as in `Pairs.from_prompts`.
        n: the number of pairs.
        seed: the seed of the random draw.
        corruptions: one or several of `"swap_s2"`: the giver of the second clause becomes IO, so that S receives;
            `"swap_names"`: both people change places everywhere; `"fresh_names"`: three other people, so that neither
            answer occurs in the corrupted prompt (ABC).
        templates: texts with the slots {IO}, {S1}, {S2}, {place} and {object}.
        names: the names to draw people from; at least five must be single tokens.

    Raises:
        FeatpatchError: an unknown corruption, or too few pairs that fit the tokenizer.

    Examples:
        >>> pairs = fp.tasks.ioi(model, 4, corruptions=["swap_s2", "swap_names"])
        >>> len(pairs), sorted(pairs[0].labels)
        (4, ['IO', 'S1', 'S2', 'end'])
    """
    kinds = chosen(corruptions, CORRUPTIONS)
    check_templates(templates, ("IO", "S1", "S2", "place", "object"), ("IO", "S1", "S2"))
    people, places, objects = (usable(tokenizer, words, least) for words, least in ((names, 5), (PLACES, 1), (OBJECTS, 1)))

    def make(random: Random) -> Draft:
        template, kind = random.randrange(len(templates)), random.choice(kinds)
        io, s, a, b, c = random.sample(people, 5)
        shared = {"place": random.choice(places), "object": random.choice(objects)}
        others = {"swap_s2": (io, s, io), "swap_names": (s, io, io), "fresh_names": (a, b, c)}[kind]
        corrupted = dict(zip(("IO", "S1", "S2"), others, strict=True))
        return draft(
            templates[template],
            {"IO": io, "S1": s, "S2": s, **shared},
            {**corrupted, **shared},
            correct=[io],
            wrong=[s],
            labels=("IO", "S1", "S2"),
            tags={"task": "ioi", "template": str(template), "corruption": kind},
        )

    return draw(tokenizer, make, n=n, seed=seed)
