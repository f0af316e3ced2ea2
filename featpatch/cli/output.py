"""The folder of a command's results: tried out and held before anything is computed, then written all at once."""

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
"""The folder, within that of the results, for those of an interrupted sweep."""


@dataclass(frozen=True)
class Output:
    """A folder that can be written to, and that no other command writes to as long as this object lives."""

    folder: Path
    lock: Lock | None

    @classmethod
    def open(cls, folder: Path) -> "Output":
        """Make the folder where it is missing, and try it out.

        Raises:
            FeatpatchError: it is a file, can't be written to, or another command is writing to it.
        """
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise FeatpatchError(f"--out {str(folder)!r} is a file: expected a folder for the results, new or existing")
        check_writable(folder / EFFECTS)
        try:
            return cls(folder, lock(folder))
        except BlockingIOError as error:
            raise FeatpatchError(
                f"--out {str(folder)!r} is in use by another command: expected a folder for each; wait for the other one, or "
                "give another --out"
            ) from error

    def check_same(self, study: Mapping[str, Any], *, kind: str) -> None:
        """Refuse to replace the results of other models, SAEs, pairs or options.

        Args:
            study: the arguments of the ranking.
            kind: of results, see `_kind`.

        Raises:
            FeatpatchError: there are such results, or results that can't be read.
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
        """Write all files or none; those of an interrupted sweep into a folder of their own, so that they replace nothing.

        Returns:
            The folder that they are in.

        Raises:
            FeatpatchError: they can't be written there; says where they are instead.
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
                f"the results can't be written to {str(folder)!r} ({error}): expected room there, and permission; they are in "
                f"{str(elsewhere)!r} instead"
            ) from error
        return folder


def _write(folder: Path, effects: "fp.Effects", top: int, study: Mapping[str, Any]) -> None:
    effects.save(folder / EFFECTS)
    write_csv(folder / CSV, effects.to_pandas())
    fp.report(effects, folder / REPORT, top=top, **{name: study[name] for name in ("model", "saes", "pairs") if name in study})


def _move(made: Path, folder: Path) -> None:
    """What is there of the files, from one folder to another of the same disk."""
    for name in (EFFECTS, CSV, REPORT):
        if (made / name).exists():
            os.replace(made / name, folder / name)


def _kind(effects: "fp.Effects") -> str:
    """What sort of results a table holds."""
    if effects.value == "estimate":
        return f"estimates by {effects.metadata['method']}"
    if "components" in effects.metadata:
        return "components"
    return "screened features" if "screening" in effects.metadata else "features"
