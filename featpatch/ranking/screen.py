"""Screening: patch, exactly, only the nodes with the largest gradient estimates and a random sample of the others."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featpatch.attribution.gradients import check_method
from featpatch.effects.audit import needed, provable, sample_sizes, without_estimates
from featpatch.effects.collector import concatenated
from featpatch.effects.frames import TOP
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, FeatpatchWarning, check_fractions, check_numbers
from featpatch.nodes import EFFECTS, RANKED, Node
from featpatch.patching.study import Study

NEARLY_ALL = 0.8
"""The share of the candidates above which the full sweep costs hardly more than a screened one."""
USEFUL = 0.5
"""A warning is given if the sample can't prove, even at best, that this share of the true top was patched."""
CONFIDENCE = 0.95
"""The default confidence of `Effects.audit`."""


@dataclass(frozen=True)
class Screen:
    """The settings of screening: gradient estimates choose which nodes are patched.

    All nodes are estimated and only some are patched: the first `k` by |estimate|, and `audit` of the others, drawn at random.
    Every value of the resulting table is exact; `effects.audit()` bounds what was missed, and `effects.to_pandas()` also shows
    the estimates. `fp.plan` tells whether this is faster than the full sweep.

    Methods of estimation err at different hook points. With several methods, the k nodes are those with the best rank in any of
    them: the first of each method, then the second of each, and so on. The estimates shown are those of the first method.

    Attributes:
        k: how many nodes are patched because of their estimates.
        audit: how many of the other nodes are patched, drawn at random.
        target: the share of the true `top` that should be among the patched nodes, with 95 % confidence: the sample is doubled
            until the bound reaches it. None for a single sample.
        top: the length of the ranking that `target` refers to; by default 20, or `k` if that is smaller.
        method: the method of estimation, see `fp.Gradients`; or several, such as `("atp", "relp")`.
        seed: the seed of the random sample.

    Raises:
        FeatpatchError: a number is out of range, or a method is unknown or given twice.

    Examples:
        >>> screen = fp.Screen(k=20, audit=80)
        >>> screened = fp.rank_features(model, saes, pairs, positions=["S2"], screen=screen, progress=False)
        >>> len(screened.where(kind="feature"))
        83
        >>> both = fp.Screen(k=20, audit=80, method=("atp", "relp"))
        >>> union = fp.rank_features(model, saes, pairs, positions=["S2"], screen=both, progress=False)
        >>> union.metadata["screening"]["method"]
        'atp, relp'
    """

    k: int = 200
    audit: int = 100
    target: float | None = None
    top: int | None = None
    method: str | Sequence[str] = "atp"
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(1, k=self.k, audit=self.audit, top=1 if self.top is None else self.top)
        check_numbers(0, seed=self.seed)
        for method in self.methods:
            check_method(method)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise FeatpatchError(f"method={self.method!r}: expected a method of estimation, or several, each once")
        if self.target is not None:
            check_fractions(target=self.target)
        for name, kind in (("k", int), ("audit", int), ("target", float), ("top", int), ("seed", int)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))  # NumPy's numbers can't be saved as metadata

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of estimation."""
        one = isinstance(self.method, str) or not isinstance(self.method, Sequence)
        return (self.method,) if one else tuple(self.method)  # type: ignore[return-value]


def screened(
    screen: Screen, estimates: Sequence[Effects], study_of: Callable[[frozenset[Node]], Study], run: Callable[[Study], Effects]
) -> Effects:
    """Measure the exact effects of the nodes that screening chooses.

    Args:
        screen: the settings.
        estimates: the estimates of all nodes by each method.
        study_of: makes a study of some nodes.
        run: runs a study.

    Raises:
        FeatpatchError: the input is unusable, or `top` exceeds the number of nodes patched because of their estimates.
    """
    estimate, nodes = estimates[0], by_best_rank(estimates)
    first, rest = nodes[: screen.k], nodes[screen.k :]
    top = min(TOP, len(first)) if screen.top is None else screen.top
    if top > len(first):
        raise FeatpatchError(
            f"top={top}: expected at most {len(first)}, the number of features that are patched because of their estimates"
        )
    drawn = [rest[row] for row in np.random.default_rng(screen.seed).permutation(len(rest))]
    begin = [*first, *(node for node in estimate.nodes if node.kind not in RANKED)]
    sizes = sample_sizes(screen.audit, len(rest))[: None if screen.target is not None else 1]
    looks = max(1, sum(size < len(rest) for size in sizes))
    _warn(screen, len(nodes), len(rest), top, looks)
    changed = Counter((node.sae, node.site, node.position) for node in nodes)
    about = {**vars(screen), "method": ", ".join(screen.methods), "k": len(first), "candidates": len(nodes), "looks": looks,
             "changed_features": [[*key, count] for key, count in changed.items()]}  # fmt: skip
    tables: list[Effects] = []
    done = 0
    for size in sizes:
        some = frozenset([*([] if tables else begin), *drawn[done:size]])
        try:
            with warnings.catch_warnings():
                if tables:  # after Ctrl-C the earlier looks are returned, which are finished
                    warnings.simplefilter("ignore", FeatpatchWarning)
                found = run(study_of(some))
        except KeyboardInterrupt:
            if not tables:
                raise
            break
        if not found.finished:
            if not tables:
                finished = set(found.nodes)
                order = [node for node in (*first, *drawn[:size]) if node in finished]
                return _noted(found, order, estimate, {**about, "sampled": size})
            break
        tables, done = [*tables, found], size
        table = _noted(concatenated(tables), [*first, *drawn[:done]], estimate, {**about, "sampled": done})
        if screen.target is not None and table.audit(top=top).recall >= screen.target:
            break
    return table


def by_best_rank(estimates: Sequence[Effects]) -> list[Node]:
    """Return the ranked nodes of tables of estimates, by their best rank by |estimate| in any of the tables.

    Of nodes with the same rank, that of the earlier table comes first.
    """
    best: dict[Node, tuple[int, int]] = {}
    for number, table in enumerate(estimates):
        features = table.take(table.ranked)
        for rank, row in enumerate(np.argsort(-features.sizes(), kind="stable")):
            node = features.nodes[row]
            best[node] = min((rank, number), best.get(node, (rank, number)))
    return sorted(best, key=best.__getitem__)


def _warn(screen: Screen, candidates: int, rest: int, top: int, looks: int) -> None:
    """Warn, before any patch is run, if screening costs as much as the full sweep, or its audit can prove little."""
    about: dict[str, Any] = {"top": top, "confidence": CONFIDENCE, "looks": looks}
    least = min(screen.audit, rest) if screen.target is None else needed(rest, screen.target, **about)
    run = candidates - rest + least
    if run > NEARLY_ALL * candidates:
        sized = (
            f"k={screen.k} and audit={screen.audit}" if screen.target is None else f"target={screen.target} and k={screen.k}"
        )
        told = (
            f"{sized} mean that {'' if screen.target is None else 'at least '}{run:,} of {candidates:,} candidates are "
            "patched, in addition to the estimates: a full sweep costs little more and misses nothing; leave screen out, or "
            f"give it a smaller {'k or audit' if screen.target is None else 'target or k'}"
        )
    elif screen.target is None and (best := provable(rest, least, **about)) < USEFUL:
        told = (
            f"audit={screen.audit} of the {rest:,} candidates with smaller estimates can prove at best that {best:.0%} of the "
            f"true top {top} were patched, even if no effect in the sample is large enough for the top {top}: expected "
            f"audit={needed(rest, USEFUL, **about)} or more, which can prove {USEFUL:.0%}; increase it, or treat this audit "
            "as a rough check"
        )
    else:
        return
    warnings.warn(f"screening: {told}", FeatpatchWarning, stacklevel=4)


def _noted(table: Effects, order: Sequence[Node], estimate: Effects, about: dict[str, Any]) -> Effects:
    """Return the table with these nodes first, in this order, then the other rows; add screening and estimates as metadata."""
    row = {node: number for number, node in enumerate(table.nodes)}
    features = [row[node] for node in order]
    rows = [*features, *sorted(set(range(len(table))) - set(features))]
    ordered = table.take(rows)
    at = {node: number for number, node in enumerate(estimate.nodes)}
    beside = [at[node] for node in ordered.nodes]
    estimates = {effect: estimate.pooled(effect)[beside].tolist() for effect in EFFECTS if effect in estimate.directions_run()}
    noted = {"screening": {**about, "estimates": estimates}, "rows_ranked": about["candidates"]}
    return _replaced(ordered, {**table.metadata, "sites": estimate.metadata.get("sites", []), **noted})


def _replaced(table: Effects, metadata: dict[str, Any]) -> Effects:
    """Return the table with new metadata, for its other metrics too, and independent of any table it was taken from."""
    without = without_estimates(metadata["screening"])
    others = {
        name: _replaced(table.for_metric(name), {**metadata, "metric": name, "screening": without}) for name in table.others
    }
    return replace(table, metadata=metadata, taken_from=None, others=others)
