"""Determine by measurement which of TransformerLens' processing steps a model's weights have gone through."""

from collections.abc import Sequence

import torch

from featpatch import sites
from featpatch.lens.layer import Norm
from featpatch.lens.lens import Lens
from featpatch.lens.stack import norm_of

CENTRED = 1e-3
"""Maximum mean over coordinates of a residual stream that counts as centred, as a fraction of its root mean square."""


def processing(lens: Lens) -> Sequence[str]:
    """Return the processing steps that the weights have gone through: `fold_ln`, `center_writing_weights`, both or neither."""
    done = []
    if trivial_norms(lens):
        done.append("fold_ln")
    stream = lens.read(torch.tensor([[0, 1, 2]]), [sites.resid_pre(lens.n_layers - 1)])[sites.resid_pre(lens.n_layers - 1)]
    stream = stream.double()
    if bool((stream.mean(-1).abs() <= CENTRED * stream.square().mean(-1).sqrt()).all()):
        done.append("center_writing_weights")
    return done


def trivial_norms(lens: Lens) -> bool:
    """Return whether the norms before attention and MLP have no weight other than 1.

    The weight may be folded, or was never trained.
    """
    norms = _norms(lens)
    return bool(norms) and all(norm.weight is None or bool((norm.weight == 1).all()) for norm in norms)


def folded(lens: Lens) -> bool:
    """Return whether the weights of the norms before attention and MLP are folded into the weights that read their output."""
    gone = all(norm.weight is None for norm in _norms(lens)) or getattr(lens.model, "_weights_processed", False)
    return trivial_norms(lens) and bool(gone)


def _norms(lens: Lens) -> list[Norm]:
    cfg = lens.model.cfg
    found = [norm_of(getattr(block, name, None), cfg) for block in lens.model.blocks for name in ("ln1", "ln2")]
    return [norm for norm in found if norm is not None]
