"""Metrics that are functions of the user: their accepted forms, and how they are called and checked."""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError

Logits = Float[torch.Tensor, "rows d_vocab"]
Values = Float[torch.Tensor, " rows"]

Metric = Callable[[Logits, Sequence[int], Sequence[int]], Values]
"""A metric `metric(logits, correct, wrong)`, given the logits at the answer position and the ids of correct and wrong answers.

A function with one required argument is called as in TransformerLens instead: prompt by prompt, with logits `[1, 1, d_vocab]`,
and returns one value."""

FORMS = (
    "metric(logits [rows, d_vocab], correct, wrong) -> [rows], given the logits at the answer position and the answers' ids; "
    "or metric(logits [1, 1, d_vocab]) -> one value, given one prompt's logits at its answer position, without answers or "
    "clean logits of a batch stored in it"
)
"""The accepted forms of a metric function, for error messages."""

ROUNDING = 1e-2
"""Tolerated change of a prompt's metric by rounding when other prompts are in the batch, relative to its size."""


def name_of(metric: Metric) -> str:
    """Return the name of a function, which must be the same in every process because journals and tables hold it."""
    inner = metric.func if isinstance(metric, partial) else metric
    return getattr(inner, "__name__", type(inner).__name__)


def reads_one_prompt(metric: Metric, name: str) -> bool:
    """Return whether a function takes only logits, as in TransformerLens, judging by its signature.

    Otherwise it takes correct and wrong answers too. Optional arguments keep their defaults, unless they are named `correct`
    and `wrong`.

    Raises:
        FeatpatchError: the signature is unknown, or matches neither form.
    """
    try:
        signature = inspect.signature(metric.forward if isinstance(metric, torch.nn.Module) else metric)
    except (TypeError, ValueError) as error:
        raise FeatpatchError(f"metric {name!r} has no readable signature ({error}): expected a function {FORMS}") from error
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_name = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    of_answers = any_number or [p.name for p in positional[1:3]] == ["correct", "wrong"]
    if positional and len(required) < 2 and not of_answers and not by_name:
        return True
    if by_name or len(required) > 3 or (len(positional) < 3 and not any_number):
        raise FeatpatchError(f"metric {name!r} takes {signature}: expected a function {FORMS}")
    return False


def called(
    metric: Callable[..., Any], name: str, one_prompt: bool, logits: torch.Tensor, correct: Sequence[int], wrong: Sequence[int]
) -> Any:
    """Call a user's function on logits `[rows, d_vocab]`, prompt by prompt if it takes only logits."""

    def call(given: torch.Tensor, *answers: Sequence[int]) -> Any:
        try:
            return metric(given, *answers)
        except Exception as error:
            raise FeatpatchError(
                f"metric {name!r} failed on logits of shape {list(given.shape)} ({type(error).__name__}: {error}): expected "
                f"{FORMS}"
            ) from error

    if not one_prompt:
        return call(logits, correct, wrong)
    values = [_single(call(row[None, None]), name, row) for row in logits]
    with torch.no_grad():
        _check_alone(call, name, logits[0].detach(), values[0].detach())
    return torch.stack(values)


def _single(value: Any, name: str, row: torch.Tensor) -> torch.Tensor:
    """Convert the value of one prompt to a tensor without axes.

    Raises:
        FeatpatchError: the value is not a single real number.
    """
    found = torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value
    if not isinstance(found, torch.Tensor) or found.numel() != 1 or found.is_complex():
        what = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise FeatpatchError(f"metric {name!r} returned {what} for logits of shape {[1, 1, len(row)]}: expected {FORMS}")
    return found.reshape(())


def _check_alone(call: Callable[[torch.Tensor], Any], name: str, row: torch.Tensor, value: torch.Tensor) -> None:
    """Check that a function does not store the answers or clean logits of a whole batch.

    One prompt would be broadcast to them. The function is called on two and three prompts, made by reordering the logits, and
    must return the value of each prompt, or their mean, their sum, or the first. It is also called on two and three positions,
    which must not fail on a shape. Both numbers are tried because the stored batch may have the size of one of them.

    Raises:
        FeatpatchError: the function returns something else, or fails on a shape.
    """
    rows = torch.stack([row, row.flip(0), row.roll(1)])
    alone = [value, *(_single(call(other[None, None]), name, other) for other in rows[1:])]
    for n in (2, 3):
        each, batched = torch.stack(alone[:n]).double(), call(rows[:n, None])
        if isinstance(batched, torch.Tensor) and batched.is_complex():
            raise FeatpatchError(f"metric {name!r} returned {batched.dtype} for {n} prompts: expected {FORMS}")
        found = torch.as_tensor(batched).to(each).flatten() if isinstance(batched, (int, float, torch.Tensor)) else each[:0]
        accepted = {n: [each], 1: [each.mean()[None], each.sum()[None], each[:1]]}.get(len(found), [])
        tolerance = ROUNDING * float(each.abs().max())
        if not any(torch.allclose(found, values, rtol=0, atol=tolerance, equal_nan=True) for values in accepted):
            raise FeatpatchError(
                f"metric {name!r} returns {each.tolist()} for {n} prompts one at a time and {found.tolist()} for them in one "
                f"batch: expected {FORMS}; to measure the divergence from the clean run, use 'neg_kl'"
            )
        try:
            call(rows[None, :n])
        except FeatpatchError as error:
            if re.search("must match|broadcast", str(error.__cause__)):
                raise
