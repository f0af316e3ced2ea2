"""Featpatch's own forward pass over what a patch can change: later layers, later positions, and only the answer at the end.

A patch at position p of layer l leaves the layers below l and the positions before p as they are in the base run
(the model is causal). So a unit, N patches of one base run with the same p, has N * (a - p + 1) rows, where a is the answer
position, and

    the first layer with attention   computes queries, keys and values of the patched rows alone
    the layers between               compute all rows
    the last layer                   computes keys and values of all rows, and everything else of the answer row alone

Rows of all units lie in one matrix `[rows, d_model]`. Only attention is computed for groups of units with the same p and a.

Patched runs share the keys and values of one base run up to the first patched position:

    scores = [q . k_base(0..p-1) | q . k_own(p..a)] * scale,  soft-capped, masked;   z = softmax(scores) [v_base | v_own]

The base run's part is one matrix product per head for all its patches in a group; none of it is copied.

A patch at several hook points enters at the lowest of them; the pass makes the other changes on its way up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float

from featpatch.engine.cost import suffix_flops
from featpatch.engine.patches import BaseRun, Block, Entry, Matrix, Trace, entry, in_groups
from featpatch.model.layer import Layer, Stack, soft_capped
from featpatch.model.lens import Lens

BaseHeads = Float[torch.Tensor, "prefix kv_heads d_head"]


def attend(
    layer: Layer,
    q: Float[torch.Tensor, "patches queries heads d_head"],
    k: Float[torch.Tensor, "patches own kv_heads d_head"],
    v: Float[torch.Tensor, "patches own kv_heads d_head"],
    bases: Sequence[tuple[int, BaseHeads, BaseHeads]] = (),
) -> Float[torch.Tensor, "patches queries width"]:
    """Return the output of attention before W_O, with heads side by side.

    The queries are those of the last `queries` positions of each patch's own part. Heads that share keys (grouped-query
    attention) are treated as more queries of one key head.

    Args:
        layer: the layer.
        q, k, v: the queries, keys and values of the patched positions.
        bases: for each base run, in order, the number of its patches, and its keys and values at the positions before.
    """
    patches, queries, heads, width = q.shape
    own, kv_heads, prefix = k.shape[1], k.shape[2], len(bases[0][1]) if bases else 0
    ends = accumulate(size for size, _, _ in bases)
    each = [(slice(end - of[0], end), of[1], of[2]) for of, end in zip(bases, ends, strict=True)] if prefix else []
    group = heads // kv_heads
    rows = q.unflatten(2, (kv_heads, group)).permute(2, 0, 3, 1, 4).reshape(kv_heads, patches, group * queries, width)
    k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    scores = rows.new_empty(kv_heads, patches, group * queries, prefix + own)
    for some, base_k, _ in each:
        of_base = rows[:, some].flatten(1, 2) @ base_k.permute(1, 2, 0)
        scores[:, some, :, :prefix] = of_base.unflatten(1, (-1, group * queries))
    scores[..., prefix:] = rows @ k.transpose(-1, -2)
    scores = soft_capped(scores.mul_(layer.scale), layer.softcap)
    unseen = layer.unseen(queries, prefix + own)
    if unseen is not None:
        scores.unflatten(2, (group, queries)).masked_fill_(unseen, -torch.inf)
    wide = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    pattern = torch.softmax(scores, -1, dtype=wide).to(v.dtype)
    z = pattern[..., prefix:] @ v
    for some, _, base_v in each:
        of_base = pattern[:, some, :, :prefix].flatten(1, 2) @ base_v.transpose(0, 1)
        z[:, some] += of_base.unflatten(1, (-1, group * queries))
    return z.unflatten(2, (group, queries)).permute(1, 3, 0, 2, 4).reshape(patches, queries, heads * width)


Columns = tuple[int, ...] | None
"""Token ids whose logits are needed, or None for the whole vocabulary."""


PLACES = ("pre", "z", "mid")
"""The places of a layer, see `sites.ENTRIES`, in the order in which the forward pass reaches them."""


@dataclass(frozen=True)
class SuffixPath:
    """Featpatch's own, fast forward pass as a way to run patches, see `PatchPath`."""

    lens: Lens
    stack: Stack
    traces: "WeakKeyDictionary[BaseRun, Trace]" = field(default_factory=WeakKeyDictionary)

    def group(self, block: Block) -> Entry:
        """Return the group of a block, the lowest place where it enters; blocks of one group may share a forward pass."""
        return min(map(entry, block.deltas), key=lambda place: (place[0], PLACES.index(place[1])))

    def rows(self, unit: Block) -> int:
        """Return the number of rows that one patch of a unit takes."""
        return unit.run.answer - unit.first + 1

    def flops(self, unit: Block, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products, if `columns` logits are read."""
        return suffix_flops(self.stack, *self.group(unit), unit, columns)

    def baseline(self, run: BaseRun, columns: Columns) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        self.prepare([run])
        final = self.traces[run][len(self.stack.layers), "pre"]
        return self.stack.head(final[run.answer, None], self._ids(columns))

    def logits(self, units: Sequence[Block], columns: Sequence[Columns]) -> list[Float[torch.Tensor, "_ _"]]:
        """Return the logits of every patch at its answer position; all units must be of one group."""
        self.prepare(dict.fromkeys(unit.run for unit in units))
        matrix = Matrix(units, {unit.run: self.traces[unit.run] for unit in units})
        layer, rows, x = self._enter(self.group(units[0]), matrix)
        final = self._run(layer, rows, x, matrix)
        return in_groups(columns, final.split(matrix.sizes), lambda unit, x: self.stack.head(x, self._ids(columns[unit])))

    def prepare(self, runs: Iterable[BaseRun]) -> None:
        """Run the base runs together, from the lowest layer at which patches enter, and keep their traces."""
        groups: dict[int, list[BaseRun]] = {}
        for run in runs:
            if run not in self.traces:
                groups.setdefault(min(run.resid), []).append(run)
        for start, together in groups.items():
            lengths = [len(run.tokens) for run in together]
            x = torch.cat([run.resid[start] for run in together])
            traces: list[Trace] = [{} for _ in together]
            for index in range(start, len(self.stack.layers)):
                layer = self.stack.layers[index]
                x = x.to(layer.device)
                positions = torch.cat([torch.arange(length) for length in lengths]).to(x.device)
                y = layer.attention_input(x)
                q, (k, v) = layer.queries(y, positions), layer.keys_values(y, positions)
                z = torch.cat(
                    [attend(layer, a[None], b[None], c[None])[0]
                     for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)]
                )  # fmt: skip
                mid = x + layer.attention_output(z)
                parts = (x, mid, z, q, k, v)
                for name, values in zip(("pre", "mid", "z", "query", "key", "value"), parts, strict=True):
                    for trace, value in zip(traces, values.split(lengths), strict=True):
                        trace[index, name] = value
                x = mid + layer.mlp_output(x if layer.parallel else mid)
            for run, trace, value in zip(together, traces, x.split(lengths), strict=True):
                trace[len(self.stack.layers), "pre"] = value
                self.traces[run] = trace

    def _ids(self, columns: Columns) -> torch.Tensor | None:
        return None if columns is None else torch.tensor(columns, device=self.stack.head.weight.device)

    def _enter(self, place: Entry, matrix: Matrix) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Make the changes before the first layer with attention; return its index, the changed rows, and its input there."""
        index, first = place
        start = index if first == "pre" else index + 1
        places = [place] if first == "pre" else [(index, "z"), (index, "mid"), (start, "pre")]
        entering = {each: matrix.changes(each) for each in places}
        rows = torch.cat([changed for changes in entering.values() for changed, _ in changes.values()]).unique()

        def make(x: torch.Tensor, at: Entry, before: torch.Tensor | None) -> torch.Tensor:
            return matrix.change(entering[at], x, rows, before)

        pre = matrix.base(index, "pre", rows)
        if first == "pre":
            x = make(pre, place, None)
        else:
            layer, mid = self.stack.layers[index], matrix.base(index, "mid", rows)
            if entering[index, "z"]:
                z = matrix.base(index, "z", rows)
                mid = pre + layer.attention_output(make(z, (index, "z"), None))
            mid = make(mid, (index, "mid"), pre)
            here, after = mid.device, matrix.base(start, "pre", rows)  # the next layer may be on another device
            out = after.to(here) - matrix.base(index, "mid", rows) if layer.parallel else layer.mlp_output(mid)
            x = make(mid + out, (start, "pre"), mid).to(after.device)
        return start, rows, x

    def _run(self, start: int, rows: torch.Tensor, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Return the final residual stream `[patches, d_model]` at the answer position.

        Args:
            start: the first layer with attention; the number of layers if there is none.
            rows: the rows of its input that are changed.
            x: the residual stream in these rows.
            matrix: all rows.
        """
        last = len(self.stack.layers) - 1
        if start > last:
            return matrix.inserted(start, "pre", rows, x)[matrix.ends.to(x.device)]

        def change(x: torch.Tensor, place: Entry, before: torch.Tensor) -> None:
            matrix.change(matrix.changes(place), x, matrix.ends if ends else None, before)

        for index in range(start, last + 1):
            layer, ends = self.stack.layers[index], index == last
            if index == start:
                x, q, k, v = self._first(index, rows, x, matrix, answer_only=ends)
            else:
                x, q, k, v = self._next(index, x, matrix, answer_only=ends)
            z = self._attention(index, q, k, v, matrix)
            change(z, (index, "z"), z)
            mid = x + layer.attention_output(z)
            change(mid, (index, "mid"), x)
            x = mid + layer.mlp_output(x if layer.parallel else mid)
            change(x, (index + 1, "pre"), mid)
        return x

    def _first(
        self, index: int, rows: torch.Tensor, x: torch.Tensor, matrix: Matrix, *, answer_only: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return the residual stream, queries, keys and values of the base runs with those of the changed rows inserted.

        With `answer_only`, the residual stream and queries are those of the answer rows alone, also in `_next`.
        """
        layer, position = self.stack.layers[index], matrix.positions[rows].to(x.device)
        y = layer.attention_input(x)
        changed = (x, layer.queries(y, position), *layer.keys_values(y, position))
        names = ("pre", "query", "key", "value")
        x, q, k, v = (matrix.inserted(index, name, rows, values) for name, values in zip(names, changed, strict=True))
        ends = matrix.ends.to(x.device)
        return (x[ends], q[ends], k, v) if answer_only else (x, q, k, v)

    def _next(self, index: int, x: torch.Tensor, matrix: Matrix, *, answer_only: bool) -> tuple[torch.Tensor, ...]:
        """Return the residual stream, queries, keys and values of all rows."""
        layer = self.stack.layers[index]
        x = x.to(layer.device)
        y, positions = layer.attention_input(x), matrix.positions.to(x.device)
        k, v = layer.keys_values(y, positions)
        if answer_only:
            ends = matrix.ends.to(x.device)
            x, y, positions = x[ends], y[ends], positions[ends]
        return x, layer.queries(y, positions), k, v

    def _attention(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Return the output of attention before W_O, `[rows, width]`, for queries of all rows or of the answer rows alone."""
        found = []
        row = patch = 0
        for first, last, runs in matrix.groups:
            bases = [(size, trace[index, "key"][:first], trace[index, "value"][:first]) for trace, size in runs]
            size = sum(of_run for of_run, _, _ in bases)
            rows, patches = slice(row, row + size * (last - first + 1)), slice(patch, patch + size)
            parts = (q[rows if len(q) == len(k) else patches], k[rows], v[rows])
            by_patch = [part.unflatten(0, (size, -1)) for part in parts]
            found.append(attend(self.stack.layers[index], by_patch[0], by_patch[1], by_patch[2], bases).flatten(0, 1))
            row, patch = rows.stop, patches.stop
        return torch.cat(found)
