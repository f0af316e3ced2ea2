"""Featpatch's own forward pass over what a patch can change: later layers, later positions, and only the answer at the end.

A patch at position p of layer l leaves the layers below l and the positions before p as they are in the base run
(the model is causal). So a unit of N patches has N * (a - p + 1) rows, a being the answer position, and

    the first layer with attention   computes queries, keys and values of the patched rows alone
    the layers between               compute all rows
    the last layer                   computes keys and values of all rows, and everything else of the answer row alone

Rows of all units lie in one matrix `[rows, d_model]`; only attention works unit by unit.

Patched runs share the keys and values of one base run up to the first patched position:

    scores = [q . k_base(0..p-1) | q . k_own(p..a)] * scale,  soft-capped, masked;   z = softmax(scores) [v_base | v_own]

The base run's part is one matrix product per head for all patches; none of it is copied.

A patch at several hook points enters at the lowest of them; the pass makes the other changes on its way up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float

from featpatch.engine.cost import suffix_flops
from featpatch.engine.patches import BaseRun, Block, Changes, Entry, Rows, Span, Trace, Unit, entering, entry
from featpatch.model.layer import Layer, Stack, soft_capped
from featpatch.model.lens import Lens
from featpatch.nodes import Combine

BaseHeads = Float[torch.Tensor, "prefix kv_heads d_head"]


def attend(
    layer: Layer,
    q: Float[torch.Tensor, "patches queries heads d_head"],
    k: Float[torch.Tensor, "patches own kv_heads d_head"],
    v: Float[torch.Tensor, "patches own kv_heads d_head"],
    base_k: BaseHeads,
    base_v: BaseHeads,
) -> Float[torch.Tensor, "patches queries width"]:
    """Return the output of attention before W_O, with heads side by side.

    The queries are those of the last `queries` positions of each patch's own part. Heads that share keys (grouped-query
    attention) are treated as more queries of one key head.

    Args:
        layer: the layer.
        q, k, v: the queries, keys and values of the patched positions.
        base_k, base_v: the keys and values of the base run at the positions before.
    """
    patches, queries, heads, width = q.shape
    own, kv_heads, prefix = k.shape[1], k.shape[2], base_k.shape[0]
    group = heads // kv_heads
    rows = q.unflatten(2, (kv_heads, group)).permute(2, 0, 3, 1, 4).reshape(kv_heads, patches, group * queries, width)
    k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    scores = rows.new_empty(kv_heads, patches, group * queries, prefix + own)
    if prefix:
        scores[..., :prefix] = (rows.flatten(1, 2) @ base_k.permute(1, 2, 0)).view(kv_heads, patches, -1, prefix)
    scores[..., prefix:] = rows @ k.transpose(-1, -2)
    scores = soft_capped(scores.mul_(layer.scale), layer.softcap)
    unseen = layer.unseen(queries, prefix + own)
    if unseen is not None:
        scores.unflatten(2, (group, queries)).masked_fill_(unseen, -torch.inf)
    wide = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    pattern = torch.softmax(scores, -1, dtype=wide).to(v.dtype)
    z = pattern[..., prefix:] @ v
    if prefix:
        z += (pattern[..., :prefix].flatten(1, 2) @ base_v.transpose(0, 1)).view_as(z)
    return z.unflatten(2, (group, queries)).permute(1, 3, 0, 2, 4).reshape(patches, queries, heads * width)


Columns = Sequence[int] | None
"""Token ids whose logits are needed, or None for the whole vocabulary."""


Hooks = Mapping[Entry, Sequence[tuple[str, Combine]]]
"""The hook points that are patched and the meanings of these patches, see `entering`."""

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

    def rows(self, unit: Unit) -> int:
        """Return the number of rows that one patch of a unit takes."""
        return unit.block.run.answer - unit.first + 1

    def flops(self, unit: Unit, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products, if `columns` logits are read."""
        return suffix_flops(self.stack, *self.group(unit.block), unit, columns)

    def baseline(self, run: BaseRun, columns: Columns) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        trace = self._trace(run)
        return self.stack.head(trace[len(self.stack.layers), "pre"][run.answer, None], self._ids(columns))

    def logits(self, units: Sequence[Unit], columns: Sequence[Columns]) -> list[Float[torch.Tensor, "_ _"]]:
        """Return the logits of every patch at its answer position; all units must be of one group."""
        by_span = groupby(units, key=lambda unit: (unit.block.run, unit.first))
        spans = [Span(self._trace(run), [*some], first, run.answer) for (run, first), some in by_span]
        hooks = entering(units)
        layer, rows, x = self._enter(self.group(units[0].block), spans, hooks)
        final = self._at_answer(rows, x) if layer == len(self.stack.layers) else self._run(layer, rows, x, hooks)
        found: list[torch.Tensor] = []
        alike = [[*group] for _, group in groupby(zip(units, columns, strict=True), key=itemgetter(1))]
        sizes = [[len(unit.patches) for unit, _ in group] for group in alike]
        for group, parts, x in zip(alike, sizes, final.split([sum(parts) for parts in sizes]), strict=True):
            found += self.stack.head(x, self._ids(group[0][1])).split(parts)
        return found

    def prepare(self, runs: Sequence[BaseRun]) -> None:
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
                    [attend(layer, a[None], b[None], c[None], b[:0], c[:0])[0]
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

    def _trace(self, run: BaseRun) -> Trace:
        self.prepare([run])
        return self.traces[run]

    def _enter(self, place: Entry, spans: Sequence[Span], hooks: Hooks) -> tuple[int, Rows, torch.Tensor]:
        """Make the changes before the first layer with attention; return its index, the changed rows, and its input there."""
        index, first = place
        start = index if first == "pre" else index + 1
        places = [place] if first == "pre" else [(index, "z"), (index, "mid"), (start, "pre")]
        moved = {each: [Changes.of(spans, *patched) for patched in hooks.get(each, ())] for each in places}
        every = [one.rows for each in moved.values() for one in each]
        rows = every[0] if len(every) == 1 else Rows.union(every)

        def make(x: torch.Tensor, at: Entry, before: torch.Tensor | None) -> torch.Tensor:
            for one in moved[at]:
                one.apply(x, rows.find(one.rows), before)
            return x

        pre = rows.base(index, "pre")
        if first == "pre":
            x = make(pre, place, None)
        else:
            layer, mid = self.stack.layers[index], rows.base(index, "mid")
            if moved[index, "z"]:
                z = rows.base(index, "z")
                mid = pre + layer.attention_output(make(z, (index, "z"), None))
            mid = make(mid, (index, "mid"), pre)
            here = mid.device  # the next layer may be on another device
            out = rows.base(start, "pre").to(here) - rows.base(index, "mid") if layer.parallel else layer.mlp_output(mid)
            x = make(mid + out, (start, "pre"), mid)
        return start, rows, x.to(spans[0].trace[start, "pre"].device)

    def _run(self, start: int, rows: Rows, x: torch.Tensor, hooks: Hooks) -> torch.Tensor:
        """Return the final residual stream `[patches of all spans, d_model]` at the answer position.

        Args:
            start: the first layer.
            rows: the rows of its input that are changed.
            x: the residual stream in these rows.
            hooks: the hook points at which changes enter.
        """
        last, spans = len(self.stack.layers) - 1, rows.spans

        def change(x: torch.Tensor, place: Entry, before: torch.Tensor) -> None:
            for patched in hooks.get(place, ()):
                changes = Changes.of(spans, *patched)
                changes = changes.at_answer() if ends else changes
                changes.apply(x, changes.rows.number(answer_only=ends), before)

        x, heads = self._first(start, rows, x, answer_only=start == last)
        for index in range(start, last + 1):
            layer, ends = self.stack.layers[index], index == last
            if index > start:
                x, heads = self._next(index, spans, x, answer_only=ends)
            parts = [
                attend(layer, q, k, v, span.trace[index, "key"][: span.first], span.trace[index, "value"][: span.first])
                for span, (q, k, v) in zip(spans, heads, strict=True)
            ]
            z = torch.cat([part.flatten(0, 1) for part in parts])
            change(z, (index, "z"), z)
            mid = x + layer.attention_output(z)
            change(mid, (index, "mid"), x)
            x = mid + layer.mlp_output(x if layer.parallel else mid)
            change(x, (index + 1, "pre"), mid)
        return x

    def _first(
        self, index: int, rows: Rows, x: torch.Tensor, *, answer_only: bool
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Return the residual stream, queries, keys and values of the base run with the changed rows `x` inserted."""
        layer, sizes = self.stack.layers[index], [*rows.sizes]
        y, patch, position = layer.attention_input(x), rows.patch.to(x.device), rows.position.to(x.device)
        fresh = (x, layer.queries(y, position), *layer.keys_values(y, position))
        stream, heads = [], []
        for span, patches, positions, *values in zip(
            rows.spans, *(part.split(sizes) for part in (patch, position, *fresh)), strict=True
        ):
            at = (patches, positions - span.first)
            parts = [
                span.base(span.trace[index, name]).index_put(at, value)
                for name, value in zip(("pre", "query", "key", "value"), values, strict=True)
            ]
            if answer_only:
                parts[:2] = [part[:, -1:] for part in parts[:2]]
            stream.append(parts[0].flatten(0, 1))
            heads.append((parts[1], parts[2], parts[3]))
        return torch.cat(stream), heads

    def _next(
        self, index: int, spans: Sequence[Span], x: torch.Tensor, *, answer_only: bool
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
        """Return the residual stream, queries, keys and values of all rows.

        With `answer_only`, the residual stream and queries are those of the answer rows alone.
        """
        layer, sizes = self.stack.layers[index], [span.rows for span in spans]
        x = x.to(layer.device)
        positions = torch.cat([torch.arange(s.first, s.answer + 1).repeat(s.patches) for s in spans]).to(x.device)
        y = layer.attention_input(x)
        k, v = layer.keys_values(y, positions)
        if answer_only:
            ends = torch.cat([torch.full((s.patches,), s.length) for s in spans]).cumsum(0).to(x.device) - 1
            x, y, positions = x[ends], y[ends], positions[ends]
            q = layer.queries(y, positions).split([span.patches for span in spans])
        else:
            q = layer.queries(y, positions).split(sizes)
        each = zip(spans, q, k.split(sizes), v.split(sizes), strict=True)
        return x, [tuple(part.unflatten(0, (span.patches, -1)) for part in parts) for span, *parts in each]

    def _at_answer(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """Return the final residual stream at the answer position of patches that enter after the last layer, in rows `x`."""
        final = []
        parts = (part.split([*rows.sizes]) for part in (rows.patch.to(x.device), rows.position.to(x.device), x))
        for span, patches, positions, values in zip(rows.spans, *parts, strict=True):
            whole = span.base(span.trace[len(self.stack.layers), "pre"])
            final.append(whole.index_put((patches, positions - span.first), values)[:, -1])
        return torch.cat(final)
