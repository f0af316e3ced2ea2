"""The HTML report as sections, made from a table of effects and from plain text and numbers, without a model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from featpatch.effects.frames import TOP, brief, pairs_by_value, sample
from featpatch.effects.statistics import CONFIDENCE, RESAMPLES, SEED, bounds
from featpatch.effects.table import Effects
from featpatch.errors import counted, decimal
from featpatch.nodes import Effect, Node
from featpatch.page.charts import Bar, Points, bars, points, strips
from featpatch.page.page import Block, Section, block, page, table
from featpatch.pairs.text import PairText
from featpatch.reporting.conclusion import concluded, measurable, noun_of, short_names, strongest
from featpatch.reporting.hook_points import maps_section, sites_section


@dataclass(frozen=True)
class FeatureCard:
    """A feature card: the activations of a feature in one pair, with further facts.

    Attributes:
        pair: the index of the pair whose activations are shown, one in which the feature differs.
        clean, corrupted: the activation on each token of that pair.
        facts: further facts about the feature, by name.
        link: the address of the feature's page on Neuronpedia; empty if there is none.
        examples: max-activating examples, the strongest first: the text of tokens, and the activation on each.
    """

    pair: int
    clean: Sequence[float]
    corrupted: Sequence[float]
    facts: Mapping[str, str] = field(default_factory=dict)
    link: str = ""
    examples: Sequence[tuple[Sequence[str], Sequence[float]]] = ()


@dataclass(frozen=True)
class Material:
    """The content of a report other than the effects.

    Attributes:
        question: the question that the report answers, in a sentence.
        prompts: the text of every pair.
        features: the cards of the features that are shown, by node.
        checks: the outcome of the checklist for the pairs that are shown, one row per pair and rule; None without one.
        figures: further charts, by title.
        sections: further sections of the page.
        together: how many features bring back how much, in a sentence; empty if it was not measured.
    """

    question: str = ""
    prompts: Sequence[PairText] = ()
    features: Mapping[Node, FeatureCard] = field(default_factory=dict)
    checks: pd.DataFrame | None = None
    figures: Mapping[str, Block] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    together: str = ""


VALUES = 8
"""The largest number of values of a tag for which effects are broken down by the tag."""

FEW_VALUES = 3
"""The largest number of values of a tag for which intervals are shown as well."""

PROMPTS = 8
"""The number of pairs that are shown."""

FIRST = 10
"""The number of rows in the chart at the top."""

OPEN = 2
"""The number of feature cards that are open at first."""

NAMED = 6
"""The number of features that are named in the chart of both effects."""

SERIES = (
    ("both directions", "sufficient and necessary"),
    ("denoising only", "denoising only"),
    ("noising only", "noising only"),
    ("opposing", "opposing"),
)
"""The quadrants whose rows are drawn as points of their own, with their names in the legend."""

ROWS = 20_000
"""The largest number of features or heads that are shown, those with the largest effects."""


def page_of(effects: Effects, material: Material, components: Effects | None) -> str:
    """Return the report as the content of an HTML file."""
    rows = strongest(effects)
    found: list[Section | None] = [_answer(effects, rows, material)]
    if measurable(effects):
        found += [_features(effects, material), maps_section(effects, components), _quadrants(rows), sites_section(effects)]
    found += [Section(f"figure-{n}", title, "", [chart]) for n, (title, chart) in enumerate(material.figures.items())]
    found += material.sections
    if measurable(effects):
        found += [_ranking(effects, material), _stability(effects)]
    found.append(_question(effects, material))
    return page(
        material.question or _title(effects), _subtitle(effects), [part for part in (*found, _provenance(effects)) if part]
    )


def _title(effects: Effects) -> str:
    """Return a question that names the tasks of the pairs, if they have names."""
    tasks = list(dict.fromkeys(tags["task"] for tags in effects.metadata.get("tags", []) if tags.get("task")))
    on = f"its answers in the task {tasks[0]}" if len(tasks) == 1 else "this behaviour"
    name = Path(effects.metadata.get("model", {}).get("name", "")).name
    model = f"the model {name}" if name and name != "model" else "the model"
    return f"Which {noun_of(effects)}s of {model} cause {on}?"


def _subtitle(effects: Effects) -> str:
    value, noun = effects.value, noun_of(effects)
    positions = effects.metadata.get("positions")
    at = f" at {', '.join(map(str, positions))}" if isinstance(positions, list) and len(positions) <= FIRST else ""
    route = f" (route {effects.route!r})" if effects.route else ""
    over = counted(len(effects.clean), "prompt pair" if effects.has_gap else "prompt")
    unit = f"on the metric {effects.metadata['metric']}" if effects.has_gap else f"as changes {effects.unit} (clean - ablated)"
    return f"{value.capitalize()} effects of {counted(effects.rows_ranked, noun)}{route}{at}, over {over}, {unit}"


def _answer(effects: Effects, rows: Effects, material: Material) -> Section:
    """Return the first screen: conclusion, the metric's two numbers, and a chart of the largest effects."""
    said, metric = concluded(effects, rows), effects.metadata["metric"]
    figures = [(f"{metric}, clean", f"{effects.clean.mean():.3g}")]
    if effects.has_gap:
        figures.append((f"{metric}, corrupted", f"{effects.corrupted.mean():.3g}"))
        figures.append(("gap (100 %)", f"{effects.gap.mean():.3g}"))
    answer = " ".join(filter(None, (said.answer, material.together)))
    blocks = [block("answer.html", answer=answer, figures=figures)]
    if len(rows):
        blocks.append(_chart(rows.take(np.arange(min(FIRST, len(rows)))), material))
    if said.caveats:
        blocks.append(block("caveats.html", caveats=said.caveats))
    return Section("answer", "", "", blocks)


