"""The recipes of CONTRIBUTING.md do what they say, on the small model."""

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from kinds import pairs_of
from small import FEATURES, WIDTH, Small
from test_execution import Noting, same

import featpatch as fp
from featpatch import metrics, sites
from featpatch.engine.ray import EXECUTORS
from featpatch.patching.ablation_values import ABLATION_VALUES
from featpatch.sae import dictionary

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
SITE = "blocks.1.hook_resid_pre"


def added(path: str) -> dict[str, Any]:
    """What a block defines, in the file that it names: a new one, or one that is there."""
    module = path.removesuffix(".py").replace("/", ".")
    found = dict(vars(import_module(module))) if (ROOT / path).exists() else {"__name__": module}
    exec(BLOCKS[path], found)
    return found


def entry(path: str) -> Any:
    """The value of the last line of a block, which is to be added to a table of the file."""
    last = ast.parse(BLOCKS[path]).body[-1]
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), path, "eval"), added(path))


def ranked(small: Small, **options: Any) -> fp.Effects:
    return fp.rank_features(small.model, pairs=pairs_of(small), progress=False, **{"saes": small.at(SITE), **options})


def test_the_metric(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = entry("featpatch/metrics.py")
    logits = torch.tensor([[0.0, 5.0, 3.0, 4.0]])
    assert float(measure(logits, [1, 2], [0])) == 1
    monkeypatch.setitem(metrics.MEASURES, measure.name, measure)
    assert ranked(bridge, metric="margin").metadata["metric"] == "margin"


def test_the_task() -> None:
    known: dict[str, int] = {}
    task = added("featpatch/tasks/agreement.py")
    pairs = task["agreement"](
        lambda text: [known.setdefault(word, len(known)) for word in text.split()], 24, corruptions=task["CORRUPTIONS"]
    )
    words = list(known)
    for pair in pairs:
        here, there = (words[run[pair.labels["subject"]]] for run in (pair.clean, pair.corrupted))
        assert here.endswith("s") != there.endswith("s")
        assert [words[token] for token in pair.correct] == ["are" if here.endswith("s") else "is"]


def test_the_kind(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an object with encode and decode, bit by bit where both decode."""
    codec = added("featpatch/sae/gained.py")["GainedCodec"]
    monkeypatch.setattr(dictionary, "CODECS", (*dictionary.CODECS, codec))
    sizes = {
        "W_enc": (WIDTH, FEATURES),
        "b_enc": (FEATURES,),
        "gain": (FEATURES,),
        "W_dec": (FEATURES, WIDTH),
        "b_dec": (WIDTH,),
    }
    generator = torch.Generator().manual_seed(0)
    w = {name: 0.4 * torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}

    class ByHand:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.clamp(x @ w["W_enc"] + w["b_enc"], min=0) * w["gain"]

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return features @ w["W_dec"] + w["b_dec"]

    found = ranked(bridge, saes={"hook": SITE, **w})
    expected = ranked(bridge, saes=fp.dictionaries.adapt(ByHand(), SITE, d_in=WIDTH))
    assert found.nodes == expected.nodes
    np.testing.assert_allclose(found.denoised, expected.denoised, atol=1e-10)
    with pytest.raises(fp.FeatpatchError, match="the SAE has hook, gain: expected hook, W_enc"):
        ranked(bridge, saes={"hook": SITE, "gain": w["gain"]})


def test_the_ablation(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, make),) = entry("featpatch/patching/ablation_values.py").items()
    monkeypatch.setitem(ABLATION_VALUES, name, make)
    pair = pairs_of(bridge)[:1]
    effects = fp.ablate(bridge.model, pair, sites="resid_pre", layers=[1], to="median", positions=[6], progress=False)
    runs = [oracle.activations(bridge.model, tokens[:1])[SITE][0] for tokens in (bridge.clean, bridge.corrupted)]
    new = oracle.activations(bridge.model, bridge.clean[:1])[SITE].clone()
    new[0, 6] = torch.cat(runs).sort(0).values[6]
    with torch.no_grad():
        logits = bridge.model.run_with_hooks(bridge.clean[:1], fwd_hooks=[(SITE, lambda x, hook: new)])
    expected = oracle.logit_diff(logits, int(bridge.correct[0]), int(bridge.wrong[0]))
    assert effects.noised[0] == pytest.approx(expected, abs=1e-9)


def test_the_executor(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = added("featpatch/engine/threads.py")["Threads"]
    monkeypatch.setitem(EXECUTORS, "threads", threads)
    noting = Noting(threads())
    same(ranked(bridge, executor=noting, batch_rows=20), ranked(bridge, batch_rows=20))
    assert 1 < len(noting.keys) == len(set(noting.keys))
    assert ranked(bridge, executor="threads").finished
    with pytest.raises(fp.FeatpatchError, match="workers=0: expected an integer, 1 or more"):
        threads(workers=0)


def test_the_site(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of what the MLP makes of one position: as the patch of what it adds to the stream."""
    for table in (sites.WHOLE, sites.COMPONENTS):
        for name, hook in entry("featpatch/sites.py").items():
            monkeypatch.setitem(table, name, hook)
    with pytest.warns(fp.SlowPathWarning):
        inside = fp.rank_components(bridge.model, pairs_of(bridge), sites="mlp_pre", positions=[6], progress=False)
    outside = fp.rank_components(bridge.model, pairs_of(bridge), sites="mlp_out", positions=[6], progress=False)
    np.testing.assert_allclose(inside.denoised, outside.denoised, atol=1e-9)
