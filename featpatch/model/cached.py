"""Activations that a user gives as a cache of TransformerLens instead of prompts."""

from collections.abc import Iterable
from typing import Any

import torch

from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens


def cached(lens: Lens, name: str, given: Any, hooks: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return activations from an `ActivationCache` of TransformerLens, or a mapping of them, after checking their shapes.

    Args:
        name: the name of the argument, for errors.
        given: activations `[batch, pos, ...]`, `[pos, ...]` or `[...]` by the name of their hook point.
        hooks: the hook points that are needed.

    Returns:
        The activations `[batch, pos, ...]`, with sizes of 1 for dimensions that are not given.

    Raises:
        FeatpatchError: a hook point is missing, or an activation does not have the model's shape there.
    """
    given = getattr(given, "cache_dict", given)
    known = {lens.site(hook): values for hook, values in given.items() if hook in lens.hook_points}
    found = {}
    for hook in hooks:
        values = known.get(hook)
        shape = lens.shape(hook)
        if values is None:
            raise FeatpatchError(
                f"{name} has no activations at {hook!r}: expected them, because they are needed; cache this hook point "
                "too, e.g. with model.run_with_cache(tokens)"
            )
        leading = values.ndim - len(shape) if isinstance(values, torch.Tensor) else -1
        if not 0 <= leading <= 2 or tuple(values.shape[leading:]) != shape or not torch.isfinite(values).all():
            size = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise FeatpatchError(
                f"{name} is {size} at {hook!r}: expected a tensor [batch, pos, {', '.join(map(str, shape))}] of finite numbers"
            )
        found[hook] = values.detach().to(lens.device).reshape(*[1] * (2 - leading), *values.shape)
    return found
