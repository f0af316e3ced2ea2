"""What goes into pairs: answers behind their prompts, BOS, padding, spans, pairs without wrong answers."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import jaxtyping
import numpy as np
import oracle
import pytest
import torch
from small import Small
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import featpatch as fp
from featpatch.checkpoints import Demo
from featpatch.pairs.labels import after_special
from featpatch.pairs.tokens import PairsWarning, prompt_ids

SITE = "blocks.1.hook_resid_pre"
WORDS = [
    'The city is "Paris" and "Rome"',
    "Paris is big, Rome is big to Mary",
    "John gave a drink to Mary from 1732 to 1745",
    "Mary or Rome",
]


def trained(pre_tokenizer: Any, special: tuple[str, ...] = ("<unk>", "<s>"), **options: Any) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of a few words."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=list(special), show_progress=False)
    inner.train_from_iterator(WORDS * 60, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", **options)


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's: a space is part of the word after it, and the start of a text counts as one."""
    return trained(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]))


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space is part of the word after it."""
    return trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def whole_words() -> PreTrainedTokenizerFast:
    """Spaces are between tokens."""
    inner = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<unk>", "<s>", "to", "Mary", "John", "gave"])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer", "expected"),
    [
        (sentence_piece, 'is "', "Paris", "Paris"),
        (sentence_piece, "is", " Paris", "▁Paris"),
        (byte_level, "drink to", " Mary", "ĠMary"),
        (byte_level, "from 17", "3", "3"),
        (whole_words, "gave to", "Mary", "Mary"),
        (whole_words, "gave to", " Mary", "Mary"),
    ],
)
@pytest.mark.parametrize("long_answers", [False, True])
def test_answers_are_the_tokens_behind_the_prompt(
    tokenizer: Callable[[], Any], prompt: str, answer: str, expected: str, long_answers: bool
) -> None:
    made = tokenizer()
    (pair,) = fp.Pairs.from_prompts(made, clean=[prompt], correct=[answer], long_answers=long_answers)
    ids = pair.correct_sequences[0] if long_answers else pair.correct
    assert made.convert_ids_to_tokens(list(ids)) == [expected]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer", "expected", "warning"),
    [
        (
            byte_level,
            "drink to",
            "Mary",
            "Mary",
            r"answer 'Mary' follows 'drink to' without a space.*' Mary' is tokenized as \['ĠMary'\]",
        ),
        (byte_level, "is:", "Mary", "Mary", r"answer 'Mary' follows 'is:' without a space"),
        (byte_level, "drink to drink to drink to is:", "Mary", "Mary", r"follows '\.\.\.rink to drink to is:' without a space"),
        (byte_level, "drink to ", "Mary", "Mary", r"the tokens of 'drink to ' change when 'Mary' follows.*final space"),
        (
            sentence_piece,
            "is",
            "Paris",
            "Paris",
            r"answer 'Paris' follows 'is' without a space.*' Paris' is tokenized as \['▁Paris'\]",
        ),
    ],
)
def test_answers_that_were_surely_meant_otherwise(
    tokenizer: Callable[[], Any], prompt: str, answer: str, expected: str, warning: str
) -> None:
    made = tokenizer()
    columns = {"clean": [prompt] * 3, "correct": [answer] * 3}
    with pytest.warns(PairsWarning, match=rf"{warning}.*\(and 2 similar remarks\)"):
        pairs = fp.Pairs.from_prompts(made, **columns)
    assert [made.convert_ids_to_tokens(list(pair.correct)) for pair in pairs] == [[expected]] * 3


@pytest.mark.parametrize(("prompt", "answer"), [("東京は", "日本"), ("กรุงเทพ", "ไทย"), ("is", "東"), ("京", "is")])
def test_scripts_without_spaces_need_none(prompt: str, answer: str) -> None:
    """Not a word about the space that is missing (warnings are errors)."""
    made = of_bytes()
    (pair,) = fp.Pairs.from_prompts(made, clean=[prompt], correct=[answer], long_answers=True)
    assert pair.answers[0] == (tuple(made(answer)["input_ids"]),)


def test_no_space_is_advised_that_makes_more_tokens() -> None:
    made = of_bytes()
    (pair,) = fp.Pairs.from_prompts(made, clean=["is"], correct=["é"], long_answers=True)
    assert pair.answers[0] == (tuple(made("é")["input_ids"]),)


def test_the_checklist_says_where_the_context_decides() -> None:
    tokenizer = sentence_piece()
    pairs = fp.Pairs.from_prompts(tokenizer, clean=['Paris is "'], corrupted=['Rome is "'], correct=["Paris"], wrong=[["Rome"]])
    table = torch.eye(len(tokenizer))
    (found,) = (f for f in pairs.check(lambda t: table[t], tokenizer=tokenizer).findings if f.rule == "answers")
    assert (found.status, "'Paris', 'Rome' as the prompt continues" in found.detail) == ("pass", True)


def test_answers_that_differ_behind_the_two_prompts() -> None:
    with pytest.raises(
        fp.FeatpatchError, match=r"pair 0: answers 'Paris' are the tokens .* after the clean prompt and .*in the same way"
    ):
        fp.Pairs.from_prompts(sentence_piece(), clean=['is "'], corrupted=["is to "], correct=["Paris"], wrong=["Rome"])


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with BOS added to every text."""
    made = deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def test_bos_once_where_the_text_spells_it_out() -> None:
    tokenizer = beginning(byte_level())
    columns = {"corrupted": ["Rome is big"], "correct": [" to"], "wrong": [" and"], "labels": [{"is": " is"}]}
    plain = fp.Pairs.from_prompts(tokenizer, clean=["Paris is big"], **columns)
    with pytest.warns(
        PairsWarning, match="a prompt begins with '<s>', which the tokenizer also adds: the second one is dropped"
    ):
        spelt = fp.Pairs.from_prompts(tokenizer, clean=["<s>Paris is big"], **columns)
    assert spelt == plain
    assert plain[0].clean[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("sep", "kept"), [(None, False), ("to", False), ("<unk>", True), ("<s>", False)])
