"""Groups of features: how they are found, their joint effects beside the sums of their members', and where they appear."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Small
from test_nodes import RESID, by_do, pairs_of

import featpatch as fp
from featpatch.ranking.groups import Groups
from featpatch.ranking.similarity import clusters, cosines

LAST = "blocks.2.hook_resid_post"


def ranked(small: Small, *, n: int = 8, position: str = "there") -> tuple[list[Any], fp.Effects]:
    saes = [small.at(RESID), small.at(LAST)]
    effects = fp.rank_features(small.model, saes, pairs_of(small), positions=[position], progress=False)
    return saes, effects.top(n)


def groups_of(small: Small, nodes: Any, **options: Any) -> Groups:
    saes = [small.at(RESID), small.at(LAST)]
    return fp.group_features(small.model, saes, pairs_of(small), nodes, progress=False, **options)


def test_effects_of_groups_are_joint_patches(small: Small) -> None:
    """In both directions and every pair, those of `fp.do`, also across layers; the sums are those of single patches."""
    saes, effects = ranked(small, n=20, position="all")
    a, b = [node for node in effects.nodes if node.sae == RESID][:2]
    c = next(node for node in effects.nodes if node.sae == LAST)
    own = {"one layer": [n for n in effects.nodes if n.sae == RESID], "mixed": [a, b, c], "alone": [a]}
    groups = groups_of(small, own)
    assert set(groups.names) == set(own)
    for name, nodes in own.items():
        patch = next(patch for patch in groups.patches if patch.name == name)
        assert list(patch.nodes) == nodes
    joint = groups.joint
    assert joint.value == "exact"
    for row, patch in enumerate(groups.patches):
        for number, pair in enumerate(pairs_of(small)):
            entry = np.flatnonzero((joint.row == row) & (joint.pair == number))
            for way, column, base in (("denoising", joint.denoised, joint.corrupted), ("noising", joint.noised, joint.clean)):
                expected = by_do(small, pair, list(patch.nodes), way, saes)
                assert (column[entry[0]] if len(entry) else base[number]) == pytest.approx(expected, abs=1e-9)
    frame = groups.to_pandas()
    assert frame["members"].tolist() == [len(patch.nodes) for patch in groups.patches]
    assert frame["recovery"].abs().is_monotonic_decreasing
    for row, patch in enumerate(groups.patches):
        singles = fp.rank_nodes(small.model, pairs_of(small), list(patch.nodes), saes=saes, together=False, progress=False)
        for effect in ("recovery", "degradation"):
            total = singles.pooled(effect).sum()
            assert frame[f"{effect}_sum"][row] == pytest.approx(total, abs=1e-12)
            assert frame[f"{effect}_interaction"][row] == pytest.approx(frame[effect][row] - total, abs=1e-12)
            assert frame[f"{effect}_interaction_low"][row] <= frame[f"{effect}_interaction"][row]
        assert groups.members(patch.name).nodes == patch.nodes
    alone = groups.names.index("alone")
    for end in ("", "_low", "_high"):
        assert frame[f"recovery_interaction{end}"][alone] == pytest.approx(0, abs=1e-12)


def test_features_of_one_sae_are_added_up(small: Small) -> None:
    """The joint patch of features at one hook point, at several positions, is that of `fp.do`."""
    sae = small.at(RESID)
    nodes = [fp.feature(sae, 5, "there"), fp.feature(sae, 6, "pieces"), fp.feature(sae, 7), fp.feature(sae, 8, -1)]
    twice = [fp.feature(sae, 5, "there"), fp.feature(sae, 5, 3)]  # one token by two names, which is set once
    patches = [fp.Patch(tuple(some)) for some in (nodes, twice)]
    found = fp.rank_nodes(small.model, pairs_of(small), patches, saes=sae, progress=False)
    for row, some in enumerate((nodes, twice)):
        for number, pair in enumerate(pairs_of(small)):
            entry = np.flatnonzero((found.row == row) & (found.pair == number))
            for way, column, base in (("denoising", found.denoised, found.corrupted), ("noising", found.noised, found.clean)):
                value = column[entry[0]] if len(entry) else base[number]
                assert value == pytest.approx(by_do(small, pair, some, way, sae), abs=1e-9)


def by_hand(similarity: np.ndarray, least: float) -> list[set[int]]:
    """Average linkage: join the two groups with the largest mean similarity, while it is large enough."""
    groups = [{n} for n in range(len(similarity))]
    while len(groups) > 1:
        means = {
            (i, j): np.mean([similarity[a, b] for a in groups[i] for b in groups[j]])
            for i in range(len(groups))
            for j in range(i)
        }
        (i, j), best = max(means.items(), key=lambda item: item[1])
        if best < least:
            break
        groups[j] |= groups.pop(i)
    return groups


@pytest.mark.parametrize("least", [-0.2, 0.1, 0.4])
def test_clusters_are_those_by_hand(least: float) -> None:
    profiles = np.random.default_rng(3).normal(size=(12, 4))
    similarity = cosines(profiles)
    np.testing.assert_allclose(
        similarity[2, 5], profiles[2] @ profiles[5] / np.linalg.norm(profiles[2]) / np.linalg.norm(profiles[5])
    )
    found = clusters(similarity, least=least, count=None)
    sets = {frozenset(np.flatnonzero(np.array(found) == number).tolist()) for number in set(found)}
    assert sets == {frozenset(group) for group in by_hand(similarity, least)}
    assert len(set(clusters(similarity, least=least, count=5))) == 5
    assert all(len(set(clusters(np.eye(4), least=least, count=count))) == count for count in (1, 2, 3, 4))  # equal joins
    assert clusters(similarity[:1, :1], least=0.5, count=None) == [0]
    assert cosines(np.array([[0.0, 0.0], [1.0, 0.0]]))[0, 1] == 0


def test_each_similarity_is_its_definition(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix that is clustered, computed again from effects, estimates, weights and activations."""
    saes, effects = ranked(small)
    seen: list[np.ndarray] = []

    def spy(similarity: np.ndarray, **options: Any) -> list[int]:
        seen.append(similarity)
        return clusters(similarity, **options)

    monkeypatch.setattr("featpatch.ranking.groups.clusters", spy)
    nodes = effects.nodes
    estimates = fp.rank_features(small.model, saes, pairs_of(small), positions=["there"], method="atp", progress=False)
    rows = [estimates.nodes.index(node) for node in nodes]
    for by in ("effects", "attribution", "decoder", "coactivation"):
        if by in ("effects", "attribution"):
            table = effects if by == "effects" else estimates.take(rows)
            profiles = np.hstack([table.changes("recovery").toarray(), table.changes("degradation").toarray()])
        elif by == "decoder":
            profiles = np.stack([small.at(node.sae).W_dec[node.index].detach().numpy() for node in nodes])
        else:
            tokens = torch.cat([torch.stack([c, k]) for c, k in zip(small.clean, small.corrupted, strict=True)])
            _, cache = small.model.run_with_cache(tokens)
            active = {sae.cfg.metadata.hook_name: sae.encode(cache[sae.cfg.metadata.hook_name]).detach() for sae in saes}
            profiles = np.stack([active[node.sae][..., node.index].flatten().numpy() for node in nodes])
        unit = profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-300)
        groups_of(small, effects, similarity=by, size=3)
        np.testing.assert_allclose(seen[-1], unit @ unit.T, rtol=0, atol=1e-9, err_msg=by)
    groups_of(small, list(nodes), size=3)  # without a table the effects are measured first
    np.testing.assert_allclose(seen[-1], seen[0], rtol=0, atol=1e-9)


