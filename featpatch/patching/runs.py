"""Clean and corrupted runs of a few pairs of equal length, and what differs between them at each dictionary."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.engine import BaseRun, Block
from featpatch.lens import Dictionary, Lens
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction
from featpatch.patching.readings import Reading
from featpatch.patching.swaps import Change, Difference, Directions, Swaps, Wanted, feature_swaps, whole_swaps

TOKENS_AT_ONCE = 512
"""Tokens whose activations are held in memory together."""


def chunks(pairs: Pairs) -> Iterator[list[int]]:
    """Indices of pairs that can run together: equally long, and few."""
    for length, group in pairs.by_length().items():
        size = max(1, TOKENS_AT_ONCE // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


@dataclass(frozen=True)
class PairRuns:
    """Both runs of one pair.

    Attributes:
        activations: how whole sites change, flat.
        differences: by name of the dictionary.
        bases: the run that is patched, by direction, for each reading.
    """

    activations: Mapping[str, Change]
    differences: Mapping[str, Difference]
    bases: Mapping[Direction, Sequence[BaseRun]]

    def swaps(self, wanted: Wanted, found: Sequence[Dictionary], directions: Mapping[str, Directions]) -> list[Swaps]:
        """Every swap: features, all features and error of each dictionary, then each whole site."""
        swaps: list[Swaps] = []
        for dictionary in found:
            swaps += feature_swaps(dictionary, self.differences[dictionary.name], wanted, directions[dictionary.name])
        return swaps + [whole_swaps(site, "activation", whole, wanted) for site, whole in self.activations.items()]

    def blocks(self, swaps: Sequence[Swaps], direction: Direction) -> list[Block]:
        """The swaps as work for the engine, in the same order, reading by reading."""
        return [
            Block(name=swap.name, run=base, site=swap.site, deltas=swap.deltas[direction])
            for base in self.bases[direction]
            for swap in swaps
        ]


@torch.no_grad()
def run_pairs(
    lens: Lens, pairs: Pairs, some: Sequence[int], found: Sequence[Dictionary], readings: Mapping[int, Sequence[Reading]]
) -> list[PairRuns]:
    """Runs the clean and the corrupted prompts of some equally long pairs, and splits what differs."""
    written = list(dict.fromkeys(dictionary.writes for dictionary in found))
    entries = {sites.layer_of(site): sites.resid_pre(sites.layer_of(site)) for site in written}
    hooks = sorted({*written, *entries.values(), *(dictionary.reads for dictionary in found)})
    tokens = {
        "denoising": torch.tensor([pairs[index].corrupted for index in some]),
        "noising": torch.tensor([pairs[index].clean for index in some]),
    }
    both = lens.read(torch.cat([tokens["denoising"], tokens["noising"]]), hooks)
    halves = {hook: values.chunk(2) for hook, values in both.items()}
    read = {direction: {hook: halves[hook][half] for hook in hooks} for half, direction in enumerate(tokens)}
    runs = []
    for slot, index in enumerate(some):
        pair, of_pair = pairs[index], {base: {hook: kept[hook][slot] for hook in hooks} for base, kept in read.items()}
        clean, corrupted = of_pair["noising"], of_pair["denoising"]
        first = pair.first_difference if lens.causal else 0
        bases: dict[Direction, list[BaseRun]] = {direction: [] for direction in reversed(DIRECTIONS)}
        for number, reading in enumerate(readings[index]):
            for direction in bases:
                prompt, resid = tokens[direction][slot], of_pair[direction]
                if reading.continuation:
                    prompt = torch.cat([prompt, torch.tensor(reading.continuation)])
                    resid = {hook: kept[0] for hook, kept in lens.read(prompt[None], sorted(entries.values())).items()}
                base = BaseRun(
                    name=f"pair {index} {direction}{f' reading {number}' if number else ''}",
                    tokens=prompt,
                    resid={layer: resid[hook] for layer, hook in entries.items()},
                    answer=pair.answer_position + len(reading.continuation),
                    correct=reading.correct,
                    wrong=reading.wrong,
                    clean=bases["noising"][number] if direction == "denoising" else None,
                )
                bases[direction].append(base)
        whole = {site: _difference(clean[site], corrupted[site], first) for site in written}
        runs.append(PairRuns(whole, {d.name: Difference.of(d, clean, corrupted, first) for d in found}, bases))
    return runs


def _difference(clean: torch.Tensor, corrupted: torch.Tensor, first: int) -> Change:
    """From corrupted to clean, and the other way round; exactly 0 before position `first`."""
    difference = (clean - corrupted).flatten(1)
    difference[:first] = 0
    return {"denoising": difference, "noising": -difference}
