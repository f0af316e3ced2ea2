"""Query-key attribution: which pairs of features make a head attend from one position to another.

    score = scale * R_q q . R_k k,   q = N_q (W_Q norm(x_q) + b_Q),   k = N_k (W_K norm(x_k) + b_K)

With the scales of norms frozen (and of the norms N of queries and keys, if the model has them), and rotations R being fixed,
q and k are linear in the features, error and biases that the residual stream consists of, so that the score is a sum over pairs
of them (Kamath et al. 2025, "Tracing Attention Computation Through Feature Interactions").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices, check_numbers, is_integer
from featpatch.frame import Frame
from featpatch.model.layer import Layer, Linear, Norm, UnsupportedError, soft_capped
from featpatch.model.lens import Lens
from featpatch.model.projections import rounding, wide
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node, Position, numbered
from featpatch.pairs.build import Prompt
from featpatch.pairs.pair import Pair, token_index
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.tracing.prompt import prompt_of, words_of
from featpatch.untrusted import visible

Heads = Float[torch.Tensor, "parts d_head"]

Part = Node | None
"""A feature or the error of an SAE, or None for all biases together."""


@dataclass(frozen=True, eq=False, repr=False)
class QueryKeyAttribution:
    """The contributions of pairs to the attention score of a head from a query position to a key position.

    Attributes:
        queries, keys: the active features, the error and the bias (None) at either position.
        values: the contribution of each pair to the score, `[queries, keys]`.
        score: the score before the softmax, and before a soft-cap or mask.
        layer, head: the head.
        query, key: the two positions, as token indices.
        words: the tokens at the two positions.

    Examples:
        >>> found = fp.qk_attribution(model, saes, pairs[0], layer=1, head=3, query="end", key="S2")
        >>> bool(abs(found.residual()) < 1e-4)
        True
        >>> found.to_pandas(3).columns.tolist()
        ['query', 'key', 'score']
    """

    queries: tuple[Part, ...]
    keys: tuple[Part, ...]
    values: NDArray[np.floating[Any]]
    score: float
    layer: int
    head: int
    query: int
    key: int
    words: tuple[str, str]

    def residual(self) -> float:
        """Return the score minus the sum over all pairs: rounding error."""
        return self.score - float(self.values.sum())

    def to_pandas(self, n: int | None = 20, *, of: Literal["pairs", "query", "key"] = "pairs") -> Any:
        """Return a table of contributions to the score, the largest first.

        Args:
            n: the number of rows; None for all.
            of: what a row is: a pair, or all pairs with one feature, error or bias of the query or of the key.

        Raises:
            FeatpatchError: an argument is not valid.
        """
        check_numbers(0, n=0 if n is None else n)
        check_choices(("pairs", "query", "key"), of=of)
        if of != "pairs":
            parts, sums = (self.queries, self.values.sum(1)) if of == "query" else (self.keys, self.values.sum(0))
            order = np.argsort(-abs(sums), kind="stable")[:n]
            return Frame([(_said(parts[row]), sums[row]) for row in order], columns=[of, "score"])
        order = np.argsort(-abs(self.values), axis=None, kind="stable")[:n]
        rows = [divmod(int(place), len(self.keys)) for place in order]
        named = [(_said(self.queries[one]), _said(self.keys[other]), self.values[one, other]) for one, other in rows]
        return Frame(named, columns=["query", "key", "score"])

    def __repr__(self) -> str:
        return visible(f"{self._title}\n{self.to_pandas(10)}")

    def _repr_html_(self) -> str:
        return (
            f"<p>{visible(self._title)}</p>{self.to_pandas(10).to_html(index=False, escape=True, float_format='{:.3f}'.format)}"
        )

    @property
    def _title(self) -> str:
        ends = [f"{at} {word!r}" for at, word in zip((self.query, self.key), self.words, strict=True)]
        return f"score {self.score:.3f} of layer {self.layer} head {self.head} from {ends[0]} (query) to {ends[1]} (key)"


def _said(part: Part) -> str:
    return "bias" if part is None else numbered(part.kind, part.index)


@torch.no_grad()
def qk_attribution(
    model: Any, saes: Any, prompt: Prompt | Pair, layer: int, head: int, *, query: Position = -1, key: Position
) -> QueryKeyAttribution:
    """Attribute the attention score of a head to pairs of a feature at the query position and one at the key position.

    All pairs, with the error and the biases on either side, sum to the score exactly. The scales of norms are frozen at their
    values on the prompt; rotary positions, norms of queries and keys, and keys that heads share are part of the products. A
    score says how much a head attends only beside the scores of other keys, because the softmax compares them.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: SAEs, of which one is at the residual stream that the layer reads: `blocks.{layer}.hook_resid_pre`, or
            `hook_resid_post` of the layer below.
        prompt: a text, token ids, or a pair, of which the clean prompt up to the answer is used.
        layer, head: the head.
        query, key: the positions that the head attends from and to: token indices (-1 is the last) or labels of the pair.

    Returns:
        The contribution of each pair, in a table or a matrix.

    Raises:
        FeatpatchError: the input is unusable, no SAE is at the residual stream that the layer reads, its decoder is not linear,
            or the model's layers do not have the standard form.

    Examples:
        >>> found = fp.qk_attribution(model, saes, pairs[0], layer=1, head=3, query="end", key="S2")
        >>> found.values.shape == (len(found.queries), len(found.keys))
        True
    """
    lens = wrap(model)
    check_numbers(0, layer=layer, head=head)
    if layer >= lens.n_layers or head >= lens.n_heads:
        raise FeatpatchError(
            f"layer={layer}, head={head}: expected a layer from 0 to {lens.n_layers - 1} and a head from 0 to "
            f"{lens.n_heads - 1}"
        )
    ids, _ = prompt_of(lens, prompt)
    ends = tuple(_index(prompt, name, position, len(ids)) for name, position in (("query", query), ("key", key)))
    if lens.causal and ends[1] > ends[0]:
        raise FeatpatchError(
            f"query={ends[0]}, key={ends[1]}: expected a key at or before the query, which is all that it sees"
        )
    lens.check_unhooked()
    try:
        made = lens.stack(len(ids), len(ids)).layers[layer]
    except UnsupportedError as error:
        raise FeatpatchError(
            f"the layers of {lens.name!r} ({lens.kind}) do not have the standard form ({error}): expected attention with "
            "separate queries and keys whose weights can be read; use fp.rank_paths into the head's query or key instead"
        ) from error
    dictionary = _chosen(lens, saes, layer)
    stream, pattern = sites.resid_pre(layer), sites.component(layer, "pattern")
    tokens = torch.tensor([ids])
    read = lens.read(tokens, [stream, pattern, *dictionary.hooks])
    x = wide(read[stream])[0].to(made.device)
    sides = _Sides(made, head, x)
    split = dictionary.split(read)
    parts, vectors = zip(*(_parts(dictionary, split, at, x) for at in ends), strict=True)
    products = sides.linear("query", ends[0], vectors[0]) @ sides.linear("key", ends[1], vectors[1]).T
    scores = sides.scores(ends[0])
    _check_pattern(lens, made, scores, wide(read[pattern])[0, head, ends[0]].to(scores))
    words = words_of(lens, [ids[at] for at in ends])
    values = (products * made.scale).cpu().numpy()
    return QueryKeyAttribution(
        parts[0], parts[1], values, float(scores[ends[1]]), int(layer), int(head), ends[0], ends[1], (words[0], words[1])
    )


def _index(prompt: Any, name: str, position: Any, length: int) -> int:
    """Return the token index of a position; raise a FeatpatchError unless it is the position of one token."""
    if is_integer(position):
        return token_index(int(position), length)
    labels = prompt.labels if isinstance(prompt, Pair) else {}
    places: Sequence[int] = prompt.positions(position) if isinstance(position, str) and position in labels else ()
    if len(places) != 1:
        known = ", ".join(labels) if labels else "none" if isinstance(prompt, Pair) else "none, because the prompt is no pair"
        raise FeatpatchError(f"{name}={position!r:.60}: expected a token index or a label of one token ({known})")
    return token_index(places[0], length)


def _chosen(lens: Lens, saes: Any, layer: int) -> Dictionary:
    """Return the SAE at the residual stream that a layer reads.

    Raises:
        FeatpatchError: there is none, or there are several, or its decoder is not linear.
    """
    stream = {sites.resid_pre(layer), *([sites.resid_post(layer - 1)] if layer else [])}
    found = [each for each in dictionaries(lens, saes) if set(each.hooks) <= stream]
    if len(found) != 1:
        raise FeatpatchError(
            f"{len(found)} of the SAEs are at the residual stream that layer {layer} reads: expected one at "
            f"{sites.resid_pre(layer)!r}; pass that one"
        )
    if not found[0].behaviour.linear:
        raise FeatpatchError(
            f"SAE {found[0].name!r} ({found[0].codec.kind}) has a decoder that is not linear: expected one that adds each "
            "feature along a fixed direction, so that contributions sum to the score"
        )
    return found[0]


def _parts(
    dictionary: Dictionary, split: Split, at: int, x: Float[torch.Tensor, "pos d_model"]
) -> tuple[tuple[Part, ...], Float[torch.Tensor, "parts d_model"]]:
    """Return the active features, the error and the decoder's bias at a position, and their vectors: summands of the stream."""
    features = split.features[0, at]
    active = features.nonzero()[:, 0]
    vectors = wide(dictionary.directions(active)).to(x) * features[active, None].to(x)
    if dictionary.behaviour.scaled:
        vectors = vectors * dictionary.gains(split)[at].to(x)
    error = wide(split.error)[0, at].to(x)
    bias = wide(dictionary.decode(torch.zeros_like(split.features), split.state))[0, at].to(x)
    site = dictionary.writes
    nodes = (*(dictionary.node(number, at) for number in active.tolist()), Node(site, "error", None, at, dictionary.name), None)
    return nodes, torch.cat([vectors, error[None], bias[None]])


