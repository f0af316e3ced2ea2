"""Active features and attention patterns against hooked runs, and what notebooks show of results, with text of users escaped."""

import html
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import featpatch as fp
from featpatch.descriptions import Description, Descriptions, Example

HOOK = "blocks.3.hook_resid_post"
TEXT = "When Mary and John went to the store , John gave a drink to"
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def demo() -> Any:
    return fp.load_demo(progress=False)


@pytest.fixture(scope="module")
def sae(demo: Any) -> Any:
    (found,) = [sae for sae in demo.saes if sae.cfg.metadata.hook_name == HOOK]
    return found


@pytest.fixture(scope="module")
def pairs(demo: Any) -> fp.Pairs:
    found: fp.Pairs = demo.pairs("ioi", n=3)
    return found


@pytest.fixture(scope="module")
def effects(demo: Any, sae: Any, pairs: fp.Pairs) -> fp.Effects:
    return fp.rank_features(demo.model, sae, pairs, positions=["S2", "end"], progress=False)


@pytest.fixture(scope="module")
def components(demo: Any, pairs: fp.Pairs) -> fp.Effects:
    return fp.rank_components(demo.model, pairs, sites="z", positions=["end"], progress=False)


def encoded(demo: Any, sae: Any, tokens: Any) -> torch.Tensor:
    """Features `[pos, d_sae]` by sae-lens on a hooked run."""
    with torch.no_grad():
        _, cache = demo.model.run_with_cache(torch.tensor(tokens)[None], names_filter=HOOK)
        features: torch.Tensor = sae.encode(cache[HOOK])[0]
    return features


def test_active_features_of_a_text(demo: Any, sae: Any) -> None:
    """The strongest of each token but BOS, and the words that their decoder directions promote."""
    found = fp.active_features(demo.model, sae, TEXT, per_token=2)
    tokens = demo.model.to_tokens(TEXT)[0].tolist()
    features, decode = encoded(demo, sae, tokens), demo.model.tokenizer.decode
    assert found.columns.tolist() == ["position", "token", "sae", "feature", "value", "promotes"]
    expected = [
        (at, index, value)
        for at, row in enumerate(features)
        if at
        for value, index in zip(*row.topk(2), strict=True)
        if value > 0
    ]
    assert list(zip(found["position"], found["feature"], strict=True)) == [(at, int(index)) for at, index, _ in expected]
    assert found["value"].tolist() == pytest.approx([float(value) for *_, value in expected], rel=1e-4)
    assert found["token"].tolist() == [decode([tokens[at]]) for at, *_ in expected]
    for _, row in found.iloc[:5].iterrows():
        logits = sae.W_dec[row["feature"]] @ demo.model.W_U
        assert row["promotes"] == " ".join(repr(decode([token])) for token in logits.topk(3).indices.tolist())


def test_active_features_with_effects(demo: Any, sae: Any, pairs: fp.Pairs, effects: fp.Effects) -> None:
    """Of a pair: its value in both prompts; effects at the tokens of a label, exactly 0 if unchanged, empty elsewhere."""
    pair = pairs[0]
    found = fp.active_features(demo.model, [sae, *demo.saes[:1]], pair, effects=effects)
    own = found[found["sae"] == HOOK]
    features = encoded(demo, sae, pair.corrupted)
    assert own["corrupted"].tolist() == pytest.approx(features[own["position"], own["feature"]].tolist(), rel=1e-4, abs=1e-4)
    rows = {
        (node.index, pair.labels[str(node.position)]): row for row, node in enumerate(effects.nodes) if node.kind == "feature"
    }
    labelled = own[own["position"].isin([pair.labels["S2"], pair.labels["end"]])]
    for effect in ("recovery", "degradation"):
        values = effects.pooled(effect)  # type: ignore[arg-type]
        expected = [
            values[rows[key]] if key in rows else 0.0 for key in zip(labelled["feature"], labelled["position"], strict=True)
        ]
        assert labelled[effect].tolist() == pytest.approx(expected)
        assert own.drop(labelled.index)[effect].isna().all()
        assert found[found["sae"] != HOOK][effect].isna().all()
    first = fp.rank_features(demo.model, demo.saes[0], pairs, positions=["S2", "end"], progress=False)
    early = fp.active_features(demo.model, demo.saes[0], pair, effects=first)
    assert early[early["position"] == pair.labels["end"]]["recovery"].tolist() == [0.0] * 5
    assert labelled["recovery"].abs().max() > 0.1


