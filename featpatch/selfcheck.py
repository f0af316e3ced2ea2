"""A check, on the user's prompts, whether a dictionary belongs to its hook point of this model.

A dictionary that does not belong there explains too little of the variance. To find the reason, it is then tried on centred
activations and in the two adjacent layers or, if it has one hook point, at others of the three layers. All layers are tried if
its configuration claims an explained variance, if it explains little, or if it explains more at one of those.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool

from featpatch import sites
from featpatch.errors import FeatpatchError, counted
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.model.loading import processing_steps
from featpatch.model.transformer_lens import wrap
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.sae.loading import official_name
from featpatch.untrusted import visible

LITTLE = 0.5
"""The explained variance below which a dictionary is not reported as fitting."""
MARGIN = 0.05
"""The largest accepted shortfall of the explained variance from the value that the dictionary's configuration claims."""


@dataclass(frozen=True)
class Fit:
    """The fit of one dictionary to the model, measured on the prompts of a check.

    Attributes:
        dictionary: the name of the dictionary.
        identity: the largest deviation of reconstruction + error from the activation, as a share of the activation's largest
            value.
        whole_site: the largest deviation of the change by patching all features and the error from the change by patching the
            whole activation, between clean and corrupted prompts, as a share of the activation's largest value.
        explained_variance: 1 - sum of squared errors / sum of squared deviations from the mean, of all outputs, without special
            tokens.
        expected: the explained variance that the dictionary's configuration or the registry claims, if any.
        l0: the mean number of nonzero features per position.
        misfit: the reason why the dictionary does not fit; empty if it does.
        remarks: further remarks, for example that prompts are longer than those of its training.
    """

    dictionary: str
    identity: float
    whole_site: float
    explained_variance: float
    expected: float | None
    l0: float
    misfit: str
    remarks: tuple[str, ...]

    @property
    def status(self) -> str:
        """The result of the check in a few words."""
        if self.misfit:
            return "does not fit"
        if self.short:
            return "less than it claims"
        return "explains little" if self.explained_variance < LITTLE else "fits"

    @property
    def short(self) -> bool:
        """Whether the dictionary explains less than its configuration claims, by more than `MARGIN`."""
        return self.expected is not None and self.explained_variance < self.expected - MARGIN

    @property
    def ok(self) -> bool:
        """Whether the dictionary fits, and explains as much as its configuration claims if it claims anything."""
        return not (self.misfit or self.short)


@dataclass(frozen=True, repr=False)
class Check:
    """The outcome of `fp.check`.

    Attributes:
        model, weights: the name of the model, and how its weights were processed.
        positions: the number of positions on which the explained variance was measured.
        fits: the fit of each dictionary.
    """

    model: str
    weights: str
    positions: int
    fits: tuple[Fit, ...]

    def __repr__(self) -> str:
        claims = ["" if fit.expected is None else f" of a claimed {fit.expected:.2f}" for fit in self.fits]
        fits = [
            f"{fit.dictionary}: {fit.status}, explains {fit.explained_variance:.2f}{claim}"
            + (f"; {fit.misfit}" if fit.misfit else ".")
            for fit, claim in zip(self.fits, claims, strict=True)
        ]
        said = f"check on {counted(self.positions, 'position')} of {self.model}, weights {self.weights}"
        return visible("\n  ".join([said, *fits]))

    @property
    def ok(self) -> bool:
        """Whether every dictionary fits and explains as much as its configuration claims."""
        return all(fit.ok for fit in self.fits)


POSITIONS = 256
"""The largest number of positions on which the explained variance is measured."""
TRIED = 64
"""The number of positions on which other hook points are compared; the best hook point is then measured on `POSITIONS`."""
FIRST = 3
"""The number of tokens on which it is tested whether hook points can be read."""
GOOD = 0.95
"""The explained variance from which no other hook point is tried for a dictionary whose configuration claims none."""
BETTER = 0.5
"""Another hook point is suggested if it leaves at most this share of the variance unexplained that is unexplained here."""
MISFIT = 0.5
"""The explained variance below which a dictionary is a misfit even if no other hook point fits; also the shortfall from the
claimed explained variance above which it is."""
ROUNDING = 1e-4
"""The largest accepted deviation, as a share of the largest value, of reconstruction + error from the activation, and of
patching all features and the error from patching the whole activation."""