def test_no_group_is_lost_where_names_are_equal(small: Small) -> None:
    _, effects = ranked(small)
    labels = dict(zip(effects.nodes, ("a", "a (3)", "a"), strict=False))
    groups = groups_of(small, effects.nodes[:3], similarity="decoder", size=3, labels=labels)
    assert len(set(groups.names)) == 3
    assert {node for patch in groups.patches for node in patch.nodes} == set(effects.nodes[:3])


def test_groups_by_label_and_by_hook_point(small: Small) -> None:
    _, effects = ranked(small)
    labels = {
        fp.feature(small.at(node.sae), node.index or 0): ("odd" if (node.index or 0) % 2 else "even")
        for node in effects.nodes[:5]
    }
    groups = groups_of(small, effects, similarity="labels", labels=labels)
    kinds = {name: set(groups.members(name).nodes) for name in groups.names}
    assert kinds["odd"] == {node for node in effects.nodes[:5] if (node.index or 0) % 2}
    assert sorted(map(len, kinds.values()))[:3] == [1, 1, 1]  # without a label a feature is a group of its own
    groups = groups_of(small, effects, similarity="site")
    assert {name: groups.members(name).nodes[0].sae for name in groups.names} == {
        f"features of {sae}": sae for sae in {node.sae for node in effects.nodes}
    }


