"""Path patching by plain hooks on the whole model, one path at a time. Imports nothing of ours but the other oracle's cache."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from oracle import activations

Hook = tuple[str, Callable[..., Any]]


@torch.no_grad()
def path_patch(
    model: Any,
    base: torch.Tensor,
    source: torch.Tensor,
    sender: "End",
    receiver: "End",
    *,
    freeze_mlps: bool,
    freeze_attention: bool = True,
) -> torch.Tensor:
    """Logits `[pos, d_vocab]` of the base run with the receiver changed as the sender changes it.

    Tokens are `[pos]`. What is frozen between the two is set to its base value by hooks, but for the parts that the sender and
    the receiver themselves are. Pass 1 reads the receiver, pass 2 sets it.
    """
    of_base, of_source, there = activations(model, base[None]), activations(model, source[None]), model.hook_dict
    frozen: list[Hook] = []
    for layer in range(model.cfg.n_layers):
        names = [*(["hook_attn_out"] if freeze_attention else []), *(["hook_mlp_out"] if freeze_mlps else [])]
        for name in (f"blocks.{layer}.{name}" for name in names):
            if name in there and name not in sender.moves:
                frozen.append((name, lambda x, hook, value=of_base[name]: value.clone()))
    found: dict[str, torch.Tensor] = {}

    readers: list[Hook] = [(name, lambda x, hook, name=name: found.update({name: x.clone()})) for name in receiver.reads]
    model.run_with_hooks(base[None], fwd_hooks=[*sender.set(of_base, of_source), *readers, *frozen])
    new = {**{name: of_base[name] for name in [*receiver.reads, receiver.site]}, **found}
    return model.run_with_hooks(base[None], fwd_hooks=receiver.set(of_base, new))[0]


class End:
    """A node by hooks.

    Args:
        site: where it is set.
        reads: what its value is read from.
        moves: attention or MLP outputs that it is a part of, which are not frozen when it sends.
        swapped: the activation at the site with the node's value taken from other activations: `(base, source, x) -> x'`.
    """

    def __init__(
        self,
        site: str,
        swapped: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor],
        reads: tuple[str, ...] = (),
        moves: tuple[str, ...] = (),
    ) -> None:
        self.site, self.swapped, self.reads, self.moves = site, swapped, reads or (site,), moves

    def set(self, base: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> list[Hook]:
        return [(self.site, lambda x, hook: self.swapped(base, source, x))]


def whole(site: str, positions: Any = slice(None)) -> End:
    def swapped(base: Any, source: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, positions] += source[site][:, positions] - base[site][:, positions]
        return x

    return End(site, swapped, moves=(site,))


def head(site: str, index: int, positions: Any = slice(None)) -> End:
    def swapped(base: Any, source: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, positions, index] = source[site][:, positions, index]
        return x

    return End(site, swapped, moves=(site.replace("attn.hook_z", "hook_attn_out"),))


def feature(sae: Any, index: int, positions: Any = slice(None)) -> End:
    reads, writes = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name

    def swapped(base: Any, source: Any, x: torch.Tensor) -> torch.Tensor:
        f_base, f_source = (sae.encode(of[reads]) for of in (base, source))
        mixed = f_base.clone()
        mixed[:, positions, index] = f_source[:, positions, index]
        return x + sae.decode(mixed).reshape(x.shape) - sae.decode(f_base).reshape(x.shape)

    return End(writes, swapped, reads=(reads,), moves=(writes, writes.replace("attn.hook_z", "hook_attn_out")))


def error(sae: Any) -> End:
    reads, writes = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name

    def swapped(base: Any, source: Any, x: torch.Tensor) -> torch.Tensor:
        e_base, e_source = (of[writes] - sae.decode(sae.encode(of[reads])).reshape(x.shape) for of in (base, source))
        return x + e_source - e_base

    return End(writes, swapped, reads=(reads, writes), moves=(writes, writes.replace("attn.hook_z", "hook_attn_out")))
