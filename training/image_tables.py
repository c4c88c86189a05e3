"""Tables whose rows have an image each: found, joined, checked and split by image."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset

from training.args import TableArguments
from training.data import BUILDERS, find_files, load_table_files
from training.images import Source, decode_image
from training.preflight import ROW, Finding, Origin, Quarantine, check_columns, set_aside

# Column of the `imagefolder` convention: the image's path, relative to the table that names it.
FILE_NAME = "file_name"
# Columns to train on by the flag that names each, of a table's own columns.
Columns = Callable[[Dataset], dict[str, str]]


@dataclass
class ImageTableArguments(TableArguments):
    """Rows that have an image each: in a column, as a path in column `file_name`, or in another table by its id."""

    images: list[str] | None = field(
        default=None, metadata={"help": "tables of images, when those of --files name them by their id"}
    )
    validation_images: list[str] | None = field(default=None, metadata={"help": "the same for --validation_files"})
    test_images: list[str] | None = field(default=None, metadata={"help": "the same for --test_files"})
    image_column: str = field(default="image", metadata={"help": "column that holds the image, or its path"})
    image_id_column: str = field(default="image_id", metadata={"help": "column that says which image a row is about"})
    skip_missing_images: bool = field(
        default=False, metadata={"help": "leave out rows whose image is not there or cannot be read"}
    )

    def __post_init__(self):
        super().__post_init__()
        for split in ("", "validation_", "test_"):
            if getattr(self, f"{split}images") and not getattr(self, f"{split}files"):
                raise ValueError(f"--{split}images was given without the rows about them. Name --{split}files.")


@dataclass
class ImageRows:
    """Rows of text, each with an image.

    Attributes:
        rows: the other columns.
        sources: for each row its image. Equal sources are one image.
        places: where each source was found first, in words, for a message about it.
        stood: for each row its table and its number there; nothing of rows that no table has.
    """

    rows: Dataset
    sources: list[Source]
    places: dict[Source, str]
    stood: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, indices: Iterable[int]) -> "ImageRows":
        indices = list(indices)
        stood = [self.stood[index] for index in indices] if self.stood else []
        return ImageRows(self.rows.select(indices), [self.sources[index] for index in indices], self.places, stood)


def find_tables(paths: list[str]) -> list[str]:
    """The tables that `paths` name, where a folder of the `imagefolder` convention stands for its metadata.

    Raises:
        ValueError: for a path without a table, and for a folder with several metadata files, one for each split.
    """
    tables = []
    for path in paths:
        folder = Path(path)
        metadata = (
            [file for ending in BUILDERS for file in folder.rglob(f"metadata{ending}")] if folder.is_dir() else []
        )
        if len(metadata) > 1:
            parts = " and ".join(sorted(str(file.parent) for file in metadata))
            raise ValueError(f"folder {path} holds several metadata files. Name their folders one by one: {parts}.")
        tables += find_files([str(metadata[0])] if metadata else [path])[1]
    return tables


def image_column_of(rows: Dataset, column: str, file: str, flag: str) -> str:
    """The column that holds the images, or their paths."""
    names = [name for name in (column, FILE_NAME) if name in rows.column_names]
    if not names:
        raise ValueError(
            f"{file} has no column `{column}` nor `{FILE_NAME}`; its columns are {', '.join(rows.column_names)}. {flag}"
        )
    return names[0]


def image_sources(rows: Dataset, column: str, origin: Origin) -> tuple[Dataset, list[Source]]:
    """The rows that have an image, and the image of each, undecoded. Paths are relative to the folder of the table.

    Raises:
        ValueError: without a quarantine for a row without an image, by its number.
    """
    file = origin.words
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    folder = Path(file).parent
    sources, bad = [], []
    for row, value in enumerate(rows[column]):
        source = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if not source:
            bad.append(Finding(row, "empty", f"has no image in column `{column}`", "Fill it or remove the row."))
            continue
        if not isinstance(source, bytes | str):
            raise ValueError(
                f"column `{column}` of {file} holds {type(source).__name__}, not images or their paths. "
                "Name another with --image_column."
            )
        sources.append(source if isinstance(source, bytes) else str(folder / source))
    return set_aside(rows, bad, origin), sources


def numbers_of(rows: Dataset) -> list[int]:
    """The number of each row in its table."""
    return rows[ROW][:] if ROW in rows.column_names else list(range(len(rows)))


def places_of(sources: list[Source], file: str, numbers: Iterable[int] | None = None) -> dict[Source, str]:
    places = {}
    for row, source in zip(range(len(sources)) if numbers is None else numbers, sources, strict=True):
        places.setdefault(source, f"row {row} of {file}")
    return places


def images_in_rows(rows: Dataset, column: str, origin: Origin) -> ImageRows:
    """Rows of one table that has the images itself."""
    file = origin.words
    column = image_column_of(
        rows, column, file, "Name it with --image_column, or the table that holds the images with --images."
    )
    rows, sources = image_sources(rows, column, origin)
    return ImageRows(rows.remove_columns(column), sources, places_of(sources, file, numbers_of(rows)))


def join_images(
    rows: Dataset, origin: Origin, images: dict[str, Source], id_column: str
) -> tuple[Dataset, list[Source]]:
    """The rows of a table whose image is among `images`, and the image of each, which `id_column` names."""
    check_id_column(rows, id_column, origin.words)
    missing = (
        Finding(
            row,
            "missing image",
            f"names image {key!r}, which is not among the {len(images)} images of --images",
            "Add it or remove the row.",
        )
        for row, key in enumerate(rows[id_column])
        if str(key) not in images
    )
    rows = set_aside(rows, missing, origin)
    return rows, [images[str(key)] for key in rows[id_column]]


def check_id_column(rows: Dataset, id_column: str, file: str) -> None:
    if id_column not in rows.column_names:
        raise ValueError(
            f"{file} has no column `{id_column}`; its columns are {', '.join(rows.column_names)}. "
            "Name the one that says which image belongs to a row with --image_id_column."
        )


def read_images(
    paths: list[str], column: str, id_column: str, quarantine: Quarantine
) -> tuple[dict[str, Source], dict[Source, str]]:
    """Images by their id, and where each was found."""
    images, places = {}, {}
    for file in find_tables(paths):
        origin = quarantine.origin(f"images {file}", file)
        rows = load_table_files([file], origin=origin)
        check_id_column(rows, id_column, file)
        column_here = image_column_of(rows, column, file, "Name it with --image_column.")
        rows, sources = image_sources(rows, column_here, origin)
        for row, key, source in zip(numbers_of(rows), rows[id_column], sources, strict=True):
            if str(key) in images:
                raise ValueError(f"row {row} of {file} has image {key!r} a second time. Give each image one row.")
            images[str(key)] = source
        places = {**places_of(sources, file, numbers_of(rows)), **places}
    return images, places


def read_rows(
    files: list[str], images: list[str] | None, args: ImageTableArguments, columns: Columns, quarantine: Quarantine
) -> ImageRows:
    """Rows of local tables with their images, which other tables may hold."""
    parts = []
    by_id, places = read_images(images, args.image_column, args.image_id_column, quarantine) if images else ({}, {})
    # Of the folder too, which may name one table of several.
    quarantine.check_outside([*files, *(images or [])])
    for file in find_tables(files):
        origin = quarantine.origin(f"rows {file}", file)
        rows = load_table_files([file], origin=origin)
        names = columns(rows)
        rows = check_columns(rows, names, origin)
        if images:
            part = ImageRows(*join_images(rows, origin, by_id, args.image_id_column), places)
        else:
            part = images_in_rows(rows, args.image_column, origin)
        parts.append(only_columns(part, names, file))
    return ImageRows(
        concatenate_datasets([part.rows for part in parts]),
        [source for part in parts for source in part.sources],
        {source: place for part in reversed(parts) for source, place in part.places.items()},
        [place for part in parts for place in part.stood],
    )


def only_columns(part: ImageRows, names: dict[str, str], file: str) -> ImageRows:
    """The rows of a table with the columns to train on, and their numbers in it."""
    part.stood = [(file, number) for number in numbers_of(part.rows)]
    part.rows = part.rows.select_columns(list(names.values()))
    return part


def skip_unreadable(splits: dict[str, ImageRows], quarantine: Quarantine) -> dict[str, ImageRows]:
    """The rows whose image can be read. The others are set aside or, without a quarantine, counted in a line.

    Raises:
        ValueError: for a split of which no row is left.
    """
    places = {source: place for rows in splits.values() for source, place in rows.places.items()}
    unreadable = {}
    for source in {source for rows in splits.values() for source in rows.sources}:
        try:
            decode_image(source, places[source])
        except ValueError as error:
            unreadable[source] = str(error)
    kept = {
        name: rows.select(row for row, source in enumerate(rows.sources) if source not in unreadable)
        for name, rows in splits.items()
    }
    if quarantine.file is None:
        left, total = (sum(map(len, found.values())) for found in (kept, splits))
        print(
            f"{total - left} of {total} rows skipped: their image is not there or cannot be read "
            "(--skip_missing_images)"
        )
    else:
        set_aside_unreadable(splits, unreadable, quarantine)
    for name, rows in kept.items():
        if not len(rows):
            raise ValueError(f"no image of the {name} rows can be read. Check their paths.")
    return kept


def set_aside_unreadable(splits: dict[str, ImageRows], problems: dict[Source, str], quarantine: Quarantine) -> None:
    """Record the rows whose image cannot be read."""
    for rows in splits.values():
        for row, source in enumerate(rows.sources):
            if source in problems:
                file, number = rows.stood[row] if rows.stood else (rows.places[source], row)
                content = {**rows.rows[row], "image": source}
                place = f"row {number} of {file}"
                quarantine.reject(place, file, number, "unreadable image", problems[source], "", content)


def load_image_rows(
    args: ImageTableArguments,
    columns: Columns,
    embedded: Callable[[], ImageRows],
    seed: int,
    quarantine: Quarantine | None = None,
) -> dict[str, ImageRows]:
    """Splits `train`, `validation` and, where there is one, `test`. One that must be drawn has images of its own.

    Args:
        columns: says which columns of a table are trained on.
        embedded: makes the rows when nothing is named.
        quarantine: says what becomes of bad rows. With a file, all images are read once more for it, here.
    """
    quarantine = quarantine or Quarantine()
    if args.dataset_name is not None:
        splits = {}
        for name, rows in load_dataset(args.dataset_name, args.dataset_config).items():
            if name in ("train", "validation", "test"):
                where = f"split {name} of {args.dataset_name}"
                names, origin = columns(rows), quarantine.origin(name, where)
                origin.count = len(rows)
                rows = check_columns(rows, names, origin)
                splits[name] = only_columns(images_in_rows(rows, args.image_column, origin), names, where)
        if "train" not in splits:
            raise ValueError(f"data set {args.dataset_name} has no split `train`.")
    else:
        has_files = bool(args.files)
        splits = {"train": read_rows(args.files, args.images, args, columns, quarantine) if has_files else embedded()}
    for name in ("validation", "test"):
        files, images = getattr(args, f"{name}_files"), getattr(args, f"{name}_images")
        if files:
            splits[name] = read_rows(files, images, args, columns, quarantine)
    if args.skip_missing_images or quarantine.file is not None:
        splits = skip_unreadable(splits, quarantine)
    if "validation" not in splits:
        splits["train"], splits["validation"] = split_by_image(splits["train"], args.validation_fraction, seed)
    count, limit = len(splits["train"]), args.max_train_rows
    if limit is not None and limit < count:
        splits["train"] = splits["train"].select(np.random.default_rng(seed).permutation(count)[:limit])
    return splits


def split_by_image(rows: ImageRows, fraction: float, seed: int) -> tuple[ImageRows, ImageRows]:
    """Hold out a share of the images, drawn with `seed`, with all rows of each."""
    distinct = list(dict.fromkeys(rows.sources))
    if len(distinct) < 2:
        raise ValueError("the rows share one image, so none can be held out. Give more, or name --validation_files.")
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    drawn = np.random.default_rng(seed).permutation(len(distinct))[:count]
    held_out = {distinct[index] for index in drawn}
    is_held_out = [source in held_out for source in rows.sources]
    return tuple(rows.select(i for i, out in enumerate(is_held_out) if out is side) for side in (False, True))
