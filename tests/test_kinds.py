"""Kinds of dictionaries x sites x model classes, each cell against the oracle; then normalisation and types."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from kinds import AUTOENCODERS, KINDS, READS, SITES, TRANSCODERS, Squared, built, pairs_of
from small import FEATURES, Small, small_bridge, standard

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae import codec as behaviour
from featpatch.sae.dictionary import dictionaries

EXACT = 1e-10
UNTRAINED = [kind for kind in AUTOENCODERS if kind not in ("BatchTopK", "Matryoshka")]
NORMALISING = ("constant_norm_rescale", "layer_norm")
LAST = 7


def check(small: Small, sae: Any, entries: int = 2, reference: Any = None) -> fp.Effects:
    """Some rows of each kind in both directions against the oracle (law 4), and the whole site by hand (laws 1 and 2).

    Args:
        reference: what the oracle takes for it, if not the same.
    """
    reference = sae if reference is None else reference
    site = oracle.hooks(reference)[1]
    effects = fp.rank_features(small.model, sae, pairs_of(small), positions="all", progress=False)
    assert {node.kind for node in effects.nodes} >= {"feature", "all_features", "activation"}
    chosen: set[int] = set()
    for kind in ("feature", "all_features", "error", "activation"):
        rows = [entry for entry, row in enumerate(effects.row) if effects.nodes[row].kind == kind]
        chosen |= set(random.Random(kind).sample(rows, min(entries, len(rows))))
    for entry in chosen:
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        for direction, values in (("denoising", effects.denoised), ("noising", effects.noised)):
            expected = by_oracle(small, reference, node, slot, direction)
            assert abs(values[entry] - expected) < EXACT, (node, direction)

    check_whole(small, sae, site)
    return effects


def check_whole(small: Small, sae: Any, site: str) -> None:
    """All features and the error are the whole activation (law 2); from a run into itself they change no bit (law 1)."""
    clean, corrupted = small.clean[:1], small.corrupted[:1]
    everything = fp.Patch((fp.Node(site, "all_features"), fp.Node(site, "error")))
    with torch.no_grad(), fp.do(small.model, everything, source=clean, base=corrupted, saes=sae):
        together = small.model(corrupted)
    whole = oracle.patched_activation_logits(small.model, site, corrupted, clean, list(range(LAST)))
    torch.testing.assert_close(together, whole, rtol=0, atol=EXACT)
    with torch.no_grad(), fp.do(small.model, everything, source=corrupted, base=corrupted, saes=sae):
        unchanged = small.model(corrupted)
    with torch.no_grad():
        assert torch.equal(unchanged, small.model(corrupted))


def by_oracle(small: Small, sae: Any, node: fp.Node, slot: int, direction: str) -> float:
    runs = small.corrupted[[slot]], small.clean[[slot]]
    base, source = runs if direction == "denoising" else runs[::-1]
    positions = list(range(LAST))
    if node.kind == "activation":
        logits = oracle.patched_activation_logits(small.model, node.site, base, source, positions)
    else:
        count = (
            (sae.coder.encode(torch.zeros(1, 1, sae.d_in, dtype=torch.float64)).shape[2]) if hasattr(sae, "coder") else FEATURES
        )
        features = {"feature": [node.index], "all_features": range(count), "error": []}[node.kind]
        logits = oracle.patched_logits(
            small.model, sae, base, source, features=list(features), positions=positions, error=node.kind == "error"
        )
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


def slow(site: str) -> Any:
    """Sites inside the MLP are patched by the model's own pass, and a warning says so."""
    return pytest.warns(fp.SlowPathWarning) if ".mlp." in site else warnings.catch_warnings()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_all_sites_at_once(hooked: Small, kind: str) -> None:
    """All cells of the matrix on one of TransformerLens' classes, of one pair, each row in one direction."""
    cells = {SITES[site][0]: built(hooked, kind, site) for site in SITES}
    with slow("blocks.1.mlp."):
        effects = fp.rank_features(
            hooked.model, [sae for sae, _ in cells.values()], pairs_of(hooked)[:1], positions="all", progress=False
        )
    for site, (_, reference) in cells.items():
        of_site = effects.where(site=site)
        for of_kind in (of_site.where(kind="feature"), of_site.where(kind="error")):
            for entry in random.Random(site).sample(range(len(of_kind.row)), min(1, len(of_kind.row))):
                node = of_kind.nodes[of_kind.row[entry]]
                direction = random.Random(f"{kind} {node}").choice(("denoising", "noising"))
                found = of_kind.denoised if direction == "denoising" else of_kind.noised
                assert abs(found[entry] - by_oracle(hooked, reference, node, 0, direction)) < EXACT, (node, direction)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix(small: Small, kind: str, site: str) -> None:
    sae, reference = built(small, kind, site)
    with slow(SITES[site][0]):
        check(small, sae, entries=1, reference=reference)


