"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): a later year than the one that was named."""

from collections.abc import Sequence
from random import Random

from featpatch.drafts import Draft, chosen, draft, draw
from featpatch.pairs import Pairs
from featpatch.pairs.tokens import Tokenizer

EVENTS = ("war", "trial", "reign", "voyage", "project", "strike", "festival", "siege", "rebellion", "journey")
TEMPLATES = (
    "The {event} lasted from the year {century}{start_year} to the year {again}",
    "The {event} lasted from {century}{start_year} to {again}",
    "The {event} began in {century}{start_year} and ended in {again}",
)
CENTURIES = range(11, 20)
YEARS = range(2, 98)
CORRUPTIONS = ("early_year", "other_year")


def greater_than(
    tokenizer: Tokenizer,
    n: int = 32,
    *,
    seed: int = 0,
    corruptions: str | Sequence[str] = "early_year",
    templates: Sequence[str] = TEMPLATES,
) -> Pairs:
    """`n` pairs; right are the years of the century after the one named, wrong that one and those before.

    Labels: start_year (its last two digits) and end. Meant for the metric `"prob_diff"`.

    Args:
        corruptions: one or both of `"early_year"`: the year 01 of the century, after which nearly every year is right, and
            `"other_year"`: an earlier year.
        templates: with slots {event}, {century}, {start_year} and {again}, the century once more.

    Raises:
        FeatpatchError: an unknown corruption, or too few pairs that fit the tokenizer (which must keep the last two digits
            of a year apart).
    """
    kinds = chosen(corruptions, CORRUPTIONS, "corruption")

    def make(random: Random) -> Draft:
        template, kind = random.randrange(len(templates)), random.choice(kinds)
        year, century = random.choice(YEARS[1:]), str(random.choice(CENTURIES))
        other = 1 if kind == "early_year" else random.randrange(2, year)
        shared = {"event": random.choice(EVENTS), "century": century, "again": century}
        return draft(
            templates[template],
            {**shared, "start_year": f"{year:02}"},
            {**shared, "start_year": f"{other:02}"},
            correct=[f"{y:02}" for y in range(year + 1, 100)],
            wrong=[f"{y:02}" for y in range(year + 1)],
            labels=("start_year",),
            tags={"task": "greater_than", "template": str(template), "corruption": kind},
            glued=True,
        )

    return draw(tokenizer, make, n=n, seed=seed)
