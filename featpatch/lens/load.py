"""Models and SAEs from local folders, without a network."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from featpatch.errors import FeatpatchError


def load_bridge(path: str | Path, device: str = "cpu") -> TransformerBridge:
    """A Hugging Face folder (config.json, model.safetensors, tokenizer.json) as a TransformerBridge with raw weights.

    Raises:
        FeatpatchError: the folder lacks one of the files or can't be read.
    """
    folder = _folder(path, "config.json")
    check_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FeatpatchError(
            f"the model in {str(folder)!r} can't be loaded ({error}): expected a Hugging Face folder"
        ) from error
    return TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device=device)


def load_sae(path: str | Path, device: str = "cpu") -> Any:
    """A sae-lens folder (cfg.json, sae_weights.safetensors) as a sae-lens object.

    Raises:
        FeatpatchError: the folder lacks one of the files or can't be read.
    """
    folder = _folder(path, "cfg.json")
    check_device(device)
    try:
        return SAE.load_from_disk(folder, device=device)
    except Exception as error:
        raise FeatpatchError(f"the SAE in {str(folder)!r} can't be loaded ({error}): expected a sae-lens folder") from error


def check_device(device: str) -> None:
    """Refuses a device that is not there.

    Raises:
        FeatpatchError: torch can't put a tensor on it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FeatpatchError(f"device {device!r} can't be used ({reason}): expected e.g. cpu, cuda or cuda:1") from error


def _folder(path: str | Path, file: str) -> Path:
    if not (Path(path) / file).is_file():
        raise FeatpatchError(f"there is no {file} in {str(path)!r}: expected the folder of a saved model or SAE")
    return Path(path)
