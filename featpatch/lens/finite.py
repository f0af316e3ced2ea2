"""Check that all weights are finite.

NaN in a weight does not always show in a module's output: a feature whose threshold is NaN is never active, and a token whose
embedding is NaN may never occur.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from featpatch.errors import FeatpatchError
from featpatch.lens.digest import once

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the weights of dictionaries may have."""


def check_finite(what: str, source: Any) -> None:
    """Check that all weights of an object are finite.

    Args:
        what: a description of the object, for the error.
        source: a module, which is checked again only after it has changed; or any other object or mapping, whose attributes or
            values are checked if they are tensors or modules. Buffers of modules may be infinite, as masks are.

    Raises:
        FeatpatchError: a weight holds NaN or an infinite value, or a buffer holds NaN.
    """
    if isinstance(source, torch.nn.Module):
        parts: Iterator[str] = iter(once(_damaged, source))
    else:
        own = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
        for value in own.values():
            if isinstance(value, torch.nn.Module):
                check_finite(what, value)
        parts = (
            text
            for name, value in own.items()
            if isinstance(value, torch.Tensor) and (text := _bad(str(name), value, infinite=True))
        )
    if (first := next(parts, None)) is not None:
        raise FeatpatchError(
            f"{what}: {first}{', among others' if next(parts, None) else ''}: expected finite weights; download or "
            "save it again, or cast it to a type with a wider range than float16"
        )


def _damaged(module: torch.nn.Module) -> tuple[str, ...]:
    with torch.no_grad():
        found = [_bad(name, each, infinite=True) for name, each in module.named_parameters()]
        found += [_bad(name, each, infinite=False) for name, each in module.named_buffers()]
    return tuple(text for text in found if text)


def _bad(name: str, tensor: torch.Tensor, infinite: bool) -> str:
    """Describe how many values of a tensor are NaN or, with `infinite`, infinite; empty if none are."""
    if tensor.dtype not in TYPES or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return ""
    extreme = torch.stack(torch.aminmax(tensor.detach()))  # one pass without a copy; NaN if any value is
    if torch.isfinite(extreme).all() or not (infinite or torch.isnan(extreme).any()):
        return ""
    bad = ~torch.isfinite(tensor) if infinite else torch.isnan(tensor)
    return f"{int(bad.sum())} of {tensor.numel()} values of {name} are {'NaN or infinite' if infinite else 'NaN'}"
