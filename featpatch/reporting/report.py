"""The HTML report of a study: the table of effects with its prompts and feature cards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch

from featpatch.attribution.calibration import Calibration, calibrate
from featpatch.circuits.circuit import Circuit
from featpatch.comparison.compare import compare
from featpatch.comparison.tables import reads_stream
from featpatch.descriptions import READ, check_texts, documents_of, read_features
from featpatch.diagram.viewers import sections
from featpatch.effects.collector import check_saes
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.files import check_writable, path_to_write
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node
from featpatch.page.charts import STYLES, Bar, Points, bars, points
from featpatch.page.page import Block, Section, table, write
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.pairs.text import PairText
from featpatch.pairs.tokens import check_tokenizer, special_positions
from featpatch.patching.curves import Curve
from featpatch.ranking.groups import Groups
from featpatch.reporting.conclusion import measurable, short_names, together
from featpatch.reporting.sections import PROMPTS, FeatureCard, Material, intervals, page_of
from featpatch.sae.dictionary import Dictionary, dictionaries, digests
from featpatch.views import promoted

TOP = 20
"""The default number of features per effect that get feature cards."""

WRITERS = 4
"""The largest number of components that a feature card names as writers of the feature."""

MISSES = 10
"""The number of features farthest from their estimates that are points of their own in a chart."""

EXAMPLES = 3
"""The largest number of max-activating examples on a feature card."""

AROUND = 12
"""The number of tokens of an example before the strongest activation, and after it."""

GROUPS = 12
"""The largest number of groups in a chart."""

WRITES = 8
"""The number of tokens that a feature card names whose logits the feature raises most, and lowers most."""


def report(
    effects: Effects,
    path: str | Path,
    *,
    model: Any = None,
    pairs: Pairs | None = None,
    saes: Any = None,
    components: Effects | None = None,
    estimate: Effects | None = None,
    curve: Curve | None = None,
    circuit: Circuit | None = None,
    groups: Groups | None = None,
    question: str = "",
    top: int | None = None,
    texts: Sequence[str] | None = None,
) -> Path:
    """Write a report of effects as one self-contained HTML file: a ranking that can be sorted and searched, and figures.

    With the model and the pairs it also shows the prompts with their checklist, and feature cards.

    Args:
        effects: the table of effects.
        path: the HTML file.
        model: the model with its tokenizer; without it the report holds what the table of effects holds.
        pairs: the pairs of the effects, which are given together with the model.
        saes: the SAEs whose features get feature cards; without SAEs there are no cards.
        components: a table of `rank_components`, for heatmaps next to those of features, and for the components that write each
            feature if both were ranked at the same positions.
        estimate: a table of estimates of features (`method="atp"`), to be compared with the exact effects.
        curve: a curve of `fp.top_k_curve`.
        circuit: a circuit of `fp.find_circuit`, shown as a graph whose nodes show their numbers when they are clicked.
        groups: groups of `fp.group_features`: the effect of each beside the sum of its members'.
        question: the title of the report; by default made of metric and model.
        top: the number of features per effect that get feature cards, 20 by default; only with `saes`.
        texts: documents to find max-activating examples in; by default the prompts of the pairs. Only with `saes`.

    Returns:
        The path.

    Raises:
        FeatpatchError: an argument is of the wrong kind, the pairs or SAEs are not those of the effects, the model has no
            tokenizer, only one of model and pairs is given, or the path is a folder.

    Examples:
        >>> path = fp.report(effects, folder / "report.html", components=components)
        >>> path.stat().st_size > 10_000
        True
    """
    check_kinds(Effects, effects=effects)
    check_kinds((Effects, NoneType), components=components, estimate=estimate)
    check_kinds((Curve, NoneType), curve=curve)
    check_kinds((Circuit, NoneType), circuit=circuit)
    check_kinds((Groups, NoneType), groups=groups)
    check_kinds(str, question=question)
    check_numbers(1, top=1 if top is None else top)
    _check_tables(effects, components, estimate)
    if top is not None and saes is None:
        raise FeatpatchError(f"top={top} without saes: expected SAEs, whose features get that many cards; leave top out")
    if texts is not None and saes is None:
        raise FeatpatchError("texts without saes: expected SAEs, whose feature cards show examples from them; leave texts out")
    if texts is not None:
        check_texts(texts)
    check_writable(path_to_write(path, ".html", ".htm"))
    figures = {} if curve is None else {"How many features does it take?": _growth(curve)}
    if estimate is not None:
        figures["Estimated against exact effects"] = _calibrated(calibrate(estimate, effects))
    further = [*(() if groups is None else [_groups(groups)]), *(() if circuit is None else sections(circuit.to_networkx()))]
    material = Material(question, figures=figures, sections=further, together="" if curve is None else together(curve))
    if model is not None and pairs is not None:
        material = _with_prompts(material, effects, model, pairs, saes, components, TOP if top is None else top, texts)
    elif any(given is not None for given in (model, pairs, saes)):
        raise FeatpatchError(
            "model and pairs are not both given: expected both, to show prompts and the feature cards of saes, or none of the "
            "three"
        )
    return write(path, page_of(effects, material, components))


def _growth(curve: Curve) -> Block:
    """Return a chart of the effects of the top k features together, for the hook points where they are largest."""
    effect, table = curve.sets.directions_run()[0], curve.table()
    groups = list(table.groupby(["sae", "position"], sort=False))
    groups.sort(key=lambda group: -abs(group[1][effect].iloc[-1]))
    nodes = {(node.sae, node.position): node for node in curve.sets.nodes}
    names = short_names([replace(nodes[key], kind="activation", index=None) for key, _ in groups[:STYLES]])
    series = [
        Points(
            name,
            [float(k) for k in rows["k"]],
            rows[effect].tolist(),
            [f"top {k} at {name}: {value:.3f}" for k, value in zip(rows["k"], rows[effect], strict=True)],
            low=rows[f"{effect}_low"].tolist(),
            high=rows[f"{effect}_high"].tolist(),
        )
        for name, (_, rows) in zip(names, groups[:STYLES], strict=True)
    ]
    return points(series, "features together", effect, log=True, joined=True)


def _groups(groups: Groups) -> Section:
    """Return the section with the effects of groups beside the sums of their members' effects."""
    frame, effect = groups.to_pandas(), groups.effects.directions_run()[0]
    title, nan = groups.effects.titled(effect), float("nan")
    chart = bars(
        [
            Bar(row["group"], [(row[effect], row[f"{effect}_low"], row[f"{effect}_high"]), (row[f"{effect}_sum"], nan, nan)])
            for _, row in frame.head(GROUPS).iterrows()
        ],
        ["together", "sum of members alone"],
        title=title,
    )
    shown = frame[["group", "members", "position"]].astype({"position": str})
    for name in groups.effects.directions_run():
        label = groups.effects.titled(name)
        shown[label], shown[f"{label}, 95 %"] = frame[name].round(4), intervals(frame, name)
        shown[f"{label}: sum"] = frame[f"{name}_sum"].round(4)
        shown[f"{label}: interaction"] = frame[f"{name}_interaction"].round(4)
        shown[f"{label}: interaction, 95 %"] = intervals(frame, f"{name}_interaction")
    text = (
        "Each group is patched together (exact). The interaction is its effect minus the sum of its members' effects alone: "
        "above 0, the members do together what none of them does alone; below 0, they are redundant. Intervals are 95 % "
        "bootstrap intervals over pairs."
    )
    if len(frame) > GROUPS:
        text += f" The chart shows the {GROUPS} groups with the largest effects of {len(frame)}."
    return Section("groups", "Features that act together", text, [chart, table(shown, first=["group", title, f"{title}: sum"])])


