"""Loading of a model and its SAEs from names, folders or objects, with a check of how well they fit together."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featpatch.errors import FeatpatchError, FeatpatchWarning, check_kinds, counted
from featpatch.model.loading import load_model
from featpatch.model.sources import loading_quietly
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.pairs.tokens import prompt_ids, special_positions
from featpatch.sae.dictionary import several
from featpatch.sae.loading import load_sae, wanted_processing
from featpatch.selfcheck import Check
from featpatch.selfcheck import check as check_fit
from featpatch.untrusted import visible

CONTRASTS = (
    (
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
    ),
    ("The Eiffel Tower is in the city of Paris, the capital of", "The Brandenburg Gate is in the city of Berlin, capital of"),
    ("The war lasted from the year 1732 to the year 1751 and it", "The film was the best that I had seen in many years and I"),
    ("She opened the window because the room was warm, and then", "He closed the door because the night was cold, and later"),
)
"""The prompts for the check if the user gives none."""
SHOWN = 16
"""The largest number of SAEs that the text form of a loaded model names."""


@dataclass(frozen=True, repr=False)
class Loaded:
    """A model and its SAEs, which can be unpacked: `model, saes = fp.load(...)`.

    Attributes:
        model: the model, with TransformerLens' hook points.
        saes: the SAEs.
        check: how well each SAE fits the model; None if this was not checked.
    """

    model: Any
    saes: list[Any]
    check: Check | None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.saes))

    def __repr__(self) -> str:
        cfg = self.model.cfg
        name = getattr(cfg, "model_name", None) or type(self.model).__name__
        said = f"{name}: {counted(cfg.n_layers, 'layer')} of width {cfg.d_model}, {counted(len(self.saes), 'SAE')}"
        more = [f"and {len(self.saes) - SHOWN} more"] if len(self.saes) > SHOWN else []
        fits = [] if self.check is None else [repr(self.check)]
        return visible("\n  ".join([said, *map(_shown, self.saes[:SHOWN]), *more, *fits]))


def load(
    model: Any,
    saes: Any = None,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    processing: Collection[str] | None = None,
    pairs: Pairs | None = None,
    check: bool = True,
    progress: bool = True,
) -> Loaded:
    """Load a model and its SAEs, and check how well each SAE fits the model.

    A FeatpatchWarning names SAEs that do not fit, or explain less than their configuration claims.

    Args:
        model: a hub name (`"gpt2"`), a Hugging Face folder, a Hugging Face model in memory (which becomes part of the bridge:
            TransformerLens inserts its own modules into it and sets it to eval mode), or a TransformerBridge,
            SAETransformerBridge, HookedTransformer or HookedSAETransformer, which is used as it is.
        saes: one or several of these: `"release/id"` in the registry of sae-lens
            (`"gpt2-small-res-jb/blocks.8.hook_resid_pre"`), `"owner/repository/folder"` on the hub, a sae-lens folder, a
            sae-lens object, or the result of `fp.dictionaries.adapt`.
        tokenizer: a tokenizer for a Hugging Face model in memory, or for a name or folder without one; it is used as it is.
            Texts that the model tokenizes (`model.to_tokens`, `Pairs.from_prompts(model, ...)`) begin with BOS, whether or not
            the tokenizer adds it, unless `model.cfg.default_prepend_bos` is False.
        device: the device of a model and of SAEs that are loaded by name or from a folder; a model in memory stays on its own.
        dtype: the dtype of a model that is loaded by name or from a folder, float32 by default; SAEs keep their own.
        processing: the weight processing of a model that is loaded here (`"fold_ln"`, `"center_writing_weights"`,
            `"center_unembed"`, `"fold_value_biases"`); by default the processing with which the SAEs were trained according to
            their configurations, which for most is none.
        pairs: the prompts for the check of the SAEs; by default a few built-in sentences.
        check: whether to check the SAEs; the result is the attribute `check` of what is returned.
        progress: whether to show the progress bars of the libraries that load.

    Returns:
        The model, the SAEs and the check; it unpacks into model and SAEs.

    Raises:
        FeatpatchError: an argument is of the wrong kind or has no use, something can't be found, downloaded or read, or the
            SAEs were trained on differently processed weights.

    Examples:
        >>> folder = demo.folder / "saes" / "blocks.2.hook_resid_pre"
        >>> loaded = fp.load(demo.folder / "model", folder, pairs=pairs, progress=False)
        >>> loaded.check.ok
        True
        >>> model, saes = loaded
    """
    check_kinds(bool, check=check, progress=progress)
    given = [] if saes is None else several(saes)
    if pairs is not None and not (check and given and check_pairs(pairs, by_label=True)):
        raise FeatpatchError(
            f"pairs with {f'check={check}' if given else 'no saes'}: expected pairs only for the check of SAEs; leave pairs out"
        )
    with nullcontext() if progress else loading_quietly():
        found = [load_sae(sae, device=device) if isinstance(sae, (str, Path)) else sae for sae in given]
        trained = wanted_processing(found) if processing is None else ()
        made = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype, processing=processing, trained=trained)
    if not check or not found:
        return Loaded(made, found, None)
    prompts = _prompts(made) if pairs is None else pairs
    fit = None if prompts is None else check_fit(made, found, prompts)
    if fit is None:
        warnings.warn(
            "the SAEs were not checked, because the built-in sentences don't work with this tokenizer or model: pass pairs=... "
            "to check them, or check=False",
            FeatpatchWarning,
            stacklevel=2,
        )
    elif not fit.ok:
        here = "checked on built-in English sentences, which may not resemble the training data: pass pairs=... for yours\n"
        warnings.warn(here * (pairs is None) + repr(fit), FeatpatchWarning, stacklevel=2)
    return Loaded(made, found, fit)


def _shown(sae: Any) -> str:
    """Return a description of an SAE in one line."""
    cfg: Any = getattr(sae, "cfg", None)
    if not hasattr(cfg, "d_sae"):
        return repr(sae)
    metadata = cfg.metadata
    hooks = dict.fromkeys(hook for hook in (metadata.hook_name, getattr(metadata, "hook_name_out", None)) if hook)
    return f"{type(sae).__name__}, {cfg.d_sae} features, at {' -> '.join(hooks)}"


def _prompts(model: Any) -> Pairs | None:
    """Return pairs of the built-in prompts, truncated to the shorter prompt of each pair.

    It returns None if the model has no tokenizer, or no pair is usable with it.
    """
    room = int(getattr(model.cfg, "n_ctx", 0) or 0)
    if getattr(model, "tokenizer", None) is None:
        return None
    pairs = []
    for texts in CONTRASTS:
        clean, corrupted = (prompt_ids(model, text) for text in texts)
        length = min(len(clean), len(corrupted))
        clean, corrupted = clean[:length], corrupted[:length]
        if clean != corrupted and 1 < length <= (room or length) and max(*clean, *corrupted) < model.cfg.d_vocab:
            special = special_positions(model, clean, corrupted)
            pairs.append(Pair(clean, corrupted, correct=(0,), wrong=(1,), special=special))
    return Pairs(tuple(pairs)) if pairs else None
