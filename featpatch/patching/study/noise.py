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
    """Noise on the embeddings of some tokens of the clean prompt, which then serves as the corrupted run.

    The corrupted prompts of the pairs are not run; the answers are still those of the pairs.

    Attributes:
        positions: labels or indices of the tokens that get noise.
        scale: standard deviation of the noise, as a multiple of the standard deviation of the embeddings of the prompt's
            tokens over all coordinates.
        seed: the seed of the noise, which is drawn anew for each pair.
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
        """Return the token positions that get noise in a pair.

        Raises:
            FeatpatchError: if the pair has no such label or index.
        """
        return sorted({p for position in self.positions for p in pair.positions(position)})

    def about(self) -> dict[str, Any]:
        """Return metadata to store with the results."""
        return {"positions": list(self.positions), "scale": self.scale, "seed": self.seed}

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
