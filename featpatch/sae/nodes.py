"""Nodes of dictionaries: features, errors and all features, and the dictionaries to which they belong."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from featpatch import sites
from featpatch.components import ARROW, OF_HEADS, check_entry
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.nodes import COMPONENT_KINDS, LOGITS, TOGETHER, Node, Position
from featpatch.sae.dictionary import Dictionary, kind_of, name_of

CODED = ("feature", "error", "all_features")
"""The kinds of nodes that a dictionary splits an activation into."""


def feature(sae: Any, index: int, position: Position = "all", *, layer: int | None = None) -> Node:
    """Make the node of a feature.

    Args:
        sae: an object that can be passed as `saes=`, or the name of a dictionary as in `fp.Node.sae`: its hook point, or both
            hook points of a transcoder with an arrow.
        index: the index of the feature.
        position: as in `fp.Node`.
        layer: for a cross-layer transcoder, the layer whose feature it is; otherwise None.

    Raises:
        FeatpatchError: the object is no SAE, the name is not made of hook points, or the index or layer is not valid.

    Examples:
        >>> node = fp.feature(saes[0], 433, "S2")
        >>> node in effects.nodes, node == fp.feature("blocks.1.hook_resid_pre", 433, "S2")
        (True, True)
    """
    if isinstance(sae, str):
        name, outputs, groups = sae, [re.sub(r"#\d+$", "", sae.rpartition(" -> ")[2])], 1
        if " " in outputs[0]:
            raise FeatpatchError(
                f"sae={sae!r}: expected an SAE, or the name of a hook point such as {sites.resid_pre(0)!r}; for a dictionary "
                "with a name of its own, pass the object"
            )
        sites.layer_of(outputs[0])
    elif isinstance(sae, Dictionary):
        name, outputs, groups = sae.name, list(sae.outputs), sae.codec.groups
    else:
        _, reads, writes = kind_of(sae)
        name, outputs, groups = name_of(sae, reads, writes), list(writes), getattr(sae, "groups", 1)
    by_layer: dict[int | None, str] = {None: outputs[0]}
    if groups > 1:
        by_layer = {sites.layer_of(hook): hook for hook in outputs}
    if layer not in by_layer:
        raise FeatpatchError(f"layer={layer!r} of a feature of {name!r}: expected {' or '.join(map(str, by_layer))}")
    return Node(by_layer[layer], "feature", index, position, name)


def with_owner(lens: Lens, node: Node, found: Sequence[Dictionary]) -> tuple[Node, Dictionary | None]:
    """Return a node with the model's name of its hook point and the name of its dictionary, and the dictionary, if any.

    A node without a name belongs to the only dictionary that writes to its hook point. A node may also have the name that the
    object of a dictionary gives itself, as in `feature`, which can differ from the hook points of the model.

    Raises:
        FeatpatchError: the node needs a dictionary, and does not belong to exactly one.
    """
    if node.kind in COMPONENT_KINDS:
        return replace(node, site=lens.site(node.site)), None
    fitting = _owners(lens, node, found)
    if not found:
        raise FeatpatchError(
            f"node {str(node)!r} is of the SAE {node.sae or node.site!r}, and no SAEs were passed: expected this SAE; pass "
            "saes=[...]"
        )
    if len(fitting) != 1:
        raise FeatpatchError(
            f"node {str(node)!r} (sae={node.sae!r}) belongs to {len(fitting)} of the SAEs passed "
            f"({', '.join(d.name for d in found) or 'none'}): expected exactly one; pass saes=..., and name the SAE if a hook "
            "point has several"
        )
    return _belonging(lens, node, fitting[0]), fitting[0]


def _owners(lens: Lens, node: Node, found: Sequence[Dictionary]) -> list[Dictionary]:
    """Return the dictionaries that a node can belong to, see `with_owner`."""
    named = [d for d in found if node.sae in ("", d.name)]
    named = named or [d for d in found if node.sae == name_of(d.source, *kind_of(d.source)[1:])]
    return [d for d in named if _belonging(lens, node, d).site in (*d.outputs, together(d))]


def _belonging(lens: Lens, node: Node, dictionary: Dictionary) -> Node:
    """Return a node with the name of a dictionary, and with the model's name of its hook point."""
    own = kind_of(dictionary.source)[2]
    site = dictionary.outputs[own.index(node.site)] if node.site in own else node.site
    known = site in dictionary.outputs or site.endswith(TOGETHER)
    return replace(node, site=site if known else lens.site(site), sae=dictionary.name)


