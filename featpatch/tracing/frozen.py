"""The linear path from what is written to the residual stream to what is read from it, on one prompt.

    G_mid = G_post + what reads x_mid
    G_pre = G_mid + norm1'^T W_V^T P^T W_O^T post1'^T G_mid         P: attention pattern; norm': norm with its scale frozen

With attention patterns and the scales of norms frozen at their values on the prompt, and MLPs cut, every input of an encoder or
of the unembedding is linear in what tokens, MLPs and biases write to the residual stream. The gradient G of a target with
respect to the stream is computed layer by layer from the weights, without autograd and without running the model again; the
contribution of whatever is written is its product with G where it is written.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.layer import Norm
from featpatch.model.lens import Lens
from featpatch.model.projections import Projections, projections_of, wide

Stream = Float[torch.Tensor, "pos d_model"]
Gradient = Float[torch.Tensor, "targets pos d_model"]

VALUES = 2**21
"""Maximum number of values of the gradients that are computed together."""


@dataclass(frozen=True)
class Reading:
    """The way in which a hook point reads the residual stream: `norm(x)`, or `x` itself.

    Attributes:
        depth: the place of the residual stream: 2 l where layer l begins, 2 l + 1 between its attention and its MLP.
        norm: the norm in between; None if there is none.
        stream: the residual stream at this place.
    """

    depth: int
    norm: Norm | None
    stream: Stream

    def pull(self, gradient: Float[torch.Tensor, "*rows d_model"], at: Stream | None = None) -> torch.Tensor:
        """Return the gradient with respect to the residual stream (`at` the rows) from that with respect to what is read."""
        return (
            gradient if self.norm is None else self.norm.pull(gradient, self.stream[: gradient.shape[-2]] if at is None else at)
        )

    def constant(self, gradient: Float[torch.Tensor, "*rows d_model"]) -> torch.Tensor:
        """Return the contribution of the norm's bias to each row."""
        bias = None if self.norm is None else self.norm.bias
        return gradient.new_zeros(gradient.shape[:-1]) if bias is None else gradient @ wide(bias).to(gradient)


@dataclass(frozen=True)
class Written:
    """Vectors that are added to the residual stream at one place and position, in the columns of the result.

    Attributes:
        depth: the place, see `Reading`.
        position: the position.
        columns: the column of each vector; several may share one.
        vectors: the vectors.
    """

    depth: int
    position: int
    columns: Int[torch.Tensor, " n"]
    vectors: Float[torch.Tensor, "n d_model"]


@dataclass(frozen=True)
class Skip:
    """A linear path around an MLP, from what a transcoder reads to what it writes.

    Attributes:
        depth: the place at which it writes.
        pull: the function from the gradient there to that of what is read.
        reading: the place at which it reads.
    """

    depth: int
    pull: Callable[[Gradient], Gradient]
    reading: Reading


@dataclass(frozen=True)
class Targets:
    """Linear functions of the residual stream, each at one place and position.

    Attributes:
        depths, positions: where each reads.
        vectors: the gradient of each with respect to the residual stream there.
    """

    depths: Int[torch.Tensor, " n"]
    positions: Int[torch.Tensor, " n"]
    vectors: Float[torch.Tensor, "n d_model"]

    def at(self, rows: torch.Tensor) -> "Targets":
        """Return some of the targets."""
        return Targets(self.depths[rows], self.positions[rows], self.vectors[rows])


@dataclass(frozen=True)
class Attention:
    """The attention of one layer with its pattern frozen, in float32 at least."""

    pattern: Float[torch.Tensor, "heads query key"]
    value: Float[torch.Tensor, "key_heads d_model d_head"]
    value_bias: Float[torch.Tensor, "key_heads d_head"]
    out: Float[torch.Tensor, "heads d_head d_model"]
    out_bias: Float[torch.Tensor, " d_model"]
    before: Reading
    after: Norm | None
    summed: Stream

    @classmethod
    def of(cls, layer: int, made: Projections, read: Mapping[str, torch.Tensor]) -> "Attention":
        """Freeze the attention of a layer.

        Args:
            read: the pattern, z and the residual stream that enters the layer, by hook point.
        """
        z, x = (wide(read[sites.component(layer, name)])[0] for name in ("z", "resid_pre"))
        value, bias = made.into["v"]
        summed = wide(made.outputs(z).sum(0) + made.bias)
        pattern = wide(read[sites.component(layer, "pattern")])[0]
        before = Reading(2 * layer, made.layer.norm1, x)
        value, bias, out, out_bias = (wide(weight).to(x) for weight in (value, bias, made.out, made.bias))
        return cls(pattern.to(x), value, bias, out, out_bias, before, made.layer.post1, summed)

    def pull(self, gradient: Gradient) -> tuple[Gradient, Float[torch.Tensor, " targets"]]:
        """Return the gradient below attention, and the contribution of the biases of attention to each target.

        The gradient may end at a position beyond which no target sees.
        """
        length = gradient.shape[1]
        constant = gradient.new_zeros(len(gradient))
        along = gradient
        if self.after is not None:
            if self.after.bias is not None:
                constant += (gradient @ wide(self.after.bias).to(gradient)).sum(1)
            along = self.after.pull(gradient, self.summed[:length])
        constant += (along @ self.out_bias).sum(1)
        of_z = torch.einsum("hem,bqm->bhqe", self.out, along)
        of_values = self.pattern[:, :length, :length].transpose(1, 2) @ of_z
        of_values = of_values.unflatten(1, (len(self.value), -1)).sum(2)  # heads that share a value
        constant += torch.einsum("bhke,he->b", of_values, self.value_bias)
        of_normed = torch.einsum("hme,bhke->bkm", self.value, of_values)
        constant += self.before.constant(of_normed).sum(1)
        return gradient + self.before.pull(of_normed), constant


