"""Cost of estimating and measuring all edges of a model: featpatch against EAP-IG, with the scores compared.

    python benchmarks/circuits.py [--shape demo] [--tokens 20] [--pairs 1 4 16] [--integrated 1] [--exact 20]
    python benchmarks/circuits.py --circuit 8 [--edges 200]
    python benchmarks/circuits.py --limit 97

EAP-IG (hannamw/EAP-IG) is run where it is installed, adapted to CPUs and to prompts that are given as tokens; otherwise our own
estimates by a weight for each edge are run instead, on one pair. Each score is the mean over pairs. `--integrated` is the
number of pairs for integrated gradients, which are taken over inputs with 5 steps and over activations with 1 step per
component. `--exact` is the number of edges into the middle layer's queries that EAP-IG's exact loop measures, one forward pass
each; featpatch measures all of them. With `--circuit`, a circuit is found by estimates over that number of pairs, written as a
page, and then refined exactly; nothing else is run. `--limit` times exact scores of the shipped model over that many pairs.
Times are CPU times of one thread; memory is the peak above that in use before.
"""

import argparse
import ctypes
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from memory import peak_of
from shapes import SHAPES, models

import featpatch as fp
from featpatch.circuits.attribution import Point, points_of
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.find import EXACT_WORK, exact_work
from featpatch.metrics import Measures
from featpatch.model.transformer_lens import wrap

try:
    import eap.attribute
    import eap.evaluate
    import eap.graph
except ImportError:
    eap = None

CORRECT, WRONG = 1, 2


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of a call, its CPU seconds, and its peak memory in MB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that earlier runs gave back would count as in use
    start = time.process_time()
    result, peak = peak_of(run)
    return result, time.process_time() - start, max(peak, 0.0)


