"""The lenses for TransformerLens' two model classes, TransformerBridge and HookedTransformer, and the choice between them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from threading import local
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from transformer_lens import ActivationCache as ActivationCache
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import PosEmbedBridge

from featpatch import sites
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.model.layer import ACTIVATIONS, Layer, Linear, Mlp, Rotation, Stack, UnsupportedError, build, norm_of, softcap_of
from featpatch.model.lens import Edit, Fired, Lens, answering
from featpatch.threads import exclusively, in_this_thread


@dataclass(frozen=True)
class HookedLens(Lens):
    """A lens for a `transformer_lens.HookedTransformer`."""

    def site(self, name: str) -> str:
        """Resolve the name of a hook point, see `Lens.site`.

        The output of a module is read where it is added to the residual stream, because HookedTransformer has no hook point for
        it.

        Raises:
            FeatpatchError: the model has no such hook point, or has a norm after the module.
        """
        check_kinds(str, hook=name)
        added = sites.of_output(name)
        if added is None or name in self.hook_points or added not in self.hook_points:
            return super().site(name)
        if getattr(self.model.cfg, "use_normalization_before_and_after", False):
            raise FeatpatchError(
                f"the model has no hook {name!r}, and {added!r} comes after another norm: expected a model that has both hook "
                "points; load it as a TransformerBridge, with fp.load"
            )
        return super().site(added)

    def resume(
        self,
        layer: int,
        resid: Float[torch.Tensor, "rows pos d_model"],
        tokens: Int[torch.Tensor, "rows pos"],
        answers: Int[torch.Tensor, " rows"],
    ) -> Float[torch.Tensor, "rows d_vocab"]:
        """Resume a run with `start_at_layer`, see `Lens.resume`; the token ids are not needed."""
        with answering(self.model.unembed, answers):
            return self._call(resid, start_at_layer=layer)[:, 0]

    def _run_upto(self, layer: int, tokens: Int[torch.Tensor, "batch pos"], **options: torch.Tensor) -> None:
        """Run the model with `stop_at_layer`."""
        self._call(tokens, stop_at_layer=None if layer == self.n_layers else layer + 1, **options)

    def _run_alone(self, layer: int, resid: Float[torch.Tensor, "rows pos d"], tokens: Int[torch.Tensor, "rows pos"]) -> None:
        """Run one layer with `start_at_layer` and `stop_at_layer`."""
        self._call(resid, start_at_layer=layer, stop_at_layer=layer + 1)

    def stack(self, shortest: int, longest: int) -> Stack:
        """Return the model as row-wise functions, see `Lens.stack`."""
        if getattr(self.model.cfg, "use_dynamic_ntk_rope", False):
            raise UnsupportedError("rotary embeddings that depend on the length of the prompt")
        return build(self.model, (self._layer(block, longest) for block in self.model.blocks))

    def _layer(self, block: Any, length: int) -> Layer:
        cfg, attn = self.model.cfg, block.attn
        rotary = cfg.positional_embedding_type == "rotary"
        return _layer_from(
            block,
            cfg,
            scale=1 / float(attn.attn_scale),
            softcap=cfg.attn_scores_soft_cap,
            window=cfg.window_size if attn.attn_type == "local" else None,
            rotation=Rotation(attn.rotary_cos[:length], attn.rotary_sin[:length], adjacent=bool(cfg.rotary_adjacent_pairs))
            if rotary
            else None,
        )


@dataclass(frozen=True)
class BridgeLens(Lens):
    """A lens for a `transformer_lens.model_bridge.TransformerBridge`."""

    def resume(
        self,
        layer: int,
        resid: Float[torch.Tensor, "rows pos d_model"],
        tokens: Int[torch.Tensor, "rows pos"],
        answers: Int[torch.Tensor, " rows"],
    ) -> Float[torch.Tensor, "rows d_vocab"]:
        """Resume a run at `layer`, see `Lens.resume`.

        The bridge has no `start_at_layer`, so the layers below `layer` return their input, and `layer` receives `resid`. Run
        this way, Hugging Face itself computes masks, rotary embeddings, soft-caps and the final norm.
        """
        blocks = self.model.blocks
        with self._skipping(blocks[:layer]), _entering(blocks[layer], resid), answering(self.model.unembed, answers):
            return self.run(tokens)[:, 0]

    @contextmanager
    def edit(self, site: str, change: Edit, *, first: bool = False, last: bool = False) -> Iterator[Fired]:
        """Edit an activation, see `Lens.edit`."""
        _ = self._wraps  # computing it runs the model, which must not be edited yet
        with super().edit(site, change, first=first, last=last) as fired:
            yield fired

    @contextmanager
    def seeing(self, see: Callable[[Int[torch.Tensor, "batch pos"], bool | None], None]) -> Iterator[None]:
        """Hand the token ids of every call to a function, see `Lens.seeing`; the Hugging Face model knows its cache."""
        known: list[bool] = []

        def begin(_module: Any, _args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            past = kwargs.get("past_key_values")
            known[:] = [past is not None and past.get_seq_length() > 0]

        handle = self.model.original_model.register_forward_pre_hook(in_this_thread(begin), with_kwargs=True)
        try:
            with super().seeing(lambda tokens, _: see(tokens, known.pop() if known else None)):
                yield
        finally:
            handle.remove()

    def _points(self) -> Mapping[str, HookPoint]:
        """Return the hook points of TransformerBridge with their aliases, which SAETransformerBridge leaves out."""
        return cast(Mapping[str, HookPoint], cast(property, TransformerBridge.hook_dict).__get__(self.model))

    def run(self, tokens: Int[torch.Tensor, "rows pos"], **options: torch.Tensor) -> torch.Tensor:
        """Run the model, protected from calls in other threads that would change the batch size of learned positions."""
        module = getattr(self.model, "pos_embed", None)
        if not isinstance(module, PosEmbedBridge):
            return super().run(tokens, **options)
        with exclusively(self.model):
            kind: Any = type(module)
            module.__class__ = _threaded(kind)
            try:
                return super().run(tokens, **options)
            finally:
                module.__class__ = kind

    def _run_upto(self, layer: int, tokens: Int[torch.Tensor, "batch pos"], **options: torch.Tensor) -> None:
        """Run the model while the layers above `layer` return their input."""
        self._run_without(self.model.blocks[layer + 1 :], tokens, **options)

    def _run_alone(self, layer: int, resid: Float[torch.Tensor, "rows pos d"], tokens: Int[torch.Tensor, "rows pos"]) -> None:
        """Run the model while all other layers return their input."""
        blocks = self.model.blocks
        with _entering(blocks[layer], resid):
            self._run_without([*blocks[:layer], *blocks[layer + 1 :]], tokens)

    def _run_without(self, blocks: Any, tokens: Int[torch.Tensor, "batch pos"], **options: torch.Tensor) -> None:
        """Run the model while some layers return their input, and unembed a single position."""
        first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        with self._skipping(blocks), answering(self.model.unembed, first):
            self.run(tokens, **options)

    def carrier(self, site: str) -> str:
        """Return `hook_attn_out` for `hook_resid_mid`, which is not the residual stream itself on a TransformerBridge."""
        return sites.carrier(site)

    @torch.no_grad()
    def stack(self, shortest: int, longest: int) -> Stack:
        """Return the model as row-wise functions, see `Lens.stack`.

        The weights are those of the bridge's layers; rotations are read at their hook points, as Hugging Face computes them.
        """
        hooks = [hook for layer in range(self.n_layers) for hook in sites.rotary(layer) if hook in self.hook_points]
        if not hooks and self.model.cfg.positional_embedding_type == "rotary":
            raise UnsupportedError("rotary embeddings without hook points")
        turns, short = ({}, {}) if not hooks else (self._rotations(hooks, longest), self._rotations(hooks, shortest))
        if not all(torch.equal(turns[hook][:, :shortest], short[hook]) for hook in hooks):
            raise UnsupportedError("rotary embeddings that depend on the length of the prompt")
        return build(self.model, (self._layer(layer, turns) for layer in range(self.n_layers)))

    def _rotations(self, hooks: list[str], length: int) -> dict[str, torch.Tensor]:
        return self.read(torch.zeros(1, length, dtype=torch.long), hooks)

    @cached_property
    def _wraps(self) -> bool:
        """Whether Hugging Face's layers return a tuple."""
        found: list[bool] = []

        def look(_block: Any, _args: Any, output: Any) -> None:
            found.append(isinstance(output, tuple))

        handle = self.model.blocks[0].register_forward_hook(in_this_thread(look))
        try:
            with torch.no_grad():
                self.run(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        finally:
            handle.remove()
        return any(found)

    @contextmanager
    def _skipping(self, blocks: Any) -> Iterator[None]:
        """Make some layers return their input, on their own device, in calls of this thread, until the context ends."""
        wraps = self._wraps

        def unchanged(block: Any) -> Any:
            device = next(block.parameters()).device

            def forward(*args: Any, **kwargs: Any) -> Any:
                stream = (args[0] if args else kwargs["hidden_states"]).to(device)
                return (stream,) if wraps else stream

            return in_this_thread(forward, block.forward)

        with exclusively(self.model):
            before = [block.__dict__.get("forward") for block in blocks]
            try:
                for block in blocks:
                    block.__dict__["forward"] = unchanged(block)
                yield
            finally:
                for block, forward in zip(blocks, before, strict=True):
                    if forward is None:
                        block.__dict__.pop("forward", None)
                    else:
                        block.__dict__["forward"] = forward

    def _layer(self, layer: int, turns: dict[str, torch.Tensor]) -> Layer:
        block, cfg = self.model.blocks[layer], self.model.cfg
        module = block.attn.original_component
        cos, sin = (turns.get(hook) for hook in sites.rotary(layer))
        return _layer_from(
            block,
            cfg,
            scale=float(getattr(module, "scaling", cfg.d_head**-0.5)),
            softcap=getattr(module, "attn_logit_softcapping", None),
            window=getattr(module, "sliding_window", None),
            rotation=None
            if cos is None or sin is None
            else Rotation(cos[0], sin[0], adjacent=bool(getattr(cfg, "rotary_adjacent_pairs", False))),
        )


def _layer_from(
    block: Any, cfg: Any, *, scale: float, softcap: float | None, window: int | None, rotation: Rotation | None
) -> Layer:
    """Convert a layer of a model, given the attention settings that the two model classes keep in different places.

    Args:
        block, cfg: the layer and the configuration of the model.
        scale, softcap, window, rotation: those of `Layer`; a soft-cap of 0 means none.

    Raises:
        UnsupportedError: the layer does not have the form described in `layer`.
    """
    attn = block.attn
    try:
        projections = [
            Linear(weight.permute(1, 0, 2).flatten(1), None if bias is None else bias.flatten())  # heads side by side
            for weight, bias in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        ]
        out = Linear(attn.W_O.flatten(0, 1), attn.b_O)
    except AttributeError as error:
        raise UnsupportedError(f"attention without separate weights ({error})") from error
    except NotImplementedError as error:
        raise UnsupportedError("quantised weights, which can be run but not read") from error
    return Layer(
        norm1=norm_of(getattr(block, "ln1", None), cfg),
        query=projections[0],
        key=projections[1],
        value=projections[2],
        query_norm=norm_of(getattr(attn, "q_norm", None), cfg),
        key_norm=norm_of(getattr(attn, "k_norm", None), cfg),
        rotation=rotation,
        d_head=int(cfg.d_head),
        scale=scale,
        softcap=softcap_of(softcap),
        window=window,
        out=out,
        post1=norm_of(getattr(block, "ln1_post", None), cfg),
        norm2=norm_of(getattr(block, "ln2", None) or (getattr(block, "ln1", None) if cfg.parallel_attn_mlp else None), cfg),
        mlp=_mlp(getattr(block, "mlp", None), cfg),
        post2=norm_of(getattr(block, "ln2_post", None), cfg),
        parallel=bool(cfg.parallel_attn_mlp),
    )


def _mlp(mlp: Any, cfg: Any) -> Mlp | None:
    """Convert the MLP of a layer; None if it has none."""
    if mlp is None:
        return None
    if cfg.act_fn not in ACTIVATIONS:
        raise UnsupportedError(f"activation function {cfg.act_fn!r}")
    try:
        gate = getattr(mlp, "W_gate", None)
        into, out = Linear(mlp.W_in, mlp.b_in), Linear(mlp.W_out, mlp.b_out)
    except AttributeError as error:
        raise UnsupportedError(f"an MLP without the standard weights ({error})") from error
    except NotImplementedError as error:
        raise UnsupportedError("quantised weights, which can be run but not read") from error
    if into.weight is None or into.weight.dim() != 2:
        raise UnsupportedError("a mixture-of-experts MLP")
    return Mlp(ACTIVATIONS[cfg.act_fn], None if gate is None else Linear(gate, None), into, out)


@cache
def _threaded(kind: type) -> type:
    """Make a subclass of a class of learned positions in which every thread has its own batch size.

    TransformerBridge stores the batch size of the current call on the module (transformer-lens 3.9). The class is cached here
    and not on the lens, which must be picklable for workers.
    """
    rows = local()
    size = property(
        lambda module: getattr(rows, str(id(module)), None), lambda module, count: setattr(rows, str(id(module)), count)
    )
    return type(kind.__name__, (kind,), {"_current_batch_size": size})


@contextmanager
def _entering(block: Any, resid: torch.Tensor) -> Iterator[None]:
    """Make a layer receive `resid` as its input, in calls of this thread, until the context ends."""

    def enter(_block: Any, args: Any, kwargs: Any) -> Any:
        return ((resid, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": resid})

    handle = block.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


MERGE = "merge it first: PeftModel.from_pretrained(base_model, adapter).merge_and_unload() returns the complete model"
"""The advice for an adapter that is not merged into the model, for error messages."""


def wrap(model: Any) -> Lens:
    """Return the lens of a model; for a compiled model, that of the module that was passed to torch.compile.

    Raises:
        FeatpatchError: the model is neither a TransformerBridge nor a HookedTransformer, or it can't be patched.
    """
    model = uncompiled(model)
    check_form(model)
    if isinstance(model, TransformerBridge):
        return BridgeLens(model)
    if isinstance(model, HookedTransformer):
        return HookedLens(model)
    raise FeatpatchError(
        f"the model is a {type(model).__name__}: expected a TransformerBridge or a HookedTransformer; for a name, a "
        "folder or a Hugging Face model, use fp.load(model, tokenizer=tokenizer).model"
    )


def uncompiled(model: Any) -> Any:
    """Return the module that was passed to torch.compile, or any other object as it is."""
    return getattr(model, "_orig_mod", model)


def check_form(model: Any) -> None:
    """Raise a FeatpatchError if a model has an encoder, an adapter that is not merged, or offloaded weights."""
    own = getattr(model, "original_model", model)
    name, config = type(own).__name__, getattr(own, "config", None)
    encodes = name in ("HookedEncoder", "HookedEncoderDecoder") or bool(getattr(config, "is_encoder_decoder", False))
    if encodes or (isinstance(model, TransformerBridge) and not hasattr(model, "blocks")):
        raise FeatpatchError(
            f"the model is a {name}, which has an encoder: expected a decoder-only model, such as GPT-2 or Llama, whose "
            "layers write to one residual stream; encoder-decoder models such as T5 can't be patched"
        )
    modules: Iterable[Any] = getattr(model, "modules", tuple)()
    if hasattr(model, "peft_config") or any(type(module).__module__.split(".")[0] == "peft" for module in modules):
        raise FeatpatchError(
            f"the {name} has an adapter (PEFT) that is not merged into its weights: expected a model without one; {MERGE}"
        )
    absent = [path for path, parameter in getattr(model, "named_parameters", tuple)() if parameter.is_meta]
    if absent:
        raise FeatpatchError(
            f"{len(absent)} weights of the {name} ({absent[0]!r}, ...) are offloaded to CPU or disk, or were never loaded: "
            "expected all weights on a device; load the model without device_map, on a device with enough memory, or in a "
            "smaller dtype"
        )