ASKS: Mapping[Effect, str] = {
    "recovery": "recovery: what it brings back alone (denoising)",
    "degradation": "degradation: what is lost without it (noising)",
}
"""What the two effects say, for legends."""


def _chart(rows: Effects, material: Material) -> Block:
    """Return a bar chart of the effects of these rows."""
    run, cards = rows.directions_run(), {node: n for n, node in enumerate(material.features, 1)}
    values = {effect: list(zip(rows.pooled(effect), *rows.interval(effect).T, strict=True)) for effect in run}
    drawn = [
        Bar(
            name,
            [values[effect][n] for effect in run],
            "\n".join(_number(*values[effect][n]) for effect in run),
            f"card-{cards[node]}" if node in cards else "",
        )
        for n, (name, node) in enumerate(zip(short_names(rows.nodes), rows.nodes, strict=True))
    ]
    unit = "shares of the gap" if rows.has_gap else f"changes {rows.unit}"
    title = f"The {counted(len(rows), noun_of(rows))} with the largest effects: {unit}, with 95 % intervals"
    return bars(drawn, [ASKS[effect] if rows.has_gap else rows.titled(effect) for effect in run], title=title)


def _number(value: float, low: float, high: float) -> str:
    """Return an effect with its interval, if there is one."""
    return decimal(value, ".3f") + ("" if low != low else f"  [{decimal(low, '.3f')}, {decimal(high, '.3f')}]")


def _question(effects: Effects, material: Material) -> Section | None:
    if not material.prompts:
        return None
    metric = effects.metadata["metric"]
    prompts = [
        {
            **vars(prompt),
            "reading": f"{metric} clean {decimal(clean)}"
            + (f", corrupted {decimal(corrupted)}, gap {decimal(clean - corrupted)}" if effects.has_gap else ""),
        }
        for prompt, clean, corrupted in zip(material.prompts[:PROMPTS], effects.clean, effects.corrupted, strict=False)
    ]
    text = (
        f"{min(PROMPTS, len(material.prompts))} of {sample(effects)}. Tokens that differ are highlighted; the underlined "
        "answers are those that the metric compares."
    )
    if material.checks is not None:
        text += " The checklist covers these pairs; `featpatch check` and `pairs.check(model)` check all pairs."
    blocks = [block("prompts.html", prompts=prompts)]
    if material.checks is not None:
        blocks.append(table(material.checks, rows=5, first=list(material.checks.columns[:3])))
    return Section("question", "Prompts and checklist", text, blocks)


