"""Addition of a change to an activation, also in half precision."""

import torch


def added(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add a change to an activation, and return the sum in the dtype and on the device of the activation.

    The sum is computed in the wider of the two dtypes.
    """
    wide = torch.promote_types(base.dtype, change.dtype)
    return (base.to(wide) + change.to(base.device)).to(base.dtype)
