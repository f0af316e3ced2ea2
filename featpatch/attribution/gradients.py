"""Activations and gradients of both runs of every pair, each computed once, in the model without SAEs.

Activations are those of the unmodified model. So are gradients, except those of `relp`, `relp_qk` and `gim`.

atp             The gradient at the base run itself (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
ig              The mean gradient along the straight line from base to source at one hook point, with the rest of the model
                running freely; midpoint rule (Sundararajan et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647).
eap_ig_inputs   The mean gradient along the straight line of the residual stream that enters the first layer, at all hook points
                at once; midpoint rule (Hanna et al. 2024, arXiv 2403.17806). This is not the same quantity as `ig`, because the
                activations at all hook points change along the line.
grad_drop       The gradient at the base run, once for every layer, with no gradient through that layer's attention and MLP, to
                reveal effects that cancel between layers. The absolute values of the resulting estimates are added up and
                divided by the number of layers - 1: a size without sign, for ranking (GradDrop of AtP*, Kramar et al. 2024,
                arXiv 2403.00745).
relp, relp_qk   The gradient at the base run under other rules of the backward pass, which `model.backward` defines: relevance
                patching (Jafari et al. 2025, arXiv 2508.21258), with attention patterns as constants or as they are.
gim             Likewise: gradient interaction modifications (Edin et al. 2025, arXiv 2505.17630).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch.errors import FeatpatchError, check_choices, check_kinds, check_numbers
from featpatch.metric_functions import Metric
from featpatch.metrics import SEQUENCES, Measure, find, one_metric
from featpatch.model.backward import LIVE, RULES, modified
from featpatch.model.facts import check_tokens
from featpatch.model.gradients import gradients
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import DIRECTIONS, Direction, check_directions
from featpatch.pairs.pair import Pair, check_answers
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary
from featpatch.sites import by_position, component, resid_pre

LOCAL = ("atp", *RULES)
"""The methods with one gradient, taken at the base run, which is the model's own or follows other rules."""

METHODS = ("atp", "ig", "eap_ig_inputs", "grad_drop", *RULES)
"""The names of the methods."""

STEPPED = ("ig", "eap_ig_inputs")
"""The methods that average gradients along a line."""

STEPS = 10
"""The default number of points along that line."""

INPUT = resid_pre(0)
"""The hook point of the residual stream that enters the first layer."""

TOKENS_AT_ONCE = 1024
"""The largest number of tokens that go through the model together."""

WITHOUT_GRADIENT = ("neg_rank", "accuracy", *SEQUENCES)
"""Metrics without a gradient at the answer position."""

SOURCE: Mapping[Direction, Direction] = {"denoising": "noising", "noising": "denoising"}
"""The source run of each direction. A run is named by the direction that patches it, so the source is named by the other."""


@dataclass(frozen=True)
class Taken:
    """Gradients of some runs.

    Attributes:
        gradients: the gradients `[variants, runs, pos, ...]` by hook point; one variant or, for GradDrop, one per layer.
        ends: the metric `[runs]` with the whole activation at a hook point patched from the source, by hook point, if it was
            run.
    """

    gradients: Mapping[str, torch.Tensor]
    ends: Mapping[str, Float[torch.Tensor, " runs"]]


