"""Rows of csv, tsv, json and jsonl files that cannot be read, found before a reader breaks off at one.

The readers of `datasets` are fast and stay the ones that read. But they end at a broken line without its number, fill
up short rows, and turn a column of numbers with one text in it into something else. So each file is gone through once
before, by Python's own parsers, at some seconds a million rows. Where rows are bad and are to be left out, the others
are copied into the cache of `datasets`, under a name made of their content: all processes and later runs share it.
"""

import codecs
import csv
import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from training.preflight import Origin

# Names of what a value is, by its type in Python.
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object", list: "a list"}
# A csv file has no types. A column is one of numbers where no larger share of its values is text.
MOST_ODD = 0.05
# From how large a file on a progress bar is worth its line.
BYTES_WITH_BAR = 10_000_000
START_OF_NUMBER = frozenset("+-.0123456789nNiI")


class UnreadableText(ValueError):
    """A text file that cannot be trained on, with the kind of fault."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Record:
    """A row of a file, or the header of one.

    Attributes:
        line: where it begins, from 1; 0 where a row has no line of its own.
        values: by column, `None` of the header and of a row that cannot be read.
        fault: the kind, what is wrong and the remedy, where there is one.
    """

    line: int
    raw: bytes
    values: dict | None = None
    fault: tuple[str, str, str] | None = None

    @property
    def is_row(self) -> bool:
        return self.values is not None or self.fault is not None


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
                raise UnreadableText(
                    "not UTF-8",
                    f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at line {line}, byte {column + 1}. "
                    f"Convert it, for instance with `iconv -f latin1 -t utf-8 {file}`.",
                ) from None
            has_text = has_text or bool(text.strip())
            line += chunk.count(b"\n")
            column = len(chunk) - (chunk.rfind(b"\n") + 1) + (column if b"\n" not in chunk else 0)
    if decoder.decode(b"", final=False) or decoder.getstate()[0]:
        message = f"{file} ends in the middle of a UTF-8 character. It was cut off: fetch it again."
        raise UnreadableText("not UTF-8", message)
    if not has_text:
        raise UnreadableText("empty", f"{file} is empty. Give a file with text in it.")


def fault_of_bytes(raw: bytes) -> tuple[str, str, str] | None:
    """What is wrong with bytes that are not UTF-8."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            "not UTF-8",
            f"is not UTF-8: 0x{raw[error.start]:02x} is its byte {error.start + 1}",
            "Convert the file, for instance with `iconv -f latin1 -t utf-8`.",
        )
    return None


def fault_of_object(value: object, raw: bytes) -> tuple[str, str, str] | None:
    """What is wrong with a value of JSON as a row."""
    if not isinstance(value, dict):
        kind = KINDS.get(type(value), "nothing")
        return "not an object", f"is {kind}, not an object of named values", "Write it as `{...}`."
    if b"\\u" in raw:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return "not UTF-8", "escapes half of a surrogate pair, which is no character", "Mend it."
    return None


def distinct(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON, none of whose names stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _), *_) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} stands in it twice")
    return values


