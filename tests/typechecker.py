"""Runtime type checks for the tests. Literals count as `str`, so that the package's own errors are the ones that show."""

from typing import Literal

from beartype import BeartypeConf, FrozenDict, beartype

LITERALS = [
    Literal["denoising", "noising"],
    Literal["feature", "error", "all_features", "activation"],
    Literal["recovery", "degradation"],
    Literal["add", "set"],
    Literal["direct", "through_mlps"],
    Literal["nodes", "edges"],
    Literal["threshold", "greedy", "acdc"],
    Literal["exact", "estimate"],
    Literal["auto", "all", "screened"],
    Literal["corrupted", "mean", "resample"],
    Literal["in", "out", "nodes"],
]

check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict(dict.fromkeys(LITERALS, str))))
