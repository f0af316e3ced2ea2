"""Pickle a model and objects that refer to it, for other processes of the same run. Never used for files."""

import io
from typing import Any

from transformers.utils import output_capturing

from featpatch.errors import FeatpatchError


def packed(thing: Any) -> bytes:
    """Pickle an object, so that `unpacked` restores it in a process with the same libraries.

    Hugging Face's models hold hooks that refer to a context variable of their module; every process has its own, so the
    variable is pickled as a reference.

    Raises:
        FeatpatchError: something can't be pickled.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise FeatpatchError(
            "cloudpickle is not installed: expected this package, which workers need; pip install 'featpatch[ray]'"
        ) from error

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, output_capturing.CompileableContextVar):
                return "_active_collector"
            return super().reducer_override(value)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(thing)
    except Exception as error:
        raise FeatpatchError(
            f"the model with its hooks, the SAEs or the metric can't be sent to another process ({error}): expected objects "
            "without files, locks or connections"
        ) from error
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """Restore an object from the bytes that `packed` returned."""
    import cloudpickle

    return cloudpickle.loads(content)
