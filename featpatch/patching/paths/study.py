"""Set up studies of paths from senders to receivers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from featpatch import sites
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.lens import check_nodes, dictionaries_if_any, wrap
from featpatch.metrics import SEQUENCES
from featpatch.pairs import Pairs, check_pairs
from featpatch.patch import Edge, Node
from featpatch.patching.paths.part import EdgePart
from featpatch.patching.paths.receivers import receiver
from featpatch.patching.paths.route import Route
from featpatch.patching.paths.senders import Senders
from featpatch.patching.study import Asked, Study
from featpatch.patching.study.readings import readout

Nodes = Effects | Sequence[Node | str]
"""Nodes, or a table of effects whose rows are the nodes; receivers may include `"logits"`."""


def path_study(
    model: Any,
    pairs: Pairs,
    saes: Any,
    senders: Nodes,
    receivers: Nodes,
    route: Route,
    asked: Asked,
    only: frozenset[Edge] | None = None,
) -> tuple[Study, EdgePart]:
    """Return the validated experiment of `rank_paths` and the part with its edges; positions are those of the senders.

    Args:
        only: the edges that are patched; None for all.
    """
    check_pairs(pairs)
    sites.check_route(route)
    readout(asked.metric, SEQUENCES, "for paths, which freeze mediators in the prompt, but not in an answer that follows it")
    lens = wrap(model)
    lens.check_unhooked()
    found = dictionaries_if_any(lens, saes)
    sending, receiving = (check_nodes(lens, n, found, name) for n, name in ((senders, "senders"), (receivers, "receivers")))
    part = EdgePart(lens, Senders.of(lens, sending, found), [receiver(lens, node, found) for node in receiving], route, only)
    if not any(part.edges.values()):
        raise FeatpatchError("no receiver lies above a sender: expected at least one path; senders write before receivers read")
    about = {
        "saes": {dictionary.name: dictionary.digest() for dictionary in found},
        "route": route,
        "senders": list(map(str, sending)),
        "receivers": list(map(str, receiving)),
    }
    positions = list(dict.fromkeys(node.position for node in sending))
    return Study.of(lens, [part], about, pairs, replace(asked, positions=positions)), part
