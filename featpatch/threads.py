"""Share a model between threads: a temporary change to a model acts only in the thread that made it.

A call of the model in another thread, during a sweep or within `fp.do`, returns what it would return on its own. Forward passes
that replace a block wait for one another, because only one replacement can be in place at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from featpatch.errors import FeatpatchError

_locks: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_editing: "WeakKeyDictionary[Any, list[tuple[int, Any]]]" = WeakKeyDictionary()
_guard = RLock()


@contextmanager
def exclusively(model: Any) -> Iterator[None]:
    """Context manager that only one thread at a time can be in with the same model; others wait."""
    with _guard:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield


def in_this_thread(hook: Callable[..., Any], otherwise: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """Restrict a function to the thread that calls this; in other threads `otherwise` is called, by default doing nothing."""
    ours = get_ident()

    def call(*args: Any, **options: Any) -> Any:
        return (hook if get_ident() == ours else otherwise)(*args, **options)

    return call


@contextmanager
def editing(model: Any, handle: Any) -> Iterator[None]:
    """Context manager that records that this thread edits activations of the model through the hook of `handle`."""
    with _guard:
        edits, edit = _editing.setdefault(model, []), (get_ident(), handle)
        edits.append(edit)
    try:
        yield
    finally:
        edits.remove(edit)


def edit_handles(model: Any) -> list[Any]:
    """Return the handles of the hooks through which any thread currently edits the model."""
    return [handle for _, handle in _editing.get(model, ())]


def check_unedited(model: Any) -> None:
    """Refuse to measure a model while this thread edits it, because the values would be those of the edited model.

    Raises:
        FeatpatchError: the call is within `fp.do` on the same model.
    """
    if any(thread == get_ident() for thread, _ in _editing.get(model, ())):
        raise FeatpatchError(
            "the model is patched already: expected an unpatched model, outside every `with fp.do(...)` block; end that block "
            "first, or put the nodes of both into one Patch"
        )
