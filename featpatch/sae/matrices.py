"""Matrices of dictionaries that can stay in their files, from which single rows are read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from featpatch.errors import FeatpatchError
from featpatch.files import writing
from featpatch.model.facts import check_finite
from featpatch.untrusted import short

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that weights may have, by the names in safetensors files."""


@dataclass(frozen=True)
class Stored:
    """A matrix in a safetensors file, of which single rows can be read.

    Attributes:
        path, key: the file, and the name of the tensor in it.
        shape: the shape `[n, ...]` of the tensor.
        dtype, device: the dtype and the device of what is read.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"

    def read(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Read these rows, or all.

        Raises:
            FeatpatchError: the file can't be read any more, or holds values that are not finite.
        """
        try:
            with safe_open(self.path, "pt") as file:
                known = file.get_slice(self.key)
                values = known[:] if rows is None else known[rows.tolist()]
        except Exception as error:
            raise _unreadable(self.path, error) from error
        check_finite(f"the file {str(self.path)!r}", {self.key: values})
        return values.to(dtype=self.dtype, device=self.device)

    def to(self, *, dtype: torch.dtype, device: str) -> "Stored":
        """Return the same matrix, converted when it is read."""
        return replace(self, dtype=dtype, device=device)


def stored(path: Path, wanted: Collection[str], optional: Collection[str] = ()) -> dict[str, Stored]:
    """Find all tensors in a file, by name, without reading them.

    Raises:
        FeatpatchError: the file is damaged, lacks one of the wanted tensors, or has one that is not known or holds integers.
    """
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            found = {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in names}
    except Exception as error:
        raise _unreadable(path, error) from error
    missing, unknown = [name for name in wanted if name not in names], set(names) - {*wanted, *optional}
    if missing or unknown:
        raise FeatpatchError(
            f"{str(path)!r} holds {', '.join(sorted(names))}: expected {', '.join(wanted)}"
            f"{f' and perhaps {chr(44).join(optional)}' if optional else ''}, and nothing else"
        )
    for name, (_, dtype) in found.items():
        if dtype not in DTYPES:
            raise FeatpatchError(f"{str(path)!r}: {name} has the dtype {dtype}: expected one of {', '.join(DTYPES)}")
    return {name: Stored(path, name, shape, DTYPES[dtype]) for name, (shape, dtype) in found.items()}


def _unreadable(path: Path, error: Exception) -> FeatpatchError:
    return FeatpatchError(
        f"{str(path)!r} can't be read ({type(error).__name__}: {short(error)}): expected a complete file of the dictionary; "
        "download or save it again, and leave it in its place while it is in use"
    )


Matrix = torch.Tensor | Stored
"""A matrix in memory or in a file."""


def values_of(matrix: Matrix, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return these rows of a matrix, or all, with one axis for what lies in a row: `[n, width]`."""
    if isinstance(matrix, Stored):
        return matrix.read(rows).flatten(1)
    return (matrix if rows is None else matrix[rows.to(matrix.device)]).flatten(1)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write tensors to a safetensors file in one dtype, completely or not at all.

    Raises:
        FeatpatchError: the file can't be written, or a value is too large for the dtype.
    """
    converted = {name: value.to(device="cpu", dtype=dtype).contiguous() for name, value in tensors.items()}
    check_finite(f"the weights in {str(dtype)[6:]}", converted)
    with writing(path) as file:
        save_file(converted, file)
