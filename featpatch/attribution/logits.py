"""Direct logit attribution: what each component adds to an answer's logit directly through the final norm and the unembedding.

    logit(x) = norm(x) @ w + bias,   x = sum of what all components write

With the scale of the norm frozen at its value on the prompt, the logit is linear in x, so that the contributions of the
components and the biases sum to it (Elhage et al. 2021; `cache.logit_attrs` of TransformerLens). The same holds for the norm
that some models (Gemma 2, OLMo 2) apply to the output of attention: heads are attributed through it with its scale frozen too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.effects.plots import DIVERGING, GREY
from featpatch.effects.statistics import interval
from featpatch.errors import FeatpatchError, check_choices, check_kinds, check_numbers, counted
from featpatch.frame import Frame
from featpatch.model.facts import check_tokens
from featpatch.model.layer import Head, head_from
from featpatch.model.lens import Lens
from featpatch.model.projections import attention_outputs, rounding, wide
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import numbered
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.sae.codec import gain
from featpatch.sae.dictionary import Dictionary, dictionaries_if_any
from featpatch.untrusted import in_figure

Rows = Float[torch.Tensor, "rows d"]
TOKENS = 256
"""The largest number of tokens that share a forward pass; all components are read in it."""
ATTENTION = ("head", "attention", "attention bias")
"""The kinds of contributions that attention writes."""


@dataclass(frozen=True)
class Term:
    """One summand of a logit.

    Attributes:
        kind: `"embedding"`, `"positions"`, `"head"`, `"attention bias"`, `"mlp"`, `"final norm bias"`, `"unembedding bias"`;
            `"attention"` for the whole attention of a layer whose heads can't be told apart; and, of an SAE, `"feature"`,
            `"error"` and `"decoder bias"`.
        layer: the layer, for an SAE that of the hook point it writes to; None outside the layers.
        index: the index of the head or feature; None for other kinds.
        sae: the name of the SAE; empty for components.
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    sae: str = ""

    def __str__(self) -> str:
        name = numbered(self.kind, self.index)
        return f"{name} of {self.sae}" if self.sae else name if self.layer is None else f"layer {self.layer} {name}"


@dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution:
    """Contributions to a logit, or to a difference of logits, all in logits.

    Attributes:
        terms: the components, then the features, error term and decoder bias of each SAE.
        values: the contribution of each term in each pair, `[terms, pairs]`.
        total: the logit or difference that the model computes, `[pairs]`; the one before the soft-cap if there is one.
        replaces: for each SAE, by name, the terms that its own terms replace: the components that write to its hook point.
        metric, run: as in `fp.logit_attribution`.

    Examples:
        >>> attribution = fp.logit_attribution(model, pairs, saes=saes, progress=False)
        >>> print(attribution.terms[int(abs(attribution.values.mean(1)).argmax())])
        layer 1 head 3
        >>> bool(abs(attribution.residual()).max() < 1e-4)
        True
        >>> attribution.to_pandas(kind="head").shape
        (32, 7)
    """

    terms: tuple[Term, ...]
    values: NDArray[np.float64]
    total: NDArray[np.float64]
    replaces: Mapping[str, frozenset[Term]]
    metric: str
    run: str

    def residual(self, sae: str = "") -> NDArray[np.float64]:
        """Return the logit minus the sum of the contributions of each pair, `[pairs]`: rounding error.

        Args:
            sae: the name of an SAE, to sum its features, error term and decoder bias in place of the components that they
                replace; by default, components alone are summed.

        Raises:
            FeatpatchError: there is no such SAE.
        """
        if sae:
            check_choices(tuple(self.replaces), sae=sae)
        without = self.replaces.get(sae, frozenset())
        summed = [term.sae == sae or (not term.sae and term not in without) for term in self.terms]
        return self.total - self.values[summed].sum(0)

    def to_pandas(self, n: int | None = None, *, kind: str | None = None) -> Any:
        """Return a table of mean contributions in logits over the pairs, the largest first, with 95 % bootstrap intervals.

        Args:
            n: the number of rows; all by default.
            kind: the kind of term, such as `"head"` or `"feature"`; all by default.

        Raises:
            FeatpatchError: there are no terms of this kind.
        """
        check_numbers(0, n=0 if n is None else n)
        if kind is not None:
            check_choices(tuple(dict.fromkeys(term.kind for term in self.terms)), kind=kind)
        means = self.values.mean(1)
        order = np.argsort(-np.abs(means), kind="stable")
        rows = [row for row in order if kind in (None, self.terms[row].kind)][:n]
        low, high = interval(self.values[rows], np.ones(len(self.total))).T
        fields = [(term.kind, term.layer, term.index, term.sae) for term in (self.terms[row] for row in rows)]
        frame = Frame(fields, columns=["kind", "layer", "index", "sae"]).astype({"layer": "Int64", "index": "Int64"})
        return frame.assign(logits=means[rows], logits_low=low, logits_high=high)

    def plot(self, *, title: str = "") -> Any:
        """Plot the mean contributions of heads and MLPs by layer, as a plotly heat map.

        Args:
            title: the title of the figure; by default what the contributions are to.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        shown: dict[tuple[int, str], float] = {}
        for term, mean in zip(self.terms, self.values.mean(1), strict=True):
            if term.layer is not None and not term.sae:
                shown[term.layer, term.kind if term.index is None else f"head {term.index}"] = float(mean)
        names = list(dict.fromkeys(name for _, name in shown))
        layers = sorted({layer for layer, _ in shown})
        cells = [[shown.get((layer, name)) for name in names] for layer in layers]
        figure = go.Figure(go.Heatmap(x=names, y=layers, z=cells, colorscale=DIVERGING, zmid=0, colorbar_title="logits"))
        title = in_figure(title or f"direct contributions to {self.metric}")
        return figure.update_layout(title=title, yaxis_title="layer", yaxis_dtick=1, plot_bgcolor=GREY)

    def __repr__(self) -> str:
        return f"{self._said}\n{self.to_pandas(10)}"

    def _repr_html_(self) -> str:
        return f"<p>{self._said}</p>{self.to_pandas(10).to_html(index=False, escape=True, float_format='{:.3f}'.format)}"

    @property
    def _said(self) -> str:
        over = counted(len(self.total), "prompt")
        return f"{self.metric} {self.total.mean():.3f} in the {self.run} run of {over}: direct contributions in logits"


@torch.no_grad()
def logit_attribution(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    metric: Literal["logit_diff", "logit"] = "logit_diff",
    run: Literal["clean", "corrupted"] = "clean",
    progress: bool = True,
) -> LogitAttribution:
    """Attribute an answer's logit, or a difference of logits, to what each component and SAE feature writes directly.

    With the scale of the final norm frozen at its value on the prompt, the contributions of the embedding, learned positions,
    every head, every MLP and the biases sum to the logit. Only the answer position is attributed, because only its residual
    stream is unembedded. What a component does through later components does not count as its contribution.

    The features, error term and decoder bias of an SAE are listed next to the components that write to its hook point, and sum
    to the same (see `LogitAttribution.residual`). SAEs of one layer or several can therefore be given together.

    Exact direct paths, `fp.rank_paths(..., receivers=["logits"], route="direct")`, differ in two ways. A path says by how much
    the metric changes if a component takes its value from the other run; an attribution says how much of the metric in one run
    the component accounts for. And a path lets the final norm rescale the stream. In a model without norms, the change by a
    path is exactly the difference between the attributions in the two runs.

    Args:
        model: a TransformerBridge or a HookedTransformer. With a soft-cap on the logits, the logits before it are attributed.
        pairs: the prompts; contributions are averaged over them. Only one prompt of each is run.
        saes: SAEs as in `rank_features`, at hook points of the residual stream or of what is added to it (`hook_attn_out`,
            `hook_mlp_out`, `attn.hook_z`), with linear decoders.
        metric: `"logit_diff"`, the mean logit of the correct answers minus that of the wrong ones; `"logit"`, the former.
        run: the prompt of each pair that is run.
        progress: whether to show a progress bar.

    Returns:
        The contributions in logits, by pair and averaged, in a table or a heat map of layers and heads.

    Raises:
        FeatpatchError: the input is unusable, an SAE does not write to the residual stream or its decoder is not linear, or the
            contributions do not sum to the logit, because the model has another form.

    Examples:
        >>> fp.logit_attribution(model, pairs, progress=False).to_pandas(2)[["kind", "layer", "index"]]
        kind layer index
        head     1     3
        head     3     5
    """
    check_choices(("logit_diff", "logit"), metric=metric)
    check_choices(("clean", "corrupted"), run=run)
    lens = wrap(model)
    check_tokens(check_pairs(pairs), lens)
    if run == "corrupted" and not pairs.has_counterfactual:
        raise FeatpatchError(f"run='corrupted' of {pairs!r}: expected corrupted prompts; add them, or use run='clean'")
    for index, pair in enumerate(pairs):
        if not pair.correct or (metric == "logit_diff" and not pair.wrong):
            missing, advice = "wrong", "use metric='logit', or give wrong answers"
            if not pair.correct:
                missing, advice = "correct", "cut its answers to their first tokens" if pair.answers[0] else "give correct=..."
            raise FeatpatchError(
                f"pair {index} has no {missing} answer of a single token: expected one for metric={metric!r}; {advice}"
            )
    found = dictionaries_if_any(lens, saes)
    reader = _Reader(lens, pairs, found, metric, run)
    values: dict[Term, NDArray[np.float64]] = {}
    total = np.zeros(len(pairs))
    with tqdm(total=len(pairs), unit="pair", desc="attributing", disable=not progress) as bar:
        for indices in pairs.chunks(TOKENS):
            total[indices], contributions = reader.contributions(indices)
            for term, contribution in contributions:
                values.setdefault(term, np.zeros(len(pairs)))[indices] = contribution.cpu().double().numpy()
            bar.update(len(indices))
    terms = sorted(values, key=lambda term: [dictionary.name for dictionary in found].index(term.sae) if term.sae else -1)
    replaces = {each.name: frozenset(term for term in terms if _replaced(term, each.writes)) for each in found}
    result = LogitAttribution(tuple(terms), np.stack([values[term] for term in terms]), total, replaces, metric, run)
    _check_sums(lens, result)
    return result


class _Reader:
    """Runs batches of prompts and attributes their logits; the arguments are those of `logit_attribution`.

    A new reader runs the first prompt, to determine how heads are added to the residual stream.

    Raises:
        FeatpatchError: an SAE can't be attributed.
    """

    def __init__(self, lens: Lens, pairs: Pairs, found: Sequence[Dictionary], metric: str, run: str) -> None:
        self.lens, self.pairs, self.found, self.metric, self.run = lens, pairs, found, metric, run
        self.head, self.outputs = head_from(lens.model), attention_outputs(lens, torch.tensor([getattr(pairs[0], run)]))
        for dictionary in found:
            if sites.entry(dictionary.writes) is None:
                raise FeatpatchError(
                    f"SAE {dictionary.name!r} writes to {dictionary.writes!r}: expected a hook point of the residual stream or "
                    f"of what is added to it, such as {', '.join(sites.ENTRIES)}; leave it out"
                )
            if not dictionary.behaviour.linear:
                raise FeatpatchError(
                    f"SAE {dictionary.name!r} ({dictionary.codec.kind}) has a decoder that is not linear: expected one that "
                    "adds each feature along a fixed direction, so that contributions sum to the logit; leave it out"
                )
            if sites.is_component(dictionary.writes, "z") and self.outputs[sites.layer_of(dictionary.writes)] is None:
                raise FeatpatchError(
                    f"SAE {dictionary.name!r} writes to {dictionary.writes!r}, and W_O of that layer can't be read or does not "
                    "give what attention adds to the residual stream: expected readable weights of the standard form; leave it "
                    "out"
                )

    def contributions(self, indices: list[int]) -> tuple[NDArray[np.float64], list[tuple[Term, torch.Tensor]]]:
        """Return the logits of some pairs `[rows]`, and the contribution `[rows]` of every term."""
        some = [self.pairs[index] for index in indices]
        tokens = torch.tensor([getattr(pair, self.run) for pair in some])
        answers = torch.tensor([pair.answer_position for pair in some])
        read = self.lens.read(tokens, self._hooks)
        logits = wide(self.lens.answer(tokens, answers))
        columns = sorted({token for pair in some for token in (*pair.correct, *pair.wrong)})
        weights = logits.new_zeros(len(some), len(columns))
        for row, pair in enumerate(some):
            for sign, tokens_of in ((1, pair.correct), (-1, pair.wrong if self.metric == "logit_diff" else ())):
                for token in tokens_of:
                    weights[row, columns.index(token)] += sign / len(tokens_of)
        at = {hook: wide(_at_answers(x, answers)).flatten(1) for hook, x in read.items()}
        norm, final = self.head.norm, at[sites.resid_post(self.lens.n_layers - 1)]
        unembedding = weights.to(self.head.weight.device) @ wide(self.head.weight[:, columns]).T
        stream = unembedding if norm is None else norm.pull(unembedding, final.to(unembedding.device))
        total, bias = (weights * logits[:, columns]).sum(1), self.head.bias
        if self.head.softcap is not None:
            raw = Head(norm, self.head.weight, bias, None)(final.to(self.head.weight.dtype), torch.tensor(columns))
            total = (weights * wide(raw).to(weights)).sum(1)
        back: dict[str, torch.Tensor] = {}
        terms = list(self._components(at, stream, back))
        if norm is not None and norm.bias is not None:
            terms.append((Term("final norm bias"), unembedding @ wide(norm.bias).to(unembedding)))
        if bias is not None:
            terms.append((Term("unembedding bias"), weights @ wide(bias[columns]).to(weights)))
        for dictionary in self.found:
            terms += _of_dictionary(dictionary, read, answers, back.get(dictionary.writes, stream))
        return total.cpu().double().numpy(), terms

    @property
    def _hooks(self) -> list[str]:
        lens = self.lens
        hooks = [sites.resid_pre(0), sites.resid_post(lens.n_layers - 1), *([sites.POSITIONS] if lens.adds_positions else [])]
        for layer, output in enumerate(self.outputs):
            hooks.append(sites.component(layer, "attn_out" if output is None else "z"))
            hooks += [sites.component(layer, "mlp_out")] if lens.has_mlp(layer) else []
        return list(dict.fromkeys([*hooks, *(hook for each in self.found for hook in each.hooks)]))

    def _components(
        self, at: Mapping[str, torch.Tensor], stream: Rows, back: dict[str, torch.Tensor]
    ) -> Iterator[tuple[Term, torch.Tensor]]:
        """Yield the contribution of every component, and store the gradients at the heads' outputs `[rows, heads * d_head]`.

        Args:
            at: the activations at the answer positions.
            stream: the gradient of the logit with respect to the final residual stream.
            back: the gradients by hook point; filled in.
        """
        positions = at[sites.POSITIONS] if self.lens.adds_positions else None
        start = at[sites.resid_pre(0)]
        yield Term("embedding"), _dot(start if positions is None else start - positions.to(start), stream)
        if positions is not None:
            yield Term("positions"), _dot(positions, stream)
        for layer, output in enumerate(self.outputs):
            if output is None:
                yield Term("attention", layer), _dot(at[sites.component(layer, "attn_out")], stream)
            else:
                norm, hook = output.norm, sites.component(layer, "z")
                weight, along = wide(output.weight), stream.to(output.weight.device)
                z = at[hook].reshape(len(along), *weight.shape[:2]).to(weight)
                pulled = along if norm is None else norm.pull(along, output.in_front(z))
                gradient = torch.einsum("hdm,rm->rhd", weight, pulled)
                back[hook] = gradient.flatten(1)
                for head, value in enumerate((z * gradient).sum(2).T):
                    yield Term("head", layer, head), value
                biases = [] if output.bias is None else [pulled @ wide(output.bias).to(pulled)]
                biases += [] if norm is None or norm.bias is None else [along @ wide(norm.bias).to(along)]
                if biases:
                    yield Term("attention bias", layer), torch.stack(biases).sum(0)
            if self.lens.has_mlp(layer):
                yield Term("mlp", layer), _dot(at[sites.component(layer, "mlp_out")], stream)


def _of_dictionary(
    dictionary: Dictionary, read: Mapping[str, torch.Tensor], answers: torch.Tensor, gradient: Rows
) -> Iterator[tuple[Term, torch.Tensor]]:
    """Yield the contributions of the features that are active in any of the prompts, of the error and of the decoder's bias.

    The bias includes whatever else decoding adds without features, such as a skip path. The gradient is that of the logit with
    respect to the activation at the answer positions.
    """
    split = dictionary.split(read).map(lambda x: _at_answers(x, answers)[:, None])
    features, error = split.features, split.error[:, 0]
    layer = sites.layer_of(dictionary.writes)
    active = features[:, 0].ne(0).any(0).nonzero()[:, 0]
    along = wide(dictionary.directions(active)) @ gradient.to(error.device, wide(error).dtype).T
    values = wide(features[:, 0, active]).to(along) * along.T
    if dictionary.behaviour.scaled:
        values = values * gain(dictionary.codec, split.state)[:, 0].to(values)
    for index, value in zip(active.tolist(), values.T, strict=True):
        yield Term("feature", layer, index, dictionary.name), value
    yield Term("error", layer, None, dictionary.name), _dot(error, gradient)
    bias = dictionary.decode(torch.zeros_like(features), split.state)[:, 0]
    yield Term("decoder bias", layer, None, dictionary.name), _dot(bias, gradient)


def _at_answers(x: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(answers), device=x.device), answers.to(x.device)]


def _replaced(term: Term, site: str) -> bool:
    """Return whether the terms of an SAE at a hook point stand for a component."""
    if term.sae or term.kind.endswith("norm bias") or term.kind == "unembedding bias":
        return False
    if sites.is_stream(site):
        layer, where = sites.entry(site) or (0, "pre")
        below = term.layer is None or term.layer < layer
        return below or (term.layer == layer and where == "mid" and term.kind in ATTENTION)
    kinds = ("head",) if sites.is_component(site, "z") else ATTENTION if sites.is_component(site, "attn_out") else ("mlp",)
    return term.layer == sites.layer_of(site) and term.kind in kinds


def _check_sums(lens: Lens, result: LogitAttribution) -> None:
    """Raise a FeatpatchError unless contributions sum to the logit, with and without each SAE."""
    size = np.abs(result.values).max() + np.abs(result.total).max()
    for sae in ("", *result.replaces):
        off = np.abs(result.residual(sae)).max()
        if not off <= 4 * rounding(lens) * size:
            raise FeatpatchError(
                f"the contributions {f'with SAE {sae!r} ' if sae else ''}and the logit differ by {off:.3g}: expected a "
                "residual stream to which layers only add, and a final norm and unembedding without further steps; use "
                "fp.rank_paths with receivers=['logits'] instead"
            )


def _dot(one: torch.Tensor, other: Rows) -> Float[torch.Tensor, " rows"]:
    return (wide(one).flatten(1).to(other) * other).sum(1)
