"""Clean and corrupted runs of a few pairs of equal length, split by the dictionaries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.engine import Block, measure
from featpatch.lens import Dictionary, Lens, Split
from featpatch.metrics import Metric
from featpatch.pairs import Pair, Pairs
from featpatch.patch import Direction, Position
from featpatch.patching.swaps import Swaps, feature_swaps, whole_swaps

AT_ONCE = 16
"""Pairs whose activations are held in memory together."""


def chunks(pairs: Pairs) -> Iterator[list[int]]:
    """Indices of pairs that can run together: equally long, and few."""
    for group in pairs.by_length().values():
        for start in range(0, len(group), AT_ONCE):
            yield group[start : start + AT_ONCE]


@dataclass(frozen=True)
class Run:
    """Tokens `[pairs, pos]`, metric `[pairs]`, activations `[pairs, pos, ...]` by hook, splits by dictionary."""

    tokens: torch.Tensor
    metric: torch.Tensor
    activations: dict[str, torch.Tensor]
    splits: dict[str, Split]

    @classmethod
    def of(
        cls, lens: Lens, pairs: Sequence[Pair], prompts: list[tuple[int, ...]], metric: Metric, found: list[Dictionary]
    ) -> "Run":
        """Runs the prompts once and keeps what the swaps need."""
        hooks = {hook for dictionary in found for hook in (dictionary.reads, dictionary.writes)}
        hooks |= {sites.resid_pre(sites.layer_of(dictionary.writes)) for dictionary in found}
        tokens = torch.tensor(prompts)
        logits, activations = lens.run(tokens, read=sorted(hooks))
        values = [measure(logits[slot : slot + 1], pair, metric) for slot, pair in enumerate(pairs)]
        splits = {d.name: d.split(activations[d.reads], activations[d.writes]) for d in found}
        return cls(tokens, torch.cat(values), activations, splits)


@dataclass(frozen=True)
class Runs:
    """Both runs of some pairs."""

    pairs: list[Pair]
    clean: Run
    corrupted: Run

    @classmethod
    def of(cls, lens: Lens, pairs: list[Pair], metric: Metric, found: list[Dictionary]) -> "Runs":
        """Runs the clean and the corrupted prompts."""
        clean = Run.of(lens, pairs, [pair.clean for pair in pairs], metric, found)
        return cls(pairs, clean, Run.of(lens, pairs, [pair.corrupted for pair in pairs], metric, found))

    def swaps(self, slot: int, wanted: dict[Position, list[int]], found: list[Dictionary]) -> list[Swaps]:
        """Every swap of one pair: features, all features and error of each dictionary, then each whole site."""
        swaps: list[Swaps] = []
        for dictionary in found:
            clean, corrupted = (
                Split(run.splits[dictionary.name].features[slot], run.splits[dictionary.name].error[slot])
                for run in (self.clean, self.corrupted)
            )
            swaps += feature_swaps(dictionary, clean, corrupted, wanted)
        for site in dict.fromkeys(dictionary.writes for dictionary in found):
            difference = (self.clean.activations[site][slot] - self.corrupted.activations[site][slot]).flatten(1)
            swaps.append(whole_swaps(site, "activation", difference, wanted))
        return swaps

    def blocks(self, swaps: list[list[Swaps]], direction: Direction) -> list[Block]:
        """The swaps of each pair as work for the engine, in the same order."""
        base = self.corrupted if direction == "denoising" else self.clean
        return [
            Block(
                pair=self.pairs[slot],
                tokens=base.tokens[slot],
                resid=base.activations[sites.resid_pre(sites.layer_of(swap.site))][slot],
                site=swap.site,
                deltas=swap.deltas if direction == "denoising" else -swap.deltas,
            )
            for slot, of_pair in enumerate(swaps)
            for swap in of_pair
        ]
