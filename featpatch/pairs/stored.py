"""Pairs in files and tables: the methods of `Pairs` that read and write them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from featpatch.errors import FeatpatchError, check_numbers, each
from featpatch.files import path_to_write, write_csv, writing
from featpatch.pairs.fields import NEEDED, for_cells, from_cells, from_line, pairs_of, written
from featpatch.pairs.files import csv_rows, frame_rows, json_lines, json_lines_in_blocks
from featpatch.pairs.importers import auto_circuit, eap_ig, feature_circuits
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import Tokenizer, plain_tokenizer

Own = TypeVar("Own", bound="PairsInFiles")


@dataclass(frozen=True, repr=False)
class PairsInFiles:
    """Pairs that are read from files and tables, and written to them; `Pairs` adds everything else."""

    pairs: tuple[Pair, ...]
    tokenizer: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, tuple) or not all(isinstance(pair, Pair) for pair in self.pairs):
            raise FeatpatchError(
                f"the pairs are of type {type(self.pairs).__name__}: expected a tuple of Pair, e.g. Pairs((pair,)); or use "
                "Pairs.from_tokens or Pairs.from_prompts"
            )
        if not self.pairs:
            raise FeatpatchError("there are no pairs: expected at least one clean and one corrupted prompt")

    @classmethod
    def from_jsonl(
        cls: type[Own], tokenizer: Tokenizer, path: str | Path, *,
        align: str | None = None, filler: str | None = None, long_answers: bool = False,
    ) -> Own:  # fmt: skip
        """Read pairs from a file of JSON lines `{"clean", "corrupted", "correct", "wrong"}`.

        Optional fields are `"labels"` and `"corrupted_labels"` as in `from_prompts`, `"spans"` and `"corrupted_spans"`
        (`{"S2": [34, 38]}`, in characters), and `"tags"` (an object of texts), which holds any other information. `align`,
        `filler` and `long_answers` are those of `from_prompts`.

        If both prompts are lists of token ids, the answers are ids too (`[52]`, or `[[5, 9]]` for a sequence) and labels are
        positions; `"special"` and `"answer_position"` are optional. Such a pair is used unchanged; see `to_jsonl`.

        Raises:
            FeatpatchError: the file is missing, or a line is not JSON, lacks a field, has an unknown one or makes no valid
                pair.

        Examples:
            >>> again = fp.Pairs.from_jsonl(model, pairs.to_jsonl(folder / "pairs.jsonl"))
            >>> again == pairs
            True
        """
        read = partial(from_line, tokenizer, long_answers=long_answers)
        return cls(pairs_of(tokenizer, json_lines(path, NEEDED), read, align, filler, long_answers), plain_tokenizer(tokenizer))

    @classmethod
    def blocks_from_jsonl(
        cls: type[Own], tokenizer: Tokenizer, path: str | Path, *, size: int = 1000,
        align: str | None = None, filler: str | None = None, long_answers: bool = False,
    ) -> Iterator[Own]:  # fmt: skip
        """Read a JSON-lines file `size` pairs at a time, for `fp.stream_features`; see `from_jsonl`.

        Raises:
            FeatpatchError: `size` is below 1, the file has no pairs, or it can't be read, see `from_jsonl`.

        Examples:
            >>> path = pairs.to_jsonl(folder / "pairs.jsonl")
            >>> [len(block) for block in fp.Pairs.blocks_from_jsonl(model, path, size=3)]
            [3, 1]
        """
        check_numbers(1, size=size)
        read = partial(from_line, tokenizer, long_answers=long_answers)
        for lines in json_lines_in_blocks(path, NEEDED, size):
            yield cls(pairs_of(tokenizer, lines, read, align, filler, long_answers), plain_tokenizer(tokenizer))

    @classmethod
    def from_csv(
        cls: type[Own], tokenizer: Tokenizer, path: str | Path, *,
        align: str | None = None, filler: str | None = None, long_answers: bool = False,
    ) -> Own:  # fmt: skip
        """Read pairs from a CSV file with the columns clean, corrupted, correct and wrong.

        The columns labels, corrupted_labels, spans and corrupted_spans hold JSON (`{"S2": 12}`), as does a cell with several
        answers (`["a", "b"]`); other columns become tags. `align`, `filler` and `long_answers` are those of `from_prompts`.

        Raises:
            FeatpatchError: the file is missing or lacks a column, or a line does not make a valid pair.

        Examples:
            >>> path = pairs.to_csv(folder / "pairs.csv", tokenizer=model)
            >>> len(fp.Pairs.from_csv(model, path))
            4
        """
        return cls(
            pairs_of(tokenizer, csv_rows(path, NEEDED), from_cells, align, filler, long_answers), plain_tokenizer(tokenizer)
        )

    @classmethod
    def from_pandas(
        cls: type[Own], tokenizer: Tokenizer, frame: Any, *,
        align: str | None = None, filler: str | None = None, long_answers: bool = False,
    ) -> Own:  # fmt: skip
        """Make pairs from a pandas DataFrame with the columns of `from_csv`; cells may also hold lists and dictionaries.

        Raises:
            FeatpatchError: it is not a DataFrame or lacks a column, or a row does not make a valid pair.

        Examples:
            >>> import pandas as pd
            >>> prompts = {"clean": "Mary met John . John gave it to", "corrupted": "Mary met John . Mary gave it to"}
            >>> frame = pd.DataFrame([{**prompts, "correct": " Mary", "wrong": " John", "template": "met"}])
            >>> fp.Pairs.from_pandas(model, frame)[0].tags
            {'template': 'met'}
        """
        return cls(
            pairs_of(tokenizer, frame_rows(frame, NEEDED), from_cells, align, filler, long_answers), plain_tokenizer(tokenizer)
        )

    @classmethod
    def from_feature_circuits(cls: type[Own], tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> Own:
        """Read pairs from a file of the project feature-circuits, see `featpatch.pairs.importers.feature_circuits`.

        With `skip`, pairs that do not fit the tokenizer are left out, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Examples:
            >>> import json
            >>> prompts = {"clean_prefix": "Mary met John . John gave it to", "patch_prefix": "Mary met John . Mary gave it to"}
            >>> answers = {"clean_answer": " Mary", "patch_answer": " John"}
            >>> _ = (folder / "ioi.json").write_text(json.dumps({**prompts, **answers}))
            >>> len(fp.Pairs.from_feature_circuits(model, folder / "ioi.json"))
            1
        """
        return cls(feature_circuits(tokenizer, path, skip=skip), plain_tokenizer(tokenizer))

    @classmethod
    def from_eap_ig(
        cls: type[Own], tokenizer: Tokenizer, path: str | Path, *, corrupted: str = "corrupted", skip: bool = False
    ) -> Own:
        """Read pairs from a CSV file of the project EAP-IG, see `featpatch.pairs.importers.eap_ig`.

        `corrupted` is the column of the corrupted prompts; some files have a `"corrupted_hard"` too. With `skip`, pairs that do
        not fit the tokenizer are left out, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Examples:
            >>> import pandas as pd
            >>> row = {"clean": "John gave it to", "corrupted": "Mary gave it to", "correct_idx": 126, "incorrect_idx": 103}
            >>> pd.DataFrame([row]).to_csv(folder / "ioi.csv", index=False)
            >>> fp.Pairs.from_eap_ig(model, folder / "ioi.csv")[0].correct
            (126,)
        """
        return cls(eap_ig(tokenizer, path, corrupted=corrupted, skip=skip), plain_tokenizer(tokenizer))

    @classmethod
    def from_auto_circuit(cls: type[Own], tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> Own:
        """Read pairs from a JSON file of the project auto-circuit, see `featpatch.pairs.importers.auto_circuit`.

        With `skip`, pairs that do not fit the tokenizer are left out, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Examples:
            >>> import json
            >>> row = {"clean": "John gave to", "corrupt": "Mary gave to", "answers": [" Mary"], "wrong_answers": [" John"]}
            >>> _ = (folder / "ioi.json").write_text(json.dumps({"prompts": [row]}))
            >>> len(fp.Pairs.from_auto_circuit(model, folder / "ioi.json"))
            1
        """
        return cls(auto_circuit(tokenizer, path, skip=skip), plain_tokenizer(tokenizer))

    def to_jsonl(self, path: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
        """Write one line of JSON per pair, from which `from_jsonl` reads exactly these pairs again.

        Args:
            path: the file; an existing one is replaced once the new one is complete.
            tokenizer: the model or its tokenizer. With it, a pair is written as texts if these give exactly the same pair
                when read again. Without it, and for other pairs, such as those with long answers, token ids are written.

        Raises:
            FeatpatchError: the path has another ending, the file can't be written, a label or tag is not valid Unicode, or the
                tokenizer can't decode.

        Examples:
            >>> path = pairs.to_jsonl(folder / "pairs.jsonl", tokenizer=model)
            >>> len(path.read_text().splitlines())
            4
        """
        path = path_to_write(path, ".jsonl", ".ndjson")
        rows = [json.dumps(row, ensure_ascii=False) for row in each(partial(written, tokenizer=tokenizer), self.pairs)]
        with writing(path) as file:
            file.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
        return path

    def to_csv(self, path: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
        """Write a CSV table for a spreadsheet, with prompts, answers, labels and a column for every tag; see `from_csv`.

        Texts that a spreadsheet would take for formulas get an apostrophe in front, and special tokens at the start are left
        out. To read exactly the same pairs again, use `to_jsonl`.

        Args:
            path: the CSV file.
            tokenizer: the model or its tokenizer, to write texts; without it, token ids are written.

        Raises:
            FeatpatchError: the path has another ending, the file can't be written, or the tokenizer can't decode.

        Examples:
            >>> import pandas as pd
            >>> path = pairs.to_csv(folder / "pairs.csv", tokenizer=model)
            >>> pd.read_csv(path).columns[:4].tolist()
            ['clean', 'corrupted', 'correct', 'wrong']
        """
        path = path_to_write(path, ".csv")
        write_csv(path, pd.DataFrame([for_cells(pair, tokenizer) for pair in self.pairs]))
        return path
