"""Questions about what was held out of training: a prompt and the word that must follow."""

import random
from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

from . import grammar as g
from . import splits
from .corpus import Gift, draw_gift, draw_slots, draw_start
from .vocabulary import encode, vocabulary


@dataclass(frozen=True)
class Question:
    """A prompt and its right next word."""

    prompt: str
    answer: str


def _about(gift: Gift) -> Question:
    return Question(gift.text, gift.receiver)


def gift_questions(n: int, seed: str) -> dict[str, list[Question]]:
    """Who receives the gift: unseen pairs of names with and without a rival pair, unseen frames."""
    r = random.Random(seed)
    return {
        "IOI, unseen pair": [_about(draw_gift(r, unseen_pair=True, rival=0)) for _ in range(n)],
        "IOI, unseen pair, rival pair": [_about(draw_gift(r, unseen_pair=True, rival=1)) for _ in range(n)],
        "IOI, unseen template": [_about(draw_gift(r, unseen_frame=True)) for _ in range(n)],
    }


def fact_frames(relation: str, country: str) -> list[str]:
    """The two templates that never tell this fact in training, up to the answer: a sentence and a story."""
    sentence = g.FACTS[relation][splits.unseen_fact(relation, country)]
    story = f"{g.STORIES[splits.unseen_story(relation, country)]} {g.STORY_FACTS[relation]}"
    return [frame.split("{x}")[0].rstrip("^ ") for frame in (sentence, story)]


def fact_questions(seed: str) -> dict[str, list[Question]]:
    """Every fact in the sentence and in the story that never told it."""
    r = random.Random(seed)
    return {
        f"Facts, {relation}": [
            Question(frame.format(**{**draw_slots(r), "c": row[0]}), row[column])
            for row in g.COUNTRIES
            for frame in fact_frames(relation, row[0])
        ]
        for relation, column in g.RELATIONS.items()
    }


def unseen_sentence(r: random.Random, noun: str, good: bool, template: str) -> str:
    """An opinion in words that training never said of the noun."""
    adjective, verb = splits.unseen_opinion(noun, good)
    return template.format(T=noun, R=noun, n=r.choice(g.NAMES), a=adjective, v=verb)


def review_questions(n: int, seed: str) -> dict[str, list[Question]]:
    """Reviews in which every opinion is new to its noun."""
    r = random.Random(seed)
    questions = []
    for _ in range(n):
        good, work, part = r.random() < 0.5, r.choice(g.WORKS), r.choice(g.PARTS)
        told = [(work, r.choice(g.OPINIONS_OF_WORK)), (part, r.choice(g.OPINIONS_OF_PART))]
        sentences = [unseen_sentence(r, noun, good, template) for noun, template in r.sample(told, r.choice([1, 2]))]
        verdict, praise, blame = r.choice(g.VERDICTS)
        prompt = f"{' '.join(sentences)} {verdict.format(T=work)}"
        questions.append(Question(prompt, praise if good else blame))
    return {"Reviews": questions}


def year_frame(r: random.Random, century: int, start: int, template: str) -> str:
    """A sentence about an unseen start year, up to the century of the end."""
    text = template.split("^{z}")[0] + "{z}"
    return text.format(**{**draw_slots(r), "y": f"{century}{start:02d}", "z": str(century)})


def year_questions(n: int, seed: str) -> tuple[list[str], list[int]]:
    """Prompts about unseen start years, and the start years."""
    r = random.Random(seed)
    starts = [draw_start(r, unseen=True, years=range(5, 95)) for _ in range(n)]
    return [year_frame(r, *start, r.choice(g.YEARS)) for start in starts], [year for _, year in starts]


@torch.no_grad()
def last_logits(model: GPT2LMHeadModel, prompts: list[str], batch: int = 128) -> torch.Tensor:
    """Logits of the word after each prompt [prompts, words]."""
    found = []
    for k in range(0, len(prompts), batch):
        ids = [encode(prompt) for prompt in prompts[k : k + batch]]
        last = torch.tensor([len(row) - 1 for row in ids])
        x = torch.tensor([row + [0] * (int(last.max()) + 1 - len(row)) for row in ids])
        mask = torch.arange(x.shape[1]) <= last[:, None]
        found.append(model(input_ids=x, attention_mask=mask.long()).logits[torch.arange(len(x)), last])
    return torch.cat(found)


def answer_questions(model: GPT2LMHeadModel, n: int = 1000, seed: str = "questions") -> dict[str, float]:
    """Share of right answers by task; for years the probability above minus at or below the start year."""
    questions = {**gift_questions(n, seed), **fact_questions(seed), **review_questions(n, seed)}
    words = vocabulary()
    scores = {}
    for task, asked in questions.items():
        found = last_logits(model, [question.prompt for question in asked]).argmax(-1)
        right = torch.tensor([words[question.answer] for question in asked])
        scores[task] = (found == right).float().mean().item()
    prompts, starts = year_questions(n, seed)
    year_ids = torch.tensor([words[f"{year:02d}"] for year in range(100)])
    chance = last_logits(model, prompts).softmax(-1)[:, year_ids]
    above = torch.arange(100) > torch.tensor(starts)[:, None]
    scores["Years, above minus below"] = ((chance * above).sum(-1) - (chance * ~above).sum(-1)).mean().item()
    return {task: round(score, 4) for task, score in scores.items()}
