"""The output of a command: a locked folder with the results as files, and tables or JSON on the terminal."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import typer

import featpatch as fp
from featpatch.cli.app import INTERRUPTED
from featpatch.cli.options import Shown
from featpatch.console import PlainConsole
from featpatch.errors import FeatpatchError
from featpatch.files import Lock, as_path, check_writable, lock, write_csv

FILES = EFFECTS, CSV, REPORT = "effects.safetensors", "effects.csv", "report.html"

UNFINISHED = "unfinished"
"""The subfolder for the results of an interrupted sweep; those of further ones are `unfinished-2` and so on."""


@dataclass(frozen=True)
class Output:
    """A writable folder that is locked against other commands for as long as this object exists."""

    folder: Path
    lock: Lock | None

    @classmethod
    def open(cls, folder: Path, journal: Path | None = None) -> "Output":
        """Create the folder if it is missing, check that it can be written to, and lock it.

        Args:
            folder: the folder for the results.
            journal: the journal of the sweep, which must not be one of the result files.

        Raises:
            FeatpatchError: the path is a file, can't be written to, or is in use by another command.
        """
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise FeatpatchError(f"--out {str(folder)!r} is a file: expected a folder for the results, new or existing")
        check_writable(folder / EFFECTS)
        if journal is not None and as_path(journal).resolve() in [(folder / name).resolve() for name in FILES]:
            raise FeatpatchError(
                f"--journal {str(journal)!r} is the path of a result file: expected a different file; give the journal "
                "another name"
            )
        try:
            return cls(folder, lock(folder))
        except BlockingIOError as error:
            raise FeatpatchError(
                f"--out {str(folder)!r} is in use by another command: expected a folder that no other command writes to; wait "
                "for the other command, or give another --out"
            ) from error

    def check_same(self, study: Mapping[str, Any], *, kind: str, screening: Mapping[str, Any] | None = None) -> None:
        """Check that no results of other models, SAEs, pairs or options would be replaced.

        Args:
            study: the arguments of the ranking.
            kind: the kind of results, see `_kind`.
            screening: the options of a screened ranking.

        Raises:
            FeatpatchError: the folder holds such results, or results that can't be read.
        """
        if not (self.folder / EFFECTS).exists():
            return
        from featpatch.effects.collector import provenance
        from featpatch.model.transformer_lens import wrap
        from featpatch.sae.dictionary import dictionaries, digests

        there = fp.Effects.load(self.folder / EFFECTS)
        lens, metric, positions = wrap(study["model"]), study["metric"], study["positions"]
        expected = {
            **{name: value for name, value in provenance(lens, study["pairs"]).items() if name in ("pairs", "model")},
            "directions": sorted(study["directions"]),
            "metrics": [metric] if isinstance(metric, str) else list(metric),
            "positions": positions if isinstance(positions, str) else list(dict.fromkeys(positions)),
        }
        if "saes" in study:
            expected["saes"] = digests(dictionaries(lens, study["saes"]))
        if "sites" in study:
            expected["components"] = study["sites"]
        if "sites" in study and "components" in there.metadata:
            expected["layers"] = study.get("layers", [*range(lens.n_layers)])
        differing = [name for name, value in expected.items() if there.metadata.get(name) != value]
        if screening is not None and "screening" in there.metadata:
            known = there.metadata["screening"]
            asked = {**screening, "k": min(screening["k"], known["candidates"])}
            differing += [name for name, value in asked.items() if known.get(name) != value]
        if differing or _kind(there) != kind:
            what = f"{', '.join(differing)} differ" if differing else f"{_kind(there)}, not {kind}"
            raise FeatpatchError(
                f"--out {str(self.folder)!r} holds the finished results of another study ({what}): expected an empty folder, "
                "or results for the same model, SAEs, pairs and options; delete the results, or give another --out"
            )

    def write(self, effects: "fp.Effects", top: int, study: Mapping[str, Any]) -> Path:
        """Write all files; those of an interrupted sweep go to a subfolder of their own, so that they replace nothing.

        Args:
            effects: the results.
            top: the number of rows that the report shows.
            study: the arguments of the ranking.

        Returns:
            The folder that holds the files.

        Raises:
            FeatpatchError: not all files can be written there; the message says where each was written.
        """
        folder = self.folder if effects.finished else _unused(self.folder / UNFINISHED)
        written, error = _write(folder, effects, top, study)
        if error is None:
            return folder
        place = folder
        if EFFECTS not in written:
            with suppress(OSError):
                place = Path(tempfile.mkdtemp(prefix="featpatch-"))
                written, _ = _write(place, effects, top, study)
        said = (
            f"{', '.join(written)} {'is' if len(written) == 1 else 'are'} in {str(place)!r}" if written else "nothing was saved"
        )
        raise FeatpatchError(
            f"some results can't be written to {str(folder)!r} ({error}): expected write permission and free disk space; {said}"
        )


def _unused(folder: Path) -> Path:
    """Return a path that does not exist yet, with a number at its end if necessary."""
    return next(path for n in count(1) if not (path := folder.with_name(folder.name + f"-{n}" * (n > 1))).exists())


def _write(
    folder: Path, effects: "fp.Effects", top: int, study: Mapping[str, Any]
) -> tuple[list[str], FeatpatchError | OSError | None]:
    """Write the files and move them into the folder together at the end, also if some of them can't be made.

    Returns:
        The names of the files that were written, and the error that prevented others, if any.
    """
    written: list[str] = []
    known = {name: study[name] for name in ("model", "saes", "pairs") if name in study}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".featpatch-", dir=folder) as made:
            try:
                effects.save(Path(made) / EFFECTS)
                write_csv(Path(made) / CSV, effects.to_pandas())
                fp.report(effects, Path(made) / REPORT, top=top if "saes" in known else None, **known)
            finally:
                for name in FILES:
                    if (Path(made) / name).exists():
                        os.replace(Path(made) / name, folder / name)
                        written.append(name)
    except (OSError, FeatpatchError) as error:
        return written, error
    return written, None


def _kind(effects: "fp.Effects") -> str:
    """Return the name of the kind of results that a table holds."""
    if effects.value == "estimate":
        return f"estimates by {effects.metadata['method']}"
    if "components" in effects.metadata:
        return "components"
    return "screened features" if "screening" in effects.metadata else "features"


def show(
    console: PlainConsole,
    effects: "fp.Effects",
    shown: Shown,
    out: Output,
    study: Mapping[str, Any],
    *,
    told: Sequence[Any] = (),
    as_json: bool = False,
) -> None:
    """Write the files, and print the first rows and the summary of hook points.

    Args:
        shown: the options that determine which rows are printed.
        study: the arguments of the ranking; the report shows its model, SAEs and pairs.
        told: what is printed instead of these tables, if they are told otherwise.

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
        console.print(*told, sep="\n", highlight=False) if told else _print(console, effects, shown)
    if failed is not None:
        raise failed
    if not as_json:
        console.print(f"wrote effects.safetensors, effects.csv and report.html to {folder}/")
    if not effects.finished:
        raise typer.Exit(INTERRUPTED)


