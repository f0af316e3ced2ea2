"""A model small enough to work out on paper, with an AND gate, an OR gate and a linear read-out.

One head attends uniformly and copies (W_V = W_O = 1), so that the last of T tokens receives the mean m of all embeddings x:

    stream after attention   s_T = x_T + m
    AND neuron               relu(s_0 + s_1 - 2 + 1)       OR neuron   1 - relu(1 - (s_0 + s_1))
    logit A = AND,  logit O = OR,  logit L = s_0 + s_1 / 2 - s_2 + 2 s_3,  logit Z = 0

Prompts have T = 2 tokens; the first is the same in both runs and embeds to 0, the second (the answer position) embeds to x,
so that m = x / 2 and s = 3/2 x. The dictionary's features are the coordinates 0, 1, 2; coordinate 3 is its error.
"""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp

SITE = "blocks.0.hook_resid_pre"
BLANK, CLEAN, CORRUPTED, A, O, L, Z = range(7)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=4, d_head=8, n_heads=1, d_mlp=2, d_vocab=7, act_fn="relu", normalization_type=None,
        dtype=torch.float64, seed=0,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[CLEAN, :4] = torch.tensor([2 / 3, 2 / 3, 0.0, 1.0], dtype=torch.float64)
        model.W_E[CORRUPTED, :4] = torch.tensor([0.0, 0.0, 2.0, 0.5], dtype=torch.float64)
        block = model.blocks[0]
        block.attn.W_V[0] = block.attn.W_O[0] = torch.eye(8, dtype=torch.float64)
        block.mlp.W_in[0] = torch.tensor([1.0, -1.0], dtype=torch.float64)
        block.mlp.W_in[1] = torch.tensor([1.0, -1.0], dtype=torch.float64)
        block.mlp.b_in[:] = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        block.mlp.W_out[0, 4] = 1.0
        block.mlp.W_out[1, 5] = -1.0
        model.unembed.W_U[4, A] = 1.0
        model.unembed.W_U[5, O] = 1.0
        model.unembed.b_U[O] = 1.0
        model.unembed.W_U[:4, L] = torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    return model


@pytest.fixture(scope="module")
def sae() -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(8, 3, "float64", metadata=SAEMetadata(hook_name=SITE)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[:3] = torch.eye(3, dtype=torch.float64)
        sae.W_dec[:, :3] = torch.eye(3, dtype=torch.float64)
    return sae


def effects(model: HookedTransformer, sae: StandardSAE, answer: int) -> fp.Effects:
    prompts = torch.tensor([[BLANK, CLEAN]]), torch.tensor([[BLANK, CORRUPTED]])
    return fp.rank_features(model, sae, fp.Pairs.from_tokens(*prompts, torch.tensor([answer]), torch.tensor([Z])))


def values(effects: fp.Effects, effect: str) -> list[float]:
    features = effects.where(kind="feature")
    assert [node.index for node in features.nodes] == [0, 1, 2]
    return [float(value) for value in features.pooled(effect)]


def test_linear_read_out_shares_the_effect(model: HookedTransformer, sae: StandardSAE) -> None:
    """Change of s is 3/2 (2/3, 2/3, -2, 1/2) = (1, 1, -3, 3/4), so L changes by 1 + 1/2 + 3 + 3/2 = 6."""
    table = effects(model, sae, L)
    for effect in ("recovery", "degradation"):
        assert values(table, effect) == pytest.approx([1 / 6, 1 / 12, 1 / 2], abs=1e-12)
        assert table.where(kind="all_features").pooled(effect)[0] == pytest.approx(3 / 4, abs=1e-12)
        assert table.where(kind="error").pooled(effect)[0] == pytest.approx(1 / 4, abs=1e-12)
        assert table.where(kind="activation").pooled(effect)[0] == pytest.approx(1, abs=1e-12)


def test_and_gate_each_input_is_necessary_and_none_sufficient(model: HookedTransformer, sae: StandardSAE) -> None:
    """Clean s_0 = s_1 = 1: relu(1) = 1. Corrupted: relu(-1) = 0. One input alone: relu(0) = 0."""
    table = effects(model, sae, A)
    assert values(table, "recovery") == pytest.approx([0, 0, 0], abs=1e-12)
    assert values(table, "degradation") == pytest.approx([1, 1, 0], abs=1e-12)
    assert table.where(kind="error").pooled("recovery")[0] == pytest.approx(0, abs=1e-12)


def test_or_gate_each_input_is_sufficient_and_none_necessary(model: HookedTransformer, sae: StandardSAE) -> None:
    """Clean: 1 - relu(1 - 2) = 1. Corrupted: 1 - relu(1) = 0. One input alone: 1 - relu(0) = 1."""
    table = effects(model, sae, O)
    assert values(table, "recovery") == pytest.approx([1, 1, 0], abs=1e-12)
    assert values(table, "degradation") == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_pooled_effect_is_the_ratio_of_means(model: HookedTransformer, sae: StandardSAE) -> None:
    """Two pairs, the second with the roles swapped: gaps 6 and -6 cancel and are refused; with L and O pooled, 6 and 1."""
    prompts = torch.tensor([[BLANK, CLEAN], [BLANK, CLEAN]]), torch.tensor([[BLANK, CORRUPTED], [BLANK, CORRUPTED]])
    both = fp.rank_features(model, sae, fp.Pairs.from_tokens(*prompts, torch.tensor([L, O]), torch.tensor([Z, Z])))
    assert values(both, "recovery") == pytest.approx([(1 + 1) / 7, (1 / 2 + 1) / 7, 3 / 7], abs=1e-12)
    assert both.per_pair("recovery")[0] == pytest.approx([1 / 6, 1], abs=1e-12)
    swapped = fp.Pairs.from_tokens(
        torch.tensor([[BLANK, CLEAN], [BLANK, CORRUPTED]]), torch.tensor([[BLANK, CORRUPTED], [BLANK, CLEAN]]),
        torch.tensor([L, L]), torch.tensor([Z, Z]),
    )  # fmt: skip
    with pytest.raises(fp.FeatpatchError, match="mean gap of"):
        fp.rank_features(model, sae, swapped)
