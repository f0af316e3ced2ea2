"""Every task, for tokenizers that split words in different ways."""

from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import featpatch as fp
from featpatch.pairs.labels import token_at
from featpatch.tasks.template import Draft, fill, pair_of

MODULES = {name: import_module(f"featpatch.tasks.{name}") for name in fp.tasks.TASKS}
SHIPPED = ("capitals", "greater_than", "ioi", "sentiment")
"""Tasks whose words the shipped tokenizer knows."""


def texts(value: Any) -> Iterator[str]:
    """Every text in tuples and dictionaries within one another."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, dict)):
        for part in value:
            yield from texts(part)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word after it; no BOS."""
    constants = [value for module in MODULES.values() for name, value in vars(module).items() if name.isupper()]
    text = [f"x {word} x" for value in constants for word in texts(value)] * 20
    text += [template for module in MODULES.values() for template in module.TEMPLATES] * 20
    text += [f"{number:02}" for number in range(100)] * 20
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module", params=["words", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return fp.load_demo().model.tokenizer if request.param == "words" else byte_level()


def drawn(tokenizer: Any, name: str, n: int = 24, **options: Any) -> fp.Pairs:
    if tokenizer.unk_token is not None and name not in SHIPPED:
        pytest.skip("the shipped tokenizer knows the words of the shipped tasks alone")
    module = MODULES[name]
    return getattr(fp.tasks, name)(tokenizer, n, corruptions=module.CORRUPTIONS, **options)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "greater_than"])
def test_pairs_are_what_they_say(tokenizer: Any, name: str) -> None:
    pairs = drawn(tokenizer, name)
    assert len({(pair.clean, pair.corrupted) for pair in pairs}) == 24
    for pair in pairs:
        text = tokenizer.decode(pair.clean, skip_special_tokens=True)
        longer = tokenizer(tokenizer.decode([*pair.clean, pair.correct[0]], skip_special_tokens=True)).input_ids
        assert tuple(longer) == (*pair.clean, *pair.correct), text
        assert pair.labels["end"] == len(pair) - 1
        assert pair.tags["task"] == name
    for column, values in (
        ("corruption", MODULES[name].CORRUPTIONS),
        ("template", map(str, range(len(MODULES[name].TEMPLATES)))),
    ):
        seen = Counter(pair.tags[column] for pair in pairs)
        assert set(seen) <= set(values)
        assert len(seen) > 1


def test_indirect_objects(tokenizer: Any) -> None:
    for pair in drawn(tokenizer, "ioi"):
        io, s1, s2 = ([tokenizer.decode([run[pair.labels[label]]]).strip() for run in (pair.clean, pair.corrupted)]
                      for label in ("IO", "S1", "S2"))  # fmt: skip
        right, wrong = tokenizer.decode(pair.correct).strip(), tokenizer.decode(pair.wrong).strip()
        assert (io[0], s1[0], s2[0]) == (right, wrong, wrong)
        assert {
            "swap_s2": (io[1], s1[1], s2[1]) == (right, wrong, right),
            "swap_names": (io[1], s1[1], s2[1]) == (wrong, right, right),
            "fresh_names": not {io[1], s1[1], s2[1]} & {right, wrong} and len({io[1], s1[1], s2[1]}) == 3,
        }[pair.tags["corruption"]]


def test_capitals(tokenizer: Any) -> None:
    facts = {row[0]: row for row in MODULES["capitals"].COUNTRIES}
    for pair in drawn(tokenizer, "capitals"):
        here, there = (tokenizer.decode([run[pair.labels["subject"]]]).strip() for run in (pair.clean, pair.corrupted))
        right, wrong = tokenizer.decode(pair.correct).strip(), tokenizer.decode(pair.wrong).strip()
        assert right == facts[here][1]
        assert wrong == (facts[there][1] if pair.tags["corruption"] == "other_country" else facts[here][2])


def test_years(tokenizer: Any) -> None:
    """All later years of the century are right, the year itself and all before are wrong."""
    for pair in drawn(tokenizer, "greater_than"):
        year = int(tokenizer.decode([pair.clean[pair.labels["start_year"]]]))
        assert sorted(int(tokenizer.decode([token])) for token in pair.correct) == list(range(year + 1, 100))
        assert sorted(int(tokenizer.decode([token])) for token in pair.wrong) == list(range(year + 1))
        other = int(tokenizer.decode([pair.corrupted[pair.labels["start_year"]]]))
        assert other == 1 if pair.tags["corruption"] == "early_year" else 1 < other < year