def finite(text: str) -> float:
    """A number of JSON that a float can hold."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text} is larger than a float can be")
    return value


# As strict as Arrow's reader, which comes after it.
DECODER = json.JSONDecoder(object_pairs_hook=distinct, parse_float=finite)


def read_json_lines(file: str) -> Iterator[Record]:
    """Rows of a file with an object on each line; blank lines are passed over."""
    with open(file, "rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                value = DECODER.decode(raw.decode("utf-8"))
            except UnicodeDecodeError:
                yield Record(line, raw, fault=fault_of_bytes(raw))
            except (ValueError, RecursionError) as error:
                yield Record(line, raw, fault=("not JSON", f"is not JSON: {error}", "Mend it."))
            else:
                fault = fault_of_object(value, raw)
                yield Record(line, raw, None if fault else value, fault)


def read_json(file: str) -> Iterator[Record]:
    """Rows of a file that is one list of objects, or that has one on each line. Of others, none."""
    with open(file, "rb") as stream:
        start = stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start != b"[":
            stream.seek(0)
            try:
                json.loads(stream.readline().removeprefix(codecs.BOM_UTF8))
            except ValueError:
                return  # an object over several lines
    if start != b"[":
        yield from read_json_lines(file)
        return
    check_text_file(file)
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read as json: {error}. Mend it, or give a row a line (jsonl).") from None
    for value in values:
        value = {"text": value} if isinstance(value, str) else value
        raw = json.dumps(value).encode() + b"\n"
        fault = fault_of_object(value, raw)
        yield Record(0, raw, None if fault else value, fault)


class CsvLines:
    """Lines of a file, which remembers those that the row at hand is made of, and can take some of them back."""

    def __init__(self, stream):
        self.stream, self.taken, self.returned = stream, [], deque()

    def __iter__(self) -> "CsvLines":
        return self

    def __next__(self) -> str:
        text = self.returned.popleft() if self.returned else next(self.stream)
        self.taken.append(text)
        return text

    def start_row(self) -> None:
        self.taken = []

    def give_back(self) -> None:
        """All lines of the row but its first are read again."""
        self.returned.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def read_csv(file: str) -> Iterator[Record]:
    """The header and the rows of a csv or tsv file; blank lines are passed over.

    A quote that is open swallows the rows after it; such a row ends with its line here, so that they are read again.
    """
    csv.field_size_limit(2**31 - 1)
    options = {"delimiter": "\t" if file.lower().endswith(".tsv") else ",", "strict": True}
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines, header, line = CsvLines(stream), None, 1
        reader = csv.reader(lines, **options)
        while True:
            lines.start_row()
            fields, fault = None, None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.give_back()
                reader = csv.reader(lines, **options)
                fault = ("unbalanced quote", f"has an unbalanced quote ({error})", "Close it, or double it.")
            raw = "".join(lines.taken).encode("utf-8", "surrogateescape")
            record = Record(line, raw, fault=fault_of_bytes(raw) or fault)
            line += len(lines.taken)
            if header is None and (fields or record.fault):
                if record.fault:
                    raise ValueError(f"{file}: the header {record.fault[1]}. {record.fault[2]}")
                header = fields
                yield record
            elif fields or record.fault:
                if record.fault is None and len(fields) != len(header):
                    record.fault = (
                        "wrong number of fields",
                        f"has {len(fields)} fields but the header has {len(header)}",
                        "Mend it, or put quotes around a field that holds the separator.",
                    )
                elif record.fault is None:
                    record.values = dict(zip(header, fields, strict=True))
                yield record


READERS: dict[str, Callable[[str], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def kind_of(value: object) -> str | None:
    """What a value of JSON is; nothing of one that may stand for any."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        return KINDS[type(value)]
    items = {KINDS.get(kind) for kind in set(map(type, value))} - {None}
    return f"a list of {items.pop()}" if len(items) == 1 else "a list of several kinds" if items else None


def kind_in_csv(value: str) -> str | None:
    """Whether a field of a csv file is a number."""
    if not value.strip():
        return None
    if value.strip()[0] not in START_OF_NUMBER:
        return "text"
    try:
        float(value)
    except ValueError:
        return "text"
    return "a number"


def kinds_of(
    values: dict, columns: frozenset[str] | None, kind: Callable[[object], str | None]
) -> Iterator[tuple[str, str]]:
    """Path and kind of each value of a row, those inside of objects included."""
    for name, value in values.items():
        if columns is not None and name not in columns:
            continue
        found = kind(value)
        if found is not None:
            yield name, found
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", found) for inner, found in kinds_of(value, None, kind))


@dataclass
class Survey:
    """What one pass over a file finds.

    Attributes:
        rows: their number, bad ones included.
        expected: what each column with values of another kind should hold.
        mixed: columns of a csv file with numbers and more text than by mistake.
    """

    rows: int = 0
    is_bad: bool = False
    has_lines: bool = False
    expected: dict[str, str] = field(default_factory=dict)
    mixed: list[str] = field(default_factory=list)


