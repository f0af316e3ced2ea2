"""How well a model predicts text with an SAE's reconstruction spliced in, compared with ablating the hook point.

    loss recovered = (loss_zero - loss_sae) / (loss_zero - loss)

1 means that the reconstruction predicts as well as the activation itself, 0 that it is no better than zeros (Bricken et al.
2023; `ce_loss_score` of SAELens and SAEBench).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from featpatch.descriptions import Document, ids_of, together
from featpatch.errors import FeatpatchError, counted
from featpatch.frame import Frame
from featpatch.metrics import NEAR_ZERO
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens, added
from featpatch.model.transformer_lens import wrap
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import check_tokenizer
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.untrusted import visible


@dataclass(frozen=True)
class Spliced:
    """The losses with one SAE, or an ablation, at a hook point, in nats per predicted token.

    Attributes:
        sae: the name of the SAE.
        loss: the cross-entropy of the unmodified model.
        loss_sae: that with the SAE's reconstruction in place of the activation, without the error term.
        loss_zero, loss_mean: those with zeros, and with the mean activation over all positions, in place of the activation.
        explained_variance: 1 - sum of squared errors / sum of squared deviations from the mean.
        l0: the mean number of nonzero features per position.
    """

    sae: str
    loss: float
    loss_sae: float
    loss_zero: float
    loss_mean: float
    explained_variance: float
    l0: float

    @property
    def loss_recovered(self) -> float:
        """The share of the loss by zero ablation that the reconstruction avoids; NaN if zeros hardly change the loss."""
        gap = self.loss_zero - self.loss
        return (self.loss_zero - self.loss_sae) / gap if abs(gap) > NEAR_ZERO * self.loss else float("nan")


@dataclass(frozen=True, repr=False)
class Losses:
    """The outcome of `fp.loss_recovered`.

    Attributes:
        predictions, positions: the number of predictions that count, and of positions at which activations are replaced.
        spliced: the losses with each SAE.

    Examples:
        >>> losses = fp.loss_recovered(model, saes, pairs, progress=False)
        >>> [round(each.loss_recovered, 2) for each in losses.spliced]
        [1.0, 1.0]
    """

    predictions: int
    positions: int
    spliced: tuple[Spliced, ...]

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with a row for each SAE."""
        columns = ("sae", "loss", "loss_sae", "loss_zero", "loss_mean", "loss_recovered", "explained_variance", "l0")
        return Frame({name: [getattr(each, name) for each in self.spliced] for name in columns})

    def __repr__(self) -> str:
        frame = self.to_pandas()
        numbers = {name: frame[name].map("{:.3f}".format) for name in frame.columns[1:]}
        return visible(f"{self._said}\n{frame.assign(**numbers)}")

    def _repr_html_(self) -> str:
        return f"<p>{self._said}</p>{self.to_pandas().to_html(index=False, escape=True, float_format='{:.3f}'.format)}"

    @property
    def _said(self) -> str:
        return f"cross-entropy in nats over {counted(self.predictions, 'prediction')}"


@torch.no_grad()
def loss_recovered(model: Any, saes: Any, prompts: Pairs | Sequence[str], *, progress: bool = True) -> Losses:
    """Measure the cross-entropy of a model over text with each SAE's reconstruction spliced in, and with ablations there.

    Each SAE is spliced in by itself, without its error term. For a transcoder, the output that it writes is replaced. Special
    tokens, such as BOS, keep their activations; a prediction counts if neither the token that it is made at nor the one that it
    predicts is special. Padding never counts. Explained variance and L0 are of the positions that are replaced.

    SAELens' `get_recons_loss` counts every prediction that is made at a token that is not special, and also replaces special
    tokens when it ablates; apart from this the numbers are the same.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: SAEs as in `rank_features`, at any hook point; each reads and writes a single one.
        prompts: pairs, of which the clean prompts are used, or texts, for a model with a tokenizer. A text that exceeds the
            model's context is truncated, with a PairsWarning.
        progress: whether to show a progress bar.

    Returns:
        For each SAE the losses with the SAE, with zero and with mean ablation, the loss recovered, explained variance and L0.

    Raises:
        FeatpatchError: the input is unusable, an SAE reads or writes several hook points, or no prediction counts.

    Examples:
        >>> losses = fp.loss_recovered(model, saes, demo.text()[:20], progress=False)
        >>> losses.to_pandas()["loss_recovered"].round(2).tolist()
        [1.0, 1.0]
    """
    lens = wrap(model)
    documents = _documents(lens, model, prompts)
    found = dictionaries(lens, saes)
    batches = [_Batch.of([documents[index] for index in group]) for group in together(
        [len(document.tokens) for document in documents], causal=lens.causal
    )]  # fmt: skip
    predictions = sum(int(batch.counted.sum()) for batch in batches)
    if not predictions:
        raise FeatpatchError(
            "no prompt has two tokens in a row that are not special: expected at least one prediction of a word from a word; "
            "give longer prompts"
        )
    for batch in batches:
        _check_predicted(lens, batch)
    hooks = sorted({hook for each in found for hook in (each.reads, each.writes)})
    moments = {each.name: _Moments() for each in found}
    with tqdm(total=2 * len(batches), unit="batch", desc="splicing", disable=not progress) as bar:
        for batch in batches:
            read = lens.read(batch.tokens, hooks)
            for each in found:
                moments[each.name].add(each.split(read), read[each.writes], batch.replaced)
            bar.update()
        means = {each.writes: moments[each.name].mean for each in found}
        sums: dict[str, float] = {}
        for batch in batches:
            for name, loss in _losses(lens, batch, lens.read(batch.tokens, hooks), found, means):
                sums[name] = sums.get(name, 0.0) + loss / predictions
            bar.update()
    spliced = [
        Spliced(
            sae=each.name,
            loss=sums["model"],
            loss_sae=sums[f"sae {each.name}"],
            loss_zero=sums[f"zero {each.writes}"],
            loss_mean=sums[f"mean {each.writes}"],
            explained_variance=moments[each.name].explained,
            l0=moments[each.name].active / moments[each.name].n,
        )
        for each in found
    ]
    return Losses(predictions, moments[found[0].name].n, tuple(spliced))