def test_names_are_what_members_are_active_on(demo_groups: Any) -> None:
    groups = demo_groups
    assert groups.joint.top(2).nodes == groups.joint.nodes[:2]
    assert all(name.startswith(("on ", "before ", "group ")) for name in groups.names)
    assert len(set(groups.names)) == len(groups)
    shown = repr(groups)
    assert "patched together (exact, logit_diff)" in shown
    assert "recovery_sum" in shown
    assert "degradation_sum" not in shown
    assert groups._repr_html_().count("<tr") == len(groups) + 1


@pytest.fixture(scope="module")
def demo() -> Any:
    return fp.load_demo(progress=False)


@pytest.fixture(scope="module")
def effects_of_demo(demo: Any) -> fp.Effects:
    return fp.rank_features(demo.model, demo.saes[4], demo.pairs("ioi", n=4), positions=["S2"], progress=False).top(12)


@pytest.fixture(scope="module")
def demo_groups(demo: Any, effects_of_demo: fp.Effects) -> Any:
    return fp.group_features(demo.model, demo.saes[4], demo.pairs("ioi", n=4), effects_of_demo, size=4, progress=False)


def test_groups_in_a_report_and_a_graph(demo: Any, demo_groups: Any, effects_of_demo: fp.Effects, tmp_path: Path) -> None:
    page = fp.report(effects_of_demo, tmp_path / "report.html", groups=demo_groups).read_text(encoding="utf-8")
    assert "Features that act together" in page
    assert "sum of members alone" in page
    assert demo_groups.names[0].split("'")[1] in page
    page = fp.report(demo_groups.joint, tmp_path / "joint.html").read_text(encoding="utf-8")
    assert "together" in page
    pairs = demo.pairs("ioi", n=4)
    nodes = list(demo_groups.patches[0].nodes[:2])
    graph = fp.diagram.graph(nodes, [0.1, 0.2])
    tokens = demo.model.tokenizer.convert_ids_to_tokens(pairs[0].clean)
    viewed = fp.diagram.viewer_json(
        graph, tokens=tokens, slug="g", model="demo", positions=pairs[0].labels, groups=demo_groups.patches
    )
    joint = fp.diagram.graph(demo_groups.joint.nodes[:1], [0.1])
    with pytest.raises(fp.FeatpatchError, match="is a group, which belongs to no layer"):
        fp.diagram.viewer_json(joint, tokens=tokens, slug="g", model="demo")
    (pinned,) = viewed["qParams"]["supernodes"]
    assert pinned == [demo_groups.names[0], *(node["node_id"] for node in viewed["nodes"])]


