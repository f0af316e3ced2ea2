"""Words to numbers: the tokenizer, and packed rows of the corpus."""

import random
import re
from functools import cache

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from . import grammar as g
from .corpus import capitalise, document

WORD = r"<\w+>|[A-Za-z][A-Za-z\-']*|\d\d|[.,?!]"
"""A word; the four digits of a year are two words, the century and the year in it."""
SPECIAL = ["<pad>", "<bos>", "<unk>"]
MAX_LENGTH = 64


def split(text: str) -> list[str]:
    """The words of a text; the mark `^` stays on an answer, on both halves of a year."""
    return re.findall(rf"\^?(?:{WORD})", re.sub(r"\^(\d\d)(\d\d)", r"^\1^\2", text))


@cache
def vocabulary() -> dict[str, int]:
    """Every word that the grammar can produce, with its number."""
    lists = [g.NAMES, g.PLACES, g.OBJECTS, g.DAYS, g.LOOKS, g.EVENTS, g.LENGTHS, g.QUALITIES, *g.COUNTRIES]
    lists += [g.GOOD, g.BAD, g.LIKED, g.HATED, g.WORKS, g.PARTS]
    facts = [template for templates in g.FACTS.values() for template in templates]
    templates = [*g.PAIRS, *g.MIDDLES, *g.GIFTS, *g.ENDINGS, *facts, *g.STORIES]
    templates += [*g.STORY_FACTS.values(), *g.YEARS, *g.OPINIONS_OF_WORK, *g.OPINIONS_OF_PART, g.DENIAL, *g.FILLERS]
    templates += [" ".join(verdict) for verdict in g.VERDICTS]
    templates += [capitalise(template) for template in g.MIDDLES + g.GIFTS]
    plain = [re.sub(r"\^?\{\w\}", " ", template) for template in templates]
    words = [word for text in [*map(" ".join, lists), *plain] for word in split(text)]
    return {word: k for k, word in enumerate(SPECIAL + [f"{n:02d}" for n in range(100)] + list(dict.fromkeys(words)))}


def tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with one token per word, which puts <bos> first."""
    words = vocabulary()
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<bos>", pad_token="<pad>", unk_token="<unk>",
        add_bos_token=True, padding_side="left", model_max_length=MAX_LENGTH,
    )  # fmt: skip


def encode(text: str) -> list[int]:
    """Token ids of a text without marks, <bos> first."""
    words = vocabulary()
    return [words["<bos>"]] + [words[word] for word in split(text)]


def rows(r: random.Random, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents packed into rows: token ids [n, length], and where the answers are, of the same shape."""
    words = vocabulary()
    ids, answers = [], []
    for _ in range(n):
        row = ["<bos>"]
        while len(row) < length:
            row += split(document(r))
        ids.append([words[word.lstrip("^")] for word in row[:length]])
        answers.append([word[0] == "^" for word in row[:length]])
    return torch.tensor(ids), torch.tensor(answers)
