"""Nodes, edges and patches: plain hashable data without tensors, so that plans can be saved and compared.

A *node* is something at a hook point whose value can be taken from another run. A *patch* is a set of nodes that are
patched together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from featpatch.errors import FeatpatchError, check_kinds, check_numbers, counted, is_integer
from featpatch.untrusted import visible

Kind = Literal["feature", "error", "all_features", "activation", "head", "neuron", "set", "random", "edge", "rest", "logit"]
"""The kind of a node. `feature`: one SAE feature. `error`: the SAE's reconstruction error `x - dec(enc(x))`. `all_features`:
every feature, with the error kept. `activation`: the whole activation, which is all features and the error. `head`: one
attention head of the activation at a hook point of attention. `neuron`: one neuron of an MLP. `set`: several nodes together,
by their number in the call that names them. `random`: a random direction, a control. `edge`: the effect of one node through
another, see `Edge`. `rest`: the complement of the named nodes of a dictionary in the activation. `logit`: the logit of one
token, by its id: an output of an attribution graph."""

KINDS: tuple[str, ...] = get_args(Kind)

RANKED = ("feature", "head", "neuron", "edge")
"""The kinds of nodes that are ranked among one another."""

INDEXED = ("feature", "head", "neuron", "set", "random", "logit")
"""The kinds of nodes of which a hook point has many, told apart by an index."""

COMPONENT_KINDS = ("activation", "head", "neuron")
"""The kinds of nodes that belong to no dictionary."""

Position = int | str
"""A token index, `"all"` (every position at once), or a label of the pairs such as `"S2"`."""

Direction = Literal["denoising", "noising"]
"""`denoising`: patch clean values into the corrupted run (sufficient?). `noising`: patch corrupted values into the clean run
(necessary?)."""

Combine = Literal["add", "set"]
"""The meaning of a patch at several hook points. `add`: each change is added to what arrives there, which the changes upstream
have moved already. `set`: the activation is set to its value in the base run plus the change."""

TOGETHER = " together"
"""The end of the `site` of a node that stands for a joint patch, which has no hook point of its own."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

Effect = Literal["recovery", "degradation"]
"""The effect that is measured in a direction, as a fraction of the behaviour."""

EFFECTS: dict[Effect, Direction] = {"recovery": "denoising", "degradation": "noising"}
"""The direction in which each effect is measured."""


def check_directions(directions: Any) -> tuple[Direction, ...]:
    """Return the directions that are asked for, denoising first.

    Raises:
        FeatpatchError: `directions` is anything but a list of one or both directions.
    """
    several = isinstance(directions, Sequence) and len(directions)
    if not several or not all(isinstance(each, str) and each in DIRECTIONS for each in directions):
        raise FeatpatchError(f"directions={directions!r}: expected 'denoising', 'noising' or both, in a list")
    return tuple(direction for direction in DIRECTIONS if direction in directions)


def numbered(kind: str, index: int | None) -> str:
    """Return the name of a part of an activation: its kind and, if it has one, its index."""
    return kind if index is None else f"{kind} {index}"


@dataclass(frozen=True)
class Node:
    """A value that can be patched, such as a feature, an error term or a head, at a hook point and a position.

    Attributes:
        site: the hook point, such as `"blocks.1.hook_resid_pre"`.
        kind: the kind of value, such as `"feature"`, `"error"`, `"activation"` or `"head"`.
        index: the index of the feature, head or neuron; None for kinds without an index.
        position: a token index (-1 is the last token of each prompt), a label of the pairs, or `"all"`; for one entry of an
            attention pattern, two of them, as in `"end <- S2"`: the attention from `end` to `S2`.
        sae: the name of the dictionary; it may be empty if only one of the dictionaries passed writes to the hook point.

    Examples:
        >>> node = fp.Node("blocks.1.hook_resid_pre", "feature", 433, position="S2", sae="blocks.1.hook_resid_pre")
        >>> node in effects.nodes
        True
        >>> str(fp.LOGITS)
        'logits activation @ all'
    """

    site: str
    kind: Kind
    index: int | None = None
    position: Position = "all"
    sae: str = ""

    def __post_init__(self) -> None:
        check_kinds(str, site=self.site, kind=self.kind, sae=self.sae)
        if not isinstance(self.position, str) and not is_integer(self.position):
            raise FeatpatchError(f"position={self.position!r}: expected a token index, 'all' or the label of a position")
        if self.index is not None and not is_integer(self.index):
            raise FeatpatchError(f"index={self.index!r}: expected an integer, such as the number of a feature")
        if self.kind not in KINDS:
            raise FeatpatchError(f"node kind {self.kind!r} is unknown: expected one of {', '.join(KINDS)}")
        if (self.index is not None) != (self.kind in INDEXED):
            raise FeatpatchError(
                f"a node of kind {self.kind!r} got index {self.index}: expected an index, 0 or more, for {', '.join(INDEXED)}, "
                "and none for other kinds"
            )
        if self.index is not None and self.index < 0:
            raise FeatpatchError(f"{self.kind} index {self.index} is negative: expected 0 or more, the number of a {self.kind}")
        for name in ("index", "position"):  # neither may exceed what arrays can hold, and NumPy's integers can't be saved
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                check_numbers(0, **{name: abs(value)})
                object.__setattr__(self, name, int(value))

    def __str__(self) -> str:
        if self.site.endswith(TOGETHER) and self.kind == "set":
            return visible(f"{self.site} @ {self.position}")
        name = numbered(self.kind, self.index)
        of = f" of {self.sae}" if self.sae not in ("", self.site, self.site.removesuffix(TOGETHER)) else ""
        return visible(f"{self.site} {name}{of} @ {self.position}")


