"""A change added to an activation, in half precision too."""

import torch


def added(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The sum, taken in the wider of both types, in the type and on the device of the base."""
    wide = torch.promote_types(base.dtype, change.dtype)
    return (base.to(wide) + change.to(base.device)).to(base.dtype)
