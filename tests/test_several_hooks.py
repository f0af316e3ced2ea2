"""Patches at several hook points: both paths of the engine against plain hooked forward passes, in float64."""

import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pytest
import torch
from architectures import BRIDGES, HOOKED, VOCAB
from test_architectures import EXACT, HOOKS, MODELS
from transformer_lens.model_bridge import TransformerBridge

from featpatch.engine.patches import BaseRun, Block, Deltas
from featpatch.engine.path import PatchPath, PlainPath, choose_path
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.sweep import units_of
from featpatch.model.transformer_lens import wrap
from featpatch.sites import layer_of

LENGTH, ANSWER, PATCHES = 8, 6, 2
MEANINGS = ("add", "set")


def hooked_logits(model: Any, tokens: torch.Tensor, changes: Mapping[str, Mapping[int, torch.Tensor]], combine: str) -> Any:
    """One plain hooked forward pass with changes by hook point and position. Imports nothing of featpatch.

    The bridge's `hook_resid_mid` is the input of the MLP's norm, which the stream goes past: there attention's output is
    changed, so that its sum with the input of the layer is what the patch asks for.
    """
    with torch.no_grad():
        _, base = model.run_with_cache(tokens)
    seen: dict[str, torch.Tensor] = {}

    def patching(name: str, added_to: str | None) -> Any:
        def change(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            new = activation.clone()
            for position, delta in changes[name].items():
                arriving = (
                    activation[0, position] if added_to is None else seen[added_to][0, position] + activation[0, position]
                )
                start = base[name][0, position] if combine == "set" else arriving
                new[0, position] = activation[0, position] + (start + delta.reshape(start.shape) - arriving)
            return new

        return change

    hooks: list[Any] = []
    for name in sorted(changes, key=lambda name: name.endswith("resid_mid")):  # after attention's output, on the same hook
        if isinstance(model, TransformerBridge) and name.endswith("hook_resid_mid"):
            entering = name.replace("resid_mid", "resid_pre")
            hooks.append((entering, lambda activation, hook, entering=entering: seen.update({entering: activation.clone()})))
            hooks.append((name.replace("resid_mid", "attn_out"), patching(name, entering)))
        else:
            hooks.append((name, patching(name, None)))
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0]


def base_run(model: Any, seed: int) -> BaseRun:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB - 1, (1, LENGTH), generator=generator)
    lens = wrap(model)
    _, entering = lens.read_entering(tokens, [], range(lens.n_layers))
    return BaseRun(f"run {seed}", tokens[0], {layer: x[0] for layer, x in entering.items()}, ANSWER, [1], [2])


def drawn(model: Any, run: BaseRun, names: Sequence[str], combine: Any, seed: int) -> Block:
    """Patches of random rows at hook points; the first one changes nothing at the lowest of them."""
    generator, lens = torch.Generator().manual_seed(seed), wrap(model)
    deltas = {}
    for number, name in enumerate(names):
        width = torch.Size(lens.shape(name)).numel()
        rows = [
            (patch, p) for patch in range(PATCHES) for p in range(2, LENGTH) if (patch or number) and (p + patch + number) % 2
        ]
        patch, position = torch.tensor(rows).T
        values = torch.randn(len(rows), width, generator=generator, dtype=torch.float64)
        deltas[name] = Deltas.explicit(patch, position, values, PATCHES)
    return Block(" ".join(names), run, deltas, torch.arange(PATCHES), combine)


def logits_of(path: PatchPath, blocks: Sequence[Block]) -> dict[tuple[int, int], torch.Tensor]:
    """The logits of every patch, by block and patch, with all units of a group in one batch."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    units = sorted(units_of(blocks, causal=path.lens.causal), key=lambda unit: str(path.group(unit)))
    for _, group in groupby(units, key=path.group):
        together = list(group)
        for unit, logits in zip(together, path.logits(together, [None] * len(together)), strict=True):
            (index,) = (number for number, block in enumerate(blocks) if block.deltas is unit.deltas)
            found.update({(index, int(patch)): row for patch, row in zip(unit.patches, logits, strict=True)})
    return found


def check(model: Any, path: PatchPath, blocks: Sequence[Block]) -> None:
    path.prepare([block.run for block in blocks])
    found = logits_of(path, blocks)
    assert len(found) == PATCHES * len(blocks)
    for (index, patch), logits in found.items():
        block = blocks[index]
        changes: dict[str, dict[int, torch.Tensor]] = {}
        for name, deltas in block.deltas.items():
            rows = (deltas.patch == patch).nonzero()[:, 0]
            changes[name] = {int(deltas.position[row]): deltas.directions[deltas.direction[row]] for row in rows}
        expected = hooked_logits(model, block.run.tokens[None], changes, block.combine)[block.run.answer]
        torch.testing.assert_close(logits, expected, rtol=0, atol=EXACT, msg=f"{block.name} {block.combine} {patch}")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_patches_at_several_hook_points_are_hooked_forward_passes(kind: str, name: str) -> None:
    """Law 4 for sets of hook points, of both meanings, with different sets in one batch, on both paths."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    lens = wrap(model)
    known = [f"blocks.{layer}.{hook}" for layer in range(lens.n_layers) for hook in HOOKS]
    known = [hook for hook in known if hook in model.hook_dict and not (lens.attention_only and hook.endswith("mlp_out"))]
    runs = [base_run(model, seed) for seed in (1, 2)]
    chance = random.Random(f"{kind} {name}")
    sets = [known, *(sorted(chance.sample(known, size), key=known.index) for size in (2, 3))]
    for combine in MEANINGS:
        blocks = [drawn(model, runs[n % 2], hooks, combine, n) for n, hooks in enumerate(sets)]
        path = choose_path(lens, runs, [(tuple(hooks), combine) for hooks in sets])
        assert isinstance(path, SuffixPath) == (name not in SLOW)
        check(model, path, blocks)
        check(model, PlainPath(lens), blocks[1:])


SLOW: frozenset[str] = frozenset()


def test_the_two_meanings_differ() -> None:
    """A change of the lower hook point moves what arrives at the higher one, which "set" replaces and "add" keeps."""
    model = BRIDGES["gpt2"]()
    run = base_run(model, 3)
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"]
    added, put = (drawn(model, run, hooks, combine, 0) for combine in MEANINGS)
    path = choose_path(wrap(model), [run], [(tuple(hooks), "set")])
    one, other = (logits_of(path, [block]) for block in (added, put))
    assert float((one[0, 1] - other[0, 1]).detach().abs().max()) > 1e-3
    alone = Block("alone", run, {hooks[1]: put.deltas[hooks[1]]}, put.patches)
    assert torch.allclose(logits_of(path, [alone])[0, 0], other[0, 0], atol=EXACT), "without a change below they agree"
    assert layer_of(hooks[0]) == 0
