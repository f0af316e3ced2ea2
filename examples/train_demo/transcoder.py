"""A BatchTopK transcoder: features of an MLP's input that add up to its output.

    f = BatchTopK(x W_enc + b_enc),   y ~ f W_dec + b_dec

sae-lens has the class but no trainer for it. Features compete by |f_i| |W_dec_i|, the size of what they add; silent
features learn to predict the error of the others. As sae-lens does with BatchTopK autoencoders, the result is saved
with a fixed threshold (JumpReLU), the running mean of the smallest value that was kept.
"""

from collections.abc import Iterator

import torch
from sae_lens import JumpReLUTranscoder, JumpReLUTranscoderConfig
from sae_lens.saes.sae import SAEMetadata
from tqdm import tqdm

SILENT_AFTER = 200
"""Steps without firing after which a feature counts as silent."""
SILENT_WEIGHT = 1 / 32
"""Weight of the silent features' loss."""


def train_transcoder(
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    width: int,
    k: float,
    steps: int,
    rate: float,
    metadata: SAEMetadata,
) -> JumpReLUTranscoder:
    """Trains on batches of inputs and outputs, and returns the transcoder in the units of the model."""
    x, y = next(batches)
    center = y.mean(0)
    scale_in = x.shape[1] ** 0.5 / x.norm(dim=1).mean()
    scale_out = y.shape[1] ** 0.5 / (y - center).norm(dim=1).mean()
    coder = _start(x.shape[1], y.shape[1], width, metadata)
    optimizer = torch.optim.Adam(coder.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 50, 0.1 + 2.7 * (1 - n / steps)))
    threshold, silence = 0.0, torch.zeros(width)
    for step, (x, y) in zip(tqdm(range(steps), desc="Training transcoder", mininterval=5), batches, strict=False):
        hidden = torch.relu(x * scale_in @ coder.W_enc + coder.b_enc)
        target = (y - center) * scale_out
        size = hidden * coder.W_dec.norm(dim=1)
        smallest = size.detach().flatten().topk(int(k * len(x))).values[-1]
        threshold = smallest.item() if step == 0 else 0.99 * threshold + 0.01 * smallest.item()
        features = hidden * (size >= smallest)
        error = target - features @ coder.W_dec - coder.b_dec
        silence = torch.where((features > 0).any(0), 0.0, silence + 1)
        silent = hidden * (silence > SILENT_AFTER)
        loss = error.pow(2).mean() + SILENT_WEIGHT * (error.detach() - silent @ coder.W_dec).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    _fold(coder, threshold, scale_in, scale_out, center)
    return coder


def _start(d_in: int, d_out: int, width: int, metadata: SAEMetadata) -> JumpReLUTranscoder:
    config = JumpReLUTranscoderConfig(d_in=d_in, d_out=d_out, d_sae=width, apply_b_dec_to_input=False, metadata=metadata)
    coder = JumpReLUTranscoder(config)
    coder.threshold.requires_grad_(False)
    with torch.no_grad():
        coder.W_dec /= coder.W_dec.norm(dim=1, keepdim=True)
        if d_in == d_out:
            coder.W_enc.copy_(coder.W_dec.T)
    return coder


@torch.no_grad()
def _fold(
    coder: JumpReLUTranscoder, threshold: float, scale_in: torch.Tensor, scale_out: torch.Tensor, center: torch.Tensor
) -> None:
    """Absorbs scales and center into the weights, and gives every feature a decoder row of length 1."""
    norm = coder.W_dec.norm(dim=1)
    coder.W_enc.mul_(scale_in * norm / scale_out)
    coder.b_enc.mul_(norm / scale_out)
    coder.W_dec.div_(norm[:, None])
    coder.b_dec.div_(scale_out).add_(center)
    coder.threshold.fill_(threshold / scale_out)
