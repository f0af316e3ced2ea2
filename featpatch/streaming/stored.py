"""Effects in a folder: as many pairs as the disk holds; what is read of them is a ranking, or the rows that are asked for."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects import Effects, check_gap
from featpatch.effects.content import check_metadata
from featpatch.errors import FeatpatchError, check_numbers
from featpatch.foreign import read_json
from featpatch.patch import RANKED
from featpatch.streaming.parts import FIELDS, node_of, path_of
from featpatch.untrusted import visible

FORMAT = "featpatch stored effects 1"


@dataclass(frozen=True)
class Stored:
    """What `stream_features` wrote.

    Attributes:
        folder: with `about.json`, and a Parquet file of each block in `effects` and `pairs`.
        metric: which one is meant, of those that were measured; the first by default.
    """

    folder: Path
    metric: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        known = self.about["metrics"]
        if self.metric and self.metric not in known:
            raise FeatpatchError(f"metric {self.metric!r} was not measured: expected one of {', '.join(known)}")
        object.__setattr__(self, "metric", self.metric or known[0])

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """Where the effects come from; as `Effects.metadata`, without what is each block's own."""
        path = self.folder / "about.json"
        try:
            about = read_json(path.read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            check_metadata({**about, "metric": about["metrics"][0], "pairs": ""}, 0)
        except (OSError, ValueError, LookupError, TypeError, FeatpatchError) as error:
            raise FeatpatchError(f"{str(path)!r} can't be read ({error}): expected a folder of fp.stream_features") from error
        return dict(about)

    @cached_property
    def blocks(self) -> list[Path]:
        """The files of the effects of the blocks that were finished when this was first asked."""
        return [self.folder / "effects" / path.name for path in sorted((self.folder / "pairs").glob("*.parquet"))]

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per pair: `clean`, `corrupted`, `tags`, and the digest of its block."""
        names = {f"{name} of {self.metric}": name for name in ("clean", "corrupted")}
        return self._together("pairs", ["pair", *names, "tags", "digest"]).rename(columns=names).set_index("pair").sort_index()

    def pooled(self) -> pd.DataFrame:
        """Every node with its effects over all pairs and the number of pairs in which it changes; block by block.

        Returns:
            One row per node, the largest effect first; without intervals, which `top` has. Positions are JSON.
        """
        check_gap(self.metric, self.pairs["clean"].to_numpy(), self.pairs["corrupted"].to_numpy())
        gap = float((self.pairs["clean"] - self.pairs["corrupted"]).sum())
        total: pd.DataFrame | None = None
        for entries in self._entries():
            of_pair = self.pairs.loc[entries["pair"]]
            entries["recovery"] = entries["denoised"].to_numpy() - of_pair["corrupted"].to_numpy()
            entries["degradation"] = of_pair["clean"].to_numpy() - entries["noised"].to_numpy()
            entries["changed_pairs"] = 1
            grouped = entries.groupby(list(FIELDS), dropna=False)[["recovery", "degradation", "changed_pairs"]]
            found = grouped.sum(min_count=1)
            total = found if total is None else total.add(found, fill_value=0)
        assert total is not None
        run = [e for e, way in (("recovery", "denoising"), ("degradation", "noising")) if way in self.about["directions"]]
        table = total.reset_index()
        table[run] /= gap
        table["changed_pairs"] = table["changed_pairs"].astype(int)
        order = np.argsort(-table[run].abs().max(axis=1).to_numpy(), kind="stable")
        return table[[*FIELDS, *run, "changed_pairs"]].iloc[order].reset_index(drop=True)

    def top(self, n: int = 20, *, by: str | None = None) -> Effects:
        """The ranked nodes with the largest effect, largest first, as a table in memory, with all that it can do.

        Args:
            by: `"recovery"` or `"degradation"`; by default the first that was run.

        Raises:
            FeatpatchError: an effect that was not run.
        """
        table = self.pooled()
        run = [name for name in ("recovery", "degradation") if name in table]
        if by is not None and by not in run:
            raise FeatpatchError(f"by={by!r}: expected one of the effects that were run, {', '.join(run)}")
        check_numbers(1, n=n)
        ranked = table[table["kind"].isin(RANKED)]
        ranked = ranked if len(ranked) else table
        chosen = ranked.iloc[np.argsort(-ranked[by or run[0]].to_numpy(), kind="stable")[:n]]
        return self._effects(chosen, len(ranked))

    def load(self) -> Effects:
        """All of it in memory."""
        table = self.pooled()
        return self._effects(table, int(table["kind"].isin(RANKED).sum()))

    def _effects(self, chosen: pd.DataFrame, ranked: int) -> Effects:
        keys = chosen[list(FIELDS)].assign(row=np.arange(len(chosen)))
        entries = pd.concat([part.merge(keys, on=list(FIELDS)) for part in self._entries()], ignore_index=True)
        numbers = pd.Series(np.arange(len(self.pairs)), index=self.pairs.index)
        tags = [json.loads(text) for text in self.pairs["tags"]]
        digest = hashlib.sha256("".join(self.pairs["digest"]).encode()).hexdigest()
        metadata = {**self.about, "metric": self.metric, "metrics": [self.metric], "pairs": digest, "rows_ranked": ranked}
        return Effects(
            nodes=tuple(node_of(row) for row in chosen.rename(columns={"index": "index_"}).itertuples()),
            clean=self.pairs["clean"].to_numpy(),
            corrupted=self.pairs["corrupted"].to_numpy(),
            row=entries["row"].to_numpy(),
            pair=numbers.loc[entries["pair"]].to_numpy(),
            denoised=entries["denoised"].to_numpy(),
            noised=entries["noised"].to_numpy(),
            metadata=metadata | ({"tags": tags} if any(tags) else {}),
        )

    def _entries(self) -> Iterator[pd.DataFrame]:
        """Block by block, one row per node and pair."""
        names = {f"{name} of {self.metric}": name for name in ("denoised", "noised")}
        for path in self.blocks:
            yield _read(path, [*FIELDS, "pair", *names]).rename(columns=names)

    def pairs_of(self, block: int) -> pd.DataFrame:
        """Of one finished block."""
        return _read(path_of(self.folder, "pairs", block), ["pair", "digest"])

    def _together(self, kind: str, columns: list[str]) -> pd.DataFrame:
        found = [_read(self.folder / kind / path.name, columns) for path in self.blocks]
        if not found:
            raise FeatpatchError(f"{str(self.folder)!r} has no finished block yet: run fp.stream_features again")
        return pd.concat(found, ignore_index=True)

    def __repr__(self) -> str:
        said = f"effects of {len(self.pairs):,} pairs in {len(self.blocks)} blocks in {str(self.folder)!r}: {self.metric}"
        return visible(said)


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Raises FeatpatchError for a file that is missing or damaged."""
    import pyarrow as pa

    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise FeatpatchError(
            f"{str(path)!r} can't be read ({error}): expected a block of fp.stream_features; delete its files in 'effects' and "
            "'pairs' and run it again"
        ) from error
