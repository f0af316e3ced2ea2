"""Views of one prompt: the features that are active on each token, and the attention pattern of a head."""

from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
import torch

from featpatch import sites
from featpatch.effects.collector import check_saes
from featpatch.effects.grid import measured
from featpatch.effects.plots import tick
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers, decimal
from featpatch.frame import Frame
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Effect, Node, Position
from featpatch.pairs.build import Prompt
from featpatch.pairs.pair import Pair, token_index
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import check_tokenizer
from featpatch.sae.dictionary import Dictionary, dictionaries, digests
from featpatch.tracing.prompt import prompt_of
from featpatch.untrusted import in_figure

PROMOTED = 3
"""The number of tokens that a table of active features names for each feature."""
ROWS = 3
"""The largest number of effects of a head that a title names."""


@torch.no_grad()
def active_features(
    model: Any, saes: Any, prompt: Prompt | Pair, *, effects: Effects | None = None, per_token: int = 5
) -> pd.DataFrame:
    """List the features that are active on each token of a prompt, strongest first.

    `promotes` names the tokens whose logits the feature's decoder direction raises most, along the direct path and without the
    final norm; it is empty for SAEs that do not write to the residual stream. Special tokens such as BOS are left out.

    Args:
        model: a TransformerBridge or a HookedTransformer with a tokenizer.
        saes: the SAEs.
        prompt: a text, its token ids, or a pair, whose clean prompt is shown.
        effects: a table of effects of features, whose recovery and degradation are added. They are exactly 0 if the feature is
            the same in both runs, and empty if it was not measured. An effect at a label is shown at the tokens of the label in
            this pair.
        per_token: the number of features that are listed per token and SAE.

    Returns:
        One row per token, SAE and feature: `position`, `token`, `sae`, `feature`, `value`, for a pair with a counterfactual
        also the value at the same place in the `corrupted` prompt (only labels have one if the pair is patched label by label),
        the effects if they are given, and `promotes`.

    Raises:
        FeatpatchError: the model has no tokenizer, the prompt is not valid, or the effects are those of other
            SAEs, or at labels while the prompt is a text.

    Examples:
        >>> table = fp.active_features(model, saes, pairs[0], effects=effects, per_token=1)
        >>> table.columns.tolist()
        ['position', 'token', 'sae', 'feature', 'value', 'corrupted', 'recovery', 'degradation', 'promotes']
        >>> int(table["position"].min())
        1
    """
    check_numbers(1, per_token=per_token)
    check_kinds((Effects, NoneType), effects=effects)
    lens = wrap(model)
    prompts, special = _prompts(lens, prompt)
    found = dictionaries(lens, saes)
    known = {} if effects is None else _effects(effects, found, prompt, len(prompts[0]))
    hooks = sorted({hook for dictionary in found for hook in dictionary.hooks})
    read = [lens.read(torch.tensor([ids]), hooks) for ids in prompts]
    other, by_layer = _other_places(prompt), any(dictionary.codec.groups > 1 for dictionary in found)
    rows = []
    for dictionary in found:
        features, *corrupted = (dictionary.split(run).features[0] for run in read)
        order = features.abs().topk(min(per_token, features.shape[-1])).indices.tolist()
        active = [(at, index) for at, best in enumerate(order) for index in best if at not in special and features[at, index]]
        raised = promoted(lens, dictionary, sorted({index for _, index in active}), PROMOTED)
        for at, index in active:
            row: dict[str, Any] = {"position": at, "token": lens.tokenizer.decode([prompts[0][at]]), "sae": dictionary.name}
            node = dictionary.node(index, at)
            row |= {"site": node.site} if by_layer else {}
            row |= {"feature": node.index, "value": float(features[at, index])}
            for run in corrupted:
                row["corrupted"] = float(run[other[at], index]) if at in other else None
            for effect in () if effects is None else effects.directions_run():
                row[effect] = known[effect].get((dictionary.name, index, at), known[effect].get((dictionary.name, None, at)))
            rows.append({**row, "promotes": " ".join(f"{token!r}" for token, _ in raised.get(index, []))})
    columns = ["position", "token", "sae", *(["site"] if by_layer else []), "feature", "value"]
    columns += [*(["corrupted"] if len(prompts) > 1 else []), *known, "promotes"]
    return Frame(rows, columns=columns).astype(dict.fromkeys(known, float))


