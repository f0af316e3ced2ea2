"""Groups of features beside single features, on the shipped model.

    python benchmarks/groups.py

For each hook point and position that carries the behaviour: the largest effect of a single feature, the sum of all single
effects, and the effect of all features together as one group. Then the groups that each similarity finds among the features
with the largest effects, and how much of the behaviour they have together.
"""

import torch

import featpatch as fp

PAIRS = 64
"""The number of pairs of each task."""

TOP = 60
"""The number of features that are grouped by similarity."""

LEAST = 0.5
"""The effect of all features together from which a hook point is shown."""

PLACES = {
    "ioi": ["S2", "end"],
    "capitals": ["subject", "end"],
    "greater_than": ["start_year", "end"],
    "sentiment": ["word1", "word2", "end"],
}
"""The positions at which the features of each task are patched."""


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    demo = fp.load_demo(progress=False)
    print(f"Recovery (exact), {PAIRS} pairs per task, groups with at least {LEAST}\n")
    print("| task | position | features of | features | largest alone | sum of all alone | all together |")
    print("|---|---|---|---:|---:|---:|---:|")
    for task, positions in PLACES.items():
        pairs = demo.pairs(task, n=PAIRS)
        effects = fp.rank_features(demo.model, demo.saes, pairs, positions=positions, progress=False)
        groups = fp.group_features(demo.model, demo.saes, pairs, effects, similarity="site", progress=False)
        for row in groups.to_pandas().itertuples():
            if row.recovery >= LEAST:
                largest = groups.members(row.group).pooled("recovery").max()
                place = groups.members(row.group).nodes[0]
                print(
                    f"| {task} | {place.position} | {place.sae} | {row.members} | {largest:.2f} | {row.recovery_sum:.2f} "
                    f"| {row.recovery:.2f} |"
                )
    pairs = demo.pairs("ioi", n=PAIRS)
    sae = demo.saes[4]
    effects = fp.rank_features(demo.model, sae, pairs, positions=["S2"], progress=False)
    top = effects.top(TOP, kind="feature")
    print(f"\nIndirect objects: the {TOP} features of {sae.cfg.metadata.hook_name} @ S2 with the largest effects\n")
    print("| similarity | groups | largest group | its members | sum of its members alone |")
    print("|---|---:|---:|---:|---:|")
    for similarity in ("effects", "attribution", "decoder", "coactivation"):
        groups = fp.group_features(demo.model, sae, pairs, top, similarity=similarity, progress=False)
        first = groups.to_pandas().iloc[0]
        print(
            f"| `{similarity}` | {len(groups)} | {first['recovery']:.2f} | {first['members']} | {first['recovery_sum']:.2f} |"
        )


if __name__ == "__main__":
    main()
