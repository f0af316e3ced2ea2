"""Files of circuits: our own JSON and EAP-IG's, with names that the tests build independently."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from architectures import HOOKED, hooked
from edge_oracle import edges_of
from small import Small, small_hooked
from test_edges import named
from test_sets import pairs_of

import featpatch as fp

OPTIONS: dict[str, Any] = {"over": "edges", "scores": "estimate", "size": 20, "progress": False}


def theirs(edge: tuple[str, str]) -> str:
    """EAP-IG's name for an edge of the oracle."""
    plain = (f"m{end[1:-4]}" if end.endswith(".MLP") else end.replace("L", "a").replace(".H", ".h") for end in edge)
    sender, receiver = (end.replace("embed", "input") for end in plain)
    head, _, way = receiver.rpartition(".")
    return f"{sender}->{head}<{way}>" if way in ("q", "k", "v") else f"{sender}->{receiver}"


def test_our_files(tmp_path: Path) -> None:
    """A circuit that is read equals the one written, and its search can be repeated for stability."""
    small = small_hooked()
    circuit = fp.find_circuit(small.model, pairs_of(small), metric="log_prob", to="mean", **OPTIONS)
    found = fp.load_circuit(circuit.save(tmp_path / "circuit.json"), small.model, pairs_of(small))
    assert found.items == circuit.items
    np.testing.assert_array_equal(found.scores, circuit.scores)
    assert (found.graph.to, found.graph.name, found.faithfulness) == ("mean", "log_prob", circuit.faithfulness)
    assert found.stability(resamples=1).equals(circuit.stability(resamples=1))


def test_circuits_of_features(tmp_path: Path) -> None:
    """Circuits of features, as nodes and as mediators, are read with their SAEs passed again."""
    small = small_hooked()
    sae = small.at("blocks.1.hook_resid_pre")
    nodes = [fp.Node("blocks.1.hook_resid_pre", "feature", n, sae="blocks.1.hook_resid_pre") for n in range(4)]
    for options in ({"over": "nodes", "size": 2}, {**OPTIONS, "size": 9}):
        run = {"saes": sae, "nodes": nodes, "progress": False, "errors": "in", **options}
        circuit = fp.find_circuit(small.model, pairs_of(small), **run)
        path = circuit.save(tmp_path / "circuit.json")
        found = fp.load_circuit(path, small.model, pairs_of(small), saes=sae)
        assert found.items == circuit.items
        assert found.graph.items == circuit.graph.items
        assert found.faithfulness == circuit.faithfulness
        with pytest.raises(fp.FeatpatchError, match="SAE"):
            fp.load_circuit(path, small.model, pairs_of(small))
        with pytest.raises(fp.FeatpatchError, match="form='eap_ig'"):
            circuit.save(path, form="eap_ig")


