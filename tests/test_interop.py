"""What users of TransformerLens and SAELens have at hand: names of hook points, SAEs by hook point, activation caches."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import activations, decode, encode, logit_diff
from sae_lens import HookedSAETransformer
from small import Small
from transformer_lens import HookedTransformerConfig

import featpatch as fp

Z, RESID = "blocks.1.attn.hook_z", "blocks.1.hook_resid_pre"
QUIET: dict[str, Any] = {"positions": [3], "progress": False}


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


@pytest.mark.parametrize(
    ("sites", "layers", "name", "expected"),
    [
        ("hook_z", [1], "z", [1]),
        ("attn.hook_v", None, "v", [0, 1, 2]),
        ("hook_resid_pre", [2], "resid_pre", [2]),
        (Z, None, "z", [1]),
        ([Z, "blocks.2.attn.hook_z"], [2, 1], "z", [1, 2]),
        ("hook_pattern", [0], "pattern", [0]),
        ("blocks.1.hook_out", None, "resid_post", [1]),
        ("mlp.hook_post", [0], "neurons", [0]),
    ],
)
def test_names_of_hook_points(hooked: Small, sites: Any, layers: Any, name: str, expected: list[int]) -> None:
    pairs = pairs_of(hooked)
    one = fp.rank_components(hooked.model, pairs, sites=sites, layers=layers, **QUIET)
    other = fp.rank_components(hooked.model, pairs, sites=name, layers=expected, **QUIET)
    assert one.nodes == other.nodes
    assert one.pooled("recovery").tolist() == other.pooled("recovery").tolist()
    assert one.metadata["components"] == [name]
    assert one.metadata["layers"] == expected


@pytest.mark.parametrize(
    ("sites", "layers", "message"),
    [
        ([Z, "blocks.2.hook_mlp_out"], None, r"expected, with full names of hook points, each component in the same layers"),
        ("blocks.1.mlp.hook_out", None, "did you mean 'hook_mlp_out'?"),
        ([Z, "z"], None, r"expected, with full names of hook points, each component in the same layers and nothing else"),
        (
            Z,
            [2],
            r"sites=\['blocks.1.attn.hook_z'\] with layers=\[2\]: expected the layers \[1\] of the names; leave layers out",
        ),
        ("blocks.9.attn.hook_z", None, r"layers=\[9\]: expected some of 0 to 2"),
        (
            "blocks.1.hook_zz",
            None,
            r"sites=\['blocks.1.hook_zz'\]: expected .* one of .*attn.hook_z.*; did you mean 'attn.hook_z'",
        ),
        (["z", "hook_z"], None, r"sites=\['z', 'hook_z'\]: expected some of .*, each once"),
    ],
)
def test_names_that_are_refused(hooked: Small, sites: Any, layers: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_components(hooked.model, pairs_of(hooked), sites=sites, layers=layers, **QUIET)


def test_saes_by_hook(hooked: Small) -> None:
    sae, pairs = hooked.at(RESID), pairs_of(hooked)
    expected = fp.rank_features(hooked.model, sae, pairs, **QUIET)
    found = fp.rank_features(hooked.model, {RESID: sae}, pairs, **QUIET)
    assert (found.nodes, found.denoised.tolist()) == (expected.nodes, expected.denoised.tolist())
    for hook in (Z, 1):
        wrong = f"saes gives {hook!r} for an SAE of '{RESID}': expected the hook point that it was"
        with pytest.raises(fp.FeatpatchError, match=wrong):
            fp.rank_features(hooked.model, {hook: sae}, pairs, **QUIET)
    with pytest.raises(fp.FeatpatchError, match="there are no SAEs: expected at least one"):
        fp.rank_features(hooked.model, {}, pairs, **QUIET)


@pytest.mark.filterwarnings("ignore")
def test_saes_attached_to_a_model(hooked: Small) -> None:
    """A second model that has the SAEs attached says which they are; the patched model itself must have none."""
    sae, pairs = hooked.at(RESID), pairs_of(hooked)
    carrier = HookedSAETransformer(HookedTransformerConfig.from_dict(hooked.model.cfg.to_dict()))
    carrier.add_sae(sae)
    expected = fp.rank_features(hooked.model, sae, pairs, **QUIET)
    found = fp.rank_features(hooked.model, carrier, pairs, **QUIET)
    assert (found.nodes, found.denoised.tolist()) == (expected.nodes, expected.denoised.tolist())
    with pytest.raises(fp.FeatpatchError, match=r"SAEs are attached to the model at .*saes = model.acts_to_saes; model.reset"):
        fp.rank_features(carrier, carrier, pairs, **QUIET)


@pytest.mark.parametrize("how", ["add", "set"])
def test_a_cache_is_the_source(hooked: Small, how: Any) -> None:
    sae, clean, corrupted = hooked.at(RESID), hooked.clean[:1], hooked.corrupted[:1]
    nodes = fp.Patch((fp.Node(RESID, "feature", 5, 3), fp.Node(RESID, "error", None, 3)))
    base = {"base": corrupted} if how == "add" else {}
    found = []
    cache = hooked.model.run_with_cache(clean)[1]
    for source in (clean, cache, cache.cache_dict, cache.remove_batch_dim()):
        with fp.do(hooked.model, nodes, source=source, saes=sae, how=how, **base), torch.no_grad():
            found.append(hooked.model(corrupted))
    cached = activations(hooked.model, corrupted)[RESID], activations(hooked.model, clean)[RESID]
    features = [encode(sae, x) for x in cached]
    errors = [x - decode(sae, f, x, x) for x, f in zip(cached, features, strict=True)]
    new = features[0].clone()
    new[0, 3, 5] = features[1][0, 3, 5]
    x = decode(sae, new, cached[0], cached[0]) + errors[0]
    x[0, 3] += (errors[1] - errors[0])[0, 3]
    with torch.no_grad():
        expected = hooked.model.run_with_hooks(corrupted, fwd_hooks=[(RESID, lambda activation, hook: x)])
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, r"source has no activations at 'blocks.1.hook_resid_pre': expected them, because they are needed; cache"),
        (
            {RESID: torch.zeros(1, 7, 5)},
            r"source is \[1, 7, 5\] at '.*': expected a tensor \[batch, pos, 16\] of finite numbers",
        ),
        ({RESID: torch.full((1, 7, 16), torch.nan)}, r"of finite numbers"),
        ({RESID: torch.zeros(1, 6, 16)}, r"base is \(1, 7\) and source is \(1, 6\): expected equal shapes"),
    ],
)
def test_sources_that_are_refused(hooked: Small, source: Any, message: str) -> None:
    patch = fp.Patch((fp.Node(RESID, "activation", position=3),))
    with pytest.raises(fp.FeatpatchError, match=message), fp.do(hooked.model, patch, source=source, base=hooked.corrupted[:1]):
        pass


@pytest.mark.parametrize("given", ["cache", "dictionary", "vector"])
def test_means_of_a_cache(hooked: Small, given: str) -> None:
    cache = hooked.model.run_with_cache(hooked.corrupted)[1]
    mean = cache[Z].mean((0, 1))
    to = {"cache": cache, "dictionary": {Z: cache[Z]}, "vector": {Z: mean}}[given]
    pairs = pairs_of(hooked)
    effects = fp.ablate(hooked.model, pairs, sites=Z, to=to, **QUIET)
    assert effects.metadata["ablation"]["to"] == "activations"
    for row, node in enumerate(effects.nodes):
        for index, pair in enumerate(pairs):
            tokens = torch.tensor([pair.clean])
            new = activations(hooked.model, tokens)[Z].clone()
            new[0, 3, node.index] = mean[node.index]
            with torch.no_grad():
                logits = hooked.model.run_with_hooks(tokens, fwd_hooks=[(Z, lambda activation, hook, new=new: new)])
            expected = effects.clean[index] - logit_diff(logits, pair.correct[0], pair.wrong[0])
            assert effects.changes("degradation").toarray()[row, index] == pytest.approx(float(expected), abs=1e-10)


def test_features_are_averaged_over_a_cache(hooked: Small) -> None:
    """The mean of the features, which is not the features of the mean: as with `to="mean"` over the same prompts."""
    pairs, sae = pairs_of(hooked), hooked.at(RESID)
    cache = hooked.model.run_with_cache(torch.cat([hooked.clean, hooked.corrupted]))[1]
    found = fp.ablate(hooked.model, pairs, saes=sae, to=cache, **QUIET)
    expected = fp.ablate(hooked.model, pairs, saes=sae, to="mean", **QUIET)
    assert found.nodes == expected.nodes
    assert found.pooled("degradation") == pytest.approx(expected.pooled("degradation"), abs=1e-10)


def test_means_that_are_refused(hooked: Small) -> None:
    pairs, sae = pairs_of(hooked), hooked.at(RESID)
    calls = [
        ({"sites": Z, "to": {}}, r"to has no activations at 'blocks.1.attn.hook_z'"),
        (
            {"sites": Z, "to": {Z: torch.zeros(16)}},
            r"to is \[16\] at .*: expected a tensor \[batch, pos, 4, 4\] of finite numbers",
        ),
        ({"sites": Z, "to": {Z: torch.zeros(4, 4)}, "reference": pairs}, r"to=activations with reference=.*: expected neither"),
        (
            {"saes": sae, "to": {RESID: torch.zeros(16)}},
            r"to=\{hook: tensor\} for the features of .*: expected activations \[batch",
        ),
        ({"sites": "hook_pattern", "to": {}}, r"a mean over all positions is not an attention pattern"),
    ]
    for options, message in calls:
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.ablate(hooked.model, pairs, **options, **QUIET)


def test_rows_of_token_ids() -> None:
    """Lists of rows may have different lengths; arrays and tensors, also inside of lists, are the same as lists."""
    rows, others = [[5, 6, 7], [5, 6]], [[5, 8, 7], [5, 8]]
    ragged = fp.Pairs.from_tokens(rows, others, [9, 9], [[10], [10, 11]])
    assert [(pair.clean, pair.corrupted, pair.wrong) for pair in ragged] == [
        ((5, 6, 7), (5, 8, 7), (10,)),
        ((5, 6), (5, 8), (10, 11)),
    ]
    arrays = [[np.array(row) for row in rows], [torch.tensor(row) for row in others]]
    assert fp.Pairs.from_tokens(*arrays, np.array([9, 9]), [[10], [10, 11]]) == ragged


def test_the_largest_number_of_pairs_of_a_task() -> None:
    """Four templates and ordered choices of two of 23 countries: no more pairs exist, and all are found."""
    demo = fp.load_demo(progress=False)
    with pytest.raises(
        fp.FeatpatchError, match="only 506 of 507 pairs fit .*, of the 506 different ones .*: expected n=506 at most"
    ):
        fp.tasks.capitals(demo.model, n=507, templates=("The {relation} of {subject} is",))
    with pytest.raises(
        fp.FeatpatchError, match=r"n=257 pairs of 'ioi': expected an integer from 1 to 256, .*fp.tasks.ioi\(demo"
    ):
        demo.pairs("ioi", n=257)
