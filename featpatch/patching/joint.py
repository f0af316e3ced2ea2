"""Studies of named nodes: each alone, in the fast sweep, and all together in one joint patch.

In the joint patch every value is set to its value in the source run, whatever patches at earlier hook points have done to it.
The layers from the first hook point to the last are run with the values set. The change of the residual stream that leaves the
last of these layers is then patched there: the effect is the same, and the rest of the model is resumed as in any other sweep.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float
from typing_extensions import Unpack

from featpatch import sites
from featpatch.components import ARROW, OF_HEADS
from featpatch.engine.patches import Block, Deltas
from featpatch.errors import FeatpatchError, check_choices, each
from featpatch.model.lens import Edit, Lens, added, keeping
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import LOGITS, Combine, Direction, Node, Patch, Position, joint
from featpatch.pairs.pair import Pair, spans_of
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.changes import Part, as_blocks
from featpatch.patching.chosen import Chosen, check_settable, choose
from featpatch.patching.components import HeadPart, WholePart, neuron_part
from featpatch.patching.features import FeaturePart, OnlyPart
from featpatch.patching.runs import Contrast, PairRuns, Run
from featpatch.patching.study import Options, Study
from featpatch.patching.summed import SummedPart, check_apart
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any, digests
from featpatch.sae.nodes import CODED, check_nodes

Place = tuple[PairRuns, Direction, int]
"""A base run: its pair, its direction, and the number of its reading."""


@dataclass(frozen=True, eq=False)
class JointPart(Part):
    """Nodes at any hook points that are patched together.

    Attributes:
        lens: the model.
        nodes: the nodes that are set.
        dictionaries: the dictionaries to which the nodes may belong.
        node: the node that names the patch.
    """

    lens: Lens
    nodes: tuple[Node, ...]
    dictionaries: Sequence[Dictionary]
    node: Node

    def check(self, pairs: Pairs) -> None:
        """Raise a FeatpatchError if nodes overlap in a pair, or a value can't be set at its hook point."""
        for group in each(self._groups, list(pairs))[0]:
            check_settable(self.lens, group)

    @property
    def complete(self) -> bool:
        """False, because the nodes are those that were named."""
        return False

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries to which the nodes may belong."""
        return self.dictionaries

    @cached_property
    def hooks(self) -> set[str]:
        """The hook points whose activations the patch needs, found once, which takes long for thousands of nodes."""
        return {hook for group in self._groups() for hook in group.hooks}

    @property
    def sites(self) -> list[str]:
        """The residual stream that leaves the last layer with a node."""
        return [sites.resid_post(self._span[-1])]

    @property
    def layers(self) -> set[int]:
        """The first and the last of the layers that are run with values set."""
        return {self._span[0], self._span[-1]}

    @property
    def _span(self) -> range:
        layers = [sites.layer_of(hook) for hook in self.hooks]
        return range(min(layers), max(layers) + 1)

    def count(self, run: PairRuns) -> int:
        """Return 1 if any of the values differs between the runs of a pair, otherwise 0."""
        return int(self._differs(run))

    @torch.no_grad()
    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patch of each pair in which any of the values differs."""
        together: dict[tuple[int, int], list[Place]] = defaultdict(list)
        for run in filter(self._differs, runs):
            for way in run.ways:
                for reading, base in enumerate(run.bases[way]):
                    together[len(run.pair), len(base.tokens)].append((run, way, reading))
        found: dict[tuple[int, Direction, int], Deltas] = {}
        for places in together.values():
            for (run, way, reading), change in zip(places, self._changes(places), strict=True):
                found[id(run), way, reading] = Deltas.nonzero(change[None])

        def of_pair(run: PairRuns) -> list[Block]:
            every = {way: [found[id(run), way, reading] for reading in range(len(run.bases[way]))] for way in run.ways}
            return as_blocks(run, (self.node,), {self.sites[0]: every})

        return [of_pair(run) if self._differs(run) else [] for run in runs]

    def _groups(self, pair: Pair | None = None, first: int = 0) -> list[Chosen]:
        """Return the values that are set in a pair from position `first` on; without a pair, those of no position."""

        def places(node: Node) -> list[int]:
            return [] if pair is None else [position for position in pair.positions(node.position) if position >= first]

        return choose(self.lens, Patch(self.nodes), self.dictionaries, 1 if pair is None else len(pair), places)

    def _of(self, run: PairRuns) -> list[Chosen]:
        return run.once((self, "groups"), lambda: self._groups(run.pair, run.first))

    def _differs(self, run: PairRuns) -> bool:
        """Return whether any of the values differs between base and source in any direction."""

        def find() -> bool:
            changes = (
                g.change(_values(g, base), _values(g, source)) for g in self._of(run) for base, source in run.ways.values()
            )
            return any(bool((change != 0).any()) for change in changes)

        return run.once((self, "differs"), find)

    def _changes(self, places: Sequence[Place]) -> Float[torch.Tensor, "places pos d_model"]:
        """Return how setting the values changes the residual stream that leaves the last layer."""
        groups = [
            replace(of_site[0], columns=torch.stack([g.columns for g in of_site]), rest=torch.stack([g.rest for g in of_site]))
            for of_site in zip(*(self._of(run) for run, _, _ in places), strict=True)
        ]
        return self._leaving(places, groups) - self._leaving(places, [])

    def _leaving(self, places: Sequence[Place], groups: Sequence[Chosen]) -> Float[torch.Tensor, "places pos d_model"]:
        """Return the residual stream that leaves the last layer of base runs in which the values of some groups are set."""
        bases = [run.bases[way][reading] for run, way, reading in places]
        tokens = torch.stack([base.tokens for base in bases])
        resid = torch.stack([base.resid[self._span[0]] for base in bases])
        live: dict[str, torch.Tensor] = {}
        edits: list[tuple[str, Edit]] = [
            (hook, keeping(hook, live)) for hook in {hook for group in groups for hook in group.hooks - {group.site}}
        ]
        edits += [(group.site, _setting(group, places, live)) for group in groups]
        for layer in self._span:
            with ExitStack() as stack:
                for hook, edit in edits:
                    if sites.layer_of(hook) == layer:
                        stack.enter_context(self.lens.edit(hook, edit))
                resid = self.lens.differentiable_through(layer, resid.clone(), tokens, sites.resid_post(layer))
        return resid


