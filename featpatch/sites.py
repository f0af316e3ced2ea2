"""Names of hook points: the only module that spells them out.

A `site` is the full name of a hook point, e.g. `blocks.3.hook_resid_pre`. Names are always those of TransformerLens;
`canonical` converts the aliases of TransformerBridge (`blocks.3.hook_in`) to them.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Literal

from featpatch.errors import FeatpatchError, check_choices, check_kinds

ENTRIES = {
    "hook_resid_pre": (0, "pre"),
    "attn.hook_z": (0, "z"),
    "hook_attn_out": (0, "mid"),
    "hook_resid_mid": (0, "mid"),
    "hook_mlp_out": (1, "pre"),
    "hook_resid_post": (1, "pre"),
}
"""Where a change at a hook point enters the residual stream: in the same layer (0) or the next (1), and at which place there.

The places are the input of the layer ("pre"), its attention before W_O ("z"), and the residual stream between attention and the
MLP ("mid"), after the norm of attention's output if there is one. The next layer begins after the MLP."""

LAYER = re.compile(r"blocks\.([0-9]{1,6})\.")
"""The start of the name of a hook point inside a layer."""

STANDARD = re.compile(rf"blocks\.([0-9]{{1,6}})\.({'|'.join(map(re.escape, ENTRIES))})")


def entry(site: str) -> tuple[int, str] | None:
    """Return the layer and the place in it (see `ENTRIES`) where a change enters; None for other hook points."""
    match = STANDARD.fullmatch(site)
    if match is None:
        return None
    later, place = ENTRIES[match.group(2)]
    return int(match.group(1)) + later, place


def seen_at(hook: str) -> tuple[int, str]:
    """Return the last place in the residual stream (see `ENTRIES`) that an activation inside a layer depends on."""
    layer, name = layer_of(hook), within(hook)
    if name == "hook_resid_post":
        return layer + 1, "pre"
    inputs = ("hook_q_input", "hook_k_input", "hook_v_input")
    before = name.startswith(("attn", "ln1", "hook_attn")) or name in ("hook_resid_pre", *inputs)
    return layer, "pre" if before else "mid"


Route = Literal["direct", "through_mlps", "through_attention", "all"]
"""A route from a sender to a receiver; see `ROUTES`."""

ROUTES: Mapping[Route, tuple[str, ...]] = {
    "direct": (),
    "through_mlps": ("mlp_out",),
    "through_attention": ("attn_out",),
    "all": ("attn_out", "mlp_out"),
}
"""The components between sender and receiver that are recomputed on each route; the others keep their values in the base run.
Attention is recomputed with its patterns."""


def check_route(route: str) -> None:
    """Raise a FeatpatchError unless a route is one of `ROUTES`."""
    check_choices(tuple(ROUTES), route=route)


def order(place: tuple[int, str]) -> tuple[int, bool]:
    """Return a key that sorts places in the order in which the residual stream passes them."""
    return place[0], place[1] == "mid"


def comes_in(site: str) -> tuple[int, str] | None:
    """Return the layer and the place at which the output of a hook point has been added to the residual stream.

    Returns None for hook points that are not in `ENTRIES`.
    """
    found = entry(site)
    return found and (found[0], "mid" if found[1] == "z" else found[1])


def reaches(site: str, hook: str) -> bool:
    """Return whether what is written at one hook point is read at another through the residual stream alone."""
    start = comes_in(site)
    return start is not None and order(start) <= order(seen_at(hook))


def is_stream(hook: str) -> bool:
    """Return whether the activation at a hook point is the residual stream itself."""
    return hook.endswith(("hook_resid_pre", "hook_resid_mid", "hook_resid_post"))


WHOLE = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
"""Components that are whole activations, by name, and the hook point in a layer that holds each."""

COMPONENTS = {
    **WHOLE,
    "z": "attn.hook_z",
    "result": "attn.hook_result",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "pattern_entry": "attn.hook_pattern",
    "neurons": "mlp.hook_post",
}
"""Whole activations and parts of activations, by the names that TransformerLens' patching functions use."""

BRIDGE = {"hook_in": "resid_pre", "hook_out": "resid_post"}
"""The residual stream by the names of TransformerBridge's own hook points in a layer."""

DEFAULT_COMPONENTS = ("resid_pre", "attn_out", "mlp_out", "z")
"""The components that are used by default."""


def component(layer: int, name: str) -> str:
    """Return the hook point of a component in a layer."""
    return f"blocks.{layer}.{COMPONENTS[name]}"