def _ranking(effects: Effects, material: Material) -> Section:
    rows, run = _shown(effects), effects.directions_run()
    values = brief(rows).round(4)
    opens = {node: number for number, node in enumerate(material.features, 1)}
    frame = pd.DataFrame({noun_of(effects): short_names(rows.nodes)})
    if opens:
        frame.insert(0, "card", [f"\u25b8 {opens[node]}" if node in opens else "" for node in rows.nodes])
    for effect in run:
        frame[effects.titled(effect)] = values[effect]
        frame[f"{effects.titled(effect)}, 95 %"] = intervals(values, effect)
    if "quadrant" in values:
        frame["quadrant"] = values["quadrant"]
    frame["pairs"] = values["changed_pairs"]
    if (effects.changed_pairs[effects.ranked] < len(effects.clean)).any():
        for effect in run:
            frame[f"{effects.titled(effect)} where changed"] = values[f"{effect}_where_changed"]
    text = (
        "Each row is a patch of one feature or head. "
        + (
            "Recovery is the fraction of the behaviour that patching the node restores (is it sufficient?), degradation the "
            "fraction that is lost without it (is it necessary?), both pooled over all pairs"
            if effects.has_gap
            else f"The effect is the change {effects.unit} (clean - ablated), the mean over all prompts"
        )
        + ", with 95 % bootstrap intervals over pairs. `pairs` is the number of pairs in which the node differs between the "
        "runs; `where changed` is pooled over these only. Click the arrows of a column to sort by it."
    )
    if "quadrant" in values:
        text += (
            f" The quadrant names the directions in which the interval lies above a threshold: {100 * effects.threshold:.4g} "
            "% of the effect of the whole activation at the hook point and position, or of the whole behaviour for whole "
            "activations and where the table has no such row. It is undecided if an interval includes the threshold."
        )
    if opens:
        text += " A row with \u25b8 leads to its feature card, by click or Enter."
    if len(rows) < effects.ranked.sum():
        text += f" Shown are the {len(rows):,} rows with the largest effects, of {effects.ranked.sum():,} in the table."
    if "screening" in effects.metadata and effects.finished:
        audit = effects.audit()
        text += f"{'' if audit.complete else ' Not all features were patched.'} {audit}."
    named = [effects.titled(effect) for effect in run]
    first = [name for name in ("card", noun_of(effects), *named) if name in frame]
    blocks = [table(frame, order=list(frame.columns).index(named[0]), first=first)]
    return Section("ranking", "All rows", text, blocks)


def intervals(frame: pd.DataFrame, column: str) -> list[str]:
    """Return the interval of each value of a column; empty where there is none."""
    ends = zip(frame[f"{column}_low"], frame[f"{column}_high"], strict=True)
    return ["" if low != low else f"{decimal(low, '.3f')} to {decimal(high, '.3f')}" for low, high in ends]


def _shown(effects: Effects) -> Effects:
    """Return the ranked rows in the order of the table, at most the `ROWS` with the largest effects."""
    rows = np.flatnonzero(effects.ranked)
    return effects.take(rows if len(rows) <= ROWS else rows[np.sort(np.argsort(-effects.sizes()[rows], kind="stable")[:ROWS])])


def _features(effects: Effects, material: Material) -> Section | None:
    """Return the feature cards."""
    if not material.features:
        return None
    numbers = {node: row for row, node in enumerate(effects.nodes)}
    rows, run = effects.take([numbers[node] for node in material.features]), effects.directions_run()
    quadrants = rows.quadrants() if len(run) == 2 else []
    names, per_pair = short_names(rows.nodes), {effect: rows.per_pair(effect) for effect in run}
    pairs = [f"pair {number}" for number in range(len(effects.clean))]
    features = []
    for n, card in enumerate(material.features.values()):
        prompt = material.prompts[card.pair]
        chart = ""
        if len(effects.clean) > 1:
            lines = [(effects.titled(effect), per_pair[effect][n].tolist()) for effect in run]
            chart = Markup('<div class="narrow">{}</div>').format(strips(lines, pairs))
        values = [f"{effects.titled(effect)} {_number(rows.pooled(effect)[n], *rows.interval(effect)[n])}" for effect in run]
        features.append(
            {
                "title": names[n],
                "effects": ", ".join([*values, *quadrants[n : n + 1]]),
                "pair": card.pair,
                "runs": [
                    run
                    for run in (("clean", prompt.clean, card.clean), ("corrupted", prompt.corrupted, card.corrupted))
                    if run[1]
                ],
                "largest": max([1e-12, *np.abs(card.clean), *np.abs(card.corrupted)]),
                "examples": card.examples,
                "peak": max([1e-12, *(abs(value) for _, shown in card.examples for value in shown)]),
                "chart": chart,
                "facts": list(card.facts.items()),
                "link": card.link,
            }
        )
    text = (
        "The features with the largest effects; darker tokens are those on which a feature is more active. What a feature "
        "promotes and suppresses is its direct path to the logits, without the final norm."
    )
    return Section("features", "Feature cards", text, [block("cards.html", features=features, opened=OPEN)])


