"""Contributions of components to features as two tables: the features a component acts through, and a feature's writers."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray

from featpatch import sites
from featpatch.comparison.writers import Contributions, Question, Writer, Writers, measure
from featpatch.effects.collector import check_saes
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.frame import Frame
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Effect, Node, Position
from featpatch.pairs.pairs import Pairs
from featpatch.sae.dictionary import Dictionary, dictionaries, digests

COLUMNS = ["site", "kind", "index", "position", "sae", "feature", "contribution", "change", "share"]


class Row(NamedTuple):
    """The contribution of one writer to one feature at the feature's position."""

    writer: Writer
    feature: Node
    contribution: float
    change: float
    share: float


@dataclass(frozen=True)
class ContributionTables:
    """Tables of contributions of components to features, as defined in `writers`, one row per component and feature.

    Columns are `site`, `kind`, `index` and `position` of the component, `sae` and `feature`, `contribution` and `change` in
    units of the feature's activation (in each pair positive if it has the sign of the feature's change), their ratio `share`,
    and the effects of both, such as `recovery` and `feature_recovery`, NaN if they were not measured.

    Attributes:
        through: for each of the top heads and MLPs upstream of some SAE, the features to which it contributes most, largest
            first; features with exactly no effect are left out.
        writers: for each of the top features, every writer that changes, largest share first.
        notes: remarks on writers that could not be separated.
    """

    through: pd.DataFrame
    writers: pd.DataFrame
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, features: Effects, components: Effects, effects: Sequence[Effect], model: Any, saes: Any, pairs: Pairs, top: int
    ) -> "ContributionTables":
        """Make both tables from one run of every prompt.

        Args:
            features, components: the tables of effects.
            effects: the effects that both tables hold.
            model, saes, pairs: those that were ranked.
            top: the number of components, of features, and of features per component.

        Raises:
            FeatpatchError: the model, SAEs or pairs are not those of the tables, or no SAE reads the residual stream.
        """
        lens = wrap(model)
        found = dictionaries(lens, saes)
        _check_origin(features, lens.digest(), found, pairs)
        stream = {dictionary.name: dictionary for dictionary in found if reads_stream(dictionary)}
        if not stream:
            raise FeatpatchError(
                f"the SAEs are at {', '.join(dictionary.place for dictionary in found)}: expected one SAE of the residual "
                "stream alone (hook_resid_pre, _mid or _post), which components write to; pass such SAEs, or compare without "
                "model, saes and pairs"
            )
        writers = Writers.of(lens, pairs[0])
        able = {writer for dictionary in stream.values() for writer in writers.before(dictionary.reads)[1:]}
        sources = [node for node in _ranked(components, effects[0]) if _writer(node) in able][:top]
        targets = [node for node in _ranked(features.where(kind="feature"), effects[0]) if node.sae in stream][:top]
        known = _Known.of(features.whole, components.whole, effects)
        downstream, upstream = _downstream(writers, sources, stream, known), _upstream(writers, targets, stream)
        answers = measure(writers, pairs, [*downstream, *upstream])
        through = [row for of_one in zip(downstream, answers[: len(downstream)], strict=True) for row in _rows(*of_one, top)]
        written = [row for of_one in zip(upstream, answers[len(downstream) :], strict=True) for row in _rows(*of_one, None)]
        written.sort(key=lambda row: -row.contribution)
        return cls(
            known.frame([row for node in sources for row in _of_component(through, node)[:top]]),
            known.frame([row for node in targets for row in written if row.feature == node]),
            _notes(writers),
        )


def reads_stream(dictionary: Dictionary) -> bool:
    """Return whether components write what a dictionary reads: one hook point of the residual stream."""
    return dictionary.single and sites.is_stream(dictionary.reads)


def _check_origin(features: Effects, model: str, found: list[Dictionary], pairs: Pairs) -> None:
    """Raise a FeatpatchError unless a table was made with this model, these SAEs and these pairs, by swapping values."""
    if pairs.digest() != features.metadata.get("pairs"):
        raise FeatpatchError(
            f"the {len(pairs)} pairs differ from those of the tables: expected the same pairs in the same order; pass the "
            "pairs that were ranked"
        )
    if features.metadata.get("noise") or features.metadata.get("ablation"):
        raise FeatpatchError(
            "the tables hold effects of ablation, or of prompts corrupted by noise: expected effects of patching between the "
            "two prompts of each pair, from which the change in each component's output is computed; compare without model, "
            "saes and pairs"
        )
    if model != features.metadata.get("model", {}).get("sha256"):
        raise FeatpatchError(
            "the model's weights differ from those of the tables: expected the same weights; pass the model that was ranked"
        )
    check_saes(features, digests(found))


def _ranked(table: Effects, effect: Effect) -> tuple[Node, ...]:
    return table.top(len(table), by=effect, kind=None).nodes