def matrix() -> str:
    """The cells that are tested, as a table: `python tests/test_kinds.py` prints it for docs/models-and-saes.md."""
    rows = [["kind", *SITES], ["---", *[":-:"] * len(SITES)]]
    rows += [[kind, *("slow" if ".mlp." in hook else "yes" for hook, _ in SITES.values())] for kind in KINDS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def test_the_readme_shows_the_matrix() -> None:
    assert matrix() in (Path(__file__).parent.parent / "docs" / "models-and-saes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("reshape", ["none", "hook_z"])
def test_heads_side_by_side(reshape: str) -> None:
    """The flat form of `hook_z`, which a bridge has where nothing splits the heads."""
    small = small_bridge()
    sae = standard("blocks.1.attn.hook_z", 3, reshape_activations=reshape)
    apart = fp.rank_features(small.model, sae, pairs_of(small), progress=False)
    small.model.hook_dict["blocks.1.attn.hook_z"].hook_conversion = None
    oracle._activations.cache_clear()
    assert oracle.activations(small.model, small.clean[:1])["blocks.1.attn.hook_z"].shape == (1, LAST, 16)
    flat = fp.rank_features(small.model, sae, pairs_of(small), progress=False)
    assert flat.nodes == apart.nodes
    assert abs(flat.denoised - apart.denoised).max() < EXACT
    if reshape == "none":
        check(small, sae)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("hook_in", "hook_resid_pre"), ("hook_out", "hook_resid_post"), ("ln2.hook_in", "hook_resid_mid"),
     ("attn.hook_out", "hook_attn_out"), ("mlp.hook_out", "hook_mlp_out"), ("attn.o.hook_in", "attn.hook_z")],
)  # fmt: skip
def test_aliases_of_the_bridge(bridge: Small, alias: str, name: str) -> None:
    one, other = (
        fp.rank_features(bridge.model, standard(f"blocks.1.{hook}", 3), pairs_of(bridge), progress=False)
        for hook in (alias, name)
    )
    assert one.nodes == other.nodes
    assert {node.site for node in one.nodes} == {f"blocks.1.{name}"}
    assert (one.denoised == other.denoised).all()


def test_every_layer_and_two_on_one_hook_at_once(small: Small) -> None:
    """All in one call give what each gives alone."""
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    saes = [standard(hook, 3) for hook in hooks] + [
        AUTOENCODERS["TopK"](hooks[1], 16, seed=5),
        fp.dictionaries.identity(small.model, hooks[1]),
    ]
    together = fp.rank_features(small.model, saes, pairs_of(small), progress=False)
    assert len({node.sae for node in together.nodes if node.sae}) == 5
    for sae, name in zip(saes, [*hooks, f"{hooks[1]}#2", f"coordinates of {hooks[1]}"], strict=True):
        alone = fp.rank_features(small.model, sae, pairs_of(small), progress=False).where(kind="feature")
        of_sae = [row for row, node in enumerate(together.nodes) if node.sae == name and node.kind == "feature"]
        found = together.take(of_sae)
        assert [node.index for node in found.nodes] == [node.index for node in alone.nodes]
        assert abs(found.denoised - alone.denoised).max() < EXACT


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "hook_z"])
def test_a_bridge_with_processed_weights(site: str) -> None:
    small = small_bridge()
    small.model.enable_compatibility_mode(disable_warnings=True)
    oracle._activations.cache_clear()
    check(small, standard(SITES[site][0], 3))


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_transcoders(small: Small, kind: str) -> None:
    reads = oracle.hooks(small.saes[-1])[0]
    check(small, TRANSCODERS[kind](reads, 16, "blocks.1.hook_mlp_out", 16, seed=3))