def owner_of(node: Node, found: Iterable[Dictionary]) -> Dictionary | None:
    """Return the dictionary that a node of the only hook point that it writes belongs to, or None.

    Raises:
        FeatpatchError: the dictionary reads or writes several hook points.
    """
    return next((dictionary for dictionary in found if dictionary.name == node.sae and dictionary.writes == node.site), None)


def names_of(found: Iterable[Dictionary]) -> str:
    """Return the names of dictionaries for an error that expects a node of one of them, or what to pass if there are none."""
    return ", ".join(sorted(dictionary.name for dictionary in found)) or "an SAE (pass saes=...)"


def together(dictionary: Dictionary) -> str:
    """Return what stands for the hook points of a dictionary that writes several, in the nodes of patches at all of them."""
    return f"{dictionary.name}{TOGETHER}"


def check_nodes(lens: Lens, nodes: Any, owners: Sequence[Dictionary], name: str) -> list[Node]:
    """Return nodes as a list, after checking that the model and the dictionaries have them.

    Args:
        nodes: a list of nodes, in which `"logits"` stands for `LOGITS`, or a table of effects whose rows are the nodes.
        owners: the dictionaries.
        name: the name of the argument, for errors.

    Raises:
        FeatpatchError: there are no nodes, one appears twice, or the model and the dictionaries lack one.
    """
    given = getattr(nodes, "nodes", nodes)
    chosen = [LOGITS if node == "logits" else node for node in given] if isinstance(given, (list, tuple)) else []
    if not chosen or not all(isinstance(node, Node) for node in chosen) or len(set(chosen)) < len(chosen):
        single = f"; write {name}=[...]" if isinstance(nodes, Node) else ""
        logit = "; write 'logits' for the output" if "logit" in chosen else ""
        if strange := [node for node in chosen if not isinstance(node, Node)]:
            single = f"; {strange[0]!r:.60} is none, write fp.feature(sae, 121) or fp.head(1, 3)"
        raise FeatpatchError(
            f"{name}={nodes!r}: expected a list of nodes, each once, or a table of effects, whose rows are then the nodes"
            f"{single}{logit}"
        )
    for number, node in enumerate(chosen):
        if node == LOGITS:
            continue
        if node.kind in CODED:
            chosen[number] = node = with_owner(lens, node, owners)[0]
        owner = next((dictionary for dictionary in owners if dictionary.name == node.sae), None)
        if node.kind in COMPONENT_KINDS and node.sae:
            raise FeatpatchError(
                f"{name}: {str(node)!r} names the SAE {node.sae!r}: expected sae='' for a node of kind {node.kind!r}"
            )
        if node.kind == "edge" or node.site.endswith(TOGETHER):
            raise FeatpatchError(
                f"{name}: {str(node)!r} does not say which values to patch: expected nodes such as features and heads; leave "
                "it out, as effects.where(kind=...) does"
            )
        site = lens.site(node.site) if owner is None else node.site
        if isinstance(node.position, str) and ARROW in node.position:
            check_entry(node)
        count = owner.per_group if owner is not None else _count(lens, node, site)
        if node.index is not None and count is not None and node.index >= count:
            raise FeatpatchError(f"{name}: {str(node)!r}: expected a {node.kind} of 0 to {count - 1}")
    if len(set(chosen)) < len(chosen):
        raise FeatpatchError(f"{name} names a node twice, with and without the name of its SAE: expected each node once")
    return chosen


def _count(lens: Lens, node: Node, site: str) -> int | None:
    """Return how many heads or neurons a hook point has, or None for other kinds of nodes and where there are no heads."""
    if node.kind == "neuron":
        return prod(lens.shape(site)) if sites.by_position(site) else None
    if node.kind != "head" or not sites.is_component(site, *OF_HEADS):
        return None
    return lens.heads(site if sites.is_component(site, "q", "k", "v") else sites.component(sites.layer_of(site), "z"))
