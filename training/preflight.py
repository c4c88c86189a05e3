"""Bad data, and settings that cannot work, found before the first step.

By default the first bad row is refused: its number, its file, what is wrong and the remedy. With a quarantine file all
bad rows are written aside (JSON lines: file, row, reason, problem, content), left out, and counted by reason.

`check_examples` looks at tokenized rows and `check_columns` at rows of text, each in batches of Arrow columns; a stream
is looked at as it is read. Files that a reader of `datasets` would break off at are the matter of
`training.file_rows`. All of it can be used in a script of one's own:

    rows = check_examples(rows, vocab_size=model.config.vocab_size, quarantine="bad.jsonl")
    check_precision(training_args)
    check_dtypes(model)

`python -m training.preflight` measures the seconds of a million rows.
"""

import argparse
import base64
import json
import math
import os
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

# Column that remembers the place of a row in the data as given, for a message about it.
ROW = "row_of_the_data"
IGNORED = -100
HINT = "Or leave such rows out with --quarantine FILE."
# Columns of a tokenized row that are as long as its ids, and those that name one of its tokens.
TOKEN_COLUMNS = ("attention_mask", "token_type_ids", "special_tokens_mask", "labels")
POSITION_COLUMNS = ("start_positions", "end_positions")
# Rows that are looked at together, and from how many on a progress bar is worth its line.
BATCH_ROWS, ROWS_WITH_BAR = 10_000, 100_000
# What stands for a missing id, outside any vocabulary.
MISSING = np.iinfo(np.int64).min
# Bytes of a bad row that are kept: a document may be a whole book.
LONGEST_CONTENT = 1 << 20


@dataclass
class Finding:
    """A bad row: its index in what is looked at, the kind of fault, what is wrong with it and the remedy."""

    index: int
    reason: str
    problem: str
    remedy: str