@pytest.mark.parametrize(
    ("kind", "normalisation"),
    [(kind, "none") for kind in (*AUTOENCODERS, *TRANSCODERS)]
    + [(kind, normalisation) for kind in (*UNTRAINED, *TRANSCODERS) for normalisation in NORMALISING],
)
def test_the_reconstruction_is_the_forward_pass_of_sae_lens(bridge: Small, kind: str, normalisation: str) -> None:
    """Skip paths and predicted codes belong to it, so that the error, and the explained variance, are those of sae-lens."""
    options = {"normalize_activations": normalisation} if normalisation != "none" else {}
    if kind in TRANSCODERS:
        sae = TRANSCODERS[kind](*READS, "blocks.1.hook_mlp_out", 16, seed=3, **options)
    else:
        sae = AUTOENCODERS[kind]("blocks.1.hook_resid_pre", 16, seed=3, **options)
    (dictionary,) = dictionaries(wrap(bridge.model), sae)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    split = dictionary.split({dictionary.writes: y, dictionary.reads: x})
    written = x if dictionary.reads == dictionary.writes else y
    torch.testing.assert_close(written - split.error, sae(x).detach(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("normalisation", NORMALISING)
@pytest.mark.parametrize("kind", UNTRAINED)
def test_normalised_tokens(small: Small, kind: str, normalisation: str) -> None:
    """Clean and corrupted runs carry different scales: a feature moves in the base run's."""
    sae = AUTOENCODERS[kind]("blocks.1.hook_resid_pre", 16, seed=3, normalize_activations=normalisation)
    check(small, sae)
    assert not {"x_norm_coeff", "ln_mu", "ln_std"} & set(vars(sae)), "the SAE is left as it was found"


@pytest.mark.parametrize("normalisation", NORMALISING)
@pytest.mark.parametrize("kind", TRANSCODERS)
def test_normalised_transcoders(small: Small, kind: str, normalisation: str) -> None:
    reads = oracle.hooks(small.saes[-1])[0]
    check(small, TRANSCODERS[kind](reads, 16, "blocks.1.hook_mlp_out", 16, normalize_activations=normalisation))


@pytest.mark.parametrize("normalisation", ["none", *NORMALISING])
def test_without_the_decoder_bias_at_the_input(small: Small, normalisation: str) -> None:
    sae = standard("blocks.1.hook_resid_pre", 4, apply_b_dec_to_input=False, normalize_activations=normalisation)
    check(small, sae)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"])
def test_an_object_of_ones_own(small: Small, hook: str) -> None:
    check(small, fp.dictionaries.adapt(Squared(16), hook, d_in=16))


def test_baselines(small: Small) -> None:
    effects = check(small, fp.dictionaries.identity(small.model, "blocks.1.hook_resid_post"))
    assert {node.kind for node in effects.nodes} == {"feature", "all_features", "activation"}, "the error is 0"
    check(small, fp.dictionaries.neurons(small.model, 1))
    check(small, fp.dictionaries.pca(small.model, "blocks.1.hook_resid_post", pairs_of(small), components=3))


@pytest.mark.parametrize("kind", [*UNTRAINED, *TRANSCODERS])
def test_directions_that_are_probed_are_those_of_the_weights(bridge: Small, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of codecs that know no rows each feature is decoded by itself, in the state of a fixed activation."""
    site = "blocks.1.hook_resid_pre"
    sae = TRANSCODERS[kind](*READS, site, 16) if kind in TRANSCODERS else AUTOENCODERS[kind](site, 16)
    (dictionary,) = dictionaries(wrap(bridge.model), sae)
    features = torch.tensor([5, 0, 5, 23])
    known = dictionary.directions(features)
    monkeypatch.setattr(dictionary.codec, "rows", lambda features: None)
    torch.testing.assert_close(dictionary.directions(features), known, rtol=0, atol=EXACT)


def test_principal_components_hold_the_most_variance(small: Small) -> None:
    """Against the singular values."""
    hook, pairs = "blocks.1.hook_resid_post", pairs_of(small)
    coder = fp.dictionaries.pca(small.model, hook, pairs, components=3).coder
    runs = [oracle.activations(small.model, torch.tensor([t]))[hook][0] for pair in pairs for t in (pair.clean, pair.corrupted)]
    x = torch.cat(runs)
    singular = torch.linalg.svdvals(x - x.mean(0))
    kept = (coder.decode(coder.encode(x)) - x.mean(0)).square().sum()
    assert abs(float(kept) - float(singular[:3].square().sum())) < 1e-8


@pytest.mark.parametrize("kind", ["standard", "skip transcoder"])
def test_a_scale_that_is_not_folded_in_is_applied(small: Small, kind: str) -> None:
    """`expected_average_only_in`: the scale as metadata gives what folding it into the weights gives."""
    hooks = ("blocks.1.hook_resid_pre", 16) if kind == "standard" else (*READS, "blocks.1.hook_resid_pre", 16)
    build = {**AUTOENCODERS, **TRANSCODERS}[kind]
    unfolded, folded = (build(*hooks, normalize_activations="expected_average_only_in") for _ in range(2))
    unfolded.cfg.metadata.norm_scaling_factor = 0.3
    folded.fold_activation_norm_scaling_factor(0.3)
    one, other = (fp.rank_features(small.model, sae, pairs_of(small), progress=False) for sae in (unfolded, folded))
    assert one.nodes == other.nodes
    assert abs(one.denoised - other.denoised).max() < EXACT
    check(small, folded)


@pytest.mark.parametrize(("flipped", "alike"), [(7, True), (8, False)])
def test_few_features_may_flip_in_half_precision(flipped: int, alike: bool) -> None:
    """Two, and one in twenty of those that are on: here of 100 whose largest is 2; a hundredth of it is rounding."""
    one = torch.cat([torch.ones(99), torch.full((1,), 2.0), torch.zeros(300)])
    other = one + 0.0199
    other[:flipped] += 0.0002
    assert behaviour._same(one, other) is alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalisation", ["none", *NORMALISING])
def test_an_sae_in_another_type_than_the_model(small: Small, dtype: torch.dtype, normalisation: str) -> None:
    """The SAE's features in its own type, what they add in the precision of float32: against the same weights in float64."""
    hook = "blocks.1.hook_resid_pre"
    sae = standard(hook, 4, normalize_activations=normalisation).to(dtype=dtype)
    sae.b_dec.data += 50.0
    wide = standard(hook, 4, normalize_activations=normalisation)
    wide.load_state_dict({name: value.double() for name, value in sae.state_dict().items()})
    rounded = fp.dictionaries.adapt(Rounding(sae, wide), hook, d_in=16) if normalisation == "none" else None
    effects = fp.rank_features(small.model, sae, pairs_of(small), progress=False)
    if rounded is not None:
        exact = fp.rank_features(small.model, rounded, pairs_of(small), progress=False)
        assert [(n.kind, n.index) for n in effects.nodes] == [(n.kind, n.index) for n in exact.nodes]
        assert abs(effects.denoised - exact.denoised).max() < 1e-4
    everything = fp.Patch((fp.Node(hook, "all_features"), fp.Node(hook, "error")))
    with torch.no_grad(), fp.do(small.model, everything, source=small.clean[:1], base=small.corrupted[:1], saes=sae):
        together = small.model(small.corrupted[:1])
    whole = oracle.patched_activation_logits(small.model, hook, small.corrupted[:1], small.clean[:1], list(range(LAST)))
    torch.testing.assert_close(together, whole, rtol=0, atol=EXACT)


class Rounding:
    """Encodes in the SAE's own type, decodes in float64."""

    def __init__(self, sae: Any, wide: Any) -> None:
        self.sae, self.wide = sae, wide

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae.encode(x).double()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.wide.decode(features.double())


class Clipping(torch.nn.Module):
    """Decodes linearly up to a feature value far above those of random probes; a setting decides besides the weights."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.own, self.gain = Squared(16), gain

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 1e4 * self.own.encode(x.mul_(self.gain))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return 1e-4 * features.clamp_(max=1e4) @ self.own.out


def test_a_decoder_that_only_looks_linear_and_works_in_place(small: Small) -> None:
    class Copying(Clipping):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return super().encode(x.clone())

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return super().decode(features.clone())

    effects = check(small, fp.dictionaries.adapt(Copying(), SITES["resid_pre"][0], d_in=16))
    in_place = fp.rank_features(small.model, fp.dictionaries.adapt(Clipping(), SITES["resid_pre"][0], d_in=16), pairs_of(small))
    assert abs(in_place.denoised - effects.denoised).max() < EXACT


@pytest.mark.parametrize(("coder", "said", "taken"), [
    (torch.nn.Identity(), False, False), (torch.nn.Identity(), True, True), (Squared(16), True, False)
])  # fmt: skip
def test_linear_is_what_is_said_and_found(bridge: Small, coder: Any, said: bool, taken: bool) -> None:
    """Random probes can't show that a decoder is linear everywhere, so that it must be said; they can show that it is not."""
    if isinstance(coder, torch.nn.Identity):
        coder.encode = coder.decode = coder.forward
    (found,) = dictionaries(wrap(bridge.model), fp.dictionaries.adapt(coder, SITES["resid_pre"][0], d_in=16, linear=said))
    assert found.behaviour.linear == taken


def test_settings_beside_the_weights_are_part_of_the_digest(bridge: Small) -> None:
    digests = {
        fp.rank_features(
            bridge.model, fp.dictionaries.adapt(Clipping(gain), SITES["resid_pre"][0], d_in=16), pairs_of(bridge)
        ).metadata["saes"][SITES["resid_pre"][0]]
        for gain in (1.0, 1.0, 0.5)
    }
    assert len(digests) == 2


class Coupled:
    """Encodes with what is beside a position: `look` shifts the neighbour's activation in."""

    def __init__(self, look: int, dim: int) -> None:
        self.look, self.dim = look, dim

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        other = x.roll(self.look, self.dim)
        if self.dim == 1 and self.look > 0:
            other[:, : self.look] = 0
        return (x + 0.5 * other).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return 0.9 * features


@pytest.mark.parametrize("features", [16, 1])
@pytest.mark.parametrize(("look", "dim"), [(-1, 1), (1, 0)], ids=["later positions", "other prompts"])
def test_an_encoder_that_looks_where_it_must_not(bridge: Small, look: int, dim: int, features: int) -> None:
    class Few(Coupled):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return super().encode(x)[..., :features]

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(0.9 * features, (0, 16 - features.shape[2]))

    with pytest.raises(
        fp.FeatpatchError, match="Few.* encodes a row differently when other rows are in the batch: expected features"
    ):
        fp.rank_features(
            bridge.model, fp.dictionaries.adapt(Few(look, dim), "blocks.1.hook_resid_pre", d_in=16), pairs_of(bridge)
        )


def test_two_dictionaries_of_one_name(bridge: Small) -> None:
    one, other = (
        fp.dictionaries.adapt(Squared(16, seed), "blocks.1.hook_resid_pre", d_in=16, name="mine#1") for seed in (0, 1)
    )
    with pytest.raises(fp.FeatpatchError, match="two SAEs are named 'mine#2'|two SAEs are named 'mine#1'"):
        fp.rank_features(bridge.model, [one, other], pairs_of(bridge))


def test_an_encoder_that_looks_back(small: Small) -> None:
    check(small, fp.dictionaries.adapt(Coupled(1, 1), "blocks.1.hook_resid_pre", d_in=16))


def test_what_is_no_dictionary(bridge: Small) -> None:
    with pytest.raises(fp.FeatpatchError, match="int has no encode and no decode: expected an object"):
        fp.dictionaries.adapt(3, "blocks.1.hook_resid_pre", d_in=16)
    with pytest.raises(fp.FeatpatchError, match="Squared is a class: expected an instance of it"):
        fp.dictionaries.adapt(Squared, "blocks.1.hook_resid_pre", d_in=16)
    with pytest.raises(fp.FeatpatchError, match="StandardSAE is a sae-lens object: expected an object of another library"):
        fp.dictionaries.adapt(bridge.saes[0], "blocks.1.hook_resid_pre")
    for made in (fp.dictionaries.adapt(Squared(16), "blocks.1.hook_resid_pre", d_in=16), fp.load_demo().clt):
        with pytest.raises(fp.FeatpatchError, match="is a dictionary already: .* pass it without adapt"):
            fp.dictionaries.adapt(made, "blocks.1.hook_resid_pre", d_in=16)
    with pytest.raises(fp.FeatpatchError, match="d_in=0: expected names of hook points and a width"):
        fp.dictionaries.adapt(Squared(16), "blocks.1.hook_resid_pre", d_in=0)
    with pytest.raises(
        fp.FeatpatchError, match=r"Squared.encode fails on a tensor \[1, 1, 8\] .* expected an object that accepts .* width 8"
    ):
        fp.rank_features(bridge.model, fp.dictionaries.adapt(Squared(16), "blocks.1.hook_resid_pre", d_in=8), pairs_of(bridge))
    with pytest.raises(fp.FeatpatchError, match=r"Squared is not a sae-lens SAE: expected .* fp.dictionaries.adapt"):
        fp.rank_features(bridge.model, Squared(16), pairs_of(bridge))


class Returning:
    """Encodes to whatever it is told to."""

    def __init__(self, how: str) -> None:
        self.how = how

    def encode(self, x: torch.Tensor) -> Any:
        features = x.relu()
        return {
            "flat": features.flatten(0, 1), "list": features.tolist(), "one row": features[:1, :1], "bool": x > 0,
            "sparse": features.to_sparse(), "dense": features,
        }[self.how]  # fmt: skip

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return 0.9 * features


@pytest.mark.parametrize(("how", "found"), [("flat", r"\[1, 16\]"), ("list", "a list"), ("one row", r"\[1, 1, 16\]")])
def test_an_object_that_returns_something_else(bridge: Small, how: str, found: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=rf"Returning.encode returns {found} for a tensor .* one row per position"):
        fp.rank_features(
            bridge.model, fp.dictionaries.adapt(Returning(how), "blocks.1.hook_resid_pre", d_in=16), pairs_of(bridge)
        )


def test_features_that_are_sparse_or_boolean(bridge: Small) -> None:
    dense, sparse, boolean = (
        fp.rank_features(
            bridge.model, fp.dictionaries.adapt(Returning(how), "blocks.1.hook_resid_pre", d_in=16), pairs_of(bridge)
        )
        for how in ("dense", "sparse", "bool")
    )
    assert (dense.denoised == sparse.denoised).all()
    assert 0 < len(boolean) < len(dense)


def test_a_layer_of_a_cross_layer_transcoder_is_refused(bridge: Small) -> None:
    """What sae-lens loads as one layer has the decoders of all later layers summed; it says so in no other field."""
    sae = TRANSCODERS["transcoder"]("blocks.1.hook_resid_mid", 16, "blocks.1.hook_mlp_out", 16)
    sae.cfg.metadata.neuronpedia_id = "gemma-2-2b/0-clt-hp"
    with pytest.raises(fp.FeatpatchError, match="summed .* a single layer of a cross-layer transcoder"):
        fp.rank_features(bridge.model, sae, pairs_of(bridge))


def test_a_dictionary_of_one_head_is_refused(bridge: Small) -> None:
    sae = AUTOENCODERS["standard"]("blocks.1.attn.hook_z", 4)
    sae.cfg.metadata.hook_head_index = 2
    with pytest.raises(fp.FeatpatchError, match="reads only head 2"):
        fp.rank_features(bridge.model, sae, pairs_of(bridge))


@pytest.mark.parametrize(
    ("layer", "components", "message"), [(1, 17, "components=17: expected 1 to 16"), (1, 0, "components=0: expected")]
)
def test_baselines_that_cannot_be(bridge: Small, layer: int, components: int, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.dictionaries.pca(bridge.model, f"blocks.{layer}.hook_resid_pre", pairs_of(bridge), components=components)


if __name__ == "__main__":
    print(matrix())


class Plain:
    """Weights as plain attributes, in no module."""

    def __init__(self) -> None:
        inner = Squared(16)
        self.into, self.out = inner.into.detach(), inner.out.detach()

    encode, decode = Squared.encode, Squared.decode


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [*AUTOENCODERS, *TRANSCODERS, "module", "plain"])
def test_weights_that_are_not_finite(bridge: Small, kind: str, bad: float) -> None:
    """Each parameter of each kind in turn; a threshold that is NaN is never passed, and shows in no feature."""
    hook, width = SITES["resid_pre"]
    if kind in ("module", "plain"):
        coder = Squared(width) if kind == "module" else Plain()
        sae = fp.dictionaries.adapt(coder, hook, d_in=width)
        weights = {"into": coder.into, "out": coder.out}
    else:
        sae = TRANSCODERS[kind](*READS, hook, width) if kind in TRANSCODERS else AUTOENCODERS[kind](hook, width)
        weights = dict(sae.named_parameters())
    lens = wrap(bridge.model)
    (before,) = dictionaries(lens, sae)
    for name, weight in weights.items():
        with torch.no_grad():
            kept, weight.view(-1)[3:5] = weight.view(-1)[3:5].clone(), bad
        with pytest.raises(
            fp.FeatpatchError, match=rf"^SAE '.*': 2 of {weight.numel()} values of {name} are NaN or infinite: exp"
        ):
            dictionaries(lens, sae)
        with torch.no_grad():
            weight.view(-1)[3:5] = kept
    assert dictionaries(lens, sae)[0].codec.digest() == before.codec.digest()


def test_weights_are_looked_through_once(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they stay as they are; a mask may be infinite, and not NaN."""
    coder, seen, aminmax = Squared(16), [], torch.aminmax
    coder.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1), persistent=False)
    monkeypatch.setattr(torch, "aminmax", lambda tensor: seen.append(tensor.numel()) or aminmax(tensor))
    sae = fp.dictionaries.adapt(coder, SITES["resid_pre"][0], d_in=16)
    lens = wrap(bridge.model)
    for _ in range(3):
        dictionaries(lens, sae)
    assert sorted(seen) == [64, 16 * FEATURES, 16 * FEATURES]
    coder.into.data[0, 0] += 1
    coder.mask[0, 0] = torch.nan
    with pytest.raises(fp.FeatpatchError, match="1 of 64 values of mask are NaN: expected"):
        dictionaries(lens, sae)


SIZES = [(kind, name) for kind in ("standard", "TopK", "temporal", "JumpReLU skip transcoder") for name in ("d_in", "d_sae")]
SIZES += [("TopK", "k"), ("AbsTopK", "k"), ("temporal", "n_heads"), ("temporal", "kval_topk"), ("skip transcoder", "d_out")]


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize(("kind", "name"), SIZES)
def test_sizes_that_are_none(bridge: Small, tmp_path: Path, kind: str, name: str, size: int) -> None:
    """In the configuration of a folder, and of an object."""
    sae = TRANSCODERS[kind](*READS, *SITES["resid_pre"]) if kind in TRANSCODERS else AUTOENCODERS[kind](*SITES["resid_pre"])
    sae.save_model(tmp_path)
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: size}))
    message = rf"the SAE's configuration says {name}={size}: expected a whole number of 1 (or more|to d_sae={FEATURES})"
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path)
    setattr(sae.cfg, name, size)
    with pytest.raises(fp.FeatpatchError, match=message):
        dictionaries(wrap(bridge.model), sae)


def test_more_features_kept_than_there_are(bridge: Small) -> None:
    sae = AUTOENCODERS["TopK"](*SITES["resid_pre"])
    sae.cfg.k = FEATURES + 1
    with pytest.raises(fp.FeatpatchError, match=rf"says k={FEATURES + 1}: expected a whole number of 1 to d_sae={FEATURES}"):
        dictionaries(wrap(bridge.model), sae)
    coder = Squared(16)
    coder.into, coder.out = torch.nn.Parameter(coder.into[:, :0]), torch.nn.Parameter(coder.out[:0])
    with pytest.raises(fp.FeatpatchError, match="Squared encodes to 0 features and decodes to 16 values: expected at least 1"):
        dictionaries(wrap(bridge.model), fp.dictionaries.adapt(coder, SITES["resid_pre"][0], d_in=16))
