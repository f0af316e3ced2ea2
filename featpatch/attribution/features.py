"""Estimates of the effect of every feature, error term and site from a few gradients.

    IE_i = (f_s - f_b)_i (d_i . g),   IE_error = (e_s - e_b) . g,   g = dm/dx at the site in the unmodified model

Summed over all features and the error they are (x_s - x_b) . g, exactly: what is left of that is noted as the completeness
residual. Denoising takes the gradient of the corrupted run, noising that of the clean one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from featpatch.attribution.gradients import Activations, Gradients, Method, method
from featpatch.effects import Collector, Effects, check_gap
from featpatch.lens import Dictionary, Lens, Split, dictionaries, provenance, wrap
from featpatch.metrics import Metric, find
from featpatch.pairs import Pair, Pairs, check_pairs
from featpatch.pairs.spans import Positions, Wanted, spans
from featpatch.patch import DIRECTIONS, Direction, Kind, Node, check_directions

Estimates = dict[Node, float]


def estimate_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    method: str = "atp",
    steps: int = 10,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: str | Metric = "logit_diff",
    progress: bool = True,
) -> Effects:
    """Gradient estimates of what `rank_features` measures: the same rows and columns, marked `estimate`.

    Attribution patching costs a forward and a backward pass per run, whatever the number of SAEs and features. How far its
    estimates can be trusted is for `fp.calibrate` to tell, against exact effects.

    Args:
        method: `"atp"`, or `"ig"`: integrated gradients at each site, `steps` forward and backward passes per site.
        steps: points of the midpoint rule.
        metric: a differentiable one; not `"neg_kl"`, whose gradient at the clean run is zero.
        model, saes, pairs, positions, directions, progress: as in `rank_features`.

    Returns:
        Estimates. `metadata["completeness_residual"]`: the largest |sum of features and error - whole site| of any site,
        position and pair, as a share of the mean gap: rounding, unless what features add depends on one another or on a state
        (a token's norm), which belongs to neither. With `"ig"`, `metadata["ig_residual"]`: the largest
        |integral - patched run| of any whole site and pair, as such a share: what the steps leave.

    Raises:
        FeatpatchError: unusable input.
    """
    check_pairs(pairs)
    ways = check_directions(directions)
    return _Estimate.of(model, saes, metric, method, steps).run(pairs, positions, ways, progress=progress)


@dataclass(frozen=True)
class _Estimate:
    lens: Lens
    found: list[Dictionary]
    gradients: Method
    name: str

    @classmethod
    def of(cls, model: Any, saes: Any, metric: str | Metric, name: str, steps: int) -> "_Estimate":
        lens = wrap(model)
        return cls(lens, dictionaries(lens, saes), method(lens, find(metric), name, steps), name)

    @property
    def sites(self) -> list[str]:
        """Those that the dictionaries write."""
        return list(dict.fromkeys(dictionary.writes for dictionary in self.found))

    def run(self, pairs: Pairs, positions: Positions, directions: tuple[Direction, ...], *, progress: bool) -> Effects:
        metric = self.gradients.measure.name
        clean, corrupted, collector = np.zeros((len(pairs), 1)), np.zeros((len(pairs), 1)), Collector((metric,))
        complete, integral = 0.0, 0.0
        for index, pair in enumerate(tqdm(pairs, unit="pair", desc="estimating", disable=not progress)):
            wanted = spans(pair, positions)
            runs = {"denoising": self._read(pair.corrupted), "noising": self._read(pair.clean)}
            tokens = {"denoising": pair.corrupted, "noising": pair.clean}
            patched: dict[Direction, Estimates] = {}
            for direction in DIRECTIONS:
                base, source = runs[direction], runs["noising" if direction == "denoising" else "denoising"]
                of_run = self.gradients.gradients(pair, tokens[direction], self.sites, base, source)
                (corrupted if direction == "denoising" else clean)[index] = of_run.value
                if direction not in directions:
                    continue
                changes, left = self._changes(pair, base, source, of_run, wanted)
                patched[direction] = {node: of_run.value + change for node, change in changes.items()}
                complete = max(complete, left)
                for site, value in of_run.end.items():
                    whole = float(((source[site] - base[site]).flatten(1) * of_run.at[site]).sum())
                    integral = max(integral, abs(whole - (value - of_run.value)))
            nodes = list(dict.fromkeys(node for values in patched.values() for node in values))
            collector.add(
                index, nodes, {way: np.array([[v[node]] for node in nodes]).reshape(-1, 1) for way, v in patched.items()}
            )
        check_gap(metric, clean[:, 0], corrupted[:, 0])
        gap = abs(float((clean - corrupted).mean()))
        residuals = {"completeness_residual": complete / gap, **({"ig_residual": integral / gap} if self.name == "ig" else {})}
        return collector.effects(clean, corrupted, {**self._about(pairs, positions, directions), **residuals}, value="estimate")

    def _read(self, tokens: tuple[int, ...]) -> Activations:
        hooks = sorted({hook for d in self.found for hook in (d.reads, d.writes)})
        return {hook: values[0] for hook, values in self.lens.read(torch.tensor([tokens]), hooks).items()}

    def _changes(
        self, pair: Pair, base: Activations, source: Activations, gradients: Gradients, wanted: Wanted
    ) -> tuple[Estimates, float]:
        """Estimated changes of the metric by node, and the largest completeness residual."""
        changes: Estimates = {}
        worst, first = 0.0, pair.first_difference if self.lens.causal else 0
        for dictionary in self.found:
            site, g = dictionary.writes, gradients.at[dictionary.writes]
            b, s = (dictionary.split(run[dictionary.reads][None], run[site][None]) for run in (base, source))
            g = g.to(b.error)
            features = _along_features(dictionary, b, s, g)
            error, whole = _error(dictionary, b, s), (source[site] - base[site]).flatten(1).to(g)
            together = (dictionary.decode(s.features, b.state) - dictionary.decode(b.features, b.state))[0].to(g)
            named: dict[tuple[Kind, str], torch.Tensor] = {
                ("all_features", dictionary.name): together,
                ("error", dictionary.name): error,
                ("activation", ""): whole,
            }
            for position, span in wanted.items():
                rows = torch.tensor([p for p in span if p >= first], dtype=torch.long, device=g.device)
                single, differs = features[rows].sum(0), (s.features[0, rows] != b.features[0, rows]).any(0)
                for feature in differs.nonzero()[:, 0].tolist():
                    changes[Node(site, "feature", feature, position, dictionary.name)] = float(single[feature])
                sums = {kind: float((change[rows] * g[rows]).sum()) for (kind, _), change in named.items()}
                for (kind, owner), change in named.items():
                    if change[rows].any():
                        changes[Node(site, kind, None, position, owner)] = sums[kind]
                worst = max(worst, abs(float(single.sum()) + sums["error"] - sums["activation"]))
        return changes, worst

    def _about(self, pairs: Pairs, positions: Positions, directions: Sequence[Direction]) -> Mapping[str, Any]:
        return {
            "metric": self.gradients.measure.name,
            "method": self.name,
            "steps": self.gradients.steps,
            "directions": sorted(directions),
            "positions": positions if isinstance(positions, str) else list(positions),
            **provenance(self.lens, pairs),
            "saes": {dictionary.name: dictionary.digest() for dictionary in self.found},
        }


def _along_features(dictionary: Dictionary, base: Split, source: Split, g: torch.Tensor) -> torch.Tensor:
    """(f_s - f_b)_i (d_i . g) `[pos, d_sae]`; by the change that each makes alone where features have no direction."""
    change = (source.features - base.features)[0]
    found = torch.zeros_like(change)
    position, feature = change.nonzero(as_tuple=True)
    if not dictionary.behaviour.linear:
        moved = dictionary.moved(base, source, position, feature)
        found[position, feature] = (moved.to(g) * g[position]).sum(1).to(found)
        return found
    several, inverse = feature.unique(return_inverse=True)
    directions = dictionary.directions(several.cpu()).to(g)
    along = (directions[inverse] * g[position]).sum(1)
    if dictionary.behaviour.scaled:
        along = along * dictionary.gains(base)[position]
    found[position, feature] = change[position, feature] * along.to(change)
    return found


def _error(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    """What the error, and the state that decoding needs, change, `[pos, d]`."""
    change = (source.error - base.error)[0]
    if not base.state:
        return change
    after, before = (dictionary.decode(base.features, state) for state in (source.state, base.state))
    return change + (after - before)[0].to(change)