def test_an_eos_that_the_tokenizer_appends_is_dropped(sep: str | None, kept: bool) -> None:
    """The answer follows the prompt; not where it separates, as in masked language models, nor where the text has it."""
    tokenizer = whole_words()
    tokenizer.eos_token, tokenizer.sep_token = "<unk>", sep
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    assert prompt_ids(tokenizer, "gave to") == (1, 5, 2, 0)[: 4 if kept else 3]
    assert prompt_ids(tokenizer, "gave to <unk>") == (1, 5, 2, 0, 0)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <unk>", special_tokens=[("<unk>", 0)])
    assert prompt_ids(tokenizer, "gave") == (5, 0)[: 2 if kept else 1]


def test_the_only_token_of_a_prompt_stays_where_bos_is_also_eos() -> None:
    tokenizer = beginning(whole_words())
    tokenizer.eos_token = tokenizer.bos_token
    assert prompt_ids(tokenizer, "") == (1,)
    assert prompt_ids(tokenizer, "gave") == (1, 5)


@torch.no_grad()
def copied(small: Small) -> Any:
    """A copy of the model; a bridge keeps tensors of its last forward pass, which can't be copied if they have gradients."""
    small.model(small.clean)
    return deepcopy(small.model)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("prepends", [True, False])
def test_a_model_gives_the_ids_of_its_own_text_call(bridge: Small, adds: bool, prepends: bool) -> None:
    """Whether its tokenizer adds BOS, and whether the model wants it, four ways; labels count along."""
    model = copied(bridge)
    model.tokenizer = beginning(byte_level()) if adds else byte_level()
    model.tokenizer.pad_token = "<unk>"
    model.cfg.tokenizer_prepends_bos, model.cfg.default_prepend_bos = adds, prepends
    text = {"clean": "Paris is big", "corrupted": "Rome is big"}
    pairs = fp.Pairs.from_prompts(
        model, **{k: [v] for k, v in text.items()}, correct=[" to"], wrong=[" and"], labels=[{"is": " is"}]
    )
    for name, prompt in text.items():
        assert list(getattr(pairs[0], name)) == model.to_tokens(prompt)[0].tolist()
    assert model.tokenizer.convert_ids_to_tokens(pairs[0].clean[pairs[0].labels["is"]]) == "Ġis"
    assert pairs[0].special == ({0} if prepends else frozenset())


def test_prompts_without_the_models_bos(demo: Demo) -> None:
    bare = fp.Pairs(tuple(
        fp.Pair(p.clean[1:], p.corrupted[1:], p.correct, p.wrong) for p in demo.pairs("ioi", n=3)
    ))  # fmt: skip
    with pytest.warns(
        PairsWarning, match=r"3 of 3 pairs lack '<bos>' \(1\), which model\(text\) adds at the start: .* pass the model"
    ):
        fp.rank_components(demo.model, bare, sites="z", layers=[0], progress=False)
    found = bare.check(demo.model)
    assert found.counts()["start"] == {"pass": 0, "warn": 3, "fail": 0}
    assert demo.pairs("ioi", n=3).check(demo.model).counts()["start"] == {"pass": 3, "warn": 0, "fail": 0}


def test_prompts_beyond_the_context_are_refused(small: Small) -> None:
    """TransformerLens cuts a text off at the context without a word, with the answer at a token in the middle."""
    model, prompt = copied(small), "gave to " * 9
    model.tokenizer = whole_words()
    model.tokenizer.pad_token, model.cfg.tokenizer_prepends_bos = "<unk>", False
    long = fp.Pairs.from_prompts(model, clean=[f"{prompt}Mary"], corrupted=[f"{prompt}John"], correct=["to"], wrong=["Mary"])
    assert len(long[0]) > model.cfg.n_ctx == 16
    for use in (lambda: fp.rank_components(model, long, progress=False), lambda: long.check(model)):
        with pytest.raises(fp.FeatpatchError, match=r"at most 16, the model's context|prompts no longer than its context"):
            use()


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fp.load_demo()