@torch.no_grad()
def check(model: Any, saes: Any, pairs: Pairs) -> Check:
    """Check on some prompts whether dictionaries fit the model.

    The explained variance says little about what the model still predicts; `fp.loss_recovered` measures that, with several more
    forward passes for each dictionary.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: the SAEs, as in `rank_features`.
        pairs: the prompts; their answers are not used. Prompts of unequal length are cut to the shorter one of their pair.

    Returns:
        The fit of each dictionary: the explained variance, what the configuration claims, and what does not fit.

    Raises:
        FeatpatchError: the input is not valid, or every position of the prompts is special.

    Examples:
        >>> check = fp.check(model, saes, pairs)
        >>> check.ok, [fit.status for fit in check.fits]
        (True, ['fits', 'fits'])
    """
    check_pairs(pairs, by_label=True)
    lens = wrap(model)
    check_tokens(pairs, lens)
    pairs = Pairs(tuple(_of_equal_length(pair) for pair in pairs))
    loaded, done = dictionaries(lens, saes), processing_steps(lens)
    runs = Runs.of(lens, {hook for each in loaded for hook in each.hooks}, pairs)
    if not runs.positions:
        raise FeatpatchError("the prompts hold only special tokens: expected words too; give other prompts")
    here = [_explained(dictionary, runs) for dictionary in loaded]
    suspects = [each for each, own in zip(loaded, here, strict=True) if _suspect(each, own.explained_variance)]
    near = _few(lens, [place for dictionary in suspects for place in _near(lens, dictionary)], pairs)
    fits = [_fit(lens, dictionary, own, runs, near, pairs, done) for dictionary, own in zip(loaded, here, strict=True)]
    return Check(lens.name, ", ".join(done) or "unprocessed", runs.positions, tuple(fits))


def _of_equal_length(pair: Pair) -> Pair:
    """Return a pair whose prompts, if they are patched label by label, are cut to the shorter one."""
    if not pair.by_label:
        return pair
    length = min(pair.lengths)
    return replace(
        pair,
        clean=pair.clean[:length],
        corrupted=pair.corrupted[:length],
        answer_position=-1,
        special=frozenset(position for position in pair.special if position < length),
        labels={},
        corrupted_labels={},
    )


@dataclass(frozen=True)
class Explained:
    """Measurements of a dictionary at its hook points, see `Fit`."""

    explained_variance: float
    l0: float
    identity: float
    whole_site: float


@dataclass(frozen=True)
class Runs:
    """Activations of some prompts at some hook points.

    Attributes:
        activations: for each hook point, the activations `[prompt, pos, d]` of each batch of prompts of equal length. The clean
            prompts of a batch have even indices; each is followed by its corrupted prompt.
        kept: for each batch, a mask of the positions that are not special, `[prompt, pos]`.
    """

    activations: Mapping[str, list[torch.Tensor]]
    kept: list[Bool[torch.Tensor, "prompt pos"]]

    @classmethod
    def of(cls, lens: Lens, hooks: Iterable[str], pairs: Pairs, positions: int = POSITIONS) -> "Runs":
        """Run the first pairs, as many as are needed for this number of positions."""
        hooks = sorted(hooks)
        runs = cls({hook: [] for hook in hooks}, [])
        kept = list[torch.Tensor]()
        for pair in pairs:
            kept.append(torch.zeros(len(pair), dtype=torch.bool))
            kept[-1][pair.positions("all")] = True
            if 2 * sum(int(mask.sum()) for mask in kept) >= positions:
                break
        for indices in pairs[: len(kept)].chunks(positions):
            tokens = torch.tensor([tokens for index in indices for tokens in (pairs[index].clean, pairs[index].corrupted)])
            for hook, values in lens.read(tokens, hooks).items():
                runs.activations[hook].append(values.flatten(2))
            runs.kept.append(torch.stack([kept[index] for index in indices for _ in range(2)]))
        return runs

    def fit(self, dictionary: Dictionary) -> bool:
        """Return whether the dictionary's hook points could be read and have the dictionary's width."""
        width = {hook: values[0].shape[2] for hook, values in self.activations.items()}
        hooks, expected = (dictionary.inputs, dictionary.outputs), [dictionary.codec.d_in, dictionary.codec.d_out]
        return set(dictionary.hooks) <= set(width) and [sum(width[hook] for hook in some) for some in hooks] == expected

    @property
    def positions(self) -> int:
        """The number of positions that are not special."""
        return sum(int(kept.sum()) for kept in self.kept)


