"""Bad input: every message names the value, the expectation and the next step."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig
from small import FEATURES, WIDTH, Small, at, randomised, small_bridge, standard
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

import featpatch as fp
from featpatch.errors import FeatpatchWarning, counted, listed
from featpatch.metrics import check_gap
from featpatch.model.transformer_lens import BridgeLens, wrap
from featpatch.pairs.pair import spans
from featpatch.pairs.tokens import PairsWarning

SITE = "blocks.1.hook_resid_pre"


def pairs_of(small: Small, **changed: torch.Tensor) -> fp.Pairs:
    return fp.Pairs.from_tokens(
        **{"clean": small.clean, "corrupted": small.corrupted, "correct": small.correct, "wrong": small.wrong, **changed}
    )


def words(text: str) -> list[int]:
    """A tokenizer: the length of each word."""
    return [len(word) for word in text.split()]


PROMPT = {"clean": ["a bb ccc"], "corrupted": ["a b ccc"], "correct": ["dddd"], "wrong": ["eeeee"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"corrupted": ["a b"]},
            r"pair 0: clean has 3 tokens and corrupted has 2: expected equal lengths.*the same number of tokens",
        ),
        ({"clean": []}, r"there are 0 of clean and 1 of corrupted and 1 of correct and 1 of wrong: expected equal numbers"),
        ({"correct": ["dddd"] * 2, "tags": [{}]}, r"there are 1 of clean and 2 of correct: .* add the missing ones"),
        ({key: [] for key in PROMPT}, r"there are no pairs: expected at least one"),
        ({"clean": [""], "corrupted": [""]}, r"pair 0: the clean prompt has no tokens"),
        ({"correct": ["two words"]}, r"answer 'two words' is 2 tokens \[3, 5\] after 'a bb ccc': expected exactly one; choose"),
        ({"correct": ["eeeee"]}, r"correct=\(5,\), wrong=\(5,\): expected no answer to be both"),
        ({"wrong": "eeeee"}, r"wrong='eeeee' with a list of clean prompts: expected a list .*; write wrong=\['eeeee', ...\]"),
        ({"correct": [[]]}, r"correct=\(\), wrong=\(5,\): expected at least one correct answer"),
        ({"labels": [{"S2": 3}]}, r"label 'S2': position 3 is outside a prompt of .* tokens: expected 0 to 2"),
    ],
)
def test_prompts(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_prompts(words, **{**PROMPT, **changed})


def test_prompts_without_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing checks annotations, as outside these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    tokenizer: Any = None
    with pytest.raises(
        fp.FeatpatchError,
        match="the tokenizer is a NoneType: expected a Hugging Face tokenizer, a function from text to token ids, or a model",
    ):
        fp.Pairs.from_prompts(tokenizer, **PROMPT)


def test_tokens_of_unequal_length(bridge: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match="pair 0: clean has 7 tokens and corrupted has 6"):
        pairs_of(bridge, corrupted=bridge.corrupted[:, 1:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json}\n", "line 1: '{not json}' is not JSON"),
        ('{"clean": "a"}\n', "line 1: .* lacks corrupted, correct, wrong: expected"),
        ('\n"a"\n', "line 2: .* is a str: expected one object per line"),
        ("\n", "is empty: expected one JSON object per line"),
        ('{"clean": null, "corrupted": "a", "correct": "b", "wrong": "c"}', "line 1: clean is None in .*: expected a string"),
        (
            '{"clean": "a", "corrupted": "a", "correct": 3, "wrong": "c"}',
            "correct is 3 in .*: expected a string; for answers, a string or a list",
        ),
        (
            '{"clean": "a", "corrupted": "b", "correct": "b", "wrong": "c", "lables": {}}',
            "'lables' in .*: expected only clean, .*, tags; put other information into tags; did you mean 'labels'?",
        ),
        (
            '{"clean": "a", "corrupted": "b", "correct": "b", "wrong": "c", "answer_position": 0}',
            "'answer_position' in .*: expected only clean, .*, tags; put",
        ),
        (
            '{"clean": [1], "corrupted": [2], "correct": [3], "wrong": [4], "answer_positoin": 0}',
            "'answer_positoin' in .*: expected only clean, .*, special, answer_position; put .* did you mean 'answer_position'?",
        ),
    ],
)
def test_pairs_files(tmp_path: Any, content: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.Pairs.from_jsonl(words, path)


def test_a_missing_pairs_file() -> None:
    with pytest.raises(fp.FeatpatchError, match="there is no file 'nowhere.jsonl': expected a JSON-lines file"):
        fp.Pairs.from_jsonl(words, "nowhere.jsonl")


def sae_at(hook: str, width: int = WIDTH, **options: Any) -> StandardSAE:
    return StandardSAE(StandardSAEConfig(width, FEATURES, "float64", metadata=at(hook), **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sae_at("blocks.7.hook_resid_pre"),
            r"the model has no hook 'blocks.7.hook_resid_pre': expected .*hook_resid_pre",
        ),
        (
            lambda: sae_at("blocks.1.hook_resid_prf"),
            r"the model has no hook 'blocks.1.hook_resid_prf': .*blocks.1.hook_resid_pre",
        ),
        (lambda: sae_at("transformer.h.1"), r"such as blocks.0.hook_attn_out, blocks.0.hook_mlp_out, blocks.0.hook_resid_post"),
        (lambda: sae_at(SITE, 8), r"reads 8 values and the activation at 'blocks.1.hook_resid_pre' has 16: expected an SAE"),
        (lambda: sae_at("blocks.1.mlp.hook_post"), r"reads 16 values and the activation at .* has 32"),
        (
            lambda: sae_at("blocks.1.hook_mlp_in"),
            r"names the hook 'blocks.1.hook_mlp_in'.*set .*to 'blocks.1.hook_resid_mid' or to 'blocks.1.mlp.hook_in'",
        ),
        (
            lambda: fp.dictionaries.identity(small_bridge().model, "blocks.1.hook_mlp_in"),
            r"'blocks.1.hook_mlp_in' exists but was not reached .*before the norm; the input of the MLP is at 'blocks.1.mlp.hook_in'",
        ),
        (
            lambda: fp.dictionaries.identity(small_bridge().model, "blocks.1.hook_attn_in"),
            r"'blocks.1.hook_attn_in' exists but was not reached .*set_use_attn_in\(True\).*before the norm",
        ),
        (
            lambda: sae_at("hook_embed"),
            r"'hook_embed', to which this model adds positions.*'blocks.0.hook_resid_pre' holds the result",
        ),
        (lambda: sae_at(SITE, normalize_activations="expected_average_only_in"), r"scale is not folded into.*call sae.fold"),
        (lambda: StandardSAE(StandardSAEConfig(WIDTH, FEATURES)), r"names no hook point: .* set sae.cfg.metadata.hook_name"),
        (list, r"there are no SAEs: expected at least one"),
        (
            lambda: "gpt2-small-res-jb",
            r"str is not a sae-lens SAE: expected one.*; load a .* fp.load_sae\('gpt2-small-res-jb'\)",
        ),
    ],
)
def test_saes_that_do_not_fit(bridge: Small, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_features(bridge.model, make(), pairs_of(bridge))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": ["S2"]}, r"a pair has no label 'S2': expected one of \(it has no labels\); give labels.* such as -1"),
        ({"positions": "S2,end"}, r"positions='S2,end': .*; write positions=\['S2', 'end'\]"),
        ({"positions": [7]}, r"position 7 is outside a prompt of 7 tokens: expected 0 to 6"),
        ({"positions": "some"}, r"positions='some': expected 'all', 'each' or a list"),
        ({"positions": []}, r"positions is empty"),
        ({"metric": "f1"}, r"metric 'f1' is unknown: expected one of logit_diff, logit, prob_diff"),
        (
            {"metric": lambda logits, correct, wrong: logits.mean()},
            r"metric '<lambda>' returned torch.float64 of shape \(\) for 1 rows: expected one real value per row",
        ),
        ({"metric": lambda logits, correct, wrong: logits[:, 0] * torch.nan}, r"metric '<lambda>' returned NaN"),
        (
            {"metric": lambda logits, correct, wrong: logits[:, 0] * 0 + 2},
            r"a mean gap of 0: expected a gap .*choose other corruptions",
        ),
        ({"directions": ()}, r"directions=\(\): expected"),
        ({"directions": ("forward",)}, r"directions=\('forward',\): expected 'denoising', 'noising' or both"),
    ],
)
def test_options(bridge: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge), **options)


@pytest.mark.parametrize(
    ("gap", "said"), [(0.05, None), (0.015, "a mean gap of 0.015; 0 of 2 pairs have a gap of the other sign: effects")]
)
def test_a_small_gap_is_warned_of(gap: float, said: str | None) -> None:
    with pytest.warns(FeatpatchWarning, match=said) if said else nullcontext():
        check_gap("logit_diff", np.array([1.0, 1.0]), np.array([1.0, 1.0]) - gap)


def test_gaps_that_cancel_are_warned_of() -> None:
    """As with answers that are swapped in a quarter of the pairs, but not in an eighth."""
    clean = np.array([12.0] * 6 + [-12.0] * 2)
    with pytest.warns(FeatpatchWarning, match="a mean gap of 6; 2 of 8 pairs have a gap of the other sign: effects are shares"):
        check_gap("logit_diff", clean, 0 * clean)
    check_gap("logit_diff", np.abs(clean) * [1, 1, 1, 1, 1, 1, 1, -1], 0 * clean)


def test_a_gap_near_zero_is_refused(bridge: Small) -> None:
    with pytest.warns(PairsWarning, match="which holds for 3 of 3 pairs: expected"):
        pairs = pairs_of(bridge, corrupted=bridge.clean)
    with pytest.raises(fp.FeatpatchError, match="expected corrupted prompts that differ"):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs)


def test_equal_prompts_are_pointed_out(tmp_path: Path) -> None:
    """Where corrupted prompts are given; a file may hold prompts without any."""
    same, other = {"clean": "a b", "correct": "cc", "wrong": "ddd"}, {"corrupted": "a bb"}
    rows = [same | other, same | {"corrupted": "a b"}]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    message = r"pair 1: the clean and the corrupted prompt are the same, which holds for 1 of 2 pairs: .* leave corrupted= out"
    with pytest.warns(PairsWarning, match=message):
        fp.Pairs.from_prompts(words, **columns)
    with pytest.warns(PairsWarning, match="2 of 2 pairs"):
        fp.Pairs.from_prompts(words, **{**columns, "corrupted": columns["clean"]})
    assert len(fp.Pairs.from_pandas(words, pd.DataFrame(rows))) == 2
    without = fp.Pairs.from_prompts(words, **{name: columns[name] for name in same})
    assert len(fp.Pairs.from_jsonl(words, without.to_jsonl(tmp_path / "pairs.jsonl"))) == 2


def test_answers_outside_the_vocabulary(bridge: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"answers \[99, 4\] are outside the model's vocabulary of 40"):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge, correct=torch.tensor([99, 5, 7])))


def test_nan_in_activations() -> None:
    broken = small_bridge()
    with torch.no_grad():
        broken.model.blocks[0].mlp.out.original_component.bias[0] = torch.nan
    with pytest.raises(
        fp.FeatpatchError, match=r"activation at 'blocks.1.hook_resid_pre' contains NaN.*check the model's weights"
    ):
        fp.rank_features(broken.model, broken.at(SITE), pairs_of(broken))


def test_nan_in_an_sae(bridge: Small) -> None:
    sae = standard(SITE, 0)
    sae.W_enc.data[0, 0] = torch.nan
    with pytest.raises(fp.FeatpatchError, match="1 of [0-9]+ values of W_enc are NaN or infinite: expected finite"):
        fp.rank_features(bridge.model, sae, pairs_of(bridge))


def test_other_models() -> None:
    with pytest.raises(fp.FeatpatchError, match="the model is a Linear: expected a TransformerBridge or a HookedTransformer"):
        fp.rank_features(torch.nn.Linear(2, 2), standard(SITE, 0), fp.Pairs.from_prompts(words, **PROMPT))


def test_a_model_in_training_mode() -> None:
    small = small_bridge()
    small.model.train()
    with pytest.raises(fp.FeatpatchError, match=r"training mode with dropout: .*call model.eval\(\)"):
        fp.rank_features(small.model, small.at(SITE), pairs_of(small))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            lambda: fp.Node(SITE, "feature", FEATURES),
            rf"feature {FEATURES} of .* is out of range: expected 0 to {FEATURES - 1}",
        ),
        (lambda: fp.Node(SITE, "feature", -1), r"feature index -1 is negative"),
        (lambda: fp.Node(SITE, "feature"), r"kind 'feature' got index None: expected an index, 0 or more, for feature, head, "),
        (lambda: fp.Node(SITE, "error", 3), r"kind 'error' got index 3"),
        (lambda: fp.Node(SITE, "error", None, 7), r"is outside a prompt of 7 tokens: expected 0 to 6"),
        (lambda: fp.Node(SITE, "error", None, "S2"), r"is at a label: expected a token index"),
        (lambda: fp.Node("blocks.9.hook_resid_pre", "activation"), r"the model has no hook"),
        (lambda: fp.Node("blocks.0.hook_mlp_out", "error"), r"belongs to 0 of the SAEs"),
    ],
)
def test_nodes(bridge: Small, node: Callable[[], fp.Node], message: str) -> None:
    options = {"source": bridge.clean, "base": bridge.corrupted, "saes": bridge.at(SITE)}
    with pytest.raises(fp.FeatpatchError, match=message), fp.do(bridge.model, fp.Patch((node(),)), **options):
        bridge.model(bridge.corrupted)


def test_patches_from_other_than_tokens(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing checks annotations, as outside these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    options: dict[str, Any] = {"source": bridge.clean, "base": bridge.corrupted}
    for changed, message in (
        ({"source": "a text"}, "source is a str: expected a tensor of token ids, e.g. model.to_tokens"),
        ({"base": bridge.corrupted.tolist()}, "base is a list: expected a tensor of token ids"),
    ):
        patch = fp.Patch((fp.Node(SITE, "activation"),))
        with pytest.raises(fp.FeatpatchError, match=message), fp.do(bridge.model, patch, **{**options, **changed}):
            bridge.model(bridge.corrupted)


def test_patches(bridge: Small) -> None:
    whole = fp.Node(SITE, "activation")
    with pytest.raises(fp.FeatpatchError, match=r"names blocks.1.hook_resid_pre activation @ all twice"):
        fp.Patch((whole, whole))
    options: dict[str, Any] = {"source": bridge.clean, "base": bridge.corrupted}
    for patch, changed, message in [
        (fp.Patch(()), {}, "the patch has no nodes"),
        (fp.Patch((whole,)), {"how": "copy"}, "how='copy': expected 'add' or 'set'"),
        (fp.Patch((whole,)), {"how": "set"}, "expected base tokens with how='add', and base=None with how='set'"),
        (fp.Patch((whole,)), {"base": bridge.corrupted[:, :5]}, r"base is \(3, 5\) and source is \(3, 7\)"),
    ]:
        with pytest.raises(fp.FeatpatchError, match=message), fp.do(bridge.model, patch, **{**options, **changed}):
            bridge.model(bridge.corrupted)


def test_a_patch_that_never_fires(bridge: Small) -> None:
    """Law 9."""
    options = {"source": bridge.clean, "base": bridge.corrupted}
    patch = fp.Patch((fp.Node(SITE, "activation"),))
    with (
        pytest.raises(fp.FeatpatchError, match=f"the patch at {SITE} was never applied"),
        fp.do(bridge.model, patch, **options),
    ):
        pass
    with (
        pytest.raises(fp.FeatpatchError, match="called with 4 tokens inside a patch of 7"),
        fp.do(bridge.model, patch, **options),
    ):
        bridge.model(bridge.corrupted[:, :4])
    with (
        pytest.raises(fp.FeatpatchError, match="called with 1 prompt inside a patch of 3"),
        fp.do(bridge.model, patch, **options),
    ):
        bridge.model(bridge.corrupted[:1])


def test_a_sweep_whose_patch_does_not_fire(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 9, inside the engine."""
    monkeypatch.setattr(
        BridgeLens, "resume", lambda lens, layer, resid, tokens, answers: tokens[:, 3, None] * torch.arange(40.0)
    )
    message = f"the hook '{SITE}' was called 0 times in one forward pass: expected once"
    with pytest.warns(fp.SlowPathWarning, match=message), pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge))