def _quadrants(rows: Effects) -> Section | None:
    """Return a chart of both effects of the strongest rows."""
    run = rows.directions_run()
    if len(run) < 2:
        return None
    labels = np.array(rows.quadrants())
    x, y = rows.pooled("recovery"), rows.pooled("degradation")
    apart = [label for label, _ in SERIES]
    marked, others = (np.flatnonzero(np.isin(labels, apart, invert=invert)) for invert in (False, True))
    names = dict(zip(marked.tolist(), short_names([rows.nodes[n] for n in marked], among=rows.nodes), strict=True))
    named = set(marked[:NAMED].tolist())
    series = []
    for label, name in SERIES:
        at = np.flatnonzero(labels == label).tolist()
        series.append(Points(name, x[at].tolist(), y[at].tolist(), [names[n] for n in at], named=len(named & set(at))))
    thresholds = [_thresholds(rows, effect) for effect in run]
    ends = " and ".join(" to ".join(f"{value:.2g}" for value in of_effect) for of_effect in thresholds)
    text = (
        "Further right: restores more of the behaviour on its own (sufficient?). Further up: more of the behaviour is lost "
        "without it (necessary?). A low degradation can hide a backup that becomes active only when the feature is ablated. "
        f"Dashed: the threshold, {100 * rows.threshold:.4g} % of the whole activation's effect at a row's hook point and "
        f"position, at its lowest and highest ({ends})."
    )
    grey = Points("undecided or below the threshold", x[others].tolist(), y[others].tolist())
    chart = points([*series, grey], "recovery (denoising)", "degradation (noising)", lines=(thresholds[0], thresholds[1]))
    return Section("quadrants", "Sufficient? Necessary?", text, [chart])


def _thresholds(rows: Effects, effect: Effect) -> list[float]:
    """Return the lowest and the highest threshold of these rows; one if they are the same."""
    values = bounds(rows.threshold, rows.carried(effect))
    return sorted({float(values.min()), float(values.max())}) if len(values) else []


def _stability(effects: Effects) -> Section | None:
    tags = effects.metadata.get("tags", [])
    values = {key: {of_pair.get(key) for of_pair in tags} for of_pair in tags for key in of_pair}
    frames = [_by_tag(effects, tag) for tag in sorted(values) if 1 < len(values[tag]) <= VALUES]
    if not frames:
        return None
    text = (
        f"{effects.directions_run()[0].capitalize()} of the top rows for each value of the pairs' tags; `depends` means that "
        "the intervals of two values do not overlap."
    )
    tables = [table(frame, rows=10, first=[frame.columns[0], *frame.columns[-1:]]) for frame in frames]
    return Section("stability", "Effects by kind of prompt", text, tables)


def _by_tag(effects: Effects, tag: str) -> pd.DataFrame:
    """Return the effects of the top features for each value of a tag, with intervals if there are few values."""
    rows, effect = effects.top(TOP), effects.directions_run()[0]
    found = rows.by_tag(tag, effect).round(4)
    frame, names = pd.DataFrame({noun_of(effects): short_names(rows.nodes)}), pairs_by_value(effects, tag)
    for value in names:
        column = f"{effect}_{value}"
        frame[f"{tag} {value}"] = found[column]
        if len(names) <= FEW_VALUES:
            frame[f"{value}, 95 %"] = intervals(found, column)
    frame["depends"] = found["depends"]
    return frame


def _provenance(effects: Effects) -> Section:
    about = effects.about().items()
    facts = [(name, value if isinstance(value, str) else json.dumps(value, sort_keys=True)) for name, value in about]
    facts.append(
        ("intervals", f"{CONFIDENCE:.0%}, bootstrap over pairs, expanded percentiles, {RESAMPLES} resamples, seed {SEED}")
    )
    facts.append(("report written", datetime.now(timezone.utc).isoformat(timespec="seconds")))
    return Section("provenance", "Provenance", "", [block("facts.html", facts=facts)])