def _setting(group: Chosen, places: Sequence[Place], live: Mapping[str, torch.Tensor]) -> Edit:
    """Return a function that sets the values of a group to those of the source runs."""
    parts = [_values(group, run.ways[way][1]) for run, way, _ in places]
    length = len(places[0][0].pair)
    source = torch.cat(parts) if group.dictionary is None else Split.cat(parts)

    def change(activation: torch.Tensor) -> torch.Tensor:
        now: Any = activation[:, :length]
        base = now
        if group.dictionary is not None:
            read = live.get(group.dictionary.reads, activation)[:, :length]
            base = group.dictionary.split({group.dictionary.reads: read, group.site: now})
        changed = activation.clone()
        changed[:, :length] = added(now, group.change(base, source).reshape(now.shape))
        return changed

    return change


def _values(group: Chosen, run: Run) -> Any:
    """Return what a group reads of a run: the activation `[1, pos, ...]` or, with a dictionary, its split."""
    return run.at(group.site)[None] if group.dictionary is None else run.split(group.dictionary, 0)


def node_study(
    model: Any,
    saes: Any,
    pairs: Pairs,
    nodes: Any,
    contrast: Callable[[Sequence[Part]], Contrast | None] = lambda parts: None,
    *,
    together: bool | None = None,
    combine: Combine | None = None,
    **options: Unpack[Options],
) -> tuple[Study, tuple[Node, ...]]:
    """Return the validated experiment that `rank_nodes` runs, and the nodes of the rows of its table.

    Args:
        nodes, together, combine: as in `rank_nodes`.
        contrast: a function that chooses base and source runs for the parts that are patched.
        model, saes, pairs, options: as in `feature_study` and `Study.of`; the positions are those of the nodes.

    Raises:
        FeatpatchError: a node can't be patched, or not with the others.
    """
    check_pairs(pairs, model=model, saes=saes, nodes=nodes)
    lens = wrap(model)
    found = dictionaries_if_any(lens, saes)
    rows, patches = _asked(lens, nodes, found, together)
    single = tuple(row for row in rows if row not in patches)
    every = tuple(dict.fromkeys([*single, *(node for some in patches.values() for node in some)]))
    positions = list(dict.fromkeys(end for node in every for end in _ends(node.position)))
    spans_of(pairs, positions)  # raises errors of positions, which together=False does not mend
    parts = _parts(lens, single, found, combine)
    _check_parts(parts, pairs)
    meaning = _combine(every if patches else (), found, combine)
    if combine is not None and not patches and not any(len(d.outputs) > 1 for part in parts for d in part.owners):
        raise FeatpatchError(
            f"combine={combine!r} with nodes that are patched alone, each at one hook point: expected joint patches "
            "or features that write to several hook points; leave combine out, or pass together=True"
        )
    about: dict[str, Any] = {"saes": digests(found), "nodes": list(map(str, rows))}
    if meaning is not None:
        about["combine"] = meaning
    if patches:
        if meaning is None:
            at_once = {name: some for name, some in patches.items() if _adds_up(some, found)}
            joints: list[Part] = [JointPart(lens, some, found, name) for name, some in patches.items() if name not in at_once]
            if at_once:
                members = _parts(lens, tuple(dict.fromkeys(node for some in at_once.values() for node in some)), found, "add")
                joints.append(SummedPart(members, at_once, "add"))
        else:
            members = _parts(lens, every, found, meaning)
            check_apart(patches, found, pairs)
            if meaning == "set" and any(isinstance(part, JointPart) for part in members):
                inside = next(part.nodes[0] for part in members if isinstance(part, JointPart))
                raise FeatpatchError(
                    f"combine='set' with {str(inside)!r}: expected hook points of the residual stream and of what is added to "
                    "it; use combine='add', or leave combine out"
                )
            joints = [SummedPart(members, patches, meaning)]
        try:
            _check_parts(joints, pairs)
        except FeatpatchError as error:
            if len(patches) > 1 or not single:
                raise
            raise FeatpatchError(f"{error}; or pass together=False, which measures each node alone") from error
        parts += joints
        about["patches"] = {str(name.index): list(map(str, some)) for name, some in patches.items()}
    asked: Options = {**options, "positions": positions}
    return Study.of(lens, parts, about, pairs, contrast(parts), **asked), rows


