"""Tables of the checklist of pairs for a terminal."""

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from featpatch.pairs.checklist import RULES, SEVERITY, Checklist

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def totals(check: Checklist) -> Table:
    """Tabulate how many pairs pass each rule, with advice for the others."""
    table = Table(title=repr(check).splitlines()[0])
    table.add_column("rule", no_wrap=True)
    for status in SEVERITY:
        table.add_column(status, justify="right")
    table.add_column("where it does not pass")
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
    table = Table(title=f"{len(worst)} pairs with something to look at" + (f", the first {most}" if len(worst) > most else ""))
    for column in ("pair", "verdict", "found", "clean prompt"):
        table.add_column(column)
    for pair in worst[:most]:
        found = [f"{f.rule}: {f.detail}" for f in check.findings if f.pair == pair and f.status != "pass"]
        table.add_row(str(pair), Text(verdicts[pair], COLOURS[verdicts[pair]]), "; ".join(found), text(pair))
    return table