def rows(demo: Demo, side: str) -> tuple[fp.Pairs, dict[str, torch.Tensor], torch.Tensor]:
    """Pairs of different lengths, and the same as padded tensors with their mask."""
    pairs = demo.pairs("ioi", n=4, seed=1)
    longest = max(map(len, pairs))
    table: dict[str, torch.Tensor] = {}
    for name in ("clean", "corrupted"):
        filled = [[demo.model.tokenizer.pad_token_id] * (longest - len(p)) for p in pairs]
        ids = [list(getattr(p, name)) for p in pairs]
        table[name] = torch.tensor([f + i if side == "left" else i + f for f, i in zip(filled, ids, strict=True)])
    table |= {name: torch.tensor([getattr(p, name)[0] for p in pairs]) for name in ("correct", "wrong")}
    return pairs, table, (table["clean"] != demo.model.tokenizer.pad_token_id).long()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_off_or_refused(demo: Demo, side: str) -> None:
    pairs, table, mask = rows(demo, side)
    plain = [(p.clean, p.corrupted, p.answer_position) for p in pairs]
    with pytest.warns(PairsWarning, match="of 4 pairs are padded: the padding is removed"):
        cut = fp.Pairs.from_tokens(**table, tokenizer=demo.model)
    masked = fp.Pairs.from_tokens(**table, attention_mask=mask)
    assert [(p.clean, p.corrupted, p.answer_position) for p in cut] == plain
    assert [(p.clean, p.corrupted, p.answer_position) for p in masked] == plain
    left_in = fp.Pairs.from_tokens(**table)
    for use in (
        lambda: fp.rank_features(demo.model, demo.saes[0], left_in, progress=False),
        lambda: fp.rank_components(demo.model, left_in, progress=False),
        lambda: fp.rank_components(demo.model, left_in, method="atp"),
        lambda: fp.check(demo.model, demo.saes[0], left_in),
    ):
        with pytest.raises(fp.FeatpatchError, match=r"pair \d begins or ends with the padding token '<pad>'"):
            use()
    assert left_in.check(demo.model).counts()["start"]["fail"] == sum(len(p) < max(map(len, pairs)) for p in pairs)


def test_padding_that_is_also_bos() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.bos_token
    bos, answers = tokenizer.bos_token_id, {"correct": [[7]], "wrong": [[8]]}
    for ids in ([bos, bos, 5, 6], [bos, 5, 6, bos]):
        with pytest.raises(fp.FeatpatchError, match=r"'<s>' \(1\), which is both the padding token and BOS or EOS: expected"):
            fp.Pairs.from_tokens([ids], [ids], **answers, tokenizer=tokenizer)
    (pair,) = fp.Pairs.from_tokens([[bos, 5, 6]], [[bos, 5, 9]], **answers, tokenizer=tokenizer)
    assert pair.clean == (bos, 5, 6)
    clean, corrupted = ([[bos, 5, last], [4, 5, last], [3, 5, last]] for last in (6, 9))
    with pytest.raises(fp.FeatpatchError, match=r"2 of 6 rows of token ids begin with 1, .* BOS in all rows or in none"):
        fp.Pairs.from_tokens(clean, corrupted, [[7]] * 3, [[8]] * 3, tokenizer=tokenizer)
    assert len(fp.Pairs.from_tokens(clean[1:], corrupted[1:], [[7]] * 2, [[8]] * 2, tokenizer=tokenizer)) == 2


def small_gpt2(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A small random model with this tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3)
    return fp.load(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer, check=False).model


def test_one_padding_token_that_is_also_bos() -> None:
    """As with GPT-2's usual setting: what one more token in another row decides is asked for, not guessed."""
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token
    model = small_gpt2(tokenizer)
    rows = {"clean": [[10, 11, 12, 13], [21, 22, 23]], "corrupted": [[10, 17, 12, 13], [26, 22, 23]]}
    padded = {n: tokenizer.pad({"input_ids": r}, padding_side="left", return_tensors="pt") for n, r in rows.items()}
    tables = {name: table["input_ids"] for name, table in padded.items()}
    assert tables["clean"][1, 0] == tokenizer.bos_token_id
    mask, answers = padded["clean"]["attention_mask"], {"correct": [7, 7], "wrong": [9, 9]}
    with pytest.raises(
        fp.FeatpatchError, match=r"2 of 4 rows of token ids begin with 1, which is both the padding token and BOS"
    ):
        fp.Pairs.from_tokens(**tables, **answers, tokenizer=model)
    masked = fp.Pairs.from_tokens(**tables, **answers, tokenizer=model, attention_mask=mask)
    assert [list(pair.clean) for pair in masked] == rows["clean"]
    patch = fp.Patch((fp.Node("blocks.1.hook_resid_pre", "activation", position=1),))
    given = {"source": tables["clean"], "base": tables["corrupted"]}
    with pytest.raises(fp.FeatpatchError, match=r"1 of 2 rows .* attention_mask="), fp.do(model, patch, **given):
        pass
    with torch.no_grad(), fp.do(model, patch, **given, attention_mask=mask):
        together = model(tables["corrupted"], attention_mask=mask)[1, -1]
    alone = fp.Patch((fp.Node("blocks.1.hook_resid_pre", "activation", position=0),))
    with torch.no_grad(), fp.do(model, alone, source=torch.tensor(rows["clean"][1:]), base=torch.tensor(rows["corrupted"][1:])):
        torch.testing.assert_close(model(torch.tensor(rows["corrupted"][1:]))[0, -1], together)


def test_a_row_padded_by_one_eos() -> None:
    """Which is not BOS, so that no prompt begins with it."""
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = "<unk>"
    with pytest.raises(fp.FeatpatchError, match=r"begin or end with '<unk>' \(0\), which is both the padding token and"):
        fp.Pairs.from_tokens([[0, 1, 5]], [[0, 1, 6]], [7], [8], tokenizer=tokenizer)