def _calibrated(calibration: Calibration) -> Block:
    """Return a chart of exact effects against estimates, with the line of equal values."""
    estimate, exact = calibration.estimate, calibration.exact
    worst = np.argsort(-np.abs(estimate - exact), kind="stable")[:MISSES]
    names = short_names([calibration.nodes[row] for row in worst])
    series = [
        Points("farthest from equal", estimate[worst].tolist(), exact[worst].tolist(), names),
        Points("others", np.delete(estimate, worst).tolist(), np.delete(exact, worst).tolist()),
    ]
    return points(series, "estimate", f"exact {calibration.effect}", diagonal=True)


def _check_tables(effects: Effects, components: Effects | None, estimate: Effects | None) -> None:
    """Raise a FeatpatchError unless the components are components, and the estimates are estimates of exact effects."""
    others = sorted({node.kind for node in ([] if components is None else components.nodes) if node.sae or node.kind == "edge"})
    if others:
        raise FeatpatchError(
            f"components is a table with rows of kind {', '.join(others)}: expected heads, MLPs, neurons or the residual "
            "stream; pass a table of rank_components"
        )
    if estimate is not None and estimate.value != "estimate":
        raise FeatpatchError(
            "estimate is a table of exact effects: expected estimates, such as rank_features(..., method='atp'), to compare "
            "with the exact effects; pass those, or leave estimate out"
        )
    if estimate is not None and effects.value != "exact":
        raise FeatpatchError(
            "effects is a table of estimates, and estimate=... is given too: expected exact effects, with which estimates are "
            "compared; pass those as effects, or leave estimate out"
        )


