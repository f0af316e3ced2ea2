"""Check the nodes that the user passes against the model and its dictionaries."""

from collections.abc import Sequence
from typing import Any

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens.dictionary import Dictionary
from featpatch.lens.lens import Lens
from featpatch.patch import COMPONENTS, LOGITS, Node


def check_nodes(lens: Lens, nodes: Any, found: Sequence[Dictionary], name: str) -> list[Node]:
    """Return nodes as a list, after checking that the model and the dictionaries have them.

    Args:
        nodes: a list of nodes, in which `"logits"` stands for `LOGITS`, or a table of effects whose rows are the nodes.
        found: the dictionaries.
        name: the name of the argument, for errors.

    Raises:
        FeatpatchError: there are no nodes, one appears twice, or the model and the dictionaries lack one.
    """
    given = getattr(nodes, "nodes", nodes)
    chosen = [LOGITS if node == "logits" else node for node in given] if isinstance(given, (list, tuple)) else []
    if not chosen or not all(isinstance(node, Node) for node in chosen) or len(set(chosen)) < len(chosen):
        raise FeatpatchError(
            f"{name}={nodes!r}: expected nodes in a list, each once, or a table of effects whose rows they are"
        )
    for node in chosen:
        if node == LOGITS:
            continue
        owner = next((dictionary for dictionary in found if dictionary.name == node.sae), None)
        if node.kind in COMPONENTS and node.sae:
            raise FeatpatchError(f"{name}: {str(node)!r} names the SAE {node.sae!r}: expected sae='' for an {node.kind}")
        site = lens.site(node.site) if owner is None else owner.writes
        in_heads = node.kind == "head" and sites.is_component(site, "q", "k", "v", "z")
        count = owner.d_sae if owner is not None else lens.heads(site) if in_heads else None
        if node.index is not None and count is not None and node.index >= count:
            raise FeatpatchError(f"{name}: {str(node)!r}: expected a {node.kind} of 0 to {count - 1}")
    return chosen
