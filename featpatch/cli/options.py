"""Options that several commands share, and their conversion to arguments of the library."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import featpatch as fp
from featpatch.errors import FeatpatchError, closest
from featpatch.files import as_path, check_writable

EffectsFile = Annotated[Path, typer.Argument(help="The effects.safetensors file written by rank, components or demo.")]
Out = Annotated[Path, typer.Option(help="Folder for effects.safetensors, effects.csv and report.html.")]
By = Annotated[
    Literal["recovery", "degradation", "recovery_where_changed", "degradation_where_changed"] | None,
    typer.Option(
        help="Sort by this effect, pooled over all pairs or (_where_changed) over the pairs in which the node differs, if "
        "there are at least 5; by default recovery, if it was measured."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="For quadrants: the fraction of the whole activation's effect above which an effect counts; by default the "
        "threshold saved with the table, otherwise 0.01."
    ),
]
Top = Annotated[int, typer.Option(min=1, help="How many features or components to show.")]
Positions = Annotated[
    str,
    typer.Option(
        help="'all' (each feature at all positions at once), 'each', or labels and indices such as 'S2,end,3'. Quote "
        """a label that is a number or contains a comma: '"3","a,b",end'."""
    ),
]
Model = Annotated[
    str, typer.Option(help="Name of a Hugging Face model on the hub, or a folder with the model and its tokenizer.")
]
Saes = Annotated[
    list[str],
    typer.Option(
        help="SAE to use: release/id from the sae-lens registry, owner/repository/folder on the hub, or a local folder. "
        "Repeatable."
    ),
]
PairsFile = Annotated[
    Path,
    typer.Option(help="JSON Lines file of pairs with the fields clean, corrupted, correct, wrong and, optionally, labels."),
]
Directions = Annotated[
    Literal["both", "denoising", "noising"],
    typer.Option(help="Direction of patching: denoising (is the node sufficient?), noising (is it necessary?), or both."),
]
MetricNames = Annotated[
    list[str],
    typer.Option(
        "--metric",
        help="Metric to measure: logit_diff, logit, prob_diff, prob, log_prob, neg_kl, neg_rank, accuracy or, for answers of "
        "several tokens, sequence_log_prob, sequence_log_prob_diff. Repeatable; all are computed from the same patched runs.",
    ),
]
DIGITS = 19
"""From this many digits a number can't be a position, and Python may refuse to convert it."""
BLOCK = 1000
"""The number of lines of a file of pairs that are read at a time to check their labels."""
LOGIT_DIFF = ["logit_diff"]
Method = Annotated[
    Literal["exact", "atp", "ig", "eap_ig_inputs", "grad_drop", "relp", "relp_qk", "gim"],
    typer.Option(help="How to compute effects: exact runs every patch; the others estimate effects from gradients."),
]
Device = Annotated[str, typer.Option(help="Device to run on, e.g. cpu or cuda.")]
JournalFile = Annotated[
    Path | None, typer.Option(help="File that stores finished batches, from which an interrupted sweep resumes.")
]
Executor = Annotated[str, typer.Option(help="Where forward passes run: serial (this process) or ray (Ray workers).")]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a running Ray cluster, such as ray://head:10001; without it, Ray is started on this machine."
    ),
]
Workers = Annotated[int | None, typer.Option(help="Number of Ray workers; by default one per processor.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class Shown:
    """The options that determine which rows are shown.

    Attributes:
        top: the number of rows.
        by: the effect by which rows are sorted.
        threshold: the threshold for quadrants; None for that of the effects.

    Raises:
        FeatpatchError: the threshold is not a share.
    """

    top: int
    by: Any = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        from featpatch.effects.statistics import check_threshold

        if self.threshold is not None:
            check_threshold(self.threshold)

    @classmethod
    def of(cls, top: int, by: str | None, threshold: float | None, direction: str) -> "Shown":
        """Check the options before anything is computed.

        Raises:
            FeatpatchError: the rows are to be sorted by an effect whose direction is not run, or the threshold is not a share.
        """
        from featpatch.effects.selection import sorting
        from featpatch.nodes import EFFECTS

        sorting(by, [effect for effect, way in EFFECTS.items() if way in ways(direction)])
        return cls(top, by, threshold)

    def labelled(self, effects: "fp.Effects") -> "fp.Effects":
        """Return the effects with this threshold for their quadrants, if there is one."""
        return effects if self.threshold is None else effects.with_threshold(self.threshold)

    def rows(self, effects: "fp.Effects") -> "fp.Effects":
        """Select the rows that are shown."""
        return effects.top(self.top, by=self.by)


def study(
    model: str, sae: list[str], pairs: Path, positions: str, direction: str, metric: list[str], device: str, *, progress: bool
) -> dict[str, Any]:
    """Return the arguments of `rank_features` and `plan`; there may be no SAEs."""
    asked = checked(pairs, positions, direction, metric)
    loaded = fp.load(model, sae, device=device, check=False, progress=progress)
    drawn = fp.Pairs.from_jsonl(loaded.model, pairs, long_answers=of_sequences(metric))
    return {"model": loaded.model, "saes": loaded.saes, "pairs": drawn, **asked}


def checked(pairs: Path, positions: str, direction: str, metric: list[str]) -> dict[str, Any]:
    """Return the arguments that need no model, after checking them and that the file of pairs exists and has the labels.

    Raises:
        FeatpatchError: there is no such file, it lacks a label, or an option is unusable.
    """
    from featpatch.metrics import Measures

    asked = {"positions": spans(positions), "directions": ways(direction), "metric": list(dict.fromkeys(metric))}
    Measures.of(asked["metric"])
    check_labels(asked["positions"], _labels(pairs))
    return asked


def check_labels(positions: str | list[int | str], labelled: Iterable[tuple[str, Collection[str]]]) -> None:
    """Check before a model is loaded that each pair has the labels that --positions names.

    Args:
        positions: the result of `spans`.
        labelled: the name of each pair for the error, with its labels; only the first is read if no label is named.

    Raises:
        FeatpatchError: a pair lacks a label.
    """
    wanted = [] if isinstance(positions, str) else [name for name in positions if isinstance(name, str) and name != "all"]
    for where, labels in labelled:
        if missing := [name for name in wanted if name not in labels]:
            known = f"{', '.join(sorted(labels))} or " if labels else ""
            raise FeatpatchError(
                f"--positions {missing[0]}: {where} has no such label: expected {known}a token index, such as -1 for the last "
                f"token{', with commas between them' * (' ' in missing[0])}; correct the option, or add the label to the pairs"
                f"{closest(missing[0], sorted(labels))}"
            )
        if not wanted:
            return


def _labels(pairs: Path) -> Iterator[tuple[str, Collection[str]]]:
    """Yield the place of each pair in a file and its labels; whoever makes the pairs refuses labels of another type."""
    from featpatch.pairs.fields import NEEDED
    from featpatch.pairs.files import json_lines_in_blocks

    for block in json_lines_in_blocks(pairs, NEEDED, BLOCK):
        for where, row in zip(block.where, block.values, strict=True):
            fields = [row.get(name, {}) for name in ("labels", "spans")]
            yield where, {label for field in fields if isinstance(field, Mapping) for label in field}


def table(path: Path) -> "fp.Effects":
    """Read a table of effects.

    Raises:
        FeatpatchError: the file is missing, damaged, or another one than effects.safetensors, which may be beside it.
    """
    folder = path if as_path(path).is_dir() else path.parent
    if path.suffix != ".safetensors" and (beside := folder / "effects.safetensors").is_file():
        raise FeatpatchError(
            f"{str(path)!r} is not a table of effects: expected an effects.safetensors file; give {str(beside)!r}, "
            "which is there"
        )
    return fp.Effects.load(path)


def check_out(out: Path, ending: str) -> None:
    """Check before any work that a file of one format can be written; a device or a pipe may have any name.

    Args:
        out: the value of --out.
        ending: the ending of file names of this format, with its dot.

    Raises:
        FeatpatchError: the file has another ending, so that it may be an input that would be replaced, or can't be written.
    """
    path = as_path(out)
    if out.suffix.lower() != ending and (path.is_file() or not path.exists()):
        raise FeatpatchError(f"--out {str(out)!r}: expected the path of a {ending} file; give a name that ends with {ending}")
    check_writable(out)


def components(sites: str, positions: str) -> dict[str, Any]:
    """Parse the option for components to the arguments `sites` and, if full names of hook points say which, `layers`."""
    from featpatch.components import check_components, named_with_layers

    names = [name for name in sites.split(",") if name]
    chosen, layers = named_with_layers(names, spans(positions)) or (check_components(names, spans(positions)), None)
    return {"sites": chosen} if layers is None else {"sites": chosen, "layers": layers}


def check_methods(method: str, screen: "fp.Screen | None", metric: list[str], direction: str, options: dict[str, Any]) -> None:
    """Raise a FeatpatchError unless the method of estimation, or that of a screen, fits the options that it is used with."""
    from featpatch.metrics import Measures
    from featpatch.ranking.rank import check_estimation

    Measures.of(names := list(dict.fromkeys(metric)))
    check_estimation(method, names, ways(direction), options)
    for each in () if screen is None else screen.methods:
        check_estimation(each, names[:1], ways(direction), {})


def ways(direction: str) -> Any:
    """Convert the option for directions to the argument of the library."""
    return ("denoising", "noising") if direction == "both" else (direction,)


def executor(name: str, address: str | None, workers: int | None) -> Any:
    """Make the executor with this name and its options.

    Raises:
        FeatpatchError: an option belongs to another executor.
    """
    from featpatch.engine.ray import EXECUTORS, executor_of

    given = {option: value for option, value in (("address", address), ("workers", workers)) if value is not None}
    takers = {each: make for each, make in EXECUTORS.items() if given.keys() <= signature(make).parameters.keys()}
    if given and name not in takers:
        said = " ".join(f"--{option} {value}" for option, value in given.items())
        raise FeatpatchError(f"--executor {name} {said}: expected --executor {' or '.join(takers)}")
    return executor_of(takers[name](**given) if given else name)


def of_sequences(metric: list[str]) -> bool:
    """Return whether the metrics need answers that are sequences of tokens."""
    return all(name.startswith("sequence_") for name in metric)


def spans(text: str) -> str | list[int | str]:
    """Parse the option for positions; quoted text is always a label."""
    if text in ("all", "each"):
        return text
    found: list[int | str] = []
    for quoted, plain in re.findall(r'\s*(?:"((?:[^"]|"")*)"|([^,]*))\s*(?:,|$)', text):
        if '"' in plain:
            raise FeatpatchError(f"--positions {text}: expected a comma or the end of the text after a label in double quotes")
        if quoted or plain:
            number = integer(plain)
            found.append(quoted.replace('""', '"') or (plain if number is None else number))
    if not found:
        raise FeatpatchError(f"--positions {text!r}: expected 'all', 'each', or labels and indices such as S2,end,3")
    return found


def integer(text: str) -> int | None:
    """Parse digits, also with a minus sign, as an integer; return None for other text and for numbers that are too long."""
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < DIGITS else None
