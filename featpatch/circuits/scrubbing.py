"""Causal scrubbing: test whether nodes depend only on what a hypothesis says.

Each node of a hypothesis is resampled from prompts that agree with the original prompt on the property that the node is said to
depend on; its parents are then resampled relative to that prompt. Senders that the hypothesis leaves out are taken from prompts
drawn at random, independently for each sender. If the hypothesis is right, the behaviour is preserved (Chan et al. 2022,
"Causal scrubbing", algorithm 1, with the tree unrolled).
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch import sites
from featpatch.circuits.attribution import EMBEDDING
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.effects.statistics import interval
from featpatch.errors import FeatpatchError, check_numbers, counted, decimal
from featpatch.metric_functions import Metric
from featpatch.metrics import Measures, check_gap, one_metric
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import LOGITS, Node
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_counterfactual

Label = Callable[[Pair], Hashable]
"""A function that returns the property of a pair's clean prompt on which a node is said to depend."""


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis: the senders that each receiver reads, and the property of the prompt on which each sender depends.

    Attributes:
        parents: for each receiver (`fp.LOGITS`, an MLP, a head at `hook_q`, `hook_k` or `hook_v`), its important senders (heads
            at `hook_z`, MLPs, the embedding `Node("hook_embed", "activation")`), each with its label: two prompts with the same
            label are interchangeable for the sender. The output of a sender without parents of its own is taken whole from a
            prompt with the same label.

    Examples:
        >>> embedding = fp.Node("hook_embed", "activation")
        >>> hypothesis = fp.Hypothesis({fp.LOGITS: {embedding: lambda pair: pair.clean[-1]}})
        >>> len(hypothesis.parents)
        1
    """

    parents: Mapping[Node, Mapping[Node, Label]]


@dataclass(frozen=True)
class Scrubbed:
    """The result of `scrub`: how much of the behaviour is preserved.

    Attributes:
        values: the metric of each prompt in the scrubbed runs, averaged over draws.
        whole: the metric of each prompt in the unpatched run.
        chance: the metric of each prompt with every sender taken from a random prompt, averaged over draws.
        recovered: (scrubbed - chance) / (whole - chance), a ratio of means.
        low, high: the 95 % bootstrap interval of `recovered` over prompts.
    """

    values: NDArray[np.float64]
    whole: NDArray[np.float64]
    chance: NDArray[np.float64]
    recovered: float
    low: float
    high: float

    def __repr__(self) -> str:
        return (
            f"recovered {decimal(self.recovered)} [{decimal(self.low)}, {decimal(self.high)}] over "
            f"{counted(len(self.values), 'prompt')}: metric {self.values.mean():.3g} scrubbed, {self.whole.mean():.3g} in the "
            f"model, {self.chance.mean():.3g} with everything resampled"
        )


def scrub(
    model: Any,
    pairs: Pairs,
    hypothesis: Hypothesis,
    *,
    metric: str | Metric = "logit_diff",
    draws: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> Scrubbed:
    """Measure how much of the behaviour on the clean prompts causal scrubbing of a hypothesis preserves.

    This follows Chan et al. 2022; the algorithm is described in `featpatch.circuits.scrubbing`.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of your own and without norms after attention.
        pairs: pairs whose clean prompts are resampled, all equally long; give many, so that prompts share labels.
        hypothesis: the senders that each receiver reads, and the property that each sender depends on.
        metric: one metric. An answer of several tokens follows all prompts that are resampled for its pair.
        draws: the number of times that everything is resampled.
        seed: the seed for resampling.
        progress: whether to show a progress bar.

    Returns:
        The share of the behaviour that is recovered, its 95 % bootstrap interval over prompts, and the metric of each prompt.

    Raises:
        FeatpatchError: the input is unusable, the prompts have unequal lengths, or a node is not in the model's graph.

    Examples:
        >>> template = "When {IO} and {S1} went to the {place}, {S2} gave a {object} to"
        >>> equally_long = fp.tasks.ioi(model, 8, templates=[template])
        >>> mlp = fp.Node("blocks.3.hook_mlp_out", "activation")
        >>> hypothesis = fp.Hypothesis({fp.LOGITS: {mlp: lambda pair: pair.correct}})  # the MLP depends only on the answer
        >>> scrubbed = fp.scrub(model, equally_long, hypothesis, draws=2, progress=False)
        >>> len(scrubbed.values), scrubbed.recovered < 0.5
        (8, True)
    """
    check_counterfactual(pairs)
    if not isinstance(hypothesis, Hypothesis) or not isinstance(hypothesis.parents, Mapping):
        raise FeatpatchError(f"hypothesis={hypothesis!r}: expected fp.Hypothesis({{receiver: {{sender: label}}}})")
    check_numbers(0, seed=seed)
    check_numbers(1, draws=draws)
    if len(pairs.by_length()) > 1:
        raise FeatpatchError(
            f"the prompts have {', '.join(map(str, sorted(pairs.by_length())))} tokens: expected prompts of equal length for "
            "scrubbing; select the pairs of one length"
        )
    graph = EdgeGraph(wrap(model), pairs, "corrupted", Measures.of(one_metric(metric)))
    if graph.normed:
        raise FeatpatchError(
            f"the heads of layer {min(graph.normed.values())} go through a norm together before they are added to the residual "
            "stream (Gemma 2 and 3, OLMo 2): expected a model without such norms, because scrubbing takes each head from a run "
            "of its own, in which the norm has another scale; use fp.find_circuit"
        )
    graph.check()
    continuations = dict.fromkeys(map(graph.continuation, range(len(graph.runs))))
    runs = {tokens: _Run(graph, hypothesis, np.random.default_rng(seed), tokens) for tokens in continuations}
    values, chance = np.zeros(len(pairs)), np.zeros(len(pairs))
    for _ in tqdm(range(draws), unit="draw", desc="scrubbing", disable=not progress):
        values += _measured(graph, runs, hypothesis.parents) / draws
        chance += _measured(graph, runs, {LOGITS: {}}) / draws
    check_gap(graph.name, graph.whole, chance)
    low, high = interval((values - chance)[None], graph.whole - chance)[0]
    recovered = float((values.mean() - chance.mean()) / (graph.whole.mean() - chance.mean()))
    return Scrubbed(values, graph.whole, chance, recovered, float(low), float(high))


def _measured(
    graph: EdgeGraph, runs: "Mapping[tuple[int, ...], _Run]", parents: Mapping[Node, Mapping[Node, Label]]
) -> NDArray[np.float64]:
    """Measure the metric of each prompt in a scrubbed run; the prompts drawn do not depend on the tokens that follow them."""
    values = torch.zeros(len(graph.readings), dtype=torch.float64)
    for tokens, run in runs.items():
        logits = run.logits(np.arange(len(graph.pairs)), parents)
        some = [number for number in range(len(graph.runs)) if graph.continuation(number) == tokens]
        values[some] = graph.metric_of(logits[[graph.readings[number][0] for number in some]][None], some)[0].cpu()
    return graph.combined(values).numpy()


@dataclass(eq=False)
class _Run:
    """Runs in which the residual stream is a sum of outputs from the runs of several prompts.

    Attributes:
        graph: the graph of the model's edges.
        hypothesis: the hypothesis.
        generator: the random generator for resampling.
        continuation: tokens that follow all prompts.
    """

    graph: EdgeGraph
    hypothesis: Hypothesis
    generator: np.random.Generator
    continuation: tuple[int, ...] = ()
    _alike: dict[Label, list[NDArray[np.int64]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        receivers = set(self.graph.receivers())
        for receiver, parents in self.hypothesis.parents.items():
            if receiver not in receivers:
                raise FeatpatchError(
                    f"receiver {str(receiver)!r}: expected fp.LOGITS, an MLP, or a head at hook_q, hook_k or hook_v, at "
                    "position 'all'"
                )
            if not isinstance(parents, Mapping) or not all(callable(label) for label in parents.values()):
                raise FeatpatchError(
                    f"the parents of {str(receiver)!r} are {parents!r}: expected a dict from each sender to its label, a "
                    "function of a pair"
                )
            strange = set(parents) - set(self.graph.senders(receiver))
            if strange:
                raise FeatpatchError(
                    f"{str(next(iter(strange)))!r} is not upstream of {str(receiver)!r}: expected senders that write before "
                    "the receiver reads"
                )
        if LOGITS not in self.hypothesis.parents:
            raise FeatpatchError("the hypothesis has no entry for the logits: expected one; add the parents of fp.LOGITS")
        read, waiting = set(), {LOGITS}
        while waiting:
            receiver = waiting.pop()
            read.add(receiver)
            for sender in self.hypothesis.parents.get(receiver, {}):
                waiting |= (self._channels(sender) & set(self.hypothesis.parents)) - read
        unread = set(self.hypothesis.parents) - read
        if unread:
            raise FeatpatchError(
                f"{str(next(iter(unread)))!r} does not reach the logits through the hypothesis: expected a path to fp.LOGITS; "
                "add the missing edges, or remove this receiver"
            )
        with torch.no_grad():
            self.tokens = torch.tensor([pair.clean + self.continuation for pair in self.graph.pairs])
            self.written, self.biases = self.graph.written(self.tokens)

    @torch.no_grad()
    def logits(self, rows: NDArray[np.int64], parents: Mapping[Node, Mapping[Node, Label]]) -> torch.Tensor:
        """Compute the logits of prompts, `[rows, d_vocab]`, from a residual stream resampled by the hypothesis."""
        answers = torch.tensor([pair.answer_position + len(self.continuation) for pair in self.graph.pairs])
        return self.graph.unembedded(self._input(LOGITS, rows, parents), self.tokens, answers)

    def _input(self, receiver: Node, rows: NDArray[np.int64], parents: Mapping[Node, Mapping[Node, Label]]) -> torch.Tensor:
        """Compute the input of a receiver whose output should be that of the prompts `rows`."""
        important = parents.get(receiver, {})
        total = torch.zeros_like(self.written[EMBEDDING])
        for sender in self.graph.senders(receiver):
            if sender in important:
                total = total + self._output(sender, self._agreeing(important[sender], rows), parents)
            else:
                total = total + self.written[sender][torch.from_numpy(self.generator.integers(len(rows), size=len(rows)))]
        return total + self.biases[self.graph.depth(receiver)]

    def _output(self, sender: Node, rows: NDArray[np.int64], parents: Mapping[Node, Mapping[Node, Label]]) -> torch.Tensor:
        """Return the output of a sender in those prompts, or compute it from its parents if the hypothesis names them."""
        if not self._channels(sender) & set(parents):
            return self.written[sender][torch.from_numpy(rows)]
        if sender.kind == "head":
            layer, head = sites.layer_of(sender.site), int(sender.index or 0)
            inputs = {
                node.site[-1]: self._input(node, rows, parents) if node in parents else self._unpatched_input(node, rows)
                for node in self._channels(sender)
            }
            return self.graph.head_output(layer, head, inputs, self.tokens)
        return self.graph.mlp_output(sites.layer_of(sender.site), self._input(sender, rows, parents), self.tokens)

    def _channels(self, sender: Node) -> set[Node]:
        """Return the receivers from which a sender's output is computed: a head's query, key and value, or the MLP itself."""
        return {receiver for receiver in self.graph.receivers() if sender in self.graph.users(receiver)}

    def _unpatched_input(self, receiver: Node, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return the input of a receiver in the unpatched runs of some prompts."""
        chosen = torch.from_numpy(rows)
        total = sum((self.written[sender][chosen] for sender in self.graph.senders(receiver)), torch.zeros(()))
        return total + self.biases[self.graph.depth(receiver)]

    def _agreeing(self, label: Label, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw, for each prompt, a random prompt with the same label, possibly itself.

        Raises:
            FeatpatchError: a label raises an exception or returns an unhashable value.
        """
        if label not in self._alike:
            groups: dict[Hashable, list[int]] = {}
            try:
                values = [label(pair) for pair in self.graph.pairs]
                for index, value in enumerate(values):
                    groups.setdefault(value, []).append(index)
            except Exception as error:
                raise FeatpatchError(
                    f"a label function failed ({error!r}): expected a hashable value for every pair; correct the function"
                ) from error
            self._alike[label] = [np.array(groups[value]) for value in values]
        return np.array([self.generator.choice(self._alike[label][row]) for row in rows])
