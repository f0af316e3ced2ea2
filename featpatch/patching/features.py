"""Studies of SAE features: single features, all features together, error terms and whole activations.

`DictionaryPart` and `OnlyPart` are for other studies: the base of parts with one dictionary, and some nodes of another part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from typing_extensions import Unpack

from featpatch.engine.patches import Block
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Combine, Kind, Node
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.changes import (
    Change,
    Difference,
    Part,
    Patches,
    as_blocks,
    blocks_of,
    by_output,
    count_nodes,
    count_whole,
    feature_patches,
    joined,
    keep,
    whole_change,
    whole_patches,
    with_directions,
)
from featpatch.patching.runs import PairRuns
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import Dictionary, combined_by, dictionaries, digests
from featpatch.sae.nodes import together


@dataclass(frozen=True, eq=False)
class FeaturePart(Part):
    """Each feature of some dictionaries, all features and the error of each dictionary, and the whole activations.

    Attributes:
        dictionaries: the dictionaries.
        only: the nodes that are patched; None for all.
        combine: what a patch at several hook points means; None for the default of each dictionary.
    """

    dictionaries: Sequence[Dictionary]
    only: frozenset[Node] | None = None
    combine: Combine | None = None

    @property
    def complete(self) -> bool:
        """Whether all nodes of the dictionaries are patched."""
        return self.only is None

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries whose nodes are patched."""
        return self.dictionaries

    @property
    def hooks(self) -> set[str]:
        """The hook points that the dictionaries read and write."""
        return {hook for dictionary in self.dictionaries for hook in dictionary.hooks}

    @property
    def sites(self) -> list[str]:
        """The hook points that are patched."""
        return list(dict.fromkeys(hook for dictionary in self.dictionaries for hook in dictionary.outputs))

    @property
    def patched(self) -> list[tuple[tuple[str, ...], Combine]]:
        """The hook points that are patched together: each alone, and all outputs of a dictionary that writes several."""
        several = [dictionary for dictionary in self.dictionaries if len(dictionary.outputs) > 1]
        return super().patched + [(dictionary.outputs, self._meaning(dictionary)) for dictionary in several]

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair: features by dictionary, then all features, error and activation by hook point."""
        found = {d.name: with_directions([self._differences(run)[d.name] for run in runs]) for d in self.dictionaries}
        each = [self._of_pair(run, {name: of_pairs[n] for name, of_pairs in found.items()}) for n, run in enumerate(runs)]
        return each if self.only is None else [keep(of_pair, self.only) for of_pair in each]

    def count(self, run: PairRuns) -> int:
        """Return the number of patches per direction."""
        if self.only is not None:
            return count_nodes(self.blocks([run])[0])
        total = sum(count_whole(changes, run.wanted) for _, _, changes, _, _ in self._whole(run))
        return total + sum(difference.count(run.wanted) for difference in self._differences(run).values())

    def _of_pair(self, run: PairRuns, found: Mapping[str, Difference]) -> list[Block]:
        several: list[Patches] = []
        for dictionary in self.dictionaries:
            meant = self._meaning(dictionary)
            several += joined(feature_patches(found[dictionary.name], run.wanted, dictionary.node, meant))
        several += joined(whole_patches(run.wanted, *arguments) for arguments in self._whole(run))
        return [block for patches in several for block in as_blocks(run, *patches)]

    def _meaning(self, dictionary: Dictionary) -> Combine:
        """Return what patches of a dictionary mean, which makes a difference only if it writes to several hook points."""
        return (self.combine or dictionary.combine) if len(dictionary.outputs) > 1 else "add"

    def _whole(self, run: PairRuns) -> Iterator[tuple[str, Kind, Mapping[str, Change], str, Combine]]:
        """Yield the arguments of `whole_patches` for all features, the error and the activation, by hook point and together."""
        activations = {site: whole_change(site, run.ways, run.first) for site in self.sites}
        for dictionary in self.dictionaries:
            found, name, combine = self._differences(run)[dictionary.name], dictionary.name, self._meaning(dictionary)
            kinds: dict[Kind, Mapping[str, Change]]
            kinds = {"all_features": by_output(dictionary, found.features), "error": by_output(dictionary, found.error)}
            for kind, changes in kinds.items():
                yield from ((site, kind, {site: change}, name, combine) for site, change in changes.items())
            if len(dictionary.outputs) > 1:
                yield from ((together(dictionary), kind, changes, name, combine) for kind, changes in kinds.items())
                yield together(dictionary), "activation", {site: activations[site] for site in dictionary.outputs}, "", combine
        yield from ((site, "activation", {site: change}, "", "add") for site, change in activations.items())

    def _differences(self, run: PairRuns) -> dict[str, Difference]:
        def find() -> dict[str, Difference]:
            found = {d.name: Difference.of(d, run.ways, run.first) for d in self.dictionaries}
            if self.only is None:
                return found
            return {d.name: found[d.name].keep(self._features(d)) for d in self.dictionaries}

        return run.once(self, find)

    def _features(self, dictionary: Dictionary) -> list[int]:
        """Return the features of a dictionary that are among the nodes of `only`."""
        return [dictionary.number(node) for node in self.only or () if node.sae == dictionary.name and node.index is not None]


def feature_study(
    model: Any,
    saes: Any,
    pairs: Pairs,
    only: frozenset[Node] | None = None,
    *,
    combine: Combine | None = None,
    joint: bool = False,
    **options: Unpack[Options],
) -> tuple[Study, list[Dictionary]]:
    """Return the validated experiment that `rank_features` runs with these arguments, and its dictionaries.

    Args:
        model, saes, pairs, combine, options: as in `rank_features`.
        only: the nodes that are patched; None for all.
        joint: as in `combined_by`.
    """
    check_pairs(pairs, by_label=True, model=model, saes=saes)
    lens = wrap(model)
    found = dictionaries(lens, saes)
    about: dict[str, Any] = {"saes": digests(found)}
    if combined := combined_by(found, combine, joint=joint):
        about["combine"] = combined
    return Study.of(lens, [FeaturePart(found, only, combine)], about, pairs, **options), found


@dataclass(frozen=True, eq=False)
class OnlyPart(Part):
    """Some of the nodes of another part.

    Attributes:
        part: the other part.
        only: the nodes that are patched.
    """

    part: Part
    only: frozenset[Node]

    @property
    def complete(self) -> bool:
        """False, because some nodes of the other part are left out."""
        return False

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries of the other part."""
        return self.part.owners

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations the other part needs."""
        return self.part.hooks

    @property
    def sites(self) -> list[str]:
        """The hook points that the other part patches."""
        return self.part.sites

    @property
    def patched(self) -> list[tuple[tuple[str, ...], Combine]]:
        """The hook points that the other part patches together."""
        return self.part.patched

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair with only these nodes, computed once."""
        return [run.once(self, partial(blocks_of, [self.part], run, self.only)) for run in runs]

    def count(self, run: PairRuns) -> int:
        """Return the number of these nodes that differ between the runs."""
        return count_nodes(self.blocks([run])[0])


@dataclass(frozen=True, eq=False)
class DictionaryPart(Part):
    """A part that patches nodes of one dictionary.

    Attributes:
        dictionary: the dictionary.
    """

    dictionary: Dictionary

    def difference(self, run: PairRuns) -> Difference:
        """Return the difference between the runs of a pair, computed once."""
        return run.once(self, lambda: Difference.of(self.dictionary, run.ways, run.first))

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionary whose nodes are patched."""
        return (self.dictionary,)

    @property
    def hooks(self) -> set[str]:
        """The hook points that the dictionary reads and writes."""
        return set(self.dictionary.hooks)

    @property
    def sites(self) -> list[str]:
        """The hook points that the dictionary writes."""
        return list(self.dictionary.outputs)
