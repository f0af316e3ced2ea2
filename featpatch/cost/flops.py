"""How many floating-point operations patches need: two per multiply-add of the matrix products, attention included.

Norms, activation functions and additions are left out, as in torch's own counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSize:
    """Multiply-adds of a block for each row, by matrix; `queries`, the width of all heads together; parallel blocks say so."""

    query: int
    key: int
    value: int
    out: int
    mlp: int
    queries: int
    parallel: bool = False


def row_numbers(width: int, heads: int, d_head: int, hidden: int, length: int, columns: int) -> int:
    """That a row takes at the peak, in copies: stream, heads, MLP, scores over `length` tokens, `columns` logits of one row."""
    return 4 * width + 8 * heads * d_head + 3 * hidden + 3 * heads * length + 4 * columns


def pass_flops(
    blocks: Sequence[BlockSize], start: int, kind: str, *, patches: int, changed: int, length: int, answer: int, logits: int
) -> int:
    """Of patches that come in at block `start` at the place `kind` (see `sites.ENTRIES`) and change the same positions.

    Args:
        changed: rows that are changed where the patches come in.
        length: positions from the first changed one to the answer.
        answer: its position.
        logits: multiply-adds of the logits of one patch.
    """
    adds = patches * logits
    if kind in ("mid", "z"):
        block = blocks[start]
        adds += changed * ((block.out if kind == "z" else 0) + (0 if block.parallel else block.mlp))
    first = start if kind == "pre" else start + 1
    for index in range(first, len(blocks)):
        block, last = blocks[index], index == len(blocks) - 1
        rows, queries = patches * length, patches if last else patches * length
        fresh = changed if index == first else rows
        asked = changed if index == first else queries
        adds += asked * block.query + fresh * (block.key + block.value)
        adds += queries * (block.out + block.mlp)
        adds += 2 * queries * (answer + 1) * block.queries
    return 2 * adds