def _asked(
    lens: Lens, nodes: Any, found: Sequence[Dictionary], together: bool | None
) -> tuple[tuple[Node, ...], dict[Node, tuple[Node, ...]]]:
    """Return the nodes of the rows of the table, and the nodes of each joint patch by the node of its row.

    Raises:
        FeatpatchError: a node is unknown, or `together` is asked for beside patches.
    """
    given = list(nodes) if isinstance(nodes, (list, tuple)) else nodes
    if not isinstance(given, list) or not any(isinstance(each, Patch) for each in given):
        chosen = tuple(_named(lens, node) for node in check_nodes(lens, given, found, "nodes"))
        if together is False:
            return chosen, {}
        whole = joint(chosen)
        return (*chosen, whole), {whole: set_once(chosen)}
    if together:
        raise FeatpatchError("together=True with patches: expected False, or nodes alone; put the nodes into one more Patch")
    rows: list[Node] = []
    patches: dict[Node, tuple[Node, ...]] = {}
    for number, entry in enumerate(given):
        some = list(entry.nodes) if isinstance(entry, Patch) else [entry]
        known = tuple(_named(lens, node) for node in check_nodes(lens, some, found, f"nodes[{number}]"))
        rows.append(joint(known, number, entry.name) if isinstance(entry, Patch) else known[0])
        if isinstance(entry, Patch):
            patches[rows[-1]] = set_once(known)
    if len(set(rows)) < len(rows):
        repeated = next(row for row in rows if rows.count(row) > 1)
        raise FeatpatchError(f"nodes names {str(repeated)!r} twice: expected each node once; remove the duplicate")
    return tuple(rows), patches


