"""The HTML report as sections, made from a table of effects and from plain text and numbers, without a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects.frames import TOP, brief, rounded
from featpatch.effects.statistics import CONFIDENCE, RESAMPLES, SEED
from featpatch.effects.table import Effects
from featpatch.nodes import Node, Position
from featpatch.page.page import Block, Section, block, embedded, page, table
from featpatch.pairs.pair import PairText


@dataclass(frozen=True)
class FeatureCard:
    """A feature card: the activations of a feature in one pair, with further facts.

    Attributes:
        pair: the index of the pair whose activations are shown, one in which the feature differs.
        clean, corrupted: the activation on each token of that pair.
        facts: further facts about the feature, by name.
        link: the address of the feature's page on Neuronpedia; empty if there is none.
    """

    pair: int
    clean: Sequence[float]
    corrupted: Sequence[float]
    facts: Mapping[str, str] = field(default_factory=dict)
    link: str = ""


@dataclass(frozen=True)
class Material:
    """The content of a report other than the effects.

    Attributes:
        question: the question that the report answers, in a sentence.
        prompts: the text of every pair.
        features: the cards of the features that are shown, by node.
        checks: the outcome of the checklist for the pairs that are shown, one row per pair and rule; None without one.
        figures: further figures (`plotly.graph_objects.Figure`), by title.
        sections: further sections of the page.
    """

    question: str = ""
    prompts: Sequence[PairText] = ()
    features: Mapping[Node, FeatureCard] = field(default_factory=dict)
    checks: pd.DataFrame | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    sections: Sequence[Section] = ()


VALUES = 8
"""The largest number of values of a tag for which effects are broken down by the tag."""

PROMPTS = 8
"""The number of pairs that are shown."""

POSITIONS = 3
"""The largest number of positions at which heads are shown by layer and head."""

ROWS = 20_000
"""The largest number of features or heads that are shown, those with the largest effects."""


def page_of(effects: Effects, material: Material, components: Effects | None) -> str:
    """Return the report as the content of an HTML file."""
    metadata = effects.metadata
    sections = [
        _question(effects, material),
        _ranking(effects, material),
        _quadrants(effects),
        _sites(effects),
        _maps(effects, components),
        *(Section(f"figure-{n}", title, "", [embedded(chart)]) for n, (title, chart) in enumerate(material.figures.items())),
        *material.sections,
        _stability(effects),
        _provenance(effects),
    ]
    name = Path(metadata.get("model", {}).get("name", "")).name
    title = material.question or f"Which SAE features cause this? {metadata['metric']} of {name}"
    ranked = f"paths (route {effects.route!r})" if effects.route else "features or heads"
    subtitle = f"{effects.value} effects of {effects.rows_ranked:,} {ranked} over {len(effects.clean)} "
    means = f"the mean {metadata['metric']} is {effects.clean.mean():.3g} on clean"
    if effects.has_gap:
        subtitle += f"pairs; {means} and {effects.corrupted.mean():.3g} on corrupted prompts"
    else:
        subtitle += f"prompts without a counterfactual, as changes {effects.unit}; {means} prompts"
    return page(title, subtitle, [section for section in sections if section is not None])


def _question(effects: Effects, material: Material) -> Section | None:
    if not material.prompts:
        return None
    metric = effects.metadata["metric"]
    prompts = [
        {
            **vars(prompt),
            "reading": f"{metric} clean {clean:.2f}"
            + (f", corrupted {corrupted:.2f}, gap {clean - corrupted:.2f}" if effects.has_gap else ""),
        }
        for prompt, clean, corrupted in zip(material.prompts[:PROMPTS], effects.clean, effects.corrupted, strict=False)
    ]
    what = "pairs. Tokens that differ are highlighted" if effects.has_gap else "prompts, without a counterfactual"
    text = (
        f"{min(PROMPTS, len(material.prompts))} of {len(material.prompts)} {what}; the answers are those that the metric "
        "compares."
    )
    if material.checks is not None:
        text += " The checklist covers these pairs; `featpatch check` and `pairs.check(model)` check all pairs."
    blocks = [block("prompts.html", prompts=prompts)]
    return Section(
        "question", "The question", text, blocks if material.checks is None else [*blocks, table(material.checks, rows=5)]
    )


def _ranking(effects: Effects, material: Material) -> Section:
    rows = _shown(effects)
    frame = brief(rows)
    opens = {node: number for number, node in enumerate(material.features, 1)}
    frame["site"] = [node.sae or node.site for node in rows.nodes]
    frame.insert(0, "opens", [f"\u25b8 {opens[node]}" if node in opens else "" for node in rows.nodes])
    columns = [name for name in frame.columns if name not in ("sae", "pairs", "value") and (opens or name != "opens")]
    first = effects.directions_run()[0]
    text = (
        "Each row is a patch of one feature or head; low and high are the ends of 95 % bootstrap intervals over pairs. "
        + (
            "Recovery is the fraction of the behaviour that patching the node restores (is it sufficient?), degradation the "
            "fraction that is lost without it (is it necessary?), both pooled over all pairs."
            if effects.has_gap
            else f"Degradation is the change {effects.unit} (clean - ablated), the mean over all prompts."
        )
        + " Columns that end in _where_changed "
        "are pooled only over the pairs in which the node differs between the runs; changed_pairs is the number of these "
        "pairs. Click the arrows of a column to sort by it."
    )
    if "quadrant" in frame:
        text += (
            f" The quadrant names the directions in which the interval lies above a threshold: {100 * effects.threshold:.4g} "
            "% of the effect of the whole activation at the hook point and position, or of the whole behaviour for whole "
            "activations and where the table has no such row. It is undecided if an interval includes the threshold."
        )
    if opens:
        text += (
            " Click a row with \u25b8 to open its feature card: the feature's activation at each token of the pair in which "
            "it matters most (darker means stronger), and what it writes."
        )
    if len(rows) < effects.ranked.sum():
        text += f" Shown are the {len(rows):,} rows with the largest effects, of {effects.ranked.sum():,} in the table."
    if "screening" in effects.metadata and effects.finished:
        audit = effects.audit()
        text += f"{'' if audit.complete else ' Not all features were patched.'} {audit}."
    shown = rounded(frame[columns])
    blocks = [table(shown, order=columns.index(first))]
    return Section("ranking", "Ranked features", text, [*blocks, _cards(material)] if opens else blocks)


def _shown(effects: Effects) -> Effects:
    """Return the ranked rows in the order of the table, at most the `ROWS` with the largest effects."""
    rows = np.flatnonzero(effects.ranked)
    return effects.take(rows if len(rows) <= ROWS else rows[np.sort(np.argsort(-effects.sizes()[rows], kind="stable")[:ROWS])])


def _cards(material: Material) -> Block:
    features = []
    for node, card in material.features.items():
        prompt = material.prompts[card.pair]
        runs = (("clean", prompt.clean, card.clean), ("corrupted", prompt.corrupted, card.corrupted))
        largest = max([1e-12, *np.abs(card.clean), *np.abs(card.corrupted)])
        features.append(
            {"title": str(node), "runs": runs, "largest": largest, "facts": list(card.facts.items()), "link": card.link}
        )
    return block("cards.html", features=features)


def _quadrants(effects: Effects) -> Section | None:
    if len(effects.directions_run()) < 2:
        return None
    text = (
        "Further right: restores more of the behaviour on its own (sufficient?). Further up: more of the behaviour is lost "
        "without it (necessary?). A low degradation can hide a backup that becomes active only when the feature is ablated."
    )
    return Section("quadrants", "Sufficient? Necessary?", text, [embedded(_shown(effects).plot.quadrants())])


def _sites(effects: Effects) -> Section | None:
    if not len(effects.sites()):
        return None
    text = "The recovery of the error term is what the SAE does not explain." if effects.has_gap else ""
    blocks = [embedded(effects.plot.sites(effect)) for effect in effects.directions_run()]
    return Section("sites", "Whole activation, features, error", text, [*blocks, table(rounded(effects.sites()))])


def _maps(effects: Effects, components: "Effects | None") -> Section | None:
    kinds = {node.kind for node in effects.nodes}
    charts = [_map(effects, "feature")] if "feature" in kinds and "screening" not in effects.metadata else []
    if components is not None:
        found = {node.kind for node in components.nodes}
        whole = [_map(components, "activation")] if "activation" in found else []
        charts = [*whole, *_head_maps(components), *charts]
    text = (
        "Effects of components first, if they were ranked too; heads at the positions with the largest effects; for features, "
        "the sum of their individual effects."
    )
    return Section("maps", "Effects by layer and position", text, charts) if charts else None


def _map(effects: Effects, kind: str, position: Position | None = None) -> Block:
    return embedded(effects.plot.heatmap(kind=kind, position=position))


def _head_maps(components: Effects) -> list[Block]:
    """Return heat maps of heads at the positions with the largest effect of a head."""
    heads = components.where(kind="head")
    positions = dict.fromkeys(heads.nodes[row].position for row in np.argsort(-heads.sizes(), kind="stable"))
    return [_map(heads, "head", position) for position in list(positions)[:POSITIONS]]


def _stability(effects: Effects) -> Section | None:
    tags = effects.metadata.get("tags", [])
    values = {key: {of_pair.get(key) for of_pair in tags} for of_pair in tags for key in of_pair}
    several = [tag for tag, of_tag in values.items() if 1 < len(of_tag) <= VALUES]
    frames = [_by_tag(effects, tag) for tag in sorted(several)]
    text = "Effects of the top features for each value of the pairs' tags; `depends` means that the intervals do not overlap."
    return (
        Section("stability", "Effects by kind of prompt", text, [table(rounded(frame), rows=10) for frame in frames])
        if frames
        else None
    )


def _by_tag(effects: Effects, tag: str) -> pd.DataFrame:
    rows = effects.top(TOP)
    frame = rows.by_tag(tag, effects.directions_run()[0])
    frame = frame.drop(columns=[name for name in ("site", "kind", "index", "sae", "position") if name in frame])
    frame.insert(0, "node", [str(node) for node in rows.nodes])
    return frame


def _provenance(effects: Effects) -> Section:
    facts = [(name, _plain(value)) for name, value in effects.about().items()]
    facts.append(
        ("intervals", f"{CONFIDENCE:.0%}, bootstrap over pairs, expanded percentiles, {RESAMPLES} resamples, seed {SEED}")
    )
    facts.append(("report written", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    return Section("provenance", "Provenance", "", [block("facts.html", facts=facts)])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