def test_prompts_that_end_in_what_is_also_padding() -> None:
    """As chat prompts do: with the mask they are ranked as they are, with a warning; two such tokens are padding."""
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = "<unk>"
    model = small_gpt2(tokenizer)
    clean, corrupted, answers = [[1, 10, 11, 0], [1, 12, 13, 14]], [[1, 15, 11, 0], [1, 12, 16, 14]], ([7, 7], [9, 9])
    pairs = fp.Pairs.from_tokens(clean, corrupted, *answers, tokenizer=model, attention_mask=[[1] * 4] * 2)
    with pytest.warns(PairsWarning, match="1 of 2 pairs begin or end with '<unk>', which is BOS or EOS and also the padding"):
        found = fp.rank_components(model, pairs, sites="z", progress=False)
    with torch.no_grad():
        logits = model(torch.tensor(clean))[:, -1]
    assert found.clean.tolist() == pytest.approx((logits[:, 7] - logits[:, 9]).tolist(), abs=1e-5)
    assert pairs.check(model).counts()["start"] == {"pass": 1, "warn": 1, "fail": 0}
    twice = fp.Pairs.from_tokens([[1, 10, 0, 0]], [[1, 11, 0, 0]], [7], [9])
    with pytest.raises(fp.FeatpatchError, match="pair 0 begins or ends with the padding token"):
        fp.rank_components(model, twice, sites="z", progress=False)
    assert twice.check(model).counts()["start"]["fail"] == 1


def test_two_bos_in_token_ids(demo: Demo) -> None:
    (pair,) = demo.pairs("ioi", n=1)
    doubled = fp.Pairs((fp.Pair((1, *pair.clean), (1, *pair.corrupted), pair.correct, pair.wrong),))
    with pytest.raises(fp.FeatpatchError, match=r"pair 0 begins with '<bos>' \(1\) twice: expected it once"):
        fp.rank_features(demo.model, demo.saes[0], doubled, progress=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": [[5.0, 6.0]]}, r"clean is \[\[5.0, 6.0\]\]: expected integers \[pairs, pos\]"),
        ({"clean": [[True, False]]}, r"clean is \[\[True, False\]\]: expected integers"),
        ({"clean": [[5, 6], [7]]}, r"there are .*: expected equal numbers, one of each per pair"),
        ({"clean": "text"}, r"clean is text"),
        ({"correct": [[[1]]]}, r"correct is \[\[\[1\]\]\]: expected integers \[pairs\] or \[pairs, answers\]"),
        ({"attention_mask": [[1, 2]]}, r"attention_mask is \[1, 2\]: expected consecutive ones"),
        ({"clean": [5, 6]}, r"clean is \[5, 6\]: expected integers"),
    ],
)
def test_tokens_that_are_none(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"clean": [[5, 6]], "corrupted": [[5, 7]], "correct": [1], "wrong": [2]}
    assert fp.Pairs.from_tokens(**given)[0].corrupted == (5, 7)
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_tokens(**{**given, **changed})


def test_a_span_is_patched_as_one_position(small: Small) -> None:
    """Against hooks on the whole model with all positions of the span swapped together."""
    pairs = fp.Pairs.from_tokens(
        small.clean[:1], small.corrupted[:1], small.correct[:1], small.wrong[:1], [{"middle": range(3, 6), "last": 6}]
    )
    assert pairs[0].labels == {"middle": (3, 4, 5), "last": 6}
    effects = fp.rank_features(small.model, small.at(SITE), pairs, positions=["middle"], progress=False)
    assert {node.position for node in effects.nodes} == {"middle"}
    clean, corrupted = small.clean[:1], small.corrupted[:1]
    m = [oracle.logit_diff(small.model(x).detach(), int(small.correct[0]), int(small.wrong[0])) for x in (clean, corrupted)]
    for row, node in enumerate(effects.nodes):
        if node.kind == "feature":
            logits = oracle.patched_logits(
                small.model, small.at(SITE), corrupted, clean, features=[node.index], positions=[3, 4, 5], error=False
            )
            value = oracle.logit_diff(logits, int(small.correct[0]), int(small.wrong[0]))
            assert abs(float(effects.pooled("recovery")[row]) - (value - m[1]) / (m[0] - m[1])) < 1e-8
    heads = fp.rank_components(small.model, pairs, sites="resid_pre", layers=[1], positions=["middle"], progress=False)
    logits = oracle.patched_activation_logits(small.model, SITE, corrupted, clean, positions=[3, 4, 5])
    value = oracle.logit_diff(logits, int(small.correct[0]), int(small.wrong[0]))
    assert abs(float(heads.pooled("recovery")[0]) - (value - m[1]) / (m[0] - m[1])) < 1e-8


def test_spans_from_text(demo: Demo) -> None:
    text = "When Mary and John went to the store , {} gave a drink to"
    pairs = fp.Pairs.from_prompts(
        demo.model,
        clean=[text.format("John")],
        corrupted=[text.format("Mary")],
        correct=["Mary"],
        wrong=["John"],
        labels=[
            {
                "people": {"span": "Mary and John"},
                "same": {"span": (5, 18)},
                "store": "the store",
                "first": (0, 4),
                "whole": {"span": (0, len(text.format("John")))},
            }
        ],
    )
    assert pairs[0].labels == {
        "people": (2, 3, 4),
        "same": (2, 3, 4),
        "store": 8,
        "first": 1,
        "whole": tuple(range(1, len(pairs[0]))),
    }
    words = [demo.model.tokenizer.decode([pairs[0].clean[p]]) for p in pairs[0].positions("people")]
    assert words == ["Mary", "and", "John"]
    noise = fp.Noise(["people"], scale=1.0)
    assert noise.at(pairs[0]) == [2, 3, 4]


