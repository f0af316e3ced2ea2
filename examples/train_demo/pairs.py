"""Prompt pairs for patching, one file per task, none of them from the training corpus."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import grammar as g
from . import splits
from .corpus import draw_gift, draw_slots, draw_start
from .questions import fact_frames, unseen_sentence, year_frame
from .vocabulary import encode, vocabulary

PAIRS_PER_TASK = 256


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupted prompt that differ in a few words.

    Attributes:
        clean, corrupted: prompts of equally many tokens.
        correct, wrong: the right and the wrong next word after the clean prompt, or several such words.
        labels: names of token positions, <bos> being position 0.
        tags: what the pair was made by; templates are named by their place in the lists of `grammar`.
    """

    clean: str
    corrupted: str
    correct: str | list[str]
    wrong: str | list[str]
    labels: dict[str, int]
    tags: dict[str, str]


def ioi(r: random.Random) -> PromptPair:
    """The other one of the pair gives. An unseen pair of names, always with a rival pair."""
    gift = draw_gift(r, unseen_pair=True, rival=1)
    before, after = gift.text.rsplit(gift.giver, 1)
    corrupted = f"{before}{gift.receiver}{after}"
    ids, words = encode(gift.text), vocabulary()
    s1, s2 = (place for place, token in enumerate(ids) if token == words[gift.giver])
    labels = {"IO": ids.index(words[gift.receiver]), "S1": s1, "S2": s2, "end": len(ids) - 1}
    template, giving = map(str, gift.frame)
    tags = {"task": "ioi", "template": template, "gift": giving, "order": gift.order, "corruption": "swap_s2"}
    return PromptPair(gift.text, corrupted, gift.receiver, gift.giver, labels, tags)


def capitals(r: random.Random) -> PromptPair:
    """Another country, in a template that tells neither country's capital in training."""
    while True:
        (one, capital, *_), (other, other_capital, *_) = r.sample(g.COUNTRIES, 2)
        kind = r.randrange(2)
        frame = fact_frames("capital", one)[kind]
        if frame == fact_frames("capital", other)[kind]:
            break
    slots = draw_slots(r)
    clean, corrupted = (frame.format(**{**slots, "c": country}) for country in (one, other))
    ids = encode(clean)
    labels = {"subject": ids.index(vocabulary()[one]), "end": len(ids) - 1}
    template = f"story_{splits.unseen_story('capital', one)}" if kind else f"sentence_{splits.unseen_fact('capital', one)}"
    tags = {"task": "capitals", "template": template, "corruption": "other_country"}
    return PromptPair(clean, corrupted, capital, other_capital, labels, tags)


def greater_than(r: random.Random) -> PromptPair:
    """A late start year against an early one of the same century; no training document starts in either."""
    while True:
        century, late = draw_start(r, unseen=True, years=range(50, 85))
        early = [year for year in range(5, 40) if splits.unseen_start(century, year)]
        if early:
            break
    start, template, seed = r.choice(early), r.choice(g.YEARS), r.random()
    clean, corrupted = (year_frame(random.Random(seed), century, year, template) for year in (late, start))
    years = [f"{year:02d}" for year in range(100)]
    ids, changed = encode(clean), _changed(clean, corrupted)
    return PromptPair(
        clean,
        corrupted,
        years[late + 1 :],
        years[: late + 1],
        {"start_year": changed[0], "end": len(ids) - 1},
        {"task": "greater_than", "template": str(g.YEARS.index(template)), "corruption": "other_year"},
    )


def sentiment(r: random.Random) -> PromptPair:
    """Praise against blame of a work and a part, in words that training never said of them."""
    work, part, seed, good = r.choice(g.WORKS), r.choice(g.PARTS), r.random(), r.random() < 0.5
    told = [(work, r.choice(g.OPINIONS_OF_WORK)), (part, r.choice(g.OPINIONS_OF_PART))]
    r.shuffle(told)
    verdict, praise, blame = r.choice(g.VERDICTS)

    def prompt(good: bool) -> str:
        names = random.Random(seed)
        opinions = [unseen_sentence(names, noun, good, template) for noun, template in told]
        return f"{' '.join(opinions)} {verdict.format(T=work)}"

    clean, corrupted = prompt(good), prompt(not good)
    first, second = _changed(clean, corrupted)
    labels = {"word1": first, "word2": second, "end": len(encode(clean)) - 1}
    answers = (praise, blame) if good else (blame, praise)
    template = str([asked for asked, *_ in g.VERDICTS].index(verdict))
    tags = {"task": "sentiment", "template": template, "verdict": "praise" if good else "blame", "corruption": "all_words"}
    return PromptPair(clean, corrupted, *answers, labels, tags)


def _changed(clean: str, corrupted: str) -> list[int]:
    """Token positions at which two prompts of equal length differ."""
    both = zip(encode(clean), encode(corrupted), strict=True)
    return [place for place, (one, other) in enumerate(both) if one != other]


TASKS: dict[str, Callable[[random.Random], PromptPair]] = {
    "ioi": ioi,
    "capitals": capitals,
    "greater_than": greater_than,
    "sentiment": sentiment,
}


def draw(task: str, n: int, seed: str) -> Iterator[PromptPair]:
    """`n` pairs of a task; no clean prompt comes twice, and no pair comes back with its sides exchanged."""
    r, drawn = random.Random(f"{seed} {task}"), dict[str, str]()
    while len(drawn) < n:
        pair = TASKS[task](r)
        if pair.clean not in drawn and drawn.get(pair.corrupted) != pair.clean:
            drawn[pair.clean] = pair.corrupted
            yield pair


def write(folder: Path) -> None:
    """Writes one JSON-lines file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps(asdict(pair)) for pair in draw(task, PAIRS_PER_TASK, "shipped pairs")]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
