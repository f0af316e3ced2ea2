"""Circuits for indirect objects in the shipped model: edges, paths and features, with their faithfulness.

Run with `python -m examples.circuits [--pairs 16] [--out featpatch-examples]`.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np

import featpatch as fp
from examples.places import at_most, listed
from featpatch.checkpoints import Demo

LETTERS = {"v": "values", "k": "keys", "q": "queries"}


def head(layer: int, index: int, position: str = "all", hook: str = "z") -> fp.Node:
    return fp.Node(f"blocks.{layer}.attn.hook_{hook}", "head", index, position)


def name(node: fp.Node) -> str:
    """Return the name of a node in words: head 1.3, the value of head 1.3, feature 853, the MLP of layer 0, the logits."""
    if node.site == "logits":
        return "the logits"
    layer, hook = node.site.split(".")[1], node.site.rsplit("_", 1)[1]
    if node.kind == "head":
        return ("" if hook == "z" else f"the {LETTERS[hook][:-1]} of ") + f"head {layer}.{node.index}"
    return f"feature {node.index}" if node.kind == "feature" else f"the MLP of layer {layer}"


def kept(circuit: fp.Circuit) -> str:
    """Return the faithfulness of a circuit with its interval as text."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(circuit.faithfulness, *circuit.faithfulness_interval)


def of_edges(demo: Demo, pairs: fp.Pairs, out: Path) -> str:
    """Edges, ranked by edge attribution patching (estimates); faithfulness is exact."""
    circuit = fp.find_circuit(demo.model, pairs, over="edges", scores="estimate", size=64, progress=False)
    print(circuit)
    curve = circuit.curve()
    table = curve.table().round(3)
    print(table.to_string(index=False))
    areas = [f"CPR {one.cpr:.3f} and CMD {one.cmd:.3f} in {one.order} order" for one in curve.both]
    loss = circuit.minimality()["loss"]
    lacking = circuit.completeness(subsets=10)["incompleteness"]
    print(f"incompleteness of 10 random halves: mean {lacking.mean():.3f}, largest {lacking.max():.3f}")
    print(f"wrote {circuit.report(out / 'circuit.html', title='Indirect objects in the shipped model')}")
    tenth = table[table["share"] == 0.1].iloc[0]  # signed order comes first
    return (
        f"A circuit of {len(circuit)} of {len(circuit.graph.items)} edges, chosen by estimates, has a faithfulness of "
        f"{kept(circuit)}, the first {tenth['size']:.0f} edges by signed score {tenth['faithfulness']:.2f}; {', '.join(areas)}. "
        f"Removing any one of {(loss < 0.001).sum()} of the {len(circuit)} costs less than 0.001."
    )


def of_paths(demo: Demo, pairs: fp.Pairs) -> str:
    """Paths into the heads of layer 3 and into the logits, exact."""
    mlps = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation", None, at) for layer in range(3) for at in ("S2", "end")]
    senders = [*(head(layer, n, at) for layer in (1, 2) for n in range(8) for at in ("S2", "end")), *mlps]
    receivers = [*(head(3, n, hook=letter) for letter in "qkv" for n in (5, 3, 0)), "logits"]
    paths = fp.rank_paths(demo.model, pairs, senders=senders, receivers=receivers, progress=False)
    shown = paths.top(8).to_pandas()[["sender", "receiver", "recovery", "recovery_low", "recovery_high", "degradation"]]
    print(shown.round(3).to_string(index=False))
    estimate = fp.rank_paths(demo.model, pairs, method="atp", senders=senders, receivers=receivers, progress=False)
    known, exact = (dict(zip(table.nodes, table.pooled("recovery"), strict=True)) for table in (estimate, paths))
    pearson = np.corrcoef([known[edge] for edge in exact], [*exact.values()])[0, 1]
    best, of_best = paths.top(1).nodes[0], paths.top(1).to_pandas().iloc[0]
    into: dict[str, float] = {}
    for edge, value in exact.items():
        if edge.receiver.kind == "head":
            letter = LETTERS[edge.receiver.site[-1]]
            into[letter] = max(into.get(letter, 0.0), abs(value))
    strongest = max(into, key=lambda letter: into[letter])
    return (
        f"The strongest single path is {name(best.sender)} {'at the last word' if best.sender.position == 'end' else 'at S2'} "
        f"into {name(best.receiver)}, {of_best['recovery']:.3f} [{of_best['recovery_low']:.3f}, "
        f"{of_best['recovery_high']:.3f}]; names reach the heads of layer 3 through {strongest}, each path with a recovery of "
        f"at most {at_most(into[strongest], 3)}. Estimates of the {len(paths)} paths correlate with the exact effects at "
        f"{pearson:.2f}."
    )


