"""The exact sweep: add a delta at a site, run the rest of the model, measure. It knows nothing of SAEs.

Many patches, of different pairs and directions but of one site and one length, share a forward pass. The run is resumed
at the block of the site with the residual stream of the base run; the layers below can't change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.engine.deltas import Deltas
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens
from featpatch.metrics import Metric
from featpatch.pairs import Pair

BATCH_ROWS = 2048
"""Token rows (patches x positions) of one forward pass; speed is flat above a few hundred."""


@dataclass(frozen=True)
class Block:
    """Patches of one base run at one site.

    Attributes:
        pair: whose answers and answer position the metric takes.
        tokens: the base run's tokens `[pos]`.
        resid: the base run's residual stream at the entry of the site's block, `[pos, d_model]`.
        site: where the deltas are added.
        deltas: one change `[pos, d]` per patch, `d` being the activation's size when flat.
    """

    pair: Pair
    tokens: Int[torch.Tensor, " pos"]
    resid: Float[torch.Tensor, "pos d_model"]
    site: str
    deltas: Deltas


def measure(logits: Float[torch.Tensor, "rows pos d_vocab"], pair: Pair, metric: Metric) -> Float[torch.Tensor, " rows"]:
    """The metric at the pair's answer position, on the CPU in float64.

    Raises:
        FeatpatchError: the metric doesn't give one finite value per row.
    """
    at_answer = logits[:, pair.answer_position]
    d_vocab = at_answer.shape[-1]
    if max(*pair.correct, *pair.wrong) >= d_vocab:
        raise FeatpatchError(f"answers {pair.correct}, {pair.wrong} are outside the model's vocabulary of {d_vocab} tokens")
    values = metric(at_answer, pair.correct, pair.wrong)
    if values.shape != (len(logits),):
        raise FeatpatchError(f"the metric gave shape {tuple(values.shape)} for {len(logits)} rows: expected one value per row")
    if not torch.isfinite(values).all():
        raise FeatpatchError("the metric gave NaN or an infinite value: expected finite logits; check the model and the metric")
    return values.detach().to("cpu", torch.float64)


@torch.no_grad()
def sweep(
    lens: Lens,
    blocks: Sequence[Block],
    metric: Metric,
    *,
    batch_rows: int = BATCH_ROWS,
    done: Callable[[int], object] = lambda n: None,
) -> list[Float[torch.Tensor, " patches"]]:
    """Exact metric values of every patch.

    Args:
        blocks: in any order.
        batch_rows: token rows per forward pass.
        done: called with the number of patches that each forward pass finished.

    Returns:
        For each block the values of its patches, float64 on the CPU.
    """
    values: list[list[torch.Tensor]] = [[] for _ in blocks]
    for batch in _batches(blocks, batch_rows):
        together = [blocks[index] for index, _ in batch]
        deltas = [block.deltas[part].to(lens.device) for block, (_, part) in zip(together, batch, strict=True)]
        sizes = [len(delta) for delta in deltas]
        logits = _patched(lens, together, torch.cat(deltas), torch.tensor(sizes))
        for (index, _), block, part in zip(batch, together, logits.split(sizes), strict=True):
            values[index].append(measure(part, block.pair, metric))
        done(sum(sizes))
    return [torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64) for parts in values]


def _patched(lens: Lens, blocks: Sequence[Block], deltas: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Logits of the base runs with the deltas added, each block being repeated for its patches."""
    site = blocks[0].site
    tokens = torch.stack([block.tokens for block in blocks]).to(lens.device)
    resid = torch.stack([block.resid for block in blocks])

    def add(activation: torch.Tensor) -> torch.Tensor:
        return activation + deltas.to(activation.device, activation.dtype).reshape(activation.shape)

    with lens.edit(site, add) as firing:
        logits = lens.resume(
            sites.layer_of(site),
            resid.repeat_interleave(sizes.to(resid.device), 0),
            tokens.repeat_interleave(sizes.to(tokens.device), 0),
        )
    if firing.count != 1:
        raise FeatpatchError(
            f"the patch at {site!r} fired {firing.count} times in a forward pass: expected once; choose a hook of every pass"
        )
    return logits


def _batches(blocks: Sequence[Block], batch_rows: int) -> Iterator[list[tuple[int, slice]]]:
    """Slices of blocks of one site and one length, packed up to the budget of rows."""

    def alike(index: int) -> tuple[str, int]:
        return blocks[index].site, len(blocks[index].tokens)

    for (_, length), indices in groupby(sorted(range(len(blocks)), key=alike), key=alike):
        room = most = max(1, batch_rows // length)
        batch: list[tuple[int, slice]] = []
        for index in indices:
            start = 0
            while start < len(blocks[index].deltas):
                stop = min(start + room, len(blocks[index].deltas))
                batch.append((index, slice(start, stop)))
                room -= stop - start
                start = stop
                if room == 0:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch
