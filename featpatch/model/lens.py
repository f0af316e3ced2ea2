"""The operations that featpatch needs on a model, the same for every model class: read, edit and resume."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from transformer_lens.hook_points import HookPoint

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.facts import Model
from featpatch.model.layer import Stack
from featpatch.threads import Watch, check_unedited, editing, in_this_thread


def added(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Add a change to an activation, and return the sum in the dtype and on the device of the activation.

    The sum is computed in the wider of the two dtypes.
    """
    wide = torch.promote_types(base.dtype, change.dtype)
    return (base.to(wide) + change.to(base.device)).to(base.dtype)


Edit = Callable[[torch.Tensor], torch.Tensor | None]
"""A function from an activation to its new value, or to None if it stays as it is."""


def copying(key: Any, into: dict[Any, torch.Tensor]) -> Edit:
    """Return an edit that copies the activation under a key and leaves it as it is."""
    return lambda activation: into.update({key: activation.detach().clone()})


def keeping(key: Any, into: dict[Any, torch.Tensor]) -> Edit:
    """Return an edit that stores the activation itself under a key, with its gradient, and leaves it as it is."""
    return lambda activation: into.update({key: activation})


ROWS = 4096
"""Maximum number of positions that go through one layer together."""


class _Reached(Exception):  # noqa: N818
    """Exception that ends a forward pass at a hook point, because nothing after it is needed."""


@dataclass
class Fired:
    """The number of times that an edit was applied; a patch that never fires is an error."""

    count: int = 0


