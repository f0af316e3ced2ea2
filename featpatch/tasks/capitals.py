"""Facts about countries: what is the capital, or the language, of a country?"""

from collections.abc import Sequence
from random import Random

from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import Tokenizer
from featpatch.tasks.template import Draft, check_templates, chosen, draft, draw

COUNTRIES = tuple(
    tuple(row.split())
    for row in """\
France Paris French
Germany Berlin German
Italy Rome Italian
Spain Madrid Spanish
Portugal Lisbon Portuguese
Greece Athens Greek
Poland Warsaw Polish
Sweden Stockholm Swedish
Norway Oslo Norwegian
Denmark Copenhagen Danish
Hungary Budapest Hungarian
England London English
Russia Moscow Russian
Turkey Ankara Turkish
Egypt Cairo Arabic
Iran Tehran Persian
India Delhi Hindi
China Beijing Chinese
Japan Tokyo Japanese
Thailand Bangkok Thai
Cuba Havana Spanish
Canada Ottawa English
Kenya Nairobi Swahili""".splitlines()
)
RELATIONS = {"capital": 1, "language": 2}
TEMPLATES = (
    "The {relation} of {subject} is",
    "In {subject} the {relation} is",
    "Here is a short story about {subject}. The {relation} there is",
    "Here is a famous story about {subject}. The {relation} there is",
)
CORRUPTIONS = ("other_country", "other_relation")


def capitals(
    tokenizer: Tokenizer,
    n: int = 32,
    *,
    seed: int = 0,
    corruptions: str | Sequence[str] = "other_country",
    templates: Sequence[str] = TEMPLATES,
) -> Pairs:
    """Make `n` pairs that ask for the capital of a country.

    Labels: subject, relation and end.

    Args:
        tokenizer: the model or its tokenizer, as in `Pairs.from_prompts`.
        n: the number of pairs.
        seed: the seed of the random draw.
        corruptions: one or both of `"other_country"`, whose capital is the wrong answer, and `"other_relation"`, which asks
            for the language of the same country.
        templates: texts with the slots {subject} and {relation}.

    Raises:
        FeatpatchError: an unknown corruption, or too few pairs that fit the tokenizer.

    Examples:
        >>> pairs = fp.tasks.capitals(model, 4)
        >>> len(pairs), sorted(pairs[0].labels)
        (4, ['end', 'relation', 'subject'])
    """
    kinds = chosen(corruptions, CORRUPTIONS)
    check_templates(templates, ("subject", "relation"), ("subject", "relation"))

    def make(random: Random) -> Draft:
        template, kind = random.randrange(len(templates)), random.choice(kinds)
        here, there = random.sample(COUNTRIES, 2)
        changed = {"other_country": (there, "capital"), "other_relation": (here, "language")}
        country, relation = changed[kind]
        return draft(
            templates[template],
            {"subject": here[0], "relation": "capital"},
            {"subject": country[0], "relation": relation},
            correct=[here[RELATIONS["capital"]]],
            wrong=[country[RELATIONS[relation]]],
            labels=("subject", "relation"),
            tags={"task": "capitals", "template": str(template), "corruption": kind},
        )

    return draw(tokenizer, make, n=n, seed=seed)