def of_bytes() -> PreTrainedTokenizerFast:
    """As GPT-2's, for any text: each byte is a token where no word is."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([" is of Paris Rome"] * 60, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", pad_token="<unk>")


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("words", [("東京", "北海"), ("Ōsaka", "Ēsaka"), (" 🐈", " 🐕")])
def test_a_span_of_characters_of_several_tokens(words: tuple[str, str], fast: bool) -> None:
    """It holds all tokens that differ, so that at the embedding it is everything: recovery 1."""
    tokenizer = of_bytes()
    model = small_gpt2(tokenizer)
    clean, corrupted = (f"of {word.strip()} is" for word in words)
    ids = (lambda text: tokenizer(text)["input_ids"]) if not fast else model
    pairs = fp.Pairs.from_prompts(
        ids, clean=[clean], corrupted=[corrupted], correct=[" Rome"], wrong=[" of"], labels=[{"it": {"span": words[0].strip()}}]
    )
    differing = [p for p, (a, b) in enumerate(zip(pairs[0].clean, pairs[0].corrupted, strict=True)) if a != b]
    assert set(differing) <= set(pairs[0].labels["it"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PairsWarning)  # the function puts no BOS first
        found = fp.rank_components(model, pairs, sites="resid_pre", layers=[0], positions=["it"], progress=False)
    assert found.pooled("recovery").tolist() == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
def test_spaces_around_a_label_do_not_count(tokenizer: Callable[[], Any]) -> None:
    """A space is part of the token of the word after it."""
    text = "John gave a drink to Mary"
    named = {
        "a": "gave",
        "b": "gave ",
        "c": " gave ",
        "d": (5, 10),
        "e": {"span": "gave"},
        "f": {"span": " gave "},
        "g": "Mary",
    }
    (pair,) = fp.Pairs.from_prompts(tokenizer(), clean=[text], correct=[" Mary"], labels=[named])
    assert {pair.labels[name] for name in "abcd"} == {1}
    assert (pair.labels["e"], pair.labels["f"], pair.labels["g"]) == ((1,), (1,), 5)


def test_several_answers_of_each_pair_in_a_tensor() -> None:
    given: dict[str, Any] = {"clean": torch.tensor([[1, 2], [1, 3]]), "corrupted": torch.tensor([[1, 4], [1, 5]])}
    pairs = fp.Pairs.from_tokens(**given, correct=torch.tensor([[6, 7], [8, 9]]), wrong=torch.tensor([10, 11]))
    assert [(pair.correct, pair.wrong) for pair in pairs] == [((6, 7), (10,)), ((8, 9), (11,))]


def test_labels_where_bos_changes_the_first_token(bridge: Small) -> None:
    """As with Llama's: a text that follows BOS begins without a space."""
    model = copied(bridge)
    model.tokenizer = sentence_piece()
    model.tokenizer.pad_token, model.cfg.tokenizer_prepends_bos = "<unk>", False
    text = {"clean": ["Paris is big"], "correct": [" to"]}
    (pair,) = fp.Pairs.from_prompts(model, **text, labels=[{"city": {"span": "Paris"}, "end": "big"}])
    assert model.tokenizer.convert_ids_to_tokens(list(pair.clean)) == ["<s>", "Paris", "▁is", "▁big"]
    assert pair.labels == {"city": (1,), "end": 3}


def test_positions_of_numpy_and_lists() -> None:
    """Everywhere the same as plain integers and tuples, in digests too."""
    named = {"end": np.int64(5), "mid": [np.int64(2), 3], "range": range(2, 4)}
    plain = {"end": 5, "mid": (2, 3), "range": (2, 3)}
    given: dict[str, Any] = {"clean": [[5, 6, 7, 8, 9, 4]], "corrupted": [[5, 6, 7, 8, 9, 3]], "correct": [1], "wrong": [2]}
    tokens = fp.Pairs.from_tokens(**given, labels=[named])
    ids = given | {"correct": [[1]], "wrong": [[2]]}
    made = fp.Pairs.from_prompts(byte_level(), **ids, labels=[named])
    assert [pair.labels for pairs in (tokens, made) for pair in pairs] == [plain] * 2
    assert [type(tokens[0].labels["end"]), type(tokens[0].labels["mid"])] == [int, tuple]
    assert tokens.digest() == made.digest() == fp.Pairs.from_tokens(**given, labels=[plain]).digest()
    (text,) = fp.Pairs.from_prompts(
        byte_level(), clean=["a drink to"], correct=[" Mary"], labels=[{"x": np.int64(2), "y": [2, 7]}]
    )
    assert text.labels == {"x": 2, "y": 1}