def _print(console: PlainConsole, effects: "fp.Effects", shown: Shown) -> None:
    from featpatch.reporting.terminal import ranked, site_summary

    for name in effects.metrics:
        of = effects.for_metric(name)
        console.print(f"metric {name}: clean {of.clean.mean():.2f}, corrupted {of.corrupted.mean():.2f}")
    console.print(ranked(shown.rows(effects), shown.by))
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
        f"estimates: features and error sum to the whole activation within {metadata['completeness_residual']:.1g} of the "
        "mean gap"
    )
    if (off := metadata["whole_residual"]) is None:
        return sums
    what = "a whole activation" if metadata["method"] == "ig" else "the residual stream that enters the first layer"
    return f"{sums}; the estimate for {what} differs from the exact effect by up to {off:.2g} of the mean gap"


def in_json(effects: "fp.Effects", shown: Shown) -> str:
    """Return the first rows, the summary of hook points and the metadata as JSON, with NaN as null."""
    tables = {"effects": shown.rows(effects).to_pandas(), "sites": effects.sites()}
    rows = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
    content = {"value": effects.value, "pairs": len(effects.clean), **rows, "metadata": effects.about()}
    if (audit := _audit(effects, shown.top)) is not None:
        content["audit"] = asdict(audit)
    return json.dumps(content, indent=1)