@torch.no_grad()
def promoted(
    lens: Lens, dictionary: Dictionary, features: Sequence[int], n: int, *, sign: int = 1
) -> dict[int, list[tuple[str, float]]]:
    """Return the tokens whose logits the decoder direction of each feature raises most, with the change of the logit.

    The path is direct, without the final norm. There are none if the dictionary is not linear or does not write to the residual
    stream, or if the unembedding is quantized.

    Args:
        features: the numbers of the features among all of the dictionary.
        n: the number of tokens.
        sign: 1 for the tokens that are raised most, -1 for those that are lowered most.
    """
    unembedding = lens.unembedding
    readable = dictionary.behaviour.linear and unembedding.dtype.is_floating_point
    readable = readable and all(map(sites.on_stream, dictionary.outputs))
    if not features or not readable:
        return {}
    parts = list(dictionary.by_output(dictionary.directions(torch.tensor(features)).to(unembedding)).values())
    logits = (torch.stack(parts).sum(0) if dictionary.combine == "add" else parts[-1]) @ unembedding
    best = (sign * logits).topk(min(n, logits.shape[-1])).indices
    return {
        index: [(lens.tokenizer.decode([token]), float(row[token])) for token in tokens]
        for index, row, tokens in zip(features, logits, best.tolist(), strict=True)
    }


@torch.no_grad()
def attention_pattern(
    model: Any, prompt: Prompt | Pair, layer: int, head: int, *, effects: Effects | None = None, title: str = ""
) -> Any:
    """Plot the attention pattern of a head on a prompt, from each token (rows) to the tokens it attends to (columns).

    Args:
        model: a TransformerBridge or a HookedTransformer with a tokenizer.
        prompt: a text, its token ids, or a pair, whose clean and corrupted prompts, if it has both, are next to each other.
        layer, head: the head.
        effects: a table with effects of the head, such as one of `rank_components`, which are named in the title.
        title: the title; by default the head and its effects.

    Returns:
        A `plotly.graph_objects.Figure`.

    Raises:
        FeatpatchError: the model has no such head or no tokenizer, or the prompt is not valid.

    Examples:
        >>> figure = fp.attention_pattern(model, pairs[0], layer=1, head=3, effects=components)
        >>> figure.data[0].z.shape == (len(pairs[0]), len(pairs[0]))
        True
    """
    from plotly.subplots import make_subplots  # type: ignore[import-untyped]

    check_numbers(0, layer=layer, head=head)
    check_kinds((Effects, NoneType), effects=effects)
    check_kinds(str, title=title)
    lens = wrap(model)
    prompts, _ = _prompts(lens, prompt)
    if layer >= lens.n_layers:
        raise FeatpatchError(f"layer={layer}: expected 0 to {lens.n_layers - 1}, a layer of the model")
    hook = sites.component(layer, "pattern")
    patterns = [lens.read(torch.tensor([ids]), [hook])[hook][0] for ids in prompts]
    if head >= len(patterns[0]):
        raise FeatpatchError(f"head={head}: expected 0 to {len(patterns[0]) - 1}, a head of layer {layer}")
    names = ["clean", "corrupted"] if len(prompts) > 1 else [""]
    figure = make_subplots(cols=len(prompts), subplot_titles=names, horizontal_spacing=0.15)
    for column, (ids, pattern) in enumerate(zip(prompts, patterns, strict=True), 1):
        ticks = [in_figure(tick(at, lens.tokenizer.decode([token]))) for at, token in enumerate(ids)]
        figure.add_heatmap(
            x=ticks, y=ticks, z=pattern[head].float().cpu().numpy(), coloraxis="coloraxis", row=1, col=column,
            hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
        )  # fmt: skip
    shown = [title] if title else [f"head {layer}.{head}", *_head_effects(effects, layer, head)]
    scale = {"colorscale": ((0.0, "#ffffff"), (1.0, "#2166ac")), "cmin": 0, "cmax": 1, "colorbar": {"title": "attention"}}
    figure.update_layout(title="<br>".join(map(in_figure, shown)), coloraxis=scale, margin_t=80 + 20 * len(shown))
    figure.update_xaxes(type="category", dtick=1, tickangle=-90, title="to", showgrid=False)
    figure.update_yaxes(type="category", dtick=1, autorange="reversed", title="from", showgrid=False)
    return figure


