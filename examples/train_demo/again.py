"""Measures what ships again, without training: `python -m examples.train_demo.again`.

Ends with 1 if a card in checkpoints/ would now be another one; else prints the card of the folder.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from .cards import overview, write_cards
from .cross import CROSS
from .files import dictionary_folders, read_json, write_json
from .measure_cross import measure_cross
from .measure_dictionary import measure_dictionary
from .measure_model import measure_model


def main(shipped: Path = Path("checkpoints")) -> None:
    """In a copy: new measurements of the shipped model and of every dictionary, and the cards that follow from them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(shipped, Path(folder) / "checkpoints"))
        record = read_json(copy / "model" / "measurements.json")
        record["seeds"][str(record["seed"])]["measured"] = measure_model(copy / "model")
        write_json(copy / "model" / "measurements.json", record)
        for path in dictionary_folders(copy):
            measure = measure_cross if path.name in CROSS else measure_dictionary
            write_json(path / "measurements.json", measure(copy / "model", path))
        write_cards(copy)
        cards = [path.relative_to(copy) for path in copy.rglob("README.md")]
        changed = [str(card) for card in cards if (copy / card).read_text() != (shipped / card).read_text()]
        print(overview(copy))
    if changed:
        sys.exit(f"measured numbers have changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