def test_labels_that_count_from_the_end(demo: Demo) -> None:
    """They are stored from the start, also in files and spans; positions without BOS stay those from the end."""
    texts: dict[str, Any] = {"clean": ["Mary gave a drink to"], "corrupted": ["John gave a drink to"], "correct": [" John"]}
    (pair,) = fp.Pairs.from_prompts(demo.model, **texts, labels=[{"end": -1, "first": -6, "last two": range(-2, 0)}])
    assert pair.labels == {"end": 5, "first": 0, "last two": (4, 5)}
    assert after_special(demo.model, pair.clean, {"end": -1, "Mary": 0}) == {"end": -1, "Mary": 1}
    with pytest.raises(fp.FeatpatchError, match="label 'x': position -7 is outside a prompt of 6 tokens"):
        fp.Pairs.from_prompts(demo.model, **texts, labels=[{"x": -7}])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"span": "Paul"}, "label 'x': 'Paul' is not in"),
        ("rink", "label 'x': 'rink' is only part of a word in 'Mary gave a drink to': expected text that occurs exactly once"),
        ({"text": "Mary"}, "label 'x': .* is not a valid label"),
        ({"span": 3}, "label 'x': 3 is not a valid label"),
        ({}, "label 'x': {} is not a valid label"),
        ([-1, 4], r"label 'x': the characters \[-1, 4\] are outside .* expected 0 <= start < end <= 20"),
        ([0, 21], "are outside .* or empty"),
        ([4, 4], "are outside .* or empty"),
        ([4, 2], "are outside .* or empty"),
        ({"span": "to", "at": 3}, "label 'x': {'span': 'to', 'at': 3} is not a valid label"),
        ([3, 4, 5], r"label 'x': \[3, 4, 5\] is not a valid label: .*, or a range of token positions"),
        (range(0), r"label 'x' is at \(\): expected an integer position or a tuple"),
        (range(3, 99), "label 'x': position 6 is outside a prompt of 6 tokens: expected 0 to 5, or -1 to -6 from the end"),
        (range(5, 1, -1), "label 'x' is at positions .*: expected consecutive positions"),
        (range(1, 5, 2), "label 'x' is at positions .*: expected consecutive positions"),
    ],
)
def test_spans_that_are_refused(demo: Demo, label: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_prompts(
            demo.model, clean=["Mary gave a drink to"], corrupted=["John gave a drink to"], correct=["Mary"], wrong=["John"],
            labels=[{"x": label}],
        )  # fmt: skip


def test_pairs_without_answers(small: Small) -> None:
    """Metrics that read none give what they give beside answers; metrics that read them, and a wrong one alone, are refused."""
    some = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    none = fp.Pairs.from_tokens(small.clean, small.corrupted)
    for metric in ("neg_kl", lambda logits: logits[:, -1, 5]):
        one, other = (fp.rank_components(small.model, p, sites="z", metric=metric, progress=False) for p in (some, none))
        torch.testing.assert_close(one.denoised, other.denoised, rtol=0, atol=0)
    with pytest.raises(fp.FeatpatchError, match="a prompt has no answers, and logit_diff reads them"):
        fp.rank_components(small.model, none, progress=False)
    with pytest.raises(fp.FeatpatchError, match="expected at least one correct answer"):
        fp.Pair((1, 2), (1, 3), (), (4,))
    outputs = [found for found in none.check(small.model).findings if found.rule in ("output", "answers", "gap")]
    assert {(found.status, found.detail) for found in outputs if found.rule != "gap"} == {("pass", "no answers")}
    assert {found.status for found in outputs} == {"pass"}


def test_pairs_without_wrong_answers(small: Small) -> None:
    """Factual recall: metrics of the correct answer alone give what they give beside wrong answers; others are refused."""
    with_wrong = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    without = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct)
    for metric in ("log_prob", "prob", "neg_kl"):
        one, other = (
            fp.rank_components(small.model, p, sites="z", metric=metric, progress=False) for p in (with_wrong, without)
        )
        torch.testing.assert_close(one.denoised, other.denoised, rtol=0, atol=0)
    for metric in ("logit_diff", "prob_diff"):
        message = rf"metric '{metric}' compares correct with wrong answers, and a pair has no wrong answers"
        for use in (
            lambda m=metric: fp.rank_features(small.model, small.at(SITE), without, metric=m, progress=False),
            lambda m=metric: fp.rank_components(small.model, without, sites="z", metric=m, progress=False),
            lambda m=metric: fp.rank_components(small.model, without, method="atp", metric=m),
            lambda m=metric: fp.find_circuit(small.model, without, over="edges", metric=m, progress=False),
        ):
            with pytest.raises(fp.FeatpatchError, match=message):
                use()
    long = fp.Pairs(tuple(fp.Pair(p.clean, p.corrupted, (), (), correct_sequences=((3, 4),)) for p in without))
    fp.rank_components(small.model, long, sites="z", layers=[0], metric="sequence_log_prob", progress=False)
    with pytest.raises(fp.FeatpatchError, match="metric 'sequence_log_prob_diff' compares"):
        fp.rank_components(small.model, long, sites="z", layers=[0], metric="sequence_log_prob_diff", progress=False)
    for pairs in (without, long):
        found = pairs.check(small.model)
        output = [finding for finding in found.findings if finding.rule == "output"]
        better = [clean > corrupted for clean, corrupted in zip(found.clean, found.corrupted, strict=True)]
        assert [finding.status == "pass" for finding in output] == better
        assert output[0].detail.startswith("log p(right)")


