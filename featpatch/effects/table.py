"""The table of results, with its tables, figures and files."""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from featpatch.effects import frames, storage
from featpatch.effects.audit import Audit, audited
from featpatch.effects.frames import SPLITS, TOP, Stability, split_half
from featpatch.effects.measured import Measured
from featpatch.effects.plots import Plots
from featpatch.errors import FeatpatchError
from featpatch.files import as_path
from featpatch.frame import ROWS, Frame, text
from featpatch.nodes import Effect


@dataclass(frozen=True, repr=False)
class Effects(Measured):
    """A table of effects, with one row per node: the result of every sweep and of every gradient estimate.

    Values and statistics are those of `Measured`. This class adds tables, figures, files and the audit of a screened ranking.

    Example:
        >>> strongest = effects.top(3)
        >>> strongest.nodes[0].index, round(float(strongest.pooled("degradation")[0]), 2)
        (433, 0.07)
        >>> sum(quadrant == "both directions" for quadrant in effects.quadrants())
        2
    """

    def audit(
        self, effect: Effect | None = None, *, top: int | None = None, confidence: float = 0.95, share: float = 0.05
    ) -> Audit:
        """Bound how much a screened ranking may have missed, from the features that were run at random.

        See `effects/audit.py` for the statistics.

        Args:
            effect: the effect by whose size features are compared; by default the larger one of those that were run.
            top: the number of largest features to make a statement about; by default 20, or the number of screened features
                if that is smaller.
            confidence: the confidence of each bound, between 0 and 1.
            share: the share of the features that estimates ranked last that may have a larger effect than `Audit.size`.

        Raises:
            FeatpatchError: the ranking was not screened, the sweep was interrupted, or only some rows of the table were saved.

        Example:
            >>> screen = fp.Screen(k=20, audit=80)
            >>> screened = fp.rank_features(model, saes, pairs, positions=["S2"], screen=screen, progress=False)
            >>> audit = screened.audit(top=10)
            >>> audit.screened, audit.sampled, audit.recall >= 0.5
            (20, 80, True)
        """
        whole, screening = self.whole, self.metadata.get("screening")
        if screening is None or not self.finished:
            raise FeatpatchError(
                "this table has no finished screening to audit: expected one from rank_features(..., screen=fp.Screen()); a "
                "full sweep needs no audit, because it patches every feature"
            )
        sizes = whole.take(whole.ranked).sizes([effect] if effect else None)
        if len(sizes) != screening["k"] + screening["sampled"]:
            raise FeatpatchError(
                f"the table has {len(sizes)} of the {screening['k'] + screening['sampled']} features that were patched: "
                "expected all of them; audit the table before you select rows"
            )
        return audited(
            sizes[: screening["k"]],
            sizes[screening["k"] :],
            screening["candidates"],
            top=min(TOP, screening["k"]) if top is None else top,
            confidence=confidence,
            share=share,
            looks=screening["looks"],
        )

    def stability(self, effect: Effect, *, splits: int = SPLITS, top: int = TOP, seed: int = 0) -> Stability:
        """Measure how well the rankings of the features in two random halves of the pairs agree.

        Args:
            effect: the effect to rank by.
            splits: the number of random splits.
            top: the number of largest features whose overlap is measured.
            seed: the seed of the random splits.

        Raises:
            FeatpatchError: fewer than 4 pairs or 2 features with known values, or `splits` or `top` below 1.

        Example:
            >>> stability = effects.stability("recovery", top=10)
            >>> stability.overlap > stability.chance
            True
        """
        return split_half(self.take(self.ranked).changes(effect).toarray(), self.gap, splits, top, seed)

    def by_tag(self, tag: str, effect: Effect) -> pd.DataFrame:
        """Return the pooled effects for each value of a tag of the pairs, with intervals and ranks, one row per node.

        For example `by_tag("corruption", "recovery")`. The column `depends` is True for a feature whose intervals under two
        values do not overlap; see `frames.by_tag`.

        Args:
            tag: the name of the tag.
            effect: `"recovery"` or `"degradation"`.

        Raises:
            FeatpatchError: no pair has this tag, or all have the same value of it.

        Example:
            >>> two = fp.Pairs((*fp.tasks.ioi(model, 4), *fp.tasks.ioi(model, 4, corruptions="swap_names")))
            >>> table = fp.rank_components(model, two, sites="resid_pre", positions=["S2"], progress=False)
            >>> table.by_tag("corruption", "recovery")[["recovery_swap_s2", "recovery_swap_names"]].shape
            (4, 2)
        """
        return Frame(frames.by_tag(self, tag, effect))

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per node: its fields, both effects with intervals and statistics, quadrant, pairs, value.

        Columns of each effect over all pairs: `recovery`, `_low` and `_high` (95 % interval), `_median`, `_sign_consistency`,
        `_p`, `_q`; over the `changed_pairs` in which the node differs: `recovery_where_changed` with its `_low` and `_high`.
        `smallest_p` is the smallest p-value possible with that number of changed pairs. `quadrant` is present if both
        directions were run, and `_estimate` if features were screened. Columns of other metrics come last, prefixed with the
        metric's name: `prob_recovery`.

        Example:
            >>> table = effects.top(5).to_pandas()
            >>> table[["index", "recovery", "recovery_low", "recovery_high"]].shape
            (5, 4)
            >>> bool((table["recovery_low"] <= table["recovery"]).all())
            True
        """
        return Frame(frames.full(self))

    def sites(self) -> pd.DataFrame:
        """Summarise each hook point, one row per SAE and position.

        The columns hold the effect of the whole activation, of all features with the error kept, of the error alone, and of
        their interaction, whole - features - error. A node without a row in the table is the same in both runs and has exactly
        no effect.

        Example:
            >>> effects.sites().set_index("sae")["recovery_activation"].round(2).to_dict()
            {'blocks.1.hook_resid_pre': 1.0, 'blocks.3.hook_resid_post': 0.0}
        """
        return Frame(frames.by_site(self))

    @property
    def plot(self) -> Plots:
        """The plotly figures of this table: `plot.quadrants()`, `plot.sites()`, `plot.heatmap()`."""
        return Plots(self)

    def save(self, path: str | Path) -> Path:
        """Write the table to a safetensors file, with metadata as JSON in its header.

        Args:
            path: the file; an existing one is replaced.

        Returns:
            The path.

        Example:
            >>> path = effects.save(folder / "ioi.safetensors")
            >>> len(fp.Effects.load(path)) == len(effects)
            True
        """
        return storage.save(self, as_path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Load a table from a file that `save` wrote.

        Raises:
            FeatpatchError: the file is missing, damaged or not a table of effects.

        Example:
            >>> path = effects.save(folder / "ioi.safetensors")
            >>> fp.Effects.load(path).top(1).nodes == effects.top(1).nodes
            True
        """
        first, *others = [cls(**fields) for fields in storage.load(as_path(path))]
        table = replace(first, others={other.metadata["metric"]: other for other in others})
        return table.take(range(table.metadata["shown_rows"])) if "shown_rows" in table.metadata else table

    def __repr__(self) -> str:
        first = self.take(range(min(ROWS, len(self))))
        shown = text(frames.brief(first).drop(columns=["sae", "pairs", "value"]))
        more = f", the first {len(first)} of" if len(self) > len(first) else ","
        return f"{self.value} effects over {len(self.clean)} pairs{more} {len(self)} rows:\n{shown}"

    def _repr_html_(self) -> str:
        shown = frames.brief(self.take(range(min(20, len(self))))).to_html(index=False, escape=True)
        return f"{shown}<p>{len(self)} rows</p>"
