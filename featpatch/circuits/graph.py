"""A model of which some nodes or edges can be ablated together."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.circuits.outside import Outside, check_outside
from featpatch.effects import check_gap
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens, check_tokens
from featpatch.metrics import SEQUENCES, Measure
from featpatch.pairs import Pairs
from featpatch.patch import Node

Array = NDArray[np.float64]

TOKENS_AT_ONCE = 4096
"""Tokens that go through the model together."""


@dataclass(eq=False)
class Graph(ABC):
    """The clean runs of some pairs, in which what is not kept has other values.

    Attributes:
        items: nodes, or edges.
        to: what the outside is set to.
    """

    lens: Lens
    pairs: Pairs
    to: Outside
    measure: Measure
    items: tuple[Node, ...] = ()
    _known: dict[bytes, Array] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Raises FeatpatchError for pairs that a circuit can't be found for."""
        check_tokens(self.pairs, self.lens)
        check_outside(self.to, self.pairs)
        if self.measure.needs == "clean" or self.measure.name in SEQUENCES or any(not pair.correct for pair in self.pairs):
            raise FeatpatchError(f"metric {self.measure.name!r}: expected one of the answers' single tokens, for circuits")
        self.lens.check_unhooked()

    def values(self, kept: Sequence[Iterable[Node]], *, progress: bool = False) -> Float[np.ndarray, "circuits pairs"]:
        """The metric of each pair with these items kept and the others ablated, for several choices of items, each run once."""
        masks = [self.mask(items) for items in kept]
        missing = [mask for mask in {mask.tobytes(): mask for mask in masks}.values() if mask.tobytes() not in self._known]
        found = {mask.tobytes(): np.full(len(self.pairs), np.nan) for mask in missing}
        for group in self._groups():
            size = max(1, TOKENS_AT_ONCE // (self.rows_of_one() * len(group) * len(self.pairs[group[0]])))
            parts = [missing[start : start + size] for start in range(0, len(missing), size)]
            for part in tqdm(parts, desc="ablating", unit="batch", disable=not progress or len(parts) < 2):
                values = self.measured(torch.tensor(np.array(part)), group)
                for mask, of_pairs in zip(part, values, strict=True):
                    found[mask.tobytes()][group] = of_pairs.cpu().numpy()
        self._known.update(found)
        return np.array([self._known[mask.tobytes()] for mask in masks])

    def mask(self, kept: Iterable[Node]) -> NDArray[np.bool_]:
        """Which items are kept, `[items]`."""
        chosen = list(kept)
        strange = next((item for item in chosen if item not in self._numbers), None)
        if strange is not None:
            raise FeatpatchError(f"{str(strange)!r} is not in the graph: expected some of its {len(self.items)} items")
        mask = np.zeros(len(self.items), dtype=bool)
        mask[[self._numbers[item] for item in chosen]] = True
        return mask

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {item: number for number, item in enumerate(self.items)}

    @cached_property
    def whole(self) -> Array:
        """The metric of each pair in the unpatched clean run."""
        values = np.zeros(len(self.pairs))
        for group in self._groups():
            tokens = torch.tensor([self.pairs[index].clean for index in group])
            answers = torch.tensor([self.pairs[index].answer_position for index in group])
            values[group] = self.metric_of(self.lens.answer(tokens, answers)[None], group)[0].cpu().numpy()
        return values

    @property
    def empty(self) -> Array:
        """The metric of each pair with everything ablated that can be."""
        return self.values([[]])[0]

    def faithfulness(self, values: NDArray[Any]) -> Array:
        """(m - m(empty)) / (m(whole) - m(empty)) of metrics `[..., pairs]`, the ratio of means over pairs."""
        whole, empty = self.whole.mean(), self.empty.mean()
        result: Array = (values.mean(-1) - empty) / (whole - empty)
        return result

    def check_gap(self) -> None:
        """Raises FeatpatchError where ablating everything leaves the metric about as it is."""
        check_gap(self.measure.name, self.whole, self.empty)

    @abstractmethod
    def rows_of_one(self) -> int:
        """How many runs of a prompt one choice of items takes."""

    @abstractmethod
    def measured(
        self, kept: Bool[torch.Tensor, "circuits items"], some: Sequence[int]
    ) -> Float[torch.Tensor, "circuits pairs"]:
        """The metric of some equally long pairs."""

    def users(self, receiver: Node) -> list[Node]:
        """The nodes that read through a receiver: the heads of a query, key or value, else the node itself."""
        return [receiver]

    @abstractmethod
    def about(self) -> Mapping[str, Any]:
        """What to note of it with the results."""

    def metric_of(self, logits: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Of logits `[circuits, pairs, d_vocab]`, `[circuits, pairs]`, with its gradient."""
        values = []
        for slot, index in enumerate(some):
            pair = self.pairs[index]
            columns = self.measure.columns(pair.correct, pair.wrong)
            of_pair = logits[:, slot] if columns is None else logits[:, slot, list(columns)]
            value = self.measure.raw(of_pair, pair.correct, pair.wrong)
            if not isinstance(value, torch.Tensor) or value.shape != (len(of_pair),) or not torch.isfinite(value).all():
                raise FeatpatchError(
                    f"metric {self.measure.name} gave {value!r} for {len(of_pair)} rows: expected a tensor with one finite "
                    "value per row; check the metric"
                )
            values.append(value)
        return torch.stack(values, 1).double()

    def _groups(self) -> list[list[int]]:
        """Pairs that run together: equally long, all of a length, as some outsides need."""
        return list(self.pairs.by_length().values())