def _few(lens: Lens, places: Sequence[Dictionary], pairs: Pairs) -> Runs:
    """Run the first prompts for `TRIED` positions, and read the hook points of these dictionaries that can be read."""
    hooks = _readable(lens, pairs[0], sorted({hook for place in places for hook in place.hooks}))
    return Runs.of(lens, hooks, pairs, TRIED) if hooks else Runs({}, [])


def _compared(few: Runs, places: Sequence[Dictionary]) -> list[tuple[float, Dictionary]]:
    """Return the explained variance of a dictionary at each of these places that could be read."""
    tried = [(_tried(place, few), place) for place in places if few.fit(place)]
    return [(variance, place) for variance, place in tried if variance is not None]


def _readable(lens: Lens, pair: Pair, hooks: list[str]) -> list[str]:
    """Return the hook points that can be read and hold finite numbers, found by bisection on the first tokens of a pair."""
    if not hooks:
        return []
    try:
        lens.read(torch.tensor([pair.clean[:FIRST], pair.corrupted[:FIRST]]), hooks)
    except FeatpatchError:
        half = len(hooks) // 2
        return [] if not half else [*_readable(lens, pair, hooks[:half]), *_readable(lens, pair, hooks[half:])]
    return hooks


def _near(lens: Lens, dictionary: Dictionary) -> list[Dictionary]:
    """Return copies of a dictionary at other hook points of its and the adjacent layers, and at its own one of all layers."""
    layer, name = sites.layer_of(dictionary.inputs[0]), sites.within(dictionary.inputs[0])
    return [
        place
        for place in dictionary.elsewhere(lens)
        if abs(sites.layer_of(place.inputs[0]) - layer) <= 1 or sites.within(place.inputs[0]) == name
    ]


def _suspect(dictionary: Dictionary, here: float) -> bool:
    """Return whether a dictionary explains so little that other hook points are tried."""
    expected = dictionary.training.explained_variance
    return here < (GOOD if expected is None else expected - MARGIN)


def _fit(lens: Lens, dictionary: Dictionary, here: Explained, runs: Runs, near: Runs, pairs: Pairs, done: Iterable[str]) -> Fit:
    said = dictionary.training
    deviation = max(here.identity, here.whole_site)
    if deviation > max(ROUNDING, 16 * torch.finfo(lens.dtype).eps):
        misfit = (
            f"all features and the error do not sum to the whole activation (they differ by {deviation:.0e}): this is a bug "
            "in featpatch, please report it"
        )
    else:
        misfit = _misfit(lens, dictionary, runs, near, pairs, done, here.explained_variance)
    fit = Fit(dictionary.name, expected=said.explained_variance, misfit=misfit, remarks=(), **vars(here))
    return replace(fit, remarks=tuple(_remarks(lens, dictionary, pairs, done, short=fit.short and not misfit)))


def _explained(dictionary: Dictionary, runs: Runs, *, centred: bool = False) -> Explained:
    """Encode the activations once and measure what the dictionary explains of them, over all hook points that it writes."""
    squares, active, deviation, difference, largest, written = 0.0, 0, 0.0, 0.0, 0.0, []
    for batch, kept in enumerate(runs.kept):
        values = {hook: runs.activations[hook][batch] for hook in dictionary.hooks}
        if centred:
            values = {hook: x - x.mean(-1, keepdim=True) for hook, x in values.items()}
        split = dictionary.split(values)
        y = dictionary.flat(values, dictionary.outputs).to(split.error)
        rebuilt = dictionary.decode(split.features, split.state) + split.error
        clean, corrupted = split.map(lambda values: values[::2]), split.map(lambda values: values[1::2])
        patched = dictionary.change(corrupted, clean, features=True, error=True)
        where = kept.to(y.device)
        squares += float(split.error[where].double().square().sum())
        active += int((split.features[where] != 0).sum())
        deviation, largest = max(deviation, float((rebuilt - y).abs().max())), max(largest, float(y.abs().max()))
        difference = max(difference, float((patched - (y[::2] - y[1::2])).abs().max()))
        written.append(y[where].double())
    rows, largest = torch.cat(written), largest or 1.0
    variance = float((rows - rows.mean(0)).square().sum())
    explained = 1 - squares / variance if variance else float("nan")
    return Explained(explained, active / len(rows), deviation / largest, difference / largest)


