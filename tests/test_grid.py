"""Effects by layer and position and by layer and head, as tensors and heat maps, against a loop over the rows of the table."""

import math
import warnings
from functools import partial
from itertools import product
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import featpatch as fp
from featpatch.effects.plots import DIVERGING, GREY

pytestmark = pytest.mark.filterwarnings("ignore:positions='each' pools")


@pytest.fixture(scope="module")
def demo() -> Any:
    return fp.load_demo(progress=False)


@pytest.fixture(scope="module")
def pairs(demo: Any) -> fp.Pairs:
    """Prompts of unequal length, the longest first, so that indices do not appear in order."""
    found = fp.Pairs(tuple(sorted(demo.pairs("ioi", n=3, seed=0), key=len, reverse=True)))
    assert len(found.by_length()) > 1
    return found


@pytest.fixture(scope="module")
def each(demo: Any, pairs: fp.Pairs) -> fp.Effects:
    return fp.rank_components(demo.model, pairs, sites=["resid_pre", "z"], positions="each", progress=False)


@pytest.fixture(scope="module")
def labelled(demo: Any, pairs: fp.Pairs) -> fp.Effects:
    with pytest.warns(UserWarning, match="'S1' has no rows"):
        return fp.rank_components(
            demo.model, pairs, sites=["resid_pre", "attn_out", "z"], positions=["end", "S2", "S1"], progress=False
        )


@pytest.fixture(scope="module")
def features(demo: Any, pairs: fp.Pairs) -> fp.Effects:
    return fp.rank_features(demo.model, demo.saes[-2:], pairs, positions=["end", "S2"], progress=False)


def by_hand(effects: fp.Effects, **wanted: Any) -> float:
    """The sum of the recoveries of the rows with these fields; 0 if there are none."""
    rows = effects.where(**wanted)
    changed = [rows.denoised[entry] - rows.corrupted[rows.pair[entry]] for entry in range(len(rows.row))]
    return sum(changed) / float(rows.gap.sum())


def test_layers_and_positions(each: fp.Effects, labelled: fp.Effects, pairs: fp.Pairs) -> None:
    """Indices by size, labels as in the prompt; what did not change is there and exactly 0."""
    values, axes = each.to_tensor("layer", "position", site="resid_pre")
    assert axes == {"layer": [0, 1, 2, 3], "position": list(range(1, max(map(len, pairs))))}
    expected = [
        [by_hand(each, site=f"blocks.{layer}.hook_resid_pre", position=at) for at in axes["position"]] for layer in range(4)
    ]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    first = min(pair.first_difference for pair in pairs)
    assert (values[:, : first - 1] == 0).all()
    values, axes = labelled.to_tensor("position", "layer", site="resid_pre", effect="degradation")
    assert axes == {"position": ["S1", "S2", "end"], "layer": [0, 1, 2, 3]}
    assert (values[0] == 0).all()
    assert values[2, 0] == 0  # the last token is the same, so the input of the first layer is
    assert values[1, 0].item() == pytest.approx(1)


def test_layers_and_heads(labelled: fp.Effects) -> None:
    values, axes = labelled.to_tensor("layer", "head", position="end")
    assert axes == {"layer": [0, 1, 2, 3], "head": list(range(8))}
    expected = [
        [by_hand(labelled, site=f"blocks.{layer}.attn.hook_z", kind="head", index=head, position="end") for head in range(8)]
        for layer in range(4)
    ]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    every, axes = labelled.to_tensor("head", "position", "layer", site="z", kind="head")
    assert axes["position"] == ["S1", "S2", "end"]
    torch.testing.assert_close(every[:, 2].T, values)
    assert (every[:, 0] == 0).all()


def test_features_are_summed(features: fp.Effects) -> None:
    values, axes = features.to_tensor("layer", "position", kind="feature", site="resid_pre")
    assert axes == {"layer": [3], "position": ["S2", "end"]}
    expected = [by_hand(features, kind="feature", site="blocks.3.hook_resid_pre", position=at) for at in ("S2", "end")]
    assert values[0].tolist() == pytest.approx(expected)


