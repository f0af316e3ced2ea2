"""Models and SAEs by name from a hub on this machine, by folder, and as objects."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from commands import run as command
from hub import Hub, serving
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sae_lens import HookedSAETransformer, SAETransformerBridge, StandardSAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file
from small import FEATURES, Small, at, standard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedEncoder, HookedEncoderDecoder, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import featpatch as fp
from featpatch.errors import FeatpatchWarning
from featpatch.pairs.tokens import PairsWarning

WORDS = [
    "<bos>",
    "<unk>",
    *["when", "Mary", "and", "John", "went", "to", "the", "store", "gave", "a", "drink", "Anna", "Paul", "book"],
]
HOOK = "blocks.8.hook_resid_pre"
RELEASE = "gpt2-small-res-jb"
REPOSITORY = "jbloom/GPT2-Small-SAEs-Reformatted"
PAIRS = [
    {"clean": "when Mary and John went John gave a drink to", "corrupted": "when Mary and John went Mary gave a drink to",
     "correct": "Mary", "wrong": "John", "labels": {"S2": 6}},
]  # fmt: skip


def save_model(folder: Path) -> GPT2LMHeadModel:
    """A model of nine layers, none of its norms trivial, with a tokenizer that puts <bos> first."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=9, n_head=2, bos_token_id=0, eos_token_id=0,
                        initializer_range=0.2)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>", add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    return model


def save_sae(folder: Path, hook: str = HOOK, **options: Any) -> StandardSAE:
    sae = standard(hook, 3, **options).to(dtype=torch.float32)
    sae.cfg.metadata.model_name = "gpt2-small"
    sae.save_model(folder)
    return sae


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    save_model(root / "model")
    save_sae(root / "saes" / HOOK)
    old = {"model_name": "gpt2-small", "hook_point": HOOK, "hook_point_layer": 8, "d_in": 16, "d_sae": FEATURES,
           "dtype": "torch.float32", "device": "cpu", "context_size": 128}  # fmt: skip
    (root / "saes" / HOOK / "cfg.json").write_text(json.dumps(old))
    save_sae(root / "own" / "layer_2", "blocks.2.hook_mlp_out")
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return root


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[Hub]:
    repositories = {
        "gpt2": root / "model", "openai-community/gpt2": root / "model", REPOSITORY: root / "saes", "someone/own": root / "own",
    }  # fmt: skip
    with serving(repositories) as served:
        yield served


def run(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in another process, since the hub's address is read when huggingface_hub is imported."""
    program = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)


MISSING = ("nobody/nothing", "someone/own/layer_7", "someone/nothing/layer_7")
DOWNLOAD = """
import json, sys
import featpatch as fp
loaded = fp.load("gpt2", saes=["gpt2-small-res-jb/blocks.8.hook_resid_pre", "someone/own/layer_2"], processing=[])
print(loaded.check)
model, saes = loaded
pairs = fp.Pairs.from_jsonl(model.tokenizer, sys.argv[1])
effects = fp.rank_features(model, saes, pairs, progress=False)
claimed = saes[0].cfg.metadata.explained_variance
print(json.dumps([[str(node) for node in effects.nodes], effects.denoised.tolist(), pairs[0].clean, claimed]))
"""


