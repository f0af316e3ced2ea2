"""Verification of a table of effects: a random sample of its rows is measured again and compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from featpatch import sites
from featpatch.effects.collector import provenance
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers, counted, is_number
from featpatch.frame import Frame
from featpatch.metrics import MEASURES, SEQUENCES, size
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Edge, Node, joint
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.components import component_study
from featpatch.patching.features import feature_study
from featpatch.patching.joint import node_study, set_once
from featpatch.patching.paths import path_study
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any, digests
from featpatch.untrusted import visible

TOLERANCE = 1e-4
"""The accepted difference as a share of gap or size, which covers rounding and other batch sizes in float32."""


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    Attributes:
        nodes: the nodes whose rows were measured again.
        differences: for each row, the largest difference over pairs and directions, as a share of the mean gap, or of the
            metric's size if that is larger, because rounding errors are proportional to the size.
        tolerance: the largest accepted difference.
        versions: the libraries whose version differs from that of the table, as `name: then -> now`.

    Examples:
        >>> verified = fp.verify(effects, model, pairs, saes=saes, rows=3, progress=False)
        >>> verified.ok, verified.table().columns.tolist()
        (True, ['row', 'difference'])
    """

    nodes: tuple[Node, ...]
    differences: tuple[float, ...]
    tolerance: float
    versions: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every row has the same values as before, up to the tolerance."""
        return all(difference <= self.tolerance for difference in self.differences)

    def table(self) -> pd.DataFrame:
        """Return the rows that were measured again with their differences, the largest first."""
        table = Frame({"row": [str(node) for node in self.nodes], "difference": self.differences})
        return table.sort_values("difference", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        verdict = "reproduced" if self.ok else "NOT reproduced"
        changed = f"; other versions: {', '.join(self.versions)}" if self.versions else ""
        return visible(
            f"{counted(len(self.nodes), 'random row')} measured again, {verdict}: largest difference "
            f"{max(self.differences):.2g} of the metric's size (tolerance {self.tolerance:.2g}){changed}"
        )


def verify(
    effects: Effects,
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    rows: int = 20,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> Verified:
    """Verify that a table's values can be reproduced, by measuring a random sample of its rows again.

    Args:
        effects: a table of exact effects of `rank_features`, `rank_components`, `rank_nodes` or `rank_paths`.
        model, pairs, saes: the model, pairs and SAEs of the table; their digests are compared first.
        rows: the largest number of rows to measure again.
        seed: the seed of the random sample.
        tolerance: the accepted difference, as a share of the mean gap or of the metric's size, whichever is larger.
        progress: whether to show a progress bar.

    Returns:
        The difference of each row that was measured again, and whether all are within the tolerance (`ok`).

    Raises:
        FeatpatchError: the model, pairs or SAEs are not those of the table; or the table is empty or holds estimates,
            ablations, effects of prompts corrupted by noise, rows of several nodes of an `fp.Patch`, or a metric that is a
            function.

    Examples:
        >>> fp.verify(effects, model, pairs, saes=saes, rows=3, progress=False).ok
        True
    """
    _check_repeatable(effects)
    check_numbers(1, rows=rows)
    check_numbers(0, seed=seed)
    if not is_number(tolerance) or not tolerance >= 0:
        raise FeatpatchError(f"tolerance={tolerance!r}: expected a number, 0 or more, such as {TOLERANCE}")
    lens = wrap(model)
    found = dictionaries_if_any(lens, saes)
    _check_same(effects, lens, pairs, found)
    several = {dictionary.name for dictionary in found if len(dictionary.outputs) > 1}
    drawn = np.sort(np.random.default_rng(seed).permutation(len(effects))[:rows])
    nodes = [effects.nodes[row] for row in drawn]
    metrics = list(effects.metrics)
    again = _study(effects, model, pairs, saes, nodes, metrics, several).complete(progress=progress)
    differences = np.max([_differences(effects.for_metric(name), again.for_metric(name), nodes) for name in metrics], axis=0)
    now, then = provenance(lens, pairs)["versions"], effects.metadata["versions"]
    versions = tuple(f"{name}: {old} -> {now.get(name)}" for name, old in then.items() if now.get(name) != old)
    return Verified(tuple(nodes), tuple(differences.tolist()), tolerance, versions)


def _check_repeatable(effects: Effects) -> None:
    """Raise a FeatpatchError unless a table holds exact patching effects on built-in metrics, which can be measured again."""
    check_kinds(Effects, effects=effects)
    about = effects.metadata
    whole = {"model", "pairs", "positions", "versions"} <= set(about) and {"saes", "components"} & set(about)
    if effects.value != "exact" or not whole or {"noise", "ablation", "of_pairs"} & set(about) or not effects.finished:
        raise FeatpatchError(
            "the table holds estimates, ablations, noise or, as after Ctrl-C, only some of its pairs: expected exact effects "
            "from rank_features, rank_components, rank_nodes or rank_paths, of all pairs"
        )
    if not len(effects):
        raise FeatpatchError("the table has no rows: expected at least one, to measure it again")
    together = [node for node in effects.nodes if node.kind in ("set", "random")]
    if together and not _is_of_all(effects, together):
        raise FeatpatchError(
            f"the row {str(together[0])!r} is of several nodes or of a random direction: expected rows of single nodes and of "
            "all of them; pass effects.where(kind=...) with another kind, or measure the patch again with fp.rank_nodes"
        )
    unknown = [name for name in effects.metrics if name not in MEASURES and name not in SEQUENCES]
    if unknown:
        raise FeatpatchError(
            f"metric {unknown[0]!r} is a function, which a table does not store: expected only built-in metrics, so that rows "
            "can be measured again"
        )


def _is_of_all(effects: Effects, together: list[Node]) -> bool:
    """Return whether the only joint patch of a table is that of all its other nodes, which can be made again."""
    alone = _alone(effects.whole.nodes)
    return effects.metadata.get("patches") == {"0": list(map(str, set_once(alone)))} and together == [joint(alone)]


def _alone(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes that are not joint patches of others."""
    return [node for node in nodes if node.kind != "set"]


