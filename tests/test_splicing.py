"""Loss with SAEs spliced in, against hooked loops over one prompt at a time, and against SAELens' own evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from architectures import HOOKED, hooked
from sae_lens import SAE
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler
from small import Small
from test_architectures import dictionaries
from test_architectures import pairs as drawn

import featpatch as fp
from featpatch.splicing import Losses, Spliced

EXACT = 1e-10
PROMPTS = fp.Pairs(
    (
        fp.Pair((0, 5, 12, 9, 30, 7, 22), (0, 5, 13, 9, 30, 7, 22), (1,), (2,), special=frozenset({0})),
        fp.Pair((0, 8, 0, 33), (0, 8, 0, 34), (1,), (2,), special=frozenset({0, 2})),
        fp.Pair((14, 5, 21), (14, 6, 21), (1,), (2,)),
    )
)
"""Of different lengths, with special tokens at the start and in the middle."""


def measured(model: Any, saes: Any, prompts: Any = PROMPTS) -> Losses:
    return fp.loss_recovered(model, saes, prompts, progress=False)


def kept(pair: fp.Pair) -> list[int]:
    return [position for position in range(len(pair)) if position not in pair.special]


def by_hand(model: Any, hook: str, new: Callable[[fp.Pair, torch.Tensor], torch.Tensor] | None = None) -> float:
    """The mean loss over predictions, prompt by prompt, with the values of the positions that are not special exchanged."""
    losses = []
    for pair in PROMPTS:
        tokens = torch.tensor([pair.clean])
        old = oracle.activations(model, tokens)[hook]
        value = old.clone()
        if new is not None:
            value[:, kept(pair)] = new(pair, old)[:, kept(pair)]
        with torch.no_grad():
            logits = oracle.replaced(model, tokens, hook, old, value)
        losses += [
            float(F.cross_entropy(logits[0, at], tokens[0, at + 1]))
            for at in range(len(pair) - 1)
            if {at, at + 1} <= set(kept(pair))
        ]
    assert len(losses) == 5 + 0 + 2
    return float(np.mean(losses))


@torch.no_grad()
def reconstructed(model: Any, sae: SAE, pair: fp.Pair, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = oracle.activations(model, torch.tensor([pair.clean]))[oracle.hooks(sae)[0]]
    features = oracle.encode(sae, x)
    return features, oracle.decode(sae, features, x, like)


@pytest.mark.both
def test_losses_by_a_hooked_loop(small: Small) -> None:
    """At every kind of hook point: the residual stream, what is added to it, z, and the output of a transcoder."""
    oracle._activations.cache_clear()
    losses, model = measured(small.model, small.saes), small.model
    assert (losses.predictions, losses.positions) == (7, 6 + 2 + 3)
    assert len(losses.spliced) == len(small.saes)
    for sae, found in zip(small.saes, losses.spliced, strict=True):
        hook = oracle.hooks(sae)[1]
        values = [oracle.activations(model, torch.tensor([pair.clean]))[hook] for pair in PROMPTS]
        rows = torch.cat([value[0, kept(pair)] for pair, value in zip(PROMPTS, values, strict=True)])
        coded = [reconstructed(model, sae, pair, value) for pair, value in zip(PROMPTS, values, strict=True)]
        rebuilt = torch.cat([decoded[0, kept(pair)] for pair, (_, decoded) in zip(PROMPTS, coded, strict=True)])
        active = torch.cat([features[0, kept(pair)] for pair, (features, _) in zip(PROMPTS, coded, strict=True)])
        mean = rows.mean(0)
        expected = {
            "loss": by_hand(model, hook),
            "loss_sae": by_hand(model, hook, lambda pair, old, sae=sae: reconstructed(model, sae, pair, old)[1]),
            "loss_zero": by_hand(model, hook, lambda pair, old: torch.zeros_like(old)),
            "loss_mean": by_hand(model, hook, lambda pair, old, mean=mean: mean.expand_as(old)),
            "explained_variance": 1 - float((rows - rebuilt).square().sum() / (rows - mean).square().sum()),
            "l0": float(active.ne(0).sum(-1).double().mean()),
        }
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, abs=EXACT), (name, sae.cfg.metadata)
        zero, loss, spliced = (expected[name] for name in ("loss_zero", "loss", "loss_sae"))
        assert found.loss_recovered == pytest.approx((zero - spliced) / (zero - loss), abs=1e-8)


def test_as_saelens_evaluates() -> None:
    """Without special tokens its numbers are the same."""
    model = HOOKED["gpt2"]()
    tokens = torch.tensor([[5, 12, 9, 30, 7], [8, 3, 33, 2, 6]])
    prompts = fp.Pairs.from_tokens(tokens, tokens.flip(1), [1, 1], [2, 2])
    sae = next(sae for sae in dictionaries(model) if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre")
    (found,) = measured(model, sae, prompts).spliced
    theirs = get_recons_loss(sae, model, ActivationScaler(), tokens, compute_kl=False, compute_ce_loss=True)
    for ours, name in (("loss", "without_sae"), ("loss_sae", "with_sae"), ("loss_zero", "with_ablation")):
        assert getattr(found, ours) == pytest.approx(float(theirs[f"ce_loss_{name}"].mean()), abs=EXACT)


def test_texts_and_pairs_are_the_same_prompts() -> None:
    """Also in batches with padding, and in a model that looks both ways, in which no prompt is padded."""
    demo = fp.load_demo(progress=False)
    pairs = demo.pairs("ioi", n=3)
    sae, tokenizer = demo.saes[4], demo.model.tokenizer
    texts = [tokenizer.decode(pair.clean, skip_special_tokens=True) for pair in pairs]
    assert [tuple(tokenizer(text)["input_ids"]) for text in texts] == [pair.clean for pair in pairs]
    of_texts, of_pairs = (measured(demo.model, sae, prompts).spliced[0] for prompts in (texts, pairs))
    assert of_texts == of_pairs
    assert of_pairs.loss_recovered > 0.99 > 0.9 < of_pairs.explained_variance
    both_ways = hooked(act_fn="gelu", attention_dir="bidirectional")
    oracle._activations.cache_clear()
    sae = dictionaries(both_ways)[0]
    (found,) = measured(both_ways, sae).spliced
    assert found.loss == pytest.approx(by_hand(both_ways, sae.cfg.metadata.hook_name), abs=EXACT)


def test_hooks_are_removed_and_two_saes_of_a_hook_share_its_ablations(bridge: Small) -> None:
    before = [len(point._forward_hooks) for point in bridge.model.hook_dict.values()]
    first = bridge.at("blocks.1.hook_mlp_out")
    alone, again = measured(bridge.model, first), measured(bridge.model, [first, bridge.saes[-1]])
    assert [len(point._forward_hooks) for point in bridge.model.hook_dict.values()] == before
    assert alone.spliced[0] == again.spliced[0]
    assert again.spliced[1].loss_zero == alone.spliced[0].loss_zero


def test_the_table(bridge: Small) -> None:
    losses = measured(bridge.model, bridge.saes[:2])
    frame = losses.to_pandas()
    assert list(frame.columns) == [
        "sae", "loss", "loss_sae", "loss_zero", "loss_mean", "loss_recovered", "explained_variance", "l0"
    ]  # fmt: skip
    assert frame["loss_sae"].tolist() == [each.loss_sae for each in losses.spliced]
    assert repr(losses).startswith("cross-entropy in nats over 7 predictions\n")
    assert f"{losses.spliced[1].loss_sae:.3f}" in repr(losses)
    assert losses._repr_html_().count("<tr") == 3
    assert np.isnan(Spliced("a", 2.0, 2.0, 2.001, 2.0, 0.9, 3.0).loss_recovered), "zeros change nothing"
    assert Spliced("a", 2.0, 3.0, 4.0, 2.0, 0.9, 3.0).loss_recovered == 0.5


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ("a text", "prompts is a str: expected pairs, or a list of at least one text"),
        ([], "prompts is a list: expected pairs, or a list"),
        (["a text"], "the model has no tokenizer: expected one for texts"),
        (PROMPTS[1:2], "no prompt has two tokens in a row that are not special"),
        (fp.Pairs((fp.Pair((3,), (4,), (5,), (6,)),)), "no prompt has two tokens in a row"),
        (fp.Pairs((fp.Pair((3, 99), (4, 99), (5,), (6,)),)), "99"),
    ],
)
def test_bad_prompts(bridge: Small, prompts: Any, match: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=match):
        measured(bridge.model, bridge.saes[0], prompts)


def test_a_model_that_can_not_predict_its_input_is_refused() -> None:
    model = HOOKED["fewer outputs than inputs"]()
    with pytest.raises(fp.FeatpatchError, match=r"the prompts hold the token \d+, and the model predicts only 20 tokens"):
        measured(model, dictionaries(model)[0], drawn(20))