def is_component(site: str, *names: str) -> bool:
    """Return whether a hook point is that of one of these components, in any layer."""
    return within(site) in [COMPONENTS[name] for name in names]


EMBEDDING = "hook_embed"
"""The hook point of the embedded tokens, before positions are added."""

POSITIONS = "hook_pos_embed"
"""The hook point of learned positions, which are added to the embedding."""


def resid_pre(layer: int) -> str:
    """Return the hook point of the residual stream that enters a layer."""
    return f"blocks.{layer}.hook_resid_pre"


def carrier(site: str) -> str:
    """Return the hook point at which a change reaches the residual stream on a TransformerBridge.

    Its `hook_resid_mid` is the input of the MLP's norm, so a change there is not added to the residual stream. The output of
    attention is, so a change of `hook_resid_mid` is made at `hook_attn_out`.
    """
    return site.replace("hook_resid_mid", "hook_attn_out") if STANDARD.fullmatch(site) else site


def rotary(layer: int) -> tuple[str, str]:
    """Return the hook points of TransformerBridge that carry the cosines and sines of rotary positions."""
    return f"blocks.{layer}.attn.hook_cos", f"blocks.{layer}.attn.hook_sin"


def mlp_inputs(layer: int) -> tuple[str, str]:
    """Return the hook points in front of the activation function: its input, and the factor of a gated MLP beside it."""
    return f"blocks.{layer}.mlp.hook_pre", f"blocks.{layer}.mlp.hook_pre_linear"


def resid_post(layer: int) -> str:
    """Return the hook point of the residual stream that leaves a layer."""
    return f"blocks.{layer}.hook_resid_post"


def by_position(site: str) -> bool:
    """Return whether an activation is `[batch, pos, ...]`; patterns and scores are `[batch, head, query, key]`."""
    return not site.endswith(("hook_pattern", "hook_attn_scores"))


def on_stream(site: str) -> bool:
    """Return whether an activation is the residual stream or is added to it, so that centring the weights changes it."""
    return bool(STANDARD.fullmatch(site)) and not site.endswith("hook_z")


WEIGHTED = {"attn.hook_in": "ln1", "ln1.hook_out": "ln1", "mlp.hook_in": "ln2", "ln2.hook_out": "ln2"}
"""Hook points after the weight of a norm, and the name of the norm. Folding removes the weight, and a bias, from what they
hold; the norm's `hook_normalized` comes before the weight and stays the same."""


def after_norm(site: str) -> bool:
    """Return whether an activation is the output of a norm, which changes when the norm's weight is folded."""
    return within(site) in WEIGHTED


def weighted(site: str) -> str | None:
    """Return the hook point that holds a norm's `hook_normalized` times the norm's weight; None for other hook points."""
    layer, _, name = site.rpartition(".ln")
    found = next((hook for hook, norm in WEIGHTED.items() if f"ln{name}" == f"{norm}.hook_normalized"), None)
    return found and f"{layer}.{found}"


def normalized(site: str) -> str:
    """Return the hook point whose value is that of a hook point after a norm once the norm's weight is folded."""
    return f"blocks.{layer_of(site)}.{WEIGHTED[within(site)]}.hook_normalized"


