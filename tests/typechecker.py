"""Type checks while the tests run. Literals count as `str`, so that the package's own errors are the ones that show.

`jaxtyping.jaxtyped` checks arguments twice and compiles two functions each time a function is defined, also for a function within
another one. `checked` checks the same in a third of the time: shapes wherever they are annotated, and types otherwise, except of
functions within functions, which mypy checks. `matches` does the same for a single array.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from types import CodeType
from typing import Any, Literal, get_args

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping._storage import get_shape_memo

LITERALS = [
    Literal["denoising", "noising"],
    Literal["feature", "error", "all_features", "activation"],
    Literal["recovery", "degradation"],
    Literal["add", "set"],
    Literal["direct", "through_mlps", "through_attention", "all"],
    Literal["nodes", "edges"],
    Literal["threshold", "greedy", "acdc"],
    Literal["exact", "estimate"],
    Literal["exact", "estimate", "eap_ig_inputs", "eap_ig_activations", "relp", "relp_qk", "gim"],
    Literal["exact", "atp", "ig", "eap_ig_inputs", "grad_drop", "relp", "relp_qk", "gim"],
    Literal["auto"],
    Literal["live", "frozen", "softened"],
    Literal["corrupted", "zero", "mean", "mean_by_position", "resample"],
    Literal["in", "out", "nodes"],
    Literal["signed", "absolute"],
    Literal["logit_diff", "logit"],
    Literal["clean", "corrupted"],
    Literal["effects", "attribution", "decoder", "coactivation", "labels", "site"],
    Literal["set", "add", "scale"],
    Literal["raw", "mean", "max"],
    Literal["steered", "unsteered"],
    Literal["pairs", "query", "key"],
]

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(dict.fromkeys(LITERALS, str))))

shapes = jaxtyping.jaxtyped("context")
"""Within this context an axis has one size."""
shaped: dict[CodeType, bool] = {}


whole_check = type(jaxtyping.AbstractArray).__instancecheck__
passed: set[tuple[type, type, Any]] = set()


def matches(hint: Any, value: Any) -> bool:
    """Whether an array has the type and shape of a hint; only the shape is looked at where the same types passed before."""
    types = (hint, type(value), getattr(value, "dtype", None))
    if types in passed:
        axes, *others = get_shape_memo()
        before = axes.copy()
        if hint._check_shape(value, axes, others[0], others[2]) == "":
            return True
        axes.clear()
        axes.update(before)
    found = whole_check(hint, value)
    if found:
        passed.add(types)
    return found


type(jaxtyping.AbstractArray).__instancecheck__ = matches


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """The decorator that jaxtyping's import hook puts on every function and class."""
    del typechecker
    return decorate


def decorate(thing: Any) -> Any:
    if inspect.isclass(thing):
        if "__dataclass_fields__" in vars(thing):
            thing.__init__ = decorate(thing.__init__)
        return thing
    if thing.__code__ not in shaped:
        shaped[thing.__code__] = any(map(has_shape, thing.__annotations__.values()))
    with_shapes = shaped[thing.__code__]
    if not with_shapes and "<locals>" in thing.__qualname__:
        return thing
    thing.__annotations__ = {name: resolved(hint, thing) for name, hint in thing.__annotations__.items()}
    typed = check(thing)

    @wraps(thing)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return thing(*args, **kwargs)
        if not with_shapes:
            return typed(*args, **kwargs)
        with shapes:
            return typed(*args, **kwargs)

    return wrapped


def resolved(hint: Any, function: Any) -> Any:
    """A hint in quotes as what it names, or `Any` where that is not defined yet."""
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except (NameError, TypeError):
        return Any


def has_shape(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "[" in annotation
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, get_args(annotation)))