def test_what_was_not_measured_is_nan(
    labelled: fp.Effects, features: fp.Effects, demo: Any, pairs: fp.Pairs, tmp_path: Any
) -> None:
    """Rows that were left out, features that a screening or a file leaves out, and tables that were not finished."""
    head = labelled.where(kind="head", index=3)
    values, _ = head.to_tensor("layer", "head", position="end")
    assert [column.isnan().all().item() for column in values.T] == [True] * 3 + [False] + [True] * 4
    one = features.where(kind="feature", site="blocks.3.hook_resid_pre").top(1)
    values, axes = fp.Effects.load(one.save(tmp_path / "one.safetensors")).to_tensor("layer", "position", kind="feature")
    assert axes["position"] == ["S2", "end"]
    assert values.isnan().tolist() == [[at != one.nodes[0].position for at in axes["position"]]]
    options: dict[str, Any] = {"positions": ["S1", "end"], "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # S1 has no rows, and so few features prove little
        screened = fp.rank_features(demo.model, demo.saes[-1], pairs, screen=fp.Screen(k=3, audit=2), **options)
        whole = fp.rank_features(demo.model, demo.saes[-1], pairs, **options)
    assert whole.to_tensor("layer", "position", kind="feature").values.isnan().sum() == 0
    assert screened.to_tensor("layer", "position", kind="activation").values.isnan().sum() == 0
    assert screened.to_tensor("layer", "position", kind="feature").values[0, 0].isnan()


def test_pairs_that_are_left_out_take_their_positions_along(each: fp.Effects, pairs: fp.Pairs) -> None:
    short = each.of_pairs([len(pairs) - 1])
    assert short.to_tensor("layer", "position", site="resid_pre").axes["position"] == list(range(1, len(pairs[-1])))


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ((), {}, "axes (none): expected some of layer, position, head, each once"),
        (("layer", "pos"), {}, "axes 'layer', 'pos': expected some of"),
        (("layer", "layer"), {}, "each once"),
        (("layer", "position"), {}, "the rows have the kinds activation, head: expected one; give kind="),
        (("layer", "position"), {"kind": "activation"}, "hook_resid_pre, hook_attn_out: expected one; give site="),
        (("layer", "head"), {}, "end, S2: expected one; give position="),
        (("layer", "position"), {"kind": "head"}, "expected 'head' among the axes"),
        (("position",), {"site": "resid_pre"}, "the rows have the layers 0, 1, 2, 3: expected one; make layer an axis"),
        (
            ("layer", "position"),
            {"site": "mlp_out"},
            "no row of site 'mlp_out': expected one of hook_resid_pre, hook_attn_out, attn.hook_z",
        ),
        (("layer", "head"), {"position": "IO"}, "no row of position 'IO': expected one of end, S2"),
        (("layer", "position"), {"kind": "x"}, "no row of kind 'x': expected one of activation, head"),
        (("layer", "head"), {"position": "end", "effect": "x"}, "effect='x': expected one of the measured effects, recovery"),
    ],
)
def test_what_is_ambiguous_is_refused(
    labelled: fp.Effects, axes: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(fp.FeatpatchError) as error:
        labelled.to_tensor(*axes, **options)
    assert message in str(error.value)


def test_other_kinds_are_refused(demo: Any, pairs: fp.Pairs, features: fp.Effects) -> None:
    neurons = fp.rank_components(demo.model, pairs[:1], sites="neurons", layers=[0], positions=["end"], progress=False)
    with pytest.raises(fp.FeatpatchError, match="the table has rows of kind neuron: expected activation"):
        neurons.where(kind="neuron").plot.heatmap()
    with pytest.raises(fp.FeatpatchError, match="kind 'neuron' does not fit into layers, positions and heads"):
        neurons.plot.heatmap(kind="neuron")
    hook = demo.saes[-1].cfg.metadata.hook_name
    both = [demo.saes[-1], fp.dictionaries.identity(demo.model, hook)]
    twice = fp.rank_features(demo.model, both, pairs, positions=["end"], progress=False)
    with pytest.raises(fp.FeatpatchError, match=r"has the SAEs .*: expected one; select it with effects.where\(sae=...\)"):
        twice.plot.heatmap(kind="feature")
    one = twice.where(sae=hook, kind="feature")
    assert one.plot.heatmap().data[0].z[0, 0] == pytest.approx(by_hand(features, kind="feature", sae=hook, position="end"))


def test_heat_maps(each: fp.Effects, labelled: fp.Effects, features: fp.Effects) -> None:
    """One for each hook point, and for each position of heads; white is 0 and grey is not measured."""
    figure = each.plot.heatmap()
    assert [annotation.text for annotation in figure.layout.annotations] == ["hook_resid_pre"]
    values, axes = each.to_tensor("layer", "position", site="resid_pre")
    assert list(figure.data[0].x) == [str(position) for position in axes["position"]]
    np.testing.assert_array_equal(figure.data[0].z, values.numpy())
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax == -max(abs(cell) for trace in figure.data for row in trace.z for cell in row)
    assert dict(DIVERGING)[0.5] == "#ffffff"
    assert figure.layout.plot_bgcolor == GREY
    assert figure.layout.title.text == "whole activation: recovery over 3 pairs"
    heads = labelled.plot.heatmap(kind="head", title="a <b>")
    assert [annotation.text for annotation in heads.layout.annotations] == ["attn.hook_z @ S2", "attn.hook_z @ end"]
    assert heads.layout.title.text == "a &lt;b>".replace(">", "&gt;")
    np.testing.assert_array_equal(heads.data[1].z, labelled.to_tensor("layer", "head", position="end").values.numpy())
    assert labelled.where(kind="head").plot.heatmap(position="end").data[0].z.shape == (4, 8)
    summed = features.plot.heatmap(kind="feature")
    assert summed.layout.title.text.startswith(f"sum over features ({int(features.ranked.sum())})")
    assert "<br>" not in figure.layout.title.text


def test_layers_that_one_hook_point_lacks_are_grey(demo: Any, pairs: fp.Pairs) -> None:
    """Rows of all heat maps of a figure are the same layers."""
    saes = [sae for sae in demo.saes if sae.cfg.metadata.hook_name in ("blocks.1.hook_resid_pre", "blocks.3.hook_resid_post")]
    figure = fp.rank_features(demo.model, saes, pairs, positions=["end"], progress=False).plot.heatmap()
    assert [list(trace.y) for trace in figure.data] == [["1", "3"]] * 2
    assert [[math.isnan(row[0]) for row in trace.z] for trace in figure.data] == [[False, True], [True, False]]
    assert figure.layout.title.text.endswith("<br>grey: not measured")


def test_tokens_are_shown_if_all_clean_prompts_are_the_same(demo: Any, pairs: fp.Pairs, each: fp.Effects) -> None:
    one = fp.rank_components(demo.model, pairs[:1], sites="resid_pre", positions="each", progress=False)
    words = demo.model.tokenizer.convert_ids_to_tokens(pairs[0].clean)
    assert list(one.plot.heatmap().data[0].x) == [f"{at} {word!r}" for at, word in enumerate(words)][1:]
    assert "tokens" not in each.metadata
    for order in (1, -1):
        several = fp.Pairs(tuple(sorted(pairs, key=lambda pair: pair.clean)[::order]))
        found = fp.rank_components(demo.model, several, sites="resid_pre", layers=[2], positions=["end"], progress=False)
        assert "tokens" not in found.metadata


def test_positions_from_the_end_of_prompts_of_unequal_length(demo: Any, pairs: fp.Pairs) -> None:
    effects = fp.rank_components(demo.model, pairs, sites="resid_pre", layers=[2], positions=[-1, 3, -2], progress=False)
    assert list(effects.plot.heatmap().data[0].x) == ["3", "-2", "-1"]


def test_a_hook_point_of_heads_shows_heads(labelled: fp.Effects) -> None:
    figure, same = labelled.plot.heatmap(site="z", position="end"), labelled.plot.heatmap(kind="head", position="end")
    np.testing.assert_array_equal(figure.data[0].z, same.data[0].z)


def test_too_many_heat_maps_of_heads(each: fp.Effects) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"positions: expected at most 12 heat maps; choose with position= or site="):
        each.plot.heatmap(kind="head")


