"""How likely a model finds the tokens of prompts, and answers of several tokens that follow them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import Sequences
from featpatch.threads import check_unedited

Logits = Float[torch.Tensor, "pos d_vocab"]

Taken = TypeVar("Taken")


TOKENS = 1024
"""Tokens of equally long prompts that run together."""


@dataclass(frozen=True)
class Runs:
    """A model, and how prompts are run through it.

    Raises:
        FeatpatchError: it is no function, or `fp.do` patches it.
    """

    model: Callable[[torch.Tensor], Any]

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise FeatpatchError(f"the model is a {type(self.model).__name__}: expected a function from tokens to logits")
        if isinstance(self.model, torch.nn.Module):
            check_unedited(getattr(self.model, "_orig_mod", self.model))

    def each(self, prompts: Sequence[tuple[int, ...]], take: Callable[[int, Logits], Taken]) -> list[Taken]:
        """Run the prompts, equally long ones together, and keep what `take` makes of the index and the logits of each.

        Raises:
            FeatpatchError: the model can't take the tokens, or does not give finite logits.
        """
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(index)
        taken: dict[int, Taken] = {}
        for length, indices in by_length.items():
            size = max(1, TOKENS // length)
            for some in (indices[start : start + size] for start in range(0, len(indices), size)):
                for index, logits in zip(some, self._logits([prompts[index] for index in some]), strict=True):
                    taken[index] = take(index, logits)
        return [taken[index] for index in range(len(prompts))]

    def _logits(self, prompts: Sequence[tuple[int, ...]]) -> Float[torch.Tensor, "batch pos d_vocab"]:
        """The logits of prompts of one length, in float32 at least."""
        device = next((p.device for p in getattr(self.model, "parameters", lambda: iter(()))()), torch.device("cpu"))
        tokens = torch.tensor(prompts, device=device)
        try:
            made = self.model(tokens)
        except FeatpatchError:
            raise
        except Exception as error:
            raise FeatpatchError(
                f"the model fails on {tokens.shape[1]} tokens with ids from {tokens.min()} to {tokens.max()} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): expected ids of the model's own tokenizer, "
                "and no more of them than its context"
            ) from error
        logits = getattr(made, "logits", made)
        sound = isinstance(logits, torch.Tensor) and logits.ndim == 3 and logits.shape[:2] == tokens.shape
        if not sound or not torch.isfinite(logits).all():
            raise FeatpatchError(
                f"the model gives {type(logits).__name__} for tokens {list(tokens.shape)}: expected finite logits "
                "[batch, pos, d_vocab], or an object with them as .logits"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def preferences(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[Sequences, Sequences]]) -> list[float]:
        """Log probability that a right answer follows each prompt, minus that of a wrong one if there are any, in nats.

        The probability of several answers is the sum of theirs; each token of an answer is predicted from the prompt and the
        tokens before it.
        """
        asked = [(n, side, answer) for n, sides in enumerate(answers) for side in (0, 1) for answer in sides[side]]

        def log_prob(index: int, logits: Logits) -> torch.Tensor:
            n, _, answer = asked[index]
            begin = len(prompts[n])
            return log_probs(logits, prompts[n] + answer, range(begin, begin + len(answer))).sum()

        found: dict[tuple[int, int], list[torch.Tensor]] = {}
        for (n, side, _), value in zip(
            asked, self.each([prompts[n] + answer[:-1] for n, _, answer in asked], log_prob), strict=True
        ):
            found.setdefault((n, side), []).append(value)
        sums = {key: float(torch.stack(values).logsumexp(0)) for key, values in found.items()}
        return [sums[n, 0] - sums.get((n, 1), 0.0) for n in range(len(prompts))]


def log_probs(logits: Logits, tokens: Sequence[int], positions: Sequence[int]) -> Float[torch.Tensor, " positions"]:
    """log p of the tokens at these positions, given what is before them; the first token is not predicted."""
    before = logits[[p - 1 for p in positions]].log_softmax(-1)
    return before.gather(1, torch.tensor([[tokens[p]] for p in positions], device=logits.device))[:, 0]
