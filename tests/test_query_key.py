"""Query-key attribution, against scores by hand with norms frozen, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, HEADS, HOOKED, LAYERS, VOCAB
from graph_oracle import Frozen, frozen_norm
from small import standard

import featpatch as fp

EXACT = 1e-10
EVERY = {"bridge": BRIDGES, "hooked": HOOKED}
MODELS = [(kind, name) for kind, models in EVERY.items() for name in models]
LAYER, HEAD, QUERY, KEY = 1, 2, 4, 2


def rotated(frozen: Frozen, x: torch.Tensor, at: int) -> torch.Tensor:
    """Rotary positions by pairs of dimensions, each turned by its angle."""
    attn = frozen.model.blocks[LAYER].attn
    if f"blocks.{LAYER}.attn.hook_cos" in frozen.cache:
        cos, sin = (frozen.at(LAYER, f"attn.hook_{name}").reshape(len(frozen.tokens[0]), -1)[at] for name in ("cos", "sin"))
    elif getattr(attn, "rotary_cos", None) is not None and frozen.model.cfg.positional_embedding_type == "rotary":
        cos, sin = attn.rotary_cos[at], attn.rotary_sin[at]
    else:
        return x
    half, out = len(cos) // 2, x.clone()
    adjacent = getattr(frozen.model.cfg, "rotary_adjacent_pairs", False)
    for i, j in [(2 * n, 2 * n + 1) if adjacent else (n, n + half) for n in range(half)]:
        out[i], out[j] = x[i] * cos[i] - x[j] * sin[i], x[j] * cos[i] + x[i] * sin[i]
    return out


def projected(frozen: Frozen, x: torch.Tensor, side: str, at: int, head: int) -> torch.Tensor:
    """The query or key of a head for a residual stream `x`, with the scales that norms have on the prompt."""
    block = frozen.model.blocks[LAYER]
    attn, own = block.attn, frozen.at(LAYER, "hook_resid_pre")[at]
    weight = getattr(attn, f"W_{side.upper()}")
    bias = frozen.bias(attn, f"b_{side.upper()}")
    shared = head * len(weight) // HEADS

    def flat(stream: torch.Tensor) -> torch.Tensor:
        y = frozen_norm(getattr(block, "ln1", None), stream, own, frozen.eps)
        return y @ weight[shared] + (bias[shared] if isinstance(bias, torch.Tensor) else 0)

    found = flat(x)
    norm = getattr(attn, f"{side}_norm", None)
    return rotated(frozen, frozen_norm(norm, found, flat(own), frozen.eps) if norm is not None else found, at)


def scale_of(model: Any) -> float:
    attn = model.blocks[LAYER].attn
    original = getattr(attn, "original_component", None)
    if original is None:
        return 1 / float(attn.attn_scale)
    return float(getattr(original, "scaling", model.cfg.d_head**-0.5))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("head", [1, HEAD])
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_pairs_sum_to_the_score_and_are_its_mixed_differences(kind: str, name: str, head: int) -> None:
    """The score by hand gives the model's pattern; what a pair adds is what is lost without both but not without either."""
    model = EVERY[kind][name]()
    tokens = torch.randint(1, VOCAB - 1, (1, 5), generator=torch.Generator().manual_seed(3))
    sae = standard(f"blocks.{LAYER}.hook_resid_pre", 4)
    found = fp.qk_attribution(model, sae, tokens[0].tolist(), LAYER, head, query=QUERY, key=KEY)
    frozen = Frozen(model, tokens, "mlp.hook_in")
    stream, factor = frozen.at(LAYER, "hook_resid_pre"), scale_of(model)

    def score(query: torch.Tensor, key: torch.Tensor, at: int = KEY) -> float:
        both = projected(frozen, query, "q", QUERY, head), projected(frozen, key, "k", at, head)
        return float(factor * both[0] @ both[1])

    with torch.no_grad():
        every = torch.tensor([score(stream[QUERY], stream[at], at) for at in range(QUERY + 1)], dtype=torch.float64)
        pattern = frozen.at(LAYER, "attn.hook_pattern")[head, QUERY, : QUERY + 1]
        cap = {"gemma2": 2.0}.get(name)
        capped = every if cap is None else cap * torch.tanh(every / cap)
        capped = torch.where(pattern > 0, capped, -torch.inf)
        assert (capped.softmax(0) - pattern).abs().max() < EXACT
        assert abs(found.score - every[KEY]) < EXACT
        assert abs(found.residual()) < EXACT
        acts = sae.encode(stream)
        error = stream - sae.decode(acts)
        sides = []
        for parts, at in ((found.queries, QUERY), (found.keys, KEY)):
            assert [part.index for part in parts[:-2]] == acts[at].nonzero()[:, 0].tolist()
            assert (parts[-2].kind, parts[-1]) == ("error", None)
            sides.append([acts[at, part.index] * sae.W_dec[part.index] for part in parts[:-2]] + [error[at]])
        query, key = stream[QUERY], stream[KEY]
        for i, one in enumerate(sides[0]):
            for j, other in enumerate(sides[1]):
                mixed = (
                    score(query, key) - score(query - one, key) - score(query, key - other) + score(query - one, key - other)
                )
                assert abs(found.values[i, j] - mixed) < EXACT
        none = [sum(side) for side in sides]
        for i, one in enumerate(sides[0]):
            alone = score(query, key - none[1]) - score(query - one, key - none[1])
            assert abs(found.values[i, -1] - alone) < EXACT
        assert abs(found.values[-1, -1] - score(query - none[0], key - none[1])) < EXACT


def test_tables_and_errors() -> None:
    demo = fp.load_demo(progress=False)
    pair = demo.pairs("ioi", n=1)[0]
    found = fp.qk_attribution(demo.model, demo.saes, pair, 1, 3, query="end", key="S2")
    assert (found.query, found.key) == (pair.labels["end"], pair.labels["S2"])
    table = found.to_pandas(4)
    assert abs(table["score"]).tolist() == sorted(abs(found.values).flatten(), reverse=True)[:4]
    for side, axis in (("query", 1), ("key", 0)):
        assert abs(found.to_pandas(None, of=side)["score"].sum() - found.values.sum()) < 1e-3
        assert np.isclose(found.to_pandas(1, of=side)["score"].iloc[0], max(found.values.sum(axis), key=abs))
    assert repr(found).startswith(f"score {found.score:.3f} of layer 1 head 3 from {found.query} ")
    with torch.no_grad():
        _, cache = demo.model.run_with_cache(torch.tensor([pair.clean]))
    shares = cache["blocks.1.attn.hook_pattern"][0, 3, found.query]
    other = fp.qk_attribution(demo.model, demo.saes, pair, 1, 3, query="end", key="IO")
    ratio = float((shares[found.key] / shares[other.key]).log())
    assert abs(found.score - other.score - ratio) < 1e-3  # the softmax compares scores
    for change, message in (
        ({"layer": LAYERS + 9}, "expected a layer from 0 to 3"),
        ({"query": 1, "key": 5}, "expected a key at or before the query"),
        ({"key": "nowhere"}, r"key='nowhere': expected a token index or a label of one token \(.*S2"),
        ({"saes": demo.crosscoder}, "0 of the SAEs are at the residual stream that layer 1 reads: expected one"),
    ):
        given = {"saes": demo.saes, "layer": 1, "head": 3, "key": 1, **change}
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.qk_attribution(demo.model, given.pop("saes"), pair, given.pop("layer"), given.pop("head"), **given)