def _head_effects(effects: Effects | None, layer: int, head: int) -> list[str]:
    """Return the largest effects of a head in words."""
    if effects is None:
        return []
    own = [n.kind == "head" and n.index == head and sites.layer_of(n.site) == layer for n in effects.nodes]
    rows = effects.take(np.array(own, dtype=bool))
    rows = rows.take(np.argsort(-rows.sizes(), kind="stable")[:ROWS])
    values = {effect: rows.pooled(effect) for effect in rows.directions_run()}
    said = [
        f"{sites.within(node.site)} @ {node.position}: "
        + ", ".join(f"{effect} {decimal(of[n])}" for effect, of in values.items())
        for n, node in enumerate(rows.nodes)
    ]
    return said or ["the table of effects has no row of this head"]


def _prompts(lens: Lens, prompt: Prompt | Pair) -> tuple[list[tuple[int, ...]], frozenset[int]]:
    """Return the token ids of a prompt, or of the prompts of a pair, and the positions of special tokens of the first.

    Raises:
        FeatpatchError: the model has no tokenizer or does not know a token; the prompt is something else, empty, or too long.
    """
    check_tokenizer(lens.tokenizer, "to show tokens")
    if isinstance(prompt, Pair):
        check_tokens(Pairs((prompt,)), lens)
        return [prompt.clean, *([prompt.corrupted] if prompt.has_counterfactual else [])], prompt.special
    ids, special = prompt_of(lens, prompt)
    return [ids], special


def _other_places(prompt: Prompt | Pair) -> dict[int, int]:
    """Return the position in the corrupted prompt of each token of the clean prompt that has one."""
    if not isinstance(prompt, Pair):
        return {}
    if not prompt.by_label:
        return {at: at for at in range(len(prompt))}
    return {here: there for label in prompt.labels for here, there in prompt.places(label)}


def _effects(
    effects: Effects, found: Sequence[Dictionary], prompt: Prompt | Pair, length: int
) -> dict[Effect, dict[tuple[str, int | None, int], float]]:
    """Return effects by SAE, feature and token; by None instead of a feature, 0 where a feature without a row is unchanged.

    Raises:
        FeatpatchError: the table is of other SAEs, or at labels while the prompt is a text.
    """
    known = effects.metadata.get("saes", {})
    check_saes(effects, digests([each for each in found if each.name in known]))

    def tokens(position: Position) -> Sequence[int]:
        inside = isinstance(position, int) and -length <= position < length
        if isinstance(prompt, Pair):
            here = position in prompt.labels if isinstance(position, str) else inside
            return prompt.positions(position) if here or position == "all" else ()
        if position == "all":
            return range(length)
        if isinstance(position, str):
            raise FeatpatchError(
                f"the effects are at the label {position!r}, and the prompt is a text: expected a pair, which has labels, such "
                "as pairs[0]"
            )
        return [token_index(position, length)] if inside else ()

    by_effect: dict[Effect, dict[tuple[str, int | None, int], float]] = {}
    rows = effects.whole.where(kind="feature")
    for effect in effects.directions_run():
        of = by_effect.setdefault(effect, {})
        for dictionary in (each for each in found if each.name in known):
            lowest = dictionary.outputs[0]
            like = Node(lowest, "feature", 0, sae=dictionary.name)
            unchanged = [position for layer, position in measured(effects, like) if layer == sites.layer_of(lowest)]
            of |= dict.fromkeys(((dictionary.name, None, token) for position in unchanged for token in tokens(position)), 0.0)
        for node, value in zip(rows.nodes, rows.pooled(effect), strict=True):
            number = next((each.number(node) for each in found if each.name == node.sae), node.index)
            of |= {(node.sae, number, token): float(value) for token in tokens(node.position)}
    return by_effect
