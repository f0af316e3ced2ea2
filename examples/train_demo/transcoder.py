"""A BatchTopK transcoder in sae-lens' format: features of an MLP's input that add up to its output.

sae-lens has the class but no trainer for it; `batch_top_k` trains it.
"""

from collections.abc import Iterator

import torch
from sae_lens import JumpReLUTranscoder, JumpReLUTranscoderConfig
from sae_lens.saes.sae import SAEMetadata

from .batch_top_k import Part, Units, fit


def train_transcoder(
    data: Iterator[tuple[torch.Tensor, torch.Tensor]], *, width: int, k: float, steps: int, rate: float, metadata: SAEMetadata
) -> JumpReLUTranscoder:
    """Trains on batches of inputs and outputs, and returns the transcoder in the units of the model."""
    x, y = next(data)
    units = Units.of(x, y, x.shape[1])
    coder = _start(x.shape[1], y.shape[1], width, metadata)
    weights = coder.W_enc.detach(), coder.b_enc.detach(), coder.W_dec.detach()
    part = Part(slice(0, x.shape[1]), slice(0, y.shape[1]), *weights)
    (threshold,) = fit(data, [part], coder.b_dec.detach(), units, k=k, steps=steps, rate=rate)
    coder.threshold.data.copy_(threshold)
    return coder


def _start(d_in: int, d_out: int, width: int, metadata: SAEMetadata) -> JumpReLUTranscoder:
    config = JumpReLUTranscoderConfig(d_in=d_in, d_out=d_out, d_sae=width, apply_b_dec_to_input=False, metadata=metadata)
    coder = JumpReLUTranscoder(config)
    with torch.no_grad():
        coder.W_dec /= coder.W_dec.norm(dim=1, keepdim=True)
        if d_in == d_out:
            coder.W_enc.copy_(coder.W_dec.T)
    return coder
