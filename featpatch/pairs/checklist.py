"""A checklist for the quality of pairs, to be run before patching.

A good pair changes one thing and thereby the answer: few tokens differ, the differing tokens are of the same kind and about
equally surprising, the model prefers the right answer on the clean prompt and the wrong one on the corrupted prompt, and no
pair is a duplicate (Heimersheim & Nanda 2024, arXiv 2404.15255; Zhang & Nanda 2024, arXiv 2309.16042).

If answers are single tokens, a metric of the logits says which answer the model prefers. If they are sequences, it is
log p(right) - log p(wrong), whatever the metric: p is the sum over answers of the product of their tokens' probabilities, each
given the prompt and the tokens before it. For pairs without wrong answers it is log p(right), which must be larger on the clean
prompt.
"""

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, Literal

import pandas as pd
import torch

from featpatch.errors import FeatpatchError, check_kinds, counted
from featpatch.frame import Frame
from featpatch.metrics import MEASURES, Measure, find
from featpatch.page.page import block
from featpatch.pairs.likelihood import Logits, Runs, log_probs
from featpatch.pairs.pair import Pair, positions_of
from featpatch.pairs.tokens import by_itself, first_token, is_padded, special_positions

Status = Literal["pass", "warn", "fail"]
SEVERITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}

MANY = 3
"""The largest number of differing tokens that passes as a minimal contrast."""
SURPRISING, ABSURD = 3.0, 8.0
"""Differences, in nats, between the mean surprise of the changed tokens in the two prompts above which a pair gets a warning
or fails."""
SMALL = 0.2
"""The share of the median gap below which a pair gets a warning, because it hardly counts in pooled effects."""

RULES = {
    "start": "pass the model instead of a tokenizer when you make the pairs, so that prompts begin as they do in model(text)",
    "difference": "change fewer words, or only those that decide the answer",
    "kind": "replace a word with one of the same kind (a name with a name, a number with a number), spacing and case",
    "surprise": "choose a replacement that is about as likely in its context; otherwise features of unusual text take part",
    "output": "keep prompts on which the model shows the behaviour, and corruptions that change its answer",
    "answers": "choose answers that are words of the tokenizer, and none that is the beginning of an answer on the other side",
    "labels": "label the same positions in every pair, so that effects add up",
    "duplicate": "drop all but one",
    "gap": "drop it; below 0 the prompts or the answers may be swapped, and it cancels out other pairs",
}
"""The rules of the checklist, each with advice for pairs that do not pass it."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one rule for one pair.

    Attributes:
        pair: the index of the pair.
        rule: the name of the rule, a key of `RULES`.
        status: `"pass"`, `"warn"` or `"fail"`.
        detail: what was found.
    """

    pair: int
    rule: str
    status: Status
    detail: str

    @property
    def advice(self) -> str:
        """Advice on how to mend the pair; empty if it passed."""
        return "" if self.status == "pass" else RULES[self.rule]