def test_every_plot_has_a_title_and_refuses_other_effects(
    demo: Any, pairs: fp.Pairs, features: fp.Effects, labelled: fp.Effects, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"positions": ["S2"], "progress": False}
    (sae,) = [sae for sae in demo.saes if sae.cfg.metadata.hook_name == "blocks.3.hook_resid_pre"]
    curve = fp.top_k_curve(demo.model, sae, pairs, most=2, directions=["denoising"], **options)
    circuit = fp.find_circuit(
        demo.model, pairs, saes=sae, nodes=features.where(sae="blocks.3.hook_resid_pre").top(4), size=2, progress=False
    )
    estimate = fp.rank_features(demo.model, demo.saes[-2:], pairs, method="atp", positions=["end", "S2"], progress=False)
    figures = (
        features.plot.quadrants(title="<t>"), features.plot.sites(title="<t>"), features.plot.heatmap(title="<t>"),
        curve.plot(title="<t>"), circuit.curve([0.5, 1.0]).plot(title="<t>"), fp.calibrate(estimate, features).plot(title="<t>"),
        fp.compare(features, labelled).plot(title="<t>"), fp.diagram.figure(circuit.to_networkx(), title="<t>"),
    )  # fmt: skip
    assert {type(figure).__name__ for figure in figures} == {"Figure"}
    assert {figure.layout.title.text.removesuffix("<br>grey: not measured") for figure in figures} == {"&lt;t&gt;"}
    for call in (curve.plot, features.plot.sites, features.plot.heatmap):
        with pytest.raises(fp.FeatpatchError, match="expected one of the measured effects, recovery"):
            call("x")
    with pytest.raises(fp.FeatpatchError, match="effect='degradation': expected one of the measured effects, recovery"):
        curve.plot("degradation")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    drawings = (
        features.plot.quadrants, features.plot.sites, features.plot.heatmap, circuit.curve([0.5, 1.0]).plot,
        fp.calibrate(estimate, features).plot, fp.compare(features, labelled).plot,
        partial(fp.diagram.figure, circuit.to_networkx()), partial(fp.diagram.interactive, circuit.to_networkx()),
        partial(circuit.report, "circuit.html"), fp.logit_attribution(demo.model, pairs, progress=False).plot,
    )  # fmt: skip
    for argument in ("kind", "site", "position"):
        for function in (features.plot.heatmap, partial(features.to_tensor, "layer")):
            with pytest.raises(fp.FeatpatchError, match=f"^{argument}"):
                function(**{argument: np.array([1, 2])})
    for drawing, title in product(drawings, (3, True, None, [], b"t")):
        with pytest.raises(fp.FeatpatchError, match=rf"^title is of type {type(title).__name__}: expected str$"):
            drawing(title=title)
