"""Noise on the embeddings of the clean prompt, which replaces the corrupted run, as in causal tracing.

Source: Meng et al. 2022, arXiv 2202.05262.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from math import inf
from typing import Any

import torch

from featpatch import sites
from featpatch.effects.collector import averaged
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_numbers, is_integer, is_number
from featpatch.metrics import check_gap
from featpatch.model.lens import Lens
from featpatch.nodes import Position
from featpatch.pairs.pair import Pair


@dataclass(frozen=True)
class Noise:
    """Noise on the embeddings of some tokens of the clean prompt, which then serves as the corrupted run.

    This is the corruption of causal tracing (Meng et al. 2022, arXiv 2202.05262). The corrupted prompts of the pairs are not
    run; the answers are still those of the pairs.

    Attributes:
        positions: labels or indices of the tokens that get noise.
        scale: standard deviation of the noise, as a multiple of the standard deviation of the embeddings of the prompt's
            tokens over all coordinates.
        seed: the seed of the noise, which is drawn anew for each pair.
        draws: the number of draws, with the seeds `seed`, `seed + 1` and so on, over which metric values are averaged. The cost
            grows with it, and so does precision: a single draw can be far off, and 10 are advisable for numbers to report.
            `effects.spread` holds the standard deviation of pooled effects over draws.

    Examples:
        >>> noise = fp.Noise(["S2"], scale=3.0)
        >>> noisy = fp.rank_features(model, saes, pairs, positions=["S2"], noise=noise, progress=False)
        >>> noisy.metadata["noise"]["positions"]
        ['S2']
    """

    positions: Sequence[Position]
    scale: float = 3.0
    seed: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        check_numbers(1, draws=self.draws)
        check_numbers(0, seed=self.seed)
        several = isinstance(self.positions, Sequence) and not isinstance(self.positions, str) and len(self.positions)
        known = several and all(isinstance(position, str) or is_integer(position) for position in self.positions)
        if not known or not is_number(self.scale) or not 0 < self.scale < inf:
            raise FeatpatchError(
                f"Noise(positions={self.positions!r}, scale={self.scale!r}): expected positions as a list of at least one "
                "label or index, and a finite scale above 0, e.g. Noise(['subject'], scale=3)"
            )
        plain = tuple(position if isinstance(position, str) else int(position) for position in self.positions)
        for name, value in (("positions", plain), ("scale", float(self.scale)), ("seed", int(self.seed))):
            object.__setattr__(self, name, value)  # NumPy's numbers can't be saved

    def at(self, pair: Pair) -> list[int]:
        """Return the token positions that get noise in a pair.

        Raises:
            FeatpatchError: the pair has no such label or index.
        """
        return sorted({p for position in self.positions for p in pair.positions(position)})

    def about(self) -> dict[str, Any]:
        """Return metadata to store with the results."""
        about = {"positions": list(self.positions), "scale": self.scale, "seed": self.seed}
        return about if self.draws == 1 else {**about, "draws": self.draws}

    @contextmanager
    def added(self, lens: Lens, pairs: Sequence[Pair]) -> Iterator[None]:
        """Context manager in which a call of the model with one prompt of each pair gets the noise of these pairs."""

        def add(embedded: torch.Tensor) -> torch.Tensor:
            noisy = embedded.clone()
            for row, pair in enumerate(pairs):
                at = self.at(pair)
                size = self.scale * float(embedded[row, : len(pair)].double().std())
                noise = torch.randn(len(at), embedded.shape[-1], generator=self._generator(pair), dtype=torch.float64)
                noisy[row, at] += (size * noise).to(embedded)
            return noisy

        with lens.edit(sites.EMBEDDING, add):
            yield

    def _generator(self, pair: Pair) -> torch.Generator:
        """Return the random generator of a pair, which does not depend on the other pairs."""
        digest = sha256(repr((self.seed, pair.clean)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def over_draws(noise: Noise, draw: Callable[[Noise, int], Effects], metadata: Mapping[str, Any]) -> Effects:
    """Run a sweep once for each draw of noise and average; after Ctrl-C, over the draws that are finished.

    Args:
        noise: the noise, with at least two draws.
        draw: a function that runs the sweep with one draw of noise, given it and its number.
        metadata: the metadata of the average.

    Raises:
        FeatpatchError: the mean gap is near zero.
    """
    tables: list[Effects] = []
    for number in range(noise.draws):
        try:
            table = draw(replace(noise, seed=noise.seed + number, draws=1), number)
        except KeyboardInterrupt:
            if not tables:
                raise
            break
        if not table.finished:
            tables = tables or [table]
            break
        tables.append(table)
    about = {"noise": replace(noise, draws=len(tables)).about(), "finished": len(tables) == noise.draws}
    effects = averaged(tables, {**metadata, **about}) if len(tables) > 1 else _noted(tables[0], about)
    for name in effects.metrics if effects.finished else ():
        check_gap(name, effects.for_metric(name).clean, effects.for_metric(name).corrupted)
    return effects


def _noted(effects: Effects, about: Mapping[str, Any]) -> Effects:
    """Return a table with other metadata, for each of its metrics."""
    others = {name: _noted(effects.for_metric(name), about) for name in effects.others}
    return replace(effects, metadata={**effects.metadata, **about}, others=others)
