"""The result of `fp.attribution_graph`: nodes, direct effects, influence, pruning and tables."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices, check_kinds, check_numbers, counted, is_number
from featpatch.frame import Frame
from featpatch.nodes import LOGITS, Node, Patch
from featpatch.tracing.influence import Kinds, pruned
from featpatch.untrusted import visible

Numbers = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """The direct effects between the features, errors, tokens and logits of a prompt.

    Attributes:
        nodes: features by layer, position and index; errors by layer and position; tokens; logits.
        adjacency: the effect of each source (columns) on each target (rows), `[nodes, nodes]`; rows of errors and tokens are 0.
        values: the activation of each feature, and each logit minus the mean logit, `[nodes]`; NaN for errors and tokens.
        biases: what biases contribute to each target, `[nodes]`; NaN for errors and tokens.
        others: what everything that is no node, or no edge of a pruned graph, contributes to each target, `[nodes]`.
        probabilities: the probability of each logit.
        influence: the influence of each node on the logits, `[nodes]`.
        totals: what the logits, weighted by their probabilities, lose when each node is ablated and features react linearly,
            along all paths, `[nodes]`: influence with signs.
        cumulative: the share of the total influence that each node has together with all of larger influence, `[nodes]`.
        replacement_score: the share of the influence on the logits that begins at tokens rather than at errors.
        completeness_score: the share of the inputs of nodes that are not errors, weighted by influence.
        left_out: the number of active features that are no nodes.
        prompt, words, text: the tokens of the prompt, as ids, each as text, and together as text.
        answers: the text of each logit's token.
        model: the name of the model, and `n_layers` the number of its layers.
        source_set: the model and the set of sources on Neuronpedia that the transcoders are from, such as
            `"gemma-2-2b/gemmascope-transcoder-16k"`; empty if they do not say.
        pruning: the shares of influence that nodes and edges were reduced to; None if the graph is complete.
        finished: False if Ctrl-C ended the computation, so that features are left out as with a smaller `size`.

    Examples:
        >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False)
        >>> graph.to_pandas(3).columns.tolist()
        ['layer', 'position', 'token', 'kind', 'index', 'sae', 'value', 'influence', 'cumulative']
    """

    nodes: tuple[Node, ...]
    adjacency: Numbers
    values: Numbers
    biases: Numbers
    others: Numbers
    probabilities: Numbers
    influence: Numbers
    totals: Numbers
    cumulative: Numbers
    replacement_score: float
    completeness_score: float
    left_out: int
    prompt: tuple[int, ...] = ()
    words: tuple[str, ...] = field(default=(), repr=False)
    text: str = field(default="", repr=False)
    answers: tuple[str, ...] = field(default=(), repr=False)
    model: str = ""
    n_layers: int = 0
    source_set: str = ""
    pruning: tuple[float, float] | None = None
    finished: bool = True

    @property
    def targets(self) -> NDArray[np.intp]:
        """The numbers of the nodes that have inputs: features and logits."""
        kinds = ("feature", "logit")
        return np.array([number for number, node in enumerate(self.nodes) if node.kind in kinds], dtype=np.intp)

    @property
    def kinds(self) -> Kinds:
        """The number of nodes of each kind."""
        features, logits = (sum(node.kind == kind for node in self.nodes) for kind in ("feature", "logit"))
        tokens = sum(node.site == sites.EMBEDDING for node in self.nodes)
        return Kinds(features, len(self.nodes) - features - logits - tokens, tokens, logits)

    def residual(self) -> Numbers:
        """Return the value of each target minus the sum of its inputs, its bias and the contributions of others, `[targets]`.

        It is rounding error, in a pruned graph too.
        """
        at = self.targets
        return self.values[at] - (self.adjacency[at].sum(1) + self.biases[at] + self.others[at])

    def number(self, node: Node) -> int:
        """Return the number of a node.

        Raises:
            FeatpatchError: the graph has no such node.
        """
        check_kinds(Node, node=node)
        if node not in self.nodes:
            raise FeatpatchError(f"{node} is not in the graph: expected one of graph.nodes, such as {self.nodes[0]}")
        return self.nodes.index(node)

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
        """Return the graph of the nodes, and then edges, that have these shares of the influence on the logits.

        Tokens and logits are kept, nodes that are no longer connected are not. Influence, totals, scores and `cumulative` stay
        those of the complete graph. What is cut off moves to `others`, so that inputs still sum to values.

        Args:
            nodes: the share of the influence of nodes; the defaults are those of circuit-tracer.
            edges: the share of the influence of the edges between these.

        Raises:
            FeatpatchError: a share is not between 0 and 1, or the graph is pruned already.

        Examples:
            >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False)
            >>> graph.prune(nodes=0.5).pruning
            (0.5, 0.98)
        """
        for name, share in (("nodes", nodes), ("edges", edges)):
            if not is_number(share) or not 0 <= share <= 1:
                raise FeatpatchError(f"{name}={share!r}: expected a share of influence from 0 to 1, such as 0.8")
        if self.pruning is not None:
            raise FeatpatchError("the graph is pruned already: expected a complete one; prune the result of attribution_graph")
        matrix = torch.from_numpy(self.adjacency)
        weights = torch.zeros(len(self.nodes), dtype=matrix.dtype)
        weights[len(weights) - len(self.probabilities) :] = torch.from_numpy(self.probabilities)
        kept, links = pruned(matrix, weights, self.kinds, float(nodes), float(edges))
        at = kept.numpy()
        inside = np.where(links.numpy(), self.adjacency, 0)
        cut = (self.adjacency - inside).sum(1)
        return replace(
            self,
            nodes=tuple(node for node, keep in zip(self.nodes, at, strict=True) if keep),
            adjacency=inside[np.ix_(at, at)],
            others=(self.others + cut)[at],
            left_out=self.left_out + int((~at[: self.kinds.features]).sum()),
            pruning=(float(nodes), float(edges)),
            **{name: getattr(self, name)[at] for name in ("values", "biases", "influence", "totals", "cumulative")},
        )

    def to_pandas(self, n: int | None = None, *, of: Literal["nodes", "edges"] = "nodes") -> Any:
        """Return a table of the nodes by influence, or of the edges by their size, the largest first.

        Args:
            n: the number of rows; all by default.
            of: what a row is.

        Raises:
            FeatpatchError: an argument is not valid.

        Examples:
            >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False).prune()
            >>> graph.to_pandas(3, of="edges").columns.tolist()
            ['source', 'target', 'effect']
        """
        check_numbers(0, n=0 if n is None else n)
        check_choices(("nodes", "edges"), of=of)
        if of == "edges":
            targets, found = self.adjacency.nonzero()
            order = np.argsort(-abs(self.adjacency[targets, found]), kind="stable")[:n]
            pairs = [(int(found[row]), int(targets[row])) for row in order]
            ends = [(self.name(source), self.name(target), self.adjacency[target, source]) for source, target in pairs]
            return Frame(ends, columns=["source", "target", "effect"])
        rows = []
        for number in np.argsort(-self.influence, kind="stable")[:n]:
            node = self.nodes[number]
            at = int(node.position)
            layer = None if node.site in (LOGITS.site, sites.EMBEDDING) else sites.layer_of(node.site)
            kind = "token" if node.site == sites.EMBEDDING else "mlp" if node.kind == "activation" else node.kind
            last = (node.sae, self.values[number], self.influence[number], self.cumulative[number])
            rows.append((layer, at, self.words[at] if self.words else "", kind, node.index, *last))
        columns = ["layer", "position", "token", "kind", "index", "sae", "value", "influence", "cumulative"]
        return Frame(rows, columns=columns).astype({"layer": "Int64", "index": "Int64"})

    def name(self, number: int) -> str:
        """Return the name of a node for people, such as `L3 feature 121 @ 5 ' Mary'`.

        Raises:
            FeatpatchError: the graph has no node of this number.
        """
        check_numbers(0, number=number)
        if number >= len(self.nodes):
            raise FeatpatchError(f"number={number}: expected the number of a node, from 0 to {len(self.nodes) - 1}")
        node = self.nodes[number]
        at = int(node.position)
        where = f"@ {at}{f' {self.words[at]!r}' if self.words else ''}"
        if node.kind == "logit":
            return f"logit {self.answers[number - len(self.nodes)]!r}" if self.answers else f"logit {node.index}"
        if node.site == sites.EMBEDDING:
            return f"token {where}"
        kind = "mlp" if node.kind == "activation" else node.kind
        return f"L{sites.layer_of(node.site)} {kind}{'' if node.index is None else f' {node.index}'} {where}"

    def to_networkx(self) -> Any:
        """Return a `networkx.MultiDiGraph` of the nodes that have edges, with `effect` on edges and `influence` on nodes.

        Give it to the functions of `fp.diagram` for DOT, a figure or an HTML page.

        Examples:
            >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False).prune(nodes=0.5, edges=0.8)
            >>> page = fp.diagram.interactive(graph.to_networkx(), title="IOI")
            >>> "IOI" in page
            True
        """
        import networkx as nx

        made = nx.MultiDiGraph()
        targets, found = self.adjacency.nonzero()
        for number in sorted({*targets.tolist(), *found.tolist()}):
            made.add_node(self.nodes[number], influence=float(self.influence[number]), value=float(self.values[number]))
        for target, source in zip(targets, found, strict=True):
            made.add_edge(self.nodes[source], self.nodes[target], "", effect=float(self.adjacency[target, source]))
        return made

    def to_viewer(
        self, slug: str, *, scan: str = "", source_set: str = "", groups: "tuple[Patch, ...] | list[Patch]" = ()
    ) -> dict[str, Any]:
        """Return the graph as a dictionary for the viewers of circuit-tracer and Neuronpedia, see `fp.diagram.viewer_json`.

        Write it with `json.dump` to a file `{slug}.json`. Prune the graph first, because viewers slow down above some ten
        thousand edges.

        Args:
            slug: the name of the file, and of the graph in a viewer's address.
            scan: the name of the model in the viewer, such as `"gemma-2-2b"`; by default the model's own.
            source_set: the set of sources on Neuronpedia whose dashboards are shown for the features, such as
                `"gemmascope-transcoder-16k"`; by default that of the transcoders, if they say so.
            groups: patches with names, such as `groups.patches` of `fp.group_features`; their nodes in the graph become
                supernodes.

        Raises:
            FeatpatchError: the slug does not fit into an address, or an argument is of another type.

        Examples:
            >>> import json
            >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False).prune()
            >>> _ = (folder / "ioi.json").write_text(json.dumps(graph.to_viewer("ioi")))
        """
        from featpatch.tracing.exports import viewer

        return viewer(self, slug, scan=scan, source_set=source_set, groups=groups)

    def __repr__(self) -> str:
        kinds = self.kinds
        edges = int((self.adjacency != 0).sum())
        end = self.text if len(self.text) <= 60 else f"...{self.text[-60:]}"
        shown = f" of {end!r}" if end else ""
        logits = ", ".join(
            f"{answer!r} {share:.2f}" for answer, share in list(zip(self.answers, self.probabilities, strict=False))[:3]
        )
        pruning = "" if self.pruning is None else f", pruned to {self.pruning[0]:g} and {self.pruning[1]:g} of the influence"
        return visible(
            f"attribution graph{shown}: {counted(kinds.features, 'feature')}, {counted(kinds.errors, 'error')}, "
            f"{counted(kinds.tokens, 'token')}, {counted(kinds.logits, 'logit')} ({logits}), {counted(edges, 'edge')}{pruning}"
            f"; replacement {self.replacement_score:.2f}, completeness {self.completeness_score:.2f}"
            f"{'' if self.finished else '; interrupted'}"
        )
