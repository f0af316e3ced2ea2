"""What a unit of a feature adds: the weights' rows are taken only where decoding says the same."""

from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from small import Small, at

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae import codec
from featpatch.sae.codec import Behaviour
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.sae.sae_lens import SaeCodec


def found_in(small: Small) -> Dictionary:
    return dictionaries(wrap(small.model), small.saes[0])[0]


def probed(dictionary: Dictionary) -> torch.Tensor:
    return codec.probed(dictionary.codec, torch.arange(dictionary.d_sae))


def test_rows_are_what_decoding_adds(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only one of them is not, by little; counted in calls of `decode`."""
    dictionary = found_in(small)
    features = torch.arange(dictionary.d_sae)
    calls: list[int] = []
    decode = type(dictionary.codec).decode

    def counted(self: Any, features: torch.Tensor, state: Any) -> torch.Tensor:
        calls.append(len(features))
        return decode(self, features * wrong, state)

    monkeypatch.setattr(type(dictionary.codec), "decode", counted)
    wrong = torch.ones(dictionary.d_sae, dtype=torch.float64)
    torch.testing.assert_close(dictionary.directions(features), probed(dictionary))
    calls.clear()
    dictionary.directions(features)
    assert max(calls) == 1
    for factor in (1 + 1e-9, 0.0):
        wrong[3] = factor
        calls.clear()
        torch.testing.assert_close(dictionary.directions(features), probed(dictionary), atol=1e-14, rtol=0)
        assert dictionary.d_sae in calls


def test_a_common_factor_is_found(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = found_in(small)
    decode = type(dictionary.codec).decode
    monkeypatch.setattr(type(dictionary.codec), "decode", lambda self, f, state: decode(self, 2.5 * f, state))
    features = torch.tensor([4, 1])
    torch.testing.assert_close(dictionary.directions(features), probed(dictionary)[features])
    torch.testing.assert_close(dictionary.directions(features), 2.5 * small.saes[0].W_dec[features].detach())


def test_large_dictionaries_are_found_linear() -> None:
    """In float32 the rounding of a sum over all features would look like a bend."""
    torch.manual_seed(0)
    sae = TopKSAE(
        TopKSAEConfig(8, 2**20, "float32", k=8, rescale_acts_by_decoder_norm=False, metadata=at("blocks.0.hook_resid_pre"))
    )
    with torch.no_grad():
        behaviour = Behaviour.of(SaeCodec(sae, sae.W_dec), "large")
    assert behaviour.linear
    assert not behaviour.scaled


def test_a_feature_named_often(small: Small) -> None:
    """Named at several positions, a feature adds what it adds."""
    dictionary = found_in(small)
    expected = probed(dictionary)
    for times in range(1, 40):
        features = torch.tensor([5] * times + [2])
        torch.testing.assert_close(dictionary.directions(features), expected[features])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_direction_whose_entries_have_one_sign_is_patched(small: Small, sign: int) -> None:
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    found = fp.rank_features(
        small.model,
        fp.direction(sign * torch.linspace(0.1, 1, 16, dtype=torch.float64), "blocks.1.hook_resid_pre"),
        pairs,
        progress=False,
    )
    assert abs(found.where(kind="feature").pooled("recovery")[0]) > 1e-3


def test_dictionaries_of_ours_have_names_that_can_be_read() -> None:
    assert repr(fp.direction(torch.ones(4), "hook", name="answer")) == "dictionary at answer (hook), width 4"
