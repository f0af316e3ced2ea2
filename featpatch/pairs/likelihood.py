"""Compute how likely a model finds the tokens of a prompt, or answers that follow it, one prompt at a time."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import Sequences
from featpatch.threads import Watch, check_unedited
from featpatch.untrusted import short

Logits = Float[torch.Tensor, "pos d_vocab"]


@dataclass(frozen=True)
class Runs:
    """Runs a model on one prompt at a time."""

    model: Callable[[torch.Tensor], Any]
    _watch: Watch | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise FeatpatchError(f"the model is a {type(self.model).__name__}: expected a function from tokens to logits")
        if isinstance(self.model, torch.nn.Module):
            model = getattr(self.model, "_orig_mod", self.model)
            check_unedited(model)
            object.__setattr__(self, "_watch", Watch(model, getattr(model, "hook_dict", {}).values()))

    def logits(self, tokens: tuple[int, ...]) -> Logits:
        """Return the logits of a prompt in float32 or wider.

        Raises:
            FeatpatchError: the model fails on the tokens, gives no logits or logits that are not finite, or another thread
                attaches hooks to it.
        """
        device = next((p.device for p in getattr(self.model, "parameters", lambda: iter(()))()), torch.device("cpu"))
        try:
            with self._watch.unchanged() if self._watch else nullcontext():
                made = self.model(torch.tensor([tokens], device=device))
        except FeatpatchError:
            raise
        except Exception as error:
            raise FeatpatchError(
                f"the model fails on {len(tokens)} tokens with ids from {min(tokens)} to {max(tokens)} "
                f"({type(error).__name__}: {short(error)}): expected ids of the model's own tokenizer, "
                "no more than its context"
            ) from error
        logits = getattr(made, "logits", made)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or not torch.isfinite(logits).all():
            raise FeatpatchError(
                f"the model gives {type(logits).__name__} for tokens [1, {len(tokens)}]: expected finite logits "
                "[batch, pos, d_vocab], or an object with them as .logits"
            )
        return logits[0].to(torch.promote_types(logits.dtype, torch.float32))

    def preference(self, prompt: tuple[int, ...], right: Sequences, wrong: Sequences) -> float:
        """Log probability that one of the right answers follows the prompt, minus that of the wrong ones if any, in nats."""
        found = self._log_prob(prompt, right)
        return float(found - self._log_prob(prompt, wrong) if wrong else found)

    def _log_prob(self, prompt: tuple[int, ...], answers: Sequences) -> Float[torch.Tensor, ""]:
        """logsumexp over the answers; each token of an answer is predicted from the prompt and the tokens before it."""
        begin, each = len(prompt), []
        for answer in answers:
            logits = self.logits(prompt + answer[:-1])
            each.append(log_probs(logits, prompt + answer, range(begin, begin + len(answer))).sum())
        return torch.stack(each).logsumexp(0)


def log_probs(logits: Logits, tokens: Sequence[int], positions: Sequence[int]) -> Float[torch.Tensor, " positions"]:
    """log p of the tokens at these positions, given what is before them; the first token is not predicted."""
    before = logits[[p - 1 for p in positions]].log_softmax(-1)
    return before.gather(1, torch.tensor([[tokens[p]] for p in positions], device=logits.device))[:, 0]
