"""What features fire on: every word, the last one too, against a count by plain loops."""

from collections import Counter

import pytest
import torch

import featpatch as fp

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def demo() -> fp.Demo:
    return fp.load_demo()


def by_hand(demo: fp.Demo, texts: list[str], index: int) -> tuple[float, float, list[str]]:
    """The best F1 of a word or of a next word, the share of words, and those on which it fires most with what follows."""
    sae, tokenizer, words = demo.saes[[s.cfg.metadata.hook_name for s in demo.saes].index(SITE)], demo.model.tokenizer, []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            values = sae.encode(demo.model.run_with_cache(torch.tensor([ids]))[1][SITE])[0, :, index]
        for p in range(1, len(ids)):
            words.append((float(values[p]), ids[p], ids[p + 1] if p + 1 < len(ids) else None))
    scores = []
    for column in (1, 2):
        rows = [row for row in words if row[column] is not None]
        count, hits = Counter(row[column] for row in rows), Counter(row[column] for row in rows if row[0] > 0)
        fires = sum(row[0] > 0 for row in rows)
        scores += [2 * hits[word] / (count[word] + fires) for word in count]
    strongest = [row for row in words if row[0] >= 0.9999 * max(words, key=lambda row: row[0])[0]]
    shown = [
        f"[{tokenizer.decode([row[1]])}] {'' if row[2] is None else tokenizer.decode([row[2]])}".strip() for row in strongest
    ]
    return max(scores), sum(row[0] > 0 for row in words) / len(words), shown


def test_descriptions_by_hand(demo: fp.Demo) -> None:
    texts = ["Tom", *(" ".join(text.split()[: 3 + n]) for n, text in enumerate(demo.text()[:30]))]
    fired = 0
    for index in range(0, 900, 30):
        node = fp.Node(SITE, "feature", index, "all", SITE)
        found = fp.describe(demo.model, demo.saes, [node], texts, contexts=2)[node]
        f1, share, strongest = by_hand(demo, texts, index)
        assert (found.f1, found.share) == pytest.approx((f1, share))
        if share:
            fired += 1
            assert any(shown in found.contexts[0] for shown in strongest)
            assert len(set(found.contexts)) == len(found.contexts) <= 2
            assert found.word
            assert str(found).startswith(f"{found.label} '{found.word}' (F1 ")
        else:
            assert (found.word, found.contexts, str(found)) == ("", (), "never fires in the text")
    assert fired > 5


def test_what_is_refused(demo: fp.Demo) -> None:
    node = fp.Node(SITE, "feature", 0, "all", SITE)
    for saes, texts, message in (
        (demo.saes, [], "there are no texts"),
        ([s for s in demo.saes if s.cfg.metadata.hook_name != SITE], ["Tom"], f"a node names dictionary '{SITE}'"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.describe(demo.model, saes, [node], texts)