class BadRows:
    """Looks for bad rows of one file, and copies the others.

    Args:
        file: csv, tsv, json or jsonl.
        columns: those that must hold values of one kind, for the whole file; all without it.
        origin: says what becomes of bad rows.
    """

    def __init__(self, file: str, columns: Iterable[str] | None, origin: Origin):
        self.file, self.origin = file, origin
        self.columns = None if columns is None else frozenset(columns)
        ending = Path(file).suffix.lower()
        self.read, self.is_csv = READERS[ending], ending in (".csv", ".tsv")
        self.kind = kind_in_csv if self.is_csv else kind_of
        self.left_out: list[int] = []

    def reject(self, record: Record, row: int, fault: tuple[str, str, str]) -> None:
        line = f" (line {record.line})" if record.line else ""
        place = f"{self.file}: row {row}{line}"
        self.origin.quarantine.reject(place, self.file, row, *fault, record.raw.rstrip(b"\r\n"))

    def records(self, desc: str) -> Iterator[Record]:
        """What the file holds, with a progress bar of its bytes."""
        size = os.path.getsize(self.file)
        is_quiet = size < BYTES_WITH_BAR or not self.origin.quarantine.is_main
        name = Path(self.file).name
        with tqdm(total=size, desc=f"{desc} {name}", unit="B", unit_scale=True, disable=is_quiet) as bar:
            for record in self.read(self.file):
                yield record
                bar.update(len(record.raw))

    def survey(self) -> Survey:
        """Go through the file once.

        Raises:
            ValueError: without a quarantine, for the first bad row; for a file without rows.
        """
        found, counts, first = Survey(), {}, {}
        for record in self.records("checking"):
            found.has_lines = True
            if not record.is_row:
                continue
            row, found.rows = found.rows, found.rows + 1
            if record.fault is not None:
                found.is_bad = True
                if self.origin.quarantine.file is None:
                    self.reject(record, row, record.fault)
                continue
            for name, kind in kinds_of(record.values, self.columns, self.kind):
                counter = counts.get(name)
                if counter is None:
                    counter = counts[name] = Counter()
                if kind not in counter:
                    first[name, kind] = (row, record)
                counter[kind] += 1
        self._compare(found, counts, first)
        return found

    def _compare(self, found: Survey, counts: dict[str, Counter], first: dict) -> None:
        """Find columns with values of several kinds, the rarer of which are mistakes."""
        odd = []
        for name, counter in counts.items():
            if len(counter) == 1:
                continue
            ((usual, most), *_) = counter.most_common(1)
            share = 1 - most / counter.total()
            if self.is_csv and (usual != "a number" or share > MOST_ODD):
                found.mixed.append(name)
                continue
            found.is_bad, found.expected[name] = True, usual
            odd += [(*first[name, kind], name, kind) for kind in counter if kind != usual]
        if odd and self.origin.quarantine.file is None:
            row, record, name, kind = min(odd, key=lambda item: item[0])
            usual_row, _ = first[name, found.expected[name]]
            self.reject(record, row, self.fault_of_kind(name, kind, found.expected[name], f" in row {usual_row}"))

    def fault_of_kind(self, name: str, kind: str, usual: str, where: str = "") -> tuple[str, str, str]:
        return (
            "type drift",
            f"has {kind} in column `{name}`, which has {usual}{where} and in most others",
            "Mend it"
            + (", or give the rows as JSON lines, whose quotes tell text from numbers." if self.is_csv else "."),
        )

    def copy(self, found: Survey) -> str:
        """The path of a copy without the bad rows, which are set aside."""
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "without_bad_rows"
        folder.mkdir(parents=True, exist_ok=True)
        ending = ".jsonl" if self.read is read_json else Path(self.file).suffix.lower()
        partial, digest, row = folder / f".{os.getpid()}{ending}", hashlib.sha256(), -1
        try:
            with open(partial, "wb") as stream:
                for record in self.records("copying"):
                    row += record.is_row
                    fault = record.fault or self._odd_kind(record, found)
                    if fault is not None:
                        self.reject(record, row, fault)
                        self.left_out.append(row)
                        continue
                    # A last line without its end may now be followed by none, or be what is left out.
                    raw = record.raw if record.raw.endswith((b"\n", b"\r")) else record.raw + b"\n"
                    digest.update(raw)
                    stream.write(raw)
            path = folder / f"{digest.hexdigest()}{ending}"
            if not path.exists():
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        if len(self.left_out) == found.rows:
            raise ValueError(f"no row of {self.file} is left: all {found.rows} are bad. Look into them one by one.")
        return str(path)

    def _odd_kind(self, record: Record, found: Survey) -> tuple[str, str, str] | None:
        if record.values is None or not found.expected:
            return None
        for name, kind in kinds_of(record.values, self.columns, self.kind):
            usual = found.expected.get(name, kind)
            if kind != usual:
                return self.fault_of_kind(name, kind, usual)
        return None


def check_rows_of_file(file: str, columns: Iterable[str] | None = None, origin: Origin | None = None) -> tuple:
    """The file, or a copy of it without bad rows; how many rows it had; those that are left out; and columns of a csv
    file with numbers and text, which are to be read as text.

    Args:
        columns: those that must hold values of one kind; all without it.
        origin: says what becomes of bad rows; without it the first is refused.

    Raises:
        ValueError: naming the file and, for a bad row, its number (from 0, header and blank lines not counted) and its
            line; for a file without rows.
    """
    rows = BadRows(file, columns, origin or Origin())
    found = rows.survey()
    if found.rows == 0 and rows.read is not read_json:
        if found.has_lines:
            raise ValueError(f"{file} has a header but no rows. Give a file with rows in it.")
        raise ValueError(f"{file} is empty. Give a file with text in it.")
    path = rows.copy(found) if found.is_bad else file
    return path, found.rows, rows.left_out, found.mixed


def check_table_file(file: str) -> None:
    """Refuse a csv, tsv, json or jsonl file with a broken row.

    A row with too few fields would be filled up and an open quote would swallow the rows after it, both in silence.

    Raises:
        ValueError: naming the file, the row (from 0, header and blank lines not counted) and its line.
    """
    check_rows_of_file(file)
