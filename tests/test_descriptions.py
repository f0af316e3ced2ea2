"""What features fire on: every word, the last one too, against a count by plain loops."""

from collections import Counter
from typing import Any

import jaxtyping
import pandas as pd
import pytest
import torch

import featpatch as fp
from featpatch.checkpoints import Demo
from featpatch.descriptions import Document, _describe
from featpatch.errors import FeatpatchWarning
from featpatch.pairs.tokens import PairsWarning

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def demo() -> Demo:
    return fp.load_demo()


def read(demo: Demo, texts: list[str]) -> list[tuple[torch.Tensor, list[int]]]:
    """Every text's features and ids."""
    (sae,) = (sae for sae in demo.saes if sae.cfg.metadata.hook_name == SITE)
    every = [demo.model.tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        return [(sae.encode(demo.model.run_with_cache(torch.tensor([ids]))[1][SITE])[0], ids) for ids in every]


def by_hand(
    decode: Any, activations: list[tuple[torch.Tensor, list[int]]], index: int
) -> tuple[dict[Any, float], float, list[Any]]:
    """F1 of every word and next word, the share of words, and value and context of all on which it fires."""
    words = []
    for values, ids in activations:
        for p in range(1, len(ids)):
            words.append((float(values[p, index]), ids[p], ids[p + 1] if p + 1 < len(ids) else None, ids[max(1, p - 5) : p]))
    scores = {}
    for column, label in ((1, "on"), (2, "before")):
        rows = [row for row in words if row[column] is not None]
        count, hits = Counter(row[column] for row in rows), Counter(row[column] for row in rows if row[0] > 0)
        fires = sum(row[0] > 0 for row in rows)
        scores |= {(label, decode([word])): 2 * hits[word] / (count[word] + fires) for word in count}
    shown = [(v, f"{decode(b)} [{decode([w])}] {'' if n is None else decode([n])}".strip()) for v, w, n, b in words if v > 0]
    return scores, len(shown) / len(words), shown


def test_descriptions_by_hand(demo: Demo) -> None:
    """Texts of any length, whose last words are of every kind."""
    texts = ["Tom", *(" ".join(text.split()[: 3 + n]) for n, text in enumerate(demo.text()[:30]))]
    activations, fired = read(demo, texts), 0
    nodes = [fp.Node(SITE, "feature", index, "all", SITE) for index in range(0, 900, 30)]
    with pytest.warns(FeatpatchWarning, match="give more text"):
        descriptions = fp.max_activating(demo.model, demo.saes, nodes, texts, contexts=4)
    for node, found in descriptions.items():
        scores, share, shown = by_hand(demo.model.tokenizer.decode, activations, int(node.index or 0))
        assert found.share == pytest.approx(share)
        assert (found.fired, found.positions) == (len(shown), sum(len(ids) - 1 for _, ids in activations))
        count = f"active at {len(shown)} of {found.positions} positions"
        if not share:
            assert (found.word, found.contexts, str(found)) == ("", (), f"never active in the text, {count}")
            continue
        fired += 1
        assert found.f1 == pytest.approx(scores[found.label, found.word]) == pytest.approx(max(scores.values()))
        assert str(found) == f"{found.label} {found.word!r} (F1 {found.f1:.2f}), {count}"
        assert found.best == f"{found.label} {found.word!r} (F1 {found.f1:.2f})"
        best: dict[str, float] = {}
        for value, context in shown:
            best[context] = max(value, best.get(context, 0.0))
        assert len(set(found.contexts)) == len(found.contexts) == min(4, len(best))
        strongest = sorted(best.values(), reverse=True)
        assert [best[context] for context in found.contexts] == pytest.approx(strongest[: len(found.contexts)], rel=2e-4)
    assert fired > 5


def test_a_text_beyond_the_context_is_cut_with_a_warning(demo: Demo) -> None:
    """What is found is what is found in as many words as the context holds."""
    context, tokenizer = demo.model.cfg.n_ctx, demo.model.tokenizer
    long = " ".join(demo.text()[:20])
    short = tokenizer.decode(tokenizer(long)["input_ids"][:context], skip_special_tokens=True)
    ((values, ids),) = read(demo, [short])
    assert len(ids) == context < len(tokenizer(long)["input_ids"])
    node = fp.Node(SITE, "feature", int(values[1:].sum(0).argmax()), "all", SITE)
    with pytest.warns(FeatpatchWarning, match=f"{context - 1} positions, and"):
        (expected,) = fp.max_activating(demo.model, demo.saes, [node], [short]).values()
    with (
        pytest.warns(FeatpatchWarning, match="give more text"),
        pytest.warns(PairsWarning, match=f"1 of 2 texts are longer than the model's context of {context} tokens"),
    ):
        (found,) = fp.max_activating(demo.model, demo.saes, [node], [long, ""]).values()
    assert found == expected


def test_too_little_text_is_told_once_with_the_features(demo: Demo) -> None:
    """Of enough text there is no warning but of features that fire fewer than 10 times, counted by hand."""
    texts = demo.text()[:60]
    activations = read(demo, texts)
    counts = sum((values[1:] > 0).sum(0) for values, _ in activations)
    often, seldom = [
        [fp.Node(SITE, "feature", int(index), "all", SITE) for index in torch.nonzero(which).flatten()[:7]]
        for which in (counts == 10, counts == 9)
    ]
    assert len(often) == len(seldom) == 7
    fp.max_activating(demo.model, demo.saes, often, texts)
    with pytest.warns(FeatpatchWarning) as told:
        fp.max_activating(demo.model, demo.saes, [*often, *seldom], texts)
    (warning,) = told
    assert "7 of 14 features" in str(warning.message)
    for node in seldom[:5]:
        assert f"{SITE} feature {node.index} (9)" in str(warning.message)
    assert "and 2 more" in str(warning.message)
    with pytest.warns(FeatpatchWarning, match="too little text to describe 2 of 2 features"):
        fp.max_activating(demo.model, demo.saes, often[:2], texts[:3])


def test_weak_places_are_not_taken_for_silent_ones() -> None:
    """1e-5 of the strongest value is as good as nothing, but it fires."""
    text = [Document.of(Numbers(), (0, 1, 2, 3, 4))]
    found = _describe(Numbers(), text, torch.tensor([1.0, 0.0, 0.0, 1e-5]), 3)
    assert found.contexts == ("w0 [w1] w2", "w0 w1 w2 w3 [w4]")


class Numbers:
    """A tokenizer of numbered words."""

    all_special_ids = (0,)

    def __call__(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(f"w{token}" for token in ids)


def test_what_is_refused(demo: Demo) -> None:
    node = fp.Node(SITE, "feature", 0, "all", SITE)
    for saes, texts, message in (
        (demo.saes, [], "texts is a list: expected a list of at least one text"),
        (demo.saes, [""], "the texts hold only special tokens"),
        ([s for s in demo.saes if s.cfg.metadata.hook_name != SITE], ["Tom"], r"belongs to 0 of the SAEs passed"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.max_activating(demo.model, saes, [node], texts)
    with pytest.raises(fp.FeatpatchError, match=r"expected a feature of 'blocks.*, from 0 to \d+"):
        fp.max_activating(demo.model, demo.saes, [fp.Node(SITE, "feature", 10**6, "all", SITE)], ["Tom"])
    with pytest.raises(fp.FeatpatchError, match="texts is a str: expected a list"):
        fp.max_activating(demo.model, demo.saes, [node], "Tom")


def test_texts_may_be_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    demo = fp.load_demo()
    texts, sae = demo.text()[:60], demo.saes[4]
    nodes = [fp.feature(sae, 433)]
    column = fp.max_activating(demo.model, sae, nodes, pd.Series(texts))
    assert repr(column) == repr(fp.max_activating(demo.model, sae, nodes, texts))
    with pytest.raises(fp.FeatpatchError, match="texts is a generator: expected a list of at least one text"):
        fp.max_activating(demo.model, sae, nodes, (text for text in texts))  # type: ignore[arg-type]
