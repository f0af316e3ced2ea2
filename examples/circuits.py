"""The circuit of indirect objects in the shipped model: edges, their paths, how faithful they are, and what is left out.

python -m examples.circuits [--pairs 16] [--out featpatch-examples]
"""

from argparse import ArgumentParser
from pathlib import Path

import numpy as np

import featpatch as fp


def head(layer: int, index: int, position: str = "all", hook: str = "z") -> fp.Node:
    return fp.Node(f"blocks.{layer}.attn.hook_{hook}", "head", index, position)


def main(count: int, out: Path) -> None:
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=count, seed=0)

    print("\n== Edges, ranked by edge attribution patching (estimate); faithfulness is exact ==")
    circuit = fp.find_circuit(demo.model, pairs, over="edges", scores="estimate", size=64, progress=False)
    print(circuit)
    curve = circuit.curve()
    print(curve.table().round(3).to_string(index=False))
    print(f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}")
    loss = circuit.minimality()["loss"]
    print(f"{(loss < 0.001).sum()} of the {len(circuit)} edges can go for less than 0.001 of the behaviour each")
    lacking = circuit.completeness(subsets=10)["incompleteness"]
    print(f"incompleteness of 10 random halves: mean {lacking.mean():.3f}, largest {lacking.max():.3f}")
    print(f"wrote {circuit.report(out / 'circuit.html', title='Indirect objects in the shipped model')}")

    print("\n== Paths into the heads of block 3 and into the logits, exact ==")
    mlps = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation", None, at) for layer in range(3) for at in ("S2", "end")]
    senders = [*(head(layer, n, at) for layer in (1, 2) for n in range(8) for at in ("S2", "end")), *mlps]
    receivers = [*(head(3, n, hook=letter) for letter in "qkv" for n in (5, 3, 0)), "logits"]
    paths = fp.rank_paths(demo.model, pairs, senders=senders, receivers=receivers, progress=False)
    shown = paths.top(8).to_pandas()[["sender", "receiver", "recovery", "recovery_low", "recovery_high", "degradation"]]
    print(shown.round(3).to_string(index=False))
    estimate = fp.estimate_paths(demo.model, pairs, senders=senders, receivers=receivers, progress=False)
    known = dict(zip(estimate.nodes, estimate.pooled("recovery"), strict=True))
    pearson = np.corrcoef([known[edge] for edge in paths.nodes], paths.pooled("recovery"))[0, 1]
    print(f"estimates of these {len(paths)} paths correlate with the exact ones at {pearson:.2f} (Pearson)")

    print("\n== Features as a circuit: before block 1 at the second name, everything else of the SAE ablated ==")
    sae = next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre")
    ranked = fp.rank_features(demo.model, sae, pairs, positions=["S2"], progress=False)
    for errors in ("in", "out"):
        features = fp.find_circuit(demo.model, pairs, saes=sae, nodes=ranked, errors=errors, size=40, progress=False)
        print(f"error terms {errors}: {features}")

    print("\n== Edges of single features: the 30 strongest before block 1 stand between block 0 and what reads it ==")
    strongest = fp.rank_features(demo.model, sae, pairs, progress=False).top(30)
    between = fp.find_circuit(
        demo.model, pairs, saes=sae, nodes=strongest, over="edges", scores="estimate", size=300, progress=False
    )
    print(between)
    scores = sorted(zip(between.graph.items, between.scores, strict=True), key=lambda of_edge: -abs(of_edge[1]))
    of_features = [(edge, score) for edge, score in scores if "feature" in (edge.sender.kind, edge.receiver.kind)]
    kept = sum(edge in set(between.items) for edge, _ in of_features)
    print(f"{kept} of the {len(between)} are edges of single features, of {len(of_features)}; the strongest (estimates):")
    for edge, score in of_features[:6]:
        print(f"  {score:+.3f}  {edge}")
    best = paths.top(1).nodes[0]
    print(
        f"\n{len(circuit)} of {len(circuit.graph.items)} edges have {circuit.faithfulness:.0%} of the behaviour. The strongest single path "
        f"is {best}, which brings back {paths.top(1).pooled('recovery')[0]:.0%} alone."
    )


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("featpatch-examples"))
    options = parser.parse_args()
    main(options.pairs, options.out)
