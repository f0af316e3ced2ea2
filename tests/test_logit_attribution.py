"""Direct logit attribution, against autograd with a frozen norm, TransformerLens' own, and exact direct paths."""

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HEADS, HOOKED, LAYERS, LLAMA, OTHERS, VOCAB, quantised
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from small import Small
from test_architectures import dictionaries, folded, pairs
from transformers import LlamaConfig, LlamaForCausalLM

import featpatch as fp
from featpatch.attribution.logits import LogitAttribution, Term

EXACT = 1e-10
EVERY = {"bridge": BRIDGES | OTHERS, "hooked": HOOKED}
MODELS = [(kind, name, False) for kind, models in EVERY.items() for name in models]
MODELS += [("bridge", "gpt2", True), ("bridge", "llama", True), ("bridge", "gemma2", True), ("hooked", "gpt2", True)]
MODELS += [("hooked", "gemma2", True)]


def attributed(model: Any, prompts: fp.Pairs, **options: Any) -> LogitAttribution:
    oracle._activations.cache_clear()
    return fp.logit_attribution(model, prompts, **{"progress": False, **options})


def summed(found: LogitAttribution, rows: list[bool]) -> np.ndarray:
    return found.values[rows].sum(0)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name", "fold"), MODELS)
def test_components_sum_to_the_logit(kind: str, name: str, fold: bool) -> None:
    """A law, for components and with the terms of each SAE instead of what it stands for; soft-caps are undone by hand."""
    model = folded(kind, name) if fold else EVERY[kind][name]()
    drawn, cap = pairs(int(model.unembed.W_U.shape[-1])), getattr(model.cfg, "output_logits_soft_cap", None) or 0
    for metric in ("logit_diff", "logit"):
        found = attributed(model, drawn, saes=dictionaries(model) if metric == "logit" else None, metric=metric)
        expected = []
        for pair in drawn:
            with torch.no_grad():
                logits = model(torch.tensor([pair.clean]))[0, pair.answer_position]
            logits = cap * torch.atanh(logits / cap) if cap > 0 else logits
            wrong = logits[list(pair.wrong)].mean() if metric == "logit_diff" else 0
            expected.append(float(logits[list(pair.correct)].mean() - wrong))
        assert abs(found.total - expected).max() < EXACT
        assert abs(summed(found, [not term.sae for term in found.terms]) - expected).max() < EXACT
        assert abs(found.residual()).max() < EXACT
        assert sum(term.kind == "head" for term in found.terms) == LAYERS * HEADS
        for sae, replaced in found.replaces.items():
            assert replaced
            rows = [term.sae == sae or (not term.sae and term not in replaced) for term in found.terms]
            assert abs(summed(found, rows) - expected).max() < EXACT, sae
            own, theirs = ([term.sae == sae for term in found.terms], [term in replaced for term in found.terms])
            assert abs(summed(found, own) - summed(found, theirs)).max() < EXACT, sae
            assert abs(summed(found, own)).max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_as_transformer_lens_attributes(name: str) -> None:
    """On folded weights; elsewhere `cache.logit_attrs` leaves out the weight of the final norm."""
    model = folded("hooked", name)
    drawn = fp.Pairs(pairs(VOCAB).pairs[:1])
    found = attributed(model, drawn)
    model.cfg.use_attn_result = True
    _, cache = model.run_with_cache(torch.tensor([drawn[0].clean]))
    stack, labels = cache.stack_head_results(pos_slice=-1, return_labels=True)
    heads = _logit_diff(cache, stack)
    for label, value in zip(labels, heads, strict=True):
        layer, head = map(int, label[1:].split("H"))
        assert abs(_value(found, Term("head", layer, head)) - value) < EXACT
    stack, labels = cache.decompose_resid(mode="mlp", pos_slice=-1, return_labels=True)
    for label, value in zip(labels, _logit_diff(cache, stack), strict=True):
        term = {"embed": Term("embedding"), "pos_embed": Term("positions")}.get(label) or Term("mlp", int(label.split("_")[0]))
        assert abs(_value(found, term) - value) < EXACT


def _logit_diff(cache: Any, stack: torch.Tensor) -> np.ndarray:
    values = [cache.logit_attrs(stack, tokens=token, pos_slice=-1)[:, 0] for token in (1, 2, VOCAB - 1)]
    result: np.ndarray = ((values[0] + values[1]) / 2 - values[2]).detach().numpy()
    return result


def _value(found: LogitAttribution, term: Term) -> float:
    return float(found.values[found.terms.index(term), 0])