def _documents(lens: Lens, model: Any, prompts: Any) -> list[Document]:
    """Return the prompts as token ids.

    Raises:
        FeatpatchError: they are neither pairs nor a list of texts, or the model has no tokenizer for texts.
    """
    if isinstance(prompts, Pairs):
        check_tokens(prompts, lens)
        special = [[p in pair.special for p in range(len(pair))] for pair in prompts]
        return [Document(torch.tensor(pair.clean), ~torch.tensor(mask)) for pair, mask in zip(prompts, special, strict=True)]
    texts = list(prompts) if isinstance(prompts, (list, tuple)) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise FeatpatchError(f"prompts is a {type(prompts).__name__}: expected pairs, or a list of at least one text")
    check_tokenizer(lens.tokenizer, "for texts instead of pairs")
    return [Document.of(lens.tokenizer, ids) for ids in ids_of(model, texts, lens.n_ctx)]


@dataclass(frozen=True)
class _Batch:
    """Prompts that share a forward pass, padded at the end in a causal model, in which padding changes nothing before it.

    Attributes:
        tokens: the token ids, `[prompt, pos]`.
        replaced: a mask of the positions that are neither special nor padding, `[prompt, pos]`.
    """

    tokens: Int[torch.Tensor, "prompt pos"]
    replaced: Bool[torch.Tensor, "prompt pos"]

    @classmethod
    def of(cls, documents: Sequence[Document]) -> "_Batch":
        tokens = pad_sequence([document.tokens for document in documents], batch_first=True)
        return cls(tokens, pad_sequence([document.usable for document in documents], batch_first=True))

    @property
    def counted(self) -> Bool[torch.Tensor, "prompt next"]:
        """A mask of the predictions that count, by the position at which they are made."""
        return self.replaced[:, :-1] & self.replaced[:, 1:]

    def loss(self, lens: Lens) -> float:
        """Run the model as it is now, and return the sum of the cross-entropies of the predictions that count."""
        tokens = self.tokens.to(lens.device)
        logits = lens.run(tokens)[:, :-1]
        counted, following = self.counted.to(logits.device), tokens[:, 1:].to(logits.device)
        wide = logits[counted].to(torch.promote_types(logits.dtype, torch.float32))
        return float(torch.nn.functional.cross_entropy(wide, following[counted], reduction="none").double().sum())


def _check_predicted(lens: Lens, batch: _Batch) -> None:
    """Raise a FeatpatchError unless the model can predict the tokens, which its output vocabulary, if smaller, may lack."""
    largest = int(batch.tokens[:, 1:][batch.counted].max()) if batch.counted.any() else 0
    if largest >= lens.d_vocab:
        raise FeatpatchError(
            f"the prompts hold the token {largest}, and the model predicts only {lens.d_vocab} tokens: expected a model that "
            "predicts the tokens of its own input, so that it has a loss on text"
        )


def _losses(
    lens: Lens, batch: _Batch, read: dict[str, torch.Tensor], found: Sequence[Dictionary], means: dict[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield the summed loss of a batch in the model, with each SAE, and with each ablation, by name."""

    def with_change(site: str, change: Float[torch.Tensor, "prompt pos d"]) -> float:
        """Return the loss with a change of the flat activation at a hook point, where activations are replaced."""
        change = change * batch.replaced[..., None].to(change)
        with ExitStack() as stack:
            fired = stack.enter_context(lens.edit(lens.carrier(site), lambda x: added(x, change.reshape(x.shape))))
            loss = batch.loss(lens)
        if not fired.count:
            raise FeatpatchError(f"the hook {site!r} did not fire: expected a hook point that every forward pass reaches")
        return loss

    yield "model", batch.loss(lens)
    for each in found:
        yield f"sae {each.name}", with_change(each.writes, -each.split(read).error)
    for site, mean in means.items():
        x = read[site].flatten(2)
        yield f"zero {site}", with_change(site, -x)
        yield f"mean {site}", with_change(site, mean.to(x) - x)


class _Moments:
    """Sums over positions from which explained variance, L0 and the mean activation follow; in float64."""

    def __init__(self) -> None:
        self.n, self.active = 0, 0
        self.errors, self.squares = 0.0, 0.0
        self.total: torch.Tensor | float = 0.0

    def add(self, split: Split, written: torch.Tensor, where: torch.Tensor) -> None:
        """Add the positions of a batch at which `where` is true."""
        where = where.to(split.error.device)
        rows = written.flatten(2).to(split.error.device)[where].double()
        self.n += len(rows)
        self.active += int((split.features[where] != 0).sum())
        self.errors += float(split.error[where].double().square().sum())
        self.squares += float(rows.square().sum())
        self.total = self.total + rows.sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """The mean activation."""
        return torch.as_tensor(self.total) / self.n

    @property
    def explained(self) -> float:
        """The explained variance; NaN if the activation never varies."""
        variance = self.squares - self.n * float(self.mean.square().sum())
        return 1 - self.errors / variance if variance > 0 else float("nan")
