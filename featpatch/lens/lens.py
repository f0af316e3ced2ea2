"""The verbs that featpatch needs of a model, the same for every foreign library: read, edit, resume."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from transformer_lens.hook_points import HookPoint

from featpatch import sites
from featpatch.errors import FeatpatchError

Edit = Callable[[torch.Tensor], torch.Tensor | None]
"""A function from an activation to its new value, or to None where it stays as it is."""


@dataclass
class Fired:
    """How often an edit was made; a patch that never fires is an error."""

    count: int = 0


@dataclass(frozen=True)
class Lens(ABC):
    """A model with named hook points. `model` is left as it was found, also after an exception.

    Raises:
        FeatpatchError: the model drops out activations at random, or SAEs are attached to it.
    """

    model: Any
    hook_points: Mapping[str, HookPoint] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dropout = [module for module in self.model.modules() if isinstance(module, torch.nn.Dropout)]
        if any(module.training and module.p > 0 for module in dropout):
            raise FeatpatchError("the model is in training mode with dropout: expected repeatable runs; call model.eval()")
        if getattr(self.model, "acts_to_saes", None):
            raise FeatpatchError(
                f"SAEs are attached to the model at {', '.join(self.model.acts_to_saes)}: expected the unmodified model; "
                "call model.reset_saes() and pass the SAEs to featpatch instead"
            )
        object.__setattr__(self, "hook_points", self.model.hook_dict)

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return int(self.model.cfg.n_layers)

    @cached_property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return next(self.model.parameters()).device

    def site(self, name: str) -> str:
        """The TransformerLens name of a hook; raises FeatpatchError where the model has no such hook."""
        return sites.canonical(name, self.hook_points)

    @contextmanager
    def edit(self, site: str, change: Edit) -> Iterator[Fired]:
        """Within this context every call of the model passes the activation at `site` through `change`."""
        point, firing = self.hook_points[self.site(site)], Fired()

        def hook(activation: torch.Tensor, hook: object) -> torch.Tensor | None:
            changed = change(activation)
            firing.count += changed is not None
            return changed

        point.add_hook(hook)
        handle = point.fwd_hooks[-1]
        try:
            yield firing
        finally:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)

    @torch.no_grad()
    def run(
        self, tokens: Int[torch.Tensor, "batch pos"], read: Sequence[str] = ()
    ) -> tuple[Float[torch.Tensor, "batch pos d_vocab"], dict[str, torch.Tensor]]:
        """Logits, and the activations `[batch, pos, ...]` at the hooks to read.

        Raises:
            FeatpatchError: a hook does not exist, is switched off, or holds values that are not finite.
        """
        activations: dict[str, torch.Tensor] = {}

        def reader(name: str) -> Edit:
            def keep(activation: torch.Tensor) -> None:
                activations[name] = activation.detach()

            return keep

        with ExitStack() as stack:
            for name in read:
                stack.enter_context(self.edit(name, reader(name)))
            logits = self.model(tokens.to(self.device))
        for name in read:
            if name not in activations:
                raise FeatpatchError(
                    f"hook {name!r} exists but did not fire: expected a hook of every forward pass; "
                    "some hooks must be switched on first (model.set_use_hook_mlp_in(True), ...)"
                )
            if not torch.isfinite(activations[name]).all():
                raise FeatpatchError(
                    f"the activation at {name!r} holds NaN or infinite values: expected finite numbers; "
                    "check the model's weights, or run it in float32 or bfloat16 instead of float16"
                )
        return logits, activations

    @abstractmethod
    def resume(
        self, layer: int, resid: Float[torch.Tensor, "rows pos d_model"], tokens: Int[torch.Tensor, "rows pos"]
    ) -> Float[torch.Tensor, "rows pos d_vocab"]:
        """Logits of a run that enters block `layer` with the residual stream `resid`, the layers below being skipped."""

    def digest(self) -> str:
        """SHA-256 of the model's weights."""
        return digest(self.model.state_dict())


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
