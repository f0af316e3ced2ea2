"""Exact patching of features, components and sets of nodes, ablation, and `do` for patching by hand.

What happens between `fp.rank_features` and a number, in the order of the formula, in which S holds the nodes of one patch:

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error is in S]
    recovery = (m(x') - m_corrupted) / (m_clean - m_corrupted)

1. A `Study` (study.py) checks the arguments: the `Pair`s of prompts (pairs/pair.py), the `Lens` through which the model is read
   and edited (model/lens.py), the `Measures` (metrics.py), and a `Part` (changes.py), which says what is patched: here a
   `FeaturePart` (features.py) with one or more `Dictionary`s, the SAEs (sae/dictionary.py), each of which is a `Codec` at its
   hook points (sae/codec.py).
2. A `Runner` (runs.py) runs the clean and the corrupted prompt of each pair, and returns `PairRuns`. A `Run` holds the
   activations x of one prompt. Each direction has a base run b, which is patched, and a source run s, which values are taken
   from.
3. The dictionary splits both activations into a `Split` of features f and error e (sae/codec.py). A `Difference` (changes.py)
   holds the features that differ between the two, and what they add: the only features whose patches can have an effect.
4. Patches, named by one `Node` each, have `Deltas` x' - x_b at each hook point that they change (engine/patches.py): sparse
   rows of (patch, position, direction in activation space, coefficient). They come from `Dictionary.change`, which is the
   formula above, with two shortcuts: each feature of a linear dictionary adds f_s - f_b times its decoder direction (times the
   gain of the base run's state, if the dictionary has one), and a whole activation changes by x_s - x_b.
5. With the `BaseRun` to which they are applied, patches at the same hook points form a `Block` (engine/patches.py). The
   engine's `Sweep` (engine/sweep.py) packs the patches of many blocks into forward passes along a `PatchPath`
   (engine/path.py), and reads the metric m(x') of each patch. On the `SuffixPath` (engine/suffix.py), with the model as a
   `Stack` of row-wise layers (model/layer.py), a pass computes only the rows of a `Matrix` (engine/patches.py): it resumes at
   the patched layer and position, takes everything before them from the `Trace` of the base run, and makes the changes at
   higher hook points on its way up. For models that this does not support, the `PlainPath` is the model's own pass from that
   layer on.
6. A `Collector` (effects/collector.py) gathers the values in an `Effects` table (effects/table.py), which stores them
   (effects/values.py) and derives recovery, degradation and intervals (effects/measured.py) and quadrants.

Other nodes to patch are another `Part` of such a study: components (components.py), paths (paths.py), sets of features
(sets.py), random controls (controls.py), and named nodes, alone or together (joint.py, summed.py). Other values to patch in
are chosen by a `Contrast` (runs.py), such as an `Ablation` (ablation.py) with ablation values (ablation_values.py). Embeddings
with `Noise` (noise.py) are another corrupted run. Metrics of answers of several tokens have several readings (runs.py). `do`
(do.py) works without a study: it makes the changes of `Chosen` nodes (chosen.py) in every call of the model.
"""
