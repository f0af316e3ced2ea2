"""SHA-256 of a module's weights, computed once as long as they stay as they are."""

import hashlib
from weakref import WeakKeyDictionary

import torch

SAMPLE = 64
"""Numbers of each tensor that are compared before a digest is used again."""

_known: "WeakKeyDictionary[torch.nn.Module, tuple[object, str]]" = WeakKeyDictionary()


def digest(module: torch.nn.Module) -> str:
    """Names, types, shapes and bytes of the state, hashed.

    Hashing takes about half a second per gigabyte. A module seen before is not hashed again while every tensor lies where it
    lay, counts as many in-place changes (torch counts them) and holds the same numbers at `SAMPLE` places.
    """
    tensors = sorted(module.state_dict().items())
    marks = [(name, t.dtype, t.shape, t.data_ptr(), t._version, _sample(t)) for name, t in tensors]
    known = _known.get(module)
    if known is None or known[0] != marks:
        total = hashlib.sha256()
        for name, tensor in tensors:
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        known = _known[module] = (marks, total.hexdigest())
    return known[1]


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> tuple[float, ...]:
    count = min(SAMPLE, tensor.numel())
    places = torch.arange(count) * (tensor.numel() - 1) // max(count - 1, 1)
    return tuple(torch.take(tensor, places.to(tensor.device)).double().tolist())