@pytest.fixture(scope="module")
def downloaded(hub: Hub, root: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One process that loads from the hub what is there, and then what is not."""
    program = DOWNLOAD + REFUSALS.replace("sys.argv[1:]", "sys.argv[2:]")
    return run(program, hub.environment(tmp_path_factory.mktemp("home")), str(root / "pairs.jsonl"), *MISSING)


def test_downloads_give_what_the_folders_give(hub: Hub, root: Path, downloaded: "subprocess.CompletedProcess[str]") -> None:
    done = downloaded
    assert done.returncode == 0, done.stderr
    assert "check on" in done.stdout
    nodes, denoised, tokens, claimed = json.loads(done.stdout.partition("\nrefused: ")[0].splitlines()[-1])
    model, saes = fp.load(root / "model", [root / "saes" / HOOK, root / "own" / "layer_2"], check=False)
    effects = fp.rank_features(model, saes, fp.Pairs.from_jsonl(model.tokenizer, root / "pairs.jsonl"), progress=False)
    assert nodes == [str(node) for node in effects.nodes]
    assert denoised == pytest.approx(effects.denoised.tolist(), abs=1e-5)
    assert tokens[0] == 0, "BOS comes first"
    assert claimed == get_pretrained_saes_directory()[RELEASE].expected_var_explained[HOOK]
    for file in (r"/gpt2/resolve/\w+/model.safetensors", rf"/{REPOSITORY}/resolve/main/{HOOK}/sae_weights.safetensors"):
        assert any(re.fullmatch(f"GET {file}", request) for request in hub.requests), file


@pytest.mark.extended
def test_the_command_line_downloads_and_processes_the_weights_as_the_sae_says(hub: Hub, root: Path, tmp_path: Path) -> None:
    arguments = ["rank", "--model", "gpt2", "--sae", f"{RELEASE}/{HOOK}", "--pairs", str(root / "pairs.jsonl"), "--out",
                 str(tmp_path / "out")]  # fmt: skip
    done = run("from featpatch.cli import app; app()", hub.environment(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    assert "weights center_writing_weights" in done.stdout
    assert (tmp_path / "out" / "effects.csv").is_file()


REFUSALS = """
import sys
import featpatch as fp
for name in sys.argv[1:]:
    try:
        fp.load_sae(name) if "/layer_" in name or "/blocks" in name else fp.load(name)
    except fp.FeatpatchError as error:
        print("refused:", error)
"""


def refusals(environment: dict[str, str], *names: str) -> list[str]:
    """What loading each of the names says."""
    return refused(run(REFUSALS, environment, *names), *names)


def refused(done: subprocess.CompletedProcess[str], *names: str) -> list[str]:
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("refused: ") for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(said) == len(names)
    for text in said:
        assert "without network access, download it on another machine (`hf download NAME --local-dir FOLDER`)" in text
    return said


def test_what_the_hub_does_not_have(downloaded: "subprocess.CompletedProcess[str]") -> None:
    model, file, repository = refused(downloaded, *MISSING)
    assert model.startswith("the model 'nobody/nothing' can't be loaded (OSError: nobody/nothing is not a local folder")
    assert file.startswith("the SAE 'someone/own/layer_7' can't be loaded (RemoteEntryNotFoundError: ")
    assert repository.startswith("the SAE 'someone/nothing/layer_7' can't be loaded (RepositoryNotFoundError: ")


@pytest.mark.extended
def test_without_a_network(hub: Hub, tmp_path: Path) -> None:
    model, sae = refusals({**hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"}, "gpt2", f"{RELEASE}/{HOOK}")
    assert model.startswith("the model 'gpt2' can't be loaded (OSError: ")
    assert sae.startswith(f"the SAE '{RELEASE}/{HOOK}' can't be loaded (LocalEntryNotFoundError: ")


@pytest.mark.extended
def test_with_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path) -> None:
    environment = {**hub.environment(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    (sae,) = refusals(environment, f"{RELEASE}/{HOOK}")
    assert sae.startswith(f"the SAE '{RELEASE}/{HOOK}' can't be loaded (LocalEntryNotFoundError: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{RELEASE}/blocks.77", "has no SAE 'blocks.77': expected one of its 13, such as gpt2-small-res-jb/blocks.0"),
        (RELEASE, "release 'gpt2-small-res-jb' has no SAE ''"),
        ("gpt2-small-res", r"there is no SAE 'gpt2-small-res': expected a folder .* \(releases such as gpt2-small-res-jb"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_0", "the SAE .*layer_0' can't be loaded"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_99", "has no SAE 'layer_99': expected one of its 26"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(name)


def test_objects_are_taken_as_they_are(root: Path, bridge: Small) -> None:
    """All of them give what the folder gives; HookedSAETransformer is not of the folder's weights."""
    sae = fp.load_sae(root / "saes" / HOOK)
    with pytest.warns(FeatpatchWarning, match="does not fit"):
        loaded = fp.load(root / "model", sae)
    expected = loaded.model
    assert loaded.check is not None
    tokens = torch.tensor([expected.tokenizer("when Mary and John went").input_ids])
    hugging_face = GPT2LMHeadModel.from_pretrained(root / "model", attn_implementation="eager")
    made = [
        fp.load(hugging_face, sae, tokenizer=expected.tokenizer, check=False),
        fp.load(SAETransformerBridge.boot_transformers(str(root / "model"), device="cpu"), sae, check=False),
    ]
    for model, saes in made:
        assert saes == [sae]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), expected(tokens), rtol=0, atol=1e-6)
        assert fp.check(model, saes, fp.Pairs.from_jsonl(expected.tokenizer, root / "pairs.jsonl")).fits[0].whole_site < 1e-5
    assert fp.load(bridge.model, bridge.saes, check=False).model is bridge.model


