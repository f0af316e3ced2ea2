"""Effects of many pairs in a folder, read block by block so that only a ranking or the requested rows are in memory.

Each block of pairs has two Parquet files, one with a row per node and pair, one with a row per pair. A third file, such as
`000003.sha256`, holds the digests of both and of `about.json`. It is written last, so a block is finished if this file exists.
`sha256sum -c *.sha256` in the folder verifies all blocks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_float_dtype, is_integer_dtype, is_string_dtype

from featpatch.effects.selection import WHERE_CHANGED, least_to_sort, sorting
from featpatch.effects.storage import check_columns, check_metadata, nodes_of
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_numbers, counted
from featpatch.files import as_path, read_json, writing
from featpatch.metrics import NEAR_ZERO, check_gap
from featpatch.nodes import EFFECTS, RANKED
from featpatch.untrusted import visible

FIELDS = ("site", "kind", "index", "position", "sae")
"""The columns that identify a node; the position is stored as JSON."""

TYPES = {"integers": is_integer_dtype, "numbers": is_float_dtype, "texts": is_string_dtype}
"""The tests of a column's type, by the name of the type in error messages."""

AGAIN = "expected a block written by fp.stream_features; delete its .sha256 file and run fp.stream_features again"
"""The end of every error about a damaged block."""


def write(effects: Effects, folder: Path, block: int, first: int) -> None:
    """Write the three files of a block.

    Args:
        effects: the effects of the block's pairs.
        folder: the folder of the whole stream, with `about.json`.
        block: the number of the block.
        first: the index of the block's first pair among all pairs.
    """
    tables = {name: effects.for_metric(name) for name in effects.metrics}
    rows = pd.DataFrame({name: [getattr(node, name) for node in effects.nodes] for name in FIELDS})
    rows["position"] = [json.dumps(position) for position in rows["position"]]
    rows = rows.astype({name: "Int64" if name == "index" else "string" for name in FIELDS})
    entries = rows.iloc[effects.row].reset_index(drop=True)
    entries["pair"] = effects.pair + first
    pairs = pd.DataFrame({"pair": range(first, first + len(effects.clean))})
    for metric, table in tables.items():
        entries[f"denoised of {metric}"], entries[f"noised of {metric}"] = table.denoised, table.noised
        pairs[f"clean of {metric}"], pairs[f"corrupted of {metric}"] = table.clean, table.corrupted
    pairs["tags"] = [json.dumps(tags) for tags in effects.metadata.get("tags", [{}] * len(pairs))]
    pairs["digest"] = effects.metadata["pairs"]
    for kind, frame in (("effects", entries), ("pairs", pairs)):
        with writing(folder / name_of(kind, block)) as file:
            frame.to_parquet(file, index=False)
    names = ("about.json", name_of("effects", block), name_of("pairs", block))
    with writing(folder / digests_of(block)) as file:
        file.write_text("".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names))


def name_of(kind: str, block: int) -> str:
    """Return the path of a block's Parquet file of a kind, `effects` or `pairs`, relative to the folder."""
    return f"{kind}/{block:06d}.parquet"


def digests_of(block: int) -> str:
    """Return the name of the file of digests, whose presence marks a block as finished."""
    return f"{block:06d}.sha256"


def read(folder: Path, block: int, name: str) -> bytes:
    """Read a file of a finished block and verify its digest.

    Raises:
        FeatpatchError: the file is missing or damaged.
    """
    path = folder / name
    try:
        content = path.read_bytes()
        lines = (folder / digests_of(block)).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({error}): {AGAIN}") from error
    if f"{hashlib.sha256(content).hexdigest()}  {name}" not in lines:
        raise FeatpatchError(f"{str(path)!r} does not match its SHA-256 in {digests_of(block)}: {AGAIN}")
    return content


