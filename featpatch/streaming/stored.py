"""Effects of many pairs stored in a folder, read block by block so that only a ranking or the requested rows are in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects import EFFECTS, Effects, check_gap
from featpatch.effects.content import check_columns, check_metadata, nodes_of
from featpatch.effects.effects import least_to_sort, sorting
from featpatch.effects.frames import WHERE_CHANGED
from featpatch.effects.statistics import NEAR_ZERO
from featpatch.errors import FeatpatchError, check_numbers
from featpatch.files import as_path, read_json, sha256
from featpatch.patch import RANKED
from featpatch.streaming import parts
from featpatch.streaming.parts import FIELDS
from featpatch.untrusted import visible

FORMAT = "featpatch stored effects 1"


@dataclass(frozen=True)
class Stored:
    """The effects that `stream_features` wrote to a folder.

    Attributes:
        folder: the folder with `about.json` and, for each block, a Parquet file in `effects`, one in `pairs`, and their
            digests.
        metric: the metric whose effects are read; by default the first of those that were measured.
    """

    folder: Path
    metric: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", as_path(self.folder))
        known = self.about["metrics"]
        if self.metric and self.metric not in known:
            raise FeatpatchError(f"metric {self.metric!r} was not measured: expected one of {', '.join(known)}")
        object.__setattr__(self, "metric", self.metric or known[0])

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """The provenance of the effects, like `Effects.metadata` without the entries that differ between blocks.

        Raises:
            FeatpatchError: `about.json` is missing or damaged.
        """
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
    def blocks(self) -> int:
        """The number of finished blocks, counted on first access.

        Raises:
            FeatpatchError: a block in between is missing, or `about.json` has changed since the blocks were written.
        """
        names = sorted(path.name for path in self.folder.glob("*.sha256"))
        expected = [parts.digests_of(block) for block in range(len(names))]
        if names != expected:
            missing = sorted({*expected} - {*names})
            raise FeatpatchError(f"{str(self.folder)!r} lacks {missing[0]}: expected no gap before {names[-1]}; {parts.AGAIN}")
        for block in range(len(names)):
            parts.read(self.folder, block, "about.json")
        return len(names)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A table of all pairs, one row each, with `clean`, `corrupted`, `tags`, and the number and digest of their block.

        Raises:
            FeatpatchError: no block is finished, or a file is missing or damaged.
        """
        names = {f"{name} of {self.metric}": name for name in ("clean", "corrupted")}
        columns = ["pair", *names, "tags", "digest"]
        found = [parts.table(self.folder, block, "pairs", columns).assign(block=block) for block in range(self.blocks)]
        if not found:
            raise FeatpatchError(f"{str(self.folder)!r} has no finished block yet: run fp.stream_features again")
        table = pd.concat(found, ignore_index=True).rename(columns=names)
        if not np.array_equal(table["pair"], np.arange(len(table))):
            raise FeatpatchError(
                f"the pairs in {str(self.folder)!r} are not numbered from 0 to {len(table) - 1}: {parts.AGAIN}"
            )
        return table.set_index("pair")

    def pooled(self) -> pd.DataFrame:
        """Compute the pooled effects of every node over all pairs, block by block.

        Returns:
            One row per node, the largest effect first, with the number of pairs in which the node differs and the effects
            over these pairs alone, such as `recovery_where_changed`. Positions are JSON. There are no intervals; `top` has
            them.
        """
        check_gap(self.metric, self.pairs["clean"].to_numpy(), self.pairs["corrupted"].to_numpy())
        gap = float((self.pairs["clean"] - self.pairs["corrupted"]).sum())
        total: pd.DataFrame | None = None
        for entries in self._entries():
            of_pair = self.pairs.loc[entries["pair"]]
            entries["recovery"] = entries["denoised"].to_numpy() - of_pair["corrupted"].to_numpy()
            entries["degradation"] = of_pair["clean"].to_numpy() - entries["noised"].to_numpy()
            entries["changed_pairs"], entries["gap"] = 1, (of_pair["clean"] - of_pair["corrupted"]).to_numpy()
            entries["of_clean"], entries["of_corrupted"] = (of_pair[run].abs().to_numpy() for run in ("clean", "corrupted"))
            summed = ["recovery", "degradation", "changed_pairs", "gap", "of_clean", "of_corrupted"]
            found = entries.groupby(list(FIELDS), dropna=False)[summed].sum(min_count=1)
            total = found if total is None else total.add(found, fill_value=0)
        assert total is not None
        run = [effect for effect, direction in EFFECTS.items() if direction in self.about["directions"]]
        table = total.reset_index()
        own = [f"{effect}{WHERE_CHANGED}" for effect in run]
        stands = table["gap"].abs() > NEAR_ZERO * table[["of_clean", "of_corrupted"]].max(axis=1)
        table[own] = table[run].div(table["gap"].where(stands), axis=0)
        table[run] /= gap
        table["changed_pairs"] = table["changed_pairs"].astype(int)
        order = np.argsort(-table[run].abs().max(axis=1).to_numpy(), kind="stable")
        return table[[*FIELDS, *run, "changed_pairs", *own]].iloc[order].reset_index(drop=True)

    def top(self, n: int = 20, *, by: str | None = None, least_changed: int | None = None) -> Effects:
        """Load the ranked nodes with the largest effects, largest first, as an `Effects` table.

        Args:
            n: the number of nodes.
            by, least_changed: as in `Effects.top`.

        Raises:
            FeatpatchError: `by` was not run.
        """
        table = self.pooled()
        run = [effect for effect in EFFECTS if effect in table]
        effect, over = sorting(by, run)
        least = least_to_sort(over, least_changed, len(self.pairs))
        check_numbers(1, n=n)
        ranked = table[table["kind"].isin(RANKED)]
        ranked = ranked if len(ranked) else table
        values = ranked[by or effect].where(ranked["changed_pairs"] >= least).dropna()
        chosen = ranked.loc[values.sort_values(ascending=False, kind="stable").index[:n]]
        places = ["site", "position"]
        whole = table[(table["kind"] == "activation") & ~table.index.isin(chosen.index)]
        whole = whole.merge(chosen[places].drop_duplicates(), on=places)
        return self._effects(pd.concat([chosen, whole]), len(ranked)).take(range(len(chosen)))

    def load(self) -> Effects:
        """Load all nodes as an `Effects` table in memory."""
        table = self.pooled()
        return self._effects(table, int(table["kind"].isin(RANKED).sum()))

    def _effects(self, chosen: pd.DataFrame, ranked: int) -> Effects:
        keys = chosen[list(FIELDS)].assign(row=np.arange(len(chosen)))
        entries = pd.concat([part.merge(keys, on=list(FIELDS)) for part in self._entries()], ignore_index=True)
        digest = sha256("".join(self.pairs["digest"]).encode())
        metadata = {**self.about, "metric": self.metric, "metrics": [self.metric], "pairs": digest, "rows_ranked": ranked}
        columns = {name: self.pairs[name].to_numpy() for name in ("clean", "corrupted")}
        columns |= {name: entries[name].to_numpy() for name in ("row", "pair", "denoised", "noised")}
        try:
            nodes = nodes_of([
                [site, kind, None if pd.isna(index) else int(index), read_json(position), sae]
                for site, kind, index, position, sae in chosen[list(FIELDS)].itertuples(index=False)
            ])  # fmt: skip
            tags = [read_json(text) for text in self.pairs["tags"]]
            metadata |= {"tags": tags} if any(tags) else {}
            check_metadata(metadata, len(nodes))
            check_columns({**columns, "metadata": metadata}, len(nodes))
        except ValueError as error:
            raise FeatpatchError(f"the effects in {str(self.folder)!r} can't be read ({error}): {parts.AGAIN}") from error
        return Effects(nodes=nodes, metadata=metadata, **columns)

    def _entries(self) -> Iterator[pd.DataFrame]:
        """Yield the entries of each block, one row per node and pair.

        Raises:
            FeatpatchError: a block is damaged, holds entries of other pairs or duplicates, or values that are not finite.
        """
        names = {f"{name} of {self.metric}": name for name in ("denoised", "noised")}
        columns = [*FIELDS, "pair", *names]
        for block in range(self.blocks):
            entries = parts.table(self.folder, block, "effects", columns).rename(columns=names)
            pairs = self.pairs.index[self.pairs["block"] == block]
            within = entries["pair"].between(pairs.min(), pairs.max()).all()
            if not within or entries.duplicated([*FIELDS, "pair"]).any():
                raise FeatpatchError(
                    f"block {block} in {str(self.folder)!r} has effects of pairs of other blocks, or duplicates: {parts.AGAIN}"
                )
            run = [{"denoising": "denoised", "noising": "noised"}[direction] for direction in self.about["directions"]]
            if not np.isfinite(entries[run]).all(axis=None):
                raise FeatpatchError(f"block {block} in {str(self.folder)!r} has values that are not finite: {parts.AGAIN}")
            yield entries

    def digest_of(self, block: int) -> str:
        """Return the digest of the pairs of a finished block."""
        return str(parts.table(self.folder, block, "pairs", ["digest"])["digest"].iloc[0])

    def __repr__(self) -> str:
        said = f"effects of {len(self.pairs):,} pairs in {self.blocks} blocks in {str(self.folder)!r}: {self.metric}"
        return visible(said)
