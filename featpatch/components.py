"""Components of a model as a user names them: heads, entries of attention patterns, and components of some layers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from featpatch.errors import FeatpatchError, check_choices, check_numbers, closest, is_integer
from featpatch.nodes import Node, Position
from featpatch.sites import BRIDGE, COMPONENTS, OUTPUTS, component, is_component

OF_HEADS = ("z", "result", "q", "k", "v", "pattern")
"""The components that are values of single heads."""

ARROW = " <- "
"""What separates the two positions of an entry of an attention pattern."""


def head(layer: int, head: int, site: str = "z", position: Position = "all") -> Node:
    """Make the node of an attention head.

    Args:
        layer, head: the indices of the layer and of the head; of the key or value head for `"k"` and `"v"`, which several query
            heads may share.
        site: `"z"`: the head's output; `"result"`: the same after W_O; `"q"`, `"k"`, `"v"`: its query, key or value;
            `"pattern"`: the attention from a position to all others or, at a position such as `"end <- S2"`, from one to
            another.
        position: as in `fp.Node`.

    Raises:
        FeatpatchError: the component or an index is not valid.

    Examples:
        >>> print(fp.head(1, 3, "v", "S2"))
        blocks.1.attn.hook_v head 3 @ S2
    """
    check_numbers(0, layer=layer, head=head)
    check_choices(OF_HEADS, site=site)
    return Node(component(int(layer), site), "head", head, position)


ENTRY = re.compile(rf"(.+){ARROW}(.+)")
"""The position of an entry of an attention pattern."""


def check_entry(node: Node) -> None:
    """Raise a FeatpatchError unless a node at an entry of an attention pattern is a head there and names two positions."""
    two = str(node.position).count(ARROW) == 1 and ENTRY.fullmatch(str(node.position))
    if node.kind != "head" or not is_component(node.site, "pattern") or not two:
        raise FeatpatchError(
            f"{str(node)!r} is at an entry of an attention pattern: expected a head at hook_pattern and two positions; use "
            "fp.head(layer, head, 'pattern', 'end <- S2'), or another position"
        )


SHORT = {short: name for name, hook in reversed(COMPONENTS.items()) for short in (hook, hook.rpartition(".")[2])} | BRIDGE
"""The components by the names of their hook points in a layer, e.g. `"attn.hook_z"` or `"hook_z"`, also those of a bridge."""


def check_components(names: Any, positions: Any) -> list[str]:
    """Return the names of components as a list, after checking them; those of hook points, such as `"hook_z"`, are replaced.

    Raises:
        FeatpatchError: a name is unknown or appears twice, there are none, or pattern entries are asked for at several
            positions together.
    """
    given = [names] if isinstance(names, str) or not isinstance(names, Sequence) else list(names)
    chosen = [SHORT.get(name, name) if isinstance(name, str) else name for name in given]
    unknown = [name for name in chosen if not isinstance(name, str) or name not in COMPONENTS]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise FeatpatchError(
            f"sites={given}: expected some of {', '.join(COMPONENTS)} (z: by head), each once, or their hook points, such as "
            f"'hook_z' or 'blocks.0.attn.hook_z'{closest(unknown[0], [*COMPONENTS, *SHORT]) if unknown else ''}"
        )
    several = isinstance(positions, Sequence) and not isinstance(positions, str)
    if several and any(isinstance(entry, str) and ARROW in entry for entry in positions):
        raise FeatpatchError(
            f"positions={list(positions)}: expected labels and indices; sites=['pattern_entry'] gives an entry from each of "
            "them to each other, such as 'end <- S2' for ['end', 'S2']; for single entries call "
            "rank_nodes(model, pairs, [fp.head(1, 3, 'pattern', 'end <- S2')])"
        )
    if "pattern_entry" in chosen and (positions == "all" or (several and "all" in positions)):
        raise FeatpatchError(
            "positions='all' with sites=['pattern_entry']: expected positions='each' or a list of labels and indices, "
            "because an entry is the attention of one position to another"
        )
    return chosen


def named_with_layers(names: Any, positions: Any) -> tuple[list[str], list[int]] | None:
    """Return the components and layers that full names of hook points, such as `"blocks.3.attn.hook_z"`, stand for.

    Returns None if no name is a full one.

    Raises:
        FeatpatchError: a component is not valid, or the names do not give the same layers for every component.
    """
    given = [names] if isinstance(names, str) or not isinstance(names, Sequence) else list(names)
    matches = [re.fullmatch(r"blocks\.([0-9]{1,6})\.(.+)", name) if isinstance(name, str) else None for name in given]
    full = [(match.group(2), int(match.group(1))) for match in matches if match]
    if not full:
        return None
    for name, layer in full:
        if name not in (*COMPONENTS, *SHORT):
            near = f"; did you mean {OUTPUTS[name]!r}?" if name in OUTPUTS else closest(name, list(COMPONENTS.values()))
            raise FeatpatchError(
                f"sites={given}: expected hook points of components, blocks.{layer}. and one of "
                f"{', '.join(dict.fromkeys(COMPONENTS.values()))}{near}"
            )
    chosen = check_components(list(dict.fromkeys(name for name, _ in full)), positions)
    found = list(dict.fromkeys(layer for _, layer in full))
    if len(full) < len(given) or len(full) != len(chosen) * len(found) or len(set(full)) < len(full):
        raise FeatpatchError(
            f"sites={given}: expected, with full names of hook points, each component in the same layers and nothing else; "
            "give short names and layers=..., or call this function once per layer"
        )
    return chosen, found


def check_components_and_layers(names: Any, layers: Any, positions: Any, n_layers: int) -> tuple[list[str], list[int]]:
    """Return the names of components and their layers, see `named_with_layers`.

    Raises:
        FeatpatchError: a component or a layer is not valid, or full names give other layers than `layers`.
    """
    named = named_with_layers(names, positions)
    if named is None:
        return check_components(names, positions), check_layers(layers, n_layers)
    chosen, found = named[0], check_layers(named[1], n_layers)
    if layers is not None and sorted(check_layers(layers, n_layers)) != sorted(found):
        given = [names] if isinstance(names, str) else list(names)
        raise FeatpatchError(f"sites={given} with layers={layers}: expected the layers {found} of the names; leave layers out")
    return chosen, found


def check_layers(layers: Any, n_layers: int) -> list[int]:
    """Return layers as a list, after checking that the model has them; None means all.

    Raises:
        FeatpatchError: a layer does not exist or appears twice, or there are none.
    """
    every = list(range(n_layers))
    chosen = every if layers is None else list(layers) if isinstance(layers, Iterable) else [layers]
    if not chosen or not all(is_integer(layer) and layer in every for layer in chosen) or len(set(chosen)) < len(chosen):
        raise FeatpatchError(f"layers={chosen}: expected some of 0 to {n_layers - 1}, each once, or None for all")
    return [int(layer) for layer in chosen]
