"""The hook point of a model that holds what a dictionary was trained on.

The name in a dictionary's configuration can stand for different values: before or after a norm, with or without the norm's
weight, or with or without the embedding of positions.
"""

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.model.stack import folded, trivial_norms
from featpatch.sae.sae_lens import Training


def hook_of(lens: Lens, said: Training, name: str) -> str:
    """Return the hook point of the model that holds what a dictionary was trained on.

    Args:
        name: the hook point that the dictionary's configuration names.

    Raises:
        FeatpatchError: there is no such hook point, or the name is ambiguous.
    """
    if said.known and sites.is_mlp_in(name):
        if said.module is None:
            layer = sites.layer_of(name)
            stream = sites.component(layer, "resid_mid")
            stream = stream if stream in lens.hook_points else sites.resid_pre(layer)
            raise FeatpatchError(
                f"the SAE names the hook {name!r}, which is the residual stream before the norm in TransformerLens and the "
                "norm's output for transcoders of Gemma Scope 2, and its metadata has no hf_hook_name that tells which: "
                f"expected an unambiguous name; set sae.cfg.metadata.hook_name to {stream!r} or to "
                f"{sites.read_by_mlp(layer)!r}"
            )
        name = said.module
    weighted = sites.weighted(name) if said.known and said.folded is None else None
    if weighted is not None and weighted in lens.hook_points and not folded(lens) and not trivial_norms(lens):
        raise FeatpatchError(
            f"the SAE names the hook {name!r}, which is the norm's output without the norm's weight, and its metadata does not "
            "say whether it was trained without the weight (as Gemma Scope 1 was) or with it: if with, set "
            f"sae.cfg.metadata.hook_name to {weighted!r}; if without, set metadata.model_name, or "
            "metadata.model_from_pretrained_kwargs = {'fold_ln': True}"
        )
    if name == sites.EMBEDDING and name in lens.hook_points:
        return _embedding(lens)
    return _after_norm(lens, said, name) if sites.after_norm(name) else lens.site(name)


def _embedding(lens: Lens) -> str:
    """Return the hook point at the input of the first layer, if it holds the embedding.

    Raises:
        FeatpatchError: the model changes the embedding before the first layer.
    """
    entry = sites.resid_pre(0)
    both = lens.read(torch.tensor([[0, 1, 2]]), [sites.EMBEDDING, entry])
    if not torch.equal(both[sites.EMBEDDING], both[entry]):
        raise FeatpatchError(
            f"the SAE reads {sites.EMBEDDING!r}, to which this model adds positions, or which it scales or normalises, before "
            f"the first layer: expected an SAE of a layer's hook point; {entry!r} holds the result, but this SAE was not "
            "trained on it"
        )
    return entry


def _after_norm(lens: Lens, said: Training, name: str) -> str:
    """Return the hook point for a dictionary of a norm's output, which includes the norm's weight unless that is folded.

    Raises:
        FeatpatchError: the weight was folded in the training but is not in this model, or the other way round.
    """
    is_folded = folded(lens)
    was_folded = is_folded if said.folded is None else said.folded
    if name not in lens.hook_points and sites.normalized(name) in lens.hook_points:
        if is_folded and was_folded:
            return sites.normalized(name)
        raise FeatpatchError(
            f"the model has no hook {name!r}, and none that holds the norm's output with its weight: expected a "
            "HookedSAETransformer or a TransformerBridge with unprocessed weights; use fp.load, or "
            "HookedSAETransformer.from_pretrained_no_processing"
        )
    if is_folded and not was_folded:
        raise FeatpatchError(
            f"the SAE of {name!r} was trained with the weight of the norm, which in this model is folded into the MLP or "
            "attention: expected weights processed as in its training; load the model with processing=[]"
        )
    if was_folded and not is_folded and not trivial_norms(lens):
        raise FeatpatchError(
            f"the SAE of {name!r} was trained without the weight of the norm, which in this model is not folded: expected "
            "weights processed as in its training; load the model with processing=['fold_ln'], or set "
            f"sae.cfg.metadata.hook_name to {sites.normalized(name)!r}, which holds the same values"
        )
    return lens.site(name)
