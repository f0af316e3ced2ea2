"""Corruption by Gaussian noise on the embeddings, as in causal tracing (Meng et al. 2022, arXiv 2202.05262)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens
from featpatch.pairs import Pair
from featpatch.patch import Position


@dataclass(frozen=True)
class Noise:
    """The corrupted run is the clean prompt with noise on the embeddings of some tokens; the pairs' own corrupted prompts,
    of which the answers stay, are not run.

    Attributes:
        positions: labels or token indices of the tokens.
        scale: standard deviation of the noise, in standard deviations of the embeddings of the
            prompt's tokens, over all their coordinates.
        seed: of the draws; one for each pair.
    """

    positions: Sequence[Position]
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        several = isinstance(self.positions, Sequence) and not isinstance(self.positions, str)
        if not several or not self.positions or not isinstance(self.scale, (int, float)) or not self.scale > 0:
            raise FeatpatchError(
                f"Noise(positions={self.positions!r}, scale={self.scale!r}): expected a list of at least one label or index, "
                "and a scale above 0, e.g. Noise(['subject'], scale=3)"
            )
        object.__setattr__(self, "positions", tuple(self.positions))

    def at(self, pair: Pair) -> list[int]:
        """The token positions in a pair; raises FeatpatchError where it has no such label or index."""
        return sorted({p for position in self.positions for p in pair.positions(position)})

    def about(self) -> dict[str, Any]:
        """What to note of it with the results."""
        return {"positions": list(self.positions), "scale": self.scale, "seed": self.seed}

    @contextmanager
    def added(self, lens: Lens, pairs: Sequence[Pair]) -> Iterator[None]:
        """Within this context a call of the model with one prompt of each pair has their noise."""

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
        """The same for a pair, whichever others are there."""
        digest = sha256(repr((self.seed, pair.clean)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
