"""The codec for dictionaries over several hook points: cross-layer transcoders and crosscoders.

It works on the activations of all hook points side by side, one group of features after the other.
"""

import hashlib
from math import prod
from typing import Any

import torch

from featpatch.sae.codec import Behaviour, Code, Codec, State
from featpatch.sae.cross import Cross, Group
from featpatch.sae.matrices import values_of
from featpatch.sae.weights import ACTIVATIONS

READ = 2**24
"""Maximum number of values of a decoder that are read together."""

HASHED = 2**22
"""Number of values of each matrix in a digest: all of a small one, evenly spaced rows of a larger one."""


class CrossCodec(Codec):
    """The codec for a dictionary over several hook points, on their activations side by side.

    It encodes in the dtype of the weights and decodes in float32 at least.
    """

    behaviour = Behaviour(rowwise=True, linear=True, scaled=False)
    """Follows from `encode` and `decode` below, whatever the weights are. A test on random activations would activate most of
    the features, and so read the whole dictionary."""

    def __init__(self, source: Any, like: torch.Tensor) -> None:
        self.cross: Cross = source
        self.kind = type(self.cross).__name__
        self.groups = self.cross.groups
        self.d_in = max(group.reads.stop for group in self.cross.parts)
        self.d_out = len(self.cross.b_dec)
        self._size = len(self.cross.parts[0].b_enc)
        self.d_sae = self.groups * self._size
        self.dtype = self.cross.parts[0].W_enc.dtype
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._device = self.cross.b_dec.device

    @staticmethod
    def hooks(source: Any) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Return the hook points of a cross-layer transcoder or a crosscoder; None for any other object."""
        return (source.hook, source.hook_out) if isinstance(source, Cross) else None

    def encode(self, x: torch.Tensor) -> Code:
        """Return the features, one group after the other, and the values of the skip path as the state."""
        own = x.to(device=self._device, dtype=self.dtype)
        made: list[torch.Tensor] = []
        before: Group | None = None
        for group in self.cross.parts:
            if before is None or group.W_enc is not before.W_enc:  # else the groups differ only in what they write
                pre = self._before(own[..., group.reads], group)
            made.append(self._activate(pre, group).to(self._wide))
            before = group
        return Code(torch.cat(made, dim=-1), self._skip(x))

    def encode_group(self, x: torch.Tensor, number: int) -> Code:
        """Return the features of one group, given the activations that it reads; the others are 0, and so is the state."""
        group, off = self.cross.parts[number], self.off()
        found = self._activate(self._before(x.to(device=self._device, dtype=self.dtype), group), group)
        features = found.new_zeros(*found.shape[:-1], self.groups, self._size, dtype=self._wide)
        features[..., number, :] = found
        return Code(features.flatten(-2), {name: zero.expand(*x.shape[:-1], -1) for name, zero in off.state.items()})

    @staticmethod
    def _before(x: torch.Tensor, group: Group) -> torch.Tensor:
        return x @ values_of(group.W_enc).T + group.b_enc

    def _activate(self, pre: torch.Tensor, group: Group) -> torch.Tensor:
        activation, k = ACTIVATIONS[self.cross.activation], self.cross.k or 0
        threshold = pre if group.threshold is None else group.threshold
        if group.scale is None:
            return activation(pre, k, threshold)
        return torch.where(activation(pre * group.scale, k, threshold) != 0, pre, 0)

    def _skip(self, x: torch.Tensor) -> State:
        if self.cross.skip is None:
            return {}
        skip = self.cross.skip.to(self._wide)
        by_layer = x.to(skip).unflatten(-1, (len(skip), -1))
        return {"skip": torch.einsum("bpli,loi->bplo", by_layer, skip).flatten(2)}

    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """Return the reconstruction, for which only the rows of features that are on somewhere in the batch are read."""
        features = features.to(device=self._device, dtype=self._wide)
        made = self.cross.b_dec.to(self._wide).expand(*features.shape[:-1], -1).clone()
        for group, own in zip(self.cross.parts, features.split(self._size, dim=-1), strict=True):
            active = (own != 0).flatten(0, -2).any(0).nonzero()[:, 0]
            together = max(1, READ // (group.writes.stop - group.writes.start))
            for chunk in active.split(together):
                made[..., group.writes] += own[..., chunk] @ values_of(group.W_dec, chunk).to(self._wide)
        return made + state["skip"].to(made) if "skip" in state else made

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """Return rows of the decoders, with zeros where a feature does not write."""
        rows = torch.zeros(len(features), self.d_out, dtype=self._wide, device=self._device)
        for number, group in enumerate(self.cross.parts):
            there = (features // self._size == number).nonzero()[:, 0]
            if len(there):
                found = values_of(group.W_dec, features[there] % self._size)
                rows[there.to(rows.device), group.writes] = found.to(self._wide)
        return rows

    def encoders(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return rows of the encoders and their biases, see `Codec.encoders`."""
        width = max(group.reads.stop - group.reads.start for group in self.cross.parts)
        rows = torch.zeros(len(features), width, dtype=self._wide, device=self._device)
        biases = rows.new_zeros(len(features))
        features = features.to(self._device)
        for number, group in enumerate(self.cross.parts):
            there = (features // self._size == number).nonzero()[:, 0]
            if len(there):
                own = features[there] % self._size
                rows[there] = values_of(group.W_enc, own).to(rows)
                biases[there] = group.b_enc[own].to(biases)
        return rows, biases

    def pull_skip(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient through the skip path, hook point by hook point."""
        if self.cross.skip is None:
            return None
        skip = self.cross.skip.to(gradient)
        return torch.einsum("...lo,loi->...li", gradient.unflatten(-1, (len(skip), -1)), skip).flatten(-2)

    def off(self) -> Code:
        """Return a code with all features off and no skip path, for which nothing has to be encoded."""
        zero = torch.zeros(1, 1, self.d_sae, dtype=self._wide, device=self._device)
        return Code(zero, {} if self.cross.skip is None else {"skip": zero.new_zeros(1, 1, self.d_out)})

    def digest(self) -> str:
        """Return a digest of the settings, the biases and the thresholds, and of rows of the matrices (see `HASHED`).

        Reading more would take minutes for a dictionary of a hundred gigabytes, and two dictionaries that were trained
        differently differ in every row.
        """
        cross, total = self.cross, hashlib.sha256()
        total.update(f"{self.kind} {cross.activation} {cross.k} {self.dtype} {cross.hook} {cross.hook_out}".encode())
        held = [cross.b_dec, cross.skip]
        for group in cross.parts:
            held += [group.b_enc, group.threshold, group.scale]
            for matrix in (group.W_enc, group.W_dec):
                count = max(1, min(self._size, HASHED * self._size // max(1, prod(matrix.shape))))
                held.append(values_of(matrix, torch.arange(count) * (self._size - 1) // max(count - 1, 1)))
        for tensor in held:
            if tensor is not None:
                total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()
