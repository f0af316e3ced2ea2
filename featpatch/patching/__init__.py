"""Exact patching of features, components and sets of nodes, ablation, and `do` for patching by hand.

What happens between `fp.rank_features` and a number, in the order of the formula

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error is in S]
    recovery = (m(x') - m_corrupted) / (m_clean - m_corrupted)

1. A `Study` (study.py) checks the arguments: the `Pair`s of prompts, the `Lens` through which the model is read and edited
   (model/lens.py), and a `Part` (parts.py), which says what is patched: here a `FeaturePart` with one or more `Dictionary`s,
   the SAEs (sae/dictionary.py).
2. The clean and the corrupted prompt of each pair are run. A `Run` (changes.py) holds the activations x of one prompt. Each
   direction has a base run b, which is patched, and a source run s, which values are taken from.
3. The dictionary splits both activations into a `Split` of features f and error e. A `Difference` (changes.py) holds the
   features that differ between the two, and what they add: the only patches that can have an effect.
4. The nodes S of all patches at one hook point, one `Node` per patch, form a `Swap` (changes.py) with their `Deltas` x' - x_b
   (engine/patches.py): sparse rows of (patch, position, direction in activation space, coefficient). For a set of features, or
   a dictionary that is not linear, they come from `Dictionary.change`, which is the formula above; for single features of a
   linear dictionary they are (f_s - f_b) times the decoder's direction.
5. A `Swap` applied to a base run is a `Block`. The engine's `Sweep` (engine/sweep.py) packs the patches of many blocks into
   forward passes, which resume at the patched layer and position (engine/suffix.py), and reads the metric m(x') of each patch.
6. A `Collector` (effects/collector.py) gathers the values in an `Effects` table (effects/table.py), which derives recovery,
   degradation, intervals and quadrants.

Everything else that is patched - heads, paths, sets, ablation values, random controls - is another `Part` of the same study.
"""
