"""Dose and response: how a metric, and what steering breaks, depend on how strongly a feature is steered.

Effects at the answer are exact patches in the fast engine: the model is steered at tokens of the prompt, and a feature's own
change doesn't reach what it reads. Measures of generated text come from generations within `fp.steer`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.effects.statistics import interval
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_choices, check_kinds, check_numbers, counted, is_finite
from featpatch.frame import Frame, text
from featpatch.metric_functions import Metric
from featpatch.metrics import find, one_metric
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Combine, Node, Patch
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.ablation import Ablation
from featpatch.patching.ablation_values import Everywhere, Values
from featpatch.patching.joint import node_study
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any
from featpatch.sae.nodes import check_nodes, with_owner
from featpatch.steering.positions import Places, check_places
from featpatch.steering.steer import Encode, How, check_node, moved, steer
from featpatch.steering.units import Unit, raw_values
from featpatch.untrusted import in_figure

KL = "neg_kl"
"""The metric whose change is minus the KL divergence of the unsteered from the steered answer distribution."""

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Moved(Everywhere):
    """Values of the clean run as steering moves them.

    Attributes:
        how: what the numbers do.
        amounts: the number of each feature, `[d_sae]`, by dictionary.
        amount: the number for all other nodes.
    """

    how: How
    amounts: Mapping[str, torch.Tensor]
    amount: float

    def values(self, of: str | Dictionary, like: Values, length: int) -> Values:
        """Return the moved features, and the error as it is, or the moved activation."""
        if isinstance(of, str):
            return tuple(moved(each, torch.tensor(self.amount, dtype=torch.float64), self.how) for each in like)
        features, error = like
        return moved(features, self.amounts[of.name], self.how), error


@dataclass(frozen=True, repr=False)
class DoseResponse:
    """The response to doses of nodes, each steered alone.

    Attributes:
        nodes: the nodes.
        doses: the doses, in `unit`.
        raw: the raw number of each node and dose, `[nodes, doses]`.
        measured: the measures by name, `[nodes, doses, prompts]`: `effect` (the change of the metric) and `kl`, unless only
            generated tokens are steered, and for generated text `perplexity`, `repetition` and `score`.
        unsteered: the metric and the measures of generated text without steering, `[prompts]`.
        texts: the generated texts of each node and dose, one per prompt; empty if none were generated.
        metadata: the metric, what the numbers do, the unit, the positions, and whether all doses are finished.

    Examples:
        >>> doses = fp.dose_response(model, pairs, effects.top(2), [0.0, 2.0], saes=saes, progress=False)
        >>> doses.table()[["dose", "effect", "kl"]].shape
        (4, 3)
    """

    nodes: tuple[Node, ...]
    doses: tuple[float, ...]
    raw: NDArray[np.float64]
    measured: Mapping[str, NDArray[np.float64]]
    unsteered: Mapping[str, NDArray[np.float64]]
    texts: Mapping[tuple[Node, float], Sequence[str]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """Return one row per node and dose, with the mean of each measure over prompts and its 95 % bootstrap interval."""
        rows = [(node, dose) for node in self.nodes for dose in self.doses]
        found: dict[str, Any] = {"node": [str(node) for node, _ in rows], "dose": [dose for _, dose in rows]}
        frame = Frame({**found, "raw": self.raw.flatten()})
        for name, values in self.measured.items():
            flat = values.reshape(len(rows), -1)
            frame[name] = flat.mean(1)
            frame[f"{name}_low"], frame[f"{name}_high"] = interval(flat, np.ones(flat.shape[1])).T
        return frame

    def plot(self, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` with a panel per measure, and a line with intervals per node.

        Args:
            title: the title of the figure.
        """
        from plotly.subplots import make_subplots  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        names, table = list(self.measured), self.table()
        titles = [f"change of {self.metadata['metric']}" if name == "effect" else name for name in names]
        figure = make_subplots(cols=len(names), subplot_titles=[in_figure(title) for title in titles])
        for column, name in enumerate(names, 1):
            for number, (node, rows) in enumerate(table.groupby("node", sort=False)):
                ends = {"array": rows[f"{name}_high"] - rows[name], "arrayminus": rows[name] - rows[f"{name}_low"]}
                line = {"x": rows["dose"], "y": rows[name], "error_y": ends, "name": in_figure(str(node))}
                colour = {"marker_color": COLOURS[number % len(COLOURS)], "legendgroup": str(number)}
                figure.add_scatter(**line, **colour, showlegend=column == 1, row=1, col=column)
        unit = "" if self.metadata["unit"] == "raw" else f", in units of the {self.metadata['unit']} activation"
        figure.update_xaxes(title_text=f"dose ({self.metadata['how']}{unit})")
        return figure.update_layout(title=in_figure(title))

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {values.mean():.3g}" for name, values in self.unsteered.items())
        prompts = counted(len(next(iter(self.unsteered.values()))), "prompt")
        return f"{self.metadata['how']} at {self.metadata['positions']}, {prompts}; unsteered: {said}\n{text(self.table())}"

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False, max_rows=20, float_format="{:.3g}".format)


