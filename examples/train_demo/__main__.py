"""Rebuilds checkpoints/: `python -m examples.train_demo` from the root of the repository.

A step whose output exists is skipped, so a run that was cut off goes on where it stopped. The slow steps can run beside
each other before the rest: `--only seed-2` trains and measures one language model, `--only blocks.0.hook_resid_pre`
one dictionary, `--only clt` or `--only crosscoder` one over all layers.
"""

import os
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import cross, dictionaries, language_model, pairs
from .cards import write_cards
from .files import read_json, write_digests, write_json
from .measure_cross import measure_cross
from .measure_dictionary import held_out_documents, measure_dictionary
from .measure_model import measure_model
from .targets import best_seed

TEXT_DOCUMENTS = 1500
DICTIONARY_SEED = 0


def build_seed(work: Path, seed: int) -> None:
    """Trains and measures the language model of one seed."""
    folder = work / f"seed-{seed}"
    if not (folder / "training.json").is_file():
        language_model.train(folder, seed, language_model.ModelSettings())
    if not (folder / "measurements.json").is_file():
        write_json(folder / "measurements.json", measure_model(folder))


def choose_seed(work: Path, seeds: list[int], out: Path) -> None:
    """Ships the best seed, with the measurements of all of them."""
    if (out / "measurements.json").is_file():
        return
    folders = {str(seed): work / f"seed-{seed}" for seed in seeds}
    records = {
        seed: {"training": read_json(folder / "training.json"), "measured": read_json(folder / "measurements.json")}
        for seed, folder in folders.items()
    }
    best = best_seed(records)
    ignore = shutil.ignore_patterns("training.json", "measurements.json")
    shutil.copytree(folders[best], out, dirs_exist_ok=True, ignore=ignore)
    write_json(out / "measurements.json", {"seed": best, "seeds": records})


def build_dictionary(model: Path, out: Path, settings: dictionaries.DictionarySettings) -> None:
    """Trains and measures one dictionary."""
    folder = out / settings.reads
    if not (folder / "training.json").is_file():
        dictionaries.train(model, folder, DICTIONARY_SEED, settings)
    if not (folder / "measurements.json").is_file():
        measured = measure_dictionary(model, folder)
        config = read_json(folder / "cfg.json")
        config["metadata"]["explained_variance"] = measured["explained_variance"]
        config["metadata"]["l0"] = measured["l0"]
        config["metadata"]["num_dead_features"] = measured["dead_features"]
        write_json(folder / "cfg.json", config)
        write_json(folder / "measurements.json", measured)


def build_cross(model: Path, folder: Path, settings: cross.CrossSettings) -> None:
    """Trains and measures one dictionary over several layers."""
    if not (folder / "training.json").is_file():
        cross.train(model, folder, DICTIONARY_SEED, settings)
    if not (folder / "measurements.json").is_file():
        write_json(folder / "measurements.json", measure_cross(model, folder))


def write_text(path: Path) -> None:
    """Held-out documents, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [text.replace("^", "") for text in held_out_documents(TEXT_DOCUMENTS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("checkpoints"),
    work: Annotated[Path, typer.Option(help="Folder for the models of all seeds.")] = Path("build/train_demo"),
    seeds: Annotated[str, typer.Option(help="Seeds of the language model to choose from.")] = "1,2,3",
    only: Annotated[
        str, typer.Option(help="Run only this step: seed-N, the hook point of a dictionary, clt, crosscoder.")
    ] = "",
) -> None:
    """Trains the demo model and its dictionaries, measures them and writes their cards."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    numbers = [int(seed) for seed in seeds.split(",")]
    sites = {settings.reads: (out / "saes", settings) for settings in dictionaries.SITES}
    sites |= {settings.reads: (out / "transcoders", settings) for settings in dictionaries.TRANSCODERS}
    if only.startswith("seed-"):
        build_seed(work, int(only.removeprefix("seed-")))
        return
    if only in cross.CROSS:
        build_cross(out / "model", out / only, cross.CROSS[only])
        return
    if only:
        build_dictionary(out / "model", *sites[only])
        return
    for seed in numbers:
        build_seed(work, seed)
    choose_seed(work, numbers, out / "model")
    for folder, settings in sites.values():
        build_dictionary(out / "model", folder, settings)
    for name, wide in cross.CROSS.items():
        build_cross(out / "model", out / name, wide)
    pairs.write(out / "pairs")
    write_text(out / "text" / "held_out.txt")
    write_cards(out)
    write_digests(out)


if __name__ == "__main__":
    typer.run(main)
