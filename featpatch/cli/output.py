"""The output folder of a command, which is checked and locked before anything is computed."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import featpatch as fp
from featpatch.errors import FeatpatchError
from featpatch.files import Lock, check_writable, lock, write_csv
from featpatch.lens import dictionaries, provenance, wrap

EFFECTS, CSV, REPORT = "effects.safetensors", "effects.csv", "report.html"

UNFINISHED = "unfinished"
"""The subfolder for the results of an interrupted sweep."""


@dataclass(frozen=True)
class Output:
    """A writable folder that is locked against other commands for as long as this object exists."""

    folder: Path
    lock: Lock | None

    @classmethod
    def open(cls, folder: Path) -> "Output":
        """Create the folder if it is missing, check that it can be written to, and lock it.

        Raises:
            FeatpatchError: the path is a file, can't be written to, or is in use by another command.
        """
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise FeatpatchError(f"--out {str(folder)!r} is a file: expected a folder for the results, new or existing")
        check_writable(folder / EFFECTS)
        try:
            return cls(folder, lock(folder))
        except BlockingIOError as error:
            raise FeatpatchError(
                f"--out {str(folder)!r} is in use by another command: expected a folder of its own; wait for the "
                "other command, or give another --out"
            ) from error

    def check_same(self, study: Mapping[str, Any], *, kind: str) -> None:
        """Refuse to replace the results of other models, SAEs, pairs or options.

        Args:
            study: the arguments of the ranking.
            kind: the kind of results, see `_kind`.

        Raises:
            FeatpatchError: the folder holds such results, or results that can't be read.
        """
        if not (self.folder / EFFECTS).exists():
            return
        there = fp.Effects.load(self.folder / EFFECTS)
        lens, metric, positions = wrap(study["model"]), study["metric"], study["positions"]
        expected = {
            **{name: value for name, value in provenance(lens, study["pairs"]).items() if name in ("pairs", "model")},
            "directions": sorted(study["directions"]),
            "metrics": [metric] if isinstance(metric, str) else list(metric),
            "positions": positions,
        }
        if "saes" in study:
            expected["saes"] = {each.name: each.digest() for each in dictionaries(lens, study["saes"])}
        if "sites" in study:
            expected["components"] = study["sites"]
        differing = [name for name, value in expected.items() if there.metadata.get(name) != value]
        if differing or _kind(there) != kind:
            what = f"{', '.join(differing)} differ" if differing else f"{_kind(there)}, not {kind}"
            raise FeatpatchError(
                f"--out {str(self.folder)!r} holds finished results of another study ({what}): expected those of the same "
                "model, SAEs, pairs and options, or none; delete them, or give another --out"
            )

    def write(self, effects: "fp.Effects", top: int, study: Mapping[str, Any]) -> Path:
        """Write all files or none. Those of an interrupted sweep go to a subfolder, so that they replace nothing.

        Args:
            effects: the results.
            top: how many rows the report shows.
            study: the arguments of the ranking.

        Returns:
            The folder that holds the files.

        Raises:
            FeatpatchError: they can't be written there; the message names the temporary folder that holds them instead.
        """
        folder = self.folder if effects.finished else self.folder / UNFINISHED
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".featpatch-", dir=folder) as made:
                try:
                    _write(Path(made), effects, top, study)
                except KeyboardInterrupt:
                    _move(Path(made), folder)
                    raise
                _move(Path(made), folder)
        except (OSError, FeatpatchError) as error:
            elsewhere = Path(tempfile.mkdtemp(prefix="featpatch-"))
            _write(elsewhere, effects, top, study)
            raise FeatpatchError(
                f"the results can't be written to {str(folder)!r} ({error}): expected write permission and room on the disk; "
                f"they are in {str(elsewhere)!r} instead"
            ) from error
        return folder


def _write(folder: Path, effects: "fp.Effects", top: int, study: Mapping[str, Any]) -> None:
    effects.save(folder / EFFECTS)
    write_csv(folder / CSV, effects.to_pandas())
    fp.report(effects, folder / REPORT, top=top, **{name: study[name] for name in ("model", "saes", "pairs") if name in study})


def _move(made: Path, folder: Path) -> None:
    """Move the files that exist to another folder on the same disk."""
    for name in (EFFECTS, CSV, REPORT):
        if (made / name).exists():
            os.replace(made / name, folder / name)


def _kind(effects: "fp.Effects") -> str:
    """Name the kind of results that a table holds."""
    if effects.value == "estimate":
        return f"estimates by {effects.metadata['method']}"
    if "components" in effects.metadata:
        return "components"
    return "screened features" if "screening" in effects.metadata else "features"
