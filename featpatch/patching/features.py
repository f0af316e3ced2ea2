"""Rank SAE features by causal recovery: every feature that differs is swapped alone, exactly, in both directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from featpatch import metrics, sites
from featpatch.effects import Effects, check_gap
from featpatch.engine import BATCH_ROWS, Block, measure, sweep
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, Split, dictionaries, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pair, Pairs
from featpatch.patch import DIRECTIONS, Direction, Node
from featpatch.patching.swaps import Positions, Swaps, feature_swaps, spans, whole_swaps

AT_ONCE = 16
"""Pairs whose activations are held in memory together."""


def rank_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: str | Metric = "logit_diff",
    batch_rows: int = BATCH_ROWS,
    progress: bool = True,
) -> Effects:
    """Exact causal effect of every SAE feature, of the error terms and of the whole sites.

    A feature's value is taken from the clean run into the corrupted one (denoising) and the other way round (noising);
    the SAE's reconstruction error and all other features stay as they are in the run that is patched. A feature with the
    same value in both runs has exactly no effect and costs no forward pass.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, also at the same hook.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, swapped at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry. Special tokens are never swapped by
            `"all"` and `"each"`.
        directions: `"denoising"`, `"noising"` or both.
        metric: name of a metric or a function of `(logits, correct, wrong)`.
        batch_rows: token rows (patches x positions) of one forward pass; less needs less memory.
        progress: show a bar.

    Returns:
        One row per feature (and position) that differs in at least one pair, and three rows per site and position:
        `all_features`, `error` and `activation`.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
    """
    metric_name, measured = metrics.find(metric)
    wrong = [direction for direction in directions if direction not in DIRECTIONS]
    if wrong or not directions:
        raise FeatpatchError(f"directions={tuple(directions)}: expected 'denoising', 'noising' or both")
    wanted = [spans(pair, positions) for pair in pairs]
    lens = wrap(model)
    found = dictionaries(lens, saes)
    table = _Table({}, [], [], [], [])
    clean, corrupted = _baselines(lens, pairs, measured)
    check_gap(clean, corrupted)
    with tqdm(total=0, unit="patch", desc="patching", disable=not progress) as bar:
        for group in pairs.by_length().values():
            for start in range(0, len(group), AT_ONCE):
                some = group[start : start + AT_ONCE]
                runs = _Runs.of(lens, [pairs[index] for index in some], found)
                swaps = [runs.swaps(slot, wanted[index], found) for slot, index in enumerate(some)]
                bar.total += len(directions) * sum(len(swap.deltas) for of_pair in swaps for swap in of_pair)
                values = {
                    direction: sweep(lens, runs.blocks(swaps, direction), measured, batch_rows=batch_rows, done=bar.update)
                    for direction in DIRECTIONS
                    if direction in directions
                }
                table.add(some, swaps, values)
    metadata = {
        "metric": metric_name,
        "directions": sorted(directions),
        "positions": positions if isinstance(positions, str) else list(positions),
        "pairs": pairs.digest(),
        "model": {"name": str(lens.model.cfg.model_name), "sha256": lens.digest()},
        "saes": {dictionary.name: dictionary.digest() for dictionary in found},
        "versions": {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")},
    }
    return table.effects(clean, corrupted, metadata)


def _baselines(lens: Lens, pairs: Pairs, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """The metric of the unpatched runs, `[pairs]` each."""
    values = np.zeros((2, len(pairs)))
    for group in pairs.by_length().values():
        for start in range(0, len(group), AT_ONCE):
            some = group[start : start + AT_ONCE]
            for run, prompts in enumerate(_tokens([pairs[index] for index in some])):
                logits, _ = lens.run(prompts)
                for slot, index in enumerate(some):
                    values[run, index] = measure(logits[slot : slot + 1], pairs[index], metric).item()
    return values[0], values[1]


def _tokens(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([pair.clean for pair in pairs]), torch.tensor([pair.corrupted for pair in pairs])


@dataclass(frozen=True)
class _Runs:
    """Clean and corrupted runs of a few pairs of equal length."""

    pairs: list[Pair]
    tokens: tuple[torch.Tensor, torch.Tensor]
    activations: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    splits: dict[str, tuple[Split, Split]]

    @classmethod
    def of(cls, lens: Lens, pairs: list[Pair], found: list[Dictionary]) -> "_Runs":
        hooks = {hook for dictionary in found for hook in (dictionary.reads, dictionary.writes)}
        hooks |= {sites.resid_pre(sites.layer_of(dictionary.writes)) for dictionary in found}
        tokens = _tokens(pairs)
        clean, corrupted = (lens.run(prompts, read=sorted(hooks))[1] for prompts in tokens)
        splits = {
            d.name: (d.split(clean[d.reads], clean[d.writes]), d.split(corrupted[d.reads], corrupted[d.writes])) for d in found
        }
        return cls(pairs, tokens, (clean, corrupted), splits)

    def swaps(self, slot: int, wanted: dict[Any, list[int]], found: list[Dictionary]) -> list[Swaps]:
        """Every swap of one pair."""
        swaps: list[Swaps] = []
        for dictionary in found:
            clean, corrupted = (Split(s.features[slot], s.error[slot]) for s in self.splits[dictionary.name])
            swaps += feature_swaps(dictionary, clean, corrupted, wanted)
        for site in dict.fromkeys(dictionary.writes for dictionary in found):
            clean_x, corrupted_x = (activations[site][slot].flatten(1) for activations in self.activations)
            swaps.append(whole_swaps(site, "activation", clean_x - corrupted_x, wanted))
        return swaps

    def blocks(self, swaps: list[list[Swaps]], direction: Direction) -> list[Block]:
        """The same swaps as work for the engine, in order."""
        base = 1 if direction == "denoising" else 0
        return [
            Block(
                pair=self.pairs[slot],
                tokens=self.tokens[base][slot],
                resid=self.activations[base][sites.resid_pre(sites.layer_of(swap.site))][slot],
                site=swap.site,
                deltas=swap.deltas if direction == "denoising" else -swap.deltas,
            )
            for slot, of_pair in enumerate(swaps)
            for swap in of_pair
        ]


@dataclass(frozen=True)
class _Table:
    """Entries as they come in; one row per node, in order of appearance."""

    rows: dict[Node, int]
    row: list[int]
    pair: list[int]
    denoised: list[np.ndarray]
    noised: list[np.ndarray]

    def add(self, some: list[int], swaps: list[list[Swaps]], values: dict[Direction, list[torch.Tensor]]) -> None:
        flat = [(index, swap) for index, of_pair in zip(some, swaps, strict=True) for swap in of_pair]
        for k, (index, swap) in enumerate(flat):
            self.row.extend(self.rows.setdefault(node, len(self.rows)) for node in swap.nodes)
            self.pair.extend([index] * len(swap.nodes))
            for direction, column in zip(DIRECTIONS, (self.denoised, self.noised), strict=True):
                found = values[direction][k].numpy() if direction in values else np.full(len(swap.nodes), np.nan)
                column.append(found)

    def effects(self, clean: np.ndarray, corrupted: np.ndarray, metadata: dict[str, Any]) -> Effects:
        return Effects(
            nodes=tuple(self.rows),
            clean=clean,
            corrupted=corrupted,
            row=np.array(self.row, dtype=np.int64),
            pair=np.array(self.pair, dtype=np.int64),
            denoised=np.concatenate(self.denoised),
            noised=np.concatenate(self.noised),
            metadata=metadata,
        )
