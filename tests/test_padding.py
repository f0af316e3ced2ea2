"""Padding and special tokens: nothing of a result depends on the batch that a prompt came in."""

import pytest
import torch
from small import VOCAB, Small

import featpatch as fp

SITE = "blocks.1.hook_resid_pre"
PAD = 1


def padded(small: Small, before: int, after: int) -> tuple[torch.Tensor, ...]:
    """Both prompts and the mask, with padding on both sides."""
    clean, corrupted = (torch.nn.functional.pad(t, (before, after), value=PAD) for t in (small.clean, small.corrupted))
    return clean, corrupted, torch.nn.functional.pad(torch.ones_like(small.clean), (before, after))


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2), (2, 1)])
def test_padding_changes_nothing(small: Small, before: int, after: int) -> None:
    labels = [{"S2": 3}] * 3
    plain = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong, labels)
    clean, corrupted, mask = padded(small, before, after)
    moved = [{"S2": 3 + before}] * 3
    cut = fp.Pairs.from_tokens(clean, corrupted, small.correct, small.wrong, moved, attention_mask=mask)
    assert cut == plain
    left, right = (fp.rank_features(small.model, small.at(SITE), p, positions=["S2"], progress=False) for p in (plain, cut))
    assert left.nodes == right.nodes
    assert (left.denoised == right.denoised).all()


def test_prompts_of_different_lengths_beside_each_other(small: Small) -> None:
    """The same pair alone, and in a batch whose other rows are longer."""
    clean, corrupted, mask = padded(small, 2, 0)
    generator = torch.Generator().manual_seed(2)
    clean[1:, :2], corrupted[1:, :2] = torch.randint(10, VOCAB, (2, 2, 2), generator=generator)
    mask[1:] = 1
    answers = small.correct, small.wrong
    together = fp.rank_features(
        small.model, small.at(SITE), fp.Pairs.from_tokens(clean, corrupted, *answers, attention_mask=mask), progress=False
    ).of_pairs([0])
    alone = fp.rank_features(
        small.model, small.at(SITE), fp.Pairs.from_tokens(small.clean[:1], small.corrupted[:1], *(a[:1] for a in answers)),
        progress=False,
    )  # fmt: skip
    assert together.nodes == alone.nodes
    assert abs(together.denoised - alone.denoised).max() < 1e-10


class Special:
    """A tokenizer as far as special tokens go."""

    all_special_ids = (0, 2)
    unk_token_id = 2

    def __call__(self, text: str) -> list[int]:
        return [0, *map(ord, text)]


def test_special_tokens_are_not_swapped(bridge: Small) -> None:
    """Even where they differ; a position that is asked for by index is."""
    clean, corrupted = bridge.clean.clone(), bridge.corrupted.clone()
    clean[:, 2] = 0
    corrupted[1:, 4] = 0
    pairs = fp.Pairs.from_tokens(clean, corrupted, bridge.correct, bridge.wrong, tokenizer=Special())
    assert [pair.special for pair in pairs] == [{2}, {2, 4}, {2, 4}]
    effects = fp.rank_features(bridge.model, bridge.at(SITE), pairs, positions="each", progress=False)
    assert 2 not in {node.position for node in effects.nodes}
    assert {3, 6} <= {node.position for node in effects.nodes}
    asked = fp.rank_features(bridge.model, bridge.at(SITE), pairs, positions=[2], progress=False)
    assert len(asked)


@pytest.mark.parametrize(("shape", "wider"), [((3, 5), 0), ((3, 9), 0), ((3,), 0), ((3, 7), 1)])
def test_a_mask_of_another_shape(bridge: Small, shape: tuple[int, ...], wider: int) -> None:
    corrupted = torch.nn.functional.pad(bridge.corrupted, (0, wider))
    with pytest.raises(fp.FeatpatchError, match=r"attention_mask .*: expected (equally many|integers \[pairs, pos\])"):
        fp.Pairs.from_tokens(
            bridge.clean, corrupted, bridge.correct, bridge.wrong, attention_mask=torch.ones(shape, dtype=torch.long)
        )


def test_padding_between_tokens_is_refused(bridge: Small) -> None:
    mask = torch.ones_like(bridge.clean)
    mask[1, 3] = 0
    with pytest.raises(fp.FeatpatchError, match=r"pair 1: attention_mask is \[1, 1, 1, 0.* expected consecutive ones"):
        fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong, attention_mask=mask)