def _writer(node: Node) -> Writer:
    """Return the writer that a node names; a head's `result` is its `z` through W_O, so both name the same writer."""
    layer = sites.layer_of(node.site)
    is_result = node.site == sites.component(layer, "result")
    return Writer(sites.component(layer, "z") if is_result else node.site, node.kind, node.index)


def _downstream(writers: Writers, sources: list[Node], stream: dict[str, Dictionary], known: "_Known") -> list[Question]:
    """Ask for the contributions of components to all features with an effect that are downstream, for each position."""
    questions = []
    for position in dict.fromkeys(node.position for node in sources):
        here = [_writer(node) for node in sources if node.position == position]
        for dictionary in stream.values():
            before = tuple(writer for writer in writers.before(dictionary.reads) if writer in here)
            questions.append(Question(dictionary, position, before, known.acting(dictionary, position)))
    return questions


def _upstream(writers: Writers, targets: list[Node], stream: dict[str, Dictionary]) -> list[Question]:
    """Ask for the contributions of all upstream writers to each of the features."""
    groups: dict[tuple[str, Position], list[int]] = {}
    for node in targets:
        groups.setdefault((node.sae, node.position), []).append(node.index or 0)
    return [
        Question(stream[sae], position, tuple(writers.before(stream[sae].reads)), torch.tensor(indices), complete=True)
        for (sae, position), indices in groups.items()
    ]


def _rows(question: Question, answer: Contributions, top: int | None) -> list[Row]:
    """Return one row per feature and writer that changes in some pair.

    Args:
        question: the writers and features.
        answer: their contributions.
        top: the number of features per writer to which it contributes most; None for all.
    """
    dictionary, rows = question.dictionary, []
    for writer, of_writer, share, changed in zip(
        question.writers, answer.contribution, answer.share, answer.changed, strict=True
    ):
        for column in np.argsort(-abs(of_writer), kind="stable")[: top if changed else 0]:
            index = int(question.features[column])
            feature = Node(dictionary.writes, "feature", index, question.position, dictionary.name)
            rows.append(Row(writer, feature, float(of_writer[column]), float(answer.change[column]), float(share[column])))
    return rows


def _of_component(rows: list[Row], node: Node) -> list[Row]:
    """Return the rows of the features to which a component contributes, largest contribution first."""
    own = [row for row in rows if row.writer == _writer(node) and row.feature.position == node.position and row.contribution]
    return sorted(own, key=lambda row: -abs(row.contribution))


@dataclass(frozen=True)
class _Known:
    """Measured effects of components and features.

    Attributes:
        effects: the names of the effects.
        components: the effects `[effects]` of each writer at each position.
        features: the effects `[effects]` of each feature.
        ranked: the dictionaries and positions that were ranked, where a feature without a row has no effect.
    """

    effects: Sequence[Effect]
    components: dict[tuple[Writer, Position], NDArray[np.float64]]
    features: dict[Node, NDArray[np.float64]]
    ranked: set[tuple[str, Position]]

    @classmethod
    def of(cls, features: Effects, components: Effects, effects: Sequence[Effect]) -> "_Known":
        of_components, of_features = (np.stack([t.pooled(effect) for effect in effects], 1) for t in (components, features))
        return cls(
            effects,
            {(_writer(node), node.position): values for node, values in zip(components.nodes, of_components, strict=True)},
            {node: values for node, values in zip(features.nodes, of_features, strict=True) if node.kind == "feature"},
            {(node.sae, node.position) for node in features.nodes},
        )

    def frame(self, rows: list[Row]) -> pd.DataFrame:
        """Return the rows as a table with the effects of components and features."""
        table = Frame(
            [(*astuple(row.writer), row.feature.position, row.feature.sae, row.feature.index, *row[2:]) for row in rows],
            columns=COLUMNS,
        ).astype({"index": "Int64", "position": object})
        unknown = np.full(len(self.effects), np.nan)
        of_components = [self.components.get((row.writer, row.feature.position), unknown) for row in rows]
        of_features = [self.features.get(row.feature, unknown) for row in rows]
        for column, effect in enumerate(self.effects):
            table.insert(4 + column, effect, [values[column] for values in of_components])
            table.insert(int(table.columns.get_loc("contribution")), f"feature_{effect}", [v[column] for v in of_features])
        return table

    def acting(self, dictionary: Dictionary, position: Position) -> Int[torch.Tensor, " features"]:
        """Return the indices of the features with an effect; all features if none was ranked at this position."""
        if (dictionary.name, position) not in self.ranked:
            return torch.arange(dictionary.d_sae)
        here = {
            node.index: values
            for node, values in self.features.items()
            if (node.sae, node.position) == (dictionary.name, position)
        }
        return torch.tensor([index for index, values in here.items() if index is not None and values.any()], dtype=torch.long)


def _notes(writers: Writers) -> tuple[str, ...]:
    layers = [str(layer) for layer, weight in enumerate(writers.weights) if weight is None]
    if not layers:
        return ()
    return (
        f"the heads of layer {', '.join(layers)} do not write to the residual stream individually, because attention's output "
        "passes through a norm: hook_attn_out counts as one writer there",
    )
