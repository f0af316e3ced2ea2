"""The laws of the design, in float64, against an oracle that imports nothing of featpatch."""

import numpy as np
import oracle
import pytest
import torch
from small import FEATURES, Small

import featpatch as fp

EXACT = 1e-10


def pairs_of(small: Small, slots: slice = slice(None)) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[slots], small.corrupted[slots], small.correct[slots], small.wrong[slots])


def spans(position: object, length: int = 7) -> list[int]:
    return list(range(length)) if position == "all" else [int(str(position))]


def oracle_value(small: Small, sae: object, node: fp.Node, slot: int, direction: str) -> float:
    clean, corrupted = small.clean[slot : slot + 1], small.corrupted[slot : slot + 1]
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    positions = spans(node.position)
    if node.kind == "activation":
        logits = oracle.patched_activation_logits(small.model, node.site, base, source, positions)
    else:
        features = {"feature": [node.index], "all_features": range(FEATURES), "error": []}[node.kind]
        logits = oracle.patched_logits(
            small.model, sae, base, source, features=list(features), positions=positions, error=node.kind == "error"
        )
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.parametrize("which", range(9))
@pytest.mark.parametrize("positions", ["all", [3, 6]])
def test_every_row_equals_one_hooked_forward_per_patch(small: Small, which: int, positions: object) -> None:
    sae = small.saes[which]
    effects = fp.rank_features(small.model, sae, pairs_of(small), positions=positions)
    assert len(effects) > 3 * FEATURES / 4
    for row, slot, denoised, noised in zip(effects.row, effects.pair, effects.denoised, effects.noised, strict=True):
        node = effects.nodes[row]
        assert abs(denoised - oracle_value(small, sae, node, slot, "denoising")) < EXACT, node
        assert abs(noised - oracle_value(small, sae, node, slot, "noising")) < EXACT, node


def test_entries_that_are_not_stored_have_exactly_no_effect(bridge: Small) -> None:
    sae = bridge.at("blocks.1.hook_resid_pre")
    effects = fp.rank_features(bridge.model, sae, pairs_of(bridge, slice(0, 1)))
    stored = {node.index for node in effects.nodes if node.kind == "feature"}
    missing = sorted(set(range(FEATURES)) - stored)
    assert missing, "the test needs a feature that is the same in both runs"
    for index in missing:
        node = fp.Node("blocks.1.hook_resid_pre", "feature", index)
        assert abs(oracle_value(bridge, sae, node, 0, "denoising") - effects.corrupted[0]) < EXACT
