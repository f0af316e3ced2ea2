"""Ranking of features over more pairs than fit into memory."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from featpatch.engine.executor import Executor
from featpatch.engine.ray import executor_of
from featpatch.errors import FeatpatchError, counted, errors_about
from featpatch.files import as_path, check_writable, lock, writing
from featpatch.metrics import Metrics
from featpatch.nodes import DIRECTIONS, Direction
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.features import feature_study
from featpatch.patching.study import Study
from featpatch.streaming.stored import FORMAT, Stored, digests_of, write

OWN = ("pairs", "tags", "places", "tokens", "lengths", "finished", "finished_at", "command", "metric")
"""The metadata entries of a table that differ between blocks."""


def stream_features(
    model: Any,
    saes: Any,
    blocks: Iterable[Pairs],
    folder: str | Path,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Stored:
    """Rank features over blocks of pairs, writing each block to disk before the next is read; resumes after an interruption.

    A second call with the same arguments skips finished blocks and continues an unfinished one from its journal. After Ctrl-C,
    everything that was written to disk is kept. Unlike in `rank_features`, the gap of a single block may be near zero; only the
    gap of all pairs together must not be, when effects are read.

    Args:
        model, saes: the model and SAEs, as in `rank_features`.
        blocks: blocks of pairs, read one after another, such as `Pairs.blocks_from_jsonl(tokenizer, path)`; they must be the
            same in every call.
        folder: the folder for `about.json`, the Parquet files of `effects` and `pairs`, and their digests.
        positions, directions, metric, batch_rows, executor: options of `rank_features`.
        progress: whether to show a progress bar that counts pairs.

    Returns:
        The stored effects, which are read from the folder on demand.

    Raises:
        FeatpatchError: the input is not valid, another process or thread writes to the folder, or the folder holds results of
            another model, other SAEs, options or pairs; the message names the block.

    Examples:
        >>> path = pairs.to_jsonl(folder / "pairs.jsonl")
        >>> blocks = fp.Pairs.blocks_from_jsonl(model, path, size=2)
        >>> stored = fp.stream_features(model, saes[0], blocks, folder / "ioi", positions=["S2"], progress=False)
        >>> stored.blocks, len(stored.top(3))
        (2, 3)
    """
    if not isinstance(folder, (str, Path)) or isinstance(blocks, Pairs) or not isinstance(blocks, Iterable):
        raise FeatpatchError(
            f"blocks is a {type(blocks).__name__}, folder={folder!r}: expected an iterable of Pairs, such as "
            "Pairs.blocks_from_jsonl(tokenizer, path), and the path of a folder"
        )
    folder, elsewhere, number = as_path(folder), executor_of(executor), -1
    check_writable(folder / "about.json")
    study_of = partial(
        feature_study, model, saes, positions=positions, directions=directions, metric=metric, batch_rows=batch_rows
    )
    first = 0
    with _alone(folder), tqdm(unit="pair", desc="streaming", disable=not progress, smoothing=0) as bar:
        for number, block in enumerate(blocks):
            journal, finished = folder / f"{number:06d}.journal", (folder / digests_of(number)).is_file()
            if finished:
                _check_same(folder, number, check_pairs(block, by_label=True))
            if number == 0 or not finished:
                study, _ = study_of(check_pairs(block, by_label=True))
                about = {"format": FORMAT, **{name: value for name, value in study.metadata.items() if name not in OWN}}
                _check_about(folder / "about.json", json.loads(json.dumps(about)))
            if not finished:
                _run(study, folder, number, first, journal, elsewhere)
            journal.unlink(missing_ok=True)
            first += len(block)
            bar.update(len(block))
    if number < 0:
        raise FeatpatchError("there are no blocks: expected at least one; pass an iterable of Pairs")
    stored = Stored(folder)
    if stored.blocks > number + 1:
        raise FeatpatchError(
            f"{str(folder)!r} holds {counted(stored.blocks, 'block')}, and {number + 1} were given: expected all of them "
            "again; use another folder for fewer pairs"
        )
    return stored


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder within this context, because one process deletes the journals of finished blocks that another may open.

    Raises:
        FeatpatchError: another process or thread has locked it.
    """
    try:
        held = lock(folder)
    except BlockingIOError as error:
        raise FeatpatchError(
            f"the folder {str(folder)!r} is in use by another process or thread: expected only one user at a time; wait for it "
            "to finish, or give another folder"
        ) from error
    try:
        yield
    finally:
        del held  # also while an exception refers to this frame


def _run(study: Study, folder: Path, number: int, first: int, journal: Path, executor: Executor | None) -> None:
    with errors_about(f"block {number}, pairs {first} to {first + len(study.pairs) - 1}"):
        effects = study.run_block(journal, progress=False, executor=executor)
    if not effects.finished:
        raise KeyboardInterrupt
    write(effects, folder, number, first)


def _check_about(path: Path, about: dict[str, Any]) -> None:
    """Write `about.json`, or raise a FeatpatchError if an existing one is of another study."""
    if not path.exists():
        with writing(path) as file:
            file.write_text(json.dumps(about, indent=1), encoding="utf-8")
        return
    known = dict(Stored(path.parent).about)
    differing = [name for name in sorted({*known, *about}) if known.get(name) != about.get(name) and name != "versions"]
    if differing:
        raise FeatpatchError(
            f"{str(path.parent)!r} holds other results: {', '.join(differing)} differ; expected the same model, SAEs and "
            "options; use another folder"
        )


def _check_same(folder: Path, number: int, block: Pairs) -> None:
    """Raise a FeatpatchError unless a finished block has the same pairs."""
    if Stored(folder).digest_of(number) != block.digest():
        raise FeatpatchError(
            f"block {number} in {str(folder)!r} holds other pairs: expected the same blocks of the same size; use another "
            "folder"
        )
