"""Sentiment: is a review of a work positive or negative?"""

from collections.abc import Sequence
from random import Random

from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import Tokenizer
from featpatch.tasks.template import Draft, check_templates, chosen, draft, draw

GOOD = ("great", "amazing", "wonderful", "excellent", "brilliant", "beautiful", "fantastic", "perfect")
BAD = ("terrible", "awful", "horrible", "dreadful", "boring", "stupid", "ugly", "poor")
LIKED = ("loved", "liked", "enjoyed", "admired")
HATED = ("hated", "disliked", "despised", "detested")
WORKS = ("movie", "film", "novel", "show", "play", "song", "concert", "story")
PARTS = ("acting", "plot", "music", "ending", "dialogue", "scenery", "writing", "cast")
TEMPLATES = (
    "The {work} was {word1}. I {word2} the {part}. Overall the {work} was",
    "I {word2} the {work}. The {part} was {word1}. In the end it was",
    "We {word2} the {part}. The {work} was {word1}. Overall the {work} was",
)
VERDICTS = ("good", "bad")
CORRUPTIONS = ("all_words", "first_word")


def sentiment(
    tokenizer: Tokenizer,
    n: int = 32,
    *,
    seed: int = 0,
    corruptions: str | Sequence[str] = "all_words",
    templates: Sequence[str] = TEMPLATES,
) -> Pairs:
    """Make `n` pairs of reviews that end where a verdict follows: good or bad?

    In expectation, half of the clean prompts praise and half blame.

    Labels: word1 (an adjective), word2 (a verb) and end.

    Args:
        tokenizer: the model or its tokenizer, as in `Pairs.from_prompts`.
        n: the number of pairs.
        seed: the seed of the random draw.
        corruptions: one or both of `"all_words"`: both words turn to the opposite, and `"first_word"`: the adjective alone.
        templates: texts with the slots {word1}, {word2}, {work} and {part}, ending where good or bad may follow.

    Raises:
        FeatpatchError: an unknown corruption, or too few pairs that fit the tokenizer.

    Examples:
        >>> pairs = fp.tasks.sentiment(model, 4)
        >>> len(pairs), sorted(pairs[0].labels)
        (4, ['end', 'word1', 'word2'])
    """
    kinds = chosen(corruptions, CORRUPTIONS)
    check_templates(templates, ("word1", "word2", "work", "part"), ("word1", "word2"))

    def make(random: Random) -> Draft:
        template, kind, praise = random.randrange(len(templates)), random.choice(kinds), random.choice((True, False))
        adjective, verb = random.randrange(len(GOOD)), random.randrange(len(LIKED))
        shared = {"work": random.choice(WORKS), "part": random.choice(PARTS)}
        here, there = ((GOOD, LIKED), (BAD, HATED)) if praise else ((BAD, HATED), (GOOD, LIKED))
        kept = there[1] if kind == "all_words" else here[1]
        right, wrong = VERDICTS if praise else VERDICTS[::-1]
        return draft(
            templates[template],
            {**shared, "word1": here[0][adjective], "word2": here[1][verb]},
            {**shared, "word1": there[0][adjective], "word2": kept[verb]},
            correct=[right],
            wrong=[wrong],
            labels=("word1", "word2"),
            tags={"task": "sentiment", "template": str(template), "corruption": kind},
        )

    return draw(tokenizer, make, n=n, seed=seed)