@pytest.mark.parametrize("scores", ["exact", "estimate", "eap_ig_activations"])
def test_groups_are_candidates_of_circuits(small: Small, scores: Any, tmp_path: Path) -> None:
    """A group is kept or ablated as a whole: its value is that of a circuit that keeps all of its members, or none."""
    saes, effects = ranked(small, position="all")
    one, two, *others = effects.nodes[:6]
    options: dict[str, Any] = {"saes": saes, "progress": False}
    single = fp.find_circuit(small.model, pairs_of(small), nodes=[one, two, *others], size=6, scores=scores, **options)
    group = fp.Patch((one, two), name="pair")
    circuit = fp.find_circuit(small.model, pairs_of(small), nodes=[*others, group], size=5, scores=scores, **options)
    (joined,) = (item for item in circuit.items if item.kind == "set")
    assert str(joined) == "pair together @ all"
    graph = circuit.graph
    for kept in ([joined], others, [joined, others[0]], []):
        members = [node for item in kept for node in ((one, two) if item == joined else (item,))]
        np.testing.assert_allclose(graph.values([kept]), single.graph.values([members]), rtol=0, atol=1e-12)
    assert circuit.faithfulness == pytest.approx(single.faithfulness, abs=1e-12)
    if scores != "exact":  # estimates are linear: that of the group is the sum of its members'
        by_item = dict(zip(single.graph.items, single.scores, strict=True))
        score = dict(zip(graph.items, circuit.scores, strict=True))[joined]
        assert score == pytest.approx(by_item[one] + by_item[two], abs=1e-9)
    loaded = fp.load_circuit(circuit.save(tmp_path / "circuit.json"), small.model, pairs_of(small), saes=saes)
    assert set(loaded.items) == set(circuit.items)
    assert loaded.graph.members_of(joined) == (one, two)
    assert loaded.faithfulness == pytest.approx(circuit.faithfulness, abs=1e-12)
    assert "groups" in circuit._figure().to_json()


