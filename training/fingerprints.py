"""Which data a run trains on, in a few characters, so that a resumed run can be refused other data."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

# Of a larger file, its size, its beginning and its end count: a stream may be of more than is worth reading twice.
WHOLE_FILE, END_OF_FILE = 2**30, 2**26
# Rows of a stream that show what became of the files: the tokenizer, the length of a block, the shuffling.
FIRST_ROWS = 2
# What decides the order and the number of a stream's rows, of the steps that it is made of.
_SETTINGS = ("batched", "batch_size", "drop_last_batch", "buffer_size", "n", "generator", "remove_columns")


def data_fingerprint(dataset) -> str:
    """SHA-256 over the rows of a data set, in their order; of a stream, over what can be known without reading it.

    Of a stream that is its files (their names and content, or the addresses of remote ones, in which the Hub names the
    revision), the tables that it was made of, its steps and its first rows. A stream of a function is known by its
    steps alone, for its rows may come only once; one that is not of `datasets`, by nothing. A data set of another kind
    than `datasets.Dataset` is represented by its length and up to a thousand of its rows.
    """
    if isinstance(dataset, datasets.Dataset):
        return _of_rows(dataset)
    if isinstance(dataset, datasets.IterableDataset):
        return _of_stream(dataset)
    digest = hashlib.sha256()
    try:
        length = len(dataset)
    except TypeError:
        return "streamed"
    digest.update(str(length).encode())
    for row in range(0, length, max(1, length // 1000)):
        digest.update(repr(dataset[row]).encode())
    return digest.hexdigest()


def _of_rows(dataset: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([dataset.column_names, len(dataset)]).encode())
    for batch in dataset.with_format("arrow").iter(10_000):
        # Taken, so that equal rows are equal bytes, whatever table they are a part of.
        for part in batch.take(pa.array(range(len(batch)))).combine_chunks().to_batches():
            digest.update(part.replace_schema_metadata(None).serialize())
    return digest.hexdigest()


def _of_stream(stream: datasets.IterableDataset) -> str:
    digest, is_lasting = hashlib.sha256(), False
    # `datasets` has no public name for what a stream is made of.
    for step in _steps(stream._ex_iterable):
        settings = {name: getattr(step, name) for name in _SETTINGS if hasattr(step, name)}
        digest.update(repr([type(step).__name__, _describe(settings)]).encode())
        source = getattr(step, "kwargs", None)
        if source is not None:
            found = _describe(source)
            is_lasting = bool(found)
            digest.update(repr(found).encode())
    if is_lasting:
        rows = [_in_full(row) for row in itertools.islice(stream, FIRST_ROWS)]
        digest.update(repr(rows).encode())
    return digest.hexdigest()


def _steps(last) -> Iterator:
    """The steps of a stream, from the last to the files."""
    yield last
    for step in [getattr(last, "ex_iterable", None), *getattr(last, "ex_iterables", ())]:
        if step is not None:
            yield from _steps(step)


def _describe(value):
    """A value of a step in plain ones, a file by its name and content; `None` where there is nothing to tell."""
    if isinstance(value, dict):
        found = {name: _describe(content) for name, content in sorted(value.items())}
        return {name: content for name, content in found.items() if content is not None}
    if isinstance(value, list | tuple):
        found = [_describe(content) for content in value]
        return found if any(content is not None for content in found) else None
    if isinstance(value, str | Path):
        # A file in an archive is written `zip://name::archive`.
        inner, colons, file = str(value).rpartition("::")
        return [inner, Path(file).name, _of_file(Path(file))] if Path(file).is_file() else str(value)
    if isinstance(value, datasets.Dataset):
        return _of_rows(value)
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    return value if isinstance(value, bool | int | float) else None


def _in_full(row: dict) -> dict:
    """A row whose arrays are written out, of which NumPy would show the ends."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def _of_file(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_FILE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        digest.update(stream.read(END_OF_FILE))
        stream.seek(-END_OF_FILE, 2)
        digest.update(stream.read(END_OF_FILE))
    return digest.hexdigest()