def _tried(dictionary: Dictionary, runs: Runs, *, centred: bool = False) -> float | None:
    """Return the explained variance at candidate hook points, or None if the dictionary gives no finite numbers there."""
    try:
        return _explained(dictionary, runs, centred=centred).explained_variance
    except FeatpatchError:
        return None


def _elsewhere(lens: Lens, dictionary: Dictionary, near: Runs, pairs: Pairs, here: float) -> list[tuple[float, str]]:
    """Return the explained variance at the best other hook point, with its name; empty if none explains more than `here`.

    A dictionary whose configuration claims no explained variance, that explains a fair share here and no more at any hook point
    of this layer and the adjacent ones, is assumed to be at the right hook point; other layers are then not tried.
    """
    close = _near(lens, dictionary)
    tried = _compared(near, close)
    if dictionary.training.explained_variance is not None or here < MISFIT or any(variance > here for variance, _ in tried):
        far = [place for place in dictionary.elsewhere(lens) if place.place not in {place.place for place in close}]
        tried += _compared(_few(lens, far, pairs), far)
    if not tried:
        return []
    variance, best = max(tried, key=lambda each: each[0])
    if variance <= here:
        return []
    again = _tried(best, Runs.of(lens, best.hooks, pairs))
    return [] if again is None else [(again, f"at {best.place}")]


def _misfit(lens: Lens, dictionary: Dictionary, runs: Runs, near: Runs, pairs: Pairs, done: Iterable[str], here: float) -> str:
    """Return why the dictionary does not fit, or an empty text if it does."""
    said = dictionary.training
    expected = said.explained_variance
    if not _suspect(dictionary, here):
        return ""
    others = _elsewhere(lens, dictionary, near, pairs, here)
    if "center_writing_weights" not in done and all(map(sites.on_stream, dictionary.inputs)):
        variance = _tried(dictionary, runs, centred=True)
        others += [] if variance is None else [(variance, "on weights processed with center_writing_weights")]
    best, where = max(others, default=(0.0, ""))
    enough = MISFIT if expected is None else max(MISFIT, expected - MARGIN)
    if best >= enough and 1 - best <= BETTER * (1 - here):
        return (
            f"{best:.2f} of the variance is explained {where}: load the SAE of this hook point and this "
            "model, or use this SAE where it fits"
        )
    if here < (MISFIT if said.known or not dictionary.single else 0) or (expected is not None and here < expected - MISFIT):
        other = _other_weights(dictionary, done)
        return ("no other hook point fits: " if _near(lens, dictionary) else "") + (
            f"{other}; load the model with processing={sorted(said.processing)}"
            if other
            else "it was probably undertrained, or trained on other text, another model of this width or other activations; "
            "check its source and the numbers reported for its training"
        )
    return ""


def _other_weights(dictionary: Dictionary, done: Iterable[str]) -> str:
    """Return how weights were processed differently in training, as far as it affects the dictionary's hook points."""
    said = dictionary.training
    seen = {"fold_ln"} if any(map(sites.after_norm, dictionary.inputs)) else set()
    seen |= {"center_writing_weights"} if any(map(sites.on_stream, dictionary.outputs)) else set()
    trained, here = sorted(seen & set(said.processing)), sorted(seen & set(done))
    if said.model is None or trained == here:
        return ""
    return (
        f"it was trained on weights processed with {', '.join(trained) or 'nothing'}, and these are processed with "
        f"{', '.join(here) or 'nothing'}"
    )


def _remarks(lens: Lens, dictionary: Dictionary, pairs: Pairs, done: Iterable[str], *, short: bool) -> Iterable[str]:
    said = dictionary.training
    longest = max(len(pair) for pair in pairs)
    if said.context_size and longest > said.context_size:
        yield f"it was trained on contexts of {said.context_size} tokens, and the longest prompt has {longest}"
    if said.prepend_bos and not all(0 in pair.special for pair in pairs):
        yield "it was trained with BOS at the start, which some prompts lack"
    if other := _other_weights(dictionary, done):
        yield other
    if short:
        yield (
            "explains less than its configuration claims: check that it was restored as it was trained (JumpReLU threshold, "
            "k, normalisation), and try prompts that resemble its training data"
        )
    ours = official_name(lens.name)
    if said.model and ours and ours != official_name(said.model):
        yield f"its configuration names the model {said.model!r}"
