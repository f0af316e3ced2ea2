"""A dictionary that does not belong to the model is told by its explained variance, and the reason is named."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from small import VOCAB, WIDTH, Small, at, randomised, small_bridge, small_hooked

import featpatch as fp
from featpatch import selfcheck
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.sae.sae_lens import SaeCodec

COMPONENTS = 10
HOOKS = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out")


def prompts(seed: int = 0) -> fp.Pairs:
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = (torch.randint(0, VOCAB, (12, 9), generator=generator) for _ in range(2))
    return fp.Pairs.from_tokens(clean, corrupted, torch.full((12,), 3), torch.full((12,), 4))


def fitted(model: Any, hook: str, **metadata: Any) -> StandardSAE:
    """An SAE that has learned one hook of one model: its principal components, each as two features of opposite sign."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, VOCAB, (60, 9), generator=generator)
    x = torch.cat([oracle.activations(model, row[None])[hook][0] for row in tokens])
    _, _, directions = torch.linalg.svd(x - x.mean(0))
    kept = directions[:COMPONENTS]
    sae = StandardSAE(StandardSAEConfig(WIDTH, 2 * COMPONENTS, "float64", metadata=at(hook)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([kept, -kept]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(x.mean(0))
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


def uncentred(model: Any) -> Any:
    """The stream of every token has a mean over its coordinates, which LayerNorm takes out; norms have weights."""
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if ".ln_" in name:
                parameter += torch.linspace(-0.3, 0.5, WIDTH, dtype=torch.float64)
        model.original_model.transformer.wte.weight += torch.linspace(1, 5, VOCAB, dtype=torch.float64)[:, None]
    return model


@pytest.mark.parametrize("make", [small_bridge, small_hooked], ids=["bridge", "hooked"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_dictionary_that_fits(make: Any, hook: str) -> None:
    model = make().model
    sae = fitted(model, hook)
    check = fp.check(model, sae, prompts())
    (fit,) = check.fits
    assert check.ok
    assert fit.status == "fits"
    assert fit.identity < 1e-12
    assert fit.whole_site < 1e-12
    rows = [oracle.activations(model, torch.tensor([t]))[hook][0] for p in prompts() for t in (p.clean, p.corrupted)]
    x = torch.cat(rows)
    errors = (x - sae(x)).detach().square().sum()
    assert check.positions == len(x)
    np.testing.assert_allclose(fit.explained_variance, float(1 - errors / (x - x.mean(0)).square().sum()), rtol=1e-9)
    np.testing.assert_allclose(fit.l0, float((sae.encode(x) != 0).double().sum(1).mean()))


def test_each_prompt_is_encoded_once(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    (dictionary,) = dictionaries(wrap(bridge.model), fitted(bridge.model, HOOKS[0], explained_variance=0.9))
    encoded: list[int] = []
    encode = SaeCodec.encode
    monkeypatch.setattr(SaeCodec, "encode", lambda codec, x: encoded.append(len(x)) or encode(codec, x))
    assert fp.check(bridge.model, dictionary, prompts()).ok
    assert sum(encoded) == 2 * len(prompts())


@pytest.mark.parametrize("make", [small_bridge, small_hooked], ids=["bridge", "hooked"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_dictionary_of_another_layer_is_named(make: Any, hook: str) -> None:
    model = make().model
    sae = fitted(model, hook)
    sae.cfg.metadata.hook_name = hook.replace("1", "2")
    (fit,) = fp.check(model, sae, prompts()).fits
    assert fit.status == "does not fit"
    assert f"at {hook!r}" in fit.misfit


def test_a_dictionary_of_another_model_of_the_same_width() -> None:
    ours, theirs = small_bridge().model, small_hooked().model
    sae = fitted(theirs, HOOKS[0], model_name="theirs", explained_variance=0.97)
    (fit,) = fp.check(ours, sae, prompts()).fits
    assert "no other hook point fits" in fit.misfit
    assert "another model of this width" in fit.misfit
    assert any("names the model 'theirs'" in remark for remark in fit.remarks) == (not ours.cfg.model_name.startswith("/"))


def test_a_dictionary_of_processed_weights() -> None:
    model = uncentred(small_bridge().model)
    processed = uncentred(small_bridge().model)
    processed.enable_compatibility_mode(disable_warnings=True)
    oracle._activations.cache_clear()
    done = {"fold_ln": True, "center_writing_weights": True}
    of_processed = fitted(processed, HOOKS[0], model_name="small", model_from_pretrained_kwargs=done)
    of_raw = fitted(model, HOOKS[0], model_name="small")

    check = fp.check(processed, of_processed, prompts())
    assert check.ok
    assert check.weights == "fold_ln, center_writing_weights"
    assert not any("processed" in remark for remark in check.fits[0].remarks)
    check = fp.check(model, of_raw, prompts())
    assert check.ok
    assert check.weights == "unprocessed"

    (fit,) = fp.check(model, of_processed, prompts()).fits
    assert "on weights processed with center_writing_weights" in fit.misfit
    assert any("trained on weights processed with center_writing_weights," in remark for remark in fit.remarks)
    (fit,) = fp.check(processed, of_raw, prompts()).fits
    assert (
        "it was trained on weights processed with nothing, and these are processed with center_writing_weights" in fit.remarks
    )


def test_remarks(bridge: Small) -> None:
    sae = fitted(bridge.model, HOOKS[0], context_size=8, prepend_bos=True, explained_variance=1.0)
    (fit,) = fp.check(bridge.model, sae, prompts()).fits
    assert fit.status == "less than it claims"
    assert fit.remarks == (
        "it was trained on contexts of 8 tokens, and the longest prompt has 9",
        "it was trained with BOS at the start, which some prompts lack",
        "explains less than its configuration claims: check that it was restored as it was trained (JumpReLU threshold, k, "
        "normalisation), and try prompts that resemble its training data",
    )


def test_a_dictionary_that_claims_nothing_is_not_accused(bridge: Small) -> None:
    (fit,) = fp.check(bridge.model, fp.dictionaries.pca(bridge.model, HOOKS[0], prompts(), components=1), prompts()).fits
    assert fit.explained_variance < 0.5
    assert (fit.status, fit.misfit) == ("explains little", "")


def test_far_layers_are_tried_on_suspicion_only(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """An undertrained dictionary that explains most where it belongs is tried two layers on at its own hook point only."""
    read: set[str] = set()
    of = selfcheck.Runs.of
    monkeypatch.setattr(selfcheck.Runs, "of", lambda lens, hooks, *rest: read.update(hooks) or of(lens, hooks, *rest))
    first, last = "blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"
    (fit,) = fp.check(bridge.model, fitted(bridge.model, first), prompts()).fits
    assert 0.5 < fit.explained_variance < 0.95
    assert (fit.misfit, last in read, "blocks.2.hook_mlp_out" in read) == ("", True, False)
    moved = fitted(bridge.model, last)
    moved.cfg.metadata.hook_name = first
    (fit,) = fp.check(bridge.model, moved, prompts()).fits
    assert f"at {last!r}" in fit.misfit


@pytest.mark.parametrize(("claim", "expected"), [(0.93, 0.93), (93.0, 0.93), (0.2, 0.2), ("much", None), (-1.0, None)])
def test_claims(bridge: Small, claim: Any, expected: float | None) -> None:
    """Also those in per cent; one that is met is no misfit, however low."""
    sae = fitted(bridge.model, HOOKS[0], explained_variance=claim)
    (fit,) = fp.check(bridge.model, sae, prompts()).fits
    assert fit.expected == expected
    assert fit.status == "fits"


def test_a_place_that_explains_nothing_is_not_named(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SAE that was never trained is better in one layer than in another, and belongs to none."""
    monkeypatch.setattr(selfcheck, "BETTER", 0.9)
    explained = []
    for layer in range(3):
        sae = deepcopy(bridge.at(HOOKS[0]))
        sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_pre"
        (fit,) = fp.check(bridge.model, sae, prompts()).fits
        assert "no other hook point fits" in fit.misfit
        explained.append(fit.explained_variance)
    assert 1 - max(explained) < 0.9 * (1 - min(explained)), "so that one of them would be named"


def test_other_layers_that_overflow_are_left_out(bridge: Small) -> None:
    """As float16 SAEs do on the large activations of other layers."""
    pairs = prompts()
    runs = [oracle.activations(bridge.model, torch.tensor([t]))[HOOKS[0]][0] for p in pairs for t in (p.clean, p.corrupted)]
    own = torch.cat(runs)

    class Narrow:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            known = torch.cdist(x, own[None], compute_mode="donot_use_mm_for_euclid_dist").amin(-1, keepdim=True) < 1e-9
            return torch.where(known | torch.tensor(x.shape[1] != 9), x, torch.nan)

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return 0.5 * features

    (fit,) = fp.check(bridge.model, fp.dictionaries.adapt(Narrow(), HOOKS[0], d_in=WIDTH), pairs).fits
    assert fit.explained_variance < 0.95, "so that other layers are tried"


def test_prompts_that_can_not_be_run(bridge: Small) -> None:
    pair = prompts()[0]
    for changed, message in (
        ({"special": frozenset(range(9))}, "the prompts hold only special tokens"),
        ({"clean": (99, *pair.clean[1:])}, "token ids from .* to 99"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.check(bridge.model, bridge.saes[0], fp.Pairs((replace(pair, **changed),)))


def test_special_tokens_are_left_out(bridge: Small) -> None:
    """A BOS whose activation is enormous neither explains nor hides anything."""
    pairs = prompts()
    marked = fp.Pairs(tuple(fp.Pair(p.clean, p.corrupted, p.correct, p.wrong, special=frozenset({0})) for p in pairs))
    assert fp.check(bridge.model, bridge.saes[:1], marked).positions == 12 * 2 * 8


def test_dictionaries_that_explain_nothing_do_not_fit(bridge: Small) -> None:
    """Below 0 none fits, also if its configuration says nothing; over several hook points none below one half."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    weights = torch.randn(2, WIDTH, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    crosscoder = fp.dictionaries.Crosscoder(weights, weights.transpose(1, 2), weights[0, 0], weights[:, :, 0], hook=hooks)
    single = fp.dictionaries.adapt(Doubled(), hooks[0], d_in=WIDTH)
    for bad in (crosscoder, single):
        check = fp.check(bridge.model, bad, prompts())
        assert check.fits[0].explained_variance < 0
        assert not check.ok
        assert check.fits[0].status == "does not fit"
        assert check.fits[0].misfit.startswith("no other hook point fits")


@pytest.mark.both
@torch.no_grad()
def test_a_crosscoder_that_is_moved_to_other_layers(small: Small) -> None:
    """The principal components of two hook points fit there, and one layer higher the right ones are named."""
    trained, moved = ([f"blocks.{layer}.hook_resid_pre" for layer in layers] for layers in ((0, 1), (1, 2)))
    runs = [oracle.activations(small.model, torch.tensor([t])) for p in prompts() for t in (p.clean, p.corrupted)]
    x = torch.cat([torch.cat([run[hook][0] for hook in trained], -1) for run in runs])
    v = torch.linalg.svd(x, full_matrices=False).Vh[: WIDTH + 2]
    weights = torch.stack([torch.cat([v, -v])[:, part] for part in (slice(WIDTH), slice(WIDTH, None))], 1)  # [feature, hook, d]
    given = weights.permute(1, 2, 0), weights.transpose(0, 1), torch.zeros(len(weights)).to(x), torch.zeros(2, WIDTH).to(x)
    right, wrong = (fp.check(small.model, fp.dictionaries.Crosscoder(*given, hook=at), prompts()) for at in (trained, moved))
    squares = float((x - x @ v.T @ v).square().sum() / (x - x.mean(0)).square().sum())
    assert right.ok
    assert right.fits[0].explained_variance == pytest.approx(1 - squares, abs=0.1)  # the check leaves out special tokens
    assert right.fits[0].explained_variance > wrong.fits[0].explained_variance
    assert wrong.fits[0].misfit.endswith("or use this SAE where it fits")
    assert ", ".join(map(repr, trained)) in wrong.fits[0].misfit


class Doubled:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return 3 * features


@torch.no_grad()
def test_a_change_that_leaves_out_the_error_is_called_a_bug(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    change, sae = Dictionary.change, fitted(bridge.model, HOOKS[0])
    monkeypatch.setattr(Dictionary, "change", lambda own, base, source, **nodes: change(own, base, source, features=True))
    (fit,) = fp.check(bridge.model, sae, prompts()).fits
    x = [oracle.activations(bridge.model, torch.tensor([t]))[HOOKS[0]][0] for p in prompts() for t in (p.clean, p.corrupted)]
    errors = [each - sae(each) for each in x]
    missing = max(float((clean - corrupted).abs().max()) for clean, corrupted in zip(errors[::2], errors[1::2], strict=True))
    np.testing.assert_allclose(fit.whole_site, missing / float(torch.cat(x).abs().max()))
    assert "all features and the error do not sum to the whole activation" in fit.misfit


def test_the_table(bridge: Small, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from featpatch.reporting.terminal import checked

    sae = deepcopy(fitted(bridge.model, HOOKS[0]))
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    Console(width=150).print(checked(fp.check(bridge.model, sae, prompts())))
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "at 'blocks.1.hook_resid_pre'" in " ".join(printed.split())


def test_less_than_it_claims_is_not_ok() -> None:
    """A JumpReLU SAE that was rebuilt as ReLU: features below their thresholds are let through."""
    model = small_bridge().model
    sae = fitted(model, HOOKS[0])
    right = fp.check(model, sae, prompts()).fits[0].explained_variance
    sae.cfg.metadata.explained_variance = right
    assert fp.check(model, sae, prompts()).ok
    sae.b_enc.data += 0.8 * float(
        sae.encode(oracle.activations(model, torch.tensor([prompts()[0].clean]))[HOOKS[0]]).std().detach()
    )
    check = fp.check(model, sae, prompts())
    (fit,) = check.fits
    assert 0.5 < fit.explained_variance < right - 0.05, "else it would be a misfit, or as good as it claims"
    assert (fit.status, fit.misfit, check.ok) == ("less than it claims", "", False)
    assert f"less than it claims, explains {fit.explained_variance:.2f} of a claimed {right:.2f}" in repr(check)


GEMMA_SCOPE_2 = {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output"}
NORMED, READ = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"


def read_by_mlp(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """By torch alone."""
    found: list[torch.Tensor] = []
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return found[0]


def fitted_to_mlp(model: Any, name: str, x: torch.Tensor, y: torch.Tensor, **metadata: Any) -> Transcoder:
    """Random features of rows `x`, decoded to rows `y` by least squares."""
    config = TranscoderConfig(
        WIDTH, 400, "float64", d_out=WIDTH, apply_b_dec_to_input=False, metadata=at(name, "blocks.1.hook_mlp_out")
    )
    transcoder = randomised(Transcoder(config), 3)
    with torch.no_grad():
        features = torch.cat([transcoder.encode(x), torch.ones(len(x), 1, dtype=x.dtype)], 1)
        solution = torch.linalg.lstsq(features, y).solution
        transcoder.W_dec.copy_(solution[:-1])
        transcoder.b_dec.copy_(solution[-1])
    for key, value in metadata.items():
        setattr(transcoder.cfg.metadata, key, value)
    return transcoder


@pytest.mark.extended
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", [pytest.param("gemma2", marks=pytest.mark.extended), "gemma3"])
def test_transcoders_of_gemma_scope(name: str) -> None:
    """Gemma Scope 2 reads the norm's output, under the name of the stream in front of it; Gemma Scope 1 reads in front of its weight."""
    model, pairs = BRIDGES[name](), prompts()[:4]
    oracle._activations.cache_clear()
    tokens = torch.randint(1, VOCAB, (150, 9), generator=torch.Generator().manual_seed(9))
    runs = [oracle.activations(model, row[None]) for row in tokens]
    x, y, normed = (
        torch.cat(rows)
        for rows in (
            [read_by_mlp(model, row[None])[0] for row in tokens],
            [run["blocks.1.hook_mlp_out"][0] for run in runs],
            [run[NORMED][0] for run in runs],
        )
    )
    stream = torch.cat([run["blocks.1.hook_resid_mid"][0] for run in runs])
    torch.testing.assert_close(normed, stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-9, atol=1e-9)

    second = fitted_to_mlp(model, "blocks.1.hook_mlp_in", x, y, **GEMMA_SCOPE_2)
    (fit,) = fp.check(model, second, pairs).fits
    assert (fit.dictionary, fit.misfit) == (f"{READ} -> blocks.1.hook_mlp_out", "")
    assert fit.explained_variance > 0.5
    effects = fp.rank_features(model, second, pairs[:1], positions=[5], directions=["denoising"], progress=False)
    named = deepcopy(second)
    named.cfg.metadata.hook_name = READ
    base, source = (torch.tensor([run]) for run in (pairs[0].corrupted, pairs[0].clean))
    for node in effects.top(5, kind="feature").nodes:
        logits = oracle.patched_logits(model, named, base, source, features=[node.index], positions=[5], error=False)
        entry = int((effects.row == effects.nodes.index(node)).argmax())
        assert abs(effects.denoised[entry] - oracle.logit_diff(logits, 3, 4)) < 1e-9, node

    with pytest.raises(fp.FeatpatchError, match=rf"the SAE names the hook '{NORMED}', .* set .*hook_name to '{READ}'"):
        fp.check(model, fitted_to_mlp(model, NORMED, normed, y), pairs)
    first = fitted_to_mlp(model, NORMED, normed, y, model_name="gemma-2-2b")
    (fit,) = fp.check(model, first, pairs).fits
    assert (fit.dictionary, fit.misfit) == (f"{NORMED} -> blocks.1.hook_mlp_out", "")
    assert fit.explained_variance > 0.5

    for transcoder, wrong, right in ((first, READ, NORMED), (second, NORMED, READ)):
        misnamed = deepcopy(transcoder)
        misnamed.cfg.metadata.hook_name = wrong
        check = fp.check(model, misnamed, pairs)
        assert not check.ok
        assert f"at '{right}' -> 'blocks.1.hook_mlp_out'" in check.fits[0].misfit