def test_attention_patterns(demo: Any, pairs: fp.Pairs, components: fp.Effects) -> None:
    hook, pair = "blocks.1.attn.hook_pattern", pairs[0]
    figure = fp.attention_pattern(demo.model, pair, 1, 3, effects=components)
    for trace, tokens in zip(figure.data, (pair.clean, pair.corrupted), strict=True):
        _, cache = demo.model.run_with_cache(torch.tensor(tokens)[None], names_filter=hook)
        np.testing.assert_allclose(trace.z, cache[hook][0, 3].detach(), atol=1e-5)
        assert (
            list(trace.x)
            == list(trace.y)
            == [
                f"{at} {demo.model.tokenizer.decode([t])!r}".replace("<", "&lt;").replace(">", "&gt;")
                for at, t in enumerate(tokens)
            ]
        )
    value = components.where(site="blocks.1.attn.hook_z", kind="head", index=3).pooled("recovery")[0]
    assert figure.layout.title.text.startswith(f"head 1.3<br>attn.hook_z @ end: recovery {value:.2f}, degradation")
    (alone,) = fp.attention_pattern(demo.model, TEXT, 1, 3, title=EVIL).data
    np.testing.assert_allclose(np.asarray(alone.z).sum(1), 1, atol=1e-5)
    unknown = fp.attention_pattern(demo.model, TEXT, 1, 3, effects=components.where(index=0))
    assert unknown.layout.title.text == "head 1.3<br>the table of effects has no row of this head"


def test_prompts_as_token_ids(demo: Any, sae: Any) -> None:
    """Those of `model.to_tokens`, one row of them, a list and a NumPy array are the text."""
    tokens = demo.model.to_tokens(TEXT)
    for prompt in (tokens, tokens[0], tokens[0].tolist(), tokens.numpy()):
        pd.testing.assert_frame_equal(fp.active_features(demo.model, sae, prompt), fp.active_features(demo.model, sae, TEXT))
        assert fp.attention_pattern(demo.model, prompt, 1, 3) == fp.attention_pattern(demo.model, TEXT, 1, 3)
    graphs = [fp.attribution_graph(demo.model, demo.transcoders, prompt, size=5, progress=False) for prompt in (TEXT, tokens)]
    assert graphs[0].prompt == graphs[1].prompt
    with pytest.raises(fp.FeatpatchError, match="expected a text, token ids of one prompt, or a pair"):
        fp.active_features(demo.model, sae, torch.cat([tokens, tokens]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 4}, "layer=4: expected 0 to 3, a layer of the model"),
        ({"head": 8}, "head=8: expected 0 to 7, a head of layer 1"),
        ({"head": -1}, "head=-1: expected an integer, 0 or more"),
        ({"prompt": ""}, "prompt='', and it is empty: expected a text"),
        ({"prompt": "Mary " * 2000}, "tokens: expected at most"),
    ],
)
def test_errors_of_attention_patterns(demo: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError) as error:
        fp.attention_pattern(demo.model, **{"prompt": TEXT, "layer": 1, "head": 3, **options})
    assert message in str(error.value)


def test_effects_of_rows_that_were_taken(demo: Any, sae: Any, pairs: fp.Pairs, effects: fp.Effects) -> None:
    """A part of a table shows what is known of the other features; of sets and named nodes, others are unknown."""
    whole = fp.active_features(demo.model, sae, pairs[0], effects=effects, per_token=3)
    for part in (effects.top(2), effects.where(kind="error")):
        pd.testing.assert_frame_equal(fp.active_features(demo.model, sae, pairs[0], effects=part, per_token=3), whole)
    chosen = fp.select_features(demo.model, sae, pairs, most=2, position="S2", progress=False).effects
    assert fp.active_features(demo.model, sae, pairs[0], effects=chosen)["recovery"].isna().all()


def test_a_long_text_is_refused(demo: Any, sae: Any) -> None:
    for call in (
        lambda text: fp.active_features(demo.model, sae, text),
        lambda text: fp.attribution_graph(demo.model, demo.transcoders, text),
    ):
        with pytest.raises(
            fp.FeatpatchError, match="the prompt has 501 tokens: expected at most 64, the model's context; shorten"
        ):
            call("Mary " * 500)


