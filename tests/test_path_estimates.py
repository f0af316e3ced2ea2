"""Estimates of paths against the slope of path patching by plain hooks, and against exact paths where all is linear."""

from typing import Any

import numpy as np
import oracle
import path_oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from small import Small
from test_paths import MLP, OPTIONS, ROUTES, Z, end, name_of, nodes_of
from test_sets import pairs_of

import featpatch as fp

STEP = 1e-5


def difference(small: Small, logits: torch.Tensor, slot: int) -> float:
    return oracle.logit_diff(logits[None], int(small.correct[slot]), int(small.wrong[slot]))


def divergence(small: Small, logits: torch.Tensor, slot: int) -> float:
    with torch.no_grad():
        p = small.model(small.clean[[slot]])[0, -1].softmax(-1)
    return float((p * (logits[-1].softmax(-1) / p).log()).sum())


def slope(small: Small, edge: Any, slot: int, direction: str, route: str, measure: Any = difference) -> float:
    """Of the metric, when the sender is changed by a small share of its change."""
    runs = small.corrupted[slot], small.clean[slot]
    base, source = runs if direction == "denoising" else runs[::-1]
    sender, receiver = end(small, edge.sender), end(small, edge.receiver)
    found = []
    for share in (STEP, -STEP):

        def scaled(of_base: Any, of_source: Any, x: torch.Tensor, share: float = share) -> torch.Tensor:
            return x + share * (sender.swapped(of_base, of_source, x) - x)

        part = path_oracle.End(sender.site, scaled, sender.reads, sender.moves)
        freeze = route in ("direct", "through_attention") and not getattr(small.model.cfg, "attn_only", False)
        attention = route in ("direct", "through_mlps")
        logits = path_oracle.path_patch(
            small.model, base, source, part, receiver, freeze_mlps=freeze, freeze_attention=attention
        )
        found.append(measure(small, logits, slot))
    return (found[0] - found[1]) / (2 * STEP)


