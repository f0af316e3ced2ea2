"""The HTML report of a study: the table of effects with its prompts and feature cards."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch

from featpatch.attribution.calibration import calibrate
from featpatch.circuits.circuit import Circuit
from featpatch.comparison.compare import compare
from featpatch.diagram.viewers import sections
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.files import check_writable
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node
from featpatch.page.page import write
from featpatch.pairs.pair import PairText
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.curves import Curve
from featpatch.reporting.sections import PROMPTS, FeatureCard, Material, page_of
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.views import promoted

TOP = 20
"""The default number of features per effect that get feature cards."""

WRITERS = 4
"""The largest number of components that a feature card names as writers of the feature."""

TOGETHER = 512
"""The largest number of tokens of several prompts that share a forward pass."""

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
    question: str = "",
    top: int | None = None,
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
        question: the title of the report; by default made of metric and model.
        top: the number of features per effect that get feature cards, 20 by default; only with `saes`.

    Returns:
        The path.

    Raises:
        FeatpatchError: an argument is of the wrong kind, the pairs or SAEs are not those of the effects, the model has no
            tokenizer, only one of model and pairs is given, or the path is a folder.

    Example:
        >>> path = fp.report(effects, folder / "report.html", components=components)
        >>> path.stat().st_size > 10_000
        True
    """
    check_kinds(Effects, effects=effects)
    check_kinds((Effects, NoneType), components=components, estimate=estimate)
    check_kinds((Curve, NoneType), curve=curve)
    check_kinds((Circuit, NoneType), circuit=circuit)
    check_kinds(str, question=question)
    check_numbers(1, top=1 if top is None else top)
    _check_tables(effects, components, estimate)
    if top is not None and saes is None:
        raise FeatpatchError(f"top={top} without saes: expected SAEs, whose features get that many cards; leave top out")
    check_writable(path)
    figures: dict[str, Any] = {} if curve is None else {"How many features does it take?": curve.plot()}
    if estimate is not None:
        figures["Estimated against exact effects"] = calibrate(estimate, effects).plot()
    graph = () if circuit is None else sections(circuit.to_networkx())
    material = Material(question, figures=figures, sections=graph)
    if model is None and pairs is None and saes is None:
        return write(path, page_of(effects, material, components))
    if model is None or pairs is None:
        raise FeatpatchError(
            "model and pairs are not both given: expected both, to show prompts and the feature cards of saes, or none of the "
            "three"
        )
    return write(
        path,
        page_of(
            effects, _with_prompts(material, effects, model, pairs, saes, components, TOP if top is None else top), components
        ),
    )


def _check_tables(effects: Effects, components: Effects | None, estimate: Effects | None) -> None:
    """Check that the tables beside the effects are what they are shown as.

    Raises:
        FeatpatchError: the components are not components, or the estimates not estimates of exact effects.
    """
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
    material: Material, effects: Effects, model: Any, pairs: Pairs, saes: Any, components: Effects | None, top: int
) -> Material:
    """Add the prompts with their checklist, and the feature cards.

    Raises:
        FeatpatchError: the pairs or SAEs are not those of the effects, or the model has no tokenizer.
    """
    known, kept = effects.metadata.get("pairs"), effects.metadata.get("of_pairs", [0])
    if check_pairs(pairs).digest() != known or max(kept) >= len(pairs):
        raise FeatpatchError("the pairs differ from those of the effects: expected the pairs that were ranked; pass those")
    if getattr(model, "tokenizer", None) is None:
        raise FeatpatchError(
            "the model has no tokenizer: expected one, to show prompts; load the model with its tokenizer, or leave model "
            "and pairs out"
        )
    lens = wrap(model)
    if "of_pairs" in effects.metadata:
        pairs = Pairs(tuple(pairs[index] for index in effects.metadata["of_pairs"]))
    prompts = [PairText.of(pair, model.tokenizer) for pair in pairs]
    features = {} if saes is None else _cards(lens, dictionaries(lens, saes), pairs, effects, top)
    if features and components is not None and _comparable(effects, components):
        writers = compare(effects, components, model=model, saes=saes, pairs=pairs, top=top).writers
        features = {node: _written(card, node, writers) for node, card in features.items()}
    single_tokens = all(pair.correct for pair in pairs)
    checks = pairs[:PROMPTS].check(model).to_pandas() if single_tokens else None
    return replace(material, prompts=prompts, features=features, checks=checks)