@dataclass
class Quarantine:
    """What becomes of bad rows: without a file the first is refused, with one they are set aside and counted.

    Nothing is written before `finish`, and that to a temporary name first. A stream goes on being checked after it;
    its rows are added to the file one by one.

    Args:
        file: where bad rows go.
        is_main: whether this process writes and prints. All processes leave out the same rows.

    Raises:
        ValueError: when the file cannot be one.
    """

    file: str | None = None
    is_main: bool = field(default_factory=lambda: int(os.environ.get("RANK", "0")) == 0)
    records: list[dict] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    origins: dict[str, "Origin"] = field(default_factory=dict)
    _is_finished: bool = False
    _seen: set = field(default_factory=set)

    def __post_init__(self):
        if self.file is not None and Path(self.file).is_dir():
            raise ValueError(f"--quarantine {self.file} is a folder. Name a file, as `{self.file}/bad_rows.jsonl`.")

    def check_outside(self, paths: Iterable[str]) -> None:
        """Refuse a file that the next run would read as data."""
        own = Path(self.file).resolve() if self.file is not None else None
        for path in map(Path, paths):
            if own is not None and path.resolve() in (own, *own.parents):
                raise ValueError(f"--quarantine {self.file} lies in the data ({path}). Name a file outside of it.")

    def origin(self, split: str, words: str | None = None) -> "Origin":
        """The origin of a split's rows, a new one where it has none yet."""
        return self.origins.setdefault(split, Origin(words or f"the {split} data", self))

    def reject(self, place: str, file: str, row: int, reason: str, problem: str, remedy: str, content: object) -> None:
        """Refuse a row, or set it aside.

        Args:
            place: the row in words.
            reason: the kind of fault, by which they are counted.
            content: the row as it stands in the data, bytes or what JSON can hold.
        """
        if self.file is None:
            raise ValueError(f"{place} {problem}. {remedy} {HINT}")
        if (file, row) in self._seen:
            return  # a stream that is read again
        self._seen.add((file, row))
        self.counts[reason] += 1
        record = {"file": file, "row": row, "reason": reason, "problem": problem, "content": storable(content)}
        if not self._is_finished:
            self.records.append(record)
        elif self.is_main:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            # Each doubling, lest a stream of bad rows fill the screen.
            if self.counts.total().bit_count() == 1:
                print(f"quarantine: {self.summary()}; and counting")

    def summary(self, of_how_many: str = "") -> str:
        """How many rows were set aside, and why."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total()}{of_how_many} rows set aside in {self.file}" + (f": {reasons}" if reasons else "")

    def finish(self) -> None:
        """Write what was set aside, and say how many of how many rows that is, by reason."""
        if self.file is None or self._is_finished:
            return
        self._is_finished = True
        if not self.is_main:
            return
        path = Path(self.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        # A file may be of two splits, as a split may have two names.
        files = {file: count for origin in self.origins.values() for file, count in origin.files}
        others = {id(origin): origin.count for origin in self.origins.values() if not sum(n for _, n in origin.files)}
        total = sum(files.values()) + sum(others.values())
        print(f"quarantine: {self.summary(f' of {total}')}")
        self.records = []


@dataclass
class Origin:
    """Where the rows of a split stood before any was left out.

    Args:
        words: the rows in words.
        quarantine: what becomes of bad ones.

    Attributes:
        files: each file, or data set of the Hub, and the number of its rows.
        left_out: rows that were not even read, in order, counted over all files.
        count: rows, where they are of no file.
    """

    words: str = "the data"
    quarantine: Quarantine = field(default_factory=Quarantine)
    files: list[tuple[str, int]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    count: int = 0

    def numbers(self, count: int) -> np.ndarray:
        """The places of the first `count` rows that were read: (count,)."""
        return np.delete(np.arange(count + len(self.left_out)), self.left_out)

    def number(self, index: int) -> int:
        """The place of the row that was read as number `index`."""
        return index + bisect_right([row - place for place, row in enumerate(self.left_out)], index)

    def place(self, row: int) -> tuple[str | None, int]:
        """The file of a row, and its number there."""
        ends = list(accumulate(count for _, count in self.files))
        index = bisect_right(ends, row)
        if index == len(ends):
            return (self.files[0][0], row) if len(self.files) == 1 else (None, row)
        return self.files[index][0], row - (ends[index - 1] if index else 0)

    def say(self, row: int) -> str:
        """A row in words."""
        file, own = self.place(row)
        if file in (None, self.words):
            return f"row {row} of {self.words}"
        return f"row {row} of {self.words} ({file}{f', row {own}' if own != row else ''})"

    def reject(self, row: int, reason: str, problem: str, remedy: str, content: object) -> None:
        """Refuse a row of the data as given, or set it aside."""
        file, own = self.place(row)
        self.quarantine.reject(self.say(row), file or self.words, own, reason, problem, remedy, content)


def origin_of(where: "str | Origin") -> Origin:
    """The origin, or one that refuses, of rows in words."""
    return where if isinstance(where, Origin) else Origin(where)


def storable(content: object) -> object:
    """What JSON can hold of a row: text as it is, bytes that are none in base64, and no more than fits."""
    if isinstance(content, bytes):
        kept = content[:LONGEST_CONTENT]
        try:
            content = kept.decode("utf-8")
        except UnicodeDecodeError:
            content = {"base64": base64.b64encode(kept).decode("ascii")}
    if isinstance(content, dict):
        return {name: storable(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [storable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, str):
        # Half a surrogate pair has no place in UTF-8.
        return content[:LONGEST_CONTENT].encode("utf-8", "backslashreplace").decode("utf-8")
    return content if content is None or isinstance(content, bool | int | float) else str(content)


def row_of_the_data(rows: Dataset, index: int) -> int:
    """Place of `rows[index]` in the data as given."""
    return rows[index][ROW] if ROW in rows.column_names else index


def with_places(rows: Dataset, origin: Origin | None = None) -> Dataset:
    """The rows with their places in the data as given in column `ROW`."""
    if ROW in rows.column_names:
        return rows
    return rows.add_column(ROW, range(len(rows)) if origin is None else origin.numbers(len(rows)))


def leave_out(rows: Dataset, indices: Iterable[int], origin: Origin) -> Dataset:
    """The other rows, which know their places.

    Raises:
        ValueError: when none is left.
    """
    indices = list(indices)
    if not indices:
        return rows
    if len(indices) == len(rows):
        raise ValueError(f"no row of {origin.words} is left: all {len(rows)} are bad. Look into them one by one.")
    kept = np.delete(np.arange(len(rows)), indices)
    return with_places(rows).select(kept)


def set_aside(rows: Dataset, findings: Iterable[Finding], where: "str | Origin") -> Dataset:
    """The rows without those that were found bad, the first of which is refused where there is no quarantine."""
    origin, bad, stored = origin_of(where), [], rows.with_format("arrow")
    if not origin.files:
        origin.count = max(origin.count, len(rows))
    for finding in findings:
        # As it is stored: an image that is broken cannot be decoded.
        (row,) = stored[finding.index : finding.index + 1].to_pylist()
        place = row.pop(ROW, finding.index)
        origin.reject(place, finding.reason, finding.problem, finding.remedy, row)
        bad.append(finding.index)
    return leave_out(rows, bad, origin)


def look_through(
    rows: Dataset, columns: list[str], find: Callable[[pa.Table], Iterable[Finding]], desc: str, is_quiet: bool
) -> Iterator[Finding]:
    """What `find` finds in all batches of the rows, with a progress bar."""
    start = 0
    with tqdm(total=len(rows), desc=desc, unit=" rows", disable=is_quiet or len(rows) < ROWS_WITH_BAR) as bar:
        for table in rows.select_columns(columns).with_format("arrow").iter(BATCH_ROWS):
            for finding in find(table):
                yield replace(finding, index=start + finding.index)
            start += len(table)
            bar.update(len(table))


def sift(
    rows: Dataset | IterableDataset,
    columns: Iterable[str],
    find: Callable[[pa.Table], Iterable[Finding]],
    where: "str | Origin" = "the data",
    desc: str = "checking rows",
) -> Dataset | IterableDataset:
    """The rows without those that `find` finds bad in a batch; a stream's are looked at as they are read.

    Args:
        columns: those that `find` reads.
        desc: of the progress bar.
    """
    columns, origin = list(dict.fromkeys(columns)), origin_of(where)
    if not isinstance(rows, IterableDataset):
        return set_aside(rows, look_through(rows, columns, find, desc, not origin.quarantine.is_main), origin)

    # With features, for the columns of a stream of unknown ones are not known either.
    keep = KeepGood(columns, find, origin)
    return rows.map(keep, batched=True, with_indices=True, features=rows.features)


@dataclass
class KeepGood:
    """Leaves the bad rows out of a batch of a stream; arguments as for `sift`."""

    columns: list[str]
    find: Callable[[pa.Table], Iterable[Finding]]
    origin: Origin

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        try:
            table = pa.table({name: batch[name] for name in self.columns})
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            batch, indices = self.without(find_drift(batch, self.columns), batch, indices)
            table = pa.table({name: batch[name] for name in self.columns})
        return self.without(self.find(table), batch, indices)[0]

    def without(
        self, findings: Iterable[Finding], batch: dict[str, list], indices: list[int]
    ) -> tuple[dict[str, list], list[int]]:
        bad = set()
        for finding in findings:
            row = {name: values[finding.index] for name, values in batch.items()}
            place = row.pop(ROW, self.origin.number(indices[finding.index]))
            self.origin.reject(place, finding.reason, finding.problem, finding.remedy, row)
            bad.add(finding.index)
        kept = [index for index in range(len(indices)) if index not in bad]
        return {name: [values[index] for index in kept] for name, values in batch.items()}, [indices[i] for i in kept]


def find_drift(batch: dict[str, list], columns: Iterable[str]) -> Iterator[Finding]:
    """Rows of a stream with a value that does not go into one column of Arrow with the first one."""
    for index in range(1, len(batch[next(iter(batch))])):
        for name in columns:
            first = next(value for value in batch[name] if value is not None)
            try:
                pa.array([first, batch[name][index]])
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                problem = f"has another kind of value in column `{name}` than the rows before it"
                yield Finding(index, "type drift", problem, "Mend it.")
                break


def find_empty(table: pa.Table, columns: Iterable[str], what: str = "nothing") -> Iterator[Finding]:
    """Rows with nothing in one of the columns: null, not a number, blank text or an empty list.

    Args:
        what: they have, in words.
    """
    found = {}
    for column in columns:
        values = table.column(column)
        empty = pc.is_null(values, nan_is_null=True)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
        elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            empty = pc.or_(empty, pc.fill_null(pc.equal(pc.list_value_length(values), 0), True))
        for index in np.flatnonzero(empty.to_numpy()).tolist():
            found.setdefault(
                index, Finding(index, "empty", f"has {what} in column `{column}`", "Fill it or remove the row.")
            )
    return iter(sorted(found.values(), key=lambda finding: finding.index))


def check_columns(
    rows: Dataset | IterableDataset, columns: dict[str, str], where: "str | Origin" = "the data"
) -> Dataset | IterableDataset:
    """The rows, none with nothing in a column to train on.

    Args:
        columns: name of the column by the flag that names it.
        where: the rows in words, or where they stood.

    Raises:
        ValueError: for a column that is missing and, without a quarantine, for the first row with nothing in one.
    """
    origin, names = origin_of(where), [name for name in rows.column_names if name != ROW]
    for flag, column in columns.items():
        if column not in names:
            raise ValueError(
                f"{origin.words} has no column `{column}`; its columns are {', '.join(names)}. "
                f"Name the right one with --{flag.lstrip('-')}."
            )
    own = list(dict.fromkeys(columns.values()))
    return sift(rows, [*own, *(ROW,) * (ROW in rows.column_names)], lambda table: find_empty(table, own), origin)


@dataclass
class Lists:
    """A column of lists of whole numbers: the length of each, -1 where there is none, and all values in a row."""

    lengths: np.ndarray
    values: np.ndarray

    @classmethod
    def read(cls, column: pa.ChunkedArray) -> "Lists":
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy().astype(np.int64)
        values = pc.list_flatten(column)
        if pa.types.is_floating(values.type):
            # As Arrow reads whole numbers of a stream where one is not.
            values = pc.fill_null(values, math.nan).to_numpy()
            is_whole = np.isfinite(values) & (values == np.round(values))
            return cls(lengths, np.where(is_whole, values, MISSING).astype(np.int64))
        return cls(lengths, pc.fill_null(values.cast(pa.int64()), MISSING).to_numpy())

    def count(self, flags: np.ndarray) -> np.ndarray:
        """How many of each row's values are flagged."""
        ends = np.cumsum(np.maximum(self.lengths, 0))
        total = np.concatenate([[0], np.cumsum(flags)])
        return total[ends] - total[ends - np.maximum(self.lengths, 0)]

    def first(self, flags: np.ndarray, row: int) -> int:
        """The first flagged value of a row."""
        start = int(np.maximum(self.lengths[:row], 0).sum())
        part = slice(start, start + int(self.lengths[row]))
        return int(self.values[part][flags[part]][0])


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


