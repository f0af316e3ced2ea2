"""Count the floating-point operations of patches: two per multiply-add of the matrix products, including attention.

Norms, activation functions and additions are left out, as in torch's own counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockSize:
    """The size of a layer in multiply-adds per row.

    Attributes:
        query, key, value, out: the multiply-adds of each projection of attention.
        mlp: the multiply-adds of all matrices of the MLP.
        queries: the width of all heads together.
        parallel: whether attention and the MLP read the same residual stream.
    """

    query: int
    key: int
    value: int
    out: int
    mlp: int
    queries: int
    parallel: bool = False


def row_numbers(width: int, heads: int, d_head: int, hidden: int, length: int, columns: int) -> int:
    """Return how many numbers one row takes at the peak of memory use.

    They are copies of the residual stream, the heads, the MLP, the scores over `length` tokens, and `columns` logits of one
    row.
    """
    return 4 * width + 8 * heads * d_head + 3 * hidden + 3 * heads * length + 4 * columns


def pass_flops(
    blocks: Sequence[BlockSize], start: int, kind: str, *, patches: int, changed: int, length: int, answer: int, logits: int
) -> int:
    """Return the floating-point operations of patches that change the same positions.

    Args:
        blocks: the sizes of the model's layers.
        start: the layer at which the patches enter.
        kind: the place in that layer at which they enter, see `sites.ENTRIES`.
        patches: the number of patches.
        changed: the number of rows that are changed where the patches enter.
        length: the number of positions from the first changed one to the answer.
        answer: the answer position.
        logits: the multiply-adds of the logits of one patch.
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
