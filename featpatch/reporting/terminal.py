"""Tables of effects, plans, checks and checklists for a terminal."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Group
from rich.text import Text

from featpatch.comparison.compare import SHOWN, Comparison, cells
from featpatch.console import Fitted
from featpatch.descriptions import Description
from featpatch.effects.frames import notes, number, sample
from featpatch.effects.selection import WHERE_CHANGED, By, sorting
from featpatch.effects.table import Effects
from featpatch.errors import counted
from featpatch.nodes import Effect, Node, numbered
from featpatch.pairs.checklist import RULES, SEVERITY, Checklist
from featpatch.patching.sets import Selection
from featpatch.ranking.plan import Plan
from featpatch.ranking.screen import Screen
from featpatch.selfcheck import Check
from featpatch.sites import LAYER, WHOLE, short_dictionary
from featpatch.untrusted import visible


def ranked(effects: Effects, by: By | None = None) -> Fitted:
    """Tabulate effects, one line per row, with 95 % intervals, and with quadrants if both directions were run.

    Args:
        effects: the rows to show.
        by: the effect by which the rows are sorted; it is also shown over the pairs in which the node differs.
    """
    pairs, table, run = len(effects.clean), effects.to_pandas(), effects.directions_run()
    scale = ": 0 is none, 1 is the whole behaviour" if effects.has_gap else f", as changes {effects.unit}"
    columns: dict[str, Sequence[str]] = _names(effects)
    numbers: dict[str, str] = {effects.titled(effect): effect for effect in run}
    main = sorting(by, run)[0]
    other = [header for header, effect in numbers.items() if effect != main]
    numbers |= {
        f"{other.titled(effect)}\n{name}": f"{name}_{effect}" for name, other in effects.others.items() for effect in run
    }
    columns |= {header: [_value(row, column) for _, row in table.iterrows()] for header, column in numbers.items()}
    legend = {}
    if len(run) == 2:
        columns["quadrant"] = [label.removesuffix(" directions") for label in table["quadrant"]]
        legend["quadrant"] = (
            f"directions in which the interval lies above {100 * effects.threshold:.4g} % of the effect of the whole "
            "activation there (of the behaviour where there is none); undecided if an interval includes this threshold"
        )
    own, changed = f"{main}{WHERE_CHANGED}", f"{main}\nwhere changed"
    if bool((effects.changed_pairs < pairs).any()):
        columns["pairs"] = [f"{row['changed_pairs']}/{row['pairs']}" for _, row in table.iterrows()]
        columns[changed] = [_value(row, own) for _, row in table.iterrows()]
        legend |= {"pairs": "those in which the node differs between the runs", changed: "over these pairs only"}
    intervals = " [95 % interval]" * any("[" in cell for header in numbers for cell in columns[header])
    return Fitted(
        f"{effects.value} effects of {counted(len(effects), 'node')}, pooled over {sample(effects)}{scale}{intervals}",
        columns,
        numbers=[*numbers, "pairs", changed],
        spare=[header for header in (changed, *list(numbers)[: len(run) - 1 : -1], "pairs", *other) if header in columns],
        legend=legend,
        notes=notes(effects),
    )


def site_summary(effects: Effects) -> Fitted:
    """Tabulate the effects of the whole activation, all features and the error alone, per hook point and position."""
    summary = effects.sites()
    columns = {
        "hook point": _places(list(zip(summary["sae"], summary["site"], strict=True)) if len(summary) else []),
        "position": [*map(str, summary["position"])],
        "changed\nfeatures": [*map(str, summary["changed_features"])],
    }
    kinds = {"whole": "activation", "features": "all_features", "error": "error", "interaction": "interaction"}
    numbers = {
        f"{effects.titled(effect)}\n{kind}": [*map(number, summary[f"{effect}_{column}"])]
        for effect in effects.directions_run()
        for kind, column in kinds.items()
    }
    return Fitted(
        f"{effects.value} effects per hook point: whole activation = all features + error + their interaction",
        {**columns, **numbers},
        numbers=["changed\nfeatures", *numbers],
        spare=[
            *(header for header in numbers if header.endswith("interaction")),
            "changed\nfeatures",
            *(header for header in list(numbers)[::-1] if header.endswith("error")),
        ],
    )


def planned(plan: Plan) -> Fitted:
    """Tabulate the cost of a planned sweep."""
    return _facts("estimated cost of the sweep", [
        ("patches (one exact run each)", f"{plan.patches:,}"),
        ("positions to compute", f"{plan.rows:,}"),
        ("floating-point operations", f"{plan.flops:.3g}"),
        ("positions per forward pass", f"{plan.batch_rows:,}"),
        ("memory of a forward pass", f"{plan.memory / 2**20:,.0f} MiB"),
        ("time, extrapolated from one batch", str(timedelta(seconds=math.ceil(plan.seconds)))),
        ("forward pass", "fast" if plan.fast else "the model's own"),
        *([] if plan.counted == plan.pairs else [("counted", f"{plan.counted} of {plan.pairs:,} pairs, scaled to all")]),
        *(_beside(plan) if plan.screens else []),
    ])  # fmt: skip


def _facts(title: str, rows: list[tuple[str, str]]) -> Fitted:
    """Return a table with names on the left and values on the right."""
    names, values = zip(*rows, strict=True)
    return Fitted(title, {"": names, " ": values}, numbers=[" "])


def _beside(plan: Plan) -> list[tuple[str, str]]:
    """Return table rows with the time of a screened sweep, and which of the two sweeps is faster."""
    screen = Screen()
    seconds = plan.screened_seconds(screen.k, screen.audit)
    if seconds is None:
        return [("screened sweep", "not possible: the metric has no gradient")]
    k = min(screen.k, plan.nodes)
    patched = f"{k} + {min(screen.audit, plan.nodes - k)} of" if k < plan.nodes else "all"
    share = f"estimates, then {patched} {counted(plan.nodes, 'feature')}"
    better = "the full sweep" if plan.seconds <= seconds else "rank --screen, with an audit"
    return [(share, str(timedelta(seconds=math.ceil(seconds)))), ("quicker", better)]


def checked(check: Check) -> Fitted:
    """Tabulate how dictionaries fit a model, one line each, with remarks below."""
    fits = check.fits
    numbers = {
        "identity\noff by": [f"{fit.identity:.0e}" for fit in fits],
        "whole activation\noff by": [f"{fit.whole_site:.0e}" for fit in fits],
        "explained\nvariance": [number(fit.explained_variance) for fit in fits],
        "claimed": ["" if fit.expected is None else number(fit.expected) for fit in fits],
        "L0": [f"{fit.l0:.1f}" for fit in fits],
    }
    return Fitted(
        f"self-check on {counted(check.positions, 'position')}; model {check.model}, weights {check.weights}",
        {
            "dictionary": [short_dictionary(fit.dictionary) for fit in fits],
            **numbers,
            "status": [Text(fit.status, "" if fit.ok else "red") for fit in fits],
        },
        numbers=[*numbers],
        spare=["claimed", "L0"],
        notes=[f"{short_dictionary(fit.dictionary)}: {note}" for fit in fits for note in (fit.misfit, *fit.remarks) if note],
    )


def _names(effects: Effects) -> dict[str, Sequence[str]]:
    """Return the columns that name the nodes of a table."""
    return {
        "hook point": _places([(node.sae, node.site) for node in effects.nodes]),
        "feature" if "feature" in {node.kind for node in effects.nodes} else "component": [*map(_named, effects.nodes)],
        "position": [str(node.position) for node in effects.nodes],
    }


def _places(owned: Sequence[tuple[str, str]]) -> list[str]:
    """Return short names of dictionaries and hook points, given those of each row; a dictionary at several shows each."""
    several = {sae for sae, count in Counter(sae for sae, _ in set(owned)).items() if sae and count > 1}
    names = {sae: "" if LAYER.match(sae) else f"{sae} " for sae in several}
    return [
        f"{names[sae]}{short_dictionary(site.removeprefix(f'{sae} '))}" if sae in several else short_dictionary(sae or site)
        for sae, site in owned
    ]


def _named(node: Node) -> str:
    """Return the name of a node for a table: the index of a feature, and the kind and index of other nodes."""
    return str(node.index) if node.kind == "feature" else numbered(node.kind, node.index)


def _value(row: Any, effect: str) -> str:
    low, high = row[f"{effect}_low"], row[f"{effect}_high"]
    interval = "" if low != low else f" [{number(low)}, {number(high)}]"
    return "" if row[effect] != row[effect] else f"{number(row[effect])}{interval}"


def compared(comparison: Comparison) -> Group:
    """Tabulate the largest components and features of a comparison, with how well they agree on hook points and positions."""
    agreed: dict[str, list[str]] = {}
    for effect, found in comparison.agreement.items():
        why = (
            found.reason
            if len(cells(comparison.table))
            else f"{found.reason.rpartition('; ')[0]}; {_advice(comparison.features)}"
        )
        value = f" {number(found.correlation)} over {found.points} hook points and positions"
        agreed.setdefault(f": none, because {why}" if found.reason else value, []).append(effect)
    said = "; ".join(f"{' and '.join(effects)}{what}" for what, effects in agreed.items())
    return Group(
        f"rank correlation (Spearman) of whole components with the summed features: {said}\n",
        ranked(comparison.components.top(SHOWN, kind=None)),
        "",
        ranked(comparison.features.top(SHOWN)),
    )


def _advice(features: Effects) -> str:
    """Return the command that ranks components which can be compared with these features."""
    names = [name for name, hook in WHOLE.items() if any(node.site.endswith(f".{hook}") for node in features.nodes)]
    if not names:
        return (
            f"run featpatch rank with SAEs at {', '.join(WHOLE)}: only there does featpatch components patch whole activations"
        )
    positions = list(dict.fromkeys(node.position for node in features.nodes))
    quoted = [
        '"{}"'.format(name.replace('"', '""'))
        if isinstance(name, str) and not re.fullmatch(r"(?!-?\d+$)[^,\"]+", name)
        else name
        for name in positions
    ]
    asked = "each" if set(map(type, positions)) == {int} else ",".join(map(str, quoted))
    return f"run featpatch components with --sites {','.join(names)} --positions {shlex.quote(asked)}"


VERDICTS = {
    "both directions": "sufficient and necessary for this part of it",
    "denoising only": "sufficient for this part of it, but not necessary, because something else does the job as well",
    "noising only": "necessary for this part of it, but not sufficient",
    "below threshold": "neither sufficient nor necessary",
    "opposing": "working against it in at least one direction",
    "undecided": "not shown to be both sufficient and necessary by these pairs",
}
"""What the quadrant of features that are patched together says about them."""

EXAMPLES = 3
"""The largest number of features for which a conclusion says what activates them."""

STEPS = 8
"""The largest number of steps of a selection that are shown."""


def selected_together(chosen: Selection, place: str, described: Sequence[Description]) -> str:
    """Return what selected features do together and what activates them, as a paragraph.

    Args:
        chosen: the features, with the effects of the growing sets in both directions.
        place: where they are, in words.
        described: the descriptions of the features, in the same order.
    """
    count, last = len(chosen.features), chosen.effects.take([len(chosen.effects) - 1])
    recovery, degradation = (_percent(last, effect) for effect in last.directions_run())
    bring, them, they_are = ("bring", "them", "they are") if count > 1 else ("brings", "it", "it is")
    short_of = "" if chosen.reached else f", short of {chosen.target:.0%}"
    said = (
        f"{counted(count, 'feature')} at {place} {bring} back {recovery} of the behaviour{short_of}, and {degradation} of it "
        f"is lost without {them}: {they_are} {VERDICTS[last.quadrants()[0]]}."
    )
    examples = [
        f'{index} on "{each.contexts[0]}"' for index, each in zip(chosen.features, described, strict=True) if each.contexts
    ][:EXAMPLES]
    return f"{said} Most active: {', '.join(examples)}." if examples else said


def _percent(row: Effects, effect: Effect) -> str:
    """Return an effect of a single row as a percentage, with its interval if it has one."""
    value, (low, high) = row.pooled(effect)[0], row.interval(effect)[0]
    return f"{100 * value:.0f} %" + ("" if low != low else f" [{100 * low:.0f}, {100 * high:.0f}]")


def steps(chosen: Selection) -> str:
    """Return how much the selected features do as one after the other is added."""
    values = chosen.effects.pooled(chosen.effect)
    parts = [f"{index} ({number(value)})" for index, value in zip(chosen.features, values, strict=True)]
    left_out = [f"{len(parts) - STEPS} more"] if len(parts) > STEPS else []
    shown = parts if not left_out else [*parts[: STEPS - 1], *left_out, parts[-1]]
    aim = f"to bring back {chosen.target:.0%}" if chosen.effect == "recovery" else f"to lose {chosen.target:.0%}"
    return f"features needed {aim}, chosen one by one on these pairs: {' + '.join(shown)}"


def detected(described: Mapping[Node, Description]) -> list[str]:
    """Return a line for each feature that says which word it detects, with the example that activates it most."""
    lines = [
        f"{short_dictionary(node.sae)} {node.index}: {each.best}" + (f', such as "{each.contexts[0]}"' if each.contexts else "")
        for node, each in described.items()
    ]
    return list(dict.fromkeys(lines))  # a feature at two positions is described once


COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def totals(check: Checklist) -> Fitted:
    """Tabulate how many pairs pass each rule, with advice for the others below."""
    counts = check.counts()
    found: dict[str, Sequence[Text]] = {
        status: [Text(str(count[status]), COLOURS[status] if count[status] else "") for count in counts.values()]
        for status in SEVERITY
    }
    advice = [f"{rule}: {RULES[rule]}" for rule, count in counts.items() if count["warn"] or count["fail"]]
    return Fitted(repr(check).splitlines()[0], {"rule": [*counts], **found}, numbers=[*found], notes=advice)


def by_pair(check: Checklist, text: Callable[[int], str], most: int = 12) -> Text:
    """Return the pairs that do not pass with their findings, the worst first.

    Args:
        check: the checklist.
        text: a function that returns the clean prompt of a pair as text, given the index of the pair.
        most: the largest number of pairs to show.
    """
    verdicts = check.verdicts()
    worst = sorted((p for p, verdict in enumerate(verdicts) if verdict != "pass"), key=lambda p: -SEVERITY[verdicts[p]])
    said = f"{counted(len(worst), 'pair')} to look at{f', the first {most}' * (len(worst) > most)}"
    lines = Text(said if worst else "every pair passes", "bold")
    for pair in worst[:most]:
        found = [f"\n  {f.rule}: {f.detail}" for f in check.findings if f.pair == pair and f.status != "pass"]
        lines.append(f"\npair {pair}, {verdicts[pair]}", COLOURS[verdicts[pair]])
        lines.append(visible(f": {text(pair)}{''.join(found)}"), "not bold")
    return lines
