"""The base class of graphs: clean runs in which any set of nodes or edges can be ablated together."""

import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.circuits.attribution import STEPPED, STEPS, Point, Scores, points_of
from featpatch.circuits.clean_runs import Array, CleanRuns
from featpatch.effects.collector import provenance
from featpatch.engine.journal import Journal, batch_key
from featpatch.engine.sweep import LONG
from featpatch.errors import FeatpatchError, counted
from featpatch.files import as_path
from featpatch.metrics import check_gap
from featpatch.nodes import Node

TOKENS_AT_ONCE = 4096
"""The largest number of tokens that go through the model together."""

FLAT = 1e-4
"""The value of a metric that compares with the clean run, as a share of that with everything ablated, up to which its gradient
counts as zero."""

MASK_BYTES, MASKS_AT_ONCE = 1 << 20, 256
"""The largest size and number of the masks that are made together."""


def announcing(bar: "tqdm[Any]", cost: int, busy: Callable[[], float]) -> Callable[[int, int], None]:
    """Return a function that updates a bar after each part and, once, says how long the rest will take if it is long.

    It takes the number of finished items and their cost. The estimate is made after the first part that is not read from a
    journal.

    Args:
        bar: the progress bar.
        cost: the cost of all parts, in any unit.
        busy: returns the number of seconds that were spent on parts so far.
    """
    before, left, told = busy(), cost, False

    def done(items: int, spent: int) -> None:
        nonlocal left, told
        bar.update(items)
        left -= spent
        if told or busy() == before:
            return
        told, seconds = True, (busy() - before) * left / spent
        if seconds > LONG and not bar.disable:
            about = timedelta(seconds=round(seconds))
            bar.write(f"about {about} left (estimated from the first {items:,} of {bar.total:,})", file=sys.stderr)

    return done


