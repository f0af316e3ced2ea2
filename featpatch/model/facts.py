"""What is known of a TransformerLens model without running it: its sizes, its weights, and whether pairs fit it.

The digest of weights, and whether they are finite, are kept until the weights change. NaN in a weight does not always show in a
module's output: a feature whose threshold is NaN is never active, and a token whose embedding is NaN may never occur.
"""

import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from transformer_lens.utilities.quantization import quantization_method, unreadable_weight_reason

from featpatch.errors import FeatpatchError, counted
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import PairsWarning, first_token, is_padded


@dataclass(frozen=True)
class Model:
    """A TransformerBridge or a HookedTransformer."""

    model: Any

    @property
    def name(self) -> str:
        """The name of the model in its configuration."""
        return str(self.model.cfg.model_name)

    @property
    def kind(self) -> str:
        """The class of the model, such as `TransformerBridge`."""
        return type(self.model).__name__

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None if it has none."""
        return getattr(self.model, "tokenizer", None)

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return int(self.model.cfg.n_layers)

    @property
    def d_vocab(self) -> int:
        """The number of tokens that the model can answer with."""
        return int(self.model.unembed.W_U.shape[-1])

    @property
    def d_vocab_in(self) -> int:
        """The number of tokens that a prompt may hold."""
        return int(self.model.cfg.d_vocab)

    @property
    def n_ctx(self) -> int | None:
        """The maximum length of a prompt; None unless the model has learned positions, which end there."""
        cfg = self.model.cfg
        return int(cfg.n_ctx) if cfg.positional_embedding_type in ("standard", "shortformer") else None

    @property
    def adds_positions(self) -> bool:
        """Whether learned positions are added to the embedding."""
        return bool(self.model.cfg.positional_embedding_type == "standard")

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def d_mlp(self) -> int:
        """The number of neurons of an MLP; 0 for models without MLPs."""
        return int(self.model.cfg.d_mlp or 0)

    @property
    def n_heads(self) -> int:
        """The number of attention heads of a layer."""
        return int(self.model.cfg.n_heads)

    @property
    def d_head(self) -> int:
        """The width of an attention head."""
        return int(self.model.cfg.d_head)

    @property
    def weights_per_block(self) -> int:
        """The number of weights that a position is multiplied by in one layer, according to the configuration.

        A bridge may hold a joint matrix of queries, keys and values as well as the three that it is split into, so counting
        parameters would be wrong. Not exact for mixtures of experts whose experts have a size of their own.
        """
        cfg = self.model.cfg
        keys = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        attention = 2 * (cfg.n_heads + keys) * cfg.d_model * cfg.d_head
        experts = getattr(cfg, "experts_per_token", None) or 1
        return int(attention + (0 if cfg.attn_only else (3 if cfg.gated_mlp else 2) * cfg.d_model * cfg.d_mlp * experts))

    @property
    def attention_only(self) -> bool:
        """Whether the layers have no MLPs."""
        return bool(getattr(self.model.cfg, "attn_only", False))

    @cached_property
    def device(self) -> torch.device:
        """The device of the embedding, on which tokens must be."""
        return self.first_weight.device

    @cached_property
    def devices(self) -> set[torch.device]:
        """The devices that hold the weights of the model."""
        return {parameter.device for parameter in self.model.parameters()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not quantised."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.dtype.is_floating_point)

    @cached_property
    def quantised(self) -> str:
        """How the weights are quantised, so that they can be run but not read; empty if they are not."""
        parameters = self.model.parameters()
        reason = next((reason for each in parameters if (reason := unreadable_weight_reason(each))), None)
        return quantization_method(getattr(getattr(self.model, "original_model", None), "config", None)) or reason or ""

    @property
    def itemsize(self) -> int:
        """The number of bytes of a number in the first weight."""
        return int(self.first_weight.element_size())

    @property
    def first_weight(self) -> torch.Tensor:
        """The first weight, whose dtype and device are those of activations at the start of the model."""
        return next(self.model.parameters())

    @property
    def unembedding(self) -> Float[torch.Tensor, "d_model d_vocab"]:
        """The matrix from the residual stream to logits."""
        return self.model.unembed.W_U

    def has_mlp(self, layer: int) -> bool:
        """Return whether a layer has an MLP."""
        return getattr(self.model.blocks[layer], "mlp", None) is not None

    def output_weight(self, layer: int) -> torch.Tensor | None:
        """Return W_O of a layer, `[head, d_head, d_model]`; None if it is quantised, so that it can be run but not read."""
        try:
            weight: torch.Tensor = self.model.blocks[layer].attn.W_O
        except NotImplementedError:
            return None
        return weight

    def check_room(self, length: int, count: int) -> None:
        """Raise a FeatpatchError unless `count` tokens can be generated after a prompt of a given length."""
        if self.n_ctx is not None and length + count > self.n_ctx:
            raise FeatpatchError(
                f"a prompt of {counted(length, 'token')} and tokens={count}: expected at most {self.n_ctx} together, the "
                "model's context; generate fewer tokens, or shorten the prompt"
            )

    def digest(self) -> str:
        """Return the SHA-256 of the model's weights."""
        return digest(self.model)