FORMS: dict[str, Callable[[Any, str], Any]] = {
    "a text": lambda model, text: text,
    "tokens of the model": lambda model, text: model.to_tokens(text),
    "one dimension": lambda model, text: model.to_tokens(text)[0],
    "an array": lambda model, text: model.to_tokens(text)[0].numpy(),
    "a list": lambda model, text: model.to_tokens(text)[0].tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_prompts_as_token_ids(demo: Demo, form: str) -> None:
    """And answers as ids: the same pairs as from the texts."""
    prompts = {"clean": "Mary gave a drink to", "corrupted": "John gave a drink to"}
    expected = fp.Pairs.from_prompts(demo.model, **{n: [p] for n, p in prompts.items()}, correct=["Mary"], wrong=["John"])
    given = {name: [FORMS[form](demo.model, prompt)] for name, prompt in prompts.items()}
    mary, john = expected[0].correct[0], expected[0].wrong[0]
    for correct, wrong in (([mary], [john]), ([[np.int64(mary)]], [torch.tensor([john])]), (torch.tensor([mary]), [[john]])):
        assert fp.Pairs.from_prompts(demo.model, **given, correct=correct, wrong=wrong) == expected


@pytest.mark.parametrize("wrong", [None, [], [None, None], [[], []], [(), None]])
def test_empty_wrong_answers_are_none(wrong: Any) -> None:
    given = {"clean": [[5, 6], [6, 5]], "corrupted": [[5, 7], [6, 7]], "correct": [1, 2]}
    made = [fp.Pairs.from_prompts(byte_level(), **given, wrong=wrong, long_answers=long) for long in (False, True)]
    if wrong in (None, [], [[], []]):
        made.append(fp.Pairs.from_tokens(**given, wrong=wrong))
    assert [[pair.answers for pair in pairs] for pairs in made] == [[(((1,),), ()), (((2,),), ())]] * len(made)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"correct": [b"to"]}, "pair 0: answer b'to' is a bytes: expected a string, a token id, or a list of these"),
        ({"correct": [5.0]}, "pair 0: answer 5.0 is a float"),
        ({"correct": [[[5]]]}, r"pair 0: answer \[5\] is a list"),
        ({"correct": [True]}, "pair 0: answer True is a bool"),
        ({"correct": [None]}, "expected at least one correct answer"),
        ({"clean": [b"is big"]}, "pair 0: a prompt is \"b'is big'\": expected a string, or the token ids"),
        ({"clean": [None]}, "pair 0: a prompt is 'None'"),
        ({"clean": [torch.zeros(2, 3, dtype=torch.long)]}, "pair 0: a prompt is 'tensor"),
        ({"clean": [torch.zeros(3)]}, "pair 0: a prompt is 'tensor"),
    ],
)
@pytest.mark.parametrize("long_answers", [False, True])
def test_prompts_and_answers_that_are_none(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str, long_answers: bool
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"clean": ["is big"], "correct": [" to"], "wrong": [" Mary"]}
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_prompts(byte_level(), **{**given, **changed}, long_answers=long_answers)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner.encode,
        lambda inner: lambda text: {"input_ids": inner(text)["input_ids"]},
        lambda inner: lambda text: {"input_ids": [inner(text)["input_ids"]]},
        lambda inner: lambda text: inner(text, return_tensors="pt"),
        lambda inner: lambda text: inner([text])["input_ids"],
        lambda inner: lambda text: np.array(inner(text)["input_ids"]),
        lambda inner: inner.backend_tokenizer.encode,
    ],
)
def test_functions_from_a_text_to_ids(wrap: Callable[[Any], Any]) -> None:
    given = {"clean": ["is big"], "correct": [" to"], "wrong": [" Mary"]}
    found, expected = (fp.Pairs.from_prompts(each, **given) for each in (wrap(byte_level()), byte_level()))
    assert [(pair.answers, pair.clean) for pair in found] == [(pair.answers, pair.clean) for pair in expected]


@pytest.mark.parametrize("gives", [lambda text: None, lambda text: text.split(), lambda text: [[1, 2], [3, 4]], lambda text: 5])
def test_functions_that_give_no_ids(gives: Callable[[str], Any]) -> None:
    with pytest.raises(fp.FeatpatchError, match="the tokenizer returns .* for the text 'is big': expected its token ids"):
        fp.Pairs.from_prompts(gives, clean=["is big"], correct=[" to"])


def test_a_file_without_wrong_answers(tmp_path: Any) -> None:
    csv = tmp_path / "pairs.csv"
    csv.write_text('clean,corrupted,correct,wrong\n"Paris is","Rome is"," big",\n', encoding="utf-8")
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"clean": "Paris is", "corrupted": "Rome is", "correct": " big", "wrong": []}\n', encoding="utf-8")
    tokenizer = byte_level()
    for pairs in (fp.Pairs.from_csv(tokenizer, csv), fp.Pairs.from_jsonl(tokenizer, lines)):
        assert pairs[0].wrong == ()
        assert tokenizer.convert_ids_to_tokens(list(pairs[0].correct)) == ["Ġbig"]


def test_years_of_single_digits() -> None:
    tokenizer = trained(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    )
    extra = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"} - set(tokenizer.get_vocab()))
    tokenizer.add_tokens(extra)
    pairs = fp.tasks.greater_than(tokenizer, 16, corruptions=["early_year", "other_year"])
    for pair in pairs:
        text, other = (
            "".join(tokenizer.convert_ids_to_tokens(list(ids))).replace("Ġ", " ") for ids in (pair.clean, pair.corrupted)
        )
        year, start = (int(next(word for word in t.split() if word.strip(".").isdigit())) for t in (text, other))
        tens = year // 10 % 10
        answers = ["".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (pair.correct, pair.wrong)]
        assert answers == ["".join(map(str, range(tens + 1, 10))), "".join(map(str, range(tens)))]
        assert start < year
        assert start // 10 % 10 < tens
        assert tokenizer.convert_ids_to_tokens(pair.clean[pair.labels["start_year"]]) == str(tens)
        assert text.endswith(str(year)[:2])
        assert len(pair.clean) == len(pair.corrupted)