@dataclass(frozen=True)
class Limits:
    """What a model takes of a tokenized row: ids below `vocab_size`, labels below `num_labels` or, of language models,
    below `vocab_size` too, and no more than `max_length` tokens."""

    vocab_size: int
    num_labels: int | None = None
    max_length: int | None = None


Fault = tuple[str, np.ndarray, Callable[[int], str], str]


def faults_of_ids(ids: Lists, limits: Limits) -> Iterator[Fault]:
    """Kind, rows (N,) that have it, what is wrong with a row, and the remedy."""
    yield (
        "empty",
        ids.lengths <= 0,
        lambda row: "has nothing in column `input_ids`",
        "Fill it or remove the row.",
    )
    outside = (ids.values < 0) | (ids.values >= limits.vocab_size)
    yield (
        "id outside the vocabulary",
        ids.count(outside) > 0,
        lambda row: (
            f"holds {name_of(ids.first(outside, row), 'token id')}, outside the model's vocabulary of "
            f"{limits.vocab_size} entries"
        ),
        "Use the tokenizer that made the ids, or resize the model's embeddings to it.",
    )
    if limits.max_length is not None:
        yield (
            "too long",
            ids.lengths > limits.max_length,
            lambda row: f"has {ids.lengths[row]} tokens, more than the {limits.max_length} that the model reads",
            "Cut it, or split it into several rows.",
        )