@dataclass(frozen=True, repr=False)
class Checklist:
    """The outcome of `Pairs.check`.

    Attributes:
        findings: the outcomes, one per pair and rule.
        clean, corrupted: the metric on each clean and each corrupted prompt; log p(right) - log p(wrong) if answers are
            sequences, and log p(right) if there are no wrong ones.

    Examples:
        >>> checklist = pairs.check(model)
        >>> checklist.verdicts().count("fail"), checklist.counts()["duplicate"]
        (0, {'pass': 4, 'warn': 0, 'fail': 0})
        >>> checklist.to_pandas().columns.tolist()
        ['pair', 'rule', 'status', 'detail', 'advice']
    """

    findings: tuple[Finding, ...]
    clean: tuple[float, ...]
    corrupted: tuple[float, ...]

    def verdicts(self) -> list[Status]:
        """Return the worst status of every pair."""
        worst: list[Status] = ["pass"] * len(self.clean)
        for finding in self.findings:
            worst[finding.pair] = max(worst[finding.pair], finding.status, key=SEVERITY.__getitem__)
        return worst

    @property
    def ok(self) -> bool:
        """Whether no pair fails."""
        return "fail" not in self.verdicts()

    def counts(self) -> dict[str, dict[Status, int]]:
        """Count the pairs that pass, warn and fail for each rule."""
        seen = Counter((finding.rule, finding.status) for finding in self.findings)
        return {rule: {status: seen[rule, status] for status in SEVERITY} for rule in RULES}

    def __repr__(self) -> str:
        verdicts = self.verdicts()
        total = ", ".join(f"{verdicts.count(status)} {status}" for status in SEVERITY)
        lines = [f"{rule}: {n['warn']} warn, {n['fail']} fail; {RULES[rule]}" for rule, n in self.counts().items()
                 if n["warn"] or n["fail"]]  # fmt: skip
        return "\n  ".join([f"checklist of {counted(len(verdicts), 'pair')}: {total}", *lines])

    def _repr_html_(self) -> str:
        rows = [
            {"rule": rule, **n, "advice": RULES[rule] if n["warn"] or n["fail"] else ""} for rule, n in self.counts().items()
        ]
        return str(block("checklist.html", title=repr(self).partition("\n")[0], rows=rows))

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per pair and rule: pair, rule, status, detail, advice."""
        columns = ("pair", "rule", "status", "detail", "advice")
        return Frame([{name: getattr(finding, name) for name in columns} for finding in self.findings], columns=columns)


@torch.no_grad()
def check(
    pairs: Sequence[Pair],
    model: Callable[[torch.Tensor], Any],
    *,
    tokenizer: Any = None,
    metric: Literal["logit_diff", "prob_diff", "sequence_log_prob_diff"] = "logit_diff",
) -> Checklist:
    """Check each pair for common problems with this model; the method `Pairs.check`.

    Args:
        model: a function from tokens `[batch, pos]` to logits `[batch, pos, d_vocab]`, or to an object with them as `.logits`.
        tokenizer: a tokenizer to show words and compare their kinds; by default `model.tokenizer`, if there is one.
        metric: the metric that compares one-token answers; it is positive if the right ones are preferred. Answers that are
            sequences are compared by their log probabilities whatever it is.

    Raises:
        FeatpatchError: the model gives no logits or logits that are not finite, or the metric is not one of these.

    Examples:
        >>> checklist = pairs.check(model)
        >>> checklist.ok, len(checklist.verdicts())
        (True, 4)
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if metric not in ("logit_diff", "prob_diff", "sequence_log_prob_diff"):
        raise FeatpatchError(
            f"metric={metric!r}: expected 'logit_diff', 'prob_diff' or, for answers of several tokens, "
            "'sequence_log_prob_diff', whose sign shows which answer is preferred"
        )
    measure, runs, first = find(metric if metric in MEASURES else "logit_diff"), Runs(model), first_token(model)
    in_context = _in_context(pairs, tokenizer)
    prompts = [tokens for pair in pairs for tokens in (pair.clean, pair.corrupted)]

    def read(index: int, logits: Logits) -> tuple[float, float]:
        """Return the metric (0 for answers of several tokens) and the surprise at the changed tokens."""
        pair, known = pairs[index // 2], range(logits.shape[-1])
        if odd := [token for side in pair.answers for answer in side for token in answer if token not in known]:
            raise FeatpatchError(f"pair {index // 2} has answer ids {odd}: expected 0 to {known[-1]}, ids of the model")
        told = _told(logits, pair, measure if pair.wrong else find("log_prob")) if pair.correct else 0.0
        return told, _surprise(logits, prompts[index], [places[index % 2] for places in _changed(pair)])

    values, surprised = map(list, zip(*runs.each(prompts, read), strict=True))
    whole = [index for index in range(len(prompts)) if pairs[index // 2].correct_sequences]
    told = runs.preferences([prompts[index] for index in whole], [pairs[index // 2].answers for index in whole])
    for index, value in zip(whole, told, strict=True):
        values[index] = value
    clean, corrupted = values[::2], values[1::2]
    surprises = [there - here for here, there in zip(surprised[::2], surprised[1::2], strict=True)]
    gaps = [one - other for one, other in zip(clean, corrupted, strict=True)]
    usual, seen = Counter(label for pair in pairs for label in pair.labels), dict[Any, int]()
    alone = not any(pair.has_counterfactual for pair in pairs)
    findings: list[Finding] = []
    for index, pair in enumerate(pairs):
        rules: dict[str, Outcome] = {
            "start": _start(pair, first, tokenizer),
            "difference": _difference(pair, tokenizer),
            "kind": _kind(pair, tokenizer),
            "surprise": _even(surprises[index]),
            "output": _output(clean[index], corrupted[index], pair),
            "answers": _answers(pair, tokenizer, in_context),
            "labels": _labels(pair, usual, len(pairs), tokenizer),
            "duplicate": _duplicate(pair, index, seen),
            "gap": _gap(gaps[index], median(gaps)),
        }
        if alone:
            rules |= dict.fromkeys(("difference", "kind", "surprise", "gap"), ("pass", "not checked: no counterfactual"))
            rules["output"] = _output_alone(clean[index], pair)
        findings += [Finding(index, rule, *outcome) for rule, outcome in rules.items()]
    return Checklist(tuple(findings), tuple(clean), tuple(corrupted))


Outcome = tuple[Status, str]


def _told(logits: torch.Tensor, pair: Pair, measure: Measure) -> float:
    """Return the metric of a pair with one-token answers, from the logits of one of its prompts."""
    row, columns = logits[None, -1 if pair.by_label else pair.answer_position], measure.columns(pair.correct, pair.wrong)
    return float(measure(row if columns is None else row[:, list(columns)], pair.correct, pair.wrong))


def _surprise(logits: torch.Tensor, tokens: tuple[int, ...], positions: Sequence[int]) -> float:
    """Return the mean of -log p, in nats, of the tokens at these positions given all tokens before them; 0 for none.

    Position 0 is left out, because nothing predicts the first token.
    """
    predicted = [p for p in positions if p > 0]
    if not predicted:
        return 0.0
    return -float(log_probs(logits, tokens, predicted).mean())


def _places(pair: Pair) -> list[tuple[int, int]]:
    """Return the positions that can be patched, in both prompts: all of them or, if patched label by label, those of labels."""
    labelled = (place for label in pair.labels for place in pair.places(label))
    return list(dict.fromkeys(labelled)) if pair.by_label else [(p, p) for p in range(len(pair))]


def _changed(pair: Pair) -> list[tuple[int, int]]:
    """Return the places at which the tokens differ."""
    return [(here, there) for here, there in _places(pair) if pair.clean[here] != pair.corrupted[there]]


def _difference(pair: Pair, tokenizer: Any) -> Outcome:
    changed = _changed(pair)
    words = [(p, _word(pair.clean[p], tokenizer), _word(pair.corrupted[q], tokenizer)) for p, q in changed[:MANY]]
    shown = ", ".join(f"{p}: {one} -> {other}" for p, one, other in words)
    differ = "differs" if len(changed) == 1 else "differ"
    tokens = counted(len(_places(pair)), "labelled token" if pair.by_label else "token")
    detail = f"{len(changed)} of {tokens} {differ}{f' ({shown})' if changed else ''}"
    if not changed:
        return "fail", detail
    return ("pass" if len(changed) <= MANY else "warn"), detail


def _kind(pair: Pair, tokenizer: Any) -> Outcome:
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return "pass", "not checked, because there is no tokenizer"
    unknown = getattr(tokenizer, "unk_token_id", None)
    begin = int(unknown == getattr(tokenizer, "bos_token_id", None))  # BOS can be the unknown token too
    if found := (*pair.clean[begin:], *pair.corrupted[begin:]).count(unknown):
        return "warn", f"{counted(found, 'token')} unknown to the tokenizer"
    for p, q in _changed(pair):
        one, other = pair.clean[p], pair.corrupted[q]
        if (kind := _kind_of(tokenizer, one)) != (there := _kind_of(tokenizer, other)):
            return "warn", f"{_word(one, tokenizer)} is {kind} and {_word(other, tokenizer)} is {there}, at {p}"
    return "pass", "changed tokens are of the same kind"


def _kind_of(tokenizer: Any, token: int) -> str:
    piece = str((tokenizer.convert_ids_to_tokens([token]) if hasattr(tokenizer, "convert_ids_to_tokens") else [""])[0])
    text = str(tokenizer.decode([token])).strip()
    kinds = {"a number": text.isdigit(), "a name": text[:1].isupper(), "a word": text.isalpha()}
    kind = next((kind for kind, holds in kinds.items() if holds), "a punctuation mark")
    return f"{kind} after a space" if piece[:1] in ("Ġ", "▁", " ") else kind


def _even(difference: float) -> Outcome:
    detail = f"changed tokens {abs(difference):.1f} nats {'more' if difference > 0 else 'less'} surprising when corrupted"
    return ("fail" if abs(difference) > ABSURD else "warn" if abs(difference) > SURPRISING else "pass"), detail


def _start(pair: Pair, first: int | None, tokenizer: Any) -> Outcome:
    if tokenizer is not None and is_padded(tokenizer, pair.clean, pair.corrupted):
        if is_padded(tokenizer, pair.clean, pair.corrupted, surely=True):
            return "fail", "begins or ends with padding"
        return "warn", "begins or ends with a token that is also the padding token"
    begins = _word(pair.clean[0], tokenizer)
    if first is None or pair.clean[0] == first:
        return "pass", f"begins with {begins}"
    return "warn", f"begins with {begins}, but model(text) begins with {_word(first, tokenizer)}"


def _output(clean: float, corrupted: float, pair: Pair) -> Outcome:
    if not pair.answers[0]:
        return "pass", "no answers"
    if not pair.answers[1]:
        return ("pass" if clean > corrupted else "fail"), f"log p(right) {clean:.2f} on clean, {corrupted:.2f} on corrupted"
    detail = f"metric {clean:.2f} on clean, {corrupted:.2f} on corrupted"
    if clean <= 0 or clean <= corrupted:
        return "fail", detail
    return ("pass" if corrupted < 0 else "warn"), detail


def _output_alone(value: float, pair: Pair) -> Outcome:
    """Return whether the model prefers the right answer on a prompt without a counterfactual."""
    if not pair.answers[1]:
        return "pass", f"log p(right) {value:.2f}" if pair.answers[0] else "no answers"
    return ("pass" if value > 0 else "fail"), f"metric {value:.2f}"


def _answers(pair: Pair, tokenizer: Any, in_context: Set[int]) -> Outcome:
    right, wrong = pair.answers
    if not right:
        return "pass", "no answers"
    tokens = [token for answer in (*right, *wrong) for token in answer]
    unknown = getattr(tokenizer, "unk_token_id", None)
    odd = [tokens[p] for p in special_positions(tokenizer, tokens)] if tokenizer is not None else []
    odd += [token for token in tokens if token == unknown]
    if odd:
        return "fail", f"answers {odd} are special or unknown tokens"
    for one, other in product(right, wrong):
        if one[: len(other)] == other[: len(one)]:
            begins = f"of {list(one)} (right) and {list(other)} (wrong), one is the beginning of the other"
            return "warn", f"{begins}: they are not mutually exclusive"
    fewest, most = (limit(len(answer) for answer in (*right, *wrong)) for limit in (min, max))
    length = "one token each" if most == 1 else f"{fewest} to {most} tokens" if fewest < most else f"{most} tokens each"
    words = ", ".join(_word(token, tokenizer) for token in dict.fromkeys(tokens) if token in in_context)
    return "pass", f"{len(right)} right, {len(wrong)} wrong, {length}{words and f'; {words} as the prompt continues'}"


def _in_context(pairs: Sequence[Pair], tokenizer: Any) -> set[int]:
    """Return the answer tokens whose text would be tokenized differently without a prompt in front."""
    every = {token for pair in pairs for side in pair.answers for answer in side for token in answer}
    alone = {} if tokenizer is None else {token: by_itself(tokenizer, token) for token in every}
    return {token for token, ids in alone.items() if ids not in (None, (token,))}


def _labels(pair: Pair, usual: Counter[str], pairs: int, tokenizer: Any) -> Outcome:
    missing = sorted(label for label, count in usual.items() if label not in pair.labels and count > pairs / 2)
    if missing:
        return "warn", f"labels that most pairs have are missing: {', '.join(missing)}"
    shown = (
        f"{label} {position}: {' '.join(_word(pair.clean[p], tokenizer) for p in positions_of(position))}"
        for label, position in pair.labels.items()
    )
    return "pass", ", ".join(shown) or "no labels"


def _duplicate(pair: Pair, index: int, seen: dict[Any, int]) -> Outcome:
    first = seen.setdefault((pair.clean, pair.corrupted, pair.answers), index)
    return ("pass", "once") if first == index else ("fail", f"identical to pair {first}")


def _gap(gap: float, usual: float) -> Outcome:
    detail = f"gap {gap:.2f}, median {usual:.2f}"
    return ("warn" if gap < SMALL * usual else "pass"), detail


def _word(token: int, tokenizer: Any) -> str:
    return repr(str(tokenizer.decode([token])).strip()) if hasattr(tokenizer, "decode") else str(token)


def without(pairs: Sequence[Pair], found: Checklist, dropped: str | Sequence[str]) -> tuple[Pair, ...]:
    """Return the pairs that are kept by `Pairs.drop`, which describes the arguments and errors."""
    check_kinds(Checklist, found=found)
    if len(found.clean) != len(pairs):
        raise FeatpatchError(
            f"the checklist is of {counted(len(found.clean), 'pair')} and these are {len(pairs)}: expected a checklist of "
            "these pairs; call check on them"
        )
    check_kinds((str, Sequence), verdicts=dropped)
    names = [dropped] if isinstance(dropped, str) else list(dropped)
    unknown = [name for name in names if not isinstance(name, str) or name not in SEVERITY]
    if unknown:
        raise FeatpatchError(f"verdicts {', '.join(map(repr, unknown))}: expected some of {', '.join(SEVERITY)}")
    left = tuple(pair for pair, verdict in zip(pairs, found.verdicts(), strict=True) if verdict not in names)
    if not left:
        raise FeatpatchError(
            f"none of {counted(len(pairs), 'pair')} is left without the verdict {dropped!r}: expected some pairs to "
            "keep; look at the findings"
        )
    return left


def check_by_position(pairs: Sequence[Pair]) -> None:
    """Raise a FeatpatchError if a pair is patched label by label."""
    for number, pair in enumerate(pairs):
        if pair.by_label:
            raise FeatpatchError(
                f"pair {number} is patched label by label ({pair!r}): expected prompts that correspond position by position; "
                "use rank_features, rank_components or ablate with method='exact' and without screen, or make the pairs with "
                "align='labels' and a filler="
            )