def prompts(vocab: int, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clean and corrupted prompts that differ in one token."""
    clean = torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, length * 3 // 10] = (clean[:, length * 3 // 10] + 1) % vocab
    return clean, corrupted


def their_name(node: fp.Node) -> str:
    """Return EAP-IG's name of a sender or receiver."""
    if node == fp.LOGITS:
        return "logits"
    if node.site == "hook_embed":
        return "input"
    layer, name = node.site.split(".")[1], node.site.rsplit("_", 1)[1]
    head = f"a{layer}.h{node.index}"
    return f"m{layer}" if name == "out" else head if name == "z" else f"{head}<{name}>"


class TheirScores:
    """EAP-IG on a CPU."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, eap.graph.Graph.from_model(model)
        eap.attribute.tokenize_plus = eap.evaluate.tokenize_plus = self.tokenize
        zeros = torch.zeros
        torch.zeros = lambda *args, **kwargs: zeros(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})

    @contextmanager
    def split(self) -> Iterator[None]:
        """Make the model compute heads and their inputs one by one, as EAP-IG needs and which is slower, in this context."""
        for on in (True, False):
            self.model.set_use_attn_result(on)
            self.model.set_use_split_qkv_input(on)
            self.model.set_use_hook_mlp_in(on)
            if on:
                yield

    @staticmethod
    def tokenize(_model: Any, tokens: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, torch.Tensor, int]:
        """Return what EAP-IG's function of this name returns, for prompts that are tokens already."""
        return tokens, None, torch.full((len(tokens),), tokens.shape[1]), tokens.shape[1]

    @staticmethod
    def metric(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return the sum of the logit differences."""
        return (logits[:, -1, CORRECT] - logits[:, -1, WRONG]).sum()

    def estimates(self, clean: torch.Tensor, corrupted: torch.Tensor) -> Any:
        """Return EAP scores, `[senders, receivers]`; all pairs are one batch."""
        with self.split():
            return eap.attribute.get_scores_eap(self.model, self.graph, [(clean, corrupted, None)], self.metric, quiet=True)

    def integrated(self, scores: str, steps: int, clean: torch.Tensor, corrupted: torch.Tensor) -> Any:
        """Return scores by integrated gradients, `[senders, receivers]`; all pairs are one batch."""
        found = {
            "eap_ig_inputs": eap.attribute.get_scores_eap_ig,
            "eap_ig_activations": eap.attribute.get_scores_ig_activations,
        }
        with self.split():
            return found[scores](self.model, self.graph, [(clean, corrupted, None)], self.metric, steps=steps, quiet=True)

    def exact(self, edges: list[Any], clean: torch.Tensor, corrupted: torch.Tensor) -> Any:
        """Return the exact scores of some edges, `[senders, receivers]`."""
        every, names = self.graph.edges, [f"{their_name(edge.sender)}->{their_name(edge.receiver)}" for edge in edges]
        self.graph.edges = {name: every[name] for name in names}
        try:
            with self.split():
                return eap.attribute.get_scores_exact(
                    self.model, self.graph, [(clean, corrupted, None)], self.metric, quiet=True
                )
        finally:
            self.graph.edges = every

    def of(self, scores: torch.Tensor, edge: Any) -> float:
        """Return the score of one of our edges, with the sign of a loss."""
        sender, receiver = their_name(edge.sender), their_name(edge.receiver)
        return -float(scores[self.graph.edges[f"{sender}->{receiver}"].matrix_index])


def main() -> None:
    """Measure, compare and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--integrated", type=int, default=1, help="number of pairs for integrated gradients")
    parser.add_argument("--exact", type=int, default=20, help="number of edges that EAP-IG's exact loop measures")
    parser.add_argument("-c", "--circuit", type=int, default=0, help="number of pairs of a circuit from prompts to diagram")
    parser.add_argument("--edges", type=int, default=200, help="number of edges of this circuit")
    parser.add_argument("-l", "--limit", type=int, default=0, help="number of pairs for exact scores of the shipped model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.limit:
        print(at_limit(options.limit))
        return
    shape = SHAPES[options.shape]
    model = models(shape, options.tokens, "cpu")["HookedTransformer"]
    clean, corrupted = prompts(shape.vocab, options.tokens, max(*options.pairs, options.integrated, options.circuit))
    if options.circuit:
        print(whole_circuit(model, clean[: options.circuit], corrupted[: options.circuit], options.edges))
        return

    def graph(count: int) -> EdgeGraph:
        answers = torch.tensor([CORRECT] * count), torch.tensor([WRONG] * count)
        pairs = fp.Pairs.from_tokens(clean[:count], corrupted[:count], *answers)
        return EdgeGraph(wrap(model), pairs, "corrupted", Measures.of("logit_diff"))

    items = graph(1).items
    graph(1).estimates()
    ours = {count: timed(graph(count).estimates) for count in options.pairs}
    of_eap = None
    if eap is None:
        slow = graph(1)
        theirs, name = {1: timed(lambda: by_edge(slow, [Point()]))}, "a weight for each edge"
    else:
        of_eap, name = TheirScores(model), "EAP-IG"
        of_eap.estimates(clean[:1], corrupted[:1])
        found = {count: timed(partial(of_eap.estimates, clean[:count], corrupted[:count])) for count in options.pairs}
        theirs = {
            count: (np.array([of_eap.of(scores, edge) for edge in items]), seconds, peak)
            for count, (scores, seconds, peak) in found.items()
        }
    print(f"{options.shape}, {options.tokens} tokens, {len(items):,} edges, one CPU thread\n")
    print(f"| pairs | featpatch | | {name} | | | largest difference |\n|---|---|---|---|---|---|---|")
    for count, (scores, seconds, peak) in ours.items():
        row = f"| {count} | {seconds:.2f} s | {peak:.0f} MB | "
        if count in theirs:
            other, their_seconds, their_peak = theirs[count]
            worst = np.abs(scores - other).max() / np.abs(other).max()
            row += f"{their_seconds:.2f} s | {their_peak:.0f} MB | {their_seconds / seconds:.1f} x | {worst:.0e} |"
        print(row)
    print(f"\n| scores | pairs | featpatch | | {name} | | | largest difference |\n|---|---|---|---|---|---|---|---|")
    for scores, steps in (("eap_ig_inputs", 5), ("eap_ig_activations", 1)):
        print(integrated(graph, of_eap, clean, corrupted, scores, steps, options.integrated))
    print("\n" + exact(graph(1), of_eap, clean[:1], corrupted[:1], options.exact))


def whole_circuit(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, edges: int) -> str:
    """Find a circuit by estimates, write its page and refine it exactly."""
    count = len(clean)
    pairs = fp.Pairs.from_tokens(clean, corrupted, torch.tensor([CORRECT] * count), torch.tensor([WRONG] * count))
    circuit, found, _ = timed(lambda: fp.find_circuit(model, pairs, scores="estimate", size=edges, progress=False))
    with TemporaryDirectory() as folder:
        _, drawn, _ = timed(lambda: circuit.report(Path(folder) / "circuit.html"))
    refined, pruned, _ = timed(lambda: circuit.refine(threshold=0.01))
    return (
        f"{len(circuit.graph.items):,} edges, {count} pairs, one CPU thread: the {edges} edges with the largest estimates in "
        f"{found:.0f} s, their page in {drawn:.0f} s, exact refinement to {len(refined)} edges in {pruned / 60:.1f} minutes."
    )


def at_limit(count: int) -> str:
    """Time exact scores where they are still the default, and how much longer they take with other ablation values."""
    demo = fp.load_demo(progress=False)
    pairs, few = demo.pairs("ioi", n=count), demo.pairs("ioi", n=4)
    circuit, seconds, _ = timed(lambda: fp.find_circuit(demo.model, pairs, size=40, progress=False))
    assert circuit.metadata["scores"] == "exact"
    run: dict[str, Any] = {"scores": "exact", "size": 40, "progress": False}
    corrupted, mean = (timed(partial(fp.find_circuit, demo.model, few, to=to, **run))[1] for to in ("corrupted", "mean"))
    return (
        f"Exact scores of the {len(circuit.graph.items):,} edges of the shipped model over {count} pairs "
        f"({exact_work(circuit.graph):.3g} multiply-adds, just below the limit of {EXACT_WORK:.0e}) take {seconds:.0f} s on "
        'one CPU thread; with `to="mean"`, where each edge needs a pass through all layers, 4 pairs take '
        f"{mean / corrupted:.1f} x as long."
    )


def by_edge(graph: EdgeGraph, points: list[Point]) -> Any:
    """Return the scores of one pair by automatic differentiation with a weight for each edge."""
    return -graph._by_edge([0], points, torch.ones(len(points), 1), lambda runs: None)[0].numpy()


def integrated(
    graph: Callable[[int], EdgeGraph],
    of_eap: Any,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    scores: Any,
    steps: int,
    count: int,
) -> str:
    """Measure integrated gradients, and compare with EAP-IG or, for one pair, with the weights of edges."""
    found, seconds, peak = timed(lambda: graph(count).estimates(scores, steps))
    row = f"| {scores}, {steps} steps | {count} | {seconds:.2f} s | {peak:.0f} MB | "
    if of_eap is not None:
        run = timed(lambda: of_eap.integrated(scores, steps, clean[:count], corrupted[:count]))
        other = np.array([of_eap.of(run[0], edge) for edge in graph(1).items])
    elif count == 1:
        slow = graph(1)
        run = timed(lambda: by_edge(slow, points_of(scores, steps, slow.components)))
        other = run[0]
    else:
        return row
    worst = np.abs(found - other).max() / np.abs(other).max()
    return row + f"{run[1]:.2f} s | {run[2]:.0f} MB | {run[1] / seconds:.1f} x | {worst:.0e} |"


def exact(graph: EdgeGraph, of_eap: Any, clean: torch.Tensor, corrupted: torch.Tensor, loop: int) -> str:
    """Measure the edges into the queries of the middle layer, and compare with EAP-IG where it is installed."""
    middle = graph.lens.n_layers // 2
    edges: list[Any] = [edge for edge in graph.items if edge.site == f"blocks.{middle}.attn.hook_q"]
    first = fp.Node("blocks.0.hook_resid_pre", "activation")
    senders = [first if node.site == "hook_embed" else node for node in dict.fromkeys(edge.sender for edge in edges)]
    receivers = list(dict.fromkeys(edge.receiver for edge in edges))
    run: dict[str, Any] = {"senders": senders, "receivers": receivers, "directions": ["noising"], "screen": None}
    effects, seconds, _ = timed(lambda: fp.rank_paths(graph.lens.model, graph.pairs, progress=False, **run))
    ours = 1e3 * seconds / len(edges)
    said = f"Exact scores of the {len(edges)} edges into the queries of layer {middle}: {ours:.1f} ms per edge"
    if of_eap is None:
        return said
    rows = zip(effects.row, effects.noised, strict=True)
    scores = {effects.nodes[row]: float(effects.clean[0] - value) for row, value in rows}
    drawn = random.Random(0).sample(edges, min(loop, len(edges)))
    found, their_seconds, _ = timed(lambda: of_eap.exact(drawn, clean, corrupted))
    expected = [scores.get(fp.Edge.of(first if e.sender.site == "hook_embed" else e.sender, e.receiver), 0.0) for e in drawn]
    worst = max(abs(of_eap.of(found, edge) - value) for edge, value in zip(drawn, expected, strict=True))
    each = their_seconds / len(drawn)
    return (
        f"{said}, EAP-IG's loop {1e3 * each:.0f} ms, {each / seconds * len(edges):.1f} x faster; largest difference of a logit "
        f"difference {worst:.0e}."
    )


if __name__ == "__main__":
    main()
