"""Output of effects on the terminal, as JSON and as files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

import featpatch as fp
from featpatch.cli.app import INTERRUPTED
from featpatch.cli.options import Shown
from featpatch.cli.output import Output
from featpatch.console import PlainConsole
from featpatch.errors import FeatpatchError


def show(
    console: PlainConsole,
    effects: "fp.Effects",
    shown: Shown,
    out: Output,
    study: Mapping[str, Any],
    descriptions: Mapping[Any, Any] | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Write the files, and print the first rows and the summary of hook points.

    Args:
        shown: the options that determine which rows are printed.
        study: the arguments of the ranking; the report shows its model, SAEs and pairs.

    Raises:
        FeatpatchError: the files can't be written; raised after everything has been printed.
        typer.Exit: the sweep was interrupted.
    """
    failed, folder, effects = None, out.folder, shown.labelled(effects)
    try:
        folder = out.write(effects, shown.top, study)
    except FeatpatchError as error:
        failed = error
    if as_json:
        typer.echo(in_json(effects, shown))
    else:
        _print(console, effects, shown, descriptions)
    if failed is not None:
        raise failed
    if not as_json:
        console.print(f"wrote effects.safetensors, effects.csv and report.html to {folder}/")
    if not effects.finished:
        raise typer.Exit(INTERRUPTED)


def _print(console: PlainConsole, effects: "fp.Effects", shown: Shown, descriptions: Mapping[Any, Any] | None) -> None:
    from featpatch.terminal import ranked, site_summary

    for name in effects.metrics:
        of = effects.metric(name)
        console.print(f"metric {name}: clean {of.clean.mean():.2f}, corrupted {of.corrupted.mean():.2f}")
    if not effects.finished:
        console.print(f"interrupted: what follows is finished, on {len(effects.clean)} pairs", style="yellow")
    console.print(ranked(shown.rows(effects), shown.by))
    for node, description in (descriptions or {}).items():
        console.print(f"{node}: {description}, e.g. " + "; ".join(description.contexts), highlight=False)
    if len(effects.sites()):
        console.print(site_summary(effects))
    if effects.value == "estimate":
        console.print(_residuals(effects.metadata), highlight=False)
    if (audit := _audit(effects, shown.top)) is not None:
        console.print(repr(audit), highlight=False)


def _audit(effects: "fp.Effects", top: int) -> Any:
    """Return the audit of a finished screening; None for any other table."""
    if "screening" not in effects.metadata or not effects.finished:
        return None
    return effects.audit(top=min(top, effects.metadata["screening"]["k"]))


def _residuals(metadata: Mapping[str, Any]) -> str:
    """Return a sentence on the residuals of the estimates.

    These are the deviation of summed estimates from the estimate of the whole activation, and of the latter from a patched run.
    """
    sums = (
        f"estimates: features and error add up to the whole site within {metadata['completeness_residual']:.1g} of the mean gap"
    )
    if (off := metadata["whole_residual"]) is None:
        return sums
    what = "a whole site" if metadata["method"] == "ig" else "the residual stream that enters the first block"
    return f"{sums}; the estimate for {what} differs from its patched run by up to {off:.2g} of the mean gap"


def in_json(effects: "fp.Effects", shown: Shown) -> str:
    """Return the first rows, the summary of hook points and the metadata as JSON, with NaN as null."""
    tables = {"effects": shown.rows(effects).to_pandas(), "sites": effects.sites()}
    rows = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    content = {"value": effects.value, "pairs": len(effects.clean), **rows, "metadata": effects.about()}
    if (audit := _audit(effects, shown.top)) is not None:
        content["audit"] = asdict(audit)
    return json.dumps(content, indent=1)