def test_a_hooked_sae_transformer(bridge: Small) -> None:
    """It has `mlp.hook_in`, as the transcoders of the bridge name it."""
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_mlp=32, d_vocab=40, act_fn="gelu", dtype=torch.float64, seed=1
    )
    model = HookedSAETransformer(config).eval()
    pairs = fp.Pairs.from_tokens(*_tokens(bridge))
    effects = fp.rank_features(model, [bridge.at("blocks.0.hook_resid_pre"), bridge.saes[-1]], pairs, progress=False)
    whole = effects.where(kind="activation")
    assert {node.site for node in whole.nodes} == {"blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"}
    assert whole.pooled("recovery")[0] == pytest.approx(1, abs=1e-10)
    model.add_sae(bridge.at("blocks.0.hook_resid_pre"))
    with pytest.raises(fp.FeatpatchError, match=r"SAEs are attached to the model at blocks.0.hook_resid_pre.*reset_saes"):
        fp.rank_features(model, bridge.at("blocks.0.hook_resid_pre"), pairs)


@pytest.mark.parametrize("where", ["activation_scaler.json", "metadata", "argument"])
def test_a_scale_from_disk_is_folded_in(tmp_path: Path, where: str) -> None:
    folded = save_sae(tmp_path / "folded")
    folded.fold_activation_norm_scaling_factor(0.25)
    sae = standard(HOOK, 3, normalize_activations="expected_average_only_in").to(dtype=torch.float32)
    if where == "metadata":
        sae.cfg.metadata.norm_scaling_factor = 0.25
    sae.save_model(tmp_path / "sae")
    if where == "activation_scaler.json":
        ActivationScaler(scaling_factor=0.25).save(str(tmp_path / "sae" / where))
    loaded = fp.load_sae(tmp_path / "sae", norm_scaling_factor=0.25 if where == "argument" else None)
    assert loaded.cfg.normalize_activations == "none"
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(loaded(x), folded(x))
    torch.testing.assert_close(loaded.encode(x), folded.encode(x))