def test_labels_of_neuronpedia(small: Small, tmp_path: Path) -> None:
    sae = small.at(RESID)
    entries = [
        {"modelId": "m", "layer": "1-res", "index": "3", "description": " names "},
        {"modelId": "m", "layer": "1-res", "index": 4, "description": "verbs"},
        {"modelId": "m", "layer": "1-res", "index": "3", "description": "another model's words"},
    ]
    whole, lines, packed = (tmp_path / name for name in ("a.json", "b.jsonl", "c.jsonl.gz"))
    whole.write_text(json.dumps(entries))
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n")
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    expected = {fp.feature(sae, 3): "names", fp.feature(sae, 4): "verbs"}
    assert all(fp.load_labels(path, sae) == expected for path in (whole, lines, packed))
    said = ["names\u2028of people", "a\x85b"]  # JSON allows these within a line
    several = [json.dumps({"index": 3 + n, "description": each}, ensure_ascii=False) for n, each in enumerate(said)]
    lines.write_bytes("\r\n".join(several).encode())
    assert list(fp.load_labels(lines, sae).values()) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "no entries"),
        (b"", "no entries"),
        (b"[1]", "an entry 1"),
        (b"[null]", "an entry null"),
        (b'[{"index": "-1", "description": "x"}]', "an entry"),
        (b'[{"index": 1, "description": ""}]', "an entry"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "can't be read"),
        (b"\x1f\x8bxx", "can't be read"),
        (b'[{"index": 1, "layer": "a", "description": "x"}, {"index": 1, "layer": "b", "description": "x"}]', "several SAEs"),
    ],
)
def test_damaged_labels(small: Small, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "labels.json"
    path.write_bytes(content)
    with pytest.raises(fp.FeatpatchError, match=said):
        fp.load_labels(path, small.at(RESID))


@pytest.mark.parametrize(
    ("nodes", "options", "said"),
    [
        ("table", {"similarity": "colour"}, "similarity='colour': expected one of effects"),
        ("table", {"size": 99}, "size=99: expected at most 8 groups"),
        ("table", {"size": 0}, "size=0"),
        ("table", {"size": 2, "least": 0.5}, "expected one of them"),
        ("table", {"least": 2.0}, "expected a cosine"),
        ("table", {"similarity": "labels"}, "similarity='labels' without labels"),
        ("table", {"similarity": "site", "size": 2}, "expected neither"),
        ("table", {"similarity": "site", "texts": ["a"]}, "expected no texts"),
        ("table", {"labels": {fp.head(0, 1): ""}}, "expected a text for each node"),
        ("table", {"labels": {fp.feature("blocks.0.hook_resid_pre", 1): "a"}}, "labels of 1 node, none of which is among"),
        ("table", {"texts": "a"}, "expected a list of at least one text"),
        ("own", {"similarity": "effects"}, "groups of your own with similarity"),
        ({}, {}, "expected groups by name"),
        ({"": []}, {}, "expected groups by name"),
        ({"a": []}, {}, r"nodes\['a'\]"),
        ([], {}, "expected a list of nodes"),
        ([fp.head(0, 1)], {}, "expected features"),
        ([fp.feature("blocks.0.hook_resid_pre", 1)], {}, "belongs to 0 of the SAEs passed"),
    ],
)
def test_what_does_not_fit(small: Small, nodes: Any, options: dict[str, Any], said: str) -> None:
    _, effects = ranked(small)
    given = effects if nodes == "table" else {"a": [effects.nodes[0]]} if nodes == "own" else nodes
    with pytest.raises(fp.FeatpatchError, match=said):
        groups_of(small, given, **options)


def test_groups_that_do_not_fit_into_circuits(small: Small) -> None:
    saes, effects = ranked(small)
    one, two = effects.nodes[:2]
    patch = fp.Patch((one, two))
    with pytest.raises(fp.FeatpatchError, match="over='edges'.*single nodes"):
        fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=[patch], over="edges")
    for nodes in ([patch, one], [patch, fp.Patch((two, effects.nodes[2]))], [patch, patch]):
        with pytest.raises(fp.FeatpatchError, match="is in several candidates: expected each node in one"):
            fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=nodes, progress=False)
    at_all = fp.Patch((one, fp.Node(one.site, "feature", one.index, "all", one.sae)))
    with pytest.raises(fp.FeatpatchError, match="overlap"):
        fp.find_circuit(small.model, pairs_of(small), saes=saes, nodes=[at_all])
    with pytest.raises(fp.FeatpatchError, match="is in a patch, with errors='in'"):
        fp.find_circuit(
            small.model, pairs_of(small), saes=saes, nodes=[fp.Patch((one, fp.Node(RESID, "error", None, "there", RESID)))]
        )


def test_ctrl_c_is_passed_on(small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Groups of a part of the effects would be wrong, so that there are none."""
    from dataclasses import replace

    from featpatch.ranking import groups

    def unfinished(*args: Any, **options: Any) -> fp.Effects:
        effects = fp.rank_nodes(*args, **options)
        return replace(effects, metadata={**effects.metadata, "finished": False})

    saes, effects = ranked(small)
    monkeypatch.setattr(groups, "rank_nodes", unfinished)
    with pytest.raises(KeyboardInterrupt, match="pass journal="):
        groups_of(small, effects)
    with pytest.raises(KeyboardInterrupt, match="resumes from there"):
        groups_of(small, list(effects.nodes), journal=tmp_path / "journal")
    assert [path.name for path in tmp_path.iterdir()] == ["journal.alone"]
    monkeypatch.undo()
    with pytest.raises(fp.FeatpatchError, match="whose ranking was interrupted"):
        groups_of(small, unfinished(small.model, pairs_of(small), effects, saes=saes, together=False, progress=False))
    resumed = groups_of(small, list(effects.nodes), journal=tmp_path / "journal")
    assert resumed.names == groups_of(small, list(effects.nodes)).names
    assert {path.name for path in tmp_path.iterdir()} == {"journal", "journal.alone"}