def test_a_tokenizer_that_splits_years_otherwise() -> None:
    """As Llama 3's, in groups of three digits."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r"\d{1,3}|\D"), behavior="isolated")
    inner.train_from_iterator([str(n) for n in range(1000)] * 3, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    with pytest.raises(
        fp.FeatpatchError, match=r"the tokenizer splits '1745' into .*: expected its last two digits to be one token"
    ):
        fp.tasks.greater_than(PreTrainedTokenizerFast(tokenizer_object=inner), 4)


@pytest.mark.parametrize("how", ["add", "set"])
@pytest.mark.parametrize("kind", ["all_features", "activation"])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_do_on_padded_tokens(small: Small, how: str, kind: str, before: int) -> None:
    """Logits at the last token of a left-padded batch, one padded by itself: those without padding."""

    def run(source: torch.Tensor, base: torch.Tensor, position: int | str, mask: torch.Tensor | None) -> torch.Tensor:
        patch = fp.Patch((fp.Node(SITE, kind, position=position),))
        options = {} if mask is None else {"attention_mask": mask}
        given = {"base": base} if how == "add" else {}
        with torch.no_grad(), fp.do(small.model, patch, source=source, **given, saes=small.at(SITE), how=how, **options):
            return small.model(base, **options)[:, -1]

    source, base = (torch.nn.functional.pad(x, (before, 0), value=1) for x in (small.clean, small.corrupted))
    mask = torch.nn.functional.pad(torch.ones_like(small.clean), (before, 0))
    for position in (3, "all"):
        moved = position + before if isinstance(position, int) else position
        plain, padded = run(small.clean, small.corrupted, position, None), run(source, base, moved, mask)
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-9)


def test_padding_is_not_patched(small: Small) -> None:
    source, base = (torch.nn.functional.pad(x, (2, 0), value=1) for x in (small.clean, small.corrupted))
    source[:, 0] = 2
    mask = torch.nn.functional.pad(torch.ones_like(small.clean), (2, 0))
    patch = fp.Patch((fp.Node("blocks.0.hook_resid_pre", "activation"),))

    def entering() -> torch.Tensor:
        with torch.no_grad():
            return small.model.run_with_cache(base, attention_mask=mask)[1]["blocks.0.hook_resid_pre"]

    plain = entering()
    with fp.do(small.model, patch, source=source, base=base, attention_mask=mask):
        patched = entering()
    assert torch.equal(patched[:, :2], plain[:, :2])
    assert not torch.equal(patched[:, 2:], plain[:, 2:])


def test_a_long_pair_is_cut_when_it_is_shown() -> None:
    short, long = (fp.Pair((1, 2), (1, 3), (4,), (5,), labels=dict.fromkeys(map(str, range(n)), 1)) for n in (1, 60))
    assert str(short) == "pair of 2 tokens, of which 1 differ, answer ids 4 (right) and 5 (wrong), labels 0 1"
    assert str(long).startswith(f"{short}, 1 1, 2 1")
    assert len(str(long)) == 153
    assert str(long).endswith("...")


def test_do_refuses_padding_without_a_mask(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    _pairs, table, mask = rows(demo, "left")
    node = fp.Node("blocks.1.hook_resid_pre", "activation", position=0)
    patch = fp.Patch([node])
    assert patch == fp.Patch((node,))
    given = {"source": table["clean"], "base": table["corrupted"]}
    with (
        pytest.raises(fp.FeatpatchError, match=r"base has a row .* begins or ends with padding: expected attention_mask="),
        fp.do(demo.model, patch, **given),
    ):
        pass
    with (
        pytest.raises(fp.FeatpatchError, match=r"attention_mask is \[4, 2\] and base is \[4, \d+\]: expected equal shapes"),
        fp.do(demo.model, patch, **given, attention_mask=mask[:, :2]),
    ):
        pass
    hole = torch.tensor([1, 0] + [1] * (mask.shape[1] - 2)).expand_as(mask)
    with (
        pytest.raises(fp.FeatpatchError, match=r"attention_mask is \[1, 0, 1, .*expected consecutive ones"),
        fp.do(demo.model, patch, **given, attention_mask=hole),
    ):
        pass
    with (
        pytest.raises(fp.FeatpatchError, match="is at padding in one of the prompts"),
        fp.do(demo.model, patch, **given, attention_mask=mask),
    ):
        pass
    other = mask.roll(1, 0)
    everywhere = fp.Patch((fp.Node(node.site, "activation"),))
    with (
        pytest.raises(fp.FeatpatchError, match="for 'all', the same padding in source and base"),
        fp.do(demo.model, everywhere, **given, attention_mask=mask, source_attention_mask=other),
    ):
        pass
    short = torch.nn.functional.pad(table["clean"][:1, 1:], (1, 0), value=0)
    hidden = torch.ones_like(short)
    hidden[:, 0] = 0
    for one in (patch, everywhere):
        with (
            pytest.raises(fp.FeatpatchError, match="is at padding in one of the prompts"),
            fp.do(demo.model, one, source=short, base=torch.full_like(short, 5), source_attention_mask=hidden),
        ):
            pass
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with (
        pytest.raises(fp.FeatpatchError, match="source is a tensor .* of torch.float32: expected integers"),
        fp.do(demo.model, patch, source=table["clean"].float(), base=table["corrupted"]),
    ):
        pass
