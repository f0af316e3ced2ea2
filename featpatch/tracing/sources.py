"""The nodes of an attribution graph that write to the residual stream: active features, errors and embedded tokens."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.layer import Norm
from featpatch.model.lens import Lens
from featpatch.model.projections import wide
from featpatch.nodes import Node
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary
from featpatch.tracing.frozen import FrozenPath, Reading, Skip, Targets, Written


@dataclass(frozen=True)
class Sources:
    """The vectors that are written to the residual stream on one prompt, and the places at which its features read.

    Attributes:
        features, errors, tokens: the nodes, each with its position. Features are sorted by layer, position and index.
        values: the activation of each feature.
        targets: the encoder of each feature as a function of the residual stream.
        constants: the contribution of the bias of the encoder, and of the norm in front of it, to each feature.
        written: all that is written: the columns are those of features, errors and tokens, and a last one for biases.
        skips: the skip paths of transcoders.
    """

    features: tuple[Node, ...]
    errors: tuple[Node, ...]
    tokens: tuple[Node, ...]
    values: torch.Tensor
    targets: Targets
    constants: torch.Tensor
    written: tuple[Written, ...]
    skips: tuple[Skip, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes in the order of their columns."""
        return (*self.features, *self.errors, *self.tokens)


@torch.no_grad()
def sources(lens: Lens, path: FrozenPath, found: Sequence[Dictionary], tokens: torch.Tensor) -> Sources:
    """Read transcoders on a prompt.

    Raises:
        FeatpatchError: a transcoder does not read the residual stream, does not write to an MLP's output, or its features are
            not linear up to a threshold; or two write to the same MLP.
    """
    return _Builder(lens, path, found, tokens).made()