LOGITS = Node("logits", "activation")
"""The node that receives everything that reaches the unembedding."""


@dataclass(frozen=True)
class Edge(Node):
    """A direct edge from a sender to a receiver.

    Attributes:
        site, position, sae: those of the receiver.
        sender, receiver: the nodes that the edge connects.

    Examples:
        >>> head = fp.Node("blocks.1.attn.hook_z", "head", 3, position="S2")
        >>> print(fp.Edge.of(head, fp.LOGITS))
        blocks.1.attn.hook_z head 3 @ S2 -> logits activation @ all
    """

    sender: Node = LOGITS
    receiver: Node = LOGITS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kinds(Node, sender=self.sender, receiver=self.receiver)

    @classmethod
    def of(cls, sender: Node, receiver: Node) -> "Edge":
        """Make an edge at the hook point of its receiver.

        Examples:
            >>> edge = fp.Edge.of(fp.Node("blocks.0.hook_mlp_out", "activation"), fp.LOGITS)
            >>> edge.site, edge.kind
            ('logits', 'edge')
        """
        return cls(receiver.site, "edge", None, receiver.position, receiver.sae, sender, receiver)

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"


@dataclass(frozen=True)
class Patch:
    """Nodes that are patched together, at one hook point or several.

    Attributes:
        nodes: the nodes, each named once, as a tuple or a list.
        name: a name for tables; by default the number of nodes is shown.

    Examples:
        >>> patch = fp.Patch(effects.top(3).nodes, name="names")
        >>> len(patch.nodes)
        3
    """

    nodes: Sequence[Node]
    name: str = ""

    def __post_init__(self) -> None:
        check_kinds(str, name=self.name)
        if not isinstance(self.nodes, tuple | list) or not all(isinstance(node, Node) for node in self.nodes):
            raise FeatpatchError(f"nodes={self.nodes!r}: expected a list of Node, e.g. Patch([node])")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        repeated = [node for node, count in Counter(self.nodes).items() if count > 1]
        if repeated:
            raise FeatpatchError(f"a patch names {repeated[0]} twice: expected each node once; remove the duplicate")


def joint(nodes: Sequence[Node], number: int = 0, name: str = "") -> Node:
    """Return the node that stands for these nodes patched together, at their common position or `"(several)"`.

    Args:
        number: the number of the patch in the call that names it.
        name: the name of the patch; by default the number of nodes.
    """
    positions = {node.position for node in nodes}
    position = positions.pop() if len(positions) == 1 else "(several)"
    return Node(f"{name or counted(len(nodes), 'node')}{TOGETHER}", "set", number, position)


def check_senders(nodes: Sequence[Node]) -> None:
    """Raise a FeatpatchError if the logits, at which every path ends, are among the senders of paths."""
    if LOGITS in nodes:
        raise FeatpatchError(
            "'logits' is among the senders: expected it only among the receivers, because every path ends there"
        )


def check_reached(reached: bool) -> None:
    """Raise a FeatpatchError unless a receiver of paths is reached from a sender."""
    if not reached:
        raise FeatpatchError(
            "no receiver is downstream of a sender: expected at least one path; choose receivers in later layers than "
            "the senders"
        )
