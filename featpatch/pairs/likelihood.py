"""How likely a model finds the tokens of prompts, or the answers that follow them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import Sequences
from featpatch.pairs.tokens import chunks
from featpatch.threads import Watch, check_unedited
from featpatch.untrusted import short

Logits = Float[torch.Tensor, "pos d_vocab"]

Taken = TypeVar("Taken")

TOKENS = 1024
"""The largest number of tokens of several prompts that share a forward pass."""


@dataclass(frozen=True)
class Runs:
    """A runner that batches prompts of equal length into forward passes of one model.

    Attributes:
        model: a function from tokens `[batch, pos]` to logits `[batch, pos, d_vocab]`.

    Raises:
        FeatpatchError: the model is not a function, or `fp.do` is patching it.
    """

    model: Callable[[torch.Tensor], Any]
    _watch: Watch | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise FeatpatchError(
                f"the model is a {type(self.model).__name__}: expected a model, or a function from tokens to logits"
            )
        if isinstance(self.model, torch.nn.Module):
            model = getattr(self.model, "_orig_mod", self.model)
            check_unedited(model)
            object.__setattr__(self, "_watch", Watch(model, getattr(model, "hook_dict", {}).values()))

    def each(self, prompts: Sequence[tuple[int, ...]], take: Callable[[int, Logits], Taken]) -> list[Taken]:
        """Run all prompts, and return `take(index, logits)` for each, with logits in float32 or wider.

        Raises:
            FeatpatchError: the model fails on the tokens, gives no logits or logits that are not finite, or another thread
                attaches hooks to it.
        """
        taken: dict[int, Taken] = {}
        for indices in chunks([len(prompt) for prompt in prompts], TOKENS):
            for index, logits in zip(indices, self._logits([prompts[index] for index in indices]), strict=True):
                taken[index] = take(index, logits)
        return [taken[index] for index in range(len(prompts))]

    def _logits(self, prompts: Sequence[tuple[int, ...]]) -> Float[torch.Tensor, "batch pos d_vocab"]:
        """Run prompts of equal length for `each`, check the logits and return them in float32 or wider."""
        device = next((p.device for p in getattr(self.model, "parameters", lambda: iter(()))()), torch.device("cpu"))
        tokens = torch.tensor(prompts, device=device)
        try:
            with self._watch.unchanged() if self._watch else nullcontext():
                made = self.model(tokens)
        except FeatpatchError:
            raise
        except Exception as error:
            raise FeatpatchError(
                f"the model fails on {tokens.shape[1]} tokens with ids from {tokens.min()} to {tokens.max()} "
                f"({type(error).__name__}: {short(error)}): expected ids of the model's own tokenizer, and prompts no longer "
                "than its context"
            ) from error
        logits = getattr(made, "logits", made)
        sound = isinstance(logits, torch.Tensor) and logits.ndim == 3 and logits.shape[:2] == tokens.shape
        if not sound or not torch.isfinite(logits).all():
            raise FeatpatchError(
                f"the model returns {type(logits).__name__} for tokens {list(tokens.shape)}: expected finite logits [batch, "
                "pos, d_vocab], or an object with the attribute .logits"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def preferences(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[Sequences, Sequences]]) -> list[float]:
        """Return the log probability in nats that a right answer follows each prompt, minus that of a wrong one, if any.

        The probabilities of several answers are summed; each token of an answer is predicted from the prompt and the tokens
        before it.
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
    """Return log p, in nats, of the tokens at these positions given all tokens before them; position 0 has no prediction."""
    before = logits[[p - 1 for p in positions]].log_softmax(-1)
    return before.gather(1, torch.tensor([[tokens[p]] for p in positions], device=logits.device))[:, 0]
