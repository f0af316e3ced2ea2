"""Patch by hand: within `do`, every call of the model runs with the chosen nodes patched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int

from featpatch.errors import FeatpatchError, check_kinds, counted, errors_about
from featpatch.model.cached import cached
from featpatch.model.lens import Fired, Lens, added, keeping
from featpatch.model.transformer_lens import ActivationCache, wrap
from featpatch.nodes import Node, Patch
from featpatch.pairs.pair import Pair, token_index
from featpatch.pairs.tokens import check_starts, is_padded, unmasked
from featpatch.patching.chosen import Chosen, Values, check_settable, choose
from featpatch.sae.dictionary import dictionaries_if_any


def positions_in(node: Node, length: int, pair: Pair | None) -> list[int]:
    """Return the token indices of a node in a prompt of `length` tokens, that of a pair if it is given.

    Raises:
        FeatpatchError: the position is out of range, a label that the pair lacks, or a label without a pair.
    """
    with errors_about(f"node {str(node)!r}"):
        if pair is not None:
            return pair.positions(node.position)
        if isinstance(node.position, int):
            return [token_index(node.position, length)]
    if node.position != "all":
        raise FeatpatchError(
            f"node {str(node)!r} is at a label: expected a token index or 'all', or pair=..., whose labels it can name"
        )
    return list(range(length))


Tokens = Int[torch.Tensor, "..."]
"""Token ids `[pos]` or `[batch, pos]`."""


@contextmanager
def do(
    model: Any,
    patch: Patch,
    *,
    source: Tokens | ActivationCache | Values | None = None,
    base: Tokens | None = None,
    pair: Pair | None = None,
    saes: Any = None,
    how: Literal["add", "set"] = "add",
    attention_mask: Tokens | None = None,
    source_attention_mask: Tokens | None = None,
) -> Iterator[Fired]:
    """Context manager that patches nodes in every call of the model, including generation.

    The patch acts only in the thread that enters the context; calls of the model in other threads are not affected. Other
    featpatch functions refuse the model in this thread until the context ends.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        patch: the nodes to patch; their positions are token indices (-1 is the last token), or `"all"` for every position of
            the source. With a pair they are as in `rank_features`: also labels, and `"all"` leaves out special tokens.
        source: tokens of the run that values are taken from; the clean prompt of the pair by default. Or the activations
            themselves, as the `ActivationCache` of TransformerLens' `run_with_cache` or as `{hook: tensor [batch, pos, ...]}`.
        base: tokens of the run that is patched, with the shape of `source`; required by `how="add"`, refused by `how="set"`.
            The corrupted prompt of the pair by default.
        pair: the pair that the prompts are from; the patch can name its labels.
        saes: the sae-lens objects that the patch's feature and error nodes belong to.
        how: `"add"` computes the change from base to source once, in the unpatched model, and adds it. `"set"` encodes
            whatever activation arrives and sets the nodes to the source's values. The two are the same for a patch at one hook
            point in the base run; they differ once a patch at an earlier hook point has changed the activation.
        attention_mask: for padded prompts, 1 for tokens and 0 for padding, with the shape of `source`. Positions are counted in
            the padded rows; padding is not patched. Pass the same mask to the calls of the model.
        source_attention_mask: the mask of the source if it differs; `attention_mask` by default.

    Yields:
        A counter of how often the patch was applied: once for each hook point and call of the model. The patch is applied in
        calls that cover the source's positions; the tokens that continue a cached generation are left unchanged.

    Raises:
        FeatpatchError: a hook point is unknown, an index or position is out of range, the prompts have unequal lengths, tokens
            begin or end with padding and there is no mask, a mask hides a patched position, the first call is shorter than the
            source, another `do` on this model has not ended, or the patch was never applied.

    Examples:
        >>> import torch
        >>> clean, corrupted = torch.tensor([pairs[0].clean]), torch.tensor([pairs[0].corrupted])
        >>> name = fp.Node("blocks.0.hook_resid_pre", "activation", position=pairs[0].labels["S2"])
        >>> with fp.do(model, fp.Patch([name]), source=clean, base=corrupted):
        ...     patched = model(corrupted)
        >>> torch.allclose(patched, model(clean), atol=1e-3)  # the prompts differ only at S2
        True
        >>> with fp.do(model, fp.Patch([fp.head(1, 3, "v", "S2")]), pair=pairs[0]):
        ...     patched = model(corrupted)
    """
    if how not in ("add", "set"):
        raise FeatpatchError(f"how={how!r}: expected 'add' or 'set'")
    check_kinds((Pair, type(None)), pair=pair)
    if pair is not None:
        source = torch.tensor([pair.clean]) if source is None else source
        base = torch.tensor([pair.corrupted]) if base is None and how == "add" else base
    if source is None:
        raise FeatpatchError("source and pair are both None: expected tokens, or a pair whose clean prompt is the source")
    if (base is None) == (how == "add"):
        raise FeatpatchError(f"how={how!r} and base={base}: expected base tokens with how='add', and base=None with how='set'")
    if not isinstance(patch, Patch):
        raise FeatpatchError(
            f"patch is of type {type(patch).__name__}: expected an fp.Patch, which holds the nodes to patch; write "
            "fp.Patch([node]) or fp.Patch(effects.top(5).nodes)"
        )
    given_values = None if isinstance(source, torch.Tensor) else source
    if given_values is not None and not isinstance(given_values, ActivationCache | Mapping):
        _rows("source", source)
    base = None if base is None else _rows("base", base)
    if not patch.nodes:
        raise FeatpatchError("the patch has no nodes: expected at least one; name what to patch")
    lens = wrap(model)
    if given_values is None:
        source = _rows("source", source)
    else:
        site = lens.site(patch.nodes[0].site)
        source = torch.zeros(cached(lens, "source", given_values, [site])[site].shape[:2], dtype=torch.long)
    if base is not None and base.shape != source.shape:
        if pair is not None and pair.by_label:
            raise FeatpatchError(
                f"{pair!r}, whose prompts have unequal lengths: expected prompts that correspond position by position; use "
                "fp.rank_components or fp.rank_features, which patch label by label"
            )
        raise FeatpatchError(f"base is {tuple(base.shape)} and source is {tuple(source.shape)}: expected equal shapes")
    if pair is not None and source.shape[1] != len(pair):
        raise FeatpatchError(
            f"source has {source.shape[1]} tokens and pair has {len(pair)}: expected the prompts of this pair, whose labels "
            "name positions"
        )
    mask = None if base is None else _mask(lens, "base", base, attention_mask)
    of_source = attention_mask if source_attention_mask is None else source_attention_mask
    given = None if given_values is not None and of_source is None else _mask(lens, "source", source, of_source)
    shown = _shown(patch, source.shape, [given] if base is None else [mask, given], pair)
    found = dictionaries_if_any(lens, saes)
    groups = choose(lens, patch, found, source.shape[1], partial(positions_in, length=source.shape[1], pair=pair))
    if how == "set":
        for group in groups:
            check_settable(lens, group)
    hooks = sorted({hook for group in groups for hook in group.hooks})
    from_source = lens.read(source, hooks, given) if given_values is None else cached(lens, "source", given_values, hooks)
    uneven = {hook: list(values.shape) for hook, values in from_source.items() if values.shape[:2] != source.shape}
    if uneven:
        raise FeatpatchError(
            f"source has activations of shape {uneven}: expected {list(source.shape)} tokens at every hook point"
        )
    total, fired = Fired(), []
    with ExitStack() as stack:
        if base is not None:
            from_base = lens.read(base, hooks, mask)
            changes = [_adding(group.delta(from_base, from_source)) for group in groups]
        else:
            live: dict[str, torch.Tensor] = {}
            changes = [_setting(group, from_source, live) for group in groups]
            for hook in {hook for group in groups for hook in group.hooks - {group.site}}:
                stack.enter_context(lens.edit(hook, keeping(hook, live)))
        for group, change in zip(groups, changes, strict=True):
            fired.append(
                stack.enter_context(lens.edit(lens.carrier(group.site), _on_prompt(change, source.shape, shown, total)))
            )
        yield total
        silent = [group.site for group, firing in zip(groups, fired, strict=True) if not firing.count]
        if silent:
            raise FeatpatchError(
                f"the patch at {', '.join(silent)} was never applied: expected a call of the model inside the `with "
                "fp.do(...)` block, in the same thread"
            )


def _rows(name: str, tokens: Any) -> Int[torch.Tensor, "batch pos"]:
    """Return token ids or a mask as a table of one row per prompt; raise a FeatpatchError unless they are integers."""
    if not isinstance(tokens, torch.Tensor):
        other = ", or activations from model.run_with_cache(text)" if name == "source" else ""
        raise FeatpatchError(
            f"{name} is a {type(tokens).__name__}: expected a tensor of token ids, e.g. model.to_tokens(text){other}"
        )
    if tokens.is_floating_point() or tokens.is_complex() or not 0 < tokens.ndim <= 2 or not tokens.numel():
        raise FeatpatchError(
            f"{name} is a tensor {list(tokens.shape)} of {tokens.dtype}: expected integers [batch, pos] or [pos]"
        )
    return torch.atleast_2d(tokens)


def _mask(lens: Lens, name: str, tokens: torch.Tensor, given: Tokens | None) -> Int[torch.Tensor, "batch pos"] | None:
    """Return the attention mask of some prompts, or None if none is given and there is no padding.

    Raises:
        FeatpatchError: there is padding but no mask, or the mask does not fit the prompts.
    """
    tokenizer = lens.tokenizer
    if given is None:
        if tokenizer is not None:
            check_starts(tokenizer, tokens.tolist())
        for row in tokens.tolist():
            if tokenizer is not None and is_padded(tokenizer, row):
                raise FeatpatchError(
                    f"{name} has a row {row} that begins or ends with padding: expected attention_mask= with 1 for tokens and "
                    "0 for padding"
                )
        return None
    mask = _rows("attention_mask", given)
    if mask.shape != tokens.shape:
        raise FeatpatchError(f"attention_mask is {list(mask.shape)} and {name} is {list(tokens.shape)}: expected equal shapes")
    for row in mask.tolist():
        unmasked(row)
    return mask.long()


def _shown(
    patch: Patch, shape: torch.Size, masks: Sequence[torch.Tensor | None], pair: Pair | None
) -> Bool[torch.Tensor, "batch pos 1"] | None:
    """Return a mask of the positions at which every run has a token, or None if no run has a mask.

    Raises:
        FeatpatchError: a node is at a position that is padding in one of the runs.
    """
    if all(mask is None for mask in masks):
        return None
    tokens = torch.stack([torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu() for mask in masks])
    shown = tokens.all(0)
    for node in patch.nodes:
        everywhere = node.position == "all"
        if not torch.equal(shown, tokens.any(0)) if everywhere else not shown[:, positions_in(node, shape[1], pair)].all():
            raise FeatpatchError(
                f"node {str(node)!r} is at padding in one of the prompts: expected a position at which every prompt has a "
                "token and, for 'all', the same padding in source and base"
            )
    return shown[..., None]


ChangeOf = Callable[[torch.Tensor], torch.Tensor]
"""A function from the current activation at the source's positions to its change, flat `[batch or 1, pos, d]`."""


