"""A collection of pairs, made from prompts, token ids, files or tables."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import torch
from jaxtyping import Int

from featpatch.errors import FeatpatchError, check_kinds, check_numbers, each
from featpatch.files import sha256, write_csv, writing
from featpatch.pairs.build import Answers, Prompt, filler_id, make
from featpatch.pairs.checklist import Checklist, Status, check, kept
from featpatch.pairs.fields import NEEDED, checked, for_cells, from_cells, of_ids, written
from featpatch.pairs.files import Rows, csv_rows, fitting, have_columns, json_lines, json_lines_in_blocks
from featpatch.pairs.importers import auto_circuit, eap_ig, feature_circuits
from featpatch.pairs.pair import Label, Pair
from featpatch.pairs.tokens import PairsWarning, Tokenizer, check_starts, plain_integers, special_positions, unmasked, unpadded
from featpatch.untrusted import visible

Table = Sequence[int] | Sequence[Sequence[int]]
"""Token ids as plain lists."""


@dataclass(frozen=True, repr=False)
class Pairs(Sequence[Pair]):
    """A sequence of pairs; different pairs may have different lengths, the two prompts of a pair may not.

    Example:
        >>> len(pairs), sorted(pairs[0].labels)
        (8, ['IO', 'S1', 'S2', 'end'])
        >>> short = fp.Pairs(tuple(pair for pair in pairs if len(pair) <= 24))
        >>> len(short)
        3
    """

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, tuple) or not all(isinstance(pair, Pair) for pair in self.pairs):
            raise FeatpatchError(
                f"the pairs are of type {type(self.pairs).__name__}: expected a tuple of Pair, e.g. Pairs((pair,)); or use "
                "Pairs.from_tokens or Pairs.from_prompts"
            )
        if not self.pairs:
            raise FeatpatchError("there are no pairs: expected at least one clean and one corrupted prompt")

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Tokenizer,
        *,
        clean: Sequence[Prompt] | torch.Tensor,
        corrupted: Sequence[Prompt] | torch.Tensor,
        correct: Sequence[Answers] | torch.Tensor,
        wrong: Sequence[Answers] | torch.Tensor | None = None,
        labels: Sequence[Mapping[str, Label]] | None = None,
        corrupted_labels: Sequence[Mapping[str, Label]] | None = None,
        tags: Sequence[Mapping[str, str]] | None = None,
        align: str | None = None,
        filler: str | None = None,
        long_answers: bool = False,
    ) -> "Pairs":
        """Make pairs from prompts, each given as a text or as token ids.

        Args:
            tokenizer: the model, so that prompts get the ids that `model(text)` would use; or a Hugging Face tokenizer or a
                function from a text to ids, used as it is. Special tokens at the start of a prompt (BOS) belong to it and are
                left out of swaps.
            clean, corrupted: equally many prompts, each a text or token ids such as `model.to_tokens(text)`.
            correct, wrong: for each pair, an answer that is one token, or several such answers; with `long_answers`, answers
                may be longer. Answers are tokenized as they continue the prompt: write `" Mary"`, with the space, for a
                separate word; an integer is the id of a token. Without `wrong`, or where it is empty or None, only metrics
                of the correct answers, such as `"log_prob"`, can be used.
            labels: for each clean prompt, names of positions. A position is a token index, `{"S2": 12}`, a text that occurs
                once in the prompt, `{"S2": "Mary"}`, or its characters, `{"S2": (34, 38)}`; a text stands for its last token.
                A label may also name a span, which is patched as one position: all tokens of a text,
                `{"subject": {"span": "Eiffel Tower"}}`, or a `range` of indices.
            corrupted_labels: the same for each corrupted prompt; by default the positions of the clean prompt.
            tags: for each pair, a description of how it was made, e.g. `{"template": "3", "corruption": "swap_s2"}`.
            align: `"labels"` to accept prompts of unequal length: if the prompts differ in length between two labels, copies
                of the filler are added to the shorter one after the first of these labels; see `changed_span`. Positions
                given as labels are those in the prompts as given, before alignment.
            filler: a word that is one token, e.g. `" the"`.
            long_answers: whether every answer is a sequence of one or more tokens, for the metric `"sequence_log_prob"`.

        Raises:
            FeatpatchError: the lengths are unequal, an answer is not one token (with `long_answers`: has no tokens), a label is
                outside the prompt or at another position of the corrupted prompt, or the labels can't be aligned.

        Example:
            >>> pairs = fp.Pairs.from_prompts(
            ...     model,
            ...     clean=["When Mary and John went to the store, John gave a drink to"],
            ...     corrupted=["When Mary and John went to the store, Mary gave a drink to"],
            ...     correct=[" Mary"],
            ...     wrong=[" John"],
            ...     labels=[{"S2": 10}],
            ... )
            >>> pairs[0].first_difference
            10
        """
        columns: dict[str, Any] = {"clean": clean, "corrupted": corrupted, "correct": correct}
        check_kinds(Sized, clean=clean, wrong=[] if wrong is None else wrong)
        columns["wrong"] = wrong if wrong is not None and len(wrong) else [[]] * len(clean)
        for name, column in (("labels", labels), ("corrupted_labels", corrupted_labels), ("tags", tags)):
            columns[name] = column if column is not None else [{}] * len(clean)
        _equally_many(columns)
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        named = Rows([f"pair {index}" for index in range(len(rows))], rows)
        return cls._made(tokenizer, named, align, filler, long_answers)

    @classmethod
    def from_tokens(
        cls,
        clean: Int[torch.Tensor, "pairs pos"] | Table,
        corrupted: Int[torch.Tensor, "pairs pos_corrupted"] | Table,
        correct: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs answers"] | Table,
        wrong: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs wrong_answers"] | Table | None = None,
        labels: Sequence[Mapping[str, SupportsIndex | Sequence[SupportsIndex]]] | None = None,
        *,
        attention_mask: Int[torch.Tensor, "..."] | Table | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> "Pairs":
        """Make pairs from tensors of token ids, or from lists of equally long lists.

        Args:
            clean, corrupted: the token ids of the prompts, one row per pair.
            correct, wrong: the token ids of the answers; without `wrong`, or if it is empty, only metrics of the correct
                answers can be used.
            labels: for each pair, names of positions, or of spans as ranges or lists of positions, counted in the padded clean
                row.
            attention_mask: 1 for tokens and 0 for padding at either end, the same for both prompts of a pair. Padding is
                removed.
            tokenizer: a tokenizer whose special tokens (BOS) are left out of swaps; without one, no position counts as special.
                Without `attention_mask`, its padding tokens at either end are removed with a PairsWarning.

        Raises:
            FeatpatchError: a table does not hold integers, lengths are unequal, there are no pairs, a label is outside the
                prompt, or padding is between tokens or can't be told from BOS or EOS.

        Example:
            >>> pairs = fp.Pairs.from_tokens([[5, 6, 7]], [[5, 8, 7]], correct=[9], wrong=[10], labels=[{"subject": 1}])
            >>> pairs[0].first_difference
            1
        """
        given = {"clean": clean, "corrupted": corrupted, "correct": correct}
        given["wrong"] = wrong if wrong is not None else torch.zeros(len(clean), 0, dtype=torch.long)
        ids = {name: _integers(name, value) for name, value in given.items()}
        if not len(ids["wrong"]):
            ids["wrong"] = torch.zeros(len(clean), 0, dtype=torch.long)
        columns: dict[str, Sequence[Any]] = {name: table.tolist() for name, table in ids.items()}
        columns["labels"] = labels if labels is not None else [{}] * len(clean)
        columns["attention_mask"] = [None] * len(clean)
        if attention_mask is not None:
            columns["attention_mask"] = _mask(attention_mask, ids["clean"], ids["corrupted"]).tolist()
        _equally_many(columns)
        if attention_mask is None and tokenizer is not None:
            check_starts(tokenizer, [*columns["clean"], *columns["corrupted"]])
        pairs = cls(each(partial(_pair_of_row, tokenizer), *columns.values()))
        widths = ids["clean"].shape[1], ids["corrupted"].shape[1]
        cut = sum((len(pair.clean), len(pair.corrupted)) != widths for pair in pairs)
        if cut and attention_mask is None:
            warnings.warn(
                f"{cut} of {len(pairs)} pairs are padded: the padding is removed; pass attention_mask= to mark it explicitly",
                PairsWarning,
                stacklevel=2,
            )
        return pairs

    @classmethod
    def from_jsonl(
        cls,
        tokenizer: Tokenizer,
        path: str | Path,
        *,
        align: str | None = None,
        filler: str | None = None,
        long_answers: bool = False,
    ) -> "Pairs":
        """Read pairs from a file of JSON lines `{"clean", "corrupted", "correct", "wrong"}`.

        Optional fields are `"labels"` and `"corrupted_labels"` as in `from_prompts`, `"spans"` and `"corrupted_spans"`
        (`{"S2": [34, 38]}`, in characters), and `"tags"` (an object of texts). `align`, `filler` and `long_answers` are those
        of `from_prompts`.

        If both prompts are lists of token ids, the answers are ids too (`[52]`, or `[[5, 9]]` for a sequence) and labels are
        positions; `"special"` and `"answer_position"` are optional. Such a pair is used unchanged; see `to_jsonl`.

        Raises:
            FeatpatchError: the file is missing, or a line is not JSON, lacks a field or does not make a valid pair.

        Example:
            >>> again = fp.Pairs.from_jsonl(model, pairs.to_jsonl(folder / "pairs.jsonl"))
            >>> again == pairs
            True
        """
        return cls._of_lines(tokenizer, json_lines(path, NEEDED), align, filler, long_answers)

    @classmethod
    def blocks_from_jsonl(
        cls,
        tokenizer: Tokenizer,
        path: str | Path,
        *,
        size: int = 1000,
        align: str | None = None,
        filler: str | None = None,
        long_answers: bool = False,
    ) -> "Iterator[Pairs]":
        """Read a JSON-lines file `size` pairs at a time, for `fp.stream_features`; see `from_jsonl`.

        Raises:
            FeatpatchError: `size` is below 1, the file has no pairs, or it can't be read, see `from_jsonl`.

        Example:
            >>> path = pairs.to_jsonl(folder / "pairs.jsonl")
            >>> [len(block) for block in fp.Pairs.blocks_from_jsonl(model, path, size=3)]
            [3, 3, 2]
        """
        check_numbers(1, size=size)
        empty = True
        for lines in json_lines_in_blocks(path, NEEDED, size):
            empty = False
            yield cls._of_lines(tokenizer, lines, align, filler, long_answers)
        if empty:
            raise FeatpatchError(f"the pairs file {str(path)!r} is empty: expected one JSON object per line")

    @classmethod
    def _of_lines(cls, tokenizer: Tokenizer, lines: Rows, align: str | None, filler: str | None, long_answers: bool) -> "Pairs":
        def read(line: dict[str, Any]) -> dict[str, Any] | Pair:
            return of_ids(tokenizer, line, long_answers=long_answers) if isinstance(line["clean"], list) else checked(line)

        rows = Rows(lines.where, list(each(read, lines.values, where=lines.where)))
        return cls._made(tokenizer, rows, align, filler, long_answers)

    @classmethod
    def from_csv(
        cls,
        tokenizer: Tokenizer,
        path: str | Path,
        *,
        align: str | None = None,
        filler: str | None = None,
        long_answers: bool = False,
    ) -> "Pairs":
        """Read pairs from a CSV file with the columns clean, corrupted, correct and wrong.

        The columns labels, corrupted_labels, spans and corrupted_spans hold JSON (`{"S2": 12}`), as does a cell with several
        answers (`["a", "b"]`); other columns become tags. `align`, `filler` and `long_answers` are those of `from_prompts`.

        Raises:
            FeatpatchError: the file is missing or lacks a column, or a line does not make a valid pair.

        Example:
            >>> path = pairs.to_csv(folder / "pairs.csv", tokenizer=model)
            >>> len(fp.Pairs.from_csv(model, path))
            8
        """
        columns, rows = csv_rows(path)
        have_columns(repr(str(path)), columns, NEEDED)
        return cls._of_cells(tokenizer, rows, align, filler, long_answers)

    @classmethod
    def from_pandas(
        cls,
        tokenizer: Tokenizer,
        frame: Any,
        *,
        align: str | None = None,
        filler: str | None = None,
        long_answers: bool = False,
    ) -> "Pairs":
        """Make pairs from a pandas DataFrame with the columns of `from_csv`; cells may also hold lists and dictionaries.

        Raises:
            FeatpatchError: it is not a DataFrame or lacks a column, or a row does not make a valid pair.

        Example:
            >>> import pandas as pd
            >>> prompts = {"clean": "Mary met John . John gave it to", "corrupted": "Mary met John . Mary gave it to"}
            >>> frame = pd.DataFrame([{**prompts, "correct": " Mary", "wrong": " John", "template": "met"}])
            >>> fp.Pairs.from_pandas(model, frame)[0].tags
            {'template': 'met'}
        """
        import pandas

        if not isinstance(frame, pandas.DataFrame):
            raise FeatpatchError(f"frame is a {type(frame).__name__}: expected a pandas DataFrame; for a file use from_csv")
        columns = [str(column) for column in frame.columns]
        have_columns("the table", columns, NEEDED)
        values = [
            {
                column: None if pandas.api.types.is_scalar(cell) and pandas.isna(cell) else cell
                for column, cell in zip(columns, row, strict=True)
            }
            for row in frame.itertuples(index=False, name=None)
        ]
        rows = Rows([f"row {index!r}" for index in frame.index.tolist()], values)
        return cls._of_cells(tokenizer, rows, align, filler, long_answers)

    @classmethod
    def from_feature_circuits(cls, tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> "Pairs":
        """Read pairs from a file of the project feature-circuits, see `featpatch.pairs.importers.feature_circuits`.

        Args:
            tokenizer: the model or its tokenizer.
            path: the JSON-lines file.
            skip: whether to leave out pairs that do not fit the tokenizer, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Example:
            >>> import json
            >>> prompts = {"clean_prefix": "Mary met John . John gave it to", "patch_prefix": "Mary met John . Mary gave it to"}
            >>> answers = {"clean_answer": " Mary", "patch_answer": " John"}
            >>> _ = (folder / "ioi.json").write_text(json.dumps({**prompts, **answers}))
            >>> len(fp.Pairs.from_feature_circuits(model, folder / "ioi.json"))
            1
        """
        return cls(feature_circuits(tokenizer, path, skip=skip))

    @classmethod
    def from_eap_ig(
        cls, tokenizer: Tokenizer, path: str | Path, *, corrupted: str = "corrupted", skip: bool = False
    ) -> "Pairs":
        """Read pairs from a CSV file of the project EAP-IG, see `featpatch.pairs.importers.eap_ig`.

        Args:
            tokenizer: the model or its tokenizer.
            path: the CSV file.
            corrupted: the column of the corrupted prompts; some files have a `"corrupted_hard"` too.
            skip: whether to leave out pairs that do not fit the tokenizer, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Example:
            >>> import pandas as pd
            >>> row = {"clean": "John gave it to", "corrupted": "Mary gave it to", "correct_idx": 126, "incorrect_idx": 103}
            >>> pd.DataFrame([row]).to_csv(folder / "ioi.csv", index=False)
            >>> fp.Pairs.from_eap_ig(model, folder / "ioi.csv")[0].correct
            (126,)
        """
        return cls(eap_ig(tokenizer, path, corrupted=corrupted, skip=skip))

    @classmethod
    def from_auto_circuit(cls, tokenizer: Tokenizer, path: str | Path, *, skip: bool = False) -> "Pairs":
        """Read pairs from a JSON file of the project auto-circuit, see `featpatch.pairs.importers.auto_circuit`.

        Args:
            tokenizer: the model or its tokenizer.
            path: the JSON file.
            skip: whether to leave out pairs that do not fit the tokenizer, with a PairsWarning that counts them.

        Raises:
            FeatpatchError: the file is not in that format, or a pair does not fit the tokenizer (with `skip`: none does).

        Example:
            >>> import json
            >>> prompts = {"clean": "John gave a hat to", "corrupt": "Mary gave a hat to"}
            >>> answers = {"answers": [" Mary"], "wrong_answers": [" John"]}
            >>> _ = (folder / "ioi.json").write_text(json.dumps({"prompts": [{**prompts, **answers}]}))
            >>> len(fp.Pairs.from_auto_circuit(model, folder / "ioi.json"))
            1
        """
        return cls(auto_circuit(tokenizer, path, skip=skip))

    @classmethod
    def _of_cells(cls, tokenizer: Tokenizer, rows: Rows, align: str | None, filler: str | None, long_answers: bool) -> "Pairs":
        fields = Rows(rows.where, list(each(from_cells, rows.values, where=rows.where)))
        return cls._made(tokenizer, fields, align, filler, long_answers)

    @classmethod
    def _made(cls, tokenizer: Tokenizer, rows: Rows, align: str | None, filler: str | None, long_answers: bool) -> "Pairs":
        remarks: list[str] = []
        made = partial(make, tokenizer, filler=filler_id(tokenizer, align, filler), long_answers=long_answers, remarks=remarks)
        return cls(
            fitting(lambda row: row if isinstance(row, Pair) else made(**row), rows.values, where=rows.where, remarks=remarks)
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        lengths, labels = sorted(self.by_length()), dict.fromkeys(label for pair in self for label in pair.labels)
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return visible(f"{len(self)} pairs of {tokens} tokens, labels {', '.join(labels) or '(none)'}")

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index: int | slice) -> "Pair | Pairs":
        return Pairs(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def check(
        self,
        model: Callable[[torch.Tensor], Any],
        *,
        tokenizer: Any = None,
        metric: Literal["logit_diff", "prob_diff"] = "logit_diff",
    ) -> Checklist:
        """Check each pair for common problems with this model, see `featpatch.pairs.checklist`.

        Args:
            model: a function from tokens `[batch, pos]` to logits, such as a TransformerBridge or a HookedTransformer.
            tokenizer: a tokenizer to show words and compare their kinds; by default `model.tokenizer`, if there is one.
            metric: the metric that compares one-token answers; it is positive if the right ones are preferred. Answers that
                are sequences are compared by their log probabilities.

        Raises:
            FeatpatchError: the model gives no logits or logits that are not finite, or the metric is not one of these two.

        Example:
            >>> checklist = pairs.check(model)
            >>> checklist.ok, len(checklist.verdicts())
            (True, 8)
        """
        return check(self, model, tokenizer=tokenizer, metric=metric)

    def drop(self, found: Checklist, verdicts: Status | Sequence[Status] = "fail") -> "Pairs":
        """Return the pairs whose worst status in a checklist is not among `verdicts`.

        Args:
            found: the checklist of these pairs, from `check`.
            verdicts: one status or several: `"pass"`, `"warn"`, `"fail"`.

        Raises:
            FeatpatchError: a status is unknown, the checklist is of other pairs, or no pair is left.

        Example:
            >>> good = pairs.drop(pairs.check(model), ["warn", "fail"])
            >>> good.check(model).ok
            True
        """
        check_kinds(Checklist, found=found)
        if len(found.clean) != len(self):
            raise FeatpatchError(
                f"the checklist is of {len(found.clean)} pairs and these are {len(self)}: expected a checklist of these "
                "pairs; call check on them"
            )
        left = tuple(self.pairs[index] for index in kept(found.verdicts(), verdicts))
        if not left:
            raise FeatpatchError(
                f"all {len(self)} pairs have the verdict {verdicts!r}: expected some pairs to keep; look at the findings"
            )
        return Pairs(left)

    def to_jsonl(self, path: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
        """Write one line of JSON per pair, from which `from_jsonl` reads exactly these pairs again.

        Args:
            path: the file; an existing one is replaced once the new one is complete.
            tokenizer: the model or its tokenizer. With it, a pair is written as texts if these give exactly the same pair
                when read again. Without it, and for other pairs, such as those with long answers, token ids are written.

        Raises:
            FeatpatchError: the file can't be written, a label or tag is not valid Unicode, or the tokenizer can't decode.

        Example:
            >>> path = pairs.to_jsonl(folder / "pairs.jsonl", tokenizer=model)
            >>> len(path.read_text().splitlines())
            8
        """
        rows = [json.dumps(row, ensure_ascii=False) for row in each(partial(written, tokenizer=tokenizer), self.pairs)]
        with writing(path) as file:
            file.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
        return Path(path)

    def to_csv(self, path: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
        """Write a CSV table for a spreadsheet, with prompts, answers, labels and a column for every tag; see `from_csv`.

        Texts that a spreadsheet would take for formulas get an apostrophe in front, and special tokens at the start are left
        out. To read exactly the same pairs again, use `to_jsonl`.

        Args:
            path: the CSV file.
            tokenizer: the model or its tokenizer, to write texts; without it, token ids are written.

        Raises:
            FeatpatchError: the file can't be written, or the tokenizer can't decode.

        Example:
            >>> import pandas as pd
            >>> path = pairs.to_csv(folder / "pairs.csv", tokenizer=model)
            >>> pd.read_csv(path).columns[:4].tolist()
            ['clean', 'corrupted', 'correct', 'wrong']
        """
        import pandas

        write_csv(path, pandas.DataFrame([for_cells(pair, tokenizer) for pair in self]))
        return Path(path)

    def by_length(self) -> dict[int, list[int]]:
        """Return the indices of the pairs, grouped by the number of tokens.

        Example:
            >>> sum(len(indices) for indices in pairs.by_length().values())
            8
        """
        groups: dict[int, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            groups.setdefault(len(pair), []).append(index)
        return groups

    def chunks(self, tokens: int) -> Iterator[list[int]]:
        """Yield the indices of equally long pairs to run in one batch, of at most `tokens` tokens but at least one pair."""
        for length, group in self.by_length().items():
            size = max(1, tokens // length)
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def digest(self) -> str:
        """Return the SHA-256 hash of everything that determines a result: tokens, answers, labels, positions, tags.

        Example:
            >>> pairs.digest() == demo.pairs("ioi", n=8).digest()
            True
        """
        content = [{**asdict(pair), "special": sorted(pair.special)} for pair in self.pairs]
        return sha256(json.dumps(content, sort_keys=True).encode())


def check_pairs(pairs: Any) -> Pairs:
    """Check that the argument is a `Pairs` object and return it.

    Raises:
        FeatpatchError: it is not.
    """
    if not isinstance(pairs, Pairs):
        raise FeatpatchError(f"pairs is a {type(pairs).__name__}: expected Pairs, e.g. from Pairs.from_prompts or Pairs(tuple)")
    return pairs


def _integers(name: str, value: Any) -> torch.Tensor:
    """Convert a tensor or nested lists to a table of integers; a single axis becomes one column.

    Raises:
        FeatpatchError: it does not hold integers, or has the wrong number of axes.
    """
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeatpatchError(f"{name} is {str(value)[:60]} ({error}): expected a tensor of token ids") from error
    whole = not table.is_floating_point() and not table.is_complex() and (table.dtype != torch.bool or name == "attention_mask")
    whole = whole or not table.numel()  # torch makes floats of empty lists
    axes = {"correct": (1, 2), "wrong": (1, 2), "attention_mask": range(1, 3)}.get(name, (2,))
    if not whole or table.ndim not in axes:
        shape = "[pairs] or [pairs, answers]" if name in ("correct", "wrong") else "[pairs, pos]"
        raise FeatpatchError(
            f"{name} is a tensor {list(table.shape)} of {table.dtype}: expected integers {shape}, such as token ids"
        )
    return table.long() if table.ndim == 2 else table.long()[:, None]


def _mask(value: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Return the attention mask as a tensor after checking that it has the shape of both tables of prompts.

    Raises:
        FeatpatchError: the shapes differ.
    """
    mask = _integers("attention_mask", value)
    if not mask.shape == clean.shape == corrupted.shape:
        raise FeatpatchError(
            f"clean is {tuple(clean.shape)}, corrupted {tuple(corrupted.shape)} and attention_mask {tuple(mask.shape)}: "
            "expected equal shapes"
        )
    return mask