def test_a_prompt_without_active_features(demo: Any, sae: Any, pairs: fp.Pairs, effects: fp.Effects) -> None:
    known = fp.active_features(demo.model, sae, pairs[0], effects=effects)
    hidden = replace(pairs[0], special=frozenset(range(len(pairs[0]))))
    empty = fp.active_features(demo.model, sae, hidden, effects=effects)
    assert len(empty) == 0
    assert empty.columns.tolist() == known.columns.tolist()


def test_errors_of_active_features(demo: Any, sae: Any, effects: fp.Effects) -> None:
    with pytest.raises(
        fp.FeatpatchError, match="the effects are at the label '(S2|end)', and the prompt is a text: expected a pair"
    ):
        fp.active_features(demo.model, sae, TEXT, effects=effects)
    other = replace(effects, metadata={**effects.metadata, "saes": {HOOK: "0"}})
    with pytest.raises(fp.FeatpatchError, match="differs from that of the effects: expected .* with the same weights"):
        fp.active_features(demo.model, sae, TEXT, effects=other)
    with pytest.raises(fp.FeatpatchError, match="per_token=0: expected an integer, 1 or more"):
        fp.active_features(demo.model, sae, TEXT, per_token=0)


@pytest.mark.filterwarnings("ignore:token index")
def test_effects_at_positions_from_the_end(demo: Any, sae: Any, pairs: fp.Pairs) -> None:
    """Shown at the last token of a text and of a pair; a position that a prompt lacks has no effect there."""
    effects = fp.rank_features(demo.model, sae, pairs[:1], positions=[-1], progress=False)
    for prompt in (TEXT, pairs[0]):
        table = fp.active_features(demo.model, sae, prompt, effects=effects)
        known = table[table["recovery"].notna()]
        assert set(known["position"]) == {table["position"].max()}
    far = fp.rank_features(demo.model, sae, pairs[:1], positions=[-len(pairs[0]) + 1], progress=False)
    short = fp.Pair(pairs[0].clean[:4], pairs[0].corrupted[:4], pairs[0].correct, pairs[0].wrong)
    assert not fp.active_features(demo.model, sae, short, effects=far)["recovery"].notna().any()


@pytest.mark.parametrize("tokens", [(10**6, 2), (5,) * 2000])
def test_pairs_of_another_model_are_refused(demo: Any, sae: Any, tokens: tuple[int, ...]) -> None:
    pair = fp.Pair(tokens, (3, *tokens[1:]), (4,), (5,))
    for view in (lambda: fp.active_features(demo.model, sae, pair), lambda: fp.attention_pattern(demo.model, pair, 0, 0)):
        with (
            pytest.raises(fp.FeatpatchError, match=r"pair 0 has (token ids from 2 to 1000000|2,000 tokens): expected"),
            pytest.warns(UserWarning, match="lack"),
        ):
            view()


def test_examples_are_shaded_by_their_activations(demo: Any, sae: Any, effects: fp.Effects) -> None:
    """Text and HTML hold the values of sae-lens."""
    described = fp.max_activating(demo.model, sae, effects.top(1).nodes, demo.text())
    ((node, found),) = described.items()
    features = encoded(demo, sae, demo.model.to_tokens(" ".join(found.examples[0].tokens))[0].tolist())
    assert len(found.examples) == len(found.contexts) == 3
    for example, context in zip(found.examples, found.contexts, strict=True):
        assert example.value == example.values[-2] == max(example.value, 0)
        assert context == f"{' '.join(example.tokens[:-2])} [{example.tokens[-2]}] {example.tokens[-1]}"
        assert f"  {example.value:.3g}  {context}" in repr(described).splitlines()
    assert repr(described).startswith(f"{node}: {found}\n")
    assert len(features)
    shown = described._repr_html_()
    largest = max(value for example in found.examples for value in example.values)
    value = found.examples[1].values[0]
    assert f"rgba(230, 126, 34, {value / largest:.2f})" in shown
    assert shown.count('class="token"') == sum(len(example.tokens) for example in found.examples)
    hostile = Description("on", EVIL, 1.0, 1, 1, (EVIL,), (Example((EVIL,), (1.0,), 1.0),))
    for text in (hostile._repr_html_(), Descriptions({replace(node, sae=EVIL): hostile})._repr_html_()):
        assert "<script" not in text
        assert html.escape(EVIL) in text


