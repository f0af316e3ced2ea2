"""One model in several threads: what featpatch changes in a model for a time acts only in the thread that changed it.

So a call of the model in another thread, beside a sweep or within `fp.do`, returns what it always returns. Passes that put
something in the place of a block wait for one another, since only one of them at a time can.
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
def alone(model: Any) -> Iterator[None]:
    """Make other threads wait that enter this context with the same model."""
    with _guard:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield


def own(hook: Callable[..., Any], otherwise: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """A hook that acts in this thread; in every other one it is `otherwise`, by default a hook that changes nothing."""
    ours = get_ident()

    def act(*args: Any, **options: Any) -> Any:
        return (hook if get_ident() == ours else otherwise)(*args, **options)

    return act


@contextmanager
def editing(model: Any, handle: Any) -> Iterator[None]:
    """Note that this thread edits activations of the model, by the hook of this handle."""
    with _guard:
        edits, edit = _editing.setdefault(model, []), (get_ident(), handle)
        edits.append(edit)
    try:
        yield
    finally:
        edits.remove(edit)


def handles(model: Any) -> list[Any]:
    """The handles of the hooks by which threads edit the model now."""
    return [handle for _, handle in _editing.get(model, ())]


def check_unedited(model: Any) -> None:
    """Refuse a model that this thread edits: what is measured would be that of another model.

    Raises:
        FeatpatchError: this is called within `fp.do` on the same model.
    """
    if any(thread == get_ident() for thread, _ in _editing.get(model, ())):
        raise FeatpatchError(
            "the model is patched already: expected it as it is, outside of every `with fp.do(...)`; end that block first, or "
            "put the nodes of both into one Patch"
        )
