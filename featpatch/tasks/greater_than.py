"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): completing a year later than the one mentioned."""

from collections.abc import Sequence
from functools import partial
from random import Random

from featpatch.errors import FeatpatchError
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import AnswerTokens, Tokenizer, bare_ids
from featpatch.tasks.template import Draft, check_templates, chosen, draft, draw

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
    """Make `n` pairs that ask for a year later than the one named (Hanna et al. 2023, arXiv 2305.00586).

    Later years of the century than the one named are right, that year and earlier ones are wrong.

    Labels: start_year (its last two digits) and end. Meant for the metric `"prob_diff"`.

    If the tokenizer makes a token of every digit, the answer is the third digit of the year: larger digits than that of the
    year named are right, smaller ones wrong, and the same digit is neither. Then start_year is that digit, in which the clean
    and the corrupted year always differ.

    Args:
        tokenizer: the model or its tokenizer, as in `Pairs.from_prompts`.
        n: the number of pairs.
        seed: the seed of the random draw.
        corruptions: one or both of `"early_year"`: the year 01 of the century, after which nearly every year is right, and
            `"other_year"`: an earlier year.
        templates: texts with the slots {event}, {century}, {start_year} and {again}, the century once more.

    Raises:
        FeatpatchError: a corruption is unknown, too few pairs fit the tokenizer, or the tokenizer makes a token neither of the
            last two digits of a year nor of every digit.

    Examples:
        >>> pairs = fp.tasks.greater_than(model, 4)
        >>> layers = fp.rank_components(model, pairs, sites="resid_pre", metric="prob_diff", progress=False)
        >>> sorted(pairs[0].labels), layers.metrics
        (['end', 'start_year'], ['prob_diff'])
    """
    kinds = chosen(corruptions, CORRUPTIONS)
    check_templates(templates, ("event", "century", "start_year", "again"), ("start_year",))
    if _digits(tokenizer) == 1:
        return draw(tokenizer, partial(_by_digit, kinds=kinds, templates=templates), n=n, seed=seed)

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


def _digits(tokenizer: Tokenizer) -> int:
    """Return how many digits follow the first two of a year as one token: two or one."""
    after = AnswerTokens(tokenizer, "from 1732 to 17")
    for size in (2, 1):
        if any(after.next_token(year[:size]) is not None for year in ("45", "58", "63")):
            return size
    raise FeatpatchError(
        "the tokenizer splits '1745' into neither pairs of digits nor single digits (the ids of 'to 1745' are "
        f"{list(bare_ids(tokenizer, 'to 1745'))}): expected its last two digits to be one token, or each digit to be one; use "
        "another task, or make your own pairs with Pairs.from_prompts"
    )


def _by_digit(random: Random, *, kinds: Sequence[str], templates: Sequence[str]) -> Draft:
    template, kind = random.randrange(len(templates)), random.choice(kinds)
    tens, century = random.randrange(1, 9), str(random.choice(CENTURIES))
    other = f"{1 if kind == 'early_year' else random.randrange(2, 10 * tens):02}"
    shared = {"event": random.choice(EVENTS), "century": century, "again": century}
    return draft(
        templates[template].replace("{start_year}", "{start_year}{unit}"),
        {**shared, "start_year": str(tens), "unit": str(random.randrange(10))},
        {**shared, "start_year": other[0], "unit": other[1]},
        correct=[str(digit) for digit in range(tens + 1, 10)],
        wrong=[str(digit) for digit in range(tens)],
        labels=("start_year",),
        tags={"task": "greater_than", "template": str(template), "corruption": kind},
        glued=True,
    )
