"""Hook sites: the only file that spells TransformerLens hook names.

A site is the full hook name, e.g. `blocks.3.hook_resid_pre`. Names are always those of TransformerLens; the aliases of
TransformerBridge (`blocks.3.hook_in`) are turned into them by `canonical`.
"""

import re
from collections.abc import Mapping

from featpatch.errors import FeatpatchError

STANDARD = re.compile(r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_attn_out|hook_mlp_out|attn\.hook_z)")


def resid_pre(layer: int) -> str:
    """The hook at the entry of a block."""
    return f"blocks.{layer}.hook_resid_pre"


def layer_of(site: str) -> int:
    """The block that a site belongs to.

    Raises:
        FeatpatchError: the site is outside the blocks, where no run can be resumed.
    """
    match = re.match(r"blocks\.(\d+)\.", site)
    if match is None:
        raise FeatpatchError(
            f"site {site!r} is not inside a block: expected a name such as {resid_pre(0)!r}; "
            "choose a hook of a block, e.g. blocks.0.hook_resid_pre for the embedding"
        )
    return int(match.group(1))


def canonical(name: str, hook_points: Mapping[str, object]) -> str:
    """The TransformerLens name of a hook, after a check that the model has it.

    Args:
        name: a hook name, possibly an alias.
        hook_points: the model's own table of names, in which aliases share one object.

    Raises:
        FeatpatchError: the model has no such hook.
    """
    point = hook_points.get(name)
    if point is None:
        tail = name.rsplit(".", 1)[-1]
        near = [known for known in hook_points if known.endswith(tail)] or list(hook_points)
        raise FeatpatchError(
            f"the model has no hook {name!r}: expected a name from model.hook_dict, such as {', '.join(sorted(near)[:4])}"
        )
    aliases = (known for known, other in hook_points.items() if other is point and STANDARD.fullmatch(known))
    return next(aliases, name)
