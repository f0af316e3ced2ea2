"""Laws of the design where nothing is drawn: every row of a few tables, hooks of the user, import. See test_properties.py."""

import subprocess
import sys
from typing import Any

import oracle
import pytest
from small import FEATURES, Small

import featpatch as fp
from featpatch.errors import FeatpatchWarning

EXACT = 1e-10
SITE = "blocks.1.hook_resid_pre"


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def oracle_value(small: Small, sae: Any, node: fp.Node, slot: int, direction: str) -> float:
    clean, corrupted = small.clean[slot : slot + 1], small.corrupted[slot : slot + 1]
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    positions = list(range(7)) if node.position == "all" else [int(node.position)]
    if node.kind == "activation":
        logits = oracle.patched_activation_logits(small.model, node.site, base, source, positions)
    else:
        features = {"feature": [node.index], "all_features": range(FEATURES), "error": []}[node.kind]
        logits = oracle.patched_logits(
            small.model, sae, base, source, features=list(features), positions=positions, error=node.kind == "error"
        )
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.both
@pytest.mark.parametrize("which", [1, 8, *(pytest.param(n, marks=pytest.mark.extended) for n in (0, *range(2, 8)))])
@pytest.mark.parametrize("positions", ["all", [3, 6]])
def test_every_row_equals_one_hooked_forward_per_patch(small: Small, which: int, positions: Any) -> None:
    """Law 4."""
    sae = small.saes[which]
    effects = fp.rank_features(small.model, sae, pairs_of(small), positions=positions)
    assert len(effects) > FEATURES / 2
    for row, slot, denoised, noised in zip(effects.row, effects.pair, effects.denoised, effects.noised, strict=True):
        node = effects.nodes[row]
        assert abs(denoised - oracle_value(small, sae, node, slot, "denoising")) < EXACT, node
        assert abs(noised - oracle_value(small, sae, node, slot, "noising")) < EXACT, node


def test_a_label_or_index_that_holds_the_same_token_gives_no_rows(bridge: Small) -> None:
    """Positions before the first difference can't differ in a causal model: skipped, not run."""
    with pytest.warns(FeatpatchWarning, match="token index 0 has no rows, because it is before the first difference"):
        assert len(fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge), positions=[0, 1, 2])) == 0


@pytest.mark.both
def test_hooks_of_the_user_survive(small: Small) -> None:
    calls: list[int] = []
    small.model.hook_dict[SITE].add_hook(lambda activation, hook: calls.append(1))
    try:
        with pytest.warns(fp.SlowPathWarning, match="hooks attached by you"):
            fp.rank_features(small.model, small.at(SITE), pairs_of(small))
        before = len(calls)
        small.model(small.clean)
        assert len(calls) == before + 1
    finally:
        small.model.reset_hooks()


@pytest.mark.extended
def test_importing_changes_nothing_global() -> None:
    """Law 7: whatever torch, numpy and warnings are set to after the foreign libraries came in, ours leaves."""
    program = """
import warnings, torch, numpy, logging, sae_lens, transformer_lens, scipy.stats, pandas
from tqdm.auto import tqdm
state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
                 list(warnings.filters), numpy.geterr(), logging.root.level, list(logging.root.handlers))
before = state()
import featpatch
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
