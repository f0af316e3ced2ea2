"""A table's rows come out again; a changed value, another model or other pairs do not pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from small import Small, small_bridge, standard
from test_cross import simple_clt
from test_sets import pairs_of

import featpatch as fp
from featpatch.metrics import size

OPTIONS: dict[str, Any] = {"progress": False}


def table_of(kind: str, small: Small) -> tuple[fp.Effects, Any]:
    """A table, and the SAEs of its features."""
    saes = [small.at("blocks.1.hook_resid_pre"), small.saes[-1]]
    senders = [fp.Node("blocks.0.attn.hook_z", "head", n) for n in range(4)]
    receivers = ["logits", fp.Node("blocks.2.attn.hook_k", "head", 1)]
    pairs = pairs_of(small)
    if kind == "features":
        return fp.rank_features(small.model, saes, pairs, positions="each", metric=["logit_diff", "prob"], **OPTIONS), saes
    if kind == "components":
        return fp.rank_components(small.model, pairs, sites=["z", "k", "mlp_out"], **OPTIONS), None
    return fp.rank_paths(small.model, pairs, senders=senders, receivers=receivers, **OPTIONS), None


@pytest.mark.parametrize("kind", ["features", "components", "paths"])
def test_rows_come_out_again(small: Small, tmp_path: Path, kind: str) -> None:
    table, saes = table_of(kind, small)
    table = fp.Effects.load(table.save(tmp_path / "table.safetensors"))
    found = fp.verify(table, small.model, pairs_of(small), saes=saes, rows=12, **OPTIONS)
    assert found.ok
    assert len(found.nodes) == min(12, len(table))
    assert max(found.differences) < 1e-9
    assert "random rows measured again, reproduced" in repr(found)
    changed = table.denoised.copy()
    changed[table.row == table.nodes.index(found.nodes[3])] += 1e-3 * max(
        abs(table.gap.mean()), size(table.clean, table.corrupted)
    )
    forged = fp.verify(replace(table, denoised=changed), small.model, pairs_of(small), saes=saes, rows=12, **OPTIONS)
    assert not forged.ok
    assert forged.table()["row"][0] == str(found.nodes[3])
    assert forged.table()["difference"][0] == pytest.approx(1e-3, rel=1e-3)
    kept = table.row != table.nodes.index(found.nodes[0])
    columns = {name: getattr(table, name)[kept] for name in ("row", "pair", "denoised", "noised")}
    missing = fp.verify(replace(table, **columns, others={}), small.model, pairs_of(small), saes=saes, rows=12, **OPTIONS)
    assert np.isinf(max(missing.differences))
    older = replace(table, metadata={**table.metadata, "versions": {**table.metadata["versions"], "torch": "1.0"}})
    assert fp.verify(older, small.model, pairs_of(small), saes=saes, rows=1, **OPTIONS).versions[0].startswith("torch: 1.0 -> ")


@pytest.mark.parametrize("combine", [None, "add", "set"])
def test_patches_at_several_hook_points_come_out_again(combine: Any) -> None:
    """With the meaning of the table, in a ranking of features, of nodes alone, and of nodes with their joint patch."""
    small, clt = small_bridge(), simple_clt()
    pairs, options = pairs_of(small), {**OPTIONS, "combine": combine}
    ranked = fp.rank_features(small.model, clt, pairs, **options)
    low = [node for node in ranked.top(8, kind="feature").nodes if not node.site.startswith("blocks.2")][:2]
    tables = [ranked, *(fp.rank_nodes(small.model, pairs, low, saes=clt, together=both, **options) for both in (False, True))]
    for table in tables:
        found = fp.verify(table, small.model, pairs, saes=clt, rows=len(table), **OPTIONS)
        assert max(found.differences) < 1e-9
        alone = fp.verify(table.where(kind="feature"), small.model, pairs, saes=clt, rows=2, **OPTIONS)
        assert max(alone.differences) < 1e-9


def test_rows_that_a_table_does_not_store(small: Small) -> None:
    sae, pairs = small.at("blocks.1.hook_resid_pre"), pairs_of(small)
    ranked = fp.rank_features(small.model, sae, pairs, **OPTIONS)
    nodes = ranked.top(3, kind="feature").nodes
    joint = fp.rank_nodes(small.model, pairs, [nodes[0], fp.Patch(nodes[1:], "two")], saes=sae, **OPTIONS)
    like = fp.rank_nodes(small.model, pairs, [fp.Patch(nodes[1:]), nodes[0], ranked.top(4).nodes[3]], saes=sae, **OPTIONS)
    random = fp.random_controls(small.model, sae, pairs, n=3, **OPTIONS).random
    for table, message in (
        (joint, "the row 'two together @ all' is of several nodes or of a random direction"),
        (like, "the row '2 nodes together @ all' is of several nodes"),
        (random, "of a random direction"),
        (ranked.where(kind="feature", index=10**6), "the table has no rows: expected at least one"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.verify(table, small.model, pairs, saes=sae, **OPTIONS)
    assert fp.verify(joint.where(kind="feature"), small.model, pairs, saes=sae, **OPTIONS).ok


def test_what_is_refused(small: Small) -> None:
    table, saes = table_of("features", small)
    estimate = fp.rank_features(small.model, saes, pairs_of(small), method="atp", **OPTIONS)
    interrupted = replace(table, metadata={**table.metadata, "finished": False})
    for changed, message in (
        ({"pairs": pairs_of(small, [0, 1])}, "pairs differs from that of the table"),
        ({"saes": [standard(saes[0].cfg.metadata.hook_name, 99), saes[1]]}, "differs from that of the table"),
        ({"saes": saes[:1]}, "the table was measured with .*: expected these SAEs too"),
        ({"saes": None}, "pass them with saes=, or --sae for each"),
        ({"rows": 0}, "rows=0"),
        ({"effects": estimate}, "the table holds estimates, .*: expected exact effects"),
        ({"effects": interrupted}, "as after Ctrl-C, only some of its pairs: expected exact effects"),
        ({"effects": fp.ablate(small.model, pairs_of(small), sites="z", to="mean", **OPTIONS)}, "expected exact effects"),
    ):
        options: dict[str, Any] = {"effects": table, "pairs": pairs_of(small), "saes": saes, **OPTIONS, **changed}
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.verify(model=small.model, **options)


def test_on_the_command_line(tmp_path: Path) -> None:
    demo = fp.load_demo()
    site = "blocks.3.hook_resid_post"
    lines = (demo.folder / "pairs" / "capitals.jsonl").read_text().splitlines()[:2]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    given = ["--model", demo.folder / "model", "--sae", demo.folder / "saes" / site, "--pairs", "pairs.jsonl"]
    ranked = run("rank", *given, "--positions", "end", "--out", "r", folder=tmp_path)
    assert ranked.returncode == 0, ranked.stderr
    done = run("verify", "r/effects.safetensors", *given, "--rows", "5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 random rows measured again, reproduced" in done.stdout.replace("\n", " ")
    table = fp.Effects.load(tmp_path / "r" / "effects.safetensors")
    replace(table, denoised=table.denoised + 1).save(tmp_path / "r" / "forged.safetensors")
    forged = run("verify", "r/forged.safetensors", *given, "--json", folder=tmp_path)
    assert forged.returncode == 1
    assert '"ok": false' in forged.stdout
    (tmp_path / "one.jsonl").write_text(lines[0])
    other = run("verify", "r/effects.safetensors", *given[:-1], "one.jsonl", folder=tmp_path)
    assert other.returncode == 2
    assert "error: pairs differs from that of the table: expected the one that it was" in " ".join(other.stderr.split())
