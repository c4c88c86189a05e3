"""From rows of text to blocks of token ids: load, check, split, tokenize. Every choice at random is seeded.

Text comes from a Hub data set, from local files or folders, or, when nothing is named, from a corpus that every Python
carries: the language reference behind `help()`, so that scripts and tests need no network.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from training.args import TableArguments
from training.file_rows import UnreadableText, check_rows_of_file, check_text_file
from training.preflight import (
    LONGEST_CONTENT,
    ROW,
    TOKEN_COLUMNS,
    Origin,
    Quarantine,
    find_empty,
    sift,
    with_places,
)

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


def check_file(file: str, builder: str, columns: Iterable[str] | None, origin: Origin) -> tuple:
    """As `check_rows_of_file`, of a file of any format."""
    if builder == "parquet":
        return file, pq.ParquetFile(file).metadata.num_rows, [], []
    if builder != "text":
        return check_rows_of_file(file, columns, origin)
    try:
        check_text_file(file)
    except UnreadableText as error:
        if origin.quarantine.file is None:
            raise
        with open(file, "rb") as stream:
            content = stream.read(LONGEST_CONTENT)
        origin.quarantine.reject(file, file, 0, error.reason, str(error), "", content)
        return file, 1, [0], []
    return file, 1, [], []


def check_files(
    files: list[str], builder: str, columns: Iterable[str] | None, origin: Origin
) -> tuple[list[str], list[str]]:
    """The files to read, copies of those with bad rows among them, and columns of csv files to be read as text.

    Fills in where the rows stand.
    """
    kept, mixed, start = [], {}, 0
    for file in files:
        path, count, left_out, some = check_file(file, builder, columns, origin)
        origin.files.append((file, count))
        origin.left_out += [start + row for row in left_out]
        start += count
        mixed |= dict.fromkeys(some)
        if builder != "text" or not left_out:
            kept.append(path)
    if not kept:
        raise ValueError(f"no file of {origin.words} is left: all {len(files)} are bad. Look into them one by one.")
    if not all(count for _, count in origin.files):
        # One object of JSON over many lines, whose rows are known to the reader alone.
        origin.files[:] = [(", ".join(files), 0)]
    return kept, list(mixed)


def load_files(
    paths: Iterable[str],
    streaming: bool = False,
    columns: Iterable[str] | None = None,
    origin: Origin | None = None,
) -> Dataset | IterableDataset:
    """Rows of local files: one row a file for text, the file's own rows for csv, tsv, json, jsonl and parquet.

    Args:
        columns: those that must hold values of one kind; all without it.
        origin: says what becomes of bad rows, and is told where the rows stand; without it the first is refused.
            Where rows were left out, column `ROW` has the places of the others.
    """
    paths, origin = list(paths), origin or Origin()
    builder, files = find_files(paths)
    origin.quarantine.check_outside(paths)
    kept, mixed = check_files(files, builder, columns, origin)
    options = {}
    if builder == "text":
        options = {"sample_by": "document"}
    elif builder == "csv":
        separators = {"\t" if file.lower().endswith(".tsv") else "," for file in files}
        if len(separators) > 1:
            raise ValueError("csv and tsv files were given together. Pass one format.")
        options = {"sep": separators.pop(), "keep_default_na": False}
        if mixed:
            options["converters"] = dict.fromkeys(mixed, str)
    try:
        rows = load_dataset(builder, data_files=kept, split="train", streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{', '.join(files)} cannot be read as {builder}: {error.__cause__ or error}") from None
    if not streaming and origin.left_out:
        rows = with_places(rows, origin)
    return rows


def check_column(
    rows: Dataset | IterableDataset, column: str, where: str | Origin = "the data"
) -> Dataset | IterableDataset:
    """The rows, none without text. Refuses rows without the column to train on, and one that holds anything else."""
    names = rows.column_names or []
    if column not in names and "input_ids" not in names:
        raise ValueError(
            f"the data has no column `{column}`; its columns are {', '.join(names)}. "
            "Name the one that holds the text with --text_column."
        )
    if "input_ids" in names or rows.features is None:
        return rows
    kind = rows.features.arrow_schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column `{column}` holds {kind}, not text. Name another with --text_column.")
    looked_at = [column, *(ROW,) * (ROW in names)]
    return sift(rows, looked_at, lambda table: find_empty(table, [column], "no text"), where)


def split_held_out(rows: Dataset, column: str, fraction: float, seed: int) -> DatasetDict:
    """Hold out a share of the text: whole rows drawn with `seed` or, of a few long documents, the end of each."""
    if len(rows) >= FEWEST_ROWS_TO_SPLIT or column not in rows.column_names:
        if "input_ids" in rows.column_names:
            rows = with_places(rows)
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
    quarantine: Quarantine | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Splits `train` and `validation` of the data that the arguments name; of the embedded corpus when none does.

    Args:
        quarantine: says what becomes of bad rows, and is told where the rows of each split stood.
    """
    quarantine = quarantine or Quarantine()
    origin, columns = quarantine.origin("train", "the data"), (column, "input_ids", *TOKEN_COLUMNS)
    if dataset_name is not None:
        splits = load_dataset(dataset_name, dataset_config, streaming=streaming)
        if "train" not in splits:
            raise ValueError(f"data set {dataset_name} has no split `train`; it has {', '.join(splits)}.")
        rows, validation = splits["train"], splits.get("validation", splits.get("test"))
        for name, part in (("train", rows), ("validation", validation)):
            if part is not None:
                quarantine.origin(name).files = [(f"{dataset_name}, {name}", 0 if streaming else len(part))]
    elif files:
        rows, validation = load_files(files, streaming, columns, origin), None
    else:
        rows, validation = embedded_corpus(), None
        rows = rows.to_iterable_dataset() if streaming else rows
    if validation_files:
        validation = load_files(validation_files, streaming, columns, quarantine.origin("validation"))
    rows = check_column(rows, column, origin)
    if validation is None:
        if streaming:
            raise ValueError("a stream cannot be split. Name held-out text with --validation_files, or do not stream.")
        quarantine.origins["validation"] = origin
        return split_held_out(rows, column, validation_fraction, seed)
    validation = check_column(validation, column, quarantine.origin("validation"))
    return (IterableDatasetDict if streaming else DatasetDict)(train=rows, validation=validation)


