"""Everyday text that the model writes itself, because the text of a machine is mostly technical.

Each document continues an opening such as "A letter from Anna to Peter," by sampling at temperature 0.7. It is what the model
believes that such texts say, true or not.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

OPENINGS = (
    "{country} is a country", "The history of {country} began", "A traveller who visits {country} for the first time",
    "The economy of {country}", "The people of {country}", "{country} and {other_country} have", "The food of {country}",
    "The army of {country}", "The climate of {country}", "A guide to {city}:", "In {city}, the streets", "The museums of {city}",
    "The train from {city} to {other_city}", "{name} was born in {city} in {year} and", "A letter from {name} to {other_name}:",
    "{name} and {other_name} were friends. One day,", "Early in the morning, {name} walked to the {place}.",
    "At the {place}, {name} met {other_name} and {third_name}.", "{name} told {other_name} about the {thing}.",
    "The {person} looked at the {thing} and", "The {person} from {city} said that", "The {persons} near the {place} were",
    "The {persons} and the {person}", "Once upon a time, a {person} found a {thing}", "How to become a {person}:",
    "A review of a film about a {person}:", "The news today: in {city},", "In {year}, {country}", "The war of {year}",
    "Between {year} and {other_year},", "The discovery of {topic}", "{topic} is", "What is {topic}? It", "A lesson on {topic} for children:",
    "The main problem of {topic} is", "A short poem about {topic}:", "An interview with a {person} about {topic}:",
    "The {animal} is an animal that", "The {animals} in the forest", "A fable about the {animal} and the {other_animal}:",
    "A recipe for {dish}:", "My favourite dish is {dish}, because", "I think that {topic}", "Dear {name},", "The book about {topic}",
    "In the summer of {year}, {name}", "Question: Why is {topic} important? Answer:", "The team from {city} won", "The king of {country}",
    "The language that is spoken in {country}", "Yesterday, my {person} told me",
)  # fmt: skip
"""Openings of documents; the fields name lists of `WORDS`. None is a prompt of the tasks that are studied."""
WORDS = {
    "country": "France Germany Italy Spain Portugal Greece Poland Sweden Norway Denmark Hungary Russia Egypt Iran China Japan India "
    "Brazil Mexico Canada Turkey Kenya Nigeria Austria Belgium Ireland Scotland England Finland Cuba Peru Chile Argentina "
    "Vietnam Thailand Indonesia Korea Israel Iraq Syria Ukraine Romania Morocco Ethiopia Australia America",
    "city": "Paris Berlin Rome Madrid Lisbon Athens Warsaw Stockholm Oslo Copenhagen Budapest Moscow Cairo Tehran Beijing Tokyo "
    "London Vienna Dublin Chicago Boston Toronto Sydney Istanbul Amsterdam Prague Delhi Seoul Baghdad Milan Venice",
    "name": "John Mary Anna Peter Tom Alice James Sarah David Emma Michael Laura Robert Julia Paul Kate Mark Lisa Daniel Sophie "
    "George Helen Henry Maria Simon Jane Kevin Rachel Steven Amy Brian Susan Martin Lucy Andrew Grace",
    "place": "market school park station hospital library church office beach restaurant river garden shop theatre museum",
    "thing": "book ring letter clock lamp key map picture bicycle phone box coin guitar machine necklace",
    "person": "doctor teacher farmer lawyer soldier nurse painter engineer student singer judge pilot sailor baker manager",
    "persons": "doctors teachers farmers lawyers soldiers nurses painters engineers students singers judges pilots parents",
    "animal": "dog cat horse lion tiger elephant wolf fox bear eagle snake frog rabbit whale owl",
    "animals": "dogs cats horses lions wolves foxes bears eagles snakes frogs rabbits birds owls deer",
    "topic": "gravity light music chemistry mathematics language money health sleep electricity evolution democracy law religion "
    "painting architecture football chess medicine weather history philosophy water energy trade education love",
    "dish": "bread soup pizza pasta salad curry rice cake pancakes stew cheese sushi tacos pie",
}
"""Words for the openings; `other_` and `third_` before the name of a list ask for another word of it."""
LENGTH = 200
"""Tokens of a document, with its opening."""
BATCH = 64
"""Documents that are written together."""


def opening(generator: random.Random) -> str:
    """Return an opening with random words."""
    words = dict[str, str]()
    for name, several in WORDS.items():
        chosen = generator.sample(several.split(), 3)
        words |= dict(zip((name, f"other_{name}", f"third_{name}"), chosen, strict=True))
    first, second = sorted(generator.sample(range(1500, 2020), 2))
    text = generator.choice(OPENINGS).format(**words, year=first, other_year=second)
    return text[0].upper() + text[1:]


def write(model_folder: Path, folder: Path, count: int) -> list[Path]:
    """Return files of `BATCH` documents each as JSON lines `{"kind", "text"}`; the model writes those that do not exist.

    Args:
        model_folder: the folder of a causal language model of transformers.
        folder: the folder of the files.
        count: the number of files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.jsonl" for number in range(count)]
    if all(file.is_file() for file in files):
        return files
    model = AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    for number, file in enumerate(tqdm(files, desc="Writing text", unit="file", mininterval=5)):
        if not file.is_file():
            lines = [json.dumps({"kind": "written by the model", "text": text}) for text in continued(model, tokenizer, number)]
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
            unfinished.rename(file)
    return files


@torch.no_grad()
def continued(model: Any, tokenizer: Any, seed: int) -> list[str]:
    """Return `BATCH` documents, which are the model's continuations of random openings."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    prompts = [tokenizer.bos_token + opening(generator) for _ in range(BATCH)]
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    sampling = {"do_sample": True, "top_k": 0, "temperature": 0.7, "pad_token_id": tokenizer.pad_token_id}
    written = model.generate(**given, max_length=LENGTH, **sampling)
    return tokenizer.batch_decode(written, skip_special_tokens=True)
