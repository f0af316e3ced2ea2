"""Circuits set by hand, whose answers to patching are known: an AND gate, an OR gate, a backup head, paths that cancel.

Imports nothing of ours.

A prompt is FLAG filler FLAG filler filler, and the last position answers. Every flag is ON (1) in clean and OFF (0) in
corrupted prompts. A head uses one of its dimensions. From the last position it attends to one place with a score so large that
it is all of its attention, exactly; nothing reads what it does at other positions. The last of the four heads copies nothing.

    AND gate     logit = relu(a + b - 1)
    OR gate      logit = relu(a + b) - relu(a + b - 1)
    backup       logit = main + backup, where the backup head copies the flag only if main = 0
    cancelling   logit = a + relu(0.5 - a)

where a, b and main are what heads of layer 0 copy from a flag.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

OFF, ON, RIGHT, WRONG, FILLER = range(5)
"""Token ids; fillers are those from FILLER on."""

FIRST, SECOND, LAST, LENGTH = 0, 2, 4, 5
"""Positions of the flags and of the answer, and tokens of a prompt."""

FLAG, AT_FIRST, AT_SECOND, AT_LAST, A, B, IDLE, OUT = range(8)
"""Coordinates of the stream: is this token ON, is this position the first flag's, the second's, the last; what heads wrote."""

HEADS, D_HEAD = 4, 2
ONLY = 1e4
"""Scores that differ by this are all or nothing, exactly."""


@dataclass(frozen=True)
class Constructed:
    """A model with tokens `[pairs, pos]` and answers `[pairs]`; pairs differ in their fillers."""

    model: HookedTransformer
    clean: torch.Tensor
    corrupted: torch.Tensor
    correct: torch.Tensor
    wrong: torch.Tensor


def and_gate() -> Constructed:
    """Heads 0 and 1 of layer 0 copy a flag each, head 2 copies one where nothing reads it; each flag alone is nothing."""
    return _gate({1.0: 1.0})


def or_gate() -> Constructed:
    """The same heads, of which each alone is enough."""
    return _gate({0.0: 1.0, 1.0: -1.0})


def backup() -> Constructed:
    """Head 0 of layer 0 copies the first flag; head 0 of layer 1 does so if that one wrote 0, else it looks at itself.

    In the clean run the backup is inhibited, in the corrupted one there is nothing to copy: it writes 0 in both.
    """
    model = _blank(n_layers=2, attn_only=True)
    with torch.no_grad():
        _copies(model, layer=0, head=0, place=AT_FIRST, to=A)
        _copies(model, layer=1, head=0, place=AT_FIRST, to=B)
        model.blocks[1].attn.W_Q[0, A, 0] = -2 * ONLY
        model.blocks[1].attn.W_K[0, AT_LAST, 0] = -1.0
        model.unembed.W_U[[A, B], RIGHT] = 1.0
    return _with_prompts(model)


def cancelling() -> Constructed:
    """Head 0 of layer 0 copies the first flag; while it is off, the direct path and that through layer 1 cancel in the slope."""
    model = _blank(n_layers=2, d_mlp=1)
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        _copies(model, layer=0, head=0, place=AT_FIRST, to=A)
        mlp.W_in[A, 0], mlp.b_in[0], mlp.W_out[0, OUT] = -1.0, 0.5, 1.0
        model.unembed.W_U[[A, OUT], RIGHT] = 1.0
    return _with_prompts(model)


def _gate(neurons: Mapping[float, float]) -> Constructed:
    """The sum over neurons of weight * relu(a + b - threshold), given as weights by threshold."""
    model = _blank(n_layers=1, d_mlp=len(neurons))
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        for head, (place, to) in enumerate([(AT_FIRST, A), (AT_SECOND, B), (AT_FIRST, IDLE)]):
            _copies(model, layer=0, head=head, place=place, to=to)
        for neuron, (threshold, weight) in enumerate(neurons.items()):
            mlp.W_in[[A, B], neuron] = 1.0
            mlp.b_in[neuron] = -threshold
            mlp.W_out[neuron, OUT] = weight
        model.unembed.W_U[OUT, RIGHT] = 1.0
    return _with_prompts(model)


def _blank(**shape: int) -> HookedTransformer:
    """Every weight is 0, but for the embeddings of ON and of the positions."""
    config = HookedTransformerConfig(
        d_model=HEADS * D_HEAD, d_head=D_HEAD, n_heads=HEADS, n_ctx=LENGTH, d_vocab=10, act_fn="relu", normalization_type=None, dtype=torch.float64, seed=0,
        **shape,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[ON, FLAG] = 1.0
        for position, place in ((FIRST, AT_FIRST), (SECOND, AT_SECOND), (LAST, AT_LAST)):
            model.W_pos[position, place] = 1.0
    return model


def _copies(model: HookedTransformer, *, layer: int, head: int, place: int, to: int) -> None:
    """The head copies FLAG from a place to the last position, at another coordinate."""
    attention = model.blocks[layer].attn
    attention.W_Q[head, AT_LAST, 0] = ONLY
    attention.W_K[head, place, 0] = 1.0
    attention.W_V[head, FLAG, 0] = 1.0
    attention.W_O[head, 0, to] = 1.0


def _with_prompts(model: HookedTransformer, pairs: int = 4) -> Constructed:
    clean = torch.randint(FILLER, model.cfg.d_vocab, (pairs, LENGTH), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    clean[:, [FIRST, SECOND]], corrupted[:, [FIRST, SECOND]] = ON, OFF
    return Constructed(model, clean, corrupted, torch.full((pairs,), RIGHT), torch.full((pairs,), WRONG))
