"""Activations of a model on text, read once and kept on disk in half precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from featpatch.errors import FeatpatchError
from featpatch.model.transformer_lens import wrap

LENGTH = 128
"""Tokens of one row, of which the first is BOS; its activation is left out."""
BATCH = 8
"""Rows that share a forward pass."""
SHARD = 128
"""Rows whose activations share a file."""


def rows_of(model: Any, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """Return at least `tokens` tokens of the texts, joined by blank lines and cut into rows `[row, pos]` that begin with BOS.

    Raises:
        FeatpatchError: the texts have fewer tokens.
    """
    count, ids = -(-tokens // (LENGTH - 1)), list[int]()
    for text in texts:
        ids += model.tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(ids) >= count * (LENGTH - 1):
            break
    else:
        raise FeatpatchError(f"the texts have {len(ids):,} tokens: expected {count * (LENGTH - 1):,}; gather more text")
    cut = torch.tensor(ids[: count * (LENGTH - 1)]).view(count, LENGTH - 1)
    return torch.cat([torch.full((count, 1), model.tokenizer.bos_token_id), cut], dim=1)


@torch.no_grad()
def cache(model: Any, rows: torch.Tensor, hooks: Sequence[str], folder: Path) -> None:
    """Write the activations at the hook points, in float16, to files of `SHARD` rows; files that exist are kept.

    Raises:
        FeatpatchError: an activation is too large for float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lens = wrap(model)
    for number, shard in enumerate(tqdm(rows.split(SHARD), desc="Reading activations", unit="shard", mininterval=5)):
        file = folder / f"{number:05d}.safetensors"
        if file.is_file():
            continue
        read = [lens.read(batch, list(hooks)) for batch in shard.split(BATCH)]
        found = {hook: torch.cat([values[hook][:, 1:].flatten(0, 1) for values in read]).half() for hook in hooks}
        if wrong := [hook for hook, values in found.items() if not values.isfinite().all()]:
            raise FeatpatchError(
                f"activations at {wrong[0]!r} exceed 65504: expected values that float16 holds; choose other hook points"
            )
        unfinished = file.with_suffix(".unfinished")
        save_file(found, unfinished)
        unfinished.rename(file)


def cached(folder: Path, hook: str) -> torch.Tensor:
    """Return the activations at a hook point from all files, in float16 `[token, width]`."""
    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts.append(file.get_tensor(hook))
    return torch.cat(parts)