@pytest.mark.parametrize("name", MODULES)
def test_the_seed_decides(tokenizer: Any, name: str) -> None:
    assert drawn(tokenizer, name, 8, seed=3) == drawn(tokenizer, name, 8, seed=3)
    assert drawn(tokenizer, name, 8, seed=3) != drawn(tokenizer, name, 8, seed=4)


def test_a_tokenizer_as_a_function() -> None:
    """Labels are found by the tokens of the text up to a word where there are no offsets."""
    inner = fp.load_demo().model.tokenizer
    known = ("John", "Mary", "Anna", "Paul", "Kate", "Luke")
    plain = fp.tasks.ioi(inner, 8, names=known)
    by_function = fp.tasks.ioi(lambda text: inner(text).input_ids, 8, names=known)
    for one, other in zip(plain, by_function, strict=True):
        assert (one.clean, one.labels) == (other.clean, other.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": "swap"}, r"corruption swap: expected some of swap_s2, swap_names, fresh_names"),
        ({"n": 0}, "n=0: expected an integer, 1 or more"),
        ({"seed": -1}, "seed=-1: expected an integer, 0 or more"),
        ({"names": ["Xaver", "Ottilie"]}, "none of the words 'Xaver', 'Ottilie' is one token"),
        ({"templates": ["{IO} met {S1}. {S2} greets Zebulon and"]}, "none of the .* pairs that were tried fits this tokenizer"),
    ],
)
def test_what_can_not_be_drawn(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.tasks.ioi(fp.load_demo().model.tokenizer, **options)


@pytest.mark.parametrize("name", ["ioi", "capitals", "greater_than", "sentiment"])
def test_templates_that_are_none(name: str) -> None:
    task, tokenizer = getattr(fp.tasks, name), fp.load_demo().model.tokenizer
    for options, message in (
        ({"templates": []}, r"templates=\[\]: expected a list of at least one text"),
        ({"templates": "When {IO} met {S1}, {S2} saw"}, "templates='When .*: expected a list"),
        ({"templates": ["{IO!r}"]}, "template '{IO!r}' has {.*} 0 times"),
        ({"templates": ["Once upon a time"]}, "template 'Once upon a time' has {.*} 0 times: expected a text with {"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            task(tokenizer, 2, **options)


def test_a_slot_that_is_unknown() -> None:
    with pytest.raises(
        fp.FeatpatchError,
        match="has {name}: expected a text with {IO}, {S1}, {S2}, each once, and no slots but {IO}, .*{object}$",
    ):
        fp.tasks.ioi(fp.load_demo().model, 2, templates=["{name}, {IO} and {S1} left, {S2} waved at"])


def test_a_label_that_occurs_twice() -> None:
    with pytest.raises(fp.FeatpatchError, match="has {S2} 2 times: expected a text with {IO}, {S1}, {S2}, each once"):
        fp.tasks.ioi(fp.load_demo().model, 2, templates=["{S2}, {IO} and {S1} left, {S2} waved at"])


def test_labels_at_different_positions_make_no_pair() -> None:
    tokenizer = fp.load_demo().model.tokenizer
    texts = "John gave Mary a book and", "Mary gave John a book and"
    ends = {"same": ((4, 4), True), "moved": ((4, 14), False)}
    for positions, fits in ends.values():
        made = pair_of(tokenizer, Draft(*texts, ["Mary"], ["John"], {"name": positions}, {}))
        assert (made is not None) == fits


def test_every_character_is_in_its_token() -> None:
    """Against the words' own places."""
    tokenizer = fp.load_demo().model.tokenizer
    text = "John gave a book to Mary ."
    for position, word in enumerate(text.split(), start=1):
        start = f" {text} ".index(f" {word} ")
        for character in range(start, start + len(word)):
            assert token_at(tokenizer, text, character) == position, (word, character)
    for outside in (4, len(text)):
        with pytest.raises(fp.FeatpatchError, match=f"character {outside}"):
            token_at(tokenizer, text, outside)


def test_slots_end_where_their_words_end() -> None:
    text, ends = fill("When {A} met {B}, {A} left", {"A": "Ann", "B": "Bo"})
    assert text == "When Ann met Bo, Ann left"
    assert (text[: ends["A"]], text[: ends["B"]]) == ("When Ann met Bo, Ann", "When Ann met Bo")
