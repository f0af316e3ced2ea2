"""Effects along axes: by layer and position, or by layer and head, as tensors and for heat maps.

A node without a row in a finished table is the same in both runs of every pair, so its effect is exactly 0. It is NaN, not 0,
where nothing was measured: at hook points and positions that were not patched, and for features that a screening left out.
"""

from collections.abc import Iterable, Sequence
from itertools import product
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from featpatch.effects.measured import Measured, T
from featpatch.errors import FeatpatchError, check_kinds, is_integer
from featpatch.nodes import RANKED, TOGETHER, Effect, Node, Position
from featpatch.sites import COMPONENTS, layer_of, within

AXES = ("layer", "position", "head")
"""The axes of a grid."""

KINDS = ("activation", "all_features", "error", "head", "feature")
"""The kinds of nodes that fit into a grid, the ones that are preferred first; of features, a cell holds the sum."""


class Grid(NamedTuple):
    """Effects along axes, the result of `Effects.to_tensor`.

    Attributes:
        values: the effects, one dimension per axis; NaN where nothing was measured, and exactly 0 where a node is the same in
            both runs of every pair.
        axes: for each axis, in the order of the dimensions, the layers, positions or heads that its entries stand for.
    """

    values: Float[torch.Tensor, "..."]
    axes: dict[str, list[Any]]


def chosen(effects: T, kind: str | None, site: str | None, position: Position | None) -> T:
    """Return the rows of one kind, at one hook point or the same hook point of each layer, and at one position.

    Rows for all hook points of a dictionary together have no layer and are left out.

    Args:
        effects: the table.
        kind, position: those of the nodes; None for all.
        site: a hook point, its name within a layer, or the name of a component such as `"z"`; None for all.

    Raises:
        FeatpatchError: no row fits, the kind does not fit into a grid, or an argument is of another type.
    """
    check_kinds((str, NoneType), kind=kind, site=site)
    if position is not None and not isinstance(position, str) and not is_integer(position):
        raise FeatpatchError(f"position={position!r}: expected a token index, 'all' or a label")
    if kind is not None and kind not in KINDS and any(node.kind == kind for node in effects.nodes):
        raise FeatpatchError(
            f"kind {kind!r} does not fit into layers, positions and heads: expected one of {', '.join(KINDS)}; look at "
            f"effects.where(kind={kind!r}) as a table"
        )
    names = (site, COMPONENTS.get(site)) if isinstance(site, str) else ()
    rows = np.array([node.kind == "set" or not node.site.endswith(TOGETHER) for node in effects.nodes], dtype=bool)
    for what, given, found in (
        ("kind", kind, [node.kind == kind for node in effects.nodes]),
        ("site", site, [node.site in names or within(node.site) in names for node in effects.nodes]),
        ("position", position, [node.position == position for node in effects.nodes]),
    ):
        left = rows if given is None else rows & np.array(found, dtype=bool)
        if not left.any():
            others = {"kind": lambda n: n.kind, "site": lambda n: within(n.site), "position": lambda n: n.position}[what]
            known = dict.fromkeys(str(others(node)) for node, kept in zip(effects.nodes, rows, strict=True) if kept)
            raise FeatpatchError(
                f"the table has no row of {what} {given!r}: expected one of {', '.join(known) or '(the table has no rows)'}"
            )
        rows = left
    return effects.take(rows)


def kind_of(effects: Measured) -> str:
    """Return the kind of node that a heat map shows by default.

    Raises:
        FeatpatchError: no kind in the table fits into a grid.
    """
    found = {node.kind for node in effects.nodes}
    fitting = [kind for kind in KINDS if kind in found]
    if not fitting:
        raise FeatpatchError(
            f"the table has rows of kind {', '.join(sorted(found)) or '(none)'}: expected {', '.join(KINDS)}, which have a "
            "layer and a position; look at other kinds as a table"
        )
    return fitting[0]


def grid(effects: Measured, axes: Sequence[str], effect: Effect) -> Grid:
    """Return the effects of nodes of one kind, at one hook point of each layer, along axes; see `Effects.to_tensor`.

    Raises:
        FeatpatchError: an axis is unknown, or the nodes also differ in something that is no axis.
    """
    if not axes or not set(axes) <= set(AXES) or len(set(axes)) < len(axes):
        raise FeatpatchError(f"axes {', '.join(map(repr, axes)) or '(none)'}: expected some of {', '.join(AXES)}, each once")
    _check_single(effects, axes)
    nodes = effects.nodes
    own = [node for node in effects.whole.nodes if node.kind == nodes[0].kind and within(node.site) == within(nodes[0].site)]
    along: dict[str, list[Any]] = {
        "layer": _layers(effects, own) if "layer" in axes else [layer_of(nodes[0].site)],
        "position": _positions(effects, own) if "position" in axes else [nodes[0].position],
    }
    if nodes[0].kind == "head":
        along["head"] = list(range(1 + max(node.index or 0 for node in own)))
    known, sums = set(map(_cell, own)), dict.fromkeys(map(_cell, nodes), 0.0)
    for node, value in zip(nodes, effects.pooled(effect), strict=True):
        sums[_cell(node)] += float(value)
    complete = measured(effects, nodes[0])
    values = [
        sums.get(cell, 0.0 if cell not in known and cell[:2] in complete else np.nan) for cell in product(*along.values())
    ]
    array = torch.tensor(values, dtype=torch.float64).reshape([len(entries) for entries in along.values()])
    order = [*axes, *(name for name in along if name not in axes)]
    array = array.permute([list(along).index(name) for name in order]).flatten(len(axes) - 1)
    return Grid(array, {name: along[name] for name in axes})


