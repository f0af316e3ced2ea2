"""Count the floating-point operations of patches: two per multiply-add of the matrix products, including attention.

Norms, activation functions and additions are left out, as in torch's own counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from featpatch import sites
from featpatch.engine.patches import Block
from featpatch.model.layer import Layer, Stack
from featpatch.model.lens import Lens


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


def suffix_flops(stack: Stack, start: int, kind: str, unit: Block, columns: int) -> int:
    """Return the operations of the fast pass for a unit of patches.

    Args:
        start: the layer at which the unit enters.
        kind: the place in that layer at which it enters, see `sites.ENTRIES`.
        columns: the number of logits that are read.
    """
    answer = unit.run.answer
    return pass_flops(
        [_size(layer) for layer in stack.layers],
        start,
        kind,
        patches=len(unit),
        changed=max(len(unit.of(site).upto(answer).patch) for site in unit.deltas),
        length=answer - unit.first + 1,
        answer=answer,
        logits=columns * stack.head.weight.shape[0],
    )


def plain_flops(lens: Lens, unit: Block) -> int:
    """Return the operations of the model's own forward pass for a unit.

    Every weight matrix counts from the layer of the lowest hook point on, at every position.
    """
    weights = (lens.n_layers - min(map(sites.layer_of, unit.deltas))) * lens.weights_per_block
    return 2 * len(unit) * (weights * len(unit.run.tokens) + lens.d_vocab * lens.d_model)


def _size(layer: Layer) -> BlockSize:
    query, key, value, out = (linear.weight.numel() for linear in (layer.query, layer.key, layer.value, layer.out))
    return BlockSize(query, key, value, out, _mlp(layer), layer.query.weight.shape[1], layer.parallel)


def _mlp(layer: Layer) -> int:
    if layer.mlp is None:
        return 0
    gate = 0 if layer.mlp.gate is None else layer.mlp.gate.weight.numel()
    return gate + layer.mlp.into.weight.numel() + layer.mlp.out.weight.numel()