def _check_same(effects: Effects, lens: Lens, pairs: Pairs, found: Sequence[Dictionary]) -> None:
    """Raise a FeatpatchError unless model, pairs and SAEs are those of a table."""
    about = effects.metadata
    given = {"model": lens.digest(), "pairs": check_pairs(pairs, by_label=True).digest(), **digests(found)}
    known = {"model": about["model"]["sha256"], "pairs": about["pairs"], **about.get("saes", {})}
    if missing := [name for name in known if name not in given]:
        raise FeatpatchError(
            f"the table was measured with {', '.join(missing)}: expected these SAEs too; pass them with saes=, or --sae for "
            "each"
        )
    for name, digest in known.items():
        if given[name] != digest:
            raise FeatpatchError(
                f"{name} differs from that of the table: expected the one that it was measured with; pass the same model, "
                "pairs and SAEs"
            )


def _study(
    effects: Effects, model: Any, pairs: Pairs, saes: Any, nodes: list[Node], metrics: list[str], several: set[str]
) -> Study:
    """Return the experiment that measures some nodes again; `several` names the SAEs that write to several hook points."""
    about = effects.metadata
    options = Options(positions=about["positions"], directions=about["directions"], metric=metrics)
    edges = frozenset(node for node in nodes if isinstance(node, Edge))
    if edges:
        senders, receivers = ({getattr(edge, end): None for edge in edges} for end in ("sender", "receiver"))
        return path_study(model, pairs, saes, [*senders], [*receivers], about["route"], edges, **options)[0]
    if "nodes" in about:
        together = any(node.kind == "set" for node in nodes)
        asked = _alone(effects.whole.nodes) if together else nodes
        combine = about.get("combine") if together or several & {node.sae for node in nodes} else None
        return node_study(model, saes, pairs, asked, together=together, combine=combine, **options)[0]
    if "components" in about:
        layers = sorted({sites.layer_of(node.site) for node in nodes})
        return component_study(model, pairs, about["components"], layers, **options)
    meanings = set(about.get("combine", {}).values())
    combine = meanings.pop() if len(meanings) == 1 else None
    return feature_study(model, saes, pairs, frozenset(nodes), combine=combine, **options)[0]


def _differences(effects: Effects, again: Effects, nodes: list[Node]) -> list[float]:
    """Return the largest difference of each node relative to the metric's size; infinite if one table lacks an entry."""
    tables = []
    for table in (effects, again):
        number = {node: row for row, node in enumerate(table.nodes)}
        entries: dict[int, dict[int, tuple[float, float]]] = {number[node]: {} for node in nodes if node in number}
        for row, pair, denoised, noised in zip(table.row, table.pair, table.denoised, table.noised, strict=True):
            if int(row) in entries:
                entries[int(row)][int(pair)] = (denoised, noised)
        tables.append({node: entries.get(number.get(node, -1), {}) for node in nodes})
    result, scale = [], max(abs(float(effects.scale.mean())), size(effects.clean, effects.corrupted))
    for node in nodes:
        then, now = (table[node] for table in tables)
        if then.keys() != now.keys():
            result.append(float("inf"))
            continue
        change = np.array([now[pair] for pair in then]) - np.array([then[pair] for pair in then])
        result.append(float(np.nanmax(np.abs(change)) / scale))
    return result