@dataclass(frozen=True)
class _Sides:
    """The query and the key of a head as linear maps of the residual stream of a prompt.

    Attributes:
        x: the residual stream that enters the layer.
    """

    layer: Layer
    head: int
    x: Float[torch.Tensor, "pos d_model"]

    def linear(self, side: str, at: int, vectors: Float[torch.Tensor, "parts d_model"]) -> Heads:
        """Return what each part of the residual stream at a position adds to the query or key; biases go to the last part."""
        layer, x = self.layer, self.x[at]
        norm = layer.norm1
        inputs = vectors if norm is None else _biased(norm.scaled(vectors, x[None]), norm.bias)
        projection, inner = (layer.query, layer.query_norm) if side == "query" else (layer.key, layer.key_norm)
        weight, bias = self._of_head(projection)
        return self._placed(_biased(inputs @ weight, bias), inner, at)

    def scores(self, query: int) -> Float[torch.Tensor, " pos"]:
        """Return the scores of all keys at a query position, without a soft-cap or mask."""
        layer, positions = self.layer, torch.arange(len(self.x), device=self.x.device)
        y = layer.attention_input(self.x.to(layer.query.weight.dtype))
        queries, (keys, _) = layer.queries(y, positions), layer.keys_values(y, positions)
        return wide(keys[:, self._shared(keys.shape[1])]) @ wide(queries[query, self.head]) * layer.scale

    def _placed(self, x: Heads, norm: Norm | None, at: int) -> Heads:
        """Norm parts of a query or key, with the scale of their sum, and rotate them."""
        if norm is not None:
            x = _biased(norm.scaled(x, x.sum(0, keepdim=True)), norm.bias)
        rotation = self.layer.rotation
        if rotation is None:
            return x
        return rotation(x[:, None], torch.full((len(x),), at, device=x.device))[:, 0]

    def _of_head(self, projection: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight `[d_model, d_head]` and bias of a query, or of the key that a head uses."""
        d_head = self.layer.d_head
        number = self._shared(projection.weight.shape[1] // d_head)
        own = slice(number * d_head, (number + 1) * d_head)
        return wide(projection.weight)[:, own].to(self.x), None if projection.bias is None else projection.bias[own]

    def _shared(self, heads: int) -> int:
        """Return the number of a head among queries or among keys, which several heads may share."""
        return self.head * heads // (self.layer.query.weight.shape[1] // self.layer.d_head)


def _biased(parts: Float[torch.Tensor, "parts d"], bias: torch.Tensor | None) -> Float[torch.Tensor, "parts d"]:
    """Return parts of a sum with a bias added to the last of them."""
    return parts if bias is None else torch.cat([parts[:-1], parts[-1:] + wide(bias).to(parts)])


def _check_pattern(lens: Lens, layer: Layer, scores: torch.Tensor, pattern: torch.Tensor) -> None:
    """Raise a FeatpatchError unless the softmax of the scores is the attention of the model."""
    seen = pattern > 0
    expected = torch.where(seen, soft_capped(scores, layer.softcap), -torch.inf).softmax(0)
    off = float((expected - pattern).abs().max())
    if not off <= 4 * rounding(lens):
        raise FeatpatchError(
            f"the softmax of the scores and the model's attention differ by {off:.3g}: expected attention of the standard "
            "form; use fp.rank_paths into the head's query or key instead"
        )