def test_whitening_from_disk_is_folded_in(tmp_path: Path, bridge: Small) -> None:
    sae = standard("blocks.1.hook_resid_pre", 3, normalize_activations="covariance_whitening").to(dtype=torch.float32)
    sae.save_model(tmp_path)
    with pytest.raises(fp.FeatpatchError, match="covariance_whitening' and its whitening is not folded into"):
        fp.check(bridge.model, fp.load_sae(tmp_path), fp.Pairs.from_tokens(*_tokens(bridge)))
    matrix = torch.randn(16, 16, dtype=torch.float64)
    scaler = ActivationScaler(whitening=ActivationWhitening(torch.randn(16, dtype=torch.float64), matrix, matrix.inverse()))
    scaler.save(str(tmp_path / "activation_scaler.json"))
    loaded = fp.load_sae(tmp_path)
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(loaded(x), scaler.unscale(sae(scaler(x))), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3}, "the model is a int: expected a name, a folder"),
        ({"model": "missing/folder/of/model"}, "the model 'missing/folder/of/model' can't be loaded"),
        ({"dtype": "float31"}, "dtype='float31': expected one of float64, float32, bfloat16"),
        ({"device": "cuda:77"}, "device 'cuda:77' can't be used .* that torch finds on this machine: cpu.*; pass one"),
        ({"tokenizer": "folder"}, r"tokenizer='folder' is a str: .* pass tokenizer=AutoTokenizer.from_pretrained\('folder'\)"),
        ({"processing": ["fold"]}, r"processing=\['fold'\]: expected a list of some of fold_ln"),
        ({"processing": ["fold"], "model": 3}, r"processing=\['fold'\]: expected a list of some of fold_ln"),
        ({"processing": "fold_ln"}, "processing='fold_ln': expected a list of some of fold_ln"),
        ({"dtype": ""}, "dtype='': expected one of float64"),
        ({"model": torch.nn.ReLU()}, "the model is a ReLU: expected a name, a folder"),
        ({"model": GPT2LMHeadModel}, "GPT2LMHeadModel is a class: expected an instance of it"),
    ],
)
def test_unusable_requests(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load(**{"model": root / "model", **options})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modle", r"'./modle' does not exist \(did you mean 'model'\?\): expected the folder of a saved {}"),
        ("{root}/modle", r"'{root}/modle' does not exist \(did you mean '{root}/model'\?\): expected the folder of a saved {}"),
        ("~nobody-here/it", "'~nobody-here/it' does not exist: expected the folder of a saved {}"),
        ("~/nothing/like/it", "'~/nothing/like/it' does not exist: expected the folder of a saved {}"),
        ("modle", r"(?s)'modle'.*a folder.*\(did you mean 'model'\?\)"),
    ],
)
def test_misspelt_folders(root: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can only be a folder is looked for nowhere else."""
    monkeypatch.chdir(root)
    named = name.format(root=root)
    for what, load in (("model", fp.load), ("SAE", fp.load_sae)):
        with pytest.raises(fp.FeatpatchError, match=message.format(what, root=root)):
            load(named)


def test_weights_that_can_not_be_centred(tmp_path: Path, root: Path) -> None:
    """RMSNorm keeps the mean; TransformerLens leaves such weights as they are, and says nothing."""
    tokenizer = fp.load(root / "model").model.tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    with pytest.raises(fp.FeatpatchError, match="did not centre the weights of this architecture"):
        fp.load(LlamaForCausalLM(config), tokenizer=tokenizer, processing=["center_writing_weights"])


def test_a_tokenizer_without_english(root: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    inner = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1, "A": 2, "C": 3}, unk_token="<unk>"))
    letters = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>", add_bos_token=True)
    with pytest.warns(FeatpatchWarning, match="the SAEs were not checked, because the built-in sentences don't work with"):
        loaded = fp.load(model, fp.load_sae(root / "saes" / HOOK), tokenizer=letters)
    assert loaded.check is None


def test_a_folder_of_something_else(root: Path) -> None:
    model, sae = root / "model", root / "saes" / HOOK
    with pytest.raises(
        fp.FeatpatchError, match=r"no cfg.json in .*, which holds 'config.json', .*: expected the folder of a saved SAE"
    ):
        fp.load_sae(model)
    with pytest.raises(
        fp.FeatpatchError, match=r"no config.json in .*, which holds 'cfg.json', .*; give the path .* the model's"
    ):
        fp.load(sae)


def test_the_self_check_adds_the_bos_of_the_model(root: Path) -> None:
    """A tokenizer that adds none itself, for which TransformerLens does."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = fp.load(GPT2LMHeadModel.from_pretrained(root / "model"), fp.load_sae(root / "saes" / HOOK), tokenizer=bare)
    assert loaded.check is not None
    assert not [warning for warning in caught if issubclass(warning.category, PairsWarning)]


def test_what_a_model_in_memory_has_no_use_for(root: Path, bridge: Small) -> None:
    tokenizer = fp.load(root / "model").model.tokenizer
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    given: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (bridge.model, {"tokenizer": tokenizer}, "tokenizer=.* with a TransformerBridge: expected None, because the model is"),
        (bridge.model, {"processing": ["fold_ln"]}, "processing=.* with a TransformerBridge: expected None"),
        (bridge.model, {"processing": ["nonsense"]}, "processing=.*: expected a list of some of fold_ln"),
        (bridge.model, {"dtype": "float32"}, "dtype='float32' with a TransformerBridge: expected None"),
        (bridge.model, {"device": "meta"}, "device='meta' with a TransformerBridge on cpu: expected the device of the model"),
        (model, {"dtype": "bfloat16", "tokenizer": tokenizer}, "dtype='bfloat16' with a GPT2LMHeadModel: expected None"),
    )
    for source, options, message in given:
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.load(source, **options)
    assert fp.load(bridge.model, device="cpu", processing=[]).model is bridge.model


def test_dtypes_have_two_spellings(root: Path) -> None:
    for dtype in ("torch.float64", torch.float64):
        model = fp.load(root / "model", dtype=dtype).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert fp.load_sae(root / "saes" / HOOK, dtype=dtype).W_dec.dtype == torch.float64