def _pair_of_row(
    tokenizer: Tokenizer | None,
    clean: list[int],
    corrupted: list[int],
    correct: list[int],
    wrong: list[int],
    labels: Mapping[str, Any],
    mask: list[int] | None,
) -> Pair:
    """Make a pair from one row of token ids, without its padding."""
    kept, kept_corrupted = (0, len(clean)), (0, len(corrupted))
    if mask is not None:
        kept = kept_corrupted = unmasked(mask)
    elif tokenizer is not None:
        kept, kept_corrupted = unpadded(tokenizer, clean), unpadded(tokenizer, corrupted)
    ids, other = tuple(clean[slice(*kept)]), tuple(corrupted[slice(*kept_corrupted)])
    return Pair(
        clean=ids,
        corrupted=other,
        correct=tuple(correct),
        wrong=tuple(wrong),
        labels={label: _moved(position, kept[0]) for label, position in labels.items()},
        special=special_positions(tokenizer, ids, other) if tokenizer is not None else frozenset(),
    )


def _moved(position: Any, start: int) -> Any:
    """Return the position of a label after the first `start` tokens of its row are removed."""
    plain = plain_integers(position)
    if plain is None:
        return position
    return plain - start if isinstance(plain, int) else tuple(p - start for p in plain)


def _equally_many(columns: Mapping[str, Sequence[Any]]) -> None:
    check_kinds(Sized, **columns)
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise FeatpatchError(f"there are {counts}: expected equal numbers, one of each per pair")