def read_table(folder: Path, block: int, kind: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a block's Parquet file.

    Args:
        folder: the folder of the whole stream.
        block: the number of the block.
        kind: `effects` or `pairs`.
        columns: the names of the columns.

    Raises:
        FeatpatchError: the file is missing or damaged, or a column has the wrong type.
    """
    import pyarrow as pa

    path, content = folder / name_of(kind, block), read(folder, block, name_of(kind, block))
    try:
        found = pd.read_parquet(BytesIO(content), columns=list(columns))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({error}): {AGAIN}") from error
    for name in columns:
        expected = "integers" if name in ("pair", "index") else "numbers" if " of " in name else "texts"
        if not TYPES[expected](found[name]):
            raise FeatpatchError(f"{name!r} in {str(path)!r} is of type {found[name].dtype}: expected {expected}; {AGAIN}")
    return found


FORMAT = "featpatch stored effects 1"


@dataclass(frozen=True)
class Stored:
    """The effects that `stream_features` wrote to a folder.

    Attributes:
        folder: the folder with `about.json` and, for each block, a Parquet file in `effects`, one in `pairs`, and their
            digests.
        metric: the metric whose effects are read; by default the first of those that were measured.

    Examples:
        >>> stored = fp.stream_features(model, saes[0], [pairs], folder / "ioi", positions=["S2"], progress=False)
        >>> again = fp.Stored(folder / "ioi")  # for example in another session
        >>> again.blocks, len(again.pairs)
        (1, 4)
    """

    folder: Path
    metric: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", as_path(self.folder))
        known = self.about["metrics"]
        if self.metric and self.metric not in known:
            raise FeatpatchError(
                f"metric {self.metric!r} was not measured: expected one of {', '.join(known)}; choose one of these"
            )
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
            raise FeatpatchError(
                f"{str(path)!r} can't be read ({error}): expected a folder written by fp.stream_features"
            ) from error
        return dict(about)

    @cached_property
    def blocks(self) -> int:
        """The number of finished blocks, counted on first access.

        Raises:
            FeatpatchError: a block in between is missing, or `about.json` has changed since the blocks were written.
        """
        names = sorted(path.name for path in self.folder.glob("*.sha256"))
        expected = [digests_of(block) for block in range(len(names))]
        if names != expected:
            missing = sorted({*expected} - {*names})
            raise FeatpatchError(f"{str(self.folder)!r} lacks {missing[0]}: expected no gap before {names[-1]}; {AGAIN}")
        for block in range(len(names)):
            read(self.folder, block, "about.json")
        return len(names)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A table of all pairs, one row each, with `clean`, `corrupted`, `tags`, and the number and digest of their block.

        Raises:
            FeatpatchError: no block is finished, or a file is missing or damaged.
        """
        names = {f"{name} of {self.metric}": name for name in ("clean", "corrupted")}
        columns = ["pair", *names, "tags", "digest"]
        found = [read_table(self.folder, block, "pairs", columns).assign(block=block) for block in range(self.blocks)]
        if not found:
            raise FeatpatchError(
                f"{str(self.folder)!r} has no finished block yet: expected at least one; run fp.stream_features again to "
                "continue"
            )
        table = pd.concat(found, ignore_index=True).rename(columns=names)
        if not np.array_equal(table["pair"], np.arange(len(table))):
            raise FeatpatchError(f"the pairs in {str(self.folder)!r} are not numbered from 0 to {len(table) - 1}: {AGAIN}")
        return table.set_index("pair")

    def pooled(self) -> pd.DataFrame:
        """Compute the pooled effects of every node over all pairs, block by block.

        Returns:
            One row per node, the largest effect first, with the number of pairs in which the node differs and the effects
            over these pairs alone, such as `recovery_where_changed`. Positions are JSON. There are no intervals; `top` has
            them.

        Examples:
            >>> stored = fp.stream_features(model, saes[0], [pairs], folder / "ioi", positions=["S2"], progress=False)
            >>> stored.pooled().columns[-3:].tolist()
            ['changed_pairs', 'recovery_where_changed', 'degradation_where_changed']
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

        Examples:
            >>> stored = fp.stream_features(model, saes, [pairs], folder / "ioi", positions=["S2"], progress=False)
            >>> stored.top(3).nodes == effects.top(3).nodes
            True
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
        """Load all nodes as an `Effects` table in memory.

        Examples:
            >>> stored = fp.stream_features(model, saes, [pairs], folder / "ioi", positions=["S2"], progress=False)
            >>> set(stored.load().nodes) == set(effects.nodes)
            True
        """
        table = self.pooled()
        return self._effects(table, int(table["kind"].isin(RANKED).sum()))

    def _effects(self, chosen: pd.DataFrame, ranked: int) -> Effects:
        keys = chosen[list(FIELDS)].assign(row=np.arange(len(chosen)))
        entries = pd.concat([part.merge(keys, on=list(FIELDS)) for part in self._entries()], ignore_index=True)
        digest = hashlib.sha256("".join(self.pairs["digest"]).encode()).hexdigest()
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
            raise FeatpatchError(f"the effects in {str(self.folder)!r} can't be read ({error}): {AGAIN}") from error
        return Effects(nodes=nodes, metadata=metadata, **columns)

    def _entries(self) -> Iterator[pd.DataFrame]:
        """Yield the entries of each block, one row per node and pair.

        Raises:
            FeatpatchError: a block is damaged, holds entries of other pairs or duplicates, or values that are not finite.
        """
        names = {f"{name} of {self.metric}": name for name in ("denoised", "noised")}
        columns = [*FIELDS, "pair", *names]
        for block in range(self.blocks):
            entries = read_table(self.folder, block, "effects", columns).rename(columns=names)
            pairs = self.pairs.index[self.pairs["block"] == block]
            within = entries["pair"].between(pairs.min(), pairs.max()).all()
            if not within or entries.duplicated([*FIELDS, "pair"]).any():
                raise FeatpatchError(
                    f"block {block} in {str(self.folder)!r} holds effects of pairs in other blocks, or duplicates: {AGAIN}"
                )
            run = [{"denoising": "denoised", "noising": "noised"}[direction] for direction in self.about["directions"]]
            if not np.isfinite(entries[run]).all(axis=None):
                raise FeatpatchError(f"block {block} in {str(self.folder)!r} holds values that are not finite: {AGAIN}")
            yield entries

    def digest_of(self, block: int) -> str:
        """Return the digest of the pairs of a finished block."""
        return str(read_table(self.folder, block, "pairs", ["digest"])["digest"].iloc[0])

    def __repr__(self) -> str:
        size = f"{counted(len(self.pairs), 'pair')} in {counted(self.blocks, 'block')}"
        return visible(f"effects of {size} in {str(self.folder)!r}: {self.metric}")