@torch.no_grad()
def _cards(lens: Lens, found: list[Dictionary], pairs: Pairs, effects: Effects, top: int) -> Mapping[Node, FeatureCard]:
    """Return feature cards of the features with the largest effects.

    Raises:
        FeatpatchError: the SAEs are not those of the effects.
    """
    by_name = {dictionary.name: dictionary for dictionary in found}
    known = effects.metadata.get("saes", {})
    if any(known.get(name) != dictionary.digest() for name, dictionary in by_name.items()):
        raise FeatpatchError(
            f"the SAEs {', '.join(by_name)} differ from those of the effects: expected some of {', '.join(known)}, with the "
            "same weights; pass those"
        )
    nodes = dict.fromkeys(n for e in effects.directions_run() for n in effects.top(top, by=e, kind="feature").nodes)
    rows = {node: row for row, node in enumerate(effects.nodes)}

    chosen = []
    for node in (node for node in nodes if node.sae in by_name):
        row = effects.take([rows[node]])
        change = sum(abs(row.changes(effect).toarray()[0]) for effect in row.directions_run())
        chosen.append((node, row, int(np.argmax(change))))
    if not chosen:
        return {}
    shown = Pairs(tuple(pairs[index] for index in sorted({index for _, _, index in chosen})))
    hooks = sorted({hook for node, _, _ in chosen for hook in (by_name[node.sae].reads, by_name[node.sae].writes)})
    runs: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
    for some in shown.chunks(TOGETHER):
        prompts = [prompt for index in some for prompt in (shown[index].clean, shown[index].corrupted)]
        read = lens.read(torch.tensor(prompts), hooks)
        runs |= {prompt: {hook: read[hook][row, None] for hook in hooks} for row, prompt in enumerate(prompts)}

    @cache
    def features(name: str, prompt: tuple[int, ...]) -> torch.Tensor:
        """Return the features `[pos, d_sae]` of a prompt, cached because many feature cards show the same prompts."""
        dictionary = by_name[name]
        return dictionary.split(runs[prompt][dictionary.reads], runs[prompt][dictionary.writes]).features[0]

    cards = {}
    for node, row, index in chosen:
        clean, corrupted = (
            features(node.sae, tokens)[:, node.index].float().tolist()
            for tokens in (pairs[index].clean, pairs[index].corrupted)
        )
        dictionary = by_name[node.sae]
        facts = _facts(lens, dictionary, node, row, index)
        cards[node] = FeatureCard(index, clean, corrupted, facts, _link(dictionary.source, node))
    return cards


def _facts(lens: Lens, dictionary: Dictionary, node: Node, row: Effects, index: int) -> dict[str, str]:
    facts = {
        "shown": f"pair {index}, in which it matters most",
        "differs": f"in {row.changed_pairs[0]} of {len(row.clean)} pairs",
    }
    for name, sign in (("raises", 1), ("lowers", -1)):
        for tokens in promoted(lens, dictionary, [node.index or 0], WRITES, sign=sign).values():
            facts[f"{name} (direct path, without the final norm)"] = ", ".join(
                f"{token!r} ({change:+.2f})" for token, change in tokens
            )
    return facts


def _comparable(effects: Effects, components: Effects) -> bool:
    """Return whether writers of features can be shown, because all features and components were ranked at the same positions.

    A screened table does not hold all features.
    """
    return "screening" not in effects.metadata and effects.metadata.get("positions") == components.metadata.get("positions")


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