def test_files_of_eap_ig(tmp_path: Path) -> None:
    """Our files have EAP-IG's names, and a file of EAP-IG with other items is read."""
    small = small_hooked()
    pairs = pairs_of(small)
    circuit = fp.find_circuit(small.model, pairs, **OPTIONS)
    content = json.loads(circuit.save(tmp_path / "edges.json", form="eap_ig").read_text())
    assert set(content["edges"]) == set(map(theirs, edges_of(small.model)))
    assert content["cfg"] == {"n_layers": 3, "n_heads": 4, "d_model": 16, "parallel_attn_mlp": False}
    for edge, score in zip(circuit.graph.items, circuit.scores, strict=True):
        kept = edge in circuit.items
        assert content["edges"][theirs(named(edge))] == {"score": score, "in_graph": kept}
    every, used = (
        {node for edge in edges for node in theirs(named(edge)).split("<")[0].split("->")}
        for edges in (circuit.graph.items, circuit.items)
    )
    assert content["nodes"] == {node: {"in_graph": node in {*used, "input", "logits"}} for node in every}
    assert 2 < sum(node["in_graph"] for node in content["nodes"].values()) < len(content["nodes"])
    content["edges"] = {name: {"score": float(n), "in_graph": n > 200} for n, name in enumerate(content["edges"])}
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    found = fp.load_circuit(tmp_path / "theirs.json", small.model, pairs)
    assert [theirs(named(edge)) for edge in found.items] == list(content["edges"])[:200:-1]
    with pytest.raises(fp.FeatpatchError, match="found by EAP-IG"):
        found.stability()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "shallow",
            {"over": "edges"},
            "found in a model of 2 layers, 4 heads and width 16, and this model has 3 layers, 4 heads and width 16",
        ),
        ("shallow", {"nodes": [fp.head(0, 1), fp.head(1, 2)]}, "found in a model of 2 layers.*"),
        ("attention only", {"over": "edges"}, r"found among \d+ edges, and this model has 262"),
    ],
)
def test_circuits_of_other_models(tmp_path: Path, name: str, options: dict[str, Any], said: str) -> None:
    """Without scores too: all items of a shallow model, and of one without MLPs, are also items of the larger one."""
    large = small_hooked()
    model = HOOKED[name]() if name in HOOKED else hooked(act_fn="gelu", n_layers=2)
    small = Small(model, [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    found = fp.find_circuit(small.model, pairs_of(small), scores="estimate", size=2, progress=False, **options)
    path = replace(found, scores=np.zeros(0)).save(tmp_path / "circuit.json")  # as from ACDC
    assert fp.load_circuit(path, small.model, pairs_of(small)).items == found.items
    with pytest.raises(fp.FeatpatchError, match=f"^the circuit was {said}: expected (the same|as many)"):
        fp.load_circuit(path, large.model, pairs_of(large))


def test_circuits_at_each_position(tmp_path: Path) -> None:
    """They are read for other prompts of the same length, and refused for longer and shorter ones and other special tokens."""
    small = Small(hooked(act_fn="gelu", n_layers=1), [])
    pairs = pairs_of(small)
    circuit = fp.find_circuit(small.model, pairs, positions="each", scores="estimate", size=9, progress=False)
    other = fp.Pairs(tuple(reversed(pairs)))
    for scores in (circuit.scores, np.zeros(0)):
        path = replace(circuit, scores=scores).save(tmp_path / "circuit.json")
        assert fp.load_circuit(path, small.model, other).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-12)
        for columns, special, strange in (([0, *range(7)], (), "7"), ([*range(1, 7)], (), "6"), ([*range(7)], (2,), "2")):
            tokens = fp.Pairs.from_tokens(small.clean[:, columns], small.corrupted[:, columns], small.correct, small.wrong)
            some = fp.Pairs(tuple(replace(pair, special=frozenset(special)) for pair in tokens))
            with pytest.raises(
                fp.FeatpatchError, match=f"positions='each' .*: only one of the two has {strange}: expected prompts"
            ):
                fp.load_circuit(path, small.model, some)


@pytest.mark.usefixtures("wide")
def test_shared_keys_are_there_once_per_head(tmp_path: Path) -> None:
    small = Small(HOOKED["llama"](), [], correct=torch.tensor([3, 5, 7]), wrong=torch.tensor([4, 6, 8]))
    circuit = fp.find_circuit(small.model, pairs_of(small), **OPTIONS)
    path = circuit.save(tmp_path / "edges.json", form="eap_ig")
    content = json.loads(path.read_text())["edges"]
    assert content["input->a0.h0<k>"] == content["input->a0.h1<k>"]
    assert content["input->a0.h0<k>"] != content["input->a0.h2<k>"]
    assert set(fp.load_circuit(path, small.model, pairs_of(small)).items) == set(circuit.items)


def test_circuits_are_compared() -> None:
    small = small_hooked()
    pairs = pairs_of(small)
    one, other = (fp.find_circuit(small.model, pairs, **{**OPTIONS, "metric": m}) for m in ("logit_diff", "log_prob"))
    table = one.compare(other)
    both, either = set(one.items) & set(other.items), set(one.items) | set(other.items)
    assert set(table["item"]) == set(map(str, either))
    assert set(table[table["first"] & table["second"]]["item"]) == set(map(str, both))
    assert table.attrs["jaccard"] == len(both) / len(either)
    assert 0 < len(both) < len(either)
    scores = {str(item): score for item, score in zip(other.graph.items, other.scores, strict=True)}
    assert table["second_score"].tolist() == [scores[item] for item in table["item"]]
    with pytest.raises(fp.FeatpatchError, match="other is a list"):
        one.compare([])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no circuit"),
        ('{"featpatch circuit": 2, "graph": {}, "metadata": {}, "scores": ["x"]}', "holds no circuit"),
        ('{"cfg": {}, "nodes": {}, "edges": {"a9.h0->logits": {"score": 1, "in_graph": true}}}', "is not in this model"),
        ('{"cfg": {}, "nodes": {}, "edges": {"m0->logits": {"score": 1}}}', "expected a finite score, and in_graph"),
        ('{"cfg": {}, "nodes": {}, "edges": {"m0->logits": {"score": NaN, "in_graph": true}}}', "expected a finite score"),
        (
            '{"cfg": {}, "nodes": {}, "edges": {"m0->logits": {"score": 1, "in_graph": true}}}',
            "'input->a0.h0<q>' is not in the",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: str, said: str) -> None:
    small = small_hooked()
    (tmp_path / "circuit.json").write_text(content)
    with pytest.raises(fp.FeatpatchError, match=said):
        fp.load_circuit(tmp_path / "circuit.json", small.model, pairs_of(small))
    with pytest.raises(fp.FeatpatchError, match="can't be read"):
        fp.load_circuit(tmp_path / "none.json", small.model, pairs_of(small))


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field that is read, with a value of another type, none, and a number that is not finite."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    small, path = small_hooked(), tmp_path / "circuit.json"
    found = fp.find_circuit(small.model, pairs_of(small), **OPTIONS)
    content = json.loads(found.refine(threshold=0.01, progress=False).save(path).read_text())

    def refused(name: str, value: Any, said: str) -> None:
        outer = content if name in content else content["metadata"]
        changed = {**outer, name: value}
        path.write_text(json.dumps(changed if outer is content else {**content, "metadata": changed}))
        with pytest.raises(fp.FeatpatchError, match=said):
            fp.load_circuit(path, small.model, pairs_of(small))

    refused("items", 3, "expected a list")
    refused("graph", 3, "holds no circuit")
    for name in content["graph"]:
        for value in (None, True, "x", 3.5):
            refused("graph", {**content["graph"], name: value}, "is damaged: its graph is")
    refused("scores", [1], "1 scores")
    for scores in ([10**400], [float("nan")]):
        refused("scores", scores * len(found.scores), "holds no circuit")
    for name in ("over", "method", "metric", "outside", "ablation", "search", "finished"):
        for value in (None, 3, float("inf"), {"a": 1}):
            refused(name, value, f"is damaged: its metadata have {name}=")
    for name, value in (("refined", 3), ("refined", ["x"]), ("positions", 3)):
        refused(name, value, f"is damaged: its metadata have {name}=")
    for wrong in (3, True, [path]):
        with pytest.raises(fp.FeatpatchError, match="^the path is of type"):
            fp.load_circuit(wrong, small.model, pairs_of(small))  # type: ignore[arg-type]


def test_candidates_that_are_not_their_groups(tmp_path: Path) -> None:
    """The node of a group has a name, a number and a position, which follow from the group."""
    small, site = small_hooked(), "blocks.1.hook_resid_pre"
    nodes = [fp.Node(site, "feature", n, sae=site) for n in range(4)]
    run: dict[str, Any] = {"saes": small.at(site), "errors": "in", "size": 2, "progress": False}
    circuit = fp.find_circuit(small.model, pairs_of(small), nodes=[fp.Patch((nodes[0], nodes[1]), "two"), *nodes[2:]], **run)
    path = circuit.save(tmp_path / "circuit.json")
    content = json.loads(path.read_text())
    assert fp.load_circuit(path, small.model, pairs_of(small), saes=small.at(site)).items == circuit.items
    content["candidates"][-1][3] = "end"
    path.write_text(json.dumps(content))
    with pytest.raises(fp.FeatpatchError, match="its candidates are not those of its groups"):
        fp.load_circuit(path, small.model, pairs_of(small), saes=small.at(site))


def test_empty_ablation_values_are_not_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    small = small_hooked()
    path = fp.find_circuit(small.model, pairs_of(small), **OPTIONS).save(tmp_path / "circuit.json")
    for to in ("", 0, [], np.array([1, 2])):
        with pytest.raises(fp.FeatpatchError, match="^to=.*: expected one of corrupted, zero"):
            fp.load_circuit(path, small.model, pairs_of(small), to=to)  # type: ignore[arg-type]
        with pytest.raises(fp.FeatpatchError, match="^to=.*: expected one of corrupted, zero"):
            fp.find_circuit(small.model, pairs_of(small), **OPTIONS, to=to)  # type: ignore[arg-type]


def test_prompts_with_and_without_a_counterfactual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they are refused for all ablation values."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    small = small_hooked()
    pairs = pairs_of(small)
    path = fp.find_circuit(small.model, pairs, **OPTIONS).save(tmp_path / "circuit.json")
    mixed = fp.Pairs((pairs[0], replace(pairs[1], corrupted=pairs[1].clean)))
    for to in ("corrupted", "zero", "mean", "mean_by_position", "resample"):
        for call in (
            lambda to=to: fp.find_circuit(small.model, mixed, to=to, **OPTIONS),
            lambda to=to: fp.load_circuit(path, small.model, mixed, to=to),
        ):
            with pytest.raises(fp.FeatpatchError, match="1 of 2 pairs have no counterfactual"):
                call()
    with pytest.raises(fp.FeatpatchError, match="^reference: pairs is a list"):
        fp.find_circuit(small.model, pairs, to="mean", reference=[1], **OPTIONS)
