"""Which tokens of a call of the model are steered: the same ones with and without a KV cache.

A generated sequence has a prompt and the tokens that were generated after it. A call of the model holds the whole sequence or,
with a KV cache, only its newest token. `Sequences` works out from the tokens that are embedded which of the two it is, so that
a position means the same token in both cases:

- A call with keys and values of earlier tokens continues the sequences before, if there are as many rows. Whether a
  HookedTransformer has them is not known; a call with one token per row counts as such.
- The sequences before with one more token per row continue them too.
- Anything else begins new sequences, and these tokens are the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int

from featpatch.errors import FeatpatchError, is_integer
from featpatch.pairs.pair import Pair, token_index
from featpatch.pairs.tokens import special_positions, unmasked

EVERYWHERE = ("all", "prompt", "generated", "newest")
"""The names of sets of positions."""

Places = str | Sequence[int | str]
"""A name of `EVERYWHERE`, or a list of token indices of the prompt and labels of a pair."""


def check_places(positions: Any, pair: Pair | None) -> Places:
    """Return positions after checking that they are known.

    Raises:
        FeatpatchError: they are neither a name nor a list of indices and labels, or a label has no pair.
    """
    if isinstance(positions, str) and positions in EVERYWHERE:
        if pair is not None:
            raise FeatpatchError(
                f"positions={positions!r} with pair=...: expected no pair, because no label is named; leave it out, or "
                "list labels"
            )
        return positions
    listed = list(positions) if isinstance(positions, (list, tuple)) else []
    if not listed or not all(isinstance(each, str) or is_integer(each) for each in listed):
        raise FeatpatchError(
            f"positions={positions!r}: expected one of {', '.join(EVERYWHERE)}, or a list of token indices and labels"
        )
    for label in (each for each in listed if isinstance(each, str)):
        if pair is None:
            raise FeatpatchError(f"positions={positions!r}: expected pair=..., whose labels they name, or token indices")
        pair.positions(label)
    return listed


@dataclass(eq=False)
class Sequences:
    """The sequences that a model is working on, one per row of its calls.

    Attributes:
        tokenizer: the tokenizer, which knows the special tokens; None for none.
        positions: the positions that are steered.
        pair: the pair whose labels are among the positions.
        mask: the attention mask of the prompts, `[rows, pos]`; None without padding.
        tokens: all tokens so far, `[rows, pos]`.
        prompt: the length of the prompts, with padding.
    """

    tokenizer: Any
    positions: Places
    pair: Pair | None = None
    mask: Int[torch.Tensor, "rows pos"] | None = None
    tokens: Int[torch.Tensor, "rows pos"] | None = field(default=None, init=False)
    prompt: int = field(default=0, init=False)

    def see(self, tokens: Int[torch.Tensor, "rows pos"], cached: bool | None) -> None:
        """Take note of tokens that are embedded, and whether the call has a cache, see `Lens.seeing`.

        Raises:
            FeatpatchError: a new prompt does not fit the attention mask, or lacks a position that is steered.
        """
        tokens, before = tokens.detach().cpu(), self.tokens
        rows, length = tokens.shape
        if before is not None and len(before) == rows and (length == 1 if cached is None else cached):
            self.tokens = torch.cat([before, tokens], dim=1)
        elif before is not None and len(before) == rows and length == before.shape[1] + 1 and _grown(before, tokens):
            self.tokens = tokens
        else:
            self.tokens, self.prompt = tokens, length
            self._check_prompt(rows)

    def steered(self, last: int) -> Bool[torch.Tensor, "rows last 1"]:
        """Return a mask of those of the last tokens that are steered; special tokens are only if they are named."""
        assert self.tokens is not None
        rows, length = self.tokens.shape
        at = torch.arange(length)
        if self.positions == "all":
            chosen = torch.ones(rows, length, dtype=torch.bool)
        elif isinstance(self.positions, str):
            edge = {"prompt": self.prompt, "generated": self.prompt, "newest": self.prompt - 1}[self.positions]
            chosen = ((at < edge) if self.positions == "prompt" else (at >= edge)).expand(rows, length).clone()
        else:
            chosen = torch.zeros(rows, length, dtype=torch.bool)
            for row, (first, end) in enumerate(self._spans(rows)):
                for place in self.positions:
                    inside = self.pair.positions(place) if self.pair is not None else [token_index(int(place), end - first)]
                    chosen[row, [first + position for position in inside]] = True
        if isinstance(self.positions, str) and self.tokenizer is not None:
            for row, ids in enumerate(self.tokens.tolist()):
                chosen[row, sorted(special_positions(self.tokenizer, ids))] = False
        return chosen[:, length - last :, None]

    def whole(self) -> tuple[Int[torch.Tensor, "rows length"], Int[torch.Tensor, "rows length"] | None]:
        """Return all tokens so far, and their attention mask if the prompts have one."""
        assert self.tokens is not None
        if self.mask is None:
            return self.tokens, None
        generated = torch.ones(len(self.tokens), self.tokens.shape[1] - self.prompt, dtype=self.mask.dtype)
        return self.tokens, torch.cat([self.mask.cpu(), generated], dim=1)

    def _check_prompt(self, rows: int) -> None:
        if self.mask is not None and self.mask.shape != (rows, self.prompt):
            raise FeatpatchError(
                f"attention_mask is {list(self.mask.shape)}, and the model was called with prompts {[rows, self.prompt]}: "
                "expected equal shapes; pass the mask of these prompts"
            )
        if not isinstance(self.positions, str):
            for first, end in self._spans(rows):
                if self.pair is not None and len(self.pair) != end - first:
                    raise FeatpatchError(
                        f"the model was called with a prompt of {end - first} tokens, and pair has {len(self.pair)}: expected "
                        "a prompt of this pair, whose labels name positions"
                    )
                if self.pair is None:
                    for place in self.positions:
                        token_index(int(place), end - first)

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        """Return for each row the first position of its prompt, and the position after its last one."""
        return [(0, self.prompt)] * rows if self.mask is None else [unmasked(row) for row in self.mask.tolist()]


def _grown(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Return whether each row continues one of the rows before, which may have been reordered, as by a beam search."""
    known = set(map(tuple, before.tolist()))
    return all(tuple(row[:-1]) in known for row in now.tolist())
