"""Groups of features ("supernodes"): found by similarity or given, and each patched jointly and exactly.

    interaction = effect of the joint patch - sum of the effects of its members

Members that carry the same information, each of which is enough or is compensated for, have a sum above the joint effect when
the corrupted run is repaired (interaction < 0: redundant). Members that are only needed together have a sum below it
(interaction > 0: super-additive), because a single one of many small parts changes next to nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from featpatch.descriptions import READ, check_texts, descriptions_of, documents_of
from featpatch.effects.selection import measured_effect
from featpatch.effects.statistics import interval
from featpatch.effects.table import Effects
from featpatch.engine.journal import beside
from featpatch.errors import FeatpatchError, check_choices, check_kinds, check_numbers, counted, is_number
from featpatch.frame import Frame, text
from featpatch.metrics import Metrics
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import DIRECTIONS, Combine, Direction, Effect, Node, Patch
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.ranking.nodes import complete, rank_nodes
from featpatch.ranking.similarity import (
    activation_profiles,
    attribution_profiles,
    clusters,
    cosines,
    decoder_profiles,
    effect_profiles,
)
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.sae.nodes import check_nodes, with_owner
from featpatch.untrusted import in_figure

Similarity = Literal["effects", "attribution", "decoder", "coactivation", "labels", "site"]
"""What makes features similar; for the last two, it is being the same."""

LEAST = 0.5
"""The default mean similarity of groups that are joined."""

WORDS = 3
"""The largest number of descriptions in the name of a group."""


@dataclass(frozen=True, repr=False)
class Groups:
    """Groups of features with the exact effects of their joint patches, beside those of their members.

    Attributes:
        patches: the groups, those with the largest effect first.
        effects: the table of all members and then of the groups (rows of kind `set`).

    Examples:
        >>> groups = fp.group_features(model, saes, pairs, effects.top(6), similarity="site", progress=False)
        >>> len(groups), len(groups.members(groups.patches[0].name))
        (2, 5)
    """

    patches: tuple[Patch, ...]
    effects: Effects

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def names(self) -> list[str]:
        """The names of the groups."""
        return [patch.name for patch in self.patches]

    @property
    def joint(self) -> Effects:
        """A table of the groups alone, in the same order."""
        return replace(self.effects.where(kind="set"), taken_from=None)

    def members(self, name: str) -> Effects:
        """Return the rows of the members of a group, each patched alone.

        Raises:
            FeatpatchError: there is no such group.
        """
        check_choices(self.names, name=name)
        (patch,) = (patch for patch in self.patches if patch.name == name)
        return self.effects.take([self.effects.nodes.index(node) for node in patch.nodes])

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per group: the joint effect, the sum of its members' effects, and their difference.

        The columns are `group`, `members` (their number), `site` and `position` ("several" if they differ) and, for each
        effect, such as `recovery`: the joint effect, `recovery_sum`, and `recovery_interaction`, the joint effect minus the
        sum, with 95 % bootstrap intervals over pairs (`_low`, `_high`).

        Examples:
            >>> groups = fp.group_features(model, saes, pairs, effects.top(6), similarity="site", progress=False)
            >>> groups.to_pandas().filter(regex="^(group|members|recovery)$")
                                            group  members  recovery
             features of blocks.1.hook_resid_pre        5     0.152
            features of blocks.3.hook_resid_post        1    0.0123
        """
        joint, number = self.joint, {node: row for row, node in enumerate(self.effects.nodes)}
        columns: dict[str, Any] = {"group": self.names, "members": [len(patch.nodes) for patch in self.patches]}
        for name in ("site", "position"):
            found = [{getattr(node, name) for node in patch.nodes} for patch in self.patches]
            columns[name] = [next(iter(values)) if len(values) == 1 else "several" for values in found]
        table = Frame(columns)
        for effect in joint.directions_run():
            changes, together = self.effects.changes(effect).toarray(), joint.changes(effect).toarray()
            alone = np.stack([changes[[number[node] for node in patch.nodes]].sum(0) for patch in self.patches])
            table[effect], (table[f"{effect}_low"], table[f"{effect}_high"]) = joint.pooled(effect), joint.interval(effect).T
            table[f"{effect}_sum"] = alone.sum(1) / joint.scale.sum()
            table[f"{effect}_interaction"] = (together - alone).sum(1) / joint.scale.sum()
            limits = interval(together - alone, joint.scale)
            table[f"{effect}_interaction_low"], table[f"{effect}_interaction_high"] = limits.T
        return table

    def plot(self, effect: Effect | None = None, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of the groups, with a bar for the joint effect and one for the sum.

        Args:
            effect: the effect; by default recovery if it was run, else degradation.
            title: the title of the figure.

        Raises:
            FeatpatchError: the effect was not run, or the title is not a string.

        Examples:
            >>> groups = fp.group_features(model, saes, pairs, effects.top(6), similarity="site", progress=False)
            >>> [bar.name for bar in groups.plot().data]
            ['together', 'sum of members alone']
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        chosen, table = measured_effect(effect, self.effects.directions_run()), self.to_pandas()
        names = [in_figure(name) for name in self.names]
        figure = go.Figure(layout={"title": in_figure(title), "xaxis_title": self.effects.titled(chosen), "barmode": "group"})
        up, down = table[f"{chosen}_high"] - table[chosen], table[chosen] - table[f"{chosen}_low"]
        ends = {"array": up, "arrayminus": down}
        figure.add_bar(y=names, x=table[chosen], name="together", orientation="h", error_x=ends)
        figure.add_bar(y=names, x=table[f"{chosen}_sum"], name="sum of members alone", orientation="h")
        return figure.update_yaxes(autorange="reversed")

    def __repr__(self) -> str:
        return f"{self._title()}\n{text(self._brief())}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._title())}</p>{self._brief().to_html(index=False, max_rows=20, float_format='{:.3g}'.format)}"

    def _title(self) -> str:
        size = f"{counted(len(self), 'group')} of {counted(len(self.effects) - len(self), 'node')}"
        return f"{size}, patched together (exact, {self.effects.metadata['metric']})"

    def _brief(self) -> pd.DataFrame:
        """Return the table with the sum and the interaction of the first effect only."""
        table, (_, *others) = self.to_pandas(), self.effects.directions_run()
        return table.drop(columns=[name for effect in others for name in table.columns if name.startswith(f"{effect}_")])


def group_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    nodes: Effects | Sequence[Node] | Mapping[str, Effects | Sequence[Node]],
    *,
    similarity: Similarity | None = None,
    least: float | None = None,
    size: int | None = None,
    labels: Mapping[Node, str] | None = None,
    texts: Sequence[str] | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    combine: Combine | None = None,
    batch_rows: int | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Groups:
    """Group features, and measure the exact effect of each group beside the sum of its members' effects.

    Many features with small effects can be one cause together. Groups are also called supernodes (Ameisen et al. 2025). Each
    is patched jointly, as in `rank_nodes`. A similarity only proposes groups: it does not change what is measured.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: the SAEs of the features.
        pairs: clean and corrupted prompts with their answers.
        nodes: the features: a table of effects, of whose rows the features are grouped, or a list of nodes; or groups of your
            own, as a dictionary of lists of nodes by name, whose nodes may be of any kind.
        similarity: what makes features similar. `"effects"` (the default): their exact effects over the pairs.
            `"attribution"`: their effects over the pairs, estimated by gradients. `"decoder"`: the directions that they write.
            `"coactivation"`: the tokens on which they are active. `"labels"`: having the same label. `"site"`: belonging to the
            same dictionary, hook point and position. Not with groups of your own.
        least: the least mean similarity (cosine) of groups that are joined; 0.5 by default.
        size: the number of groups, instead of `least`.
        labels: labels of features, such as those of `fp.load_labels`, by node, whatever its position; they name the groups.
            Features without a label are left as groups of their own.
        texts: documents that show what features are active on, for `"coactivation"` and for names; by default the prompts of
            the pairs.
        journal: as in `rank_nodes`; the effects of features that are given as a list are written to a second file,
            with `.alone` at the end of its name.
        directions, metric, combine, batch_rows, executor, progress: as in `rank_nodes`.

    Returns:
        The groups. Their names are the most frequent labels of their members or, without labels, the words on which most of the
        members are active, or before which they are.

    Raises:
        FeatpatchError: the input is unusable; the message gives the value, what was expected and what to do next.

    Examples:
        >>> groups = fp.group_features(model, saes, pairs, effects.top(20), similarity="decoder", size=5, progress=False)
        >>> len(groups)
        5
        >>> own = {"names": effects.top(2).nodes, "third": [effects.top(3).nodes[2]]}
        >>> fp.group_features(model, saes, pairs, own, progress=False).names
        ['names', 'third']
    """
    lens = wrap(model)
    found = dictionaries(lens, saes)
    check_pairs(pairs)
    _check(nodes, similarity, least, size, labels, texts)
    options: dict[str, Any] = {
        "directions": directions, "metric": metric, "batch_rows": batch_rows, "executor": executor, "progress": progress
    }  # fmt: skip
    if isinstance(nodes, Mapping):
        groups = {name: check_nodes(lens, some, found, f"nodes[{name!r}]") for name, some in nodes.items()}
    else:
        features = _features(lens, nodes, found)
        if size is not None and size > len(features):
            raise FeatpatchError(f"size={size}: expected at most {len(features)} groups, the number of features")
        known = {_bare(node): label for node, label in (labels or {}).items()}
        if known and not any(_bare(node) in known for node in features):
            raise FeatpatchError(
                f"labels of {counted(len(known), 'node')}, none of which is among the features (the first is "
                f"{str(next(iter(known)))!r}): expected labels of these features; load those of their SAE, or leave labels out"
            )
        prompts = documents_of(lens, pairs[:READ] if texts is None else texts)
        keys: Sequence[Any]
        if similarity == "labels":
            keys = [known.get(_bare(node), node) for node in features]
        elif similarity == "site":
            keys = [(node.sae, node.site, node.position) for node in features]
        else:
            if similarity == "decoder":
                profiles = decoder_profiles(features, found)
            elif similarity == "coactivation":
                profiles = activation_profiles(lens, features, found, prompts)
            elif similarity == "attribution":
                profiles = attribution_profiles(model, saes, pairs, features, metric, directions, combine, progress=progress)
            else:
                alone = nodes
                if not isinstance(alone, Effects):
                    rank = partial(rank_nodes, model, pairs, features, saes=saes, combine=combine, together=False, **options)
                    alone = complete(rank(journal=beside(journal, ".alone")), journal)
                if not alone.finished:
                    raise FeatpatchError(
                        "nodes is a table whose ranking was interrupted: expected effects in all pairs; rank the features to "
                        "the end first, or choose another similarity"
                    )
                profiles = effect_profiles(alone, features)
            keys = clusters(cosines(profiles), least=LEAST if least is None else least, count=size)
        alike: dict[Any, list[Node]] = defaultdict(list)
        for key, node in zip(keys, features, strict=True):
            alike[key].append(node)
        groups = _named(lens, found, list(alike.values()), similarity == "site", known, prompts)
    patches = [Patch(tuple(some), name) for name, some in groups.items()]
    members = list(dict.fromkeys(node for patch in patches for node in patch.nodes))
    asked = [*members, *patches]
    table = complete(rank_nodes(model, pairs, asked, saes=saes, combine=combine, journal=journal, **options), journal)
    sizes = np.abs(table.pooled(table.directions_run()[0]))[len(members) :]
    order = np.argsort(-sizes, kind="stable")
    effects = replace(table.take(np.append(np.arange(len(members)), len(members) + order)), taken_from=None)
    return Groups(tuple(patches[row] for row in order), effects)


def _check(nodes: Any, similarity: Any, least: Any, size: Any, labels: Any, texts: Any) -> None:
    """Raise a FeatpatchError unless the arguments that determine the groups fit together."""
    check_choices(get_args(Similarity), similarity="effects" if similarity is None else similarity)
    if isinstance(nodes, Mapping):
        given = {"similarity": similarity, "least": least, "size": size, "labels": labels, "texts": texts}
        if needless := [name for name, value in given.items() if value is not None]:
            raise FeatpatchError(f"groups of your own with {', '.join(needless)}: expected only nodes; leave out the others")
        if not nodes or not all(isinstance(name, str) and name for name in nodes):
            raise FeatpatchError(
                f"nodes={nodes!r:.80}: expected groups by name, each a list of nodes, such as {{'names': effects.top(3).nodes}}"
            )
    if similarity in ("labels", "site") and (least is not None or size is not None):
        raise FeatpatchError(f"similarity={similarity!r} with least={least} and size={size}: expected neither; leave them out")
    if least is not None and size is not None:
        raise FeatpatchError(f"least={least} with size={size}: expected one of them; leave the other out")
    if least is not None and (not is_number(least) or not -1 <= least <= 1):
        raise FeatpatchError(f"least={least!r}: expected a cosine, from -1 to 1")
    check_numbers(1, size=1 if size is None else size)
    named = isinstance(labels, Mapping) and all(isinstance(k, Node) and isinstance(v, str) and v for k, v in labels.items())
    if labels is not None and not named:
        raise FeatpatchError(f"labels={labels!r:.80}: expected a text for each node, such as fp.load_labels(path, sae)")
    if similarity == "labels" and not labels:
        raise FeatpatchError(
            "similarity='labels' without labels: expected a text for each node, such as labels=fp.load_labels(path, sae)"
        )
    if texts is not None:
        check_texts(texts)
        if similarity in ("labels", "site"):
            raise FeatpatchError(
                f"texts with similarity={similarity!r}: expected no texts, because neither groups nor names depend on them"
            )


def _features(lens: Lens, nodes: Any, found: Sequence[Dictionary]) -> list[Node]:
    """Return the features that are grouped.

    Raises:
        FeatpatchError: there are none, or a list holds another node.
    """
    features = check_nodes(lens, nodes.where(kind="feature") if isinstance(nodes, Effects) else nodes, found, "nodes")
    if strange := next((node for node in features if node.kind != "feature"), None):
        raise FeatpatchError(
            f"{str(strange)!r} is among the nodes: expected features; to measure a group with other nodes, pass groups of your "
            "own, such as nodes={'name': [...]}"
        )
    return [with_owner(lens, node, found)[0] for node in features]


def _bare(node: Node) -> Node:
    """Return the node of a feature at all positions."""
    return replace(node, position="all")


def _named(
    lens: Lens,
    found: Sequence[Dictionary],
    groups: Sequence[list[Node]],
    by_site: bool,
    labels: Mapping[Node, str],
    prompts: Sequence[tuple[int, ...]],
) -> dict[str, list[Node]]:
    """Name groups by their hook point, by their most frequent label, or by what their members are active on; each name once."""
    said = {} if by_site else _said(lens, found, [node for some in groups for node in some], labels, prompts)
    named: dict[str, list[Node]] = {}
    for number, some in enumerate(groups, 1):
        words = Counter(word for node in some if (word := said.get(_bare(node))))
        name = ", ".join(word for word, _ in words.most_common(WORDS)) or f"group {number}"
        if by_site:
            name = f"features of {some[0].sae}" + ("" if some[0].site in some[0].sae else f" at {some[0].site}")
            several = {node.position for other in groups for node in other if node.sae == some[0].sae}
            name += f" @ {some[0].position}" if len(several) > 1 else ""
        while name in named:
            name += f" ({number})"
        named[name] = some
    return named


def _said(
    lens: Lens,
    found: Sequence[Dictionary],
    features: Sequence[Node],
    labels: Mapping[Node, str],
    prompts: Sequence[tuple[int, ...]],
) -> dict[Node, str]:
    """Return the label of each feature or, without one, the word that it detects; empty if it has neither."""
    rest = list(dict.fromkeys(node for node in map(_bare, features) if node not in labels))
    if not rest or lens.tokenizer is None:
        return dict(labels)
    described = descriptions_of(lens, found, rest, prompts, 1)
    return {**labels, **{node: f"{of.label} {of.word!r}" if of.word else "" for node, of in zip(rest, described, strict=True)}}