@dataclass(frozen=True)
class Runs:
    """Some equally long prompts with their metric.

    Attributes:
        lens: the model.
        tokens: the token ids.
        answers: the answer position of each prompt.
        measure: computes the metric `[runs]` from the logits at the answer positions.
    """

    lens: Lens
    tokens: Int[torch.Tensor, "runs pos"]
    answers: Int[torch.Tensor, " runs"]
    measure: Callable[[torch.Tensor], torch.Tensor]

    def integrated(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """Compute gradients by the method `ig`."""
        lines = {site: self._along(site, changes[site], [site], steps) for site in sites}
        return Taken({site: found[site] for site, (found, _) in lines.items()}, {site: end for site, (_, end) in lines.items()})

    def integrated_inputs(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """Compute gradients by the method `eap_ig_inputs`."""
        gradients, end = self._along(INPUT, changes[INPUT], sites, steps)
        return Taken(gradients, {INPUT: end})

    def dropped(self, sites: Sequence[str]) -> Taken:
        """Compute gradients by the method `grad_drop`."""
        each = []
        for layer in range(self.lens.n_layers):
            stopped = [component(layer, name) for name in ("attn_out", "mlp_out")]
            there = [hook for hook in stopped if hook in self.lens.hook_points]
            each.append(gradients(self.lens, self.tokens, sites, self.answers, self.measure, stopped=there).gradients)
        return Taken({site: torch.stack([of_layer[site] for of_layer in each]) for site in sites}, {})

    def _along(
        self, moved: str, change: torch.Tensor, sites: Sequence[str], steps: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return mean gradients along a line at the hook point `moved`, and the metric at the end of the line."""
        points = [self._at(moved, (step + 0.5) / steps * change, sites) for step in range(steps)]
        mean = {site: torch.stack([gradients[site] for gradients, _ in points]).mean(0, keepdim=True) for site in sites}
        return mean, self._at(moved, change, [moved])[1]

    def _at(self, moved: str, change: torch.Tensor, sites: Sequence[str]) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        """Return gradients and metric with a change added at the hook point `moved`."""
        with self.lens.edit(self.lens.carrier(moved), lambda x: x + change.reshape(x.shape).to(x)):
            found = gradients(self.lens, self.tokens, sites, self.answers, self.measure)
        return found.gradients, found.values


@dataclass(frozen=True, eq=False)
class PairGradients:
    """Activations and gradients of one pair.

    Attributes:
        index: the index of the pair.
        pair: the pair.
        first: the first position at which its runs can differ.
        values: the metric of each run, by the direction that patches the run.
        activations: the activations `[pos, ...]` of each run, by direction and hook point.
        gradients: the gradients `[variants, pos, ...]` of each run, by direction and hook point.
        ends: the metric of each run with a whole activation patched from the other run, by direction and hook point, if known.
        splits: features and error of each run, by the name of the dictionary, computed when they are first needed.
    """

    index: int
    pair: Pair
    first: int
    values: Mapping[Direction, float]
    activations: Mapping[Direction, Mapping[str, torch.Tensor]]
    gradients: Mapping[Direction, Mapping[str, torch.Tensor]]
    ends: Mapping[Direction, Mapping[str, float]]
    splits: dict[str, dict[Direction, Split]] = field(default_factory=dict)

    def tokens(self, direction: Direction) -> tuple[int, ...]:
        """Return the tokens of the run that the direction patches."""
        return self.pair.corrupted if direction == "denoising" else self.pair.clean

    def change(self, site: str, direction: Direction) -> torch.Tensor:
        """Return source minus base, `[pos, ...]` or, for patterns, `[head, pos, source]`; exactly 0 before `first`."""
        change = self.activations[SOURCE[direction]][site] - self.activations[direction][site]
        (change if by_position(site) else change.transpose(0, 1))[: self.first] = 0
        return change

    def split(self, dictionary: Dictionary) -> Mapping[Direction, Split]:
        """Split both runs by a dictionary, as batches of one."""
        if dictionary.name not in self.splits:
            self.splits[dictionary.name] = {
                direction: dictionary.split({hook: of_run[hook][None] for hook in dictionary.hooks})
                for direction, of_run in self.activations.items()
            }
        return self.splits[dictionary.name]


def differentiable(metric: str | Metric | Sequence[str | Metric]) -> Measure:
    """Return the metric of which gradients are computed.

    Raises:
        FeatpatchError: there are several metrics or none, or the metric is unknown or has no gradient.
    """
    use = "for estimates, which need a gradient of the logits at one token; use method='exact', which supports every metric"
    return find(one_metric(metric), WITHOUT_GRADIENT, use)


def check_method(method: str) -> str:
    """Return the name of a method of estimation; raise a FeatpatchError if it is unknown."""
    check_choices(METHODS, method=method)
    return method


def check_gradient(measure: Measure, method: str, directions: Sequence[Direction]) -> tuple[Direction, ...]:
    """Return directions after checking them.

    Raises:
        FeatpatchError: a direction is unknown, or noising would use the gradient of `"neg_kl"` at the clean run, which is zero.
    """
    ways = check_directions(directions)
    if "noising" in ways and measure.needs == "clean" and method not in STEPPED:
        raise FeatpatchError(
            f"metric {measure.name!r} with method={method!r} and directions={list(ways)}: expected a gradient that is not "
            "zero, but this metric's is zero at the clean run, where noising needs it; use directions=['denoising'], "
            "method='exact', or, for features and components, method='ig' or 'eap_ig_inputs'"
        )
    return ways


class Gradients:
    """Activations and gradients of both runs of every pair, computed when they are first needed, and kept.

    With the same `Gradients`, estimates for another dictionary at the same hook points, or at other positions, need no further
    runs of the model, unless its weights or hooks have changed. `featpatch.attribution.gradients` defines the methods and cites
    their sources.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: clean and corrupted prompts with their answers.
        metric: one differentiable metric. The gradient of `"neg_kl"` is zero at the clean run, which all methods but `"ig"` and
            `"eap_ig_inputs"` use for noising: with them use it only for denoising.
        method: `"atp"`: attribution patching, a forward and a backward pass per run. `"ig"`: integrated gradients at each hook
            point, with `steps` forward and backward passes per hook point. `"eap_ig_inputs"`: gradients averaged along the line
            between the prompts' embeddings, with `steps` passes for all hook points. `"grad_drop"`: one pass per layer of the
            model; the estimates have no sign (`metadata["unsigned"]`). `"relp"`, `"relp_qk"` and `"gim"`: as many passes as
            `"atp"`, with a modified backward pass. In all three, the scales of norms are constants. `"relp"` (relevance
            patching) also treats attention patterns as constants and an activation function as a product with a constant, and
            gives half of the gradient to each factor of a gated MLP; `"relp_qk"` leaves attention patterns as they are.
            `"gim"` leaves activation functions as they are, uses the softmax Jacobian at temperature 2, and gives half of the
            gradient to each factor of attention and of gated MLPs. The estimates of all features and the error of a hook point
            still add up to that of the whole activation, but `metadata["whole_residual"]` is then the error of the rules too.
            They need MLPs that are gated or `act(x W_in) W_out`, and no mixtures of experts.
        steps: the number of points of the midpoint rule, only for `"ig"` and `"eap_ig_inputs"`; 10 by default.
        qk_fix: whether estimates of queries and keys compute their effect on the head's output exactly, in a pass of their
            layer alone (one for all queries of a prompt, one for the keys of each requested position). With
            `method="grad_drop"` this is AtP* (Kramar et al. 2024, arXiv 2403.00745).
        keep: whether to keep activations and gradients in memory, on the model's device.

    Raises:
        FeatpatchError: the input is unusable.

    Examples:
        >>> gradients = fp.Gradients(model, pairs, method="ig", steps=2)
        >>> options = {"positions": ["S2"], "method": gradients, "progress": False}
        >>> estimates = [fp.rank_features(model, sae, pairs, **options) for sae in saes]  # the runs are shared
        >>> [table.value for table in estimates]
        ['estimate', 'estimate']
    """

    def __init__(
        self,
        model: Any,
        pairs: Pairs,
        *,
        metric: str | Metric | Sequence[str | Metric] = "logit_diff",
        method: str = "atp",
        steps: int | None = None,
        qk_fix: bool = True,
        keep: bool = True,
    ) -> None:
        self.measure, self.method = differentiable(metric), check_method(method)
        if steps is not None and method not in STEPPED:
            raise FeatpatchError(
                f"steps={steps!r} with method={method!r}: expected steps only with method={' or '.join(map(repr, STEPPED))}; "
                "leave steps out"
            )
        self.steps = STEPS if steps is None else steps
        check_numbers(1, steps=self.steps)
        self.pairs = check_pairs(pairs, model=model)
        for index, pair in enumerate(pairs):
            check_answers(pair, [self.measure.name] if self.measure.of_answers else [])
            if not pair.correct and self.measure.of_answers:
                raise FeatpatchError(
                    f"pair {index}: its answers {pair.answers} have several tokens, and {self.measure.name} reads one: "
                    "expected one-token answers; measure answers of several tokens with method='exact'"
                )
        self.model, self.lens = model, wrap(model)
        if method == "grad_drop" and self.lens.n_layers < 2:
            raise FeatpatchError(
                "the model has one layer: expected two or more for method='grad_drop', which drops one layer at a time; use "
                "method='atp'"
            )
        check_tokens(pairs, self.lens)
        check_kinds(bool, qk_fix=qk_fix, keep=keep)
        self.qk_fix = qk_fix
        self._keep, self._state = keep, None  # type: bool, object
        self._kept: dict[tuple[int, ...], _Batch] = {}

    def __repr__(self) -> str:
        return f"gradients of {self.measure.name} over {self.pairs!r}, by {self.method}; {len(self._kept)} batches cached"

    def check_directions(self, directions: Sequence[Direction]) -> tuple[Direction, ...]:
        """Check directions for this metric and method and return them, see `check_gradient`."""
        return check_gradient(self.measure, self.method, directions)

    def of(self, reads: Sequence[str], sites: Sequence[str]) -> Iterator[PairGradients]:
        """Yield each pair with its activations at `reads` and `sites` and its gradients at `sites`, grouped by length."""
        self.lens.watch.begin()
        state = self.lens.state() if self._keep else None
        if state != self._state:
            self._kept.clear()
            self._state = state
        for some in map(tuple, self.pairs.chunks(TOKENS_AT_ONCE)):
            batch = self._kept.get(some) or _Batch(self, some)
            if self._keep:
                self._kept[some] = batch
            batch.take([*reads, *sites], sites)
            yield from batch


@dataclass(eq=False)
class _Batch:
    """Activations `[pairs, ...]` and gradients `[variants, pairs, ...]` of some equally long pairs.

    Attributes:
        of: the `Gradients` that the batch belongs to.
        some: the indices of the pairs.
        values, activations, gradients, ends: as in `PairGradients`, for all pairs together.
        clean: the logits of the clean runs, if the metric needs them.
    """

    of: Gradients
    some: tuple[int, ...]
    values: dict[Direction, torch.Tensor] = field(default_factory=dict)
    activations: dict[Direction, dict[str, torch.Tensor]] = field(default_factory=lambda: {way: {} for way in DIRECTIONS})
    gradients: dict[Direction, dict[str, torch.Tensor]] = field(default_factory=lambda: {way: {} for way in DIRECTIONS})
    ends: dict[Direction, dict[str, torch.Tensor]] = field(default_factory=lambda: {way: {} for way in DIRECTIONS})
    clean: Sequence[torch.Tensor] = ()

    def take(self, reads: Sequence[str], sites: Sequence[str]) -> None:
        """Compute what has not been computed yet; raise a FeatpatchError if a gradient is NaN or infinite."""
        method, known = self.of.method, self.activations["noising"]
        wanted = sites if method in ("ig", "grad_drop") else [INPUT, *sites]
        missing = [site for site in dict.fromkeys(wanted) if site not in self.gradients["noising"]]
        unread = [hook for hook in dict.fromkeys([*reads, *missing, INPUT]) if hook not in known]
        runs = {direction: self._runs(direction) for direction in DIRECTIONS}
        for direction, run in runs.items():
            if not missing:
                self.activations[direction].update(self.of.lens.read(run.tokens, unread) if unread else {})
                continue
            with modified(self.of.lens, RULES.get(method, LIVE)):
                found = gradients(self.of.lens, run.tokens, missing, run.answers, run.measure, reads=unread)
            if not all(torch.isfinite(g).all() for g in found.gradients.values()):
                raise FeatpatchError(
                    f"the gradient of {self.of.measure.name} is NaN or infinite: expected finite numbers; check the metric"
                )
            self.values[direction] = found.values
            self.activations[direction].update(found.activations)
            if method in LOCAL:
                self.gradients[direction].update({site: gradient[None] for site, gradient in found.gradients.items()})
        for direction, run in runs.items() if missing else ():
            taken = self._taken(direction, run, missing)
            self.gradients[direction].update(taken.gradients)
            self.ends[direction].update(taken.ends)

    def _taken(self, direction: Direction, run: Runs, sites: list[str]) -> Taken:
        """Compute gradients by a method that needs further runs; for a local one, only return the source's metric."""
        base, source = self.activations[direction], self.activations[SOURCE[direction]]
        changes = {site: source[site] - base[site] for site in (*sites, INPUT)}
        if self.of.method == "ig":
            return run.integrated(changes, sites, self.of.steps)
        if self.of.method == "eap_ig_inputs":
            return run.integrated_inputs(changes, sites, self.of.steps)
        if self.of.method == "grad_drop":
            return run.dropped(sites)
        return Taken({}, {INPUT: self.values[SOURCE[direction]]})

    def _runs(self, direction: Direction) -> Runs:
        pairs = [self.of.pairs[index] for index in self.some]
        tokens = torch.tensor([pair.corrupted if direction == "denoising" else pair.clean for pair in pairs])
        answers = torch.tensor([pair.answer_position for pair in pairs])
        clean = self._clean(pairs, answers) if self.of.measure.needs == "clean" else [None] * len(pairs)

        def measure(logits: torch.Tensor) -> torch.Tensor:
            """Return the metric of each row, with the answers or the clean run of its pair."""
            values = []
            for row, pair, of_clean in zip(logits, pairs, clean, strict=True):
                columns = self.of.measure.columns(pair.correct, pair.wrong)
                read = row if columns is None else row[list(columns)]
                values.append(self.of.measure.of(read[None], pair.correct, pair.wrong, of_clean))
            return torch.cat(values)

        return Runs(self.of.lens, tokens, answers, measure)

    def _clean(self, pairs: Sequence[Pair], answers: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the logits of the clean runs, `[1, d_vocab]` each."""
        if not self.clean:
            self.clean = self.of.lens.answer(torch.tensor([pair.clean for pair in pairs]), answers).detach().split(1)
        return self.clean

    def __iter__(self) -> Iterator[PairGradients]:
        for slot, index in enumerate(self.some):
            pair = self.of.pairs[index]
            yield PairGradients(
                index=index,
                pair=pair,
                first=pair.first_difference if self.of.lens.causal else 0,
                values={way: float(values[slot]) for way, values in self.values.items()},
                activations={way: {hook: x[slot] for hook, x in found.items()} for way, found in self.activations.items()},
                gradients={way: {site: g[:, slot] for site, g in found.items()} for way, found in self.gradients.items()},
                ends={way: {site: float(end[slot]) for site, end in found.items()} for way, found in self.ends.items()},
            )
