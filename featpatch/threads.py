"""Share a model between threads: a temporary change to a model takes effect only in the thread that made it.

A call of the model in another thread, during a sweep or within `fp.do`, returns what it would return on its own. Forward passes
that replace a layer wait for one another, because only one replacement can be in place at a time.

TransformerLens' own hooks act in every thread. `Watch` rejects a measurement during which another thread attached or removed
some.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_not
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from featpatch.errors import FeatpatchError

_locks: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
_editing: "WeakKeyDictionary[Any, list[tuple[int, Any]]]" = WeakKeyDictionary()
_last: set[int] = set()
_guard = RLock()

HOOKS, LISTS = ("_forward_hooks", "_backward_hooks"), ("fwd_hooks", "bwd_hooks")
"""The attributes in which torch keeps the hooks of a hook point, and in which the hook point keeps their handles."""


@contextmanager
def exclusively(model: Any) -> Iterator[None]:
    """Let only one thread at a time work with a model until the context ends; other threads wait."""
    with _guard:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield


def in_this_thread(hook: Callable[..., Any], otherwise: Callable[..., Any] = lambda *_, **__: None) -> Callable[..., Any]:
    """Restrict a function to the thread that calls this one; other threads call `otherwise`, which does nothing by default."""
    ours = get_ident()

    def call(*args: Any, **options: Any) -> Any:
        return (hook if get_ident() == ours else otherwise)(*args, **options)

    return call


@contextmanager
def editing(model: Any, point: Any, hook: Callable[..., Any], *, first: bool, last: bool = False) -> Iterator[None]:
    """Make a hook point of the model call `hook` in this thread, until the context ends.

    The hook is recorded at once, so that no thread mistakes it for a hook of the user. `reset_hooks` does not remove it.

    Args:
        first: whether the hook runs before those that are there already.
        last: whether the hook also runs after those that this function adds later.
    """
    call = in_this_thread(hook)
    with _guard:
        handles = point.fwd_hooks
        point.add_hook(call, is_permanent=True, prepend=first)
        # another thread may have added a hook, or replaced the list, at the same moment
        handle = next(each for each in (*point.fwd_hooks, *handles) if each.user_hook is call)
        edits, edit = _editing.setdefault(model, []), (get_ident(), handle)
        edits.append(edit)
        if last:
            _last.add(handle.hook.id)
        for later in [each for each in point._forward_hooks if each in _last]:
            point._forward_hooks.move_to_end(later)
    try:
        yield
    finally:
        with _guard:
            handle.hook.remove()
            _last.discard(handle.hook.id)
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
            edits[:] = [other for other in edits if other is not edit]


class Watch:
    """The hooks that the user attached to a model, and a check that they stay the same while it is measured.

    A hook that comes and goes within one forward pass is noticed because TransformerLens replaces the list of handles on
    removal.

    Args:
        model: the model.
        points: its hook points.
    """

    def __init__(self, model: Any, points: Iterable[Any]) -> None:
        self.model, self.points = model, tuple(dict.fromkeys(points))
        self.forward, self.backward = [[getattr(point, kind) for point in self.points] for kind in HOOKS]
        self.begin()

    def begin(self) -> None:
        """Record the hooks that are attached now as the expected ones."""
        self._expected: list[int] | None = self._known(self._lists())

    def attached(self, *, backward: bool = True) -> list[int]:
        """Return torch's ids of all attached hooks except those of `editing`."""
        with _guard:
            return self._foreign(chain(*self.forward, *(self.backward if backward else ())))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Run a forward pass in this context, and raise if another thread changed the hooks in the meantime.

        Raises:
            FeatpatchError: see `check`; this error replaces any other, which those hooks may have caused.
        """
        before = self._lists()
        try:
            yield
        except Exception:
            self.check(before)
            raise
        self.check(before)

    def check(self, before: Sequence[Any] = ()) -> None:
        """Check that the hooks have not changed since `begin`.

        Args:
            before: the lists of handles at the beginning of the forward pass.

        Raises:
            FeatpatchError: the hooks have changed, now or at an earlier check.
        """
        now = self._lists()
        if any(map(is_not, before, now)) or self._expected is None or self._known(now) != self._expected:
            self._expected = None  # a caller that handles this error must not continue with wrong values
            raise FeatpatchError(
                "another thread attached hooks to the model or removed them during a measurement (run_with_hooks, "
                "run_with_cache, add_hook or reset_hooks): expected the same hooks throughout; make those calls before or "
                "after the measurement, or on a copy of the model"
            )

    def _known(self, lists: list[Any]) -> list[int]:
        """Return the hooks that are attached and those in the lists, because another thread may be between the two steps."""
        with _guard:
            return self.attached() + self._foreign(handle.hook.id for handle in chain.from_iterable(lists))

    def _foreign(self, hooks: Iterable[int]) -> list[int]:
        found = [*hooks]
        ours = {handle.hook.id for _, handle in _editing.get(self.model, ())} if found else ()
        return [each for each in found if each not in ours]

    def _lists(self) -> list[Any]:
        return [handles for kind in LISTS for handles in map(attrgetter(kind), self.points)]


def check_unedited(model: Any) -> None:
    """Check that this thread is not editing the model, because measured values would be those of the edited model.

    Raises:
        FeatpatchError: the call is within `fp.do` or `fp.steer` on the same model.
    """
    if any(thread == get_ident() for thread, _ in [*_editing.get(model, ())]):
        raise FeatpatchError(
            "the model is patched already: expected an unpatched model, outside every `with fp.do(...)` and "
            "`with fp.steer(...)` block; end that block first, or put the nodes of both into one call"
        )
