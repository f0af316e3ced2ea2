"""Corruption by Gaussian noise on the embeddings, as in causal tracing (Meng et al. 2022, arXiv 2202.05262)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens
from featpatch.pairs import Pair, Pairs
from featpatch.patch import Position


@dataclass(frozen=True)
class Noise:
    """The corrupted run is the clean prompt with noise on the embeddings of some tokens; the pairs' own corrupted prompts,
    of which the answers stay, are not run.

    Attributes:
        positions: labels or token indices of the tokens.
        scale: standard deviation of the noise, in standard deviations of the embeddings of the
            different tokens in the clean prompts.
        seed: of the draws, one for each pair.
    """

    positions: Sequence[Position]
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))
        if not self.positions or not self.scale > 0:
            raise FeatpatchError(
                f"Noise(positions={self.positions}, scale={self.scale}): expected at least one label or index, and a scale "
                "above 0, e.g. Noise(['subject'], scale=3)"
            )

    def at(self, pair: Pair) -> list[int]:
        """The token positions in a pair; raises FeatpatchError where it has no such label or index."""
        return sorted({p for position in self.positions for p in pair.positions(position)})

    def about(self) -> dict[str, Any]:
        """What to note of it with the results."""
        return {"positions": list(self.positions), "scale": self.scale, "seed": self.seed}

    @contextmanager
    def added(self, lens: Lens, spread: float, pairs: Sequence[Pair], numbers: Sequence[int]) -> Iterator[None]:
        """Within this context a call of the model with one prompt of each pair has their noise, drawn by the pairs' numbers."""

        def add(embedded: torch.Tensor) -> torch.Tensor:
            noisy = embedded.clone()
            for row, (pair, number) in enumerate(zip(pairs, numbers, strict=True)):
                generator, at = torch.Generator().manual_seed(self.seed * 2**32 + number), self.at(pair)
                noise = torch.randn(len(at), embedded.shape[-1], generator=generator, dtype=torch.float64)
                noisy[row, at] += (self.scale * spread * noise).to(embedded)
            return noisy

        with lens.edit(sites.EMBEDDING, add):
            yield


def embedding_spread(lens: Lens, pairs: Pairs) -> float:
    """Standard deviation of the embeddings of the different tokens in the clean prompts, over all their coordinates."""
    tokens = torch.tensor([token for pair in pairs for token in pair.clean]).unique()
    return float(lens.read(tokens[None, : lens.n_ctx], [sites.EMBEDDING])[sites.EMBEDDING].double().std())