def _adds_up(nodes: Sequence[Node], found: Sequence[Dictionary]) -> bool:
    """Return whether setting nodes is the same as adding up their changes: features of one linear dictionary at one hook."""
    names, features = {node.sae for node in nodes}, {node.index for node in nodes}
    owner = next((dictionary for dictionary in found if names == {dictionary.name}), None)
    return (
        owner is not None
        and all(node.kind == "feature" for node in nodes)
        and len(features) == len(nodes)  # a feature at two labels, which can be the same token, is set once
        and len(owner.outputs) == 1
        and owner.behaviour.linear
        and sites.entry(owner.writes) is not None
    )


def set_once(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return the values that nodes stand for, each once: `hook_result` is z times W_O."""
    return tuple(dict.fromkeys(replace(node, site=_read(node.site)) for node in nodes))


def _check_parts(parts: Sequence[Part], pairs: Pairs) -> None:
    for part in parts:
        if isinstance(part, JointPart):
            part.check(pairs)


def _combine(nodes: Sequence[Node], found: Sequence[Dictionary], combine: Any) -> Combine | None:
    """Return what joint patches mean: by default None, but the meaning of the dictionary if one of them writes several hooks.

    Raises:
        FeatpatchError: the meaning is unknown, or two dictionaries have different ones.
    """
    if combine is not None:
        check_choices(get_args(Combine), combine=combine)
        return combine
    several = {d.name: d.combine for d in found if len(d.outputs) > 1 and any(node.sae == d.name for node in nodes)}
    if len(set(several.values())) > 1:
        raise FeatpatchError(
            f"the nodes belong to dictionaries whose patches mean different things ({several}): expected one meaning; pass "
            "combine='add' or combine='set'"
        )
    return next(iter(several.values()), None)


def _named(lens: Lens, node: Node) -> Node:
    """Return a node with the model's name of its hook point; raise a FeatpatchError if it is that of the logits."""
    if node == LOGITS:
        raise FeatpatchError("'logits' is among the nodes: expected nodes inside the model; leave it out")
    return replace(node, site=lens.site(node.site))


def _read(site: str) -> str:
    """Return `hook_z` for `hook_result`, which is z times W_O, and any other hook point unchanged."""
    return sites.component(sites.layer_of(site), "z") if sites.is_component(site, "result") else site


def _ends(position: Position) -> list[Position]:
    """Return a position or, for an entry of an attention pattern, its two positions."""
    if not isinstance(position, str) or ARROW not in position:
        return [position]
    return [int(end) if re.fullmatch("-?[0-9]{1,9}", end) else end for end in position.split(ARROW)]


def _parts(lens: Lens, nodes: Sequence[Node], found: Sequence[Dictionary], combine: Combine | None) -> list[Part]:
    """Return the parts that patch each node alone; where the fast sweep has none, joint patches of a single node."""
    by_name = {dictionary.name: dictionary for dictionary in found}
    alike: dict[tuple[str, str, str], list[Node]] = defaultdict(list)
    for node in nodes:
        alike[node.kind, node.site, node.sae if node.kind in CODED else _component(node)].append(node)
    features: dict[str, list[Node]] = defaultdict(list)
    parts: list[Part] = []
    for (kind, site, name), some in alike.items():
        fast = sites.entry(site) is not None
        part: Part | None = None
        if kind in CODED and name in by_name and fast:
            features[name] += some
            continue
        if kind == "activation" and fast:
            part = WholePart([site])
        elif kind == "head" and name:
            part = HeadPart(lens, sites.layer_of(site), name)
        elif kind == "neuron" and name:
            part = neuron_part(lens, sites.layer_of(site))
        if part is not None and all(sites.entry(changed) for changed in part.sites):
            parts.append(OnlyPart(part, frozenset(some)))
        else:
            parts += [JointPart(lens, (node,), found, node) for node in some]
    return [FeaturePart([by_name[name]], frozenset(some), combine) for name, some in features.items()] + parts


def _component(node: Node) -> str:
    """Return the name of the component of heads or neurons that a node belongs to; empty if it belongs to none."""
    if node.kind == "head" and isinstance(node.position, str) and ARROW in node.position:
        return "pattern_entry"
    names = {"head": OF_HEADS, "neuron": ("neurons",)}.get(node.kind, ())
    return next((name for name in names if sites.is_component(node.site, name)), "")
