"""Choose how many rows share a forward pass: enough to keep the processor busy, few enough for the available memory."""

from collections.abc import Sequence

import psutil
import torch

from featpatch.cost import row_numbers
from featpatch.lens import Lens

BUSY = 2**31
"""Multiply-adds per weight matrix of one forward pass above which a CPU is busy; a GPU needs GPU_FACTOR times as many."""
GPU_FACTOR = 16
LEAST, MOST = 256, 16384
SHARE = 0.25
"""Fraction of the free memory that one forward pass may take."""
NO_MEMORY = "can't allocate memory", "could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED"
"""What the errors of PyTorch's allocator, oneDNN and cuBLAS say when memory runs out."""


def row_bytes(lens: Lens, length: int, columns: int) -> int:
    """Return the bytes that one row takes at the peak of memory use, see `row_numbers`."""
    return int(row_numbers(lens.d_model, lens.n_heads, lens.d_head, lens.d_mlp, length, columns) * lens.itemsize)


def row_budget(lens: Lens, length: int, columns: int) -> int:
    """Return the number of rows per forward pass, limited by the device with the least free memory.

    Args:
        length: the maximum number of tokens of a prompt.
        columns: the number of logits of each patch.
    """
    busy = BUSY // (lens.d_model * max(lens.d_mlp, lens.d_model)) * (GPU_FACTOR if lens.device.type == "cuda" else 1)
    fits = int(SHARE * min(map(free_memory, lens.devices))) // row_bytes(lens, length, columns)
    return max(1, min(max(busy, LEAST), MOST, fits))


def trace_bytes(lens: Lens, layers: Sequence[int]) -> int:
    """Return the maximum number of bytes kept per token of a base run that is patched in some layers.

    They hold the residual stream, z, queries, keys and values.
    """
    numbers = 3 * lens.d_model + 3 * lens.n_heads * lens.d_head
    return (lens.n_layers - min(layers, default=0)) * numbers * lens.itemsize


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated on a device."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or its cause, says that memory ran out, on a GPU or on the CPU."""
    return any(
        isinstance(one, (torch.OutOfMemoryError, MemoryError)) or any(words in str(one) for words in NO_MEMORY)
        for one in (error, error.__cause__)
    )
