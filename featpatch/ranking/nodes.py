"""Measure named nodes exactly, each alone and all together."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from featpatch.effects.table import Effects
from featpatch.engine.journal import to_resume
from featpatch.errors import FeatpatchError
from featpatch.metrics import Metrics
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import DIRECTIONS, Combine, Direction, Node, check_directions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.ablation import To, ablation
from featpatch.patching.changes import Part
from featpatch.patching.joint import node_study
from featpatch.patching.noise import Noise
from featpatch.patching.runs import Contrast


def rank_nodes(
    model: Any,
    pairs: Pairs,
    nodes: Any,
    *,
    saes: Any = None,
    to: To | None = None,
    reference: Pairs | None = None,
    seed: int | None = None,
    together: bool | None = None,
    combine: Combine | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Measure the exact causal effect of named nodes, each alone and all together, or of any list of joint patches.

    The nodes can be features, error terms, heads, whole activations, neurons and directions, mixed, in any layers and at any
    positions. In a joint patch every value is set to its value in the source run at its place, whatever patches at earlier
    hook points have done to it, as in `fp.do(how="set")` and in circuits. For nodes at a single hook point this is the same as
    adding up their changes. What the joint patch does beyond the sum of the nodes alone is their interaction.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: clean and corrupted prompts with their answers.
        nodes: the nodes, made for example with `fp.head`, `fp.feature` and `fp.Node`, and joint patches, made with `fp.Patch`;
            or a table of effects whose rows are the nodes.
        saes: the SAEs and directions that the nodes name, if any.
        to: by default, nodes take their values from the other run of a pair. Otherwise they are ablated in the clean run to
            `"zero"`, `"mean"`, `"mean_by_position"`, `"resample"` or a number, as in `fp.ablate`, and only degradation is
            measured.
        reference, seed: as in `fp.ablate`; only with `to`.
        together: whether to measure the joint patch of all nodes too; by default if there is no `fp.Patch` among them. It is
            refused for a whole activation together with parts of it, and for attention patterns. A value that two nodes name,
            such as a head at two labels of the same token, is set once.
        combine: another meaning of joint patches, which is faster if there are many, because the change of each node is
            computed once, from the unpatched runs. `"add"`: the changes are added to what arrives. `"set"`: where a patch
            changes an activation, it is set to its value in the base run plus the changes. By default only for features that
            write to several hook points, with the meaning that they have in `rank_features`.
        directions, metric, batch_rows, noise, journal, executor, progress: as in `rank_features`.

    Returns:
        One row per node or patch, in the order given, also for one that is the same in both runs of every pair and has no
        effect; then, with `together`, a row for the joint patch. Rows of joint patches are of kind `set`, and their index is
        the number of the patch in the list.

    Raises:
        FeatpatchError: the input is unusable, a node can't be patched, or the nodes can't be patched together.

    Examples:
        >>> nodes = [fp.head(1, 3, "v", "S2"), fp.feature(saes[0], 433, "S2"), fp.Node("blocks.0.hook_mlp_out", "activation")]
        >>> effects = fp.rank_nodes(model, pairs, nodes, saes=saes, progress=False)
        >>> print(effects.nodes[-1])
        3 nodes together @ (several)
        >>> effects.pooled("recovery").shape
        (4,)
        >>> two = [fp.Patch(nodes[:2], name="head and feature"), fp.Patch(nodes[1:])]
        >>> [str(node) for node in fp.rank_nodes(model, pairs, two, saes=saes, progress=False).nodes]
        ['head and feature together @ S2', '2 nodes together @ (several)']
    """
    lens, ways = wrap(model), check_directions(directions)

    def contrast(parts: Sequence[Part]) -> Contrast | None:
        return None if to is None else ablation(lens, parts, check_pairs(pairs), reference, to, seed)

    if to is not None:
        ways = ("noising",) if directions is DIRECTIONS else ways
        if ways != ("noising",) or noise is not None:
            raise FeatpatchError(
                f"to={to!r} with directions={directions!r} and noise={noise!r}: expected no directions and no noise, because "
                "ablation acts on the clean run alone; leave them out"
            )
    elif reference is not None or seed is not None:
        raise FeatpatchError(
            "reference or seed without to: expected them only with ablation values, such as to='mean'; pass to, or leave them "
            "out"
        )
    if not isinstance(together, bool | None):
        raise FeatpatchError(f"together={together!r}: expected True, False or None")
    study, rows = node_study(
        model, saes, pairs, nodes, contrast, together=together, combine=combine,
        directions=ways, metric=metric, batch_rows=batch_rows, noise=noise,
    )  # fmt: skip
    effects = study.run(journal, progress=progress, executor=executor)
    return _with_rows(effects, rows) if effects.finished else effects


def complete(effects: Effects, journal: str | Path | None) -> Effects:
    """Return a table that is finished.

    Raises:
        KeyboardInterrupt: it is not, after Ctrl-C.
    """
    if not effects.finished:
        raise KeyboardInterrupt(f"the effects are not complete; {to_resume(journal)}")
    return effects


def _with_rows(effects: Effects, nodes: tuple[Node, ...]) -> Effects:
    """Return the table with one row for each of the nodes, in this order; a row that it lacks has no entries."""
    number = {node: row for row, node in enumerate(nodes)}
    row = np.array([number[node] for node in effects.nodes], dtype=np.int64)[effects.row]
    return replace(
        effects, nodes=nodes, row=row, others={name: _with_rows(effects.for_metric(name), nodes) for name in effects.others}
    )
