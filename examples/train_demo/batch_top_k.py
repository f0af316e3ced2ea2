"""BatchTopK dictionaries of any shape: a transcoder, a cross-layer transcoder (CLT), a crosscoder.

    f_p = BatchTopK(x_p W_enc_p + b_enc_p)          y = sum over p of f_p W_dec_p + b_dec

x and y are the activations at several hook points side by side. Each part p reads some of them and writes some: a transcoder
has one part; a CLT has one for each layer, which writes to this layer and all above; a crosscoder has one, which reads and
writes everything. All features compete by f_i |W_dec_i|, the size of what they add everywhere; features that are silent for
long learn to predict the error of the others. As sae-lens does with BatchTopK autoencoders, the result is saved with a fixed
threshold (JumpReLU), the running mean of the smallest value that was kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

SILENT_AFTER = 200
"""Steps without firing after which a feature counts as silent."""
SILENT_WEIGHT = 1 / 32
"""Weight of the silent features' loss."""


@dataclass
class Part:
    """Features that read and write the same hook points.

    Attributes:
        reads, writes: where these lie in the activations side by side.
        W_enc, b_enc, W_dec: encoder [reads, features], its bias, decoder [features, writes].
    """

    reads: slice
    writes: slice
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


@dataclass(frozen=True)
class Units:
    """By how much activations are scaled for training, so that they have the same size at each hook point.

    Attributes:
        scale_in, scale_out: factors on x and on y - center.
        center: mean of y.
    """

    scale_in: torch.Tensor
    scale_out: torch.Tensor
    center: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, width: int) -> "Units":
        """Those of a batch; `width` is that of one hook point."""
        center = y.mean(0)
        return cls(_scale(x, width), _scale(y - center, width), center)


def _scale(x: torch.Tensor, width: int) -> torch.Tensor:
    """One factor for each hook point, repeated over its width, that makes the mean norm there the root of the width."""
    norms = x.unflatten(1, (-1, width)).norm(dim=2).mean(0)
    return (width**0.5 / norms).repeat_interleave(width)


def fit(
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    parts: Sequence[Part],
    b_dec: torch.Tensor,
    units: Units,
    *,
    k: float,
    steps: int,
    rate: float,
) -> torch.Tensor:
    """Trains the weights in place, and returns the threshold of every feature, each in the units of the model.

    `k` features of each part fire on one word on average. Decoder rows get length 1.
    """
    weights = [b_dec, *(w for part in parts for w in (part.W_enc, part.b_enc, part.W_dec))]
    for tensor in weights:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 50, 0.1 + 2.7 * (1 - n / steps)))
    threshold, silence = torch.zeros(len(parts)), [torch.zeros(len(part.b_enc)) for part in parts]
    for step, (x, y) in zip(tqdm(range(steps), desc="Training", mininterval=5), data, strict=False):
        x, error = x * units.scale_in, (y - units.center) * units.scale_out
        hidden = [torch.relu(x[:, part.reads] @ part.W_enc + part.b_enc) for part in parts]
        sizes = [values * part.W_dec.norm(dim=1) for values, part in zip(hidden, parts, strict=True)]
        smallest = torch.stack([size.detach().flatten().topk(int(k * len(x))).values[-1] for size in sizes])
        threshold = smallest if step == 0 else 0.99 * threshold + 0.01 * smallest
        features = [values * (size >= least) for values, size, least in zip(hidden, sizes, smallest, strict=True)]
        error = _without(error, features, parts) - b_dec
        silence = [torch.where((f > 0).any(0), 0.0, n + 1) for f, n in zip(features, silence, strict=True)]
        silent = [(n > SILENT_AFTER).nonzero()[:, 0] for n in silence]
        only = [replace(part, W_dec=part.W_dec[chosen]) for part, chosen in zip(parts, silent, strict=True)]
        guess = [values[:, chosen] for values, chosen in zip(hidden, silent, strict=True)]
        loss = error.pow(2).mean() + SILENT_WEIGHT * _without(error.detach(), guess, only).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _fold(parts, b_dec, units, threshold)


def _without(y: torch.Tensor, features: Sequence[torch.Tensor], parts: Sequence[Part]) -> torch.Tensor:
    """What is left of y after what the features add."""
    left = y.clone()
    for values, part in zip(features, parts, strict=True):
        left[:, part.writes] -= values @ part.W_dec
    return left


@torch.no_grad()
def _fold(parts: Sequence[Part], b_dec: torch.Tensor, units: Units, threshold: torch.Tensor) -> torch.Tensor:
    """Absorbs the units into the weights, and gives every feature a decoder row of length 1."""
    thresholds = []
    for part, least in zip(parts, threshold, strict=True):
        trained = part.W_dec.norm(dim=1)
        part.W_dec /= units.scale_out[part.writes]
        norm = part.W_dec.norm(dim=1)
        part.W_dec /= norm[:, None]
        part.W_enc *= units.scale_in[part.reads, None] * norm
        part.b_enc *= norm
        thresholds.append(least * norm / trained)
    b_dec.div_(units.scale_out).add_(units.center)
    for tensor in (b_dec, *(w for part in parts for w in (part.W_enc, part.b_enc, part.W_dec))):
        tensor.requires_grad_(False)
    return torch.stack(thresholds)