def name_of(value: int, words: str) -> str:
    """A number in words, or that there is none."""
    return f"what is no {words}" if value == MISSING else f"{words} {value}"


def faults_of_lists(name: str, column: Lists, ids: Lists, limits: Limits) -> Iterator[Fault]:
    """Faults of a column with a value for each token."""
    yield (
        "ragged",
        column.lengths != ids.lengths,
        lambda row: f"has {max(ids.lengths[row], 0)} `input_ids` but {max(column.lengths[row], 0)} `{name}`",
        "Give each token one of both.",
    )
    if name != "labels":
        return
    count = limits.vocab_size if limits.num_labels is None else limits.num_labels
    is_label = column.values != IGNORED
    outside = is_label & ((column.values < 0) | (column.values >= count))
    yield (
        "label out of range",
        column.count(outside) > 0,
        lambda row: f"holds {name_of(column.first(outside, row), 'label')}, outside of 0 to {count - 1}",
        f"Correct it; {IGNORED} stands for a token that is not predicted.",
    )
    yield (
        "nothing to learn",
        (column.count(is_label) == 0) & (column.lengths > 0),
        lambda row: f"has {IGNORED} for all of its `labels`, so that nothing is learned from it",
        "Label a token of it or remove the row.",
    )


def faults_of_numbers(name: str, column: pa.ChunkedArray, ids: Lists, limits: Limits) -> Iterator[Fault]:
    """Faults of a column with one number a row: a class, an amount, or the place of a token."""
    if pa.types.is_floating(column.type):
        values = pc.fill_null(column, math.nan).to_numpy()
        yield (
            "label out of range",
            ~np.isfinite(values),
            lambda row: f"has {values[row]} in column `{name}`",
            "Correct it or remove the row.",
        )
        return
    values = pc.fill_null(column.cast(pa.int64()), MISSING).to_numpy()
    is_place = name in POSITION_COLUMNS
    most = ids.lengths if is_place else np.full(len(values), limits.num_labels or np.iinfo(np.int64).max)
    yield (
        "position out of range" if is_place else "label out of range",
        (values < 0) | (values >= most),
        lambda row: (
            f"has {name_of(values[row], 'label')} in column `{name}`, outside of 0 to {most[row] - 1}"
            if is_place or limits.num_labels
            else f"has {name_of(values[row], 'label')} in column `{name}`, which is no number of a class"
        ),
        "Correct it or remove the row.",
    )