def _adding(delta: torch.Tensor) -> ChangeOf:
    return lambda activation: delta


def _setting(group: Chosen, source: Values, live: dict[str, torch.Tensor]) -> ChangeOf:
    def change(activation: torch.Tensor) -> torch.Tensor:
        length = activation.shape[1]
        base = {hook: live[hook][:, :length] for hook in group.hooks - {group.site}} | {group.site: activation}
        return group.delta(base, {hook: source[hook] for hook in group.hooks})

    return change


def _on_prompt(
    change: ChangeOf, shape: torch.Size, shown: torch.Tensor | None, total: Fired
) -> Callable[[torch.Tensor], torch.Tensor | None]:
    batch, length = shape

    def edit(activation: torch.Tensor) -> torch.Tensor | None:
        if activation.shape[1] < length:
            if total.count:
                return None
            raise FeatpatchError(
                f"the model was called with {counted(activation.shape[1], 'token')} inside a patch of {length}: expected at "
                f"least {length}, the source's positions first"
            )
        if batch not in (1, len(activation)):
            raise FeatpatchError(
                f"the model was called with {counted(len(activation), 'prompt')} inside a patch of {batch}: expected "
                f"{batch}; use the batch size of the source"
            )
        delta = change(activation[:, :length])
        if shown is not None:
            delta = delta.masked_fill(~shown.to(delta.device), 0)
        changed = activation.clone()
        changed[:, :length] = added(activation[:, :length], delta.reshape(-1, length, *activation.shape[2:]))
        total.count += 1
        return changed

    return edit
