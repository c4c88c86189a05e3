"""Hold out whole groups of rows: paragraphs with all their questions, documents with all their paragraphs."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from datasets import Dataset, DatasetDict, concatenate_datasets

from training.args import TableArguments
from training.data import load_tables
from training.preflight import ROW, Quarantine, check_columns, with_places


def split_by_group(rows: Dataset, column: str, fraction: float, seed: int) -> DatasetDict:
    """Hold out a share of the values of a column, drawn with `seed`, with all their rows.

    Raises:
        ValueError: when the column holds one value only.
    """
    values = rows[column]
    groups = sorted(set(values))
    if len(groups) < 2:
        raise ValueError(
            f"column `{column}` is the same in all rows, so none can be held out. Name --validation_files."
        )
    random.Random(seed).shuffle(groups)
    held_out = set(groups[: min(max(1, round(fraction * len(groups))), len(groups) - 1)])
    return DatasetDict(
        train=rows.select([row for row, value in enumerate(values) if value not in held_out]),
        validation=rows.select([row for row, value in enumerate(values) if value in held_out]),
    )


def load_grouped_tables(
    args: TableArguments,
    embedded: Callable[[], Dataset],
    flag: str,
    column: str,
    seed: int,
    quarantine: Quarantine | None = None,
    columns: Iterable[str] | None = None,
) -> DatasetDict:
    """As `load_tables`, but a validation split that is missing shares no value of `column` with the training rows.

    Args:
        flag: the one that names the column.
    """
    quarantine = quarantine or Quarantine()
    splits = load_tables(replace(args, max_train_rows=None), embedded, seed, quarantine, columns)
    origin = quarantine.origin("train")
    if quarantine.origins["validation"] is origin:
        rows = concatenate_datasets([splits["train"], splits["validation"]]).sort(ROW)
        rows = check_columns(rows, {flag: column}, origin)
        splits |= split_by_group(rows, column, args.validation_fraction, seed)
    if args.max_train_rows is not None and args.max_train_rows < len(splits["train"]):
        splits["train"] = with_places(splits["train"]).shuffle(seed=seed).select(range(args.max_train_rows))
    return DatasetDict(splits)