@pytest.mark.parametrize("route", ROUTES)
def test_every_estimate_is_the_slope(small: Small, route: str) -> None:
    transcoder = name_of(small.saes[-1])
    early = nodes_of(small, ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"], 1)
    late = nodes_of(small, ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", transcoder, "blocks.1.attn.hook_z"], 2)
    senders = [*early, fp.Node(Z.format(0), "head", 1), fp.Node(Z.format(1), "head", 2), fp.Node(MLP.format(0), "activation")]
    inside = [fp.Node(f"blocks.{layer}.attn.hook_{name}", "head", 3) for layer in (1, 2) for name in "qkvz"]
    receivers = [*(node for node in late if node.kind == "feature"), *inside, fp.Node(MLP.format(1), "activation"),
                 fp.Node(MLP.format(2), "activation"), fp.LOGITS]  # fmt: skip
    run: dict[str, Any] = {"senders": senders, "receivers": receivers, "route": route, **OPTIONS}
    estimate = fp.rank_paths(small.model, pairs_of(small, [0]), method="atp", saes=small.saes, **run)
    exact = fp.rank_paths(small.model, pairs_of(small, [0]), saes=small.saes, **run)
    assert set(estimate.nodes) == set(exact.nodes)
    assert estimate.value == "estimate"
    seen = 0
    for entry in range(0, len(estimate.row), 11):
        edge, slot = estimate.nodes[estimate.row[entry]], int(estimate.pair[entry])
        for direction, found, base in (
            ("denoising", estimate.denoised, estimate.corrupted),
            ("noising", estimate.noised, estimate.clean),
        ):
            true = slope(small, edge, slot, direction, route)
            seen += abs(true) > 1e-4
            assert found[entry] - base[slot] == pytest.approx(true, abs=1e-6), (str(edge), direction)
    assert seen > 8


def test_the_divergence_of_denoising(small: Small) -> None:
    """By the slope at the corrupted run; noising is refused."""
    senders = [fp.Node(Z.format(0), "head", n) for n in range(2)]
    run: dict[str, Any] = {"senders": senders, "receivers": [fp.Node(MLP.format(1), "activation"), fp.LOGITS], **OPTIONS}
    found = fp.rank_paths(small.model, pairs_of(small), method="atp", metric="neg_kl", directions=["denoising"], **run)
    for entry in range(len(found.row)):
        edge, slot = found.nodes[found.row[entry]], int(found.pair[entry])
        true = slope(small, edge, slot, "denoising", "direct", divergence)
        assert found.denoised[entry] - found.corrupted[slot] == pytest.approx(true, abs=1e-6), str(edge)
    assert np.abs(found.denoised - found.corrupted[found.pair]).max() > 1e-4
    with pytest.raises(fp.FeatpatchError, match="is zero at the clean run"):
        fp.rank_paths(small.model, pairs_of(small), method="atp", metric="neg_kl", **run)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    "name", ["bridge neox", "bridge llama", "bridge gemma2", "hooked gemma2", "hooked attention only", "hooked no norms"]
)
def test_architectures(name: str) -> None:
    kind, _, which = name.partition(" ")
    model = (BRIDGES if kind == "bridge" else HOOKED)[which]()
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    mlps = not getattr(model.cfg, "attn_only", False)
    senders = [fp.Node(Z.format(0), "head", 1), *([fp.Node(MLP.format(0), "activation")] if mlps else [])]
    receivers = [fp.Node("blocks.1.attn.hook_q", "head", 3), fp.Node("blocks.1.attn.hook_k", "head", 1), fp.LOGITS,
                 *([fp.Node(MLP.format(layer), "activation") for layer in (0, 2)] if mlps else [])]  # fmt: skip
    run: dict[str, Any] = {
        "senders": senders,
        "receivers": receivers,
        "route": "through_mlps",
        "directions": ["denoising"],
        **OPTIONS,
    }
    estimate = fp.rank_paths(model, pairs_of(small, [0]), method="atp", **run)
    for entry, edge in enumerate(estimate.nodes[row] for row in estimate.row):
        true = slope(small, edge, 0, "denoising", "through_mlps")
        assert estimate.denoised[entry] - estimate.corrupted[0] == pytest.approx(true, abs=1e-6), str(edge)


def test_gradients_are_shared(small: Small) -> None:
    gradients = fp.Gradients(small.model, pairs_of(small))
    run: dict[str, Any] = {"senders": [fp.Node(MLP.format(0), "activation")], "receivers": ["logits"], **OPTIONS}
    one = fp.rank_paths(small.model, pairs_of(small), method=gradients, **run)
    np.testing.assert_array_equal(one.denoised, fp.rank_paths(small.model, pairs_of(small), method="atp", **run).denoised)


def test_a_whole_hook_z_is_the_sum_of_its_heads(small: Small) -> None:
    site, pairs = "blocks.0.attn.hook_z", pairs_of(small)
    of_heads, whole = (
        fp.rank_paths(small.model, pairs, method="atp", senders=senders, receivers=["logits"], **OPTIONS)
        for senders in ([fp.Node(site, "head", head) for head in range(4)], [fp.Node(site, "activation")])
    )
    assert whole.pooled("recovery")[0] == pytest.approx(of_heads.pooled("recovery").sum(), abs=1e-10)


def test_errors(small: Small) -> None:
    mlp = fp.Node(MLP.format(0), "activation")
    for changed, message in (
        (
            {"receivers": [fp.Node("blocks.2.hook_resid_pre", "error", None, "all", "blocks.2.hook_resid_pre")]},
            "no SAEs were passed",
        ),
        (
            {
                "receivers": [fp.Node("blocks.2.hook_resid_pre", "error", None, "all", "blocks.2.hook_resid_pre")],
                "saes": small.saes,
            },
            "for estimates",
        ),
        ({"senders": [fp.Node("blocks.0.attn.hook_q", "head", 0)]}, "no receiver is downstream of a sender"),
        ({"senders": [fp.Node("blocks.0.hook_mlp_out", "neuron", 0)]}, "sender 'blocks.0.hook_mlp_out neuron 0"),
        ({"receivers": [fp.Node("blocks.1.attn.hook_q", "head", 99)]}, "expected a head of 0 to 3"),
        ({"senders": [mlp, mlp]}, "each once"),
        ({"route": "around"}, "route='around'"),
        (
            {"method": fp.Gradients(small.model, pairs_of(small), method="ig")},
            "expected 'exact' or one of atp, relp, relp_qk, gim",
        ),
    ):
        options: dict[str, Any] = {"senders": [mlp], "receivers": ["logits"], **OPTIONS, **changed}
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.rank_paths(small.model, pairs_of(small), **{"method": "atp", **options})
