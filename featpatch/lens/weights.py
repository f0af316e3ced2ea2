"""Which of TransformerLens' processing a model's weights have gone through, found out from the model itself."""

from collections.abc import Sequence

import torch

from featpatch import sites
from featpatch.lens.layer import UnsupportedError
from featpatch.lens.lens import Lens

CENTRED = 1e-3
"""Mean of a centred residual stream over its coordinates, at most, as a share of its root mean square."""


def processing(lens: Lens) -> Sequence[str]:
    """`fold_ln`, `center_writing_weights`, both or neither."""
    done = []
    if _folded(lens):
        done.append("fold_ln")
    stream = lens.read(torch.tensor([[0, 1, 2]]), [sites.resid_pre(lens.n_layers - 1)])[sites.resid_pre(lens.n_layers - 1)]
    stream = stream.double()
    if bool((stream.mean(-1).abs() <= CENTRED * stream.square().mean(-1).sqrt()).all()):
        done.append("center_writing_weights")
    return done


def _folded(lens: Lens) -> bool:
    """Whether the norms before attention and MLP scale nothing any more."""
    try:
        layers = lens.stack(1, 1).layers
    except UnsupportedError:
        return False
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2) if norm is not None]
    return bool(norms) and all(norm.weight is None or bool((norm.weight == 1).all()) for norm in norms)
