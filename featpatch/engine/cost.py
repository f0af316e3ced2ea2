"""Count the floating-point operations that a unit of patches needs, in the fast and the plain forward pass."""

from featpatch import sites
from featpatch.cost.flops import BlockSize, pass_flops
from featpatch.engine.work import Unit
from featpatch.lens import Layer, Lens, Stack


def suffix_flops(stack: Stack, start: int, kind: str, unit: Unit, columns: int) -> int:
    """Return the operations of the fast pass for a unit of patches.

    Args:
        start: the layer at which the unit enters.
        kind: the place in that layer at which it enters, see `sites.ENTRIES`.
        columns: the number of logits that are read.
    """
    answer = unit.block.run.answer
    return pass_flops(
        [_size(layer) for layer in stack.layers],
        start,
        kind,
        patches=len(unit.patches),
        changed=len(unit.block.deltas.select(unit.patches).upto(answer).patch),
        length=answer - unit.first + 1,
        answer=answer,
        logits=columns * stack.head.weight.shape[0],
    )


def plain_flops(lens: Lens, unit: Unit) -> int:
    """Return the operations of the model's own forward pass for a unit.

    Every weight matrix counts from the layer of the hook point on, at every position.
    """
    weights = (lens.n_layers - sites.layer_of(unit.block.site)) * lens.weights_per_block
    return 2 * len(unit.patches) * (weights * len(unit.block.run.tokens) + lens.d_vocab * lens.d_model)


def _size(layer: Layer) -> BlockSize:
    query, key, value, out = (linear.weight.numel() for linear in (layer.query, layer.key, layer.value, layer.out))
    return BlockSize(query, key, value, out, _mlp(layer), layer.query.weight.shape[1], layer.parallel)


def _mlp(layer: Layer) -> int:
    if layer.mlp is None:
        return 0
    gate = 0 if layer.mlp.gate is None else layer.mlp.gate.weight.numel()
    return gate + layer.mlp.into.weight.numel() + layer.mlp.out.weight.numel()