def test_activations_of_examples_are_those_of_the_whole_text(demo: Any, sae: Any) -> None:
    """Of a text whose only example is at its beginning, where BOS is left out."""
    text = "Mary gave a drink to"
    every = encoded(demo, sae, demo.model.to_tokens(text)[0].tolist())[1:]
    index = int(every[-1].argmax())
    features = every[:, index]
    with pytest.warns(UserWarning, match="too little text"):
        (found,) = fp.max_activating(demo.model, sae, [fp.Node(HOOK, "feature", index, sae=HOOK)], [text], contexts=1).values()
    (example,) = found.examples
    at = int(features.argmax())
    assert example.value == pytest.approx(float(features[at]), rel=1e-4)
    assert list(example.values) == pytest.approx(features[max(0, at - 5) : at + 2].tolist(), rel=1e-4, abs=1e-5)


def test_pairs_in_a_notebook(demo: Any, pairs: fp.Pairs, tmp_path: Path) -> None:
    """Words where the tokenizer is known, differing ones marked; ids otherwise. Nothing else depends on the tokenizer."""
    shown, pair = pairs._repr_html_(), pairs[0]
    differing = sum(a != b for one in pairs for a, b in zip(one.clean, one.corrupted, strict=True))
    assert shown.count("token differs") == 2 * differing
    assert f"labels: IO {pair.labels['IO']}" in shown
    assert f">{demo.model.tokenizer.decode([pair.clean[5]])}</span>" in shown
    plain = fp.Pairs(pairs.pairs)
    assert plain == pairs
    assert plain.digest() == pairs.digest()
    assert f">{pair.clean[5]}</span>" in plain._repr_html_()
    assert pickle.loads(pickle.dumps(pairs)) == pairs
    read = fp.Pairs.from_jsonl(demo.model, pairs.to_jsonl(tmp_path / "pairs.jsonl"))
    assert read._repr_html_() == shown
    assert read[:2]._repr_html_() == pairs[:2]._repr_html_()
    hostile = fp.Pairs((replace(pair, labels={EVIL: 1}, tags={EVIL: EVIL}),))._repr_html_()
    assert "<script" not in hostile
    assert html.escape(EVIL) in hostile
    many = demo.pairs("ioi", n=12)._repr_html_()
    assert many.count("clean: ") == 8
    assert "of which 8 are shown" in many


def test_results_in_a_notebook(demo: Any, sae: Any, pairs: fp.Pairs, effects: fp.Effects, tmp_path: Path) -> None:
    """A table where plotly figures can't be drawn; a report is shown inline."""
    bad = fp.Pairs((*pairs[:2], pairs[0]))
    found = bad.check(demo.model)
    counts = found.counts()["duplicate"]
    assert f"<td>duplicate</td><td>{counts['pass']}</td>" in found._repr_html_().replace("\n", "")
    curve = fp.top_k_curve(demo.model, sae, pairs, most=2, positions=["S2"], progress=False)
    circuit = fp.find_circuit(demo.model, pairs, saes=sae, nodes=effects.top(3), size=2, progress=False)
    faithful = circuit.curve([0.5, 1.0])
    for result, cells in ((curve, ["S2"]), (circuit, [str(node) for node in circuit.items]), (faithful, ["0.5"])):
        shown = result._repr_html_()
        assert all(f"<td>{cell}</td>" in shown for cell in cells)
        assert html.escape(repr(result).partition("\n")[0], quote=False) in html.unescape(shown).replace("&", "&amp;") or repr(
            result
        ).partition("\n")[0] in html.unescape(shown)
        assert isinstance(result._repr_mimebundle_(include=None, exclude=None), dict)
    hostile = replace(curve, features={(EVIL, "S2"): [0]})
    assert "<script" not in hostile._repr_html_()
    path = fp.report(effects, tmp_path / "r.html", question=EVIL)
    assert isinstance(path, Path)
    inline = path._repr_html_()  # type: ignore[attr-defined]
    start, end = inline.index('srcdoc="') + len('srcdoc="'), inline.index('" title=')
    assert html.unescape(inline[start:end]) == path.read_text()
    assert "<script" not in inline
