"""Pairs whose labels are at different places in the two prompts, compared with hooks that have their own indices."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import activations, decode, encode, hooks, logit_diff
from small import HEADS, Small

import featpatch as fp
from featpatch.errors import FeatpatchWarning

LABELS = {"same": 1, "subject": (3, 4), "verb": 4, "end": 6}
"""Places in the first clean and the second corrupted prompt, of 7 tokens; OTHERS are those in the prompt of 9 tokens."""
OTHERS = {"same": 1, "subject": (4, 5), "verb": 6, "end": 8}


def prompt(length: int, seed: int) -> tuple[int, ...]:
    drawn = torch.randint(10, 40, (length - 3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return (11, 12, 13, *drawn)


PAIRS = fp.Pairs(
    (
        fp.Pair(prompt(7, 1), prompt(9, 2), (3,), (4,), labels=LABELS, corrupted_labels=OTHERS),
        fp.Pair(prompt(9, 3), prompt(7, 4), (5,), (6,), labels=OTHERS, corrupted_labels=LABELS),
        fp.Pair(prompt(7, 5), prompt(9, 6), (7,), (8,), labels=LABELS, corrupted_labels=OTHERS),
        fp.Pair(prompt(7, 5), prompt(7, 7), (7,), (8,), labels=LABELS),
    )
)


def at(pair: fp.Pair, label: str) -> tuple[list[int], list[int]]:
    places = [np.atleast_1d(labels[label]).tolist() for labels in (pair.labels, pair.corrupted_labels or pair.labels)]
    return places[0], places[1]


@torch.no_grad()
def by_hand(model: Any, pair: fp.Pair, label: str, change: Any) -> dict[str, float]:
    """The metric of each patched run; `change(base, source, here, there)` returns hooks, from caches and token indices."""
    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    here, there = at(pair, label)
    found = {}
    for way, base, source, to, of in (("denoising", corrupted, clean, there, here), ("noising", clean, corrupted, here, there)):
        edits = change(activations(model, base), activations(model, source), to, of)
        logits = model.run_with_hooks(base, fwd_hooks=edits)
        found[way] = logit_diff(logits, pair.correct[0], pair.wrong[0])
    return found


def replacing(hook: str, new: torch.Tensor) -> list[Any]:
    return [(hook, lambda activation, hook: new)]


def compare(effects: fp.Effects, row: int, index: int, expected: dict[str, float]) -> None:
    recovery, degradation = (effects.changes(effect).toarray()[row, index] for effect in ("recovery", "degradation"))
    assert effects.corrupted[index] + recovery == pytest.approx(expected["denoising"], abs=1e-10)
    assert effects.clean[index] - degradation == pytest.approx(expected["noising"], abs=1e-10)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"])
def test_features_at_labels(small: Small, hook: str, wide: None) -> None:
    sae = [sae for sae in small.saes if hook == hooks(sae)[1]][-1]  # a transcoder at hook_mlp_out
    reads, writes = hooks(sae)
    with pytest.warns(FeatpatchWarning, match="label 'same' has no rows, because it is before the first difference in every"):
        effects = fp.rank_features(small.model, sae, PAIRS, positions=list(LABELS), progress=False)
    assert {node.position for node in effects.nodes} == set(LABELS) - {"same"}
    for row, node in enumerate(effects.nodes):
        if node.kind == "feature" and node.index % 5:
            continue

        def change(base: Any, source: Any, to: list[int], of: list[int], node: fp.Node = node) -> list[Any]:
            if node.kind == "activation":
                new = base[writes].clone()
                new[:, to] = source[writes][:, of]
                return replacing(writes, new)
            f_base, f_source = encode(sae, base[reads]), encode(sae, source[reads])
            old = decode(sae, f_base, base[reads], base[writes])
            error, error_source = base[writes] - old, source[writes] - decode(sae, f_source, source[reads], source[writes])
            new = f_base.clone()
            if node.kind == "error":
                error = error.clone()
                error[:, to] = error_source[:, of]
            else:
                chosen = slice(None) if node.index is None else node.index
                new[0, to, chosen] = f_source[0, of, chosen]
            return replacing(writes, decode(sae, new, base[reads], base[writes]) + error)

        for index, pair in enumerate(PAIRS):
            compare(effects, row, index, by_hand(small.model, pair, str(node.position), change))


@pytest.mark.parametrize("name", ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"])
def test_components_at_labels(small: Small, name: str, wide: None) -> None:
    labels = ["subject", "verb", "end"]
    effects = fp.rank_components(small.model, PAIRS, sites=name, layers=[1], positions=labels, progress=False)
    assert len(effects) == 3 * (HEADS if name in "zqkv" else 1)
    for row, node in enumerate(effects.nodes):
        hook = node.site

        def change(base: Any, source: Any, to: list[int], of: list[int], node: fp.Node = node, hook: str = hook) -> list[Any]:
            new = base[hook].clone()
            if node.index is None:
                new[:, to] = source[hook][:, of]
            else:
                new[:, to, node.index] = source[hook][:, of, node.index]
            return replacing(hook, new)

        for index, pair in enumerate(PAIRS):
            compare(effects, row, index, by_hand(small.model, pair, str(node.position), change))
