"""Several devices on a machine that has none: tensors that say they are elsewhere, and refuse to be mixed as torch's do.

A `Placed` tensor holds a CPU tensor and tells torch that it lies on `lazy:n`, a type of device that torch knows, built without
a backend. So torch's own code moves it, builds tensors beside it and takes its gradients; every operation comes through
`_run`, which checks where its arguments are. Nothing here imports featpatch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
"""Operations whose arguments may lie on different devices."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default}  # fmt: skip
"""Operations whose second argument, the indices, may lie on the CPU."""


class Placed(torch.Tensor):
    """A tensor that pretends to be on a device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "Placed":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Placed({self.held!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Operations without a placed tensor among their arguments, e.g. `torch.zeros(2, device="lazy:0")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def devices() -> Iterator[None]:
    """Within this context tensors can be made on, and moved to, devices that are not there."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Factories():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Puts the parameters and buffers of a module on a device; those that share memory do so no longer."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on what the tensors hold, its results on the device where torch would put them."""
    tensors: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [item for item in value if isinstance(item, torch.Tensor)]
    wanted = kwargs.get("device")
    place = _common(func, args, tensors) if wanted is None else torch.device(wanted)
    pretended = place.type == FIRST.type
    if not pretended and not any(isinstance(tensor, Placed) for tensor in tensors):
        return func(*args, **kwargs)
    if wanted is not None and pretended:
        kwargs = {**kwargs, "device": CPU}
    made = func(*_mapped(_held, args), **_mapped(_held, kwargs))
    if not pretended:
        return made
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Placed)}

    def placed(value: Any) -> Any:
        return (known[id(value)] if id(value) in known else Placed(value, place)) if isinstance(value, torch.Tensor) else value

    return return_and_correct_aliasing(func, args, kwargs, _mapped(placed, made))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A value changed, or all that its lists, tuples and dictionaries hold: torch's own `tree_map` takes several times as long."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    return change(value)


def _common(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device:
    """Where an operation works.

    Raises:
        RuntimeError: its arguments are on different devices.
    """
    if func in COPIES:
        return args[0].device
    if func in INDEXING:
        first = args[0].device
        if any(index is not None and index.device not in (CPU, first) for index in args[1]):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({first})")
        tensors = [tensor for tensor in tensors if not any(tensor is index for index in args[1])]
    found = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if len(found) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(map(str, found))}! "
            f"({func})"
        )
    return found.pop() if found else CPU


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Placed) else value
