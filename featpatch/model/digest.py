"""Properties of all of a module's weights, such as their SHA-256 and whether they are finite, kept until the weights change.

NaN in a weight does not always show in a module's output: a feature whose threshold is NaN is never active, and a token whose
embedding is NaN may never occur.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from featpatch.errors import FeatpatchError

SAMPLE = 64
"""Number of values of each tensor that are compared before a stored result is used again."""

Found = TypeVar("Found")
_known: "WeakKeyDictionary[torch.nn.Module, tuple[object, dict[Callable[[torch.nn.Module], Any], Any]]]" = WeakKeyDictionary()


def digest(module: torch.nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a module's state, which takes about half a second per gigabyte."""
    return once(_hashed, module)


def once(find: Callable[[torch.nn.Module], Found], module: torch.nn.Module) -> Found:
    """Call a function on a module, or return its earlier result if the module's weights have not changed.

    Weights count as unchanged if every tensor is at the same address, has the same number of in-place changes (torch counts
    them) and holds the same numbers at `SAMPLE` places.
    """
    tensors = sorted(module.state_dict().items())
    marks = [(name, t.dtype, t.shape, t.data_ptr(), t._version, _sample(t)) for name, t in tensors]
    known = _known.get(module)
    if known is None or known[0] != marks:
        known = _known[module] = (marks, {})
    if find not in known[1]:
        known[1][find] = find(module)
    result: Found = known[1][find]
    return result


def _hashed(module: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> tuple[float, ...]:
    count = min(SAMPLE, tensor.numel())
    places = torch.arange(count) * (tensor.numel() - 1) // max(count - 1, 1)
    return tuple(torch.take(tensor, places.to(tensor.device)).double().tolist())


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
            f"{what}: {first}{', among others' if next(parts, None) else ''}: expected finite weights; download or save it "
            "again, or use a dtype with a wider range than float16"
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