def find_faulty(table: pa.Table, columns: Iterable[str], limits: Limits) -> list[Finding]:
    """Tokenized rows that a model cannot train on, each with the first of its faults."""
    ids = Lists.read(table.column("input_ids"))
    faults = list(faults_of_ids(ids, limits))
    for name in columns:
        column = table.column(name)
        if is_list(column.type):
            faults += faults_of_lists(name, Lists.read(column), ids, limits)
        else:
            faults += faults_of_numbers(name, column, ids, limits)
    found = {}
    for reason, is_bad, problem, remedy in faults:
        for row in np.flatnonzero(is_bad).tolist():
            if row not in found:
                found[row] = Finding(row, reason, problem(row), remedy)
    return [found[row] for row in sorted(found)]


def check_kinds(rows: Dataset | IterableDataset, columns: Iterable[str], words: str) -> None:
    """Refuse columns of tokenized rows that hold anything but whole numbers, or amounts for labels."""
    schema = rows.features.arrow_schema
    for name in columns:
        kind = schema.field(name).type
        item = kind.value_type if is_list(kind) else kind
        is_right_shape = name == "labels" or is_list(kind) == (name not in POSITION_COLUMNS)
        is_number = pa.types.is_integer(item) or pa.types.is_boolean(item)
        if not (is_number and is_right_shape) and not (name == "labels" and pa.types.is_floating(kind)):
            raise ValueError(
                f"column `{name}` of {words} holds {kind}, not whole numbers of tokens. Tokenize the rows first."
            )


def check_examples(
    dataset: Dataset | IterableDataset,
    *,
    vocab_size: int,
    num_labels: int | None = None,
    max_length: int | None = None,
    columns: Iterable[str] = (*TOKEN_COLUMNS, *POSITION_COLUMNS),
    quarantine: str | Quarantine | None = None,
    where: "str | Origin" = "the data",
    desc: str = "checking rows",
) -> Dataset | IterableDataset:
    """Tokenized rows that a model can train on: those of `dataset`, none bad. A stream is checked as it is read.

    A row is bad that is empty or too long, has an id outside the vocabulary or a label that is none, has columns of
    unequal length or labels that are all -100.

    Args:
        dataset: with `input_ids`, a list of numbers a row.
        num_labels: of a classifier; without it, a list of labels is one of token ids.
        max_length: tokens of the longest row that the model reads.
        columns: looked at where they are there.
        quarantine: a file for bad rows, or what has one; else the first is refused.
        where: the rows in words, or where they stood, for the message.
        desc: of the progress bar.

    Raises:
        ValueError: for the first bad row, by its number; for a column of another kind; when no row is left.
    """
    # A stream of a function does not know its columns before its first row.
    names = dataset.column_names or list(next(iter(dataset), {}))
    origin = origin_of(where)
    if "input_ids" not in names:
        raise ValueError(f"{origin.words} has no column `input_ids`; its columns are {', '.join(names)}. Tokenize it.")
    own = Quarantine(quarantine) if isinstance(quarantine, str) else quarantine
    if own is not None:
        origin = replace(origin, quarantine=own)
        own.origins.setdefault(origin.words, origin)
    columns, limits = [name for name in columns if name in names], Limits(vocab_size, num_labels, max_length)
    if dataset.features is not None:
        check_kinds(dataset, ["input_ids", *columns], origin.words)
    looked_at = ["input_ids", *columns, *(ROW,) * (ROW in names)]
    checked = sift(dataset, looked_at, lambda table: find_faulty(table, columns, limits), origin, desc)
    if isinstance(quarantine, str):
        own.finish()
    is_ours = isinstance(where, str) and ROW not in names and ROW in (checked.column_names or [])
    return checked.remove_columns(ROW) if is_ours else checked