class _Builder:
    """Reads transcoders on a prompt, see `sources`."""

    def __init__(self, lens: Lens, path: FrozenPath, found: Sequence[Dictionary], tokens: torch.Tensor) -> None:
        self.lens, self.path, self.found, self.tokens = lens, path, found, tokens
        owners: dict[int, str] = {}
        for each in self.found:
            _check(each)
            for hook in each.outputs:
                layer = sites.layer_of(hook)
                if layer in owners:
                    raise FeatpatchError(
                        f"{owners[layer]!r} and {each.name!r} both write to the MLP of layer {layer}: expected one transcoder "
                        "for each; leave one out"
                    )
                owners[layer] = each.name
        hooks = {sites.component(layer, "mlp_out") for layer in range(lens.n_layers) if lens.has_mlp(layer)}
        hooks |= {hook for each in self.found for hook in each.hooks}
        hooks |= {sites.resid_pre(0), *([sites.POSITIONS] if lens.adds_positions else [])}
        self.read = {hook: x.to(lens.device) for hook, x in lens.read(self.tokens, sorted(hooks)).items()}
        self.splits = {each.name: _plain(each, each.split(self.read)) for each in self.found}

    def made(self) -> Sources:
        """Collect all nodes."""
        n, device = self.tokens.shape[1], self.lens.device
        parts = [part for each in self.found for part in self._features(each)]
        key = [(sites.layer_of(part.reads), int(at), int(number)) for part in parts for at, number in part.entries]
        order = sorted(range(len(key)), key=key.__getitem__)
        features = [node for part in parts for node in part.nodes]
        column = torch.empty(len(order), dtype=torch.long, device=device)
        column[torch.tensor(order, dtype=torch.long, device=device)] = torch.arange(len(order), device=device)
        written: list[Written] = []
        start = 0
        for part in parts:
            written += part.writes(column[start : start + len(part.entries)])
            start += len(part.entries)
        layers = [layer for layer in range(self.lens.n_layers) if self.lens.has_mlp(layer)]
        errors: list[Node] = []
        end = len(order) + (len(layers) + 1) * n
        for layer in layers:
            node, error, bias = self._error(layer)
            first = len(order) + len(errors)
            for at in range(n):
                both = torch.tensor([first + at, end], device=device)
                written.append(Written(2 * layer + 2, at, both, torch.stack([error[at], bias[at]])))
            errors += [Node(node.site, node.kind, None, at, node.sae) for at in range(n)]
        written += self._tokens(len(order) + len(errors), end)
        stacked = [torch.cat([getattr(part, name) for part in parts])[order] if parts else self._none(name)
                   for name in ("values", "depths", "positions", "vectors", "constants")]  # fmt: skip
        return Sources(
            tuple(features[number] for number in order),
            tuple(errors),
            tuple(Node(sites.EMBEDDING, "activation", None, at) for at in range(n)),
            stacked[0],
            Targets(*stacked[1:4]),
            stacked[4],
            tuple(written),
            tuple(skip for each in self.found for skip in self._skips(each)),
        )

    def _none(self, name: str) -> torch.Tensor:
        empty = self.path.streams[0][:0]
        if name in ("depths", "positions"):
            return empty.new_zeros(0, dtype=torch.long)
        return empty if name == "vectors" else empty[:, 0]

    def _through(self, hook: str, vectors: torch.Tensor) -> torch.Tensor:
        """Return what vectors `[pos, ..., d]` at an output add to the residual stream, through the norm after it, if any."""
        norm = self._after(hook)
        if norm is None:
            return vectors
        at = wide(self.read[hook])[0]
        return norm.scaled(vectors, at.reshape(len(at), *[1] * (vectors.ndim - 2), at.shape[-1]))

    def _after(self, hook: str) -> Norm | None:
        return None if sites.is_component(hook, "mlp_out") else self.path.norms[sites.layer_of(hook)][2]

    def _reading(self, each: Dictionary, hook: str, outputs: Sequence[str]) -> Reading:
        """Return how a dictionary reads the residual stream at a hook point, from which it writes to `outputs`."""
        found = self.path.reading(sites.layer_of(hook), wide(self.read[hook])[0].to(self.path.streams[0]))
        if found is None:
            raise FeatpatchError(
                f"{each.name!r} reads {hook!r}: expected the residual stream or the output of a norm of it, such as the input "
                f"of an MLP, {sites.read_by_mlp(sites.layer_of(hook))!r}; use a transcoder of the MLP's input"
            )
        for output in outputs:
            if found.depth >= 2 * sites.layer_of(output) + 2:
                raise FeatpatchError(f"{each.name!r} writes to {output!r}, below what it reads: expected it to write above")
        return found

    def _features(self, each: Dictionary) -> "Iterator[_Part]":
        """Yield the active features of each group of a dictionary."""
        active = self.splits[each.name].features[0]
        for group in range(each.codec.groups):
            own = slice(group * each.per_group, (group + 1) * each.per_group)
            entries = active[:, own].nonzero() + torch.tensor([0, own.start], device=active.device)
            if not len(entries):
                continue
            numbers, back = entries[:, 1].unique(return_inverse=True)
            encoders = each.codec.encoders(numbers)
            if encoders is None:
                raise FeatpatchError(
                    f"{each.name!r} ({each.codec.kind}) has an encoder that is not a matrix, a bias and a threshold: expected "
                    "a transcoder of sae-lens, circuit-tracer or sparsify without normalisation at run time; leave it out"
                )
            like = self.path.streams[0]
            rows, biases = (x.to(like)[back.to(like.device)] for x in encoders)
            decoders = {hook: x.to(like) for hook, x in each.by_output(each.directions(numbers)).items()}
            hook = each.inputs[group if len(each.inputs) > 1 else 0]
            ends = each.outputs[group if each.codec.groups > 1 else 0 :]
            reading = self._reading(each, hook, ends)
            values, positions = active[entries[:, 0], entries[:, 1]].to(like), entries[:, 0].to(like.device)
            outputs: dict[int, Callable[[int, torch.Tensor], torch.Tensor]] = {}
            for output in ends:
                outputs[2 * sites.layer_of(output) + 2] = self._writer(output, decoders[output], back.to(like.device), values)
            yield _Part(
                hook,
                [(int(at), int(number)) for at, number in entries.tolist()],
                [each.node(number, at) for at, number in entries.tolist()],
                values,
                torch.full_like(positions, reading.depth),
                positions,
                reading.pull(rows, reading.stream[positions]),
                biases + reading.constant(rows),
                outputs,
            )

    def _writer(
        self, output: str, decoders: torch.Tensor, back: torch.Tensor, values: torch.Tensor
    ) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Return a function from a position and some entries to what they write to the residual stream."""
        norm = self._after(output)

        def write(at: int, some: torch.Tensor) -> torch.Tensor:
            vectors = decoders[back[some]] * values[some, None]
            return vectors if norm is None else norm.scaled(vectors, wide(self.read[output])[0, at])

        return write

    def _error(self, layer: int) -> tuple[Node, torch.Tensor, torch.Tensor]:
        """Return the node of the error of a layer's MLP, and the errors and the biases that it writes, `[pos, d_model]`."""
        like = self.path.streams[0]
        for each in self.found:
            for hook in each.outputs:
                if sites.layer_of(hook) == layer:
                    split = self.splits[each.name]
                    state = {name: torch.zeros_like(value) for name, value in split.state.items()}
                    bias = each.by_output(each.decode(torch.zeros_like(split.features), state))[hook][0].to(like)
                    error = self._through(hook, each.by_output(split.error)[hook][0].to(like))
                    bias, norm = self._through(hook, bias), self._after(hook)
                    if norm is not None and norm.bias is not None:
                        bias = bias + wide(norm.bias).to(bias)
                    return Node(hook, "error", None, 0, each.name), error, bias
        hook = sites.component(layer, "mlp_out")
        whole = wide(self.read[hook])[0].to(like)
        return Node(hook, "activation", None, 0), whole, torch.zeros_like(whole)

    def _tokens(self, first: int, end: int) -> Iterator[Written]:
        """Yield what each token adds to the residual stream; learned positions count as biases."""
        like = self.path.streams[0]
        start = wide(self.read[sites.resid_pre(0)])[0].to(like)
        places = torch.zeros_like(start)
        if self.lens.adds_positions:
            places = places + wide(self.read[sites.POSITIONS])[0].to(like)
        for at in range(len(start)):
            columns = torch.tensor([first + at, end], device=like.device)
            yield Written(0, at, columns, torch.stack([start[at] - places[at], places[at]]))

    def _skips(self, each: Dictionary) -> Iterator[Skip]:
        """Yield the skip paths of a dictionary, one for each hook point that it writes."""
        if not self.splits[each.name].state:
            return
        like = self.path.streams[0]
        if each.codec.pull_skip(like.new_zeros(1, each.codec.d_out)) is None:
            raise FeatpatchError(
                f"{each.name!r} ({each.codec.kind}) has a skip path whose matrix is not known: expected the transcoder's own "
                "class, or fp.load_sae from its folder; leave it out"
            )
        inputs = [like.shape[-1]] * len(each.inputs) if len(each.inputs) > 1 else [each.codec.d_in]
        for number, hook in enumerate(each.outputs):
            source = number if len(each.inputs) > 1 else 0
            reading = self._reading(each, each.inputs[source], [hook])
            yield Skip(2 * sites.layer_of(hook) + 2, self._skip(each, number, inputs, source), reading)

    def _skip(
        self, each: Dictionary, number: int, inputs: Sequence[int], source: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from the gradient at one output to that at the input of the same layer."""
        norm, hook = self._after(each.outputs[number]), each.outputs[number]

        def pull(gradient: torch.Tensor) -> torch.Tensor:
            if norm is not None:
                gradient = norm.pull(gradient, wide(self.read[hook])[0, : gradient.shape[1]])
            flat = [gradient.new_zeros(*gradient.shape[:-1], width) for width in each.widths]
            flat[number] = gradient
            found = each.codec.pull_skip(torch.cat(flat, dim=-1))
            assert found is not None
            return found.split(list(inputs), dim=-1)[source]

        return pull


@dataclass(frozen=True)
class _Part:
    """The active features of a group: the hook point that it reads, and an entry for each position and feature.

    Attributes:
        outputs: by depth, the function from a position and entries to what they write.
    """

    reads: str
    entries: Sequence[tuple[int, int]]
    nodes: Sequence[Node]
    values: torch.Tensor
    depths: torch.Tensor
    positions: torch.Tensor
    vectors: torch.Tensor
    constants: torch.Tensor
    outputs: Mapping[int, Callable[[int, torch.Tensor], torch.Tensor]]

    def writes(self, columns: torch.Tensor) -> Iterator[Written]:
        """Yield what the features write, given their columns."""
        at: dict[int, list[int]] = defaultdict(list)
        for number, (position, _) in enumerate(self.entries):
            at[position].append(number)
        for depth, write in self.outputs.items():
            for position, numbers in at.items():
                some = torch.tensor(numbers, device=columns.device)
                yield Written(depth, position, columns[some], write(position, some))


def _check(each: Dictionary) -> None:
    """Raise a FeatpatchError unless a dictionary replaces MLPs and adds each feature along a fixed direction."""
    wrong = next((hook for hook in each.outputs if not sites.is_mlp_output(hook)), None)
    if wrong is not None:
        raise FeatpatchError(
            f"{each.name!r} writes to {wrong!r}: expected transcoders, which write to the output of an MLP, such as "
            f"{sites.component(0, 'mlp_out')!r}; load transcoders or a cross-layer transcoder"
        )
    if set(each.inputs) & set(each.outputs):
        raise FeatpatchError(
            f"{each.name!r} reads what it writes: expected a transcoder, which reads the input of an MLP and writes its output"
        )
    if not each.behaviour.linear or each.behaviour.scaled:
        raise FeatpatchError(
            f"{each.name!r} ({each.codec.kind}) has a decoder that is not linear: expected one that adds each feature along a "
            "fixed direction; leave it out"
        )
    if len(each.inputs) > 1 and each.codec.groups != len(each.inputs):
        raise FeatpatchError(
            f"{each.name!r} ({each.codec.kind}) has features that read several hook points: expected a transcoder or a "
            "cross-layer transcoder, whose features read one"
        )


def _plain(each: Dictionary, split: Split) -> Split:
    """Return a split; raise a FeatpatchError if decoding needs more than the features and a skip path."""
    others = set(split.state) - {"skip"}
    if others:
        raise FeatpatchError(
            f"{each.name!r} ({each.codec.kind}) decodes with {', '.join(sorted(others))} of each token: expected a transcoder "
            "without normalisation at run time; leave it out"
        )
    return split