@dataclass(frozen=True)
class FrozenPath:
    """The residual stream of one prompt with its attention frozen.

    Attributes:
        attention: the attention of each layer.
        streams: the residual stream at each depth, see `Reading`.
        norms: the norms of each layer before attention, before the MLP and after it.
        causal: whether no position attends to a later one.
    """

    attention: Sequence[Attention]
    streams: Sequence[Stream]
    norms: Sequence[tuple[Norm | None, Norm | None, Norm | None]]
    causal: bool

    @classmethod
    @torch.no_grad()
    def of(cls, lens: Lens, tokens: Int[torch.Tensor, "one pos"]) -> "FrozenPath":
        """Run a prompt and freeze its attention.

        Raises:
            FeatpatchError: the model's layers do not have the standard form, their weights can't be read, or the model computes
                in less than float32.
        """
        lens.check_unhooked()
        if torch.finfo(lens.dtype).bits < 32:
            raise FeatpatchError(
                f"the model computes in {lens.dtype}: expected float32 or float64, in which the inputs of a node sum to its "
                "value; load it with fp.load(..., dtype='float32')"
            )
        made = projections_of(lens, tokens)
        if made is None:
            raise FeatpatchError(
                f"the layers of {lens.name!r} ({lens.kind}) do not have the standard form, or their weights can't be read: "
                "expected attention with separate queries, keys and values, and one MLP per layer without experts; use "
                "fp.rank_features or fp.find_circuit instead, which need neither"
            )
        n = lens.n_layers
        names = ("resid_pre", "z", "pattern", "attn_out")
        hooks = [sites.component(layer, name) for layer in range(n) for name in names]
        read = {hook: x.to(lens.device) for hook, x in lens.read(tokens, [*hooks, sites.resid_post(n - 1)]).items()}
        streams: list[Stream] = []
        for layer in range(n):
            x = wide(read[sites.component(layer, "resid_pre")])[0]
            streams += [x, x + wide(read[sites.component(layer, "attn_out")])[0]]
        streams.append(wide(read[sites.resid_post(n - 1)])[0])
        norms = [(each.layer.norm1, each.layer.norm2, each.layer.post2) for each in made]
        attention = [Attention.of(layer, each, read) for layer, each in enumerate(made)]
        causal = not any(each.pattern.triu(1).any() for each in attention)
        return cls(attention, streams, norms, causal)

    def reading(self, layer: int, x: Float[torch.Tensor, "pos d"]) -> Reading | None:
        """Return how an activation inside a layer reads the residual stream; None if it is neither the stream nor normed."""
        for depth in (2 * layer + 1, 2 * layer):
            stream = self.streams[depth]
            norms = [norm for norm in self.norms[layer][:2] if norm is not None]
            plain = [Norm(norm.centred, None, None, norm.eps) for norm in norms]
            for norm in (None, *norms, *plain):
                found = stream if norm is None else norm(stream)
                if found.shape == x.shape and _same(found, x):
                    return Reading(depth, norm, stream)
        return None

    @torch.no_grad()
    def contributions(
        self, targets: Targets, written: Sequence[Written], skips: Sequence[Skip], columns: int, done: Callable[[int], object]
    ) -> tuple[Float[torch.Tensor, "n columns"], Float[torch.Tensor, " n"]]:
        """Return the contribution of each column, and of the biases of attention and of norms, to each target.

        `done` is called with the number of targets of each batch.
        """
        size = max(1, VALUES // self.streams[0].numel())
        by_depth: dict[int, list[Written]] = defaultdict(list)
        for each in written:
            by_depth[each.depth].append(each)
        found = targets.vectors.new_zeros(len(targets.depths), columns)
        constants = found.new_zeros(len(found))
        order = targets.positions.argsort(stable=True)  # a batch of nearby positions of one depth wastes least
        groups = [order[targets.depths[order] == depth] for depth in targets.depths.unique().tolist()]
        for rows in (rows for group in groups for rows in group.split(size)):
            found[rows], constants[rows] = self._batch(targets.at(rows), by_depth, skips, columns)
            done(len(rows))
        return found, constants

    def _batch(
        self, targets: Targets, written: Mapping[int, Sequence[Written]], skips: Sequence[Skip], columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the contributions to some targets, see `contributions`."""
        n, (length, width) = len(targets.depths), self.streams[0].shape
        if self.causal:
            length = int(targets.positions.max()) + 1
        gradient = targets.vectors.new_zeros(n, length, width)
        found, constants = gradient.new_zeros(n, columns), gradient.new_zeros(n)
        pending: dict[int, torch.Tensor] = {}
        for depth in range(int(targets.depths.max()), -1, -1):
            here = (targets.depths == depth).nonzero()[:, 0]
            gradient[here, targets.positions[here]] += targets.vectors[here]
            if depth in pending:
                gradient = gradient + pending.pop(depth)
            for each in (each for each in written.get(depth, ()) if each.position < length):
                found.index_add_(1, each.columns, gradient[:, each.position] @ each.vectors.T)
            for skip in (skip for skip in skips if skip.depth == depth):
                of_read = skip.pull(gradient)
                constants += skip.reading.constant(of_read).sum(1)
                below = skip.reading.pull(of_read)
                pending[skip.reading.depth] = pending.get(skip.reading.depth, 0) + below
            if depth % 2:
                gradient, constant = self.attention[depth // 2].pull(gradient)
                constants += constant
        return found, constants


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two activations are equal but for rounding in the precision of a model."""
    eps = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    other = other.to(one)
    return bool((one - other).abs().max() <= eps**0.5 * other.abs().max())