def test_a_sweep_whose_patch_fires_twice(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = BridgeLens.resume

    def again(lens: BridgeLens, *args: Any) -> torch.Tensor:
        resume(lens, *args)
        return resume(lens, *args)

    monkeypatch.setattr(BridgeLens, "resume", again)
    message = f"the hook '{SITE}' was called 2 times in one forward pass: expected once"
    with pytest.warns(fp.SlowPathWarning, match=message), pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge))


def test_an_effects_file_that_is_none(tmp_path: Any) -> None:
    with pytest.raises(fp.FeatpatchError, match="there is no effects file"):
        fp.Effects.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header}..")
    with pytest.raises(fp.FeatpatchError, match="is damaged"):
        fp.Effects.load(tmp_path / "bad.safetensors")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="rank_neurons"):
        fp.rank_neurons  # noqa: B018


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clean": torch.full((3, 7), 40)}, r"pair 0 has token ids from \d+ to 40: expected 0 to 39"),
        ({"correct": torch.tensor([-1, 2, 3])}, "pair 0: correct holds -1: expected token ids, integers from 0 on"),
        ({"correct": torch.tensor([40, 2, 3])}, r"pair 0: answers \[40, 4\] are outside the model's vocabulary of 40"),
        (
            {"clean": torch.ones(3, 17).long(), "corrupted": torch.full((3, 17), 2)},
            r"pair 0 has 17 tokens: expected at most 16",
        ),
    ],
)
def test_tokens_that_the_model_does_not_know(bridge: Small, changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge, **changed))