def check_precision(args: TrainingArguments) -> None:
    """Refuse half precision where the device cannot train in it."""
    for name in ("fp16", "fp16_full_eval"):
        if getattr(args, name) and args.device.type == "cpu":
            raise ValueError(
                f"--{name} (`{name}`) is set but this run is on a CPU, where float16 is neither fast nor wide enough. "
                f"Leave it out, or use --{name.replace('fp16', 'bf16')}."
            )


def check_dtypes(model: PreTrainedModel) -> None:
    """Refuse weights of mixed dtype, which end in an error in mid-step, and weights to train in float16, whose updates
    vanish or overflow.

    Left alone are modules that the model's class keeps in float32, weights of an adapter, and quantized ones.

    Raises:
        ValueError: naming the dtypes and a parameter of the rarer one.
    """
    kept = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    by_dtype: dict = {}
    for name, weight in model.named_parameters():
        is_kept = weight.dtype == torch.float32 and kept & set(name.split("."))
        if weight.is_floating_point() and not is_kept:
            by_dtype.setdefault(weight.dtype, []).append((name, weight))
    if len(by_dtype) > 1 and not hasattr(model, "peft_config"):
        rare, common = sorted(by_dtype, key=lambda dtype: len(by_dtype[dtype]))[:: len(by_dtype) - 1]
        names = [name for name, _ in by_dtype[rare]]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"parameters of mixed dtype: `{names[0]}`{more} in {rare}, {len(by_dtype[common])} others in {common}. "
            f"Use one, as with `model.to({common})`."
        )
    for name, weight in by_dtype.get(torch.float16, []):
        if weight.requires_grad:
            raise ValueError(
                f"parameter `{name}` is to be trained in torch.float16, in which small updates vanish. Load the "
                "checkpoint with `dtype=torch.float32` and save it once; --fp16 then computes in half precision."
            )


def check_run(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse a model and settings that cannot be trained together."""
    check_precision(args)
    check_dtypes(model)


def prepare_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a padding token pad with its end token, which the attention mask hides.

    What is padded has no label, by its place and not by its id, so that the end of a text is learned all the same.

    Raises:
        ValueError: when there is no end token either.
    """
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no padding token (`pad_token`) to fill up short rows with, and no end token to take for "
            "one. Name one that has with --tokenizer_name."
        )
    tokenizer.pad_token = tokenizer.eos_token


def prepare_padding_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a configuration without a padding token of the tokenizer's."""
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def measure(count: int) -> dict[str, tuple[float, float]]:
    """Seconds, and seconds of a processor, to check `count` short rows: tokenized, and as lines of JSON."""
    from training.file_rows import check_rows_of_file

    generator = np.random.default_rng(0)
    ends = np.cumsum(generator.integers(4, 17, count), dtype=np.int32)
    ids = pa.array(generator.integers(0, 1000, ends[-1], dtype=np.int32))
    lists = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), ids)
    labels = pa.array(generator.integers(0, 3, count))
    rows = Dataset(pa.table({"input_ids": lists, "attention_mask": lists, "labels": labels}))
    seconds = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        start, busy = time.perf_counter(), time.process_time()
        run()
        seconds[name] = (time.perf_counter() - start, time.process_time() - busy)

    timed("tokenized rows", lambda: check_examples(rows, vocab_size=1000, num_labels=3, max_length=16))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with open(file, "w", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({"text": f"row {row} of many", "label": row % 3}) + "\n" for row in range(count)
            )
        timed("lines of JSON", lambda: check_rows_of_file(str(file)))
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.preflight", description="Measure the checks of rows.")
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many to check")
    count = parser.parse_args(argv).rows
    for name, (seconds, busy) in measure(count).items():
        print(f"{count:,} {name}: {seconds:.1f} s, {busy:.1f} s of a processor")


if __name__ == "__main__":
    main()
