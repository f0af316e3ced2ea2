"""What an SAE's configuration says of its training, and names of models by which it can be compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformer_lens.supported_models import MODEL_ALIASES

from featpatch import sites

PROCESSED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What TransformerLens does to weights unless told otherwise; SAEs are trained without, unless their configuration names it."""


@dataclass(frozen=True)
class Training:
    """Attributes that are None or empty are not known.

    Attributes:
        known: whether there is a configuration: that of a sae-lens object.
        model: the model's name.
        processing: what was done to its weights, of `PROCESSED`.
        explained_variance: as measured then, or as the registry says.
        folded: whether the weights of norms were folded; nothing else than what is said, or the rule of sae-lens, which takes
            weights as they are.
        module: the hook that is the input or output of Hugging Face's module which the configuration names, if it names one.
        context_size: tokens of a training prompt.
        prepend_bos: whether these began with BOS.
    """

    known: bool = False
    model: str | None = None
    processing: tuple[str, ...] = ()
    explained_variance: float | None = None
    folded: bool | None = None
    module: str | None = None
    context_size: int | None = None
    prepend_bos: bool = False

    @classmethod
    def of(cls, sae: Any) -> "Training":
        """From the metadata of a sae-lens object; nothing for another."""
        if not isinstance(sae, SAE):
            return cls()
        said = sae.cfg.metadata
        options = said.model_from_pretrained_kwargs if isinstance(said.model_from_pretrained_kwargs, dict) else {}
        model = said.model_name if isinstance(said.model_name, str) else None
        module = sites.of_module(said.hf_hook_name) if isinstance(said.hf_hook_name, str) else None
        return cls(
            known=True,
            model=model,
            processing=tuple(name for name in PROCESSED if options.get(name)),
            explained_variance=_share(said.explained_variance),
            folded=bool(options.get("fold_ln")) if "fold_ln" in options or model or module else None,
            module=module,
            context_size=said.context_size if isinstance(said.context_size, int) else None,
            prepend_bos=bool(said.prepend_bos),
        )


def _share(claim: object) -> float | None:
    """A claimed explained variance, also where it is in per cent; None where it is no number that one can be."""
    if not isinstance(claim, (int, float)) or not 0 < claim <= 100:
        return None
    return float(claim) if claim <= 1 else claim / 100


def official_name(model: str) -> str:
    """The name without its owner and in lower case, aliases resolved; empty for a folder."""
    if Path(model).exists():
        return ""
    official = next((name for name, aliases in MODEL_ALIASES.items() if model in aliases), model)
    return official.rsplit("/", 1)[-1].lower()