@dataclass(frozen=True)
class Lens(Model, ABC):
    """A model with named hook points. `model` is left as it was found, even after an exception.

    Raises:
        FeatpatchError: the model has dropout in training mode, SAEs are attached to it, or `fp.do` patches it.
    """

    hook_points: Mapping[str, HookPoint] = field(init=False, repr=False)
    watch: Watch = field(init=False, repr=False, compare=False)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(module.training and _drops(module) for module in self.model.modules()):
            raise FeatpatchError(
                "the model is in training mode with dropout: expected evaluation mode, so that runs are repeatable; call "
                "model.eval()"
            )
        if getattr(self.model, "acts_to_saes", None):
            raise FeatpatchError(
                f"SAEs are attached to the model at {', '.join(self.model.acts_to_saes)}: expected the unmodified model; "
                "call `saes = model.acts_to_saes; model.reset_saes()` and pass saes=saes to featpatch instead"
            )
        check_unedited(self.model)
        object.__setattr__(self, "hook_points", self._points())
        object.__setattr__(self, "watch", Watch(self.model, self.hook_points.values()))

    def _points(self) -> Mapping[str, HookPoint]:
        """Return every hook point by name, including aliases."""
        return cast(Mapping[str, HookPoint], self.model.hook_dict)

    @cached_property
    def causal(self) -> bool:
        """Whether a position sees only earlier positions; tested by changing the last token of a prompt."""
        last = sites.resid_post(self.n_layers - 1)
        if last not in self.hook_points:
            return bool(getattr(self.model.cfg, "attention_dir", "causal") == "causal")
        before, after = self.read(torch.tensor([[0, 1, 0], [0, 1, 1]]), [last])[last][:, :2]
        return bool((before - after).abs().max() <= 8 * torch.finfo(before.dtype).eps * before.abs().max())

    @cached_property
    def parallel(self) -> bool:
        """Whether MLPs read the input of their layer, without the output of attention.

        They do not if there is a hook point between the two; otherwise this is tested by changing the output of attention.
        """
        if self.attention_only or sites.component(0, "resid_mid") in self.hook_points:
            return False
        attention, mlp = sites.component(0, "attn_out"), sites.component(0, "mlp_out")
        tokens = torch.zeros(1, 2, dtype=torch.long)
        resid = self.read(tokens, [sites.resid_pre(0)])[sites.resid_pre(0)]
        found = []
        for value in (torch.zeros_like(resid), resid.flip(-1)):
            with self.put({attention: value}):
                found.append(self.through(0, resid, tokens, mlp))
        return bool(torch.equal(*found))

    @property
    def hooked(self) -> bool:
        """Whether the user has attached hooks to TransformerLens' hook points, which our own forward pass would not call."""
        return bool(self.watch.attached(backward=False))

    def check_unhooked(self) -> None:
        """Raise a FeatpatchError if the user has attached hooks, for functions that run the model's layers one by one."""
        if self.hooked:
            raise FeatpatchError("hooks are attached to the model: expected none; call model.reset_hooks()")

    def shape(self, site: str) -> tuple[int, ...]:
        """Return the shape of the activation at a hook point at one position, such as `(n_heads, d_head)`."""
        return self.shapes([site])[site]

    def shapes(self, hooks: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the activation at one position for several hook points, those not known yet from one run."""
        hooks = list(hooks)
        missing = sorted({hook for hook in hooks if hook not in self._shapes})
        if missing:
            read = self.read(torch.zeros(1, 1, dtype=torch.long), missing)
            self._shapes.update({hook: tuple(activation.shape[2:]) for hook, activation in read.items()})
        return {hook: self._shapes[hook] for hook in hooks}

    def heads(self, site: str) -> int:
        """Return the number of heads at a hook point inside attention, which is smaller for shared keys and values."""
        return self.shape(site)[0]

    def site(self, name: str) -> str:
        """Return the TransformerLens name of a hook point; raise a FeatpatchError if the model has no such hook point."""
        return sites.canonical(name, self.hook_points)

    def carrier(self, site: str) -> str:
        """Return the hook point at which a change of the activation at `site` has to be added."""
        return site

    @contextmanager
    def edit(self, site: str, change: Edit, *, first: bool = False, last: bool = False) -> Iterator[Fired]:
        """Pass the activation at `site` through `change` in calls of this thread, until the context ends.

        `change` runs after existing hooks or, with `first`, before them; with `last` it also runs after edits that are made
        later. `reset_hooks` does not remove it.
        """
        point, firing = self.hook_points[self.site(site)], Fired()

        def hook(activation: torch.Tensor, hook: object) -> torch.Tensor | None:
            changed = change(activation)
            firing.count += changed is not None
            return changed

        with editing(self.model, point, hook, first=first, last=last):
            yield firing

    @torch.no_grad()
    def generate(self, tokens: Int[torch.Tensor, "batch pos"], count: int) -> Int[torch.Tensor, "batch length"]:
        """Generate up to `count` tokens greedily after each prompt, see `check_room`, and return the prompts with them."""
        self.check_room(tokens.shape[1], count)
        stop = getattr(self.tokenizer, "eos_token_id", None) is not None
        options = {"do_sample": False, "stop_at_eos": stop, "return_type": "tokens", "verbose": False}
        cached = self.tokenizer is not None  # HookedTransformer's cached generation fails without a tokenizer
        made = self.model.generate(tokens.to(self.device), max_new_tokens=count, use_past_kv_cache=cached, **options)
        return cast(torch.Tensor, made)

    @contextmanager
    def seeing(self, see: Callable[[Int[torch.Tensor, "batch pos"], bool | None], None]) -> Iterator[None]:
        """Hand the token ids of every call of the model in this thread to a function, until the context ends.

        The function is also told whether the call has keys and values of earlier tokens; None if that is not known.
        """

        def begin(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            see(next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)

        handle = self.model.embed.register_forward_pre_hook(in_this_thread(begin), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def put(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Replace the activations at some hook points by given values in calls of this thread, until the context ends."""

        def becomes(value: torch.Tensor) -> Edit:
            return lambda activation: value.to(activation.device).reshape(activation.shape)

        with ExitStack() as stack:
            for hook, value in values.items():
                stack.enter_context(self.edit(hook, becomes(value)))
            yield

    @torch.no_grad()
    def read(
        self, tokens: Int[torch.Tensor, "batch pos"], hooks: Sequence[str], mask: Int[torch.Tensor, "batch pos"] | None = None
    ) -> dict[str, torch.Tensor]:
        """Read activations `[batch, pos, ...]` without running layers above the last hook point; the mask is 0 for padding.

        Raises:
            FeatpatchError: a hook point does not exist, is switched off, or holds values that are not finite.
        """
        return self.read_entering(tokens, hooks, [], mask)[0]

    @torch.no_grad()
    def read_entering(
        self,
        tokens: Int[torch.Tensor, "batch pos"],
        hooks: Sequence[str],
        layers: Sequence[int],
        mask: Int[torch.Tensor, "batch pos"] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Read activations, see `read`, and the residual stream `[batch, pos, d_model]` that enters some layers.

        The residual stream is read before the hooks there act on it, because they act again when a run is resumed at the layer.
        """
        activations: dict[str, torch.Tensor] = {}
        entering: dict[int, torch.Tensor] = {}

        entries = {layer: sites.resid_pre(layer) for layer in layers}
        with ExitStack() as stack:
            for layer, name in entries.items():
                stack.enter_context(self.edit(name, copying(layer, entering), first=True))
            for name in hooks:
                stack.enter_context(self.edit(name, copying(name, activations)))
            masked = {} if mask is None else {"attention_mask": mask.to(self.device)}
            self._run_upto(sites.highest([*hooks, *entries.values()], self.n_layers), tokens.to(self.device), **masked)
        check_read(hooks, activations)
        return activations, entering

    @torch.no_grad()
    def embedded(self, tokens: Int[torch.Tensor, "rows pos"]) -> Float[torch.Tensor, "rows pos d_model"]:
        """Return the residual stream that enters the first layer, without running the layers."""
        with self._ending_at(sites.resid_pre(0)) as found:
            self.run(tokens.to(self.device))
        return found[0]

    @contextmanager
    def _ending_at(self, hook: str) -> Iterator[list[torch.Tensor]]:
        """End the forward pass inside the block at a hook point, and put the activation there into the list."""
        found: list[torch.Tensor] = []

        def keep(activation: torch.Tensor) -> None:
            found.append(activation)
            raise _Reached

        with self.edit(hook, keep), suppress(_Reached):
            yield found

    @torch.no_grad()
    def answer(self, tokens: Int[torch.Tensor, "rows pos"], answers: Int[torch.Tensor, " rows"]) -> torch.Tensor:
        """Run the whole model, and return the logits `[rows, d_vocab]` at one position of each prompt."""
        return self.differentiable_answer(tokens, answers)

    def differentiable_answer(
        self, tokens: Int[torch.Tensor, "rows pos"], answers: Int[torch.Tensor, " rows"]
    ) -> Float[torch.Tensor, "rows d_vocab"]:
        """Run the whole model, see `answer`, and keep the gradient."""
        with answering(self.model.unembed, answers.to(self.device)):
            return self.run(tokens.to(self.device))[:, 0]

    @torch.no_grad()
    def through(
        self,
        layer: int,
        resid: Float[torch.Tensor, "rows_or_one pos d_model"],
        tokens: Int[torch.Tensor, "*one pos"],
        hook: str,
        put: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run one layer up to a hook point, `ROWS` positions at a time, and return the activation `[rows, pos, ...]` there.

        Args:
            resid: the residual stream that enters the layer, for each row or the same for all.
            tokens: the tokens of all rows.
            put: the values `[rows, pos, ...]` that replace activations inside the layer, by hook point.
        """
        values = put or {}
        rows, size = max(map(len, (resid, *values.values()))), max(1, ROWS // resid.shape[1])
        parts: list[torch.Tensor] = []
        for some in (slice(start, start + size) for start in range(0, rows, size)):
            entering = resid.expand(rows, -1, -1)[some].clone()
            with self.put({name: value[some] for name, value in values.items()}):
                parts.append(self.differentiable_through(layer, entering, tokens.expand(len(entering), -1), hook))
        return torch.cat(parts)

    def differentiable_through(
        self, layer: int, resid: Float[torch.Tensor, "rows pos d_model"], tokens: Int[torch.Tensor, "rows pos"], hook: str
    ) -> torch.Tensor:
        """Run one layer up to a hook point, see `through`, and keep the gradient."""
        with self._ending_at(hook) as found:
            self._run_alone(layer, resid, tokens.to(self.device))
        return found[0]

    def run(self, tokens: Int[torch.Tensor, "rows pos"], **options: torch.Tensor) -> torch.Tensor:
        """Run the whole model and return its logits."""
        return self._call(tokens, **options)

    def _call(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Call the model; every forward pass goes through here.

        Raises:
            FeatpatchError: another thread attached hooks to the model, or removed some.
        """
        with self.watch.unchanged():
            return cast(torch.Tensor, self.model(x, **options))

    @abstractmethod
    def _run_alone(self, layer: int, resid: Float[torch.Tensor, "rows pos d"], tokens: Int[torch.Tensor, "rows pos"]) -> None:
        """Run one layer on the residual stream that enters it."""

    @abstractmethod
    def _run_upto(self, layer: int, tokens: Int[torch.Tensor, "batch pos"], **options: torch.Tensor) -> None:
        """Run the layers up to `layer`, and the rest of the model if that is the number of layers."""

    @abstractmethod
    def stack(self, shortest: int, longest: int) -> Stack:
        """Return the model as row-wise functions, for prompts of these lengths.

        Raises:
            UnsupportedError: the model does not have the form described in `layer`.
        """

    @abstractmethod
    def resume(
        self,
        layer: int,
        resid: Float[torch.Tensor, "rows pos d_model"],
        tokens: Int[torch.Tensor, "rows pos"],
        answers: Int[torch.Tensor, " rows"],
    ) -> Float[torch.Tensor, "rows d_vocab"]:
        """Return the logits at the answer positions of a run that enters layer `layer` with the residual stream `resid`.

        Gradients are kept. The layers below are skipped, and only the answer positions are unembedded.
        """

    def state(self) -> object:
        """Return everything that runs depend on, for comparison: the digest of the weights and the attached hooks."""
        return self.digest(), self.watch.attached()


@contextmanager
def answering(unembed: torch.nn.Module, answers: Int[torch.Tensor, " rows"]) -> Iterator[None]:
    """Unembed only one position of each row, in calls of this thread, until the context ends."""

    def pick(_module: Any, args: Any, kwargs: Any) -> Any:
        values = list(args) or list(kwargs.values())
        values[0] = values[0][torch.arange(len(answers)), answers.to(values[0].device), None]
        return (tuple(values), kwargs) if args else (args, dict(zip(kwargs, values, strict=True)))

    handle = unembed.register_forward_pre_hook(in_this_thread(pick), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_read(hooks: Sequence[str], activations: Mapping[str, torch.Tensor]) -> None:
    """Raise a FeatpatchError unless all hook points were reached and the values there are finite."""
    for name in hooks:
        if name not in activations:
            raise FeatpatchError(
                f"hook {name!r} exists but was not reached in the forward pass: expected a hook point that every forward pass "
                f"reaches; {sites.switch(name)}"
            )
        if not torch.isfinite(activations[name]).all():
            raise FeatpatchError(
                f"the activation at {name!r} contains NaN or infinite values: expected finite numbers; check the model's "
                "weights, or run it in float32 or bfloat16 instead of float16"
            )


def _drops(module: torch.nn.Module) -> bool:
    """Return whether a module is in training mode and has dropout."""
    if isinstance(module, torch.nn.Dropout):
        return module.p > 0
    return any("dropout" in name and isinstance(rate, float) and rate > 0 for name, rate in vars(module).items())
