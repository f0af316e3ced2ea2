"""Circuits set by hand, known edge by edge: induction, an AND gate and an OR gate, a fact of two hops; with distractors.

Imports nothing of ours.

An edge goes from what a component writes (`embed`, `L0.H3`, `L1.MLP`) to what another one reads (`L1.H2.q`, `L1.H2.k`,
`L1.H2.v`, `L0.MLP`, `logits`), at all positions. A true edge is one on the way that the difference between clean and corrupted
takes to the answer at the last position; any other edge, set to its corrupted value, changes nothing there, even where it
carries a difference. There are no norms, and a head's attention is all at one place, exactly, wherever anything reads it.

    induction    previous-token head -> key of the induction head; embedding -> its query and value; it -> logits
    gates        two heads copy a flag each -> MLP of layer 1 computes AND or OR -> logits
    two hops     subject -> MLP of layer 0 -> bridge -> head of layer 1 -> MLP of layer 2 -> answer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import constructed
import torch
from constructed import ONLY
from transformer_lens import HookedTransformer, HookedTransformerConfig

Edge = tuple[str, str]
HEADS = 4
BOS = 0
PAIRS = 8


@dataclass(frozen=True)
class ByHand:
    """A model with tokens `[pairs, pos]`, answers `[pairs]` and the true edges; no two pairs have the same tokens."""

    model: HookedTransformer
    clean: torch.Tensor
    corrupted: torch.Tensor
    correct: torch.Tensor
    wrong: torch.Tensor
    edges: frozenset[Edge]

    @property
    def nodes(self) -> frozenset[str]:
        """The senders of the true edges."""
        return frozenset(sender for sender, _ in self.edges)


def induction(kind: Literal["value", "key"] = "value") -> ByHand:
    """`... A B ... A` -> B, by head 1 of layer 0 and head 2 of layer 1; corrupted has another B ("value") or first A ("key").

    Where the induction head finds nothing, it looks at BOS and answers that. Distractors copy the answer and the first A to
    the last position in layer 0; in layer 1 one is an induction head whose output isn't read, others read what layer 0 wrote.
    """
    keys, values, fillers = range(1, 7), range(7, 13), range(13, 19)
    length, vocab = 8, 19
    wires = _Wires({"token": vocab, "is_value": 1, "previous": vocab, "junk": vocab, "out": vocab}, length, vocab, n_layers=2)
    position, token, previous, junk, out = (wires.at[name] for name in ("position", "token", "previous", "junk", "out"))
    back, here = (position[1:], position[:-1]), (position, position)
    wires.embed("token", range(vocab))
    wires.embed("is_value", values)
    wires.head(0, 0, [(None, wires.at["is_value"])], token, junk)
    wires.head(0, 1, [back], token, previous)
    wires.head(0, 2, [(token, token), here], token, junk, weights=[1.0, -1.0])
    wires.head(0, 3, [here], token, junk)
    wires.head(1, 0, [(token, previous)], token, junk)
    wires.head(1, 1, [here], junk, junk)
    wires.head(1, 2, [(token, previous)], token, out)
    wires.head(1, 3, [back], previous, junk)
    wires.unembed("out", range(vocab))

    clean, corrupted, correct, wrong = [], [], [], []
    generator = torch.Generator().manual_seed(0)
    for pair in range(PAIRS):
        (a, x), (b, c), start = _draw(keys, 2, generator), _draw(values, 2, generator), 1 + pair % (length - 3)
        prompt = [BOS, *_draw(fillers, length - 2, generator), a]
        prompt[start : start + 2] = a, b
        clean.append(prompt)
        changed = list(prompt)
        if kind == "value":
            changed[start + 1] = c
        else:
            changed[start] = x
        corrupted.append(changed)
        correct.append(b)
        wrong.append(c if kind == "value" else BOS)
    edges = {
        "value": {("embed", "L1.H2.v"), ("L1.H2", "logits")},
        "key": {("embed", "L0.H1.v"), ("L0.H1", "L1.H2.k"), ("L1.H2", "logits")},
    }
    return ByHand(wires.model, *map(torch.tensor, (clean, corrupted, correct, wrong)), frozenset(edges[kind]))


def gates(kind: Literal["and", "or"]) -> ByHand:
    """Flags are copied by heads 0 and 1 of layer 0, the MLP of layer 1 is the gate; prompts are those of `constructed`.

    Distractors: head 2 and the MLP of layer 0; in layer 1 a head that copies a flag and one that reads a copy. They write where
    only a neuron of the gate's MLP looks, which writes there, too.
    """
    first, second = constructed.A, constructed.B
    idle, out, last = constructed.IDLE, constructed.OUT, constructed.AT_LAST
    model = constructed._blank(n_layers=2, d_mlp=3)
    with torch.no_grad():
        copies = [(constructed.AT_FIRST, first), (constructed.AT_SECOND, second), (constructed.AT_FIRST, idle)]
        for head, (place, to) in enumerate(copies):
            constructed._copies(model, layer=0, head=head, place=place, to=to)
        constructed._copies(model, layer=1, head=0, place=constructed.AT_SECOND, to=idle)
        constructed._copies(model, layer=1, head=1, place=last, to=idle)
        model.blocks[1].attn.W_V[1, constructed.FLAG, 0], model.blocks[1].attn.W_V[1, first, 0] = 0.0, 1.0
        distractor, gate = model.blocks[0].mlp, model.blocks[1].mlp
        distractor.W_in[[first, second], [0, 1]] = 1.0
        distractor.W_out[[0, 1], idle] = 1.0
        for neuron, (threshold, weight) in enumerate({"and": [(1.0, 1.0)], "or": [(0.0, 1.0), (1.0, -1.0)]}[kind]):
            gate.W_in[[first, second], neuron] = 1.0
            gate.b_in[neuron] = -threshold
            gate.W_out[neuron, out] = weight
        gate.W_in[idle, 2], gate.W_out[2, idle] = 1.0, 1.0
        model.unembed.W_U[out, constructed.RIGHT] = 1.0
    built = constructed._with_prompts(model, PAIRS)
    edges = {("embed", "L0.H0.v"), ("embed", "L0.H1.v"), ("L0.H0", "L1.MLP"), ("L0.H1", "L1.MLP"), ("L1.MLP", "logits")}
    return ByHand(model, built.clean, built.corrupted, built.correct, built.wrong, frozenset(edges))


def two_hop() -> ByHand:
    """Subject to bridge (MLP of layer 0), to the last position (head 1 of layer 1), to the answer (MLP of layer 2).

    Two subjects share a bridge; corrupted prompts have a subject of another one. Distractors move subject and bridge elsewhere
    in every layer, and the MLP of layer 1 looks the answer up as well, but where nothing reads it but a neuron that isn't read.
    """
    relation, fillers, subjects, answers = 1, range(2, 8), range(8, 16), range(16, 20)
    length, vocab, kinds = 7, 20, len(answers)
    sizes = {"subject": 8, "is_subject": 1, "bridge": kinds, "moved": kinds, "junk": 8, "answer": kinds, "shadow": kinds}
    wires = _Wires(sizes, length, vocab, n_layers=3, d_mlp=16)
    subject, bridge, moved, junk, answer = (wires.at[name] for name in ("subject", "bridge", "moved", "junk", "answer"))
    shadow, here = wires.at["shadow"], (wires.at["position"], wires.at["position"])
    to_subject = (None, wires.at["is_subject"])
    bridge_of = [number % kinds for number in range(len(subjects))]
    answer_of = [(3 * number + 1) % kinds for number in range(kinds)]
    wires.embed("subject", subjects)
    wires.embed("is_subject", subjects)
    wires.head(0, 0, [to_subject], subject, junk)
    wires.head(0, 2, [here], subject, junk)
    wires.mlp(0, subject, [bridge[number] for number in bridge_of])
    wires.mlp(0, subject, junk)
    wires.head(1, 1, [to_subject], bridge, moved)
    wires.head(1, 3, [to_subject], bridge, shadow)
    wires.mlp(1, moved, [shadow[number] for number in answer_of])
    wires.mlp(1, junk, junk)
    wires.head(2, 0, [to_subject], bridge, shadow)
    wires.head(2, 2, [here], moved, shadow)
    wires.mlp(2, moved, [answer[number] for number in answer_of])
    wires.mlp(2, shadow, shadow)
    wires.unembed("answer", answers)

    clean, corrupted = [], []
    numbers = torch.arange(PAIRS), (torch.arange(PAIRS) + 1 + torch.arange(PAIRS) % 3) % len(subjects)
    generator = torch.Generator().manual_seed(0)
    for pair, (right, other) in enumerate(zip(*numbers, strict=True)):
        prompt = [BOS, *_draw(fillers, length - 2, generator), relation]
        for tokens, number in ((clean, right), (corrupted, other)):
            prompt[1 + pair % (length - 2)] = subjects[int(number)]
            tokens.append(list(prompt))
    correct, wrong = (torch.tensor([answers[answer_of[bridge_of[int(number)]]] for number in run]) for run in numbers)
    edges = {("embed", "L0.MLP"), ("L0.MLP", "L1.H1.v"), ("L1.H1", "L2.MLP"), ("L2.MLP", "logits")}
    return ByHand(wires.model, torch.tensor(clean), torch.tensor(corrupted), correct, wrong, frozenset(edges))


class _Wires:
    """A model without norms whose weights are 0 until set, and a name for each part of its stream."""

    def __init__(self, sizes: Mapping[str, int], length: int, vocab: int, **shape: int) -> None:
        self.at: dict[str, list[int]] = {}
        start = 0
        for name, size in {"position": length, **sizes}.items():
            self.at[name] = list(range(start, start + size))
            start += size
        width = max(-(-start // HEADS), length + vocab + 1)
        config = HookedTransformerConfig(
            d_model=HEADS * width, d_head=width, n_heads=HEADS, n_ctx=length, d_vocab=vocab, act_fn="relu", normalization_type=None,
            attn_only="d_mlp" not in shape, dtype=torch.float64, seed=0, **shape,
        )  # fmt: skip
        self.model = HookedTransformer(config).eval()
        self.model.requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.zero_()
        self.model.W_pos[range(length), self.at["position"]] = 1.0
        self.neurons = [0] * config.n_layers

    def embed(self, part: str, tokens: Sequence[int]) -> None:
        """Each token its own coordinate, or all the only one."""
        self.model.W_E[tokens, self.at[part]] = 1.0

    def unembed(self, part: str, tokens: Sequence[int]) -> None:
        self.model.W_U[self.at[part], tokens] = 1.0

    def head(
        self, layer: int, head: int, looks: Sequence[tuple[Sequence[int] | None, Sequence[int]]], source: Sequence[int],
        target: Sequence[int], weights: Sequence[float] = (1.0,),
    ) -> None:  # fmt: skip
        """Scores add up over looks (query coordinates or always, key coordinates); failing all, it looks at BOS."""
        attention = self.model.blocks[layer].attn
        free = 0
        for (query, key), weight in zip([*looks, (None, self.at["position"][:1])], [*weights, 0.5], strict=True):
            dimensions = range(free, free + len(key))
            free += len(key)
            attention.W_K[head, key, dimensions] = 1.0
            if query is None:
                attention.b_Q[head, dimensions] = weight * ONLY
            else:
                attention.W_Q[head, query, dimensions] = weight * ONLY
        attention.W_V[head, source, range(len(source))] = 1.0
        attention.W_O[head, range(len(target)), target] = 1.0

    def mlp(self, layer: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Adds a neuron for each source coordinate."""
        mlp, free = self.model.blocks[layer].mlp, self.neurons[layer]
        neurons = range(free, free + len(source))
        mlp.W_in[source, neurons], mlp.W_out[neurons, target] = 1.0, 1.0
        self.neurons[layer] = neurons.stop


def _draw(tokens: Sequence[int], number: int, generator: torch.Generator) -> list[int]:
    """Without repetition."""
    return [tokens[int(index)] for index in torch.randperm(len(tokens), generator=generator)[:number]]