def of_nodes(demo: Demo, pairs: fp.Pairs, sae: Any) -> str:
    """Features as a circuit: before layer 1 at the second name, with the rest of the SAE ablated."""
    ranked = fp.rank_features(demo.model, sae, pairs, positions=["S2"], progress=False)
    found: dict[str, list[str]] = {}
    for errors in ("in", "out"):
        circuit = fp.find_circuit(demo.model, pairs, saes=sae, nodes=ranked, errors=errors, size=40, progress=False)
        print(f"error terms {errors}: {circuit}")
        found.setdefault(kept(circuit), []).append(errors)
    said = " and ".join(f"{value} with error terms {' or '.join(errors)}" for value, errors in found.items())
    features = len(ranked.where(kind="feature"))
    return f"Of the SAE before layer 1, {len(circuit)} of {features} features at the second name have a faithfulness of {said}."


def of_single_features(demo: Demo, pairs: fp.Pairs, sae: Any) -> str:
    """Edges of single features: the 30 strongest before layer 1 are mediators between layer 0 and the later components."""
    strongest = fp.rank_features(demo.model, sae, pairs, progress=False).top(30)
    circuit = fp.find_circuit(
        demo.model, pairs, saes=sae, nodes=strongest, over="edges", scores="estimate", size=300, progress=False
    )
    print(circuit)
    scores = sorted(zip(circuit.graph.items, circuit.scores, strict=True), key=lambda of_edge: -abs(of_edge[1]))
    edges = [(edge, score) for edge, score in scores if "feature" in (edge.sender.kind, edge.receiver.kind)]
    print(f"the strongest of {len(edges)} edges of single features (estimates):")
    for edge, score in edges[:6]:
        print(f"  {score:+.3f}  {edge}")
    into = [edge for edge, _ in edges[:5] if edge.receiver.kind == "feature"]
    out = [edge for edge, _ in edges[:5] if edge.sender.kind == "feature"]
    written, writing = ([str(getattr(edge, end).index) for edge in part] for part, end in ((into, "receiver"), (out, "sender")))
    above, below = (
        listed([*dict.fromkeys(name(node) for node in nodes)])
        for nodes in ([edge.receiver for edge in out], [edge.sender for edge in into])
    )
    return (
        f"With its {len(strongest)} strongest features as mediators, {len(circuit)} of {len(circuit.graph.items)} edges have "
        f"a faithfulness of {kept(circuit)}, {sum(edge in set(circuit.items) for edge, _ in edges)} of them edges of single "
        f"features: the strongest lead from {below} into features {listed(written)}, and from features {listed(writing)} into "
        f"{above}."
    )


def main(count: int, out: Path) -> None:
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=count, seed=0)
    sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre")
    said = []
    for part, options in ((of_edges, [out]), (of_paths, []), (of_nodes, [sae]), (of_single_features, [sae])):
        print(f"\n== {part.__doc__} ==")
        said.append(part(demo, pairs, *options))
    print(f"\n`python -m examples.circuits` does this for indirect objects in the shipped model, with {count} pairs:", *said)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("featpatch-examples"))
    options = parser.parse_args()
    main(options.pairs, options.out)
