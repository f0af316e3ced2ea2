"""What a table of effects says in plain words: short names of its nodes, a conclusion in a sentence or two, and its limits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from featpatch import sites
from featpatch.effects import statistics
from featpatch.effects.frames import notes, sample
from featpatch.effects.table import Effects
from featpatch.errors import counted
from featpatch.metrics import NEAR_ZERO, size
from featpatch.nodes import RANKED, Edge, Effect, Node
from featpatch.patching.curves import Curve

MOST = 0.8
"""The share of the effect of all features that "how many features does it take" asks for."""

FEW_PAIRS = 5
"""The number of pairs below which a 95 % interval covers less than 95 %."""

MANY_ROWS = 100
"""The number of rows above which the conclusion says that some pass the threshold by chance."""

WORDS = {"all_features": "all features", "error": "error term"}


def short_names(nodes: Sequence[Node], among: Sequence[Node] = ()) -> list[str]:
    """Return a short name per node, such as `L3 resid_post #160 @ end`.

    The name of the SAE is added where several SAEs of these nodes write to the same hook point.

    Args:
        nodes: the nodes.
        among: further nodes whose SAEs the names must tell apart.
    """
    saes: dict[str, set[str]] = {}
    for site, sae in {(node.site, node.sae) for node in (*nodes, *among) if node.sae}:
        saes.setdefault(site, set()).add(sae)
    return [_short(node, len(saes.get(node.site, ())) > 1) for node in nodes]


def _short(node: Node, ambiguous: bool) -> str:
    if isinstance(node, Edge):
        return f"{_short(node.sender, False)} → {_short(node.receiver, False)}"
    name = WORDS.get(node.kind, node.kind.replace("_", " "))
    if node.kind == "feature":
        part = f" #{node.index}"
    elif node.index is not None:
        part = f" {name} {node.index}"
    else:
        part = "" if node.kind == "activation" else f" {name}"
    of = f" of {node.sae}" if ambiguous and node.sae else ""
    where = sites.short(node.site)
    if node.kind in ("head", "neuron"):
        where = where.split()[0] if where.endswith((" z", " result", " neurons")) else where
    return f"{where}{part}{of}" + ("" if node.position == "all" else f" @ {node.position}")


def percent(value: float) -> str:
    """Return a share as a percentage with two significant digits, and none after the point from 10 % on."""
    shown = 100 * value
    number = f"{shown:.0f}" if abs(shown) >= 10 or shown == 0 else f"{shown:.2g}"
    return f"{number}\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Conclusion:
    """The conclusion of a table of effects.

    Attributes:
        answer: the conclusion, one to three sentences.
        caveats: what limits it, a sentence each.
    """

    answer: str
    caveats: tuple[str, ...]


def concluded(effects: Effects, rows: Effects) -> Conclusion:
    """Return the conclusion of a table: every number is one of the table's, and nothing undecided is called decided.

    Args:
        effects: the table.
        rows: its `strongest` rows.
    """
    if not measurable(effects):
        return Conclusion(
            f"{effects.metadata['metric']} is on average the same on clean and on corrupted prompts, so there is no behaviour "
            "to attribute; choose corruptions that change the answer.",
            (),
        )
    caveats, noun = _caveats(effects), noun_of(effects)
    if not len(rows):
        return Conclusion(f"No {noun} differs between the clean and the corrupted runs at these positions.", caveats)
    return Conclusion(_answer(effects, rows, noun), caveats)


def measurable(effects: Effects) -> bool:
    """Return whether the mean gap, if effects are shares of it, is large enough."""
    if not effects.has_gap:
        return True
    return bool(abs(effects.gap.mean()) > NEAR_ZERO * size(effects.clean, effects.corrupted))


def strongest(effects: Effects) -> Effects:
    """Return the ranked rows whose values are all known, ordered by the size of the larger effect, largest first.

    There are none if the effects are not `measurable`.
    """
    rows = effects.take(effects.ranked).known() if measurable(effects) else effects.take([])
    return rows.take(np.argsort(-rows.sizes(), kind="stable"))


def noun_of(effects: Effects) -> str:
    """Return what the ranked rows are, in the singular."""
    kinds = {node.kind for node in compress(effects.nodes, effects.ranked)}
    return kinds.pop() if len(kinds) == 1 and kinds <= {*RANKED} else "node"


def _answer(effects: Effects, rows: Effects, noun: str) -> str:
    """Return the conclusion of a table with at least one row, given its rows with the largest first."""
    if not effects.has_gap:
        return f"The largest effect of {counted(effects.rows_ranked, noun)} is that of {_lead(rows.take([0]))}."
    labels, run = rows.quadrants(), rows.directions_run()
    if len(run) == 2:
        wanted, claim = "both directions", "both sufficient and necessary"
        found = [n for n, label in enumerate(labels) if label == wanted]
    else:
        claim = {"recovery": "sufficient", "degradation": "necessary"}[run[0]]
        bounds = statistics.bounds(rows.threshold, rows.carried(run[0]))
        found = np.flatnonzero(rows.interval(run[0])[:, 0] > bounds).tolist()
    lead = rows.take([found[0] if found else 0])
    about, pairs = _lead(lead), sample(effects)
    whole = f"of the {noun}s that were run" if "screening" in effects.metadata else f"of {counted(effects.rows_ranked, noun)}"
    if not found:
        return f"No single {noun} {whole} is shown to be {claim} by {pairs}. The largest effect is that of {about}."
    if len(found) == 1:
        return f"1 {whole} is {claim} for part of the behaviour: {about}."
    return f"{len(found):,} {whole} are {claim} for part of the behaviour. The strongest of them is {about}."


def _lead(row: Effects) -> str:
    """Return the name of one row, with its effects in words."""
    return f"{short_names(row.nodes)[0]}: {'; '.join(_effect(row, effect) for effect in row.directions_run())}"


def _effect(row: Effects, effect: Effect) -> str:
    """Return an effect of one row with its interval in words."""
    value, (low, high) = float(row.pooled(effect)[0]), row.interval(effect)[0]
    if not row.has_gap:
        between = f" [{low:.3g}, {high:.3g}]" if np.isfinite(low) else ""
        return f"ablating it changes {row.metadata['metric']} by {-value:.3g} (clean - ablated: {value:.3g}{between})"
    between = f" [{percent(low)}, {percent(high)}]" if np.isfinite(low) else ""
    if effect == "recovery":
        kept = "alone it brings back" if value >= 0 else "alone it brings back less than nothing,"
        return f"{kept} {percent(value)}{between} of the clean\N{EN DASH}corrupted gap"
    return f"without it {percent(abs(value))}{between if value >= 0 else ''} {'is lost' if value >= 0 else 'is gained'}"


def _caveats(effects: Effects) -> tuple[str, ...]:
    """Return what limits the conclusion of a table, a sentence each."""
    found, pairs, run = [], len(effects.clean), effects.directions_run()
    if effects.value == "estimate":
        found.append("These effects are estimates from gradients, not patched runs of the model; confirm the largest exactly.")
    if not effects.finished:
        found.append("The sweep was interrupted: only what had been finished is counted.")
    found += [f"{note}." for note in notes(effects)]
    if "screening" in effects.metadata:
        known = effects.metadata["screening"]
        found.append(
            f"{known['k']:,} of {known['candidates']:,} features were patched because their estimates were the largest, and "
            f"{known['sampled']:,} more at random; how much this may have missed is said above the table of all rows."
        )
    if not effects.has_gap:
        found.append(f"The prompts have no counterfactual: effects are changes {effects.unit}, not shares of a gap.")
    elif len(run) == 1:
        other = {"recovery": "necessary (noising)", "degradation": "sufficient (denoising)"}[run[0]]
        found.append(f"Only one direction was run, so nothing is known about which are {other}.")
    if pairs == 1:
        one = "pair" if effects.has_gap else "prompt"
        found.append(f"A single {one} gives no interval: nothing here says whether it holds for other prompts.")
    elif pairs < FEW_PAIRS:
        found.append(f"The intervals are over {pairs} pairs only, and cover less than 95 %.")
    labels = Counter(effects.take(effects.ranked).quadrants()) if len(run) == 2 and pairs > 1 else Counter()
    if labels["undecided"]:
        found.append(
            f"{labels['undecided']:,} of {counted(sum(labels.values()), noun_of(effects))} "
            f"{'is' if labels['undecided'] == 1 else 'are'} undecided, because an interval includes the threshold "
            f"({100 * effects.threshold:.4g} % of the whole activation's effect); more pairs would decide more."
        )
    if effects.rows_ranked > MANY_ROWS and pairs > 1:
        found.append(
            f"Each interval is about one {noun_of(effects)}; among so many some pass by chance (the q-values in effects.csv "
            "and effects.to_pandas() allow for this)."
        )
    return tuple(found)


def together(curve: Curve) -> str:
    """Return how many features bring back how much together, at the place where the largest set has the largest effect."""
    effect = curve.sets.directions_run()[0]
    rows = curve.table()
    if not len(rows):
        return ""
    best = rows.loc[rows[effect].abs().idxmax()]
    here = rows[(rows["sae"] == best["sae"]) & (rows["position"] == best["position"])]
    share, verb = here[f"{effect}_of_all_features"], {"recovery": "bring back", "degradation": "carry"}[effect]
    enough = here[share >= MOST]
    row = enough.iloc[0] if len(enough) else here.iloc[-1]
    node = next(node for node in curve.sets.nodes if node.sae == best["sae"] and node.position == best["position"])
    low, high = row[f"{effect}_low"], row[f"{effect}_high"]
    between = f" [{percent(low)}, {percent(high)}]" if np.isfinite(low) else ""
    of_all = row[f"{effect}_of_all_features"]
    part = f", {percent(of_all)} of what all features there do" if np.isfinite(of_all) else ""
    place = f"{sites.short(node.site)}" + ("" if node.position == "all" else f" @ {node.position}")
    return f"The top {counted(int(row['k']), 'feature')} at {place} {verb} {percent(row[effect])}{between} together{part}."