def _cell(node: Node) -> tuple[Any, ...]:
    """Return the layer and position of a node, and the number of a head."""
    place = layer_of(node.site), node.position
    return (*place, node.index) if node.kind == "head" else place


def _check_single(effects: Measured, axes: Sequence[str]) -> None:
    """Raise a FeatpatchError unless all but the axes is the same for all nodes, and heads are an axis if there are any."""
    fields: dict[str, list[Any]] = {
        "kind": [node.kind for node in effects.nodes],
        "site": [within(node.site) for node in effects.nodes],
        "position": [] if "position" in axes else [node.position for node in effects.nodes],
        "layer": [] if "layer" in axes else [layer_of(node.site) for node in effects.nodes],
    }
    for name, found in fields.items():
        several = dict.fromkeys(map(str, found))
        if len(several) > 1:
            how = f"give {name}=" if name != "layer" else "make layer an axis"
            raise FeatpatchError(
                f"the rows have the {name}s {', '.join(several)}: expected one; {how}, or select rows with where"
            )
    kind = effects.nodes[0].kind
    if (kind == "head") != ("head" in axes):
        raise FeatpatchError(
            f"axes {', '.join(axes)} of rows of kind {kind!r}: expected 'head' among the axes if and only if the rows are heads"
        )
    saes = {(node.site, node.sae) for node in effects.nodes}
    site, _ = max(saes, key=lambda of: sum(other[0] == of[0] for other in saes))
    beside = sorted(sae for other, sae in saes if other == site)
    if len(beside) > 1:
        raise FeatpatchError(f"{site} has the SAEs {', '.join(beside)}: expected one; select it with effects.where(sae=...)")


def measured(effects: Measured, like: Node) -> set[tuple[int, Position]]:
    """Return the layers and positions at which all nodes of the kind were measured, so that one without a row is unchanged."""
    whole = effects.whole
    partly = "screening" in whole.metadata or effects.rows_ranked > whole.ranked.sum()
    if not effects.finished or not effects.of_all or (partly and like.kind in RANKED):
        return set()
    return set(product(_sites(effects, like), _places(effects)))


def _sites(effects: Measured, like: Node) -> list[int]:
    """Return the layers whose hook point of the same name was patched."""
    return [layer_of(site) for site in effects.metadata.get("sites", ()) if within(site) == within(like.site)]


def _layers(effects: Measured, own: Sequence[Node]) -> list[int]:
    """Return the layers of the rows, and those that were patched but have no rows because nothing changes there."""
    known = {layer_of(node.site) for node in own}
    unchanged = [layer for layer in _sites(effects, own[0]) if layer not in known]
    return sorted({*(layer_of(node.site) for node in effects.nodes), *unchanged})


def _positions(effects: Measured, own: Sequence[Node]) -> list[Position]:
    """Return the positions of the rows, and those that were patched but have no rows, in the order of the prompt."""
    known, places = {node.position for node in own}, _places(effects)
    shown = dict.fromkeys(node.position for node in effects.nodes)
    unchanged = [position for position in places if position not in known]
    return in_order(effects, [*shown, *unchanged])


def in_order(effects: Measured, positions: Iterable[Position]) -> list[Position]:
    """Return positions without duplicates in the order of the prompt; labels are ordered by their mean index over pairs."""
    places = _places(effects)
    end = max(places.values(), default=0.0)
    return sorted(dict.fromkeys(positions), key=lambda at: places.get(at, end if isinstance(at, str) else float(at)))


def _places(effects: Measured) -> dict[Position, float]:
    """Return the positions that were patched, with the mean token position over pairs, by which they are ordered."""
    asked, places = effects.metadata.get("positions"), effects.metadata.get("places")
    if asked == "each":
        return {position: float(position) for of_pair in places or () for position in of_pair}
    listed: list[Position] = [asked] if isinstance(asked, str) else list(asked or ())
    at = range(len(listed)) if places is None else np.mean(places, axis=0).tolist()
    return dict(zip(listed, map(float, at), strict=True))
