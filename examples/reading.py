"""An explanation, for the README, of the first rows and the summary of hook points that `featpatch demo` prints.

Run with `python -m examples.reading`.
"""

from collections import Counter

import featpatch as fp
from examples.places import listed, place
from featpatch.descriptions import Description


def names(effects: fp.Effects, fires: dict[fp.Node, Description]) -> str:
    """Return, in words, the features that detect one name each as the first feature does, then those that share a name."""
    words: dict[str, list[str]] = {}
    for node in effects.nodes[1:]:
        if (node.site, fires[node].label) == (effects.nodes[0].site, fires[effects.nodes[0]].label):
            words.setdefault(fires[node].word, []).append(str(node.index))
    alone = {word: features[0] for word, features in words.items() if len(features) == 1}
    shared = [f"{listed(features)} before {word}" for word, features in words.items() if len(features) > 1]
    return ", ".join([f"{listed([*alone.values()])} do the same before {listed([*alone])}", *shared])


def everything(effects: fp.Effects) -> str:
    """Return, in words, where all features of the residual stream together recover everything, and where almost nothing."""
    table = effects.sites()
    stream = table[table["site"].str.contains("resid")].pivot(index="site", columns="position", values="recovery_all_features")
    full, none = stream >= 0.995, (stream.fillna(0) < 0.1).all(axis=1)
    at_s2, at_end, nowhere = ([place(site) for site in stream.index[of]] for of in (full["S2"], full["end"], none))
    both = [
        listed(parts).replace("before layer", "before layers", 1).replace("and before layer ", "and ")
        for parts in (at_s2, nowhere)
    ]
    return (
        f"All features together bring back everything at S2 {both[0]} and at the last word {listed(at_end)}, and next to nothing at "
        f"both {both[1]}"
    )


def main() -> None:
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=32, seed=0)
    effects = fp.rank_features(demo.model, demo.saes, pairs, positions=[*pairs[0].labels], progress=False)
    top = effects.top(12)
    fires, table = fp.max_activating(demo.model, demo.saes, top.nodes, demo.text()), top.to_pandas()
    first, row = top.nodes[0], table.iloc[0]
    other = next(at for at, node in enumerate(top.nodes) if node.site != first.site)
    of_other, context = table.iloc[other], fires[top.nodes[other]].contexts[0]
    before, word = context.split("[")[0].split()[-1], context.split("[")[1].split("]")[0]
    lost = "nothing" if abs(of_other["degradation"]) < 0.005 else f"{100 * of_other['degradation']:.0f} %"
    labels = Counter(table["quadrant"])
    print(
        f"How to read it, for the first rows: after the last layer, feature {first.index} is active on the word before a name that is "
        f'{fires[first].word} ("{fires[first].contexts[1]}"); its clean value alone brings back '
        f"{100 * row['recovery']:.0f} % of the behaviour and its corrupted value costs {100 * row['degradation']:.0f} %, over "
        f"{row['pairs']} pairs, in {row['changed_pairs']} of which it differs between the runs; over these pairs alone it brings back "
        f"{100 * row['recovery_where_changed']:.0f} %. Features {names(top, fires)}. Their low F1 says that "
        "none of them is *the* feature of that name: they are active elsewhere too. "
        f"Feature {top.nodes[other].index} {place(top.nodes[other].site)} is active on names, most strongly on {word} after "
        f'"{before}"; it suffices '
        f"for {100 * of_other['recovery']:.0f} % and {lost} is lost without it: something else does its job as well. Of the "
        f"{len(table)} rows, {labels['both directions']} have an effect whose 95 % interval lies above "
        f"{100 * top.threshold:.0f} % of the whole activation's effect in both directions, and {labels['undecided']} are undecided. "
        f"{everything(effects)}: there the answer is held at words in between."
    )


if __name__ == "__main__":
    main()