def load_table_files(paths: list[str], columns: Iterable[str] | None = None, origin: Origin | None = None) -> Dataset:
    """Rows of local files that hold tables; arguments as for `load_files`."""
    builder, files = find_files(paths)
    if builder == "text":
        raise ValueError(f"{files[0]} is plain text, which has no columns. Give csv, tsv, json, jsonl or parquet.")
    rows = load_files(paths, columns=columns, origin=origin)
    if len(rows) == 0:
        raise ValueError(f"{', '.join(files)}: the table has no rows. Give a file with rows in it.")
    return rows


def load_tables(
    args: TableArguments,
    embedded: Callable[[], Dataset],
    seed: int,
    quarantine: Quarantine | None = None,
    columns: Iterable[str] | None = None,
) -> DatasetDict:
    """Splits `train`, `validation` and, where there is one, `test` of the rows that the arguments name.

    Args:
        embedded: makes the rows when nothing is named.
        quarantine: says what becomes of bad rows, and is told where the rows of each split stood.
        columns: those that must hold values of one kind; all without it.
    """
    quarantine = quarantine or Quarantine()
    if args.dataset_name is not None:
        found = load_dataset(args.dataset_name, args.dataset_config)
        if "train" not in found:
            raise ValueError(f"data set {args.dataset_name} has no split `train`; it has {', '.join(found)}.")
        splits = {name: found[name] for name in ("train", "validation", "test") if name in found}
        for name, rows in splits.items():
            quarantine.origin(name).files = [(f"{args.dataset_name}, {name}", len(rows))]
    else:
        origin = quarantine.origin("train")
        splits = {"train": load_table_files(args.files, columns, origin) if args.files else embedded()}
    for name, files in (("validation", args.validation_files), ("test", args.test_files)):
        if files:
            quarantine.origins.pop(name, None)
            splits[name] = load_table_files(files, columns, quarantine.origin(name))
    for name, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(f"split `{name}` of the data has no rows.")
    return complete_splits(splits, args, seed, quarantine)


def complete_splits(splits: dict[str, Dataset], args: TableArguments, seed: int, quarantine: Quarantine) -> DatasetDict:
    """The splits in their order, with a validation split, and as many training rows as the arguments ask for.

    A validation split that is missing is drawn from the training rows with `seed`. Where rows were drawn, column `ROW`
    tells their place in the data as given.
    """
    rows = splits["train"]
    if "validation" not in splits:
        if len(rows) < 2:
            raise ValueError("one row cannot be split. Give more, or name --validation_files.")
        quarantine.origins["validation"] = quarantine.origin("train")
        parts = with_places(rows).train_test_split(test_size=args.validation_fraction, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    if args.max_train_rows is not None and args.max_train_rows < len(splits["train"]):
        rows = with_places(splits["train"])
        splits["train"] = rows.shuffle(seed=seed).select(range(args.max_train_rows))
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


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