def by_autograd(small: Small, row: int, run: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient of the logit difference for the final residual stream with the norm's scale detached, and the activations."""
    model, cache = small.model, oracle.activations(small.model, run[row : row + 1])
    x = cache[f"blocks.{LAYERS - 1}.hook_resid_post"][0, -1].clone().requires_grad_()
    centred = x - x.mean()
    y = centred / (centred.square().mean() + 1e-5).sqrt().detach()
    norm = getattr(model.ln_final, "original_component", None)
    weight, bias = (model.ln_final.w, model.ln_final.b) if norm is None else (norm.weight, norm.bias)
    logits = (y * weight + bias) @ model.unembed.W_U
    (gradient,) = torch.autograd.grad(logits[small.correct[row]] - logits[small.wrong[row]], x)
    return gradient, cache


@pytest.mark.parametrize("run", ["clean", "corrupted"])
def test_features_and_errors_by_autograd(small: Small, run: str) -> None:
    """Features, errors and biases of SAEs on the residual stream, at what is added to it, and at z, where W_O comes after."""
    oracle._activations.cache_clear()
    saes = small.saes
    prompts = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    found = attributed(small.model, prompts, saes=saes, run=run)
    names = list(found.replaces)
    with torch.no_grad():
        checked = 0
        for row in range(len(prompts)):
            with torch.enable_grad():
                gradient, cache = by_autograd(small, row, getattr(small, run))
            for name, sae in zip(names, saes, strict=True):
                reads, writes = sae.cfg.metadata.hook_name, getattr(sae.cfg.metadata, "hook_name_out", None)
                x, y = (cache[hook][:, -1:] for hook in (reads, writes or reads))
                along = gradient
                if reads.endswith("hook_z"):
                    along = small.model.blocks[1].attn.W_O.flatten(0, 1) @ gradient
                features = sae.encode(x)[0, 0]
                decoded = sae.decode(sae.encode(x)).flatten()
                terms = {term: value for term, value in zip(found.terms, found.values[:, row], strict=True) if term.sae == name}
                values = features * (sae.W_dec @ along)
                for term, value in terms.items():
                    if term.kind == "feature":
                        assert abs(value - float(values[term.index])) < EXACT
                        checked += 1
                given = {term.index for term in terms}
                assert set(features.nonzero()[:, 0].tolist()) <= given
                (error,) = (value for term, value in terms.items() if term.kind == "error")
                assert abs(error - float((y.flatten() - decoded) @ along)) < EXACT
                (bias,) = (value for term, value in terms.items() if term.kind == "decoder bias")
                assert abs(bias - float(sae.b_dec @ along)) < EXACT
        assert checked > 100


@pytest.mark.parametrize(("name", "exact"), [("no norms", True), ("gpt2", False)])
def test_beside_exact_paths_into_the_logits(name: str, exact: bool) -> None:
    """Without norms, a path's change is the difference of the attributions in both runs; a norm rescales, and they differ."""
    model, prompts = HOOKED[name](), pairs(VOCAB)[:2]
    senders = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", head, 8) for layer in range(LAYERS) for head in range(HEADS)]
    prompts = fp.Pairs(tuple(fp.Pair(p.clean, p.corrupted, p.correct, p.wrong, answer_position=8) for p in prompts))
    runs = {run: attributed(model, prompts, run=run) for run in ("clean", "corrupted")}
    paths = fp.rank_paths(model, prompts, senders=senders, receivers=["logits"], route="direct", progress=False)
    gap = float((runs["clean"].total - runs["corrupted"].total).mean())
    off = []
    for node, recovery in zip(paths.nodes, paths.pooled("recovery"), strict=True):
        sender: Any = node.sender  # type: ignore[attr-defined]
        row = runs["clean"].terms.index(Term("head", int(sender.site.split(".")[1]), sender.index))
        off.append(abs(float((runs["clean"].values[row] - runs["corrupted"].values[row]).mean()) - recovery * gap))
    assert len(off) == LAYERS * HEADS
    assert (max(off) < EXACT) == exact
    assert exact or max(off) > 1e-3


def test_other_prompts_change_nothing() -> None:
    model, drawn = BRIDGES["gpt2"](), pairs(VOCAB)
    together = attributed(model, drawn, saes=dictionaries(model)[0])
    for index in range(len(drawn)):
        alone = attributed(model, drawn[index : index + 1], saes=dictionaries(model)[0])
        at = [together.terms.index(term) for term in alone.terms]
        assert abs(together.values[at, index] - alone.values[:, 0]).max() < EXACT
        assert not together.values[[row for row in range(len(together.terms)) if row not in at], index].any()


def test_the_table() -> None:
    """The largest first, in logits, with intervals over pairs; a single prompt has none."""
    model, drawn = HOOKED["gpt2"](), pairs(VOCAB)
    found = attributed(model, drawn)
    frame = found.to_pandas()
    assert list(frame.columns) == ["kind", "layer", "index", "sae", "logits", "logits_low", "logits_high"]
    assert abs(frame["logits"].sum() - found.total.mean()) < EXACT
    assert frame["logits"].abs().is_monotonic_decreasing
    means = {term: float(of_term.mean()) for term, of_term in zip(found.terms, found.values, strict=True)}
    heads = found.to_pandas(3, kind="head")
    largest = sorted((term for term in means if term.kind == "head"), key=lambda term: -abs(means[term]))[:3]
    assert [(row.layer, row.index) for row in heads[["layer", "index"]].itertuples(index=False)] == [
        (term.layer, term.index) for term in largest
    ]
    constant = frame[frame["kind"] == "unembedding bias"].iloc[0]  # the answers are the same in each pair
    assert constant["logits"] == pytest.approx(constant["logits_low"]) == constant["logits_high"]
    row = frame[frame["kind"] == "embedding"].iloc[0]
    assert row["logits_low"] < row["logits"] < row["logits_high"]
    assert attributed(model, drawn[:1]).to_pandas()["logits_low"].isna().all()
    assert repr(found).startswith(f"logit_diff {found.total.mean():.3f} in the clean run of 3 prompts")
    assert found._repr_html_().count("<tr") == 11
    assert str(largest[0]) == f"layer {largest[0].layer} head {largest[0].index}"


def test_the_heat_map() -> None:
    found = attributed(HOOKED["gpt2"](), pairs(VOCAB))
    (trace,) = found.plot(title="where the answer comes from").data
    assert found.plot().layout.title.text == "direct contributions to logit_diff"
    assert list(trace.x) == ["head 0", "head 1", "head 2", "head 3", "attention bias", "mlp"]
    assert list(trace.y) == [0, 1, 2]
    assert trace.zmid == 0
    assert trace.z[1][2] == found.values[found.terms.index(Term("head", 1, 2))].mean()
    assert trace.z[2][5] == found.values[found.terms.index(Term("mlp", 2))].mean()


def test_attention_of_quantised_weights_is_one_term() -> None:
    model = quantised(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    sae = next(sae for sae in dictionaries(model) if sae.cfg.metadata.hook_name.endswith("hook_z"))
    with pytest.raises(fp.FeatpatchError, match=r"hook_z', and W_O of that layer can't be read"):
        attributed(model, pairs(VOCAB), saes=sae)
    found = attributed(model, pairs(VOCAB))
    assert {term.kind for term in found.terms if term.layer is not None} == {"attention", "mlp"}
    assert abs(found.residual()).max() < 1e-5


def test_a_stream_with_further_steps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example logits that the model scales."""
    model = HOOKED["gpt2"]()
    forward = model.unembed.forward
    monkeypatch.setattr(model.unembed, "forward", lambda x: 2 * forward(x))
    with pytest.raises(fp.FeatpatchError, match="the contributions and the logit differ by .*expected a residual stream"):
        attributed(model, pairs(VOCAB))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models(dtype: torch.dtype) -> None:
    model = BRIDGES["llama"]().to(dtype)
    model.cfg.dtype = dtype
    found = attributed(model, pairs(VOCAB))
    exact = attributed(BRIDGES["llama"](), pairs(VOCAB))
    assert abs(found.values - exact.values).max() < 40 * torch.finfo(dtype).eps * abs(exact.values).max()


def nowhere(model: Any) -> Any:
    config = StandardSAEConfig(24, 6, "float64", metadata=SAEMetadata(hook_name="blocks.1.mlp.hook_post"))
    return StandardSAE(config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "prob"}, "metric='prob': expected one of logit_diff, logit"),
        ({"run": "both"}, "run='both': expected one of clean, corrupted"),
        ({"saes": 1}, "int is not a sae-lens SAE"),
        ({"pairs": fp.Pairs((fp.Pair((1, 2), (1, 3), (4,), ()),))}, "pair 0 has no wrong answer .*use metric='logit'"),
        (
            {"pairs": fp.Pairs((fp.Pair((1, 2), (1, 3), (), (), correct_sequences=((4, 5),)),)), "metric": "logit"},
            "pair 0 has no correct answer of a single token",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], match: str) -> None:
    prompts = options.pop("pairs", pairs(VOCAB))
    with pytest.raises(fp.FeatpatchError, match=match):
        attributed(HOOKED["gpt2"](), prompts, **options)


def test_what_can_not_be_asked_of_an_attribution() -> None:
    model = HOOKED["gpt2"]()
    found = attributed(model, pairs(VOCAB))
    with pytest.raises(fp.FeatpatchError, match="kind='feature': expected one of embedding, positions, head"):
        found.to_pandas(kind="feature")
    with pytest.raises(fp.FeatpatchError, match="n=-1"):
        found.to_pandas(-1)
    with pytest.raises(fp.FeatpatchError, match="sae='x': expected one of"):
        found.residual("x")
    with pytest.raises(fp.FeatpatchError, match=r"mlp.hook_post': expected a hook point of the residual stream"):
        attributed(model, pairs(VOCAB), saes=nowhere(model))
    with pytest.raises(fp.FeatpatchError, match="has a decoder that is not linear"):
        attributed(model, pairs(VOCAB), saes=fp.dictionaries.adapt(Squaring(), "blocks.1.hook_resid_pre", d_in=16))


class Squaring:
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features**2