COLOURS = ("#2166ac", "#c0392b", "#1b7837", "#762a83", "#b35806", "#01665e", "#8c510a", "#4d4d4d")
"""The colours of lines."""


def dose_response(
    model: Any,
    pairs: Pairs,
    nodes: Effects | Sequence[Node],
    doses: Sequence[float],
    *,
    saes: Any = None,
    how: How = "add",
    unit: Unit = "raw",
    reference: Sequence[str] | Pairs | None = None,
    positions: Places = "all",
    encode: Encode = "steered",
    metric: str | Metric | Sequence[str | Metric] = "logit_diff",
    tokens: int = 0,
    score: Callable[[str], float] | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> DoseResponse:
    """Steer each node alone at several doses, and measure a metric together with what steering breaks.

    Effects and KL divergence at the answer are exact patches of the clean prompts. With `tokens`, text is generated too.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        pairs: the prompts, whose clean ones are steered; corrupted prompts are not needed.
        nodes: features, heads or other nodes as in `fp.steer`, each steered by itself; or a table of effects whose rows are the
            nodes. Their own positions are ignored.
        doses: the numbers.
        saes, how, unit, reference: as in `fp.steer`.
        positions: as in `fp.steer`; `"generated"` only with `tokens`, and then without `effect` and `kl`, because the answer is
            predicted in the prompt.
        encode: as in `fp.steer`, for generated text. The effect on the answer is that of features read in the unsteered model.
        metric: one metric of the answer.
        tokens: the number of tokens to generate greedily after each prompt; 0 for none.
        score: a function from a generated text to a number, such as a classifier; only with `tokens`.
        batch_rows, progress: as in `rank_features`.

    Returns:
        For each node and dose the change of the metric (`effect`), the KL divergence of the unsteered from the steered answer
        distribution (`kl`) and, with `tokens`, the `perplexity` of the generated text under the unsteered model, its
        `repetition` (the share of its pairs of adjacent tokens that have occurred before) and the `score`. After Ctrl-C, the
        doses that are finished.

    Raises:
        FeatpatchError: the input is unusable; the message gives the value, what was expected and what to do next.
        KeyboardInterrupt: after Ctrl-C before the first dose is finished.

    Examples:
        >>> doses = fp.dose_response(model, pairs, effects.top(1), [0.0, 1.0, 4.0], saes=saes, how="scale", progress=False)
        >>> doses.doses, bool(abs(doses.measured["effect"][0, 1]).max() < 1e-4)  # 1 times a value is the value
        ((0.0, 1.0, 4.0), True)
    """
    lens = wrap(model)
    check_pairs(pairs)
    check_choices(get_args(How), how=how)
    check_choices(get_args(Encode), encode=encode)
    check_numbers(0, tokens=tokens)
    if score is not None and not callable(score):
        raise FeatpatchError(f"score is of type {type(score).__name__}: expected a function from a text to a number")
    if score is not None and not tokens:
        raise FeatpatchError(
            "score without tokens: expected a number of tokens to generate, whose text is scored; pass tokens=20"
        )
    if not isinstance(doses, (list, tuple)) or not doses or not all(map(is_finite, doses)) or len(set(doses)) < len(doses):
        raise FeatpatchError(f"doses={doses!r:.80}: expected a list of finite numbers, each once, such as [0.0, 1.0, 4.0]")
    places = check_places(positions, None if isinstance(positions, str) else pairs[0])
    if places == "generated" and not tokens:
        raise FeatpatchError(
            "positions='generated' without tokens: expected a number of tokens to generate; pass tokens=20, or other positions"
        )
    found = dictionaries_if_any(lens, saes)
    owned = [with_owner(lens, node, found) for node in check_nodes(lens, nodes, found, "nodes")]
    for node, owner in owned:
        check_node(node, owner, how)
    if tokens:
        lens.check_room(max(len(pair.clean) for pair in pairs), tokens)
    chosen = tuple(dict.fromkeys(replace(node, position="all") for node, _ in owned))
    name = find(one_metric(metric)).name
    metrics = [one_metric(metric), *([KL] if name != KL else [])]
    one = raw_values(lens, found, dict.fromkeys(chosen, 1.0), how, unit, reference)
    given, at_answer = {"saes": saes, "how": how, "positions": positions, "encode": encode}, places != "generated"
    unsteered: dict[str, NDArray[np.float64]] = {}
    finished: list[dict[str, NDArray[np.float64]]] = []
    texts: dict[tuple[Node, float], Sequence[str]] = {}
    steps = len(doses) * (at_answer + (len(chosen) if tokens else 0))
    with tqdm(total=steps, desc="steering", unit="dose", disable=not progress) as bar:
        try:
            if tokens:
                _, unsteered = _texts(lens, pairs, tokens, score)
            for dose in doses:
                amounts = {node: one[node] * dose for node in chosen}
                of_dose: dict[str, NDArray[np.float64]] = {}
                if at_answer:
                    effects = _effects(lens, saes, found, pairs, amounts, how, places, metrics, batch_rows)
                    unsteered = {name: effects.clean, **unsteered}
                    of_dose["effect"] = -_changes(effects, len(chosen))
                    of_dose["kl"] = _changes(effects.for_metric(KL), len(chosen))
                    bar.update()
                made = []
                for node, amount in amounts.items() if tokens else ():
                    made.append(_texts(lens, pairs, tokens, score, {node: float(amount)}, given))
                    bar.update()
                texts |= {(node, float(dose)): said for node, (said, _) in zip(chosen, made, strict=False)}
                of_dose |= {key: np.stack([values[key] for _, values in made]) for key in (made[0][1] if made else ())}
                finished.append(of_dose)
        except KeyboardInterrupt:
            if not finished:
                raise
    done = tuple(map(float, doses[: len(finished)]))
    measured = {key: np.stack([of_dose[key] for of_dose in finished], axis=1) for key in finished[0]}
    raw = np.array([[float(one[node]) * dose for dose in done] for node in chosen])
    about = {"metric": name, "how": how, "unit": unit, "positions": positions, "finished": len(done) == len(doses)}
    return DoseResponse(chosen, done, raw, measured, unsteered, texts, about)


def _effects(
    lens: Lens,
    saes: Any,
    found: Sequence[Dictionary],
    pairs: Pairs,
    amounts: Mapping[Node, torch.Tensor],
    how: How,
    places: Places,
    metrics: Sequence[str | Metric],
    batch_rows: int | None,
) -> Effects:
    """Return the metrics of the clean prompts with each node steered by its number; the index of a row is that of its node."""
    by_dictionary = {dictionary.name: torch.zeros(dictionary.d_sae, dtype=torch.float64) for dictionary in found}
    for node, amount in amounts.items():
        if node.sae:
            owner = next(dictionary for dictionary in found if dictionary.name == node.sae)
            by_dictionary[node.sae][owner.number(node)] = amount
    others = [float(amount) for node, amount in amounts.items() if not node.sae]
    contrast = Ablation(Moved(how, by_dictionary, others[0] if others else 0.0), f"{how} {[*map(float, amounts.values())]}")
    at: Sequence[int | str] = places if not isinstance(places, str) else [-1] if places == "newest" else ["all"]
    patches = [Patch(tuple(replace(node, position=position) for position in at), str(node)) for node in amounts]
    study, _ = node_study(
        lens.model, saes, pairs, patches, lambda parts: contrast, combine=_combine(found, amounts),
        directions=["noising"], metric=metrics, batch_rows=batch_rows,
    )  # fmt: skip
    return study.complete(progress=False)


def _combine(found: Sequence[Dictionary], nodes: Iterable[Node]) -> Combine | None:
    """Return what a patch at several hook points means: steering adds the changes, which are those of the unsteered run."""
    names = {node.sae for node in nodes}
    return "add" if any(len(dictionary.outputs) > 1 for dictionary in found if dictionary.name in names) else None


def _changes(effects: Effects, count: int) -> NDArray[np.float64]:
    """Return the loss of a metric `[nodes, prompts]`; 0 where nothing changes."""
    found = np.zeros((count, len(effects.clean)))
    found[effects.indices] = effects.changes("degradation").toarray()
    return found


def _texts(
    lens: Lens,
    pairs: Pairs,
    tokens: int,
    score: Callable[[str], float] | None,
    values: Mapping[Node, float] | None = None,
    options: Mapping[str, Any] = NONE,
) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Generate a text after each clean prompt, steered if there are values, and measure the texts, `[prompts]` each."""
    texts, measures = [], []
    for pair in pairs:
        prompt = torch.tensor([pair.clean])
        named = None if isinstance(options.get("positions"), str) else pair
        with steer(lens.model, values, pair=named, **options) if values else nullcontext():
            made = lens.generate(prompt, tokens)
        new = made[0, len(pair.clean) :].tolist()
        texts.append(lens.tokenizer.decode(new) if lens.tokenizer is not None else " ".join(map(str, new)))
        measures.append({"perplexity": _perplexity(lens, made, len(pair.clean)), "repetition": _repetition(new)})
        if score is not None:
            measures[-1]["score"] = _scored(score, texts[-1])
    return texts, {key: np.array([of[key] for of in measures]) for key in measures[0]}


def _perplexity(lens: Lens, tokens: torch.Tensor, first: int) -> float:
    """Return the perplexity of the tokens from `first` on in the unsteered model."""
    with torch.no_grad():
        logits = lens.run(tokens)[0, first - 1 : -1].double().cpu()
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, first:].cpu(), reduction="mean")
    return float(losses.exp())


def _repetition(tokens: Sequence[int]) -> float:
    """Return the share of pairs of adjacent tokens that have occurred before; 0 for a single token."""
    pairs = list(pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _scored(score: Callable[[str], float], text: str) -> float:
    """Return the user's score of a text, or raise a FeatpatchError if it is not a finite number."""
    found = score(text)
    if not is_finite(found):
        raise FeatpatchError(f"score({text[:40]!r}) returned {found!r}: expected a finite number")
    return float(found)
