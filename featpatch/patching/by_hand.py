"""The operator by hand: within `do`, every call of the model runs with chosen values swapped."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Int

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Fired, Lens, dictionaries_if_any, wrap
from featpatch.patch import Patch
from featpatch.patching.chosen import Chosen, Values, choose

Tokens = Int[torch.Tensor, "..."]
"""Token ids `[pos]` or `[batch, pos]`."""


@contextmanager
def do(
    model: Any,
    patch: Patch,
    *,
    source: Tokens,
    base: Tokens | None = None,
    saes: Any = None,
    how: Literal["add", "set"] = "add",
) -> Iterator[Fired]:
    """Swaps the values of the patch's nodes in every call of the model, generation included.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        patch: what to swap; positions are token indices, or `"all"` for every position of the source.
        source: tokens of the run that the values come from.
        base: tokens of the run that is patched, in the shape of source; needed by `how="add"`, not taken by `how="set"`.
        saes: the sae-lens objects that the patch's feature and error nodes belong to.
        how: `"add"` computes the change from base to source once, in the unpatched model, and adds it. `"set"` encodes
            whatever activation arrives and sets the nodes to the source's values. The two are the same for one site in the
            base run; they differ once a patch at an earlier site has moved the activation.

    Yields:
        The count of how often the patch fired: once for each site and call of the model. A call fires when it covers the
        source's positions; the tokens that continue a cached generation pass unchanged.

    Raises:
        FeatpatchError: an unknown site, a feature index out of range, prompts of unequal length, a first call that is
            shorter than the source, or a patch that never fired.
    """
    if how not in ("add", "set"):
        raise FeatpatchError(f"how={how!r}: expected 'add' or 'set'")
    if (base is None) == (how == "add"):
        raise FeatpatchError(f"how={how!r} and base={base}: expected base tokens with 'add' and none with 'set'")
    for name, tokens in (("source", source), ("base", base)):
        if tokens is not None and not isinstance(tokens, torch.Tensor):
            raise FeatpatchError(
                f"{name} is a {type(tokens).__name__}: expected a tensor of token ids, e.g. model.to_tokens(text)"
            )
    if not patch.nodes:
        raise FeatpatchError("the patch has no nodes: expected at least one")
    if base is not None and base.shape != source.shape:
        raise FeatpatchError(f"base is {tuple(base.shape)} and source is {tuple(source.shape)}: expected equal shapes")
    lens = wrap(model)
    if lens.patched:
        raise FeatpatchError("the model is patched already: expected one `do` at a time; put the nodes of both into one Patch")
    source = torch.atleast_2d(source)
    found = dictionaries_if_any(lens, saes)
    groups = choose(lens, patch, found, source.shape[1])
    if how == "set":
        for group in groups:
            _check_settable(lens, group)
    hooks = sorted({hook for group in groups for hook in group.hooks})
    from_source = lens.read(source, hooks)
    total, fired = Fired(), []
    with ExitStack() as stack:
        if base is not None:
            from_base = lens.read(torch.atleast_2d(base), hooks)
            changes = [_adding(group.delta(from_base, from_source)) for group in groups]
        else:
            live: dict[str, torch.Tensor] = {}
            changes = [_setting(group, from_source, live) for group in groups]
            for hook in {hook for group in groups for hook in group.hooks - {group.site}}:
                stack.enter_context(lens.edit(hook, _keeping(hook, live)))
        for group, change in zip(groups, changes, strict=True):
            fired.append(stack.enter_context(lens.edit(lens.carrier(group.site), _on_prompt(change, source.shape, total))))
        yield total
        silent = [group.site for group, firing in zip(groups, fired, strict=True) if not firing.count]
        if silent:
            raise FeatpatchError(f"the patch at {', '.join(silent)} never fired: expected a call of the model within `do`")


def _check_settable(lens: Lens, group: Chosen) -> None:
    site = group.site
    if sites.highest(group.hooks - {site}, lens.n_layers) > sites.layer_of(site):
        raise FeatpatchError(
            f"the dictionary at {site!r} reads at {', '.join(group.hooks - {site})}, after it writes, so that nothing can be "
            "set: expected how='add' with base tokens"
        )
    if lens.carrier(site) != site:
        raise FeatpatchError(
            f"site {site!r} of a {type(lens.model).__name__} is not the residual stream itself, so that it can't be set: "
            "expected another site, how='add' with base tokens, or a HookedTransformer"
        )


Change = Callable[[torch.Tensor], torch.Tensor]
"""From the live activation at the source's positions to its change, flat `[batch or 1, pos, d]`."""


def _keeping(hook: str, live: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda activation: live.update({hook: activation})


def _adding(delta: torch.Tensor) -> Change:
    return lambda activation: delta


def _setting(group: Chosen, source: Values, live: dict[str, torch.Tensor]) -> Change:
    def change(activation: torch.Tensor) -> torch.Tensor:
        length = activation.shape[1]
        base = {hook: live[hook][:, :length] for hook in group.hooks - {group.site}} | {group.site: activation}
        return group.delta(base, {hook: source[hook] for hook in group.hooks})

    return change


def _on_prompt(change: Change, shape: torch.Size, total: Fired) -> Callable[[torch.Tensor], torch.Tensor | None]:
    batch, length = shape

    def edit(activation: torch.Tensor) -> torch.Tensor | None:
        if activation.shape[1] < length:
            if total.count:
                return None
            raise FeatpatchError(
                f"the model was called with {activation.shape[1]} tokens within a patch of {length}: expected at least "
                f"{length}, with the source's positions first"
            )
        if batch not in (1, len(activation)):
            raise FeatpatchError(
                f"the model was called with {len(activation)} prompts within a patch of {batch}: expected {batch}"
            )
        delta = change(activation[:, :length])
        changed = activation.clone()
        changed[:, :length] += delta.reshape(-1, length, *activation.shape[2:]).to(activation)
        total.count += 1
        return changed

    return edit