def _with_prompts(
    material: Material,
    effects: Effects,
    model: Any,
    pairs: Pairs,
    saes: Any,
    components: Effects | None,
    top: int,
    texts: Sequence[str] | None,
) -> Material:
    """Add the prompts with their checklist, and the feature cards.

    Raises:
        FeatpatchError: the pairs or SAEs are not those of the effects, or the model has no tokenizer.
    """
    known, kept = effects.metadata.get("pairs"), effects.metadata.get("of_pairs", [0])
    if check_pairs(pairs, by_label=True).digest() != known or max(kept) >= len(pairs):
        raise FeatpatchError("the pairs differ from those of the effects: expected the pairs that were ranked; pass those")
    lens = wrap(model)
    check_tokenizer(lens.tokenizer, "to show prompts")
    if "of_pairs" in effects.metadata:
        pairs = Pairs(tuple(pairs[index] for index in effects.metadata["of_pairs"]))
    prompts, by_label = [PairText.of(pair, model.tokenizer) for pair in pairs], any(pair.by_label for pair in pairs)
    found = [] if saes is None or not measurable(effects) else dictionaries(lens, saes)
    features = _cards(lens, found, pairs, effects, top, texts) if found else {}
    if features and components is not None and not by_label and _comparable(effects, components, found):
        writers = compare(effects, components, model=model, saes=saes, pairs=pairs, top=top).writers
        features = {node: _written(card, node, writers) for node, card in features.items()}
    checks = pairs[:PROMPTS].check(model).to_pandas() if all(pair.correct for pair in pairs) else None
    return replace(material, prompts=prompts, features=features, checks=checks)


@torch.no_grad()
def _cards(
    lens: Lens, found: list[Dictionary], pairs: Pairs, effects: Effects, top: int, texts: Sequence[str] | None
) -> Mapping[Node, FeatureCard]:
    """Return feature cards of the features with the largest effects.

    Raises:
        FeatpatchError: the SAEs are not those of the effects.
    """
    by_name = {dictionary.name: dictionary for dictionary in found}
    check_saes(effects, digests(found))
    nodes = dict.fromkeys(n for e in effects.directions_run() for n in effects.top(top, by=e, kind="feature").nodes)
    rows = {node: row for row, node in enumerate(effects.nodes)}

    chosen = []
    for node in (node for node in nodes if node.sae in by_name):
        row = effects.take([rows[node]])
        change = sum(abs(row.changes(effect).toarray()[0]) for effect in row.directions_run())
        chosen.append((node, row, int(np.argmax(change))))
    if not chosen:
        return {}
    documents = documents_of(lens, pairs[:READ] if texts is None else texts)
    shown = [prompt for _, _, index in chosen for prompt in (pairs[index].clean, pairs[index].corrupted)]
    prompts = list(dict.fromkeys([*documents, *shown]))
    read = read_features(lens, found, [node for node, _, _ in chosen], list(map(torch.tensor, prompts)))
    active = dict(zip(prompts, read, strict=True))
    cards = {}
    for n, (node, row, index) in enumerate(chosen):
        clean, corrupted = (active[prompt][:, n].tolist() for prompt in (pairs[index].clean, pairs[index].corrupted))
        dictionary = by_name[node.sae]
        facts, link = _facts(lens, dictionary, node, row), _link(dictionary.source, node)
        examples = _examples(lens, {ids: active[ids][:, n].tolist() for ids in dict.fromkeys(documents)})
        cards[node] = FeatureCard(index, clean, corrupted, facts, link, examples)
    return cards


