"""The command `featpatch attribute`."""

from pathlib import Path

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.output import Output
from featpatch.cli.shown import show


@app.command()
def attribute(
    model: of.Model,
    sae: of.Saes,
    pairs: of.PairsFile,
    method: of.Method = "atp",
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    top: of.Top = 20,
    by: of.By = None,
    threshold: of.Threshold = None,
    out: of.Out = Path("featpatch-estimates"),
    as_json: of.Json = False,
) -> None:
    """Estimate the effects of all features from gradients. `rank --exact screened` runs the first of them.

    Example: featpatch attribute --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --method ig
    """
    with clear_errors():
        results = Output.open(out)
        shown = of.Shown.of(top, by, threshold, direction)
        screen = console(json=as_json)
        work = of.study(screen, model, sae, pairs, positions, direction, metric, device, progress=not as_json)
        if len(metric) > 1:
            raise fp.FeatpatchError(f"--metric {', '.join(metric)}: expected one to estimate with")
        results.check_same(work, kind=f"estimates by {method}")
        effects = fp.estimate_features(**{**work, "metric": metric[0]}, method=method, progress=not as_json)
        show(screen, effects, shown, results, work, as_json=as_json)
