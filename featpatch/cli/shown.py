"""Effects on the terminal, as JSON, and as files."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import featpatch as fp
from featpatch.screen import Screen
from featpatch.untrusted import cell

if TYPE_CHECKING:
    import pandas as pd


def show(
    console: Screen,
    effects: "fp.Effects",
    top: int,
    out: Path,
    study: Mapping[str, Any],
    descriptions: Mapping[Any, Any] | None = None,
    *,
    as_json: bool = False,
) -> None:
    """Writes the files, prints the first rows and the sites.

    Args:
        study: the arguments of the ranking; the report shows its model, SAEs and pairs.
    """
    effects.save(out / "effects.safetensors")
    for_spreadsheets(effects.to_pandas()).to_csv(out / "effects.csv", index=False)
    fp.report(
        effects, out / "report.html", top=top, **{name: study[name] for name in ("model", "saes", "pairs") if name in study}
    )
    if as_json:
        typer.echo(in_json(effects, top))
        return
    from featpatch.terminal import ranked, site_summary

    for name in effects.metrics:
        of = effects.metric(name)
        console.print(f"metric {name}: clean {of.clean.mean():.2f}, corrupted {of.corrupted.mean():.2f}")
    if not effects.finished:
        console.print(f"interrupted: what follows is finished, on {len(effects.clean)} pairs", style="yellow")
    console.print(ranked(effects.top(top), descriptions))
    for node, description in (descriptions or {}).items():
        console.print(f"{node}: " + "; ".join(description.contexts), highlight=False)
    if len(effects.sites()):
        console.print(site_summary(effects))
    if effects.value == "estimate":
        console.print(_residuals(effects.metadata), highlight=False)
    if "screening" in effects.metadata:
        console.print(repr(effects.audit(top=min(top, effects.metadata["screening"]["k"]))), highlight=False)
    console.print(f"wrote effects.safetensors, effects.csv and report.html to {out}/")


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A table none of whose texts a spreadsheet takes for a formula."""
    texts = frame.select_dtypes(exclude=["number", "bool"])
    return frame.assign(**{name: texts[name].map(cell) for name in texts}).rename(columns=cell)


def _residuals(metadata: Mapping[str, Any]) -> str:
    """How far they are from adding up, and from patched runs."""
    sums = (
        f"estimates: features and error add up to the whole site within {metadata['completeness_residual']:.1g} of the mean gap"
    )
    if (off := metadata["whole_residual"]) is None:
        return sums
    what = "a whole site" if metadata["method"] == "ig" else "the stream that enters the first block"
    return f"{sums}; that of {what} is up to {off:.2g} of the mean gap off its patched run"


def in_json(effects: "fp.Effects", top: int) -> str:
    """The first rows, the sites and where they come from; NaN is null."""
    tables = {"effects": effects.top(top).to_pandas(), "sites": effects.sites()}
    rows = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    content = {"value": effects.value, "pairs": len(effects.clean), **rows, "metadata": effects.about()}
    if "screening" in effects.metadata:
        content["audit"] = asdict(effects.audit(top=min(top, effects.metadata["screening"]["k"])))
    return json.dumps(content, indent=1)
