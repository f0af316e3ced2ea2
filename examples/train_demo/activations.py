"""Activations of the trained model, read through TransformerLens."""

from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_model(folder: Path) -> TransformerBridge:
    """The model of a Hugging Face folder as a TransformerBridge."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TransformerBridge.boot_transformers(str(folder), hf_model=model, tokenizer=tokenizer, device="cpu")


@torch.no_grad()
def activations(model: TransformerBridge, ids: torch.Tensor, hooks: list[str], batch: int = 250) -> list[torch.Tensor]:
    """Activations at the hooks [rows, words, width]; heads lie side by side, <bos> is left out."""
    found: list[list[torch.Tensor]] = [[] for _ in hooks]
    for part in ids.split(batch):
        _, cache = model.run_with_cache(part, names_filter=hooks, return_type=None)
        for values, hook in zip(found, hooks, strict=True):
            values.append(cache[hook][:, 1:].flatten(2))
    return [torch.cat(values) for values in found]