MODULES = {
    "": "hook_resid_post",
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "mlp.input": "mlp.hook_in",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Inputs and outputs of the modules of a Hugging Face layer, and the hook point in a layer that holds the same."""


def of_module(path: str) -> str | None:
    """Return the hook point of a Hugging Face name such as `model.layers.3.mlp.output`; None if it is not known."""
    match = re.fullmatch(r"(?:.*\.)?layers\.([0-9]{1,6})(?:\.(.+))?", path)
    name = MODULES.get(match.group(2) or "") if match else None
    return f"blocks.{match.group(1)}.{name}" if match and name else None


def is_mlp_in(site: str) -> bool:
    """Return whether a name is `hook_mlp_in`, by which TransformerLens and sae-lens mean different activations.

    In TransformerLens it is a copy of the residual stream before the norm. sae-lens uses it for the transcoders of Gemma
    Scope 2, which read the output of the norm.
    """
    return site.endswith(".hook_mlp_in")


def is_mlp_output(site: str) -> bool:
    """Return whether a hook point is what an MLP adds to the residual stream, or the same in front of a norm."""
    return within(site) in ("hook_mlp_out", "mlp.hook_out")


def read_by_mlp(layer: int) -> str:
    """Return the hook point of the input of an MLP, which is the output of its norm."""
    return f"blocks.{layer}.mlp.hook_in"


def switch(hook: str) -> str:
    """Return advice on how to switch on a hook point that does not fire, for an error."""
    if is_mlp_in(hook):
        return (
            "model.set_use_hook_mlp_in(True) enables this copy of the residual stream before the norm; the input of the MLP "
            f"is at {read_by_mlp(layer_of(hook))!r}"
        )
    if hook.endswith(("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")):
        return (
            "model.set_use_attn_in(True) or model.set_use_split_qkv_input(True) enables these copies of the residual stream, "
            "one per head, before the norm; the norm's output without its weight is at ln1.hook_normalized"
        )
    return "some hook points must be enabled first (model.set_use_attn_result(True), ...)"


BESIDE = (
    "hook_resid_pre", "ln1.hook_normalized", "attn.hook_in", "attn.hook_z", "attn.hook_out", "hook_attn_out", "hook_resid_mid",
    "ln2.hook_normalized", "mlp.hook_in", "mlp.hook_post", "mlp.hook_out", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
"""The hook points of a layer that are mistaken for one another."""


def beside(site: str) -> list[str]:
    """Return the other hook points of `BESIDE` in the same layer; none for a hook point outside the layers."""
    match = LAYER.match(site)
    return [] if match is None else [match.group() + name for name in BESIDE if match.group() + name != site]


def layer_of(site: str) -> int:
    """Return the layer that a hook point belongs to.

    Raises:
        FeatpatchError: the hook point is outside the layers, where no run can be resumed.
    """
    match = LAYER.match(site)
    if match is None:
        raise FeatpatchError(
            f"hook point {site!r} is not inside a layer: expected one of a layer, such as {resid_pre(0)!r}, which holds "
            "the input of the first layer: the embedding with everything that the model applies to it, such as positions"
        )
    return int(match.group(1))


def within(site: str) -> str:
    """Return the name of a hook point within its layer, such as `attn.hook_z`."""
    return site.split(".", 2)[-1]


def short(site: str) -> str:
    """Return a short name of a hook point for people, such as `L3 resid_post`; names outside the layers stay as they are."""
    match = LAYER.match(site)
    if match is None:
        return site
    name = next((name for name, hook in COMPONENTS.items() if hook == within(site)), within(site).removeprefix("hook_"))
    return f"L{match.group(1)} {name}"


def short_dictionary(name: str) -> str:
    """Return the name of a dictionary with short names of its hook points, such as `L0 mlp.in -> mlp_out`."""
    first, *others = [short(part).replace("hook_", "") for part in name.split(" -> ")]
    layer = f"{first.split(' ')[0]} "
    return " -> ".join([first, *(other.removeprefix(layer) for other in others)])


def highest(hooks: Iterable[str], n_layers: int) -> int:
    """Return the highest layer that holds one of the hook points, or the number of layers if one is outside the layers."""
    return max((layer_of(hook) if LAYER.match(hook) else n_layers for hook in hooks), default=0)


OUTPUTS = {"mlp.hook_out": "hook_mlp_out", "attn.hook_out": "hook_attn_out"}
"""Output hook points of modules, and the layer's hook points that hold the same values if no norm follows the modules."""


def of_output(name: str) -> str | None:
    """Return the hook point of what a module adds to the residual stream, given that of its output; None for other names."""
    inside = LAYER.match(name) is not None and within(name) in OUTPUTS
    return f"blocks.{layer_of(name)}.{OUTPUTS[within(name)]}" if inside else None


def canonical(name: str, hook_points: Mapping[str, object]) -> str:
    """Return the TransformerLens name of a hook point, after checking that the model has it.

    Args:
        name: the name of a hook point, possibly an alias.
        hook_points: the model's own table of names, in which aliases share one object.

    Raises:
        FeatpatchError: the model has no such hook point.
    """
    check_kinds(str, hook=name)
    point = hook_points.get(name)
    if point is None:
        tail = name.rsplit(".", 1)[-1]
        near = [known for known in hook_points if tail and known.endswith(tail)] or get_close_matches(name, hook_points)
        near = near or [known for known in hook_points if known.endswith(("resid_pre", "resid_post", "mlp_out", "attn_out"))]
        raise FeatpatchError(
            f"the model has no hook {name!r}: expected a name from model.hook_dict, such as {', '.join(sorted(near)[:4])}"
        )
    aliases = (known for known, other in hook_points.items() if other is point and STANDARD.fullmatch(known))
    return next(aliases, name)