def _examples(lens: Lens, active: Mapping[tuple[int, ...], Sequence[float]]) -> list[tuple[list[str], list[float]]]:
    """Return max-activating examples: the surroundings of the strongest activation in the documents where it is largest."""
    found: dict[tuple[int, ...], tuple[float, list[float]]] = {}
    for ids, values in active.items():
        special = special_positions(lens.tokenizer, ids)
        peak = max((at for at in range(len(ids)) if at not in special), key=lambda at: values[at], default=0)
        around = [at for at in range(max(0, peak - AROUND), min(len(ids), peak + AROUND + 1)) if at not in special]
        if around and values[peak] > 0:
            found[tuple(ids[at] for at in around)] = values[peak], [values[at] for at in around]
    strongest = sorted(found.items(), key=lambda item: -item[1][0])[:EXAMPLES]
    return [([lens.tokenizer.decode([token]) for token in tokens], values) for tokens, (_, values) in strongest]


def _facts(lens: Lens, dictionary: Dictionary, node: Node, row: Effects) -> dict[str, str]:
    facts = {
        "hook point": node.site if node.sae in ("", node.site) else f"{node.site}, SAE {node.sae}",
        "differs": f"in {row.changed_pairs[0]} of {len(row.clean)} pairs",
    }
    for name, sign in (("promotes", 1), ("suppresses", -1)):
        for tokens in promoted(lens, dictionary, [dictionary.number(node)], WRITES, sign=sign).values():
            facts[name] = ", ".join(f"{token!r} ({change:+.2f})" for token, change in tokens)
    return facts


def _comparable(effects: Effects, components: Effects, found: Sequence[Dictionary]) -> bool:
    """Return whether writers of features can be shown, because all features and components were ranked at the same positions.

    A screened table does not hold all features, one of some pairs not all pairs. Writers are known of features of the residual
    stream, and of patches between the prompts of a pair.
    """
    about = effects.metadata
    return (
        not {"screening", "of_pairs", "noise", "ablation"} & set(about)
        and effects.of_all
        and effects.rows_ranked <= effects.whole.ranked.sum()
        and about.get("positions") == components.metadata.get("positions")
        and any(map(reads_stream, found))
    )


def _written(card: FeatureCard, node: Node, writers: "pd.DataFrame") -> FeatureCard:
    """Return a feature card with the components that write the feature added, if they are known."""
    own = writers[(writers["sae"] == node.sae) & (writers["feature"] == node.index) & (writers["position"] == node.position)]
    names = [
        " ".join([row["site"], row["kind"], *([] if pd.isna(row["index"]) else [str(row["index"])]), f"({row['share']:.0%})"])
        for _, row in own.head(WRITERS).iterrows()
    ]
    facts = {**card.facts, **({"change written by": ", ".join(names)} if names else {})}
    return replace(card, facts=facts)


def _link(sae: Any, node: Node) -> str:
    cfg = getattr(sae, "cfg", None)
    name = getattr(getattr(cfg, "metadata", None), "neuronpedia_id", None)
    return f"https://www.neuronpedia.org/{quote(name)}/{node.index}" if isinstance(name, str) and name else ""