@pytest.mark.parametrize(
    ("positions", "message"),
    [([1.5], r"position 1.5 is a float: expected a label or an index"), ([None], r"position None is a NoneType: expected")],
)
def test_positions_that_are_none(bridge: Small, positions: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        spans.__wrapped__(pairs_of(bridge)[0], positions)  # type: ignore[attr-defined]


def test_types_that_only_a_type_checker_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checker that runs in these tests: numpy positions become plain numbers, other types are refused."""
    program = """
import numpy as np, featpatch as fp
from featpatch.pairs.pair import spans
pair, node = fp.Pair((1, 2), (1, 3), (4,), (5,)), fp.Node("blocks.0.hook_resid_pre", "activation")
assert {type(key) for key in spans(pair, [np.int64(1)])} == {int}
for bad, message in (
    (lambda: fp.Pair((1,), (2,), (3,), (4,), labels={"S2": "0"}), "label 'S2' is at '0': expected an integer"),
    (lambda: fp.Node("blocks.0.hook_resid_pre", "latent"), "node kind 'latent' is unknown: expected one of feature, error"),
    (lambda: fp.rank_components(None, [pair]), "pairs is a list: expected fp.Pairs"),
    (lambda: fp.ablate(None, [pair]), "pairs is a list: expected fp.Pairs"),
    (lambda: fp.Patch(node), "expected a list of Node"),
    (lambda: fp.Patch([node, "x"]), "expected a list of Node"),
    (lambda: fp.do(None, node, pair=pair).__enter__(), "patch is of type Node: expected an fp.Patch, which holds the nodes to patch; write"),
    (lambda: fp.feature([object()], 3), "pass a single SAE of the list here"),
    (lambda: spans(pair, 3), "positions=3: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]; write positions=[3]"),
    (lambda: fp.rank_features(None, None, [pair]), "pairs is a list: expected fp.Pairs"),
    (lambda: fp.check(None, None, None), "pairs is a NoneType: expected fp.Pairs, such as fp.Pairs.from_prompts"),
    (lambda: fp.check(None, None, [pair]), "pairs is a list: expected fp.Pairs"),
):
    try:
        bad()
    except fp.FeatpatchError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    exec(program, {})


def test_a_training_dictionary_that_looks_at_several_rows(bridge: Small) -> None:
    config = BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, dtype="float64", k=3.0, metadata=at(SITE))
    with pytest.raises(fp.FeatpatchError, match=r"a BatchTopKTrainingSAE encodes a row by its rank in the batch"):
        fp.rank_features(bridge.model, randomised(BatchTopKTrainingSAE(config), 1), pairs_of(bridge))


