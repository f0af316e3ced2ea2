"""Attribution graphs: the direct, linear effects of features, errors and tokens on one another and on the logits of one prompt.

    A[target, source] = a_source * d_source . J . w_target

d is the decoder of a source, w the encoder of a target, and J the linear path of the residual stream and of attention with its
patterns and the scales of norms frozen (see `frozen`); transcoders stand in for MLPs (Ameisen et al. 2025, "Circuit Tracing:
Revealing Computational Graphs in Language Models"; Dunefsky et al. 2024, arXiv 2406.11944).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from featpatch.errors import FeatpatchError, check_kinds, check_numbers, is_integer
from featpatch.model.layer import head_from
from featpatch.model.lens import Lens
from featpatch.model.projections import rounding, wide
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import LOGITS, Node
from featpatch.pairs.build import Prompt
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import AnswerTokens
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.tracing.frozen import FrozenPath, Targets
from featpatch.tracing.influence import Kinds, cumulative, influence, normalised, partial_influence, scores, totals
from featpatch.tracing.prompt import prompt_of, words_of
from featpatch.tracing.result import AttributionGraph
from featpatch.tracing.sources import Sources, sources

PROBABILITY, LOGITS_AT_MOST = 0.95, 10
"""The share of probability that the target logits have together, and their largest number."""

CHOSEN = 2048
"""How many features are chosen by the influence that is known so far, before it is computed again."""


@torch.no_grad()
def attribution_graph(
    model: Any,
    transcoders: Any,
    prompt: Prompt | Pair,
    *,
    targets: Sequence[str | int] | None = None,
    size: int | None = None,
    special: bool = False,
    progress: bool = True,
) -> AttributionGraph:
    """Compute the attribution graph of a prompt: what each feature, error and token contributes directly to each other node.

    Transcoders stand in for MLPs. Attention patterns and the scales of norms are frozen at their values on the prompt, so that
    everything between MLPs is linear. An edge is the part of the target's pre-activation, or of its logit, that comes from the
    source along the residual stream and through attention, but not through MLPs. The edges into a node and its bias sum to its
    value exactly (see `AttributionGraph.residual`), and an edge is exactly the change of the target when the source is ablated
    with patterns, scales and all other features frozen. It is an estimate of what happens in the model itself, where patterns
    and features react.

    The graph is that of circuit-tracer, with its influence, scores and pruning. A skip path of a transcoder is part of what
    edges pass through. A layer without a transcoder has its whole MLP as its error. Learned positions, the biases of the model,
    of encoders and of decoders are one number for each target, `biases`.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        transcoders: transcoders of MLPs, one for each layer or fewer, or a cross-layer transcoder.
        prompt: a text, token ids, or a pair, of which the clean prompt up to the answer is used.
        targets: the tokens, as texts or ids, whose logits at the last position are attributed; by default the fewest tokens
            whose probability sums to 0.95, at most 10. The mean over the vocabulary is subtracted from a logit.
        size: the largest number of features, chosen by their influence; all by default. What others contribute is in `others`.
            Memory grows with the square of the number of nodes; circuit-tracer's command line keeps 7500.
        special: whether features and errors at special tokens such as BOS are nodes; if not, what they contribute is in
            `others`. circuit-tracer leaves them out.
        progress: whether to show a progress bar.

    Returns:
        The graph with all edges; `prune` reduces it to those that matter. After Ctrl-C it is the graph of the most influential
        features so far, in steps of 2048, and `finished` is False.

    Raises:
        FeatpatchError: the input is unusable, the model's layers do not have the standard form, an object is no transcoder
            of MLPs, or the inputs of nodes do not sum to their values.
        KeyboardInterrupt: after Ctrl-C in the first step.

    Examples:
        >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False)
        >>> bool(abs(graph.residual()).max() < 1e-3)
        True
        >>> len(graph.prune().nodes) < len(graph.nodes)
        True
    """
    check_kinds(bool, special=special, progress=progress)
    check_numbers(1, size=1 if size is None else size)
    lens = wrap(model)
    ids, left_out = prompt_of(lens, prompt)
    tokens = torch.tensor([ids])
    path = FrozenPath.of(lens, tokens)
    given = dictionaries(lens, transcoders)
    found = sources(lens, path, given, tokens)
    logits = _Logits.of(lens, path, tokens, targets)
    hidden = [node.position in left_out and not special for node in (*found.features, *found.errors)]
    made = _Builder(path, found, logits, torch.tensor([*hidden, *[False] * len(ids)], device=path.streams[0].device))
    own = int((~made.hidden[: len(found.features)]).sum())
    total = own if size is None else min(size, own)
    with tqdm(total=total, unit="feature", desc="attributing", disable=not progress) as bar:
        graph = made.graph(total, bar.update)
    known = {_source_set(each) for each in given}
    graph = replace(
        graph,
        prompt=tuple(ids),
        words=words_of(lens, ids),
        text="" if lens.tokenizer is None else lens.tokenizer.decode(list(ids)),
        answers=words_of(lens, logits.tokens),
        model=lens.name,
        n_layers=lens.n_layers,
        source_set=known.pop() if len(known) == 1 else "",
    )
    _check_sums(lens, graph)
    return graph


@dataclass(frozen=True)
class _Logits:
    """The target logits: tokens, probabilities, values with the mean over the vocabulary subtracted, and gradients."""

    tokens: tuple[int, ...]
    probabilities: torch.Tensor
    values: torch.Tensor
    targets: Targets
    constants: torch.Tensor

    @classmethod
    def of(cls, lens: Lens, path: FrozenPath, tokens: torch.Tensor, wanted: Any) -> "_Logits":
        """Choose the target logits; raise a FeatpatchError if a target is not a token."""
        head, last = head_from(lens.model), tokens.shape[1] - 1
        like, final = path.streams[0], path.streams[-1]
        answer = wide(lens.answer(tokens, torch.tensor([last])))[0].to(like)
        probabilities = answer.softmax(0)
        chosen = cls._chosen(lens, probabilities, wanted)
        weight = wide(head.weight).to(like)
        columns = (weight[:, list(chosen)] - weight.mean(1, keepdim=True)).T
        normed = final[last] if head.norm is None else head.norm(final[last][None])[0]
        values, constants = columns @ wide(normed).to(like), like.new_zeros(len(chosen))
        if head.bias is not None:
            bias = wide(head.bias).to(like)
            constants = bias[list(chosen)] - bias.mean()
        values = values + constants
        if head.norm is not None and head.norm.bias is not None:
            constants = constants + columns @ wide(head.norm.bias).to(like)
        vectors = columns if head.norm is None else head.norm.pull(columns, final[last][None])
        depths = torch.full((len(chosen),), len(path.streams) - 1, device=like.device)
        return cls(
            chosen, probabilities[list(chosen)], values, Targets(depths, torch.full_like(depths, last), vectors), constants
        )

    @staticmethod
    def _chosen(lens: Lens, probabilities: torch.Tensor, wanted: Any) -> tuple[int, ...]:
        if wanted is None:
            top = probabilities.topk(min(LOGITS_AT_MOST, len(probabilities)))
            n = int(torch.searchsorted(top.values.cumsum(0), PROBABILITY)) + 1
            return tuple(top.indices[:n].tolist())
        if not isinstance(wanted, (list, tuple)) or not wanted:
            raise FeatpatchError(f"targets={wanted!r:.60}: expected a list of tokens, such as [' Mary', ' John'], or None")
        if any(isinstance(each, str) for each in wanted) and lens.tokenizer is None:
            raise FeatpatchError(f"targets={wanted!r:.60}, and the model has no tokenizer: expected token ids")
        chosen = [AnswerTokens(lens.model, None).one(each) if isinstance(each, str) else each for each in wanted]
        if not all(is_integer(each) and 0 <= each < len(probabilities) for each in chosen) or len(set(chosen)) < len(chosen):
            raise FeatpatchError(
                f"targets={wanted!r:.60}: expected different tokens, or ids from 0 to {len(probabilities) - 1}"
            )
        return tuple(map(int, chosen))


@dataclass(frozen=True)
class _Builder:
    """Computes the rows of the matrix of effects.

    Attributes:
        hidden: the sources that are not nodes.
    """

    path: FrozenPath
    found: Sources
    logits: _Logits
    hidden: torch.Tensor

    def rows(
        self, targets: Targets, constants: torch.Tensor, done: Callable[[int], object] = lambda count: None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the contributions of sources to targets, of biases, and of sources that are not nodes."""
        n = len(self.hidden)
        found, biases = self.path.contributions(targets, self.found.written, self.found.skips, n + 1, done)
        others = found[:, :n][:, self.hidden].sum(1)
        rows = found[:, :n].masked_fill(self.hidden, 0)
        return rows, constants + biases + found[:, n], others

    def graph(self, size: int, done: Callable[[int], object]) -> AttributionGraph:
        """Compute the rows of the logits and then of `size` features, the most influential first; fewer after Ctrl-C."""
        known, logits = self.found, self.logits
        parts = [self.rows(logits.targets, logits.constants)]
        picked = torch.arange(0, device=self.hidden.device)
        try:
            while len(picked) < size:
                some = self._ranked(torch.cat([part[0] for part in parts]), picked)[: min(CHOSEN, size - len(picked))]
                part = self.rows(known.targets.at(some), known.constants[some], done)
                picked, parts = torch.cat([picked, some]), [*parts, part]
        except KeyboardInterrupt:
            if not len(picked):
                raise
        rows, biases, others = (torch.cat(part) for part in zip(*parts, strict=True))
        return replace(self._made(rows, biases, others, picked), finished=len(picked) == size)

    def _ranked(self, rows: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """Return the features that are not picked yet, the most influential through the known rows first."""
        n, logits = len(self.hidden), self.logits.probabilities
        matrix = torch.cat([rows, rows.new_zeros(len(rows), len(logits))], dim=1)
        weights = torch.cat([rows.new_zeros(n), logits])
        which = torch.cat([torch.arange(n, n + len(logits), device=rows.device), picked])
        found = partial_influence(matrix, weights, which)[: len(self.found.features)]
        order = found.argsort(descending=True, stable=True)
        return order[~torch.isin(order, picked) & ~self.hidden[order]]

    def _made(self, rows: torch.Tensor, biases: torch.Tensor, others: torch.Tensor, picked: torch.Tensor) -> AttributionGraph:
        """Put rows in the order of the nodes, and drop sources that are not nodes."""
        known, logits = self.found, self.logits
        features, n_logits = len(known.features), len(logits.tokens)
        chosen, order = picked.sort()
        rest = torch.arange(features, len(self.hidden), device=picked.device)
        keep = torch.cat([chosen, rest[~self.hidden[rest]]])
        dropped = torch.ones_like(self.hidden)
        dropped[keep] = False
        others = others + rows[:, dropped].sum(1)
        last = len(known.tokens)
        kinds = Kinds(len(chosen), len(keep) - len(chosen) - last, last, n_logits)
        total = len(keep) + n_logits
        matrix = rows.new_zeros(total, total)
        at = torch.cat([torch.arange(len(chosen)), torch.arange(len(keep), total)]).to(picked.device)
        which = torch.cat([n_logits + order, torch.arange(n_logits, device=picked.device)])
        matrix[at, : len(keep)] = rows[which][:, keep]
        weights = rows.new_zeros(total)
        weights[len(keep) :] = logits.probabilities
        values = torch.cat([logits.values, known.values[picked]])
        values, biases, others = (
            rows.new_full((total,), torch.nan).index_put_((at,), value[which]) for value in (values, biases, others)
        )
        strength = influence(normalised(matrix), weights)
        end = len(known.tokens) - 1
        nodes = (*(known.nodes[number] for number in keep.tolist()),
                 *(Node(LOGITS.site, "logit", token, end) for token in logits.tokens))  # fmt: skip
        replaced, complete = scores(matrix, weights, kinds)
        return AttributionGraph(
            nodes=nodes,
            adjacency=matrix.cpu().numpy(),
            values=values.cpu().numpy(),
            biases=biases.cpu().numpy(),
            others=others.cpu().numpy(),
            probabilities=logits.probabilities.cpu().numpy(),
            influence=strength.cpu().numpy(),
            totals=totals(matrix, weights, values, kinds).cpu().numpy(),
            cumulative=cumulative(strength).cpu().numpy(),
            replacement_score=replaced,
            completeness_score=complete,
            left_out=features - len(chosen),
        )


def _check_sums(lens: Lens, graph: AttributionGraph) -> None:
    """Raise a FeatpatchError unless the inputs of each node sum to its value."""
    off = abs(graph.residual())
    size = max(abs(graph.values[graph.targets]).max(), abs(graph.adjacency).sum(1).max(), 1e-30)
    if not off.max() <= 4 * rounding(lens) * size:
        worst = graph.nodes[int(graph.targets[int(off.argmax())])]
        raise FeatpatchError(
            f"the inputs of {worst} and its value differ by {off.max():.3g}: expected an encoder whose active features are "
            "w . x + b, and a model whose layers only add to the residual stream; use fp.rank_features instead"
        )


def _source_set(dictionary: Dictionary) -> str:
    """Return the model and the set of sources on Neuronpedia that an SAE belongs to, such as `gemma-2-2b/gemmascope-res-16k`.

    Empty if its metadata does not say.
    """
    said = getattr(getattr(getattr(dictionary.source, "cfg", None), "metadata", None), "neuronpedia_id", None)
    match = re.fullmatch(r"([\w.-]+)/\d+-([\w.-]+)", said) if isinstance(said, str) else None
    return "/".join(match.groups()) if match else ""