SAMPLE = 64
"""Number of values of each tensor that are compared before a stored result is used again."""

Found = TypeVar("Found")
_known: "WeakKeyDictionary[torch.nn.Module, tuple[object, dict[Hashable, Any]]]" = WeakKeyDictionary()


def digest(module: torch.nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a module's state, which takes about half a second per gigabyte."""
    return once(module, _hashed)


def once(module: torch.nn.Module, find: Callable[[torch.nn.Module], Found], *about: Hashable) -> Found:
    """Call a function on a module, or return its earlier result if the module's weights have not changed.

    Results are kept under `about`, or under the function itself if nothing is given.

    Weights count as unchanged if every tensor is at the same address, has the same number of in-place changes (torch counts
    them) and holds the same numbers at `SAMPLE` places.
    """
    tensors = sorted(module.state_dict().items())
    marks = [(name, t.dtype, t.shape, t.data_ptr(), t._version, _sample(t)) for name, t in tensors]
    known = _known.get(module)
    if known is None or known[0] != marks:
        known = _known[module] = (marks, {})
    key = about or find
    if key not in known[1]:
        known[1][key] = find(module)
    return known[1][key]


def settings(module: torch.nn.Module) -> tuple[Hashable, ...]:
    """Return what a module and its parts compute with besides weights, by which a change is noticed.

    These are numbers, texts and functions among their attributes (also of their configurations and of modules that are kept as
    plain attributes), such as an activation function or a replaced `forward`, and the ids of torch's hooks.
    """
    every = torch.nn.modules.module
    found: list[Any] = [*every._global_forward_pre_hooks, *every._global_forward_hooks]
    parts = dict.fromkeys(module.modules())
    for part in (each for value in vars(module).values() if isinstance(value, torch.nn.Module) for each in value.modules()):
        parts.setdefault(part)
    for part in parts:
        found += [type(part), *part._forward_pre_hooks, *part._forward_hooks]
        configs = [value for name, value in vars(part).items() if name in ("cfg", "config") and hasattr(value, "__dict__")]
        for of in (part, *configs):
            for name, value in vars(of).items():
                plain = value is None or isinstance(value, (int, float, str))
                if (plain or (callable(value) and not isinstance(value, torch.nn.Module))) and not name.startswith("_"):
                    found.append((name, value))
    return tuple(found)


def _hashed(module: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> tuple[float, ...]:
    count = min(SAMPLE, tensor.numel())
    places = torch.arange(count) * (tensor.numel() - 1) // max(count - 1, 1)
    return tuple(torch.take(tensor, places.to(tensor.device)).double().tolist())


TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights may have."""


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a name, such as float32 or torch.float32; None for None. Raise a FeatpatchError if it is unknown."""
    wanted = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in TYPES:
        raise FeatpatchError(f"dtype={dtype!r}: expected one of {', '.join(str(kind)[6:] for kind in TYPES)}")
    return wanted


def check_finite(what: str, source: Any) -> None:
    """Check that all weights of an object are finite.

    Args:
        what: a description of the object, for the error.
        source: a module, which is checked again only after it has changed; or any other object or mapping, whose attributes or
            values are checked if they are tensors or modules. Buffers of modules may be infinite, as masks are.

    Raises:
        FeatpatchError: a weight holds NaN or an infinite value, or a buffer holds NaN.
    """
    if isinstance(source, torch.nn.Module):
        parts: Iterator[str] = iter(once(source, _damaged))
    else:
        own = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
        for value in own.values():
            if isinstance(value, torch.nn.Module):
                check_finite(what, value)
        parts = (
            text
            for name, value in own.items()
            if isinstance(value, torch.Tensor) and (text := _bad(str(name), value, infinite=True))
        )
    if (first := next(parts, None)) is not None:
        raise FeatpatchError(
            f"{what}: {first}{', among others' if next(parts, None) else ''}: expected finite weights; download or save it "
            "again, or use a dtype with a wider range than float16"
        )


def _damaged(module: torch.nn.Module) -> tuple[str, ...]:
    with torch.no_grad():
        found = [_bad(name, each, infinite=True) for name, each in module.named_parameters()]
        found += [_bad(name, each, infinite=False) for name, each in module.named_buffers()]
    return tuple(text for text in found if text)


def _bad(name: str, tensor: torch.Tensor, infinite: bool) -> str:
    """Describe how many values of a tensor are NaN or, with `infinite`, infinite; empty if none are."""
    if tensor.dtype not in TYPES or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return ""
    extreme = torch.stack(torch.aminmax(tensor.detach()))  # one pass without a copy; NaN if any value is
    if torch.isfinite(extreme).all() or not (infinite or torch.isnan(extreme).any()):
        return ""
    bad = ~torch.isfinite(tensor) if infinite else torch.isnan(tensor)
    return f"{int(bad.sum())} of {tensor.numel()} values of {name} are {'NaN or infinite' if infinite else 'NaN'}"


Continuations = Mapping[int, Sequence[tuple[int, ...]]]
"""The continuations of each pair's prompts, by the index of the pair."""


NONE: Continuations = MappingProxyType({})


def check_tokens(pairs: Pairs, lens: Model, continuations: Continuations = NONE) -> None:
    """Check that a model accepts the tokens of pairs, and warn if prompts lack the BOS that it puts before a text.

    Raises:
        FeatpatchError: the model does not know a token or an answer, or a prompt is padded, begins with two BOS or is too long.
    """
    inputs, context = lens.d_vocab_in, lens.n_ctx
    _check_ends(pairs, getattr(lens.model, "tokenizer", None))
    _compare_start(pairs, lens)
    for index, pair in enumerate(pairs):
        following = continuations.get(index, ())
        answers = [token for side in pair.answers for answer in side for token in answer]
        tokens = (*pair.clean, *pair.corrupted, *(token for continuation in following for token in continuation))
        length = max(pair.lengths) + max(map(len, following), default=0)
        if answers and not 0 <= min(answers) <= max(answers) < lens.d_vocab:
            raise FeatpatchError(
                f"pair {index}: answers {answers} are outside the model's vocabulary of {lens.d_vocab} "
                "tokens: expected ids of the model's own tokenizer"
            )
        if not 0 <= min(tokens) <= max(tokens) < inputs:
            raise FeatpatchError(
                f"pair {index} has token ids from {min(tokens)} to {max(tokens)}: expected 0 to {inputs - 1}, ids of "
                "the model's own tokenizer"
            )
        if context is not None and length > context:
            with_answers = " with its answers" if length > max(pair.lengths) else ""
            raise FeatpatchError(
                f"pair {index} has {counted(length, 'token')}{with_answers}: expected at most {context}, the model's context"
            )


def _check_ends(pairs: Pairs, tokenizer: Any) -> None:
    """Raise a FeatpatchError if prompts are padded or begin with two BOS; warn if what may be padding is also BOS or EOS."""
    if tokenizer is None:
        return
    bos = getattr(tokenizer, "bos_token_id", None)
    for index, pair in enumerate(pairs):
        if bos is not None and (bos, bos) in (pair.clean[:2], pair.corrupted[:2]):
            raise FeatpatchError(
                f"pair {index} begins with {tokenizer.bos_token!r} ({bos}) twice: expected it once; leave it out of the text, "
                "since the tokenizer adds it"
            )
        if is_padded(tokenizer, pair.clean, pair.corrupted, surely=True):
            raise FeatpatchError(
                f"pair {index} begins or ends with the padding token {tokenizer.pad_token!r}: expected prompts without "
                "padding; make pairs with Pairs.from_tokens(..., attention_mask=...)"
            )
    perhaps = sum(is_padded(tokenizer, pair.clean, pair.corrupted) for pair in pairs)
    if perhaps:
        warnings.warn(
            f"{perhaps} of {counted(len(pairs), 'pair')} begin or end with {tokenizer.pad_token!r}, which is BOS or EOS and "
            "also the padding token: it is treated as part of the prompt; if it is padding, make the pairs with "
            "Pairs.from_tokens(..., attention_mask=...)",
            PairsWarning,
            stacklevel=2,
        )


def _compare_start(pairs: Pairs, lens: Model) -> None:
    """Warn if prompts lack the special token that the model puts before a text."""
    first = first_token(lens.model)
    lacking = sum(first is not None and pair.clean[0] != first for pair in pairs)
    if lacking:
        warnings.warn(
            f"{lacking} of {counted(len(pairs), 'pair')} lack {lens.model.tokenizer.decode([first])!r} ({first}), which "
            "model(text) adds at the start: to add it too, pass the model instead of a tokenizer to Pairs.from_prompts",
            PairsWarning,
            stacklevel=2,
        )
