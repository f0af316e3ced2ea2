"""Names of nodes in pictures, and their order in the model from the embedding up to the logits."""

from featpatch import sites
from featpatch.patch import Node

LOGITS = "logits"
"""The `site` of the output node."""

ORDER = (
    "resid_pre", "q", "k", "v", "pattern", "z", "result", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post",
)  # fmt: skip
"""The components of a layer from bottom to top; other hook points are drawn below the MLP."""

WORDS = {"attn_out": "attention", "mlp_out": "mlp"}
"""The displayed names of components that are not shown under their own."""


def is_end(node: Node) -> bool:
    """Return whether a node is the embedding or the logits, which belong to no layer."""
    return node.site in (sites.EMBEDDING, LOGITS)


def component(node: Node) -> str:
    """Return the component at the hook point of a node, or the end of the hook's name if it is none of `ORDER`."""
    layer = sites.layer_of(node.site)
    return next((name for name in ORDER if sites.component(layer, name) == node.site), node.site.split(".", 2)[-1])


def height(node: Node) -> tuple[float, int, str]:
    """Return a key that sorts nodes from bottom to top and is the same for all nodes of one row.

    Raises:
        FeatpatchError: the hook point belongs to no layer, and is neither the embedding nor the logits.
    """
    if is_end(node):
        return (-1.0 if node.site == sites.EMBEDDING else float("inf")), 0, ""
    name = component(node)
    return float(sites.layer_of(node.site)), ORDER.index(name if name in ORDER else "resid_mid"), name


def row(node: Node) -> str:
    """Return the name of the row of a node, such as `L1 mlp`."""
    if is_end(node):
        return "embed" if node.site == sites.EMBEDDING else LOGITS
    name = component(node)
    return f"L{sites.layer_of(node.site)} {'heads' if name in ('z', 'result') else WORDS.get(name, name)}"


def short(node: Node) -> str:
    """Return the short name of a node within its row, such as `head 5`."""
    if node.kind != "activation":
        return node.kind.replace("_", " ") if node.index is None else f"{node.kind} {node.index}"
    name = row(node)
    return name if is_end(node) else name.split(" ", 1)[1]


def label(node: Node) -> str:
    """Return the full name of a node, such as `L3 head 5 @ end` or `L2 feature 121 of blocks.2.hook_resid_pre @ S2`."""
    where = "" if is_end(node) else f"L{sites.layer_of(node.site)} "
    inside = f"{component(node)} " if node.kind == "head" and row(node).endswith((" q", " k", " v", " pattern")) else ""
    of = f" of {node.sae or node.site}" if node.kind not in ("activation", "head", "neuron") else ""
    at = "" if is_end(node) and node.position == "all" else f" @ {node.position}"
    return f"{where}{inside}{short(node)}{of}{at}"
