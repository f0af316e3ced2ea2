"""Read what an SAE's configuration says about its training, and make names of models comparable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformer_lens.supported_models import MODEL_ALIASES

from featpatch import sites

PROCESSED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""Weight processing that TransformerLens does by default; SAEs are trained without it unless their configuration says so."""


@dataclass(frozen=True)
class Training:
    """What is known about the training of an SAE; None or empty means unknown.

    Attributes:
        known: whether the SAE has a configuration, as sae-lens objects have.
        model: the model's name.
        processing: the processing of the model's weights, from `PROCESSED`.
        explained_variance: the explained variance that the configuration or the registry claims.
        folded: whether the weights of norms were folded. This is what the configuration says; if it does not say, but names a
            model or a module, they count as not folded, because sae-lens leaves weights as they are.
        module: the hook point that holds the input or output of the Hugging Face module that the configuration names.
        context_size: the number of tokens of a training prompt.
        prepend_bos: whether training prompts began with BOS.
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
        """Read the metadata of a sae-lens object; nothing is known about any other object."""
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
    """Return a claimed explained variance as a fraction, even if it is given in per cent; None if the claim is not valid."""
    if not isinstance(claim, (int, float)) or not 0 < claim <= 100:
        return None
    return float(claim) if claim <= 1 else claim / 100


def official_name(model: str) -> str:
    """Return a model's name in lower case, without its owner and with aliases resolved; empty for a folder."""
    if Path(model).exists():
        return ""
    official = next((name for name, aliases in MODEL_ALIASES.items() if model in aliases), model)
    return official.rsplit("/", 1)[-1].lower()
