"""Dictionaries of features at the hook points of a model.

    x = decode(f) + e,   f = encode(x)        features f [d_sae] and error e always travel together

A dictionary reads at one hook point and writes at another; for an autoencoder both are the same, for a transcoder they are
not. Activations are flat: `[batch, pos, d]`, with the heads of `hook_z` side by side.

A cross-layer transcoder or a crosscoder reads several hook points and writes several. Its activation is what they hold, side by
side, so that the formula is the same. A patch then makes the part of its change that belongs to each hook point there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int

from featpatch import sites
from featpatch.errors import FeatpatchError, check_choices
from featpatch.model.facts import check_finite
from featpatch.model.lens import Lens
from featpatch.nodes import Combine, Node, Position
from featpatch.sae.adapted import Adapted, AdaptedCodec
from featpatch.sae.codec import PROBED, Behaviour, Code, Codec, Split, State, directions, gain
from featpatch.sae.cross_codec import CrossCodec
from featpatch.sae.formats import library_of
from featpatch.sae.sae_lens import SaeCodec, Training, hook_of


@dataclass(frozen=True)
class Dictionary:
    """A codec at its hook points in a model.

    Attributes:
        name: a name that is unique among the dictionaries of a call.
        inputs, outputs: names of the hook points that it reads and writes, in TransformerLens' spelling, by ascending layer.
        widths: the width of the flat activation at each output.
        behaviour: the tested behaviour of the codec.
        source: the object that the user gave.
    """

    name: str
    codec: Codec
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    widths: tuple[int, ...]
    behaviour: Behaviour
    source: Any

    @property
    def reads(self) -> str:
        """The only hook point that the dictionary reads; raises a FeatpatchError if it reads or writes several."""
        return self._only(self.inputs)

    @property
    def writes(self) -> str:
        """The only hook point that the dictionary writes; raises a FeatpatchError if it reads or writes several."""
        return self._only(self.outputs)

    @property
    def single(self) -> bool:
        """Whether the dictionary reads a single hook point and writes a single one."""
        return len(self.inputs) == len(self.outputs) == 1

    def _only(self, hooks: tuple[str, ...]) -> str:
        if not self.single:
            raise FeatpatchError(
                f"{self.name!r} ({self.codec.kind}) reads {len(self.inputs)} hook points and writes {len(self.outputs)}: "
                "expected one of each here; use a dictionary of a single layer, or fp.rank_features, fp.rank_nodes or "
                "fp.check, which take several"
            )
        return hooks[0]

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points that the dictionary reads and writes."""
        return tuple(dict.fromkeys((*self.inputs, *self.outputs)))

    @property
    def combine(self) -> Combine:
        """The default meaning of a patch at several outputs.

        The residual stream at a higher hook point already contains what is written below, so it is set; the output of an MLP or
        of attention does not, so the change is added.
        """
        return "set" if len(self.outputs) > 1 and all(map(sites.is_stream, self.outputs)) else "add"

    @property
    def per_group(self) -> int:
        """The number of features of each group, see `Codec.groups`."""
        return self.d_sae // self.codec.groups

    def node(self, number: int, position: Position) -> Node:
        """Return the node of a feature, given its number among all features; its hook point is the lowest that it writes."""
        group, index = divmod(number, self.per_group)
        return Node(self.outputs[group], "feature", index, position, self.name)

    def number(self, node: Node) -> int:
        """Return the number of a feature among all features, given its node."""
        assert node.index is not None
        return (self.outputs.index(node.site) if self.codec.groups > 1 else 0) * self.per_group + node.index

    def by_output(self, flat: Float[torch.Tensor, "... d_out"]) -> dict[str, torch.Tensor]:
        """Split a flat activation, change or direction by the hook points that the dictionary writes."""
        return dict(zip(self.outputs, flat.split(self.widths, dim=-1), strict=True))

    @property
    def training(self) -> Training:
        """The training of the SAE, as far as its configuration describes it."""
        return Training.of(self.source)

    def elsewhere(self, lens: Lens) -> "list[Dictionary]":
        """Return the same codec in other layers and, if it reads and writes one hook point, at others of its layer."""

        def moved(hooks: tuple[str, ...], by: int) -> tuple[str, ...]:
            return tuple(re.sub(r"^blocks\.(\d+)\.", lambda at: f"blocks.{int(at[1]) + by}.", hook) for hook in hooks)

        shifts = range(-lens.n_layers, lens.n_layers)
        places = [(moved(self.inputs, by), moved(self.outputs, by)) for by in shifts]
        if self.single and self.reads == self.writes:
            places += [((hook,), (hook,)) for hook in sites.beside(self.reads)]
        elif self.single:
            places += [((hook,), self.outputs) for hook in sites.beside(self.reads)]
            places += [(self.inputs, (hook,)) for hook in sites.beside(self.writes)]
        known = {
            (tuple(map(lens.site, inputs)), tuple(map(lens.site, outputs)))
            for inputs, outputs in places
            if {*inputs, *outputs} <= lens.hook_points.keys()
        }
        return [replace(self, inputs=i, outputs=o) for i, o in sorted(known - {(self.inputs, self.outputs)})]

    @property
    def place(self) -> str:
        """The hook points that the dictionary reads and writes, for messages."""
        reads, writes = (", ".join(map(repr, hooks)) for hooks in (self.inputs, self.outputs))
        return writes if reads == writes else f"{reads} -> {writes}"

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return self.codec.d_sae

    @torch.no_grad()
    def split(self, activations: Mapping[str, torch.Tensor]) -> Split:
        """Split the activations at `inputs` into features, and compute the error at `outputs`.

        Activations are `[batch, pos, ...]`, by hook point. The error has the wider of the dtypes of the model and the
        dictionary.

        Raises:
            FeatpatchError: features or errors are not finite.
        """
        return self.differentiable_split(activations)

    def encode(self, x: torch.Tensor) -> Code:
        """Encode a flat activation; raise a FeatpatchError if it needs a gradient and the encoder passes none on."""
        code = self.codec.encode(x)
        if torch.is_grad_enabled() and x.requires_grad and not code.features.requires_grad:
            raise FeatpatchError(
                f"{self.name} ({self.codec.kind}) has an encoder without a gradient: expected an SAE from sae-lens; or pass "
                "scores='exact'"
            )
        return code

    def differentiable_split(self, activations: Mapping[str, torch.Tensor]) -> Split:
        """Split an activation, see `split`, and keep the gradient, see `encode`."""
        read, written = (self.flat(activations, hooks) for hooks in (self.inputs, self.outputs))
        code = self.encode(read)
        error = written.to(code.features.device) - self.codec.decode(code.features, code.state)
        if not torch.isfinite(code.features).all() or not torch.isfinite(error).all():
            raise FeatpatchError(
                f"{self.name} returns NaN or infinite features or errors: expected finite numbers; check the SAE's weights"
            )
        return Split(code.features, code.state, error)

    @staticmethod
    def flat(activations: Mapping[str, torch.Tensor], hooks: Sequence[str]) -> torch.Tensor:
        """Return the activations at some hook points, flat and side by side."""
        parts = [activations[hook].flatten(2) for hook in hooks]
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)

    @torch.no_grad()
    def decode(self, features: Float[torch.Tensor, "batch pos d_sae"], state: State) -> Float[torch.Tensor, "batch pos d"]:
        """Return the reconstruction, flat."""
        return self.codec.decode(features, state)

    @torch.no_grad()
    def change(
        self, base: Split, source: Split, *, features: bool | torch.Tensor = False, error: bool | torch.Tensor = False
    ) -> Float[torch.Tensor, "batch pos d"]:
        """Return what patching features and the error adds to the flat activation of the base run: the formula of featpatch.

            x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error is in S]

        The error is everything in the activation except the features. It includes the state that decoding needs (the token's
        norm, a skip path, predicted codes), so that all features together with the error make up the whole activation.

        Args:
            base: the run that is patched.
            source: the run that values are taken from.
            features: the features that are patched, as a mask that broadcasts to `[batch, pos, d_sae]`.
            error: the positions at which the error is patched, as a mask that broadcasts to `[batch, pos, 1]`.

        Returns:
            x' - x_b, exactly 0 where nothing is patched.
        """
        return self.differentiable_change(base, source, features=features, error=error)

    def differentiable_change(
        self, base: Split, source: Split, *, features: bool | torch.Tensor = False, error: bool | torch.Tensor = False
    ) -> Float[torch.Tensor, "batch pos d"]:
        """Return the change of a patch, see `change`, and keep the gradient."""
        chosen, rest = (torch.as_tensor(mask, device=base.features.device) for mask in (features, error))
        after = torch.where(chosen, source.features, base.features)
        state = {name: torch.where(rest, source.state[name], value) for name, value in base.state.items()}
        if features is False and not state:
            changed = torch.zeros_like(base.error)
        else:
            decoded = (self.codec.decode(after, state), self.codec.decode(base.features, base.state))
            changed = decoded[0].to(base.error) - decoded[1].to(base.error)
        return changed if error is False else changed + (source.error - base.error) * rest

    def directions(self, features: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_out"]:
        """Compute what one unit of each feature adds to the activation, see `directions` in sae/codec.py."""
        return directions(self.codec, features)

    @torch.no_grad()
    def gains(self, split: Split) -> Float[torch.Tensor, " pos"]:
        """Return the factor on the features' directions at each position of a single prompt, if the behaviour is `scaled`."""
        return gain(self.codec, split.state)[0, :, 0]

    @torch.no_grad()
    def moved(
        self, base: Split, source: Split, position: Int[torch.Tensor, " n"], feature: Int[torch.Tensor, " n"]
    ) -> Float[torch.Tensor, "n d_out"]:
        """Compute the change of a single prompt's activation when one feature at one position takes the source's value.

        Each change is computed by the definition, see `change`.
        """
        width = torch.arange(self.d_sae, device=base.features.device)
        changes = [base.error.new_zeros(0, self.codec.d_out)]
        for rows in torch.arange(len(position), device=width.device).split(max(1, PROBED // self.d_sae)):
            one = width == feature.to(width.device)[rows, None, None]
            at = position.to(width.device)[rows]
            changes.append(self.change(base.at(at), source.at(at), features=one)[:, 0])
        return torch.cat(changes)


CODECS: tuple[type[Codec], ...] = (SaeCodec, AdaptedCodec, CrossCodec)
"""The codecs, each of which recognises the objects of its type."""


def kind_of(source: Any) -> tuple[type[Codec], tuple[str, ...], tuple[str, ...]]:
    """Find the codec for an object, and return it with the hook points that the object reads and those that it writes.

    Raises:
        FeatpatchError: no codec supports the object.
    """
    for codec in CODECS:
        hooks = codec.hooks(source)
        if hooks is not None:
            reads, writes = ((each,) if isinstance(each, str) else tuple(each) for each in hooks)
            return codec, reads, writes
    if library := library_of(source):
        raise FeatpatchError(
            f"{type(source).__name__} is an object of {library}, which does not say at which hook point it belongs: expected "
            "fp.dictionaries.adapt(object, hook), with hook_out= for a transcoder"
        )
    advice = ""
    if isinstance(source, (str, Path)):
        advice = f"; load a folder or a name with fp.load_sae({str(source)!r})"
    elif isinstance(source, (list, tuple)):
        advice = "; pass a single SAE of the list here"
    raise FeatpatchError(
        f"{type(source).__name__} is not a sae-lens SAE: expected one, e.g. from SAE.load_from_disk, or, for any other object "
        f"with encode and decode, fp.dictionaries.adapt(object, hook, d_in=...){advice}"
    )


@torch.no_grad()
def dictionaries(lens: Lens, saes: Any) -> list[Dictionary]:
    """Make the dictionaries of a model from SAEs, and check that each fits the model.

    Args:
        saes: one object that one of the `CODECS` recognises, or several; several may share a hook point. Also a mapping
            `{hook: sae}`, or a model of sae-lens to which SAEs are attached. A `Dictionary` is returned unchanged.

    Raises:
        FeatpatchError: an SAE names no hook point, or one that the model lacks or that does not hold what the SAE was trained
            on; its width differs from that of the activation there; or it encodes a position together with later positions or
            other prompts.
    """
    if isinstance(saes, Dictionary):
        return [saes]
    named = _by_hook(saes)
    saes = several(saes) if named is None else list(named.values())
    if not saes:
        raise FeatpatchError("there are no SAEs: expected at least one SAE or transcoder; pass saes=...")
    kinds = []
    for sae, (kind, reads, writes) in zip(saes, map(kind_of, saes), strict=True):
        known = {hook: hook_of(lens, Training.of(sae), hook) for hook in (*reads, *writes)}
        kinds.append((kind, tuple(known[hook] for hook in reads), tuple(known[hook] for hook in writes)))
    for hook, (_, reads, writes) in zip(named or (), kinds, strict=False):
        if not isinstance(hook, str) or lens.site(hook) not in (*reads, *writes):
            raise FeatpatchError(
                f"saes gives {hook!r} for an SAE of {reads[0]!r}: expected the hook point that it was trained on; use that "
                "name, or set sae.cfg.metadata.hook_name (and hook_name_out) to use a sae-lens SAE elsewhere"
            )
    shapes = lens.shapes({hook for _, reads, writes in kinds for hook in (*reads, *writes)})
    like = lens.first_weight
    made: list[Dictionary] = []
    for sae, (kind, reads, writes) in zip(saes, kinds, strict=True):
        name = name_of(sae, reads, writes)
        repeated = sum(re.sub(r"#\d+$", "", other.name) == name for other in made)
        name = f"{name}#{repeated + 1}" if repeated else name
        if any(name == other.name for other in made):
            raise FeatpatchError(
                f"two SAEs are named {name!r}: expected different names, and none that ends in # and a number; rename one"
            )
        check_finite(f"SAE {name!r}", sae.coder if isinstance(sae, Adapted) else sae)
        codec = kind(sae, like)
        wide = {hook: prod(shapes[hook]) for hook in (*reads, *writes)}
        _check_width(name, "reads", reads, [wide[hook] for hook in reads], codec.d_in)
        _check_width(name, "writes", writes, [wide[hook] for hook in writes], codec.d_out)
        widths = tuple(wide[hook] for hook in writes)
        made.append(Dictionary(name, codec, reads, writes, widths, Behaviour.of(codec, name), sae))
    return made


def name_of(source: Any, reads: Sequence[str], writes: Sequence[str]) -> str:
    """Return the name of an object as a dictionary: its own, or that of its hook points."""
    return getattr(source, "name", "") or (writes[0] if reads == writes else f"{reads[0]} -> {writes[0]}")


def combined_by(found: Sequence[Dictionary], combine: Any, *, joint: bool = False) -> dict[str, Combine]:
    """Return what a patch at several hook points means, for each dictionary that writes several.

    Args:
        combine: the meaning for all of them; None for the default of each.
        joint: whether features of different dictionaries are patched together too, so that there is a meaning to choose even if
            each dictionary writes to a single hook point.

    Raises:
        FeatpatchError: it is no such meaning, or no patch is at several hook points.
    """
    several = [dictionary for dictionary in found if len(dictionary.outputs) > 1]
    if combine is None:
        return {dictionary.name: dictionary.combine for dictionary in several}
    check_choices(get_args(Combine), combine=combine)
    if not several and not (joint and len(found) > 1):
        raise FeatpatchError(
            f"combine={combine!r}: expected None, because each SAE writes to a single hook point; leave combine out"
        )
    return {dictionary.name: combine for dictionary in several}


def dictionaries_if_any(lens: Lens, saes: Any) -> list[Dictionary]:
    """Return the dictionaries, see `dictionaries`; an empty list for None or an empty tuple."""
    return [] if saes is None or (isinstance(saes, tuple) and not saes) else dictionaries(lens, saes)


def digests(found: Sequence[Dictionary]) -> dict[str, str]:
    """Return by name the SHA-256 of everything that determines what each dictionary computes; tables store it."""
    return {dictionary.name: dictionary.codec.digest() for dictionary in found}


def _by_hook(saes: Any) -> Mapping[Any, Any] | None:
    """Return SAEs that are given by hook point, in a mapping or by a model of sae-lens that they are attached to; else None."""
    saes = getattr(saes, "acts_to_saes", saes)
    return saes if isinstance(saes, Mapping) and not any(codec.hooks(saes) for codec in CODECS) else None


def several(saes: Any) -> list[Any]:
    """Return one or several dictionaries as a list; a name, a mapping and an SAE (iterable in sae-lens) count as one."""
    return list(saes) if isinstance(saes, Iterable) and not isinstance(saes, (str, Mapping, torch.nn.Module)) else [saes]


def _check_width(name: str, verb: str, hooks: Sequence[str], widths: Sequence[int], expected: int) -> None:
    if sum(widths) != expected:
        there = f"activation at {hooks[0]!r} has" if len(hooks) == 1 else f"activations at {', '.join(hooks)} together have"
        raise FeatpatchError(
            f"SAE {name!r} {verb} {expected} values and the {there} {sum(widths)}: expected an SAE trained on "
            f"{'this hook point' if len(hooks) == 1 else 'these hook points'} of this model; load the matching one"
        )
