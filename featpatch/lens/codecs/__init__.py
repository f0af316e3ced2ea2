"""Types of dictionaries: each module holds one codec, which recognises the objects of its type."""

from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.families import classes
from featpatch.lens.codec import Codec
from featpatch.lens.formats import library_of

CODECS: dict[str, type[Codec]] = classes("lens/codecs", Codec)


def kind_of(source: Any) -> tuple[type[Codec], str, str]:
    """Find the codec for an object, and return it with the hook points that the object reads and writes.

    Raises:
        FeatpatchError: no codec supports the object.
    """
    for codec in CODECS.values():
        hooks = codec.hooks(source)
        if hooks is not None:
            return codec, *hooks
    if library := library_of(source):
        raise FeatpatchError(
            f"{type(source).__name__} is an object of {library}, which does not say where it belongs: expected "
            "fp.adapt(object, hook), and hook_out= for a transcoder"
        )
    raise FeatpatchError(
        f"{type(source).__name__} is not a sae-lens SAE: expected an object such as SAE.load_from_disk gives, or, for any "
        "other object with encode and decode, fp.adapt(object, hook, d_in=...)"
    )
