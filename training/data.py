"""From rows of text to blocks of token ids: load, check, split, tokenize. Every choice at random is seeded.

Text comes from a Hub data set, from local files or folders, or, when nothing is named, from a corpus that every Python
carries: the language reference behind `help()`, so that scripts and tests need no network.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from training.args import TableArguments

# File endings by the builder of `datasets` that reads them.
BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
# With fewer rows than this a split by rows would be all or nothing, so every document gives its own end instead.
FEWEST_ROWS_TO_SPLIT = 20
# Column that remembers the place of a row in the data as given, for a message about it.
ROW = "row_of_the_data"


def embedded_corpus() -> Dataset:
    """Python's language reference, one topic a row, in column `text`.

    Topics quote each other at length. A paragraph is kept where it first stands only, lest held-out text be text that
    was trained on.
    """
    from pydoc_data.topics import topics

    seen = set()
    documents = []
    for topic in sorted(topics):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", topics[topic].strip("\n")):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append("\n\n".join(paragraphs) + "\n")
    return Dataset.from_dict({"text": documents})


def find_files(paths: Iterable[str]) -> tuple[str, list[str]]:
    """The files that `paths` (files or folders) name and the builder that reads them.

    Raises:
        ValueError: for a path that does not exist, a folder without data, an unknown ending or a mixture of formats.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in BUILDERS)
            if not found:
                raise ValueError(f"folder {path} holds no data file. Known endings: {', '.join(BUILDERS)}.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"data file {path} does not exist. Check the path; it is relative to {Path.cwd().name}/.")
    unknown = [file for file in files if file.suffix.lower() not in BUILDERS]
    if unknown:
        raise ValueError(f"{unknown[0]} has an unknown ending. Known endings: {', '.join(BUILDERS)}.")
    builders = {BUILDERS[file.suffix.lower()] for file in files}
    if len(builders) > 1:
        raise ValueError(f"files of different formats were given ({', '.join(sorted(builders))}). Pass one format.")
    return builders.pop(), [str(file) for file in files]


def check_text_file(file: str) -> None:
    """Refuse a text file that is empty, blank or not UTF-8, before anything is built from it.

    Raises:
        ValueError: naming the file and, for bytes that are not UTF-8, their line and column.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    has_text = False
    line, column = 1, 0
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                line += before.count(b"\n")
                column = error.start - (before.rfind(b"\n") + 1) + (column if b"\n" not in before else 0)
                raise ValueError(
                    f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at line {line}, byte {column + 1}. "
                    f"Convert it, for instance with `iconv -f latin1 -t utf-8 {file}`."
                ) from None
            has_text = has_text or bool(text.strip())
            line += chunk.count(b"\n")
            column = len(chunk) - (chunk.rfind(b"\n") + 1) + (column if b"\n" not in chunk else 0)
    if decoder.decode(b"", final=False) or decoder.getstate()[0]:
        raise ValueError(f"{file} ends in the middle of a UTF-8 character. It was cut off: fetch it again.")
    if not has_text:
        raise ValueError(f"{file} is empty. Give a file with text in it.")


def check_table_file(file: str) -> None:
    """Refuse a csv, tsv or jsonl file with a broken row.

    A row with too few fields would be filled up and an open quote would swallow the rows after it, both in silence.

    Raises:
        ValueError: naming the file, the row (from 0, header and blank lines not counted) and its line.
    """
    row = -1
    with open(file, encoding="utf-8-sig", newline="") as stream:
        if file.lower().endswith(".jsonl"):
            for line, text in enumerate(stream, start=1):
                if text.strip():
                    row += 1
                    try:
                        json.loads(text)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{file}: row {row} (line {line}) is not JSON: {error}. Mend it.") from None
            return
        csv.field_size_limit(2**31 - 1)
        lines = csv.reader(stream, delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
        header, start = None, 1
        try:
            for fields in lines:
                if header is None:
                    header = fields or None
                elif fields:
                    row += 1
                    if len(fields) != len(header):
                        raise ValueError(
                            f"{file}: row {row} (line {start}) has {len(fields)} fields but the header has "
                            f"{len(header)}. Mend it, or put quotes around a field that holds the separator."
                        )
                start = lines.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{file}: row {row + 1} (line {start}) has an unbalanced quote ({error}). Close it, or double it."
            ) from None
    if row < 0:
        raise ValueError(f"{file} has a header but no rows. Give a file with rows in it.")


def load_files(paths: Iterable[str], streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of local files: one row a file for text, the file's own rows for csv, tsv, json, jsonl and parquet."""
    builder, files = find_files(paths)
    if builder != "parquet":
        for file in files:
            check_text_file(file)
            if file.lower().endswith((".csv", ".tsv", ".jsonl")):
                check_table_file(file)
    options = {}
    if builder == "text":
        options = {"sample_by": "document"}
    elif builder == "csv":
        separators = {"\t" if file.lower().endswith(".tsv") else "," for file in files}
        if len(separators) > 1:
            raise ValueError("csv and tsv files were given together. Pass one format.")
        options = {"sep": separators.pop(), "keep_default_na": False}
    try:
        return load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{', '.join(files)} cannot be read as {builder}: {error.__cause__ or error}") from None


def check_column(rows: Dataset | IterableDataset, column: str) -> None:
    """Refuse rows without the column to train on, and a column that holds anything but text."""
    names = rows.column_names or []
    if column not in names and "input_ids" not in names:
        raise ValueError(
            f"the data has no column `{column}`; its columns are {', '.join(names)}. "
            "Name the one that holds the text with --text_column."
        )
    if isinstance(rows, Dataset) and column in names:
        values = rows.with_format("arrow")[column]
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise ValueError(f"column `{column}` holds {values.type}, not text. Name another with --text_column.")
        if values.null_count:
            row = next(row for row, value in enumerate(values) if not value.is_valid)
            raise ValueError(f"row {row} of the data has no text in column `{column}`. Fill it or remove the row.")


def split_held_out(rows: Dataset, column: str, fraction: float, seed: int) -> DatasetDict:
    """Hold out a share of the text: whole rows drawn with `seed` or, of a few long documents, the end of each."""
    if len(rows) >= FEWEST_ROWS_TO_SPLIT or column not in rows.column_names:
        if "input_ids" in rows.column_names:
            rows = rows.add_column(ROW, range(len(rows)))
        parts = rows.train_test_split(test_size=fraction, seed=seed)
        return DatasetDict(train=parts["train"], validation=parts["test"])
    heads, tails = [], []
    for text in rows[column]:
        # Cut after a line, so that no word is torn.
        cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
        heads.append(text[:cut])
        tails.append(text[cut:])
    if not any(heads):
        raise ValueError("the text is too short to hold some of it out. Give more, or name --validation_files.")
    return DatasetDict(
        train=Dataset.from_dict({column: [text for text in heads if text]}),
        validation=Dataset.from_dict({column: tails}),
    )


def load_text(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    files: list[str] | None = None,
    validation_files: list[str] | None = None,
    column: str = "text",
    validation_fraction: float = 0.1,
    streaming: bool = False,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Splits `train` and `validation` of the data that the arguments name; of the embedded corpus when none does."""
    if dataset_name is not None:
        splits = load_dataset(dataset_name, dataset_config, streaming=streaming)
        if "train" not in splits:
            raise ValueError(f"data set {dataset_name} has no split `train`; it has {', '.join(splits)}.")
        rows, validation = splits["train"], splits.get("validation", splits.get("test"))
    elif files:
        rows, validation = load_files(files, streaming), None
    else:
        rows, validation = embedded_corpus(), None
        rows = rows.to_iterable_dataset() if streaming else rows
    if validation_files:
        validation = load_files(validation_files, streaming)
    check_column(rows, column)
    if validation is None:
        if streaming:
            raise ValueError("a stream cannot be split. Name held-out text with --validation_files, or do not stream.")
        return split_held_out(rows, column, validation_fraction, seed)
    check_column(validation, column)
    return (IterableDatasetDict if streaming else DatasetDict)(train=rows, validation=validation)


def load_table_files(paths: list[str]) -> Dataset:
    """Rows of local files that hold tables."""
    builder, files = find_files(paths)
    if builder == "text":
        raise ValueError(f"{files[0]} is plain text, which has no columns. Give csv, tsv, json, jsonl or parquet.")
    rows = load_files(paths)
    if len(rows) == 0:
        raise ValueError(f"{', '.join(files)}: the table has no rows. Give a file with rows in it.")
    return rows


def load_tables(args: TableArguments, embedded: Callable[[], Dataset], seed: int) -> DatasetDict:
    """Splits `train`, `validation` and, where there is one, `test` of the rows that the arguments name.

    A validation split that is missing is drawn from the training rows with `seed`. Where rows were drawn, column `ROW`
    tells their place in the data as given.

    Args:
        embedded: makes the rows when nothing is named.
    """
    if args.dataset_name is not None:
        found = load_dataset(args.dataset_name, args.dataset_config)
        if "train" not in found:
            raise ValueError(f"data set {args.dataset_name} has no split `train`; it has {', '.join(found)}.")
        splits = {name: found[name] for name in ("train", "validation", "test") if name in found}
    else:
        splits = {"train": load_table_files(args.files) if args.files else embedded()}
    for name, files in (("validation", args.validation_files), ("test", args.test_files)):
        if files:
            splits[name] = load_table_files(files)
    for name, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(f"split `{name}` of the data has no rows.")
    rows = splits["train"]
    if "validation" not in splits:
        if len(rows) < 2:
            raise ValueError("one row cannot be split. Give more, or name --validation_files.")
        parts = rows.add_column(ROW, range(len(rows))).train_test_split(test_size=args.validation_fraction, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    if args.max_train_rows is not None and args.max_train_rows < len(splits["train"]):
        rows = splits["train"] if ROW in splits["train"].column_names else rows.add_column(ROW, range(len(rows)))
        splits["train"] = rows.shuffle(seed=seed).select(range(args.max_train_rows))
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def row_of_the_data(rows: Dataset, index: int) -> int:
    """Place of `rows[index]` in the data as given."""
    return rows[index][ROW] if ROW in rows.column_names else index


def check_columns(rows: Dataset, columns: dict[str, str], where: str = "the data") -> None:
    """Refuse rows without the columns to train on, or with nothing in one of them.

    Args:
        columns: name of the column by the flag that names it.
        where: the rows in words.
    """
    names = [name for name in rows.column_names if name != ROW]
    for flag, column in columns.items():
        if column not in names:
            raise ValueError(
                f"{where} has no column `{column}`; its columns are {', '.join(names)}. "
                f"Name the right one with --{flag.lstrip('-')}."
            )
    for column in dict.fromkeys(columns.values()):
        values = rows.with_format("arrow")[column]
        start = 0
        for chunk in values.iterchunks():
            empty = chunk.is_null(nan_is_null=True)
            if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
                empty = pc.or_(empty, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(chunk), ""), True))
            elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                empty = pc.or_(empty, pc.fill_null(pc.equal(pc.list_value_length(chunk), 0), True))
            index = pc.index(empty, True).as_py()
            if index >= 0:
                row = row_of_the_data(rows, start + index)
                raise ValueError(f"row {row} of {where} has nothing in column `{column}`. Fill it or remove the row.")
            start += len(chunk)


def check_token_ids(documents: list[list[int]], vocab_size: int, rows: Iterable[int]) -> None:
    """Refuse ids outside the vocabulary, naming the row of the data they stand in."""
    for row, ids in zip(rows, documents, strict=True):
        if len(ids) and not (0 <= min(ids) and max(ids) < vocab_size):
            bad = next(value for value in ids if not 0 <= value < vocab_size)
            raise ValueError(
                f"row {row} of the data holds token id {bad}, outside the model's vocabulary of {vocab_size} entries. "
                "Use the tokenizer that made the ids, or resize the model's embeddings to it."
            )


def tokenize_blocks(rows, tokenizer, column: str, block_size: int, vocab_size: int, num_proc: int | None = None):
    """Blocks of `block_size` ids in column `input_ids`: documents one after another, each closed by the end token.

    Rows that already have `input_ids` are taken as they are. What remains at the end of a batch of rows and fills no
    block is dropped.

    Args:
        rows: `Dataset` or `IterableDataset` with `column` or `input_ids`.
        vocab_size: the model's, which every id is checked against.

    Raises:
        ValueError: when an id lies outside the vocabulary (naming the row) or the text fills no block.
    """

    def to_blocks(batch, indices):
        if "input_ids" in batch:
            documents = batch["input_ids"]
        else:
            encoded = tokenizer(batch[column], verbose=False)["input_ids"]
            documents = [ids + [tokenizer.eos_token_id] for ids in encoded]
        check_token_ids(documents, vocab_size, batch.get(ROW, indices))
        ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
        ids = ids[: len(ids) // block_size * block_size]
        return {"input_ids": ids.reshape(-1, block_size)}

    options = {} if isinstance(rows, IterableDataset) else {"num_proc": num_proc, "desc": "tokenizing"}
    names = list(rows.column_names)
    blocks = rows.map(to_blocks, batched=True, with_indices=True, remove_columns=names, **options)
    if not isinstance(blocks, IterableDataset) and len(blocks) == 0:
        raise ValueError(f"the text fills no block of {block_size} tokens. Give more text or a smaller --block_size.")
    return blocks


def token_stream(rows: Iterable[dict], tokenizer, column: str) -> torch.Tensor:
    """All documents as one row of ids (N,), each after an end token. The first id is context only, never a target."""

    def ids() -> Iterator[int]:
        for row in rows:
            yield tokenizer.eos_token_id
            yield from tokenizer(row[column], verbose=False)["input_ids"]

    return torch.tensor(list(ids()))


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks of equal length to a batch that predicts each of its own tokens: `input_ids` and `labels`, (B, T)."""
    input_ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))
    return {"input_ids": input_ids, "labels": input_ids.clone()}