@dataclass(eq=False, repr=False)
class Graph(CleanRuns):
    """The clean runs of some pairs, in which all items that are not kept are ablated.

    Attributes:
        items: all nodes, or all edges, that can be ablated.
    """

    items: tuple[Node, ...] = ()
    _known: dict[bytes, Array] = field(default_factory=dict, init=False, repr=False)
    _journal: Journal | None = field(default=None, init=False, repr=False)
    _busy: float = field(default=0.0, init=False, repr=False)

    def values(self, kept: Sequence[Iterable[Node]], *, progress: bool = False) -> Float[np.ndarray, "circuits pairs"]:
        """Measure the metric of each pair for several sets of kept items; each set is run only once."""
        return self.of_masks(np.array([self.mask(items) for items in kept]), progress=progress)

    def of_masks(
        self, masks: Bool[np.ndarray, "circuits items"], *, progress: bool = False
    ) -> Float[np.ndarray, "circuits pairs"]:
        """Measure the metric of each pair for several masks of kept items; each mask is run only once."""
        missing = {mask.tobytes(): mask for mask in masks if mask.tobytes() not in self._known}
        if missing:
            found = self.run_masks(np.array(list(missing.values())), progress=progress)
            self._known.update(zip(missing, found, strict=True))
        return np.array([self._known[mask.tobytes()] for mask in masks])

    def run_masks(
        self, masks: Bool[np.ndarray, "circuits items"], *, progress: bool = False
    ) -> Float[np.ndarray, "circuits pairs"]:
        """Measure the metric of each pair for several masks, batch by batch; batches in the journal are not run again."""
        found, size = np.zeros((len(masks), len(self.pairs))), max(map(self._at_once, self._groups()))
        parts = [slice(start, start + size) for start in range(0, len(masks), size)]
        for part in tqdm(parts, desc="ablating", unit="batch", disable=not progress or len(parts) < 2):
            some = masks[part]
            names = (np.packbits(mask).tobytes().hex() for mask in some)
            found[part] = self.once(names, (len(some), len(self.pairs)), partial(self._of_batch, some))
        return found

    def _of_batch(self, masks: Bool[np.ndarray, "circuits items"]) -> Array:
        """Measure the metric of each pair, `[circuits, pairs]`, for the masks of one batch."""
        found = torch.zeros(len(masks), len(self.runs), dtype=torch.float64)
        for group in self._groups():
            size = self._at_once(group)
            for start in range(0, len(masks), size):
                part = slice(start, start + size)
                found[part, group] = self.measured(torch.from_numpy(masks[part]), group).cpu()
        return np.array([self.combined(of_runs).numpy() for of_runs in found])

    def _at_once(self, group: Sequence[int]) -> int:
        """Return the number of circuits that are run together for some equally long runs."""
        return max(1, TOKENS_AT_ONCE // (self.rows_of_one() * len(group) * len(self.runs[group[0]])))

    def once(self, names: Iterable[str], shape: tuple[int, int], measure: Callable[[], Array]) -> Array:
        """Return values from the journal; those that it lacks are measured and written to it.

        Args:
            names: what is measured, from which the key in the journal is computed.
            shape: the numbers of rows and of pairs.
            measure: measures the values.
        """
        if self._journal is None:
            return self._timed(measure)
        key = batch_key(names)
        known = self._journal.get(key, shape[0] * shape[1])
        if known is None:
            known = torch.from_numpy(self._timed(measure)).flatten()
            self._journal.put(key, known)
        return known.numpy().reshape(shape)

    def _timed(self, measure: Callable[[], Array]) -> Array:
        """Measure values, and add the time that this takes to `_busy`."""
        start = time.monotonic()
        found = measure()
        self._busy += time.monotonic() - start
        return found

    @contextmanager
    def journal(self, path: str | Path | None) -> Iterator[None]:
        """Write what is measured in this context to a file, and read from the file what it already has.

        Values depend on the model, the pairs, the metric, the ablation values and the items, and not on the search, so another
        search of the same graph can use the same file.

        Raises:
            FeatpatchError: the file is not a journal, belongs to another graph, is in use, or can't be written.
        """
        if path is None:
            yield
            return
        origin = provenance(self.lens, self.pairs)
        subject = {  # by the names of the arguments of `find_circuit`, so that an error names those that differ
            **self.about(), "nodes": batch_key(map(str, self.candidates)), "to": self.to, **self.ablation.noted,
            "metric": list(self.measures.names), "pairs": origin["pairs"], "model": origin["model"],
        }  # fmt: skip
        baselines = [*self.whole.tolist(), *self.empty.tolist()]
        with closing(Journal.open(as_path(path), subject, baselines, TOKENS_AT_ONCE)) as journal:
            self._journal = journal
            try:
                yield
            finally:
                self._journal = None

    def alone(self, *, progress: bool = False) -> Array:
        """Measure the metric of each pair with only one item ablated, `[items, pairs]`."""
        count = len(self.items)
        found, size = np.zeros((count, len(self.pairs))), max(1, min(MASKS_AT_ONCE, MASK_BYTES // count))
        if progress:
            said = f"{counted(count, 'item')} in {counted(len(self.pairs), 'pair')}"
            tqdm.write(f"{said}, each ablated in a row of its own", file=sys.stderr)
        with tqdm(total=count, desc="ablating", unit="item", disable=not progress) as bar:
            done = announcing(bar, count, lambda: self._busy)
            for start in range(0, count, size):
                masks = np.ones((min(size, count - start), count), dtype=bool)
                masks[np.arange(len(masks)), start + np.arange(len(masks))] = False
                found[start : start + size] = self.run_masks(masks)
                done(len(masks), len(masks))
        return found

    def mask(self, kept: Iterable[Node]) -> NDArray[np.bool_]:
        """Return a mask `[items]` of the items that are kept; raise a FeatpatchError if one is not in the graph."""
        if kept is self.items:
            return np.ones(len(self.items), dtype=bool)
        mask = np.zeros(len(self.items), dtype=bool)
        mask[self.places(kept)] = True
        return mask

    def places(self, items: Iterable[Node]) -> NDArray[np.int64]:
        """Return the index of each item; raise a FeatpatchError if one is not in the graph."""
        if not isinstance(items, Iterable) or isinstance(items, str):
            raise FeatpatchError(f"items={items!r}: expected several nodes or edges, such as .graph.items[:3]")
        chosen = list(items)
        strange = [item for item in chosen if not isinstance(item, Node) or item not in self._numbers]
        if strange:
            raise FeatpatchError(
                f"{str(strange[0])!r} is not in the graph: expected items from among its {len(self.items)}; see .graph.items"
            )
        return np.array([self._numbers[item] for item in chosen], dtype=np.int64)

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {item: number for number, item in enumerate(self.items)}

    @property
    def candidates(self) -> tuple[Node, ...]:
        """The nodes given by the user: all items or, for edges, the features and errors among the mediators."""
        return self.items

    @cached_property
    def empty(self) -> Array:
        """The metric of each pair with all items ablated."""
        return self.values([[]])[0]

    def faithfulness(self, values: NDArray[Any]) -> Array:
        """Return the faithfulness of metrics `[..., pairs]`, a ratio of means: (m - m(empty)) / (m(whole) - m(empty))."""
        whole, empty = self.whole.mean(), self.empty.mean()
        return (values.mean(-1) - empty) / (whole - empty)

    def check_gap(self) -> None:
        """Raise a FeatpatchError if ablating everything hardly changes the metric."""
        check_gap(self.name, self.whole, self.empty)

    def estimates(self, scores: Scores = "estimate", steps: int = STEPS, *, progress: bool = False) -> Array:
        """Estimate by gradients how much the mean metric loses with each item ablated by itself, `[items]`; see `attribution`.

        Raises:
            FeatpatchError: the metric has no gradient, or a gradient of zero in the clean run, where it is taken.
        """
        if scores not in STEPPED and self.reads_clean:
            now = self.values([self.items])[0]
            if np.abs(now).max() <= FLAT * np.abs(self.empty).max():
                raise FeatpatchError(
                    f"metric {self.name!r} with scores={scores!r}: expected a gradient that is not zero, but this metric's is "
                    "zero in the unpatched clean run; use scores='eap_ig_inputs', 'eap_ig_activations' or 'exact', or another "
                    "metric"
                )
        points = points_of(scores, steps, self.components)
        total = np.zeros(len(self.items))
        with torch.inference_mode(False):
            for some in self._groups():
                self._note_clean(some)
            weights = self._weights(points)
            count = len(points) * len(self.runs)
            with tqdm(total=count, desc="estimating", unit="run", disable=not progress or len(points) < 2) as bar:
                for some in self._groups():
                    found, _ = self.slopes(some, points, weights[:, some], bar.update)
                    total += found.numpy()
        return -total / len(self.pairs)

    def _weights(self, points: Sequence[Point]) -> Float[torch.Tensor, "points runs"]:
        """Return the derivative of the sum of all pairs' metrics with respect to the metric of each run, at each point."""
        values = self._zeros(len(points), len(self.runs))
        if not self.measures.by_token:
            return torch.ones_like(values)
        if any(len(answers) > 1 for pair in self.pairs for answers in pair.answers):  # the sum of probabilities is not linear
            for some in self._groups():
                values[:, some] = self.slopes(some, points, torch.ones(len(points), len(some)), lambda runs: None)[1]
        with torch.enable_grad():
            leaf = values.requires_grad_()
            return torch.autograd.grad(torch.stack([self.combined(of_point).sum() for of_point in leaf]).sum(), leaf)[0]

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def _differentiable(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the metric; raise a FeatpatchError unless they have a gradient."""
        if not values.requires_grad:
            raise FeatpatchError(
                f"metric {self.name!r} has no gradient: expected a differentiable metric; or pass scores='exact'"
            )
        return values

    @abstractmethod
    def components(self) -> list[tuple[Node, ...]]:
        """Return the groups of nodes that are moved together for `"eap_ig_activations"`."""

    @abstractmethod
    def slopes(
        self,
        some: Sequence[int],
        points: Sequence[Point],
        weights: Float[torch.Tensor, "points runs"],
        done: Callable[[int], object],
    ) -> tuple[Float[torch.Tensor, " items"], Float[torch.Tensor, "points runs"]]:
        """Estimate the change of the weighted sum of the metrics of some equally long runs with each item ablated.

        Args:
            some: the indices of the runs, all of one length.
            points: the runs in which gradients are taken.
            weights: the weight of each run at each point.
            done: a function that is called with the number of runs after each point.

        Returns:
            The mean estimate over points, and the metrics at each point.
        """

    @abstractmethod
    def rows_of_one(self) -> int:
        """Return the number of rows that one circuit needs for each prompt."""

    @abstractmethod
    def measured(self, kept: Bool[torch.Tensor, "circuits items"], some: Sequence[int]) -> Float[torch.Tensor, "circuits runs"]:
        """Measure the metric of some equally long runs, for several circuits."""

    def pruned(self, masks: Bool[np.ndarray, "circuits items"]) -> Bool[np.ndarray, "circuits items"]:
        """Return masks without items that can't have an effect: edges on no path from the embedding to the logits."""
        return masks

    @abstractmethod
    def edge_counts(self, masks: Bool[np.ndarray, "circuits items"]) -> Float[np.ndarray, " circuits"]:
        """Return the number of edges of each circuit; NaN where it is not defined."""

    def members_of(self, item: Node) -> tuple[Node, ...]:
        """Return the nodes of a candidate that stands for several; empty for one that is a node."""
        return ()

    def users(self, receiver: Node) -> list[Node]:
        """Return the nodes that read through a receiver: the heads of a query, key or value, otherwise the node itself."""
        return [receiver]

    @abstractmethod
    def about(self) -> Mapping[str, Any]:
        """Return metadata to store with the results."""