def test_arguments_of_load_sae_that_do_not_fit(root: Path) -> None:
    folder = root / "saes" / HOOK
    for options, message in (
        ({"norm_scaling_factor": 0.25}, "norm_scaling_factor=0.25: expected None, because '.*' is not scaled"),
        ({"dtype": "flot32"}, "^dtype"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.load_sae(folder, **options)
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(fp.FeatpatchError, match=f"^norm_scaling_factor is {scale}: expected a positive number"):
            fp.load_sae(folder, norm_scaling_factor=scale)
    assert fp.load_sae(folder, dtype="torch.float32").W_dec.dtype == torch.float32
    with pytest.raises(fp.FeatpatchError, match="^dtype"):
        fp.load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre", dtype="flot32")


@pytest.mark.parametrize(
    ("scale", "message"), [(0.0, "norm_scaling_factor is 0.0"), (float("nan"), "norm_scaling_factor is nan")]
)
def test_scales_that_are_none(tmp_path: Path, scale: float, message: str) -> None:
    standard(HOOK, 3, normalize_activations="expected_average_only_in").save_model(tmp_path)
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path, norm_scaling_factor=scale)


def test_a_model_needs_its_tokenizer(root: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    with pytest.raises(fp.FeatpatchError, match="GPT2LMHeadModel has no tokenizer: .* pass tokenizer"):
        fp.load(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(fp.FeatpatchError, match="has no tokenizer files: .* save"):
        fp.load(tmp_path)
    tokenizer = fp.load(root / "model").model.tokenizer
    assert fp.load(tmp_path, tokenizer=tokenizer).model.tokenizer("Mary").input_ids == [0, WORDS.index("Mary")]


def test_a_model_in_memory_keeps_its_weights(root: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = fp.load(root / "model").model.tokenizer
    processed = fp.load(model, tokenizer=tokenizer, processing=["center_writing_weights"]).model
    _, cache = processed.run_with_cache(torch.tensor([[0, 3, 4]]))
    assert cache["blocks.8.hook_resid_pre"].mean(-1).abs().max() < 1e-5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_saes_of_differently_processed_weights(root: Path) -> None:
    one, other = (fp.load_sae(root / "saes" / HOOK) for _ in range(2))
    other.cfg.metadata = at("blocks.7.hook_resid_pre")
    other.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    with pytest.raises(fp.FeatpatchError, match="trained on weights that were processed in different ways"):
        fp.load(root / "model", [one, other])
    loaded = fp.load(root / "model", [other], check=False)
    pairs = fp.Pairs.from_jsonl(loaded.model.tokenizer, root / "pairs.jsonl")
    assert fp.check(loaded.model, [other], pairs).weights == "center_writing_weights"


def _tokens(small: Small) -> tuple[torch.Tensor, ...]:
    return small.clean, small.corrupted, small.correct, small.wrong


TINY = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
        "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
EXPERTS = {**TINY, "num_experts_per_tok": 2}
T5 = {
    "vocab_size": len(WORDS),
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
TOKENS = torch.tensor([[0, 3, 4, 5, 6]])


def with_images() -> transformers.Gemma3ForConditionalGeneration:
    """A multimodal Gemma 3, whose image processor TransformerLens wants."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}  # fmt: skip
    text = {**TINY, "vocab_size": len(WORDS) + 3, "head_dim": 4}
    special = {f"{name}_token_index": len(WORDS) + k for k, name in enumerate(("image", "boi", "eoi"))}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("way", ["folder", "memory"])
def test_loading_installs_nothing(way: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens runs pip for torchvision where it is missing or broken; no process at all is started here."""
    tokenizer, model = fp.load(root / "model").model.tokenizer, with_images()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    started: list[Any] = []

    def start(*given: Any, **_: Any) -> None:
        started.append(given)
        raise OSError("no process may be started here")

    monkeypatch.setitem(sys.modules, "torchvision", None)
    for owner, name in ((subprocess.Popen, "__init__"), (os, "system"), (os, "posix_spawn"), (os, "fork")):
        monkeypatch.setattr(owner, name, start)
    with pytest.warns(
        UserWarning, match="without its image processor, which needs torchvision.*install the version of torchvision that mat"
    ):
        loaded = fp.load(tmp_path) if way == "folder" else fp.load(model, tokenizer=tokenizer)
    assert started == []
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(TOKENS), with_images()(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert subprocess.check_call.__module__ == "subprocess", "as it was"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma3", {**TINY, "head_dim": 4}),
        ("Qwen3Moe", {**EXPERTS, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8}),
        ("Olmoe", {**EXPERTS, "num_experts": 4}),
        ("Olmo2", TINY),
        ("GptOss", {**EXPERTS, "head_dim": 4, "num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("derived", [False, True])
def test_a_model_in_memory_says_what_it_is(kind: str, options: dict[str, Any], derived: bool, root: Path) -> None:
    """Its configuration names no architecture; its class does, or the one that it is derived from."""
    make = getattr(transformers, f"{kind}ForCausalLM")
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**options)
    torch.manual_seed(0)
    model = (type("Mine", (make,), {}) if derived else make)(config).eval()
    assert not model.config.architectures
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
        found = fp.load(model, tokenizer=fp.load(root / "model").model.tokenizer).model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_another_library_says_is_cut(root: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=len(WORDS), n_positions=32, n_embd=16, dff=24, n_layer=1, n_head=2)
    model = transformers.CTRLLMHeadModel(config)
    with pytest.raises(fp.FeatpatchError, match="TransformerLens can't load the CTRLLMHeadModel") as refused:
        fp.load(model, tokenizer=fp.load(root / "model").model.tokenizer)
    assert len(str(refused.value)) < 500


@pytest.mark.filterwarnings("ignore:HookedEncoder:DeprecationWarning")
def test_models_with_an_encoder(root: Path, tmp_path: Path, bridge: Small) -> None:
    tokenizer = fp.load(root / "model").model.tokenizer
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wrapped = TransformerBridge.boot_transformers(str(tmp_path), tokenizer=tokenizer, device="cpu")
    small = {"n_layers": 1, "d_model": 16, "n_ctx": 8, "d_head": 4, "d_mlp": 24, "d_vocab": 20, "act_fn": "gelu"}
    encoder = HookedEncoder(HookedTransformerConfig(**small, tokenizer_name=None))
    both = HookedEncoderDecoder(
        HookedTransformerConfig(**small, relative_attention_max_distance=8, relative_attention_num_buckets=4)
    )
    pairs = fp.Pairs.from_tokens(*_tokens(bridge))
    for refuse in (
        lambda: fp.load(model, tokenizer=tokenizer),
        lambda: fp.load(tmp_path),
        *(lambda given=given: fp.load(given) for given in (wrapped, encoder, both)),
        *(lambda given=given: fp.rank_components(given, pairs) for given in (wrapped, encoder, both)),
    ):
        with pytest.raises(
            fp.FeatpatchError, match=r"(T5For|HookedEncoder)\w*, which has an encoder: expected a decoder-only model"
        ):
            refuse()


class Lora(torch.nn.Linear):
    """A layer of PEFT, by its module's name: the weights of an adapter stand beside those of the model."""


Lora.__module__ = "peft.tuners.lora.layer"


class PeftModel(torch.nn.Module):
    """As PEFT's: no PreTrainedModel, but around one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.peft_config = model, {"default": None}

    def merge_and_unload(self) -> Any:
        return self.base_model


def test_adapters_are_to_be_merged(root: Path, tmp_path: Path) -> None:
    """As PEFT's own model, as a model of Hugging Face with an adapter in it, as a bridge to that, and as a folder."""
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    tokenizer = fp.load(root / "model").model.tokenizer
    (tmp_path / "adapter_config.json").write_text("{}")
    inside = GPT2LMHeadModel.from_pretrained(root / "model")
    inside.transformer.h[0].mlp.adapter = Lora(16, 4)
    handed = fp.load(root / "model").model
    handed.original_model.transformer.h[0].mlp.adapter = Lora(16, 4)
    for given in (PeftModel(model), inside, handed, tmp_path):
        with pytest.raises(fp.FeatpatchError, match=r"adapter.*expected a .*merge_and_unload\(\)"):
            fp.load(given, tokenizer=tokenizer)
    merged = fp.load(PeftModel(model).merge_and_unload(), tokenizer=tokenizer).model
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS), fp.load(root / "model").model(TOKENS))


@pytest.mark.extended
def test_compiled_models(root: Path, bridge: Small) -> None:
    """Hooks are put into the module that torch.compile was given."""
    expected = fp.load(root / "model").model
    hugging_face = GPT2LMHeadModel.from_pretrained(root / "model", attn_implementation="eager")
    compiled = torch.compile(hugging_face, backend="eager")
    loaded = fp.load(compiled, tokenizer=expected.tokenizer).model
    clean, corrupted, correct, wrong = (2 + tensor % (len(WORDS) - 2) for tensor in _tokens(bridge))
    clean[:, 0] = corrupted[:, 0] = 0
    pairs = fp.Pairs.from_tokens(clean, corrupted, correct, wrong)
    components = [
        fp.rank_components(model, pairs, sites="z", progress=False)
        for model in (
            expected,
            loaded,
            fp.load(torch.compile(expected, backend="eager")).model,
            torch.compile(expected, backend="eager"),
        )
    ]
    for found in components[1:]:
        assert found.denoised == pytest.approx(components[0].denoised, abs=1e-6)


def test_offloaded_weights(root: Path, tmp_path: Path) -> None:
    """As accelerate does with what a device has no room for."""
    tokenizer = fp.load(root / "model").model.tokenizer
    split = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.h": "disk",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    model = GPT2LMHeadModel.from_pretrained(root / "model")
    for given in (
        accelerate.cpu_offload(GPT2LMHeadModel.from_pretrained(root / "model"), torch.device("cpu")),
        GPT2LMHeadModel.from_pretrained(root / "model", device_map=split, offload_folder=tmp_path),
    ):
        with pytest.raises(fp.FeatpatchError, match=r"weights of the GPT2LMHeadModel \(.*\) are offloaded to CPU or disk"):
            fp.load(given, tokenizer=tokenizer)
    whole = GPT2LMHeadModel.from_pretrained(root / "model", device_map={"": "cpu"}, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(fp.load(whole, tokenizer=tokenizer).model(TOKENS), model.eval()(TOKENS).logits)
    handed = fp.load(root / "model").model
    handed.original_model.transformer.h[1].mlp.to("meta")
    with pytest.raises(fp.FeatpatchError, match="are offloaded to CPU or disk"):
        fp.load(handed)


Damage = Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def settings(**changed: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


def index(name: str, file: Any) -> Damage:
    """A tensor of the index is elsewhere, or no longer in it; the model is in several files."""

    def damage(folder: Path) -> None:
        sharded(folder)
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        content["weight_map"] = {key: value for key, value in {**content["weight_map"], name: file}.items() if value}
        path.write_text(json.dumps(content))

    return damage


def sharded(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def pickled(folder: Path) -> None:
    """A pickle whose place transformers takes it from, beside a safetensors file that is none of the model."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


class Touching:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def evil_shard(folder: Path) -> None:
    index(NORM, "evil.bin")(folder)
    (folder / "evil.bin").write_bytes(pickle.dumps(Touching(folder / "ran")))


NORM = "transformer.h.1.ln_1.weight"
ADDED = "transformer.h.1.attn.c_attn.bias2"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (settings(n_layer=10), r"config.json \(12 tensors missing \(transformer.h.9.attn.c_attn.bias, .* and 7 more\)\): expected"),
        (settings(n_layer=8), r"11 tensors left over \(transformer.h.8.attn.c_attn.weight, "),
        (settings(n_positions=8), r"1 tensor of another shape \(transformer.wpe.weight \[32, 16\] instead of \[8, 16\]\)"),
        (settings(tie_word_embeddings=False), r"1 tensor missing \(lm_head.weight\)\): expected"),
        (weights(lambda tensors: tensors.pop(NORM)), rf"1 tensor missing \({NORM}\)\): expected"),
        (weights(lambda tensors: tensors.update({"transformer.h.1.ln_9.weight": tensors.pop(NORM)})), rf"missing \({NORM}\)"),
        (weights(lambda tensors: tensors.update({ADDED: torch.zeros(48)})), rf"1 tensor left over \({ADDED}\)\): expected"),
        (weights(lambda tensors: tensors[NORM].fill_(torch.nan)), r"NaN"),
        (weights(lambda tensors: tensors["transformer.wte.weight"][3, :2].fill_(torch.inf)), r"2 of 256 values"),
        (lambda folder: (sharded(folder), min(folder.glob("model-*")).unlink()), "No such file or directory: .*model-00001-of"),
        (index(NORM, "../other.safetensors"), r"names the weights files '../other.safetensors': expected .* inside this folder"),
        (index(NORM, "/other.safetensors"), "names the weights files '/other.safetensors'"),
        (index(NORM, "C:\\\\other.safetensors"), "names the weights files 'C:"),
        (index(NORM, 3), "names the weights files 3: expected"),
        (evil_shard, "names the weights files 'evil.bin': expected .safetensors files inside this folder"),
        (settings(transformers_weights="adapter_model.bin"), "names the weights file 'adapter_model.bin': expected .safetensors"),
        (settings(transformers_weights="../model/model.safetensors"), "expected .safetensors files inside this folder"),
        (lambda folder: (sharded(folder), (folder / "model.safetensors.index.json").write_text("{}")), "index with metadata"),
        (pickled, "there is no safetensors file in .* because a pickle"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_configuration(
    root: Path, tmp_path: Path, damage: Damage, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers fills in random numbers or leaves tensors out; pickles run no code, whatever names them."""
    shutil.copytree(root / "model", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(fp.FeatpatchError, match=message) as refused:
        fp.load(tmp_path / "model")
    assert not re.search("weights_only|ignore_mismatched|use_safetensors|\n", str(refused.value))
    assert "LOAD REPORT" not in caplog.text
    assert not (tmp_path / "model" / "ran").exists()


def prefixless(tensors: dict[str, torch.Tensor]) -> None:
    """As OpenAI's own files of GPT-2: without the name of the part below the head, and with the masks of attention."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)


EXTRA = ("mtp.layers.0.weight", "pooler.dense.weight", "transformer.h.0.attn.masked_bias")


@pytest.mark.parametrize(
    ("layout", "left"),
    [
        (sharded, ()),
        (index(NORM, None), ()),
        (index("lm_head.weight", "model-00001-of-00004.safetensors"), ()),
        (weights(prefixless), ()),
        (weights(lambda tensors: tensors.update({name: torch.ones(3) for name in EXTRA})), EXTRA),
    ],
)
def test_public_layouts_of_weights(root: Path, tmp_path: Path, layout: Damage, left: tuple[str, ...]) -> None:
    """What belongs to no part of the model is left out, which one warning says; an index may name tied weights, or not all."""
    shutil.copytree(root / "model", tmp_path / "model")
    layout(tmp_path / "model")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        loaded = fp.load(tmp_path / "model").model
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), fp.load(root / "model").model(TOKENS))
    text = f"3 of the weights in .* do not belong to any part of the GPT2LMHeadModel and are ignored: {', '.join(left)}"
    warned = [each for each in said if "are ignored" in str(each.message)]
    assert len(warned) == bool(left)
    assert all(re.match(text, str(each.message)) for each in warned)


@pytest.mark.extended
def test_models_of_the_hub_that_are_not_whole(root: Path, tmp_path: Path) -> None:
    """As folders: a tensor fewer than the configuration asks for, an index that names a pickle, a pickle alone."""
    for name, damage in (("half", weights(lambda tensors: tensors.pop(NORM))), ("evil", evil_shard), ("pickled", pickled)):
        shutil.copytree(root / "model", tmp_path / name)
        damage(tmp_path / name)
    names = ("half", "evil", "pickled")
    with serving({f"someone/{name}": tmp_path / name for name in names}) as served:
        done = run(REFUSALS, served.environment(tmp_path / "home"), *(f"someone/{name}" for name in names))
        read = [request for request in served.requests if request.endswith(".bin")]
    said = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert re.search(rf"the weights in 'someone/half' do not match .*\(1 tensor missing \({NORM}\)\): expected", said[0]), (
        done.stderr
    )
    assert "names the weights files 'evil.bin': expected .safetensors files inside this folder" in said[1]
    assert "there is no safetensors file in 'someone/pickled' (model.safetensors or model.safetensors.index.json)" in said[2]
    assert read == [], "no pickle is even downloaded"


def test_the_command_line_refuses_half_a_model_on_one_line(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "model", tmp_path / "model")
    settings(n_layer=10)(tmp_path / "model")
    done = command("rank", "--model", "model", "--sae", root / "saes" / HOOK, "--pairs", root / "pairs.jsonl", folder=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch("error: the weights in 'model' do not match .*12 tensors missing .*", " ".join(done.stderr.split()))


def test_loading_is_quiet_if_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bars of transformers are shown without; afterwards every setting is as it was, also after an error."""
    folder, sae = fp.load_demo().folder, next((fp.load_demo().folder / "saes").iterdir())
    shown: list[bool] = []
    bar = transformers_logging.tqdm.__call__
    monkeypatch.setattr(
        "transformers.core_model_loading.tqdm",
        lambda *args, **options: [
            shown.append(transformers_logging.is_progress_bar_enabled()),
            print("loading"),
            bar(*args, **options),
        ][2],
    )
    capsys.readouterr()
    for hub, bars in product((True, False), repeat=2):
        (enable_progress_bars if hub else disable_progress_bars)()
        monkeypatch.setattr(transformers_logging, "_tqdm_active", bars)
        for progress in (True, False):
            shown.clear()
            fp.load(folder / "model", sae, progress=progress, check=False)
            assert shown == [bars and progress]
            assert ("loading" in capsys.readouterr().out) == progress
        with pytest.raises(fp.FeatpatchError):
            fp.load(folder / "nowhere", progress=False)
        assert (are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()) == (not hub, bars)
    enable_progress_bars()
    print("again")
    assert capsys.readouterr().out == "again\n"
    loaded = fp.load(folder / "model", sae, progress=False)
    assert capsys.readouterr() == ("", "")
    assert repr(loaded).endswith(repr(loaded.check))
    monkeypatch.setattr("featpatch.selfcheck.Check.ok", False)
    with pytest.warns(FeatpatchWarning, match="^checked on built-in English sentences, .*\ncheck on .* positions of"):
        fp.load(folder / "model", sae, progress=False)
