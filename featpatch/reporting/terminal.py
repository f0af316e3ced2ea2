"""Tables of effects, plans, checks and checklists for a terminal."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from featpatch.effects.frames import number
from featpatch.effects.measured import Measured
from featpatch.effects.selection import WHERE_CHANGED, By, sorting
from featpatch.effects.table import Effects
from featpatch.nodes import Effect, Node
from featpatch.pairs.checklist import RULES, SEVERITY, Checklist
from featpatch.ranking.plan import Plan
from featpatch.selfcheck import Check

TITLES = {"recovery": "denoising: recovery", "degradation": "noising: degradation"}


def _title(effects: Measured, effect: Effect) -> str:
    """Return the title of a column of effects."""
    return TITLES[effect] if effects.has_gap else effects.titled(effect)


def ranked(effects: Effects, by: By | None = None) -> Table:
    """Tabulate effects, one line per row, with 95 % intervals, and with quadrants if both directions were run.

    Args:
        effects: the rows to show.
        by: the effect by which the rows are sorted; it is also shown over the pairs in which the node differs.
    """
    pairs = len(effects.clean)
    over = f"{pairs} pairs" if effects.has_gap else f"{pairs} prompts, as changes {effects.unit}"
    table = Table(title=f"{effects.value} effects of {len(effects)} nodes, pooled over {over} [95 % interval]")
    for column in ("site", "feature" if "feature" in {node.kind for node in effects.nodes} else "component", "position"):
        table.add_column(column, no_wrap=True)
    columns: dict[str, str] = {effect: _title(effects, effect) for effect in effects.directions_run()}
    columns |= {
        f"{name}_{effect}": f"{name}\n{_title(other, effect)}"
        for name, other in effects.others.items()
        for effect in effects.directions_run()
    }
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    both, notes = len(effects.directions_run()) == 2, []
    if both:
        table.add_column("quadrant", no_wrap=True)
        share = f"{100 * effects.threshold:.4g} %"
        notes.append(
            f"quadrant: directions in which the interval lies above {share} of the effect of the whole activation at that "
            "place (of the behaviour, for whole activations and where that has no row); undecided if an interval includes "
            "this threshold"
        )
    table.add_column("pairs", justify="right")
    own = f"{sorting(by, effects.directions_run())[0]}{WHERE_CHANGED}"
    diluted = bool((effects.changed_pairs < pairs).any())
    if diluted:
        table.add_column(f"{own.split('_')[0]}\nwhere changed", justify="right", no_wrap=True)
        notes.append(
            "pairs: the number of pairs in which the node differs between the runs; where changed: pooled over these pairs only"
        )
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    for node, (_, row) in zip(effects.nodes, effects.to_pandas().iterrows(), strict=True):
        cells = [(node.sae or node.site).replace(" -> ", " ->\n"), _named(node), str(node.position)]
        cells += [_value(row, column) for column in columns]
        cells += [row["quadrant"]] if both else []
        cells.append(f"{row['changed_pairs']}/{row['pairs']}")
        cells += [_value(row, own)] if diluted else []
        table.add_row(*cells)
    return table


def site_summary(effects: Effects) -> Table:
    """Tabulate the effects of the whole activation, all features and the error alone, per hook point and position."""
    table = Table(title=f"{effects.value} effects per hook point: whole activation = all features + error + their interaction")
    summary = effects.sites()
    for column in ("site", "position", "changed\nfeatures"):
        table.add_column(column, no_wrap=True)
    for effect in effects.directions_run():
        for kind in ("whole", "features", "error", "interaction"):
            table.add_column(f"{_title(effects, effect).split(':')[0]}\n{kind}", justify="right")
    for _, row in summary.iterrows():
        cells = [row["sae"], str(row["position"]), str(row["changed_features"])]
        for effect in effects.directions_run():
            cells += [number(row[f"{effect}_{kind}"]) for kind in ("activation", "all_features", "error", "interaction")]
        table.add_row(*cells)
    return table


def planned(plan: Plan) -> Table:
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


def _facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """Return a table with names on the left and values on the right."""
    table = Table("", Column("", justify="right"), title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _beside(plan: Plan) -> list[tuple[str, str]]:
    """Return table rows with the time of a screened sweep, and which of the two sweeps is faster."""
    k, audit = 200, 100
    seconds = plan.screened_seconds(k, audit)
    if seconds is None:
        return [("screened sweep", "not possible: the metric has no gradient")]
    share = f"estimates, then {k} + {audit} of {plan.nodes:,} features"
    better = "the full sweep" if plan.seconds <= seconds else "screen=fp.Screen(), with an audit"
    return [(share, str(timedelta(seconds=math.ceil(seconds)))), ("quicker", better)]


def checked(check: Check) -> Table:
    """Tabulate how dictionaries fit a model, one line each, with remarks below."""
    notes = [f"{fit.dictionary}: {note}" for fit in check.fits for note in (fit.misfit, *fit.remarks) if note]
    table = Table(
        title=f"self-check on {check.positions} positions; model {check.model}, weights {check.weights}",
        caption="\n".join(notes) or None,
        caption_justify="left",
    )
    table.add_column("dictionary", overflow="fold")
    for column in ("identity\noff by", "whole activation\noff by", "explained\nvariance", "claimed", "L0", "status"):
        table.add_column(column, justify="right", no_wrap=True)
    for fit in check.fits:
        claim = "" if fit.expected is None else number(fit.expected)
        status = Text(fit.status, "" if fit.ok else "red")
        deviations = [f"{value:.0e}" for value in (fit.identity, fit.whole_site)]
        table.add_row(fit.dictionary, *deviations, number(fit.explained_variance), claim, f"{fit.l0:.1f}", status)
    return table


def _named(node: Node) -> str:
    """Return the name of a node for a table: the index of a feature, and the kind and index of other nodes."""
    return node.kind if node.index is None else str(node.index) if node.kind == "feature" else f"{node.kind} {node.index}"


def _value(row: Any, effect: str) -> str:
    low, high = row[f"{effect}_low"], row[f"{effect}_high"]
    interval = "" if low != low else f" [{number(low)}, {number(high)}]"
    return "" if row[effect] != row[effect] else f"{number(row[effect])}{interval}"


def stability_table(effects: Effects) -> Table:
    """Tabulate how well halves of the pairs agree on the ranking of the features, one line per effect.

    Raises:
        FeatpatchError: fewer than 4 pairs or 2 features.
    """
    table = Table(title=f"split-half stability of the ranking, {len(effects.clean)} pairs in random halves")
    table.add_column("effect", no_wrap=True)
    for column in ("features", "splits", "rank correlation\n[95 % of the splits]", "shared top", "by chance"):
        table.add_column(column, justify="right")
    for effect in effects.directions_run():
        found = effects.stability(effect)
        spread = f"{number(found.correlation)} [{number(found.low)}, {number(found.high)}]"
        shared = "" if math.isnan(found.overlap) else f"{found.overlap * found.top:.1f} of {found.top}"
        chance = "" if math.isnan(found.overlap) else f"{found.chance * found.top:.1f}"
        table.add_row(_title(effects, effect), str(found.features), str(found.splits), spread, shared, chance)
    return table


def by_tag_table(effects: Effects, tag: str, effect: Effect) -> Table:
    """Tabulate the pooled effect for each value of a tag of the pairs with its rank, one line per row of the effects.

    Ranks are among all features that were ranked. The last column says whether a feature's effect depends on the tag.

    Raises:
        FeatpatchError: no pair has the tag, or all have the same value of it.
    """
    found = effects.by_tag(tag, effect)
    names = [column.removesuffix("_rank") for column in found.columns if column.endswith("_rank")]
    table = Table(title=f"{_title(effects, effect)} by {tag} [95 % interval] (rank)")
    for column in ("site", "feature", "position"):
        table.add_column(column, no_wrap=True)
    for name in names:
        table.add_column(name.removeprefix(f"{effect}_"), justify="right")
    table.add_column(f"depends on\n{tag}")
    for node, (_, row) in zip(effects.nodes, found.iterrows(), strict=True):
        cells = [node.sae or node.site, node.kind if node.index is None else str(node.index), str(node.position)]
        for name in names:
            rank = f" ({row[f'{name}_rank']})" if node.kind == "feature" and not math.isnan(row[name]) else ""
            cells.append(_value(row, name) + rank)
        table.add_row(*cells, "yes" if row["depends"] else "")
    return table


COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def totals(check: Checklist) -> Table:
    """Tabulate how many pairs pass each rule, with advice for the others."""
    table = Table(title=repr(check).splitlines()[0])
    table.add_column("rule", no_wrap=True)
    for status in SEVERITY:
        table.add_column(status, justify="right")
    table.add_column("warnings and failures")
    for rule, counts in check.counts().items():
        advice = RULES[rule] if counts["warn"] or counts["fail"] else ""
        table.add_row(rule, *(Text(str(n), COLOURS[s] if n else "") for s, n in counts.items()), advice)
    return table


def by_pair(check: Checklist, text: Callable[[int], str], most: int = 12) -> Table:
    """Tabulate the pairs that do not pass with their findings, the worst first.

    Args:
        check: the checklist.
        text: a function that returns the clean prompt of a pair as text, given the index of the pair.
        most: the largest number of pairs to show.
    """
    verdicts = check.verdicts()
    worst = sorted((p for p, verdict in enumerate(verdicts) if verdict != "pass"), key=lambda p: -SEVERITY[verdicts[p]])
    table = Table(title=f"{len(worst)} pairs to look at" + (f", the first {most}" if len(worst) > most else ""))
    for column in ("pair", "verdict", "found", "clean prompt"):
        table.add_column(column)
    for pair in worst[:most]:
        found = [f"{f.rule}: {f.detail}" for f in check.findings if f.pair == pair and f.status != "pass"]
        table.add_row(str(pair), Text(verdicts[pair], COLOURS[verdicts[pair]]), "; ".join(found), text(pair))
    return table
