"""How many floating-point operations a unit needs: two per multiply-add of its matrix products, attention included.

Norms, activation functions and additions are left out, as in torch's own counter.
"""

from featpatch import sites
from featpatch.engine.work import Unit
from featpatch.lens import Layer, Lens, Stack


def suffix_flops(stack: Stack, start: int, kind: str, unit: Unit, columns: int) -> int:
    """Of our own pass, for a unit that comes in at block `start` at the place `kind` (see `sites.ENTRIES`)."""
    answer = unit.block.run.answer
    changed = len(unit.block.deltas.select(unit.patches).upto(answer).patch)
    patches, length = len(unit.patches), answer - unit.first + 1
    adds = patches * columns * stack.head.weight.shape[0]
    if kind in ("mid", "z"):
        layer = stack.layers[start]
        adds += changed * ((layer.out.weight.numel() if kind == "z" else 0) + (0 if layer.parallel else _mlp(layer)))
    first = start if kind == "pre" else start + 1
    for index in range(first, len(stack.layers)):
        layer, last = stack.layers[index], index == len(stack.layers) - 1
        rows, queries = patches * length, patches if last else patches * length
        fresh = changed if index == first else rows
        asked = changed if index == first else queries
        adds += asked * layer.query.weight.numel() + fresh * (layer.key.weight.numel() + layer.value.weight.numel())
        adds += queries * (layer.out.weight.numel() + _mlp(layer))
        adds += 2 * queries * (answer + 1) * layer.query.weight.shape[1]
    return 2 * adds


def plain_flops(lens: Lens, unit: Unit) -> int:
    """Of the model's own pass: every weight matrix of the blocks from the site on, for every position."""
    blocks = lens.model.blocks[sites.layer_of(unit.block.site) :]
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters() if parameter.dim() > 1)
    return 2 * len(unit.patches) * (weights * len(unit.block.run.tokens) + lens.d_vocab * int(lens.model.cfg.d_model))


def _mlp(layer: Layer) -> int:
    if layer.mlp is None:
        return 0
    gate = 0 if layer.mlp.gate is None else layer.mlp.gate.weight.numel()
    return gate + layer.mlp.into.weight.numel() + layer.mlp.out.weight.numel()