def test_dropout_that_is_no_module() -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, attention_dropout=0.5
    )
    model = LlamaForCausalLM(config).train()
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config, tokenizer=None, device="cpu")
    with pytest.raises(
        fp.FeatpatchError,
        match=r"training mode with dropout: expected evaluation mode, so that runs are repeatable; call model.eval",
    ):
        wrap(bridge.train())


def test_overlapping_nodes_and_patches(bridge: Small) -> None:
    whole, features = fp.Node(SITE, "activation", None, 3), fp.Node(SITE, "all_features")
    options = {"source": bridge.clean, "base": bridge.corrupted, "saes": bridge.at(SITE)}
    for nodes in ((whole, features), (features, whole), (features, fp.Node(SITE, "error"), whole)):
        with pytest.raises(fp.FeatpatchError, match="overlaps other nodes"):
            fp.do(bridge.model, fp.Patch(nodes), **options).__enter__()
    with fp.do(bridge.model, fp.Patch((whole,)), **options):
        with pytest.raises(fp.FeatpatchError, match="the model is patched already"):
            fp.do(bridge.model, fp.Patch((features,)), **options).__enter__()
        bridge.model(bridge.corrupted)


def test_rows_and_pairs_that_are_not_there(bridge: Small) -> None:
    effects = fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge))
    mask = effects.pooled("recovery") > 0
    assert effects.take(mask).nodes == tuple(node for node, kept in zip(effects.nodes, mask, strict=True) if kept)
    for rows in ([0, 0], [-1], [len(effects)]):
        with pytest.raises(fp.FeatpatchError, match="expected indices from 0 to"):
            effects.take(rows)
    with pytest.raises(fp.FeatpatchError, match="pairs=.*: expected indices from 0 to 2"):
        effects.of_pairs([3])
    assert effects.of_pairs([0, 2]).metadata["of_pairs"] == [0, 2]
    assert " rows</p>" in effects._repr_html_()


def test_counts_and_lists_are_phrases() -> None:
    assert [counted(number, "pair") for number in (0, 1, 1000)] == ["0 pairs", "1 pair", "1,000 pairs"]
    assert [listed("abcd", most) for most in (2, 4)] == ["a, b and 2 more", "a, b, c, d"]
