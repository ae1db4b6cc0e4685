"""Records of many files in many formats, one after the other, in bounded memory. Blocking: for a thread."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import random
import re
import shutil
import stat
import tempfile
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs

from trinfer.data.extras import load
from trinfer.data.files import (
    DATASET,
    STANDARD,
    compression_of,
    expand,
    format_of,
    is_data_set,
    is_remote,
    open_input,
    size_of,
)
from trinfer.data.records import InvalidRow, Raw
from trinfer.data.values import plain
from trinfer.errors import ConfigError, FileError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["INPUT_FORMATS", "Inputs"]

INPUT_FORMATS = ("jsonl", "csv", "tsv", "text", "parquet", "hf")
LONGEST_LINE = 64 * 2**20  # bytes
PARQUET_ROWS = 1024  # at once, and fewer where they are long
PARQUET_BYTES = 16 * 2**20
SHUFFLE_ROWS = 10_000
BOM = b"\xef\xbb\xbf"
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of other bytes
# Rows are held to LONGEST_LINE below; the module's own limit, which is the whole process's, must not be less.
csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))


class Inputs:
    """The records of some inputs.

    Args:
        paths: files, globs, folders, remote paths, ``-`` for standard input, or ``hf:NAME?split=train``.
        format: of all of them; by default what each name tells, and JSONL where it tells nothing.
        limit: only so many records.
        shuffle: seed of another order. Records are drawn from a window of 10,000, so that memory stays bounded.

    Raises:
        FileError: a name matches nothing, or a file cannot be opened.
        ConfigError: a format needs a library that is not installed, or is not known.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        format: str | None = None,  # noqa: A002  # the name of the option
        limit: int | None = None,
        shuffle: int | None = None,
    ) -> None:
        self.paths = expand([paths] if isinstance(paths, str) else list(paths))
        if format is not None and format not in INPUT_FORMATS:
            raise ConfigError(f"the input format {format!r} is not known: allowed are {', '.join(INPUT_FORMATS)}")
        if limit is not None and limit < 0:
            raise ConfigError(f"limit={limit}: allowed are integers >= 0")
        self._format = format
        self._limit, self._shuffle = limit, shuffle
        for path in self.paths:
            self._check(path)

    def _check(self, path: str) -> None:
        """What is missing, files or libraries, is told before an engine starts."""
        kind = self._format_of(path)
        if kind == "hf":
            load("datasets", f"reading {path}")
            name = path.removeprefix(DATASET).partition("?")[0]
            if name.startswith(("/", ".")) and not os.path.exists(name):
                raise FileError(f"the data set {name} does not exist", advice="check the name")
            return
        if kind == "parquet":
            load("pyarrow.parquet", f"reading {path}")
        if compression_of(path) == "zst":
            load("zstandard", f"reading {path}")
        if is_remote(path):
            load("fsspec", f"reading {path}")
        # A pipe can be opened only once.
        elif path != STANDARD and not is_pipe(path):
            with open_input(path):
                pass

    @property
    def total_bytes(self) -> int | None:
        """Of all inputs; None where one does not tell, or where not all of it is read."""
        sizes = [
            size_of(path) if self._format_of(path) in {"jsonl", "csv", "tsv", "text"} else None for path in self.paths
        ]
        return None if None in sizes or self._limit is not None else sum(size or 0 for size in sizes)

    def describe(self) -> list[dict[str, Any]]:
        """What the inputs are, for the manifest: names, sizes, times of change (in nanoseconds). Raises FileError."""
        described = []
        for path in self.paths:
            entry: dict[str, Any] = {"path": path}
            if _is_local(path):
                entry["path"] = os.path.abspath(path)
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise FileError(f"the input {path} cannot be read: {error.strerror}") from error
                if stat.S_ISREG(status.st_mode):
                    entry |= {"bytes": status.st_size, "changed": status.st_mtime_ns}
            described.append(entry)
        return described

    @property
    def is_repeatable(self) -> bool:
        """Whether a second reading gives the same records: standard input and pipes are gone after the first."""
        return not any(path == STANDARD or is_pipe(path) for path in self.paths)

    @property
    def tells_changes(self) -> bool:
        """Whether `describe` would be another for other records: remote files, pipes and the like do not tell."""
        return bool(self.paths) and all("bytes" in entry for entry in self.describe())

    @property
    def selection(self) -> dict[str, Any]:
        """Which records of the inputs these are."""
        return {"format": self._format, "limit": self._limit, "shuffle": self._shuffle}

    def __iter__(self) -> Iterator[Raw]:
        """Every record.

        Raises:
            FileError: reading failed.
        """
        records: Iterable[Raw] = itertools.chain.from_iterable(map(self._read, self.paths))
        if self._shuffle is not None:
            records = _shuffled(records, random.Random(self._shuffle))
        return iter(records) if self._limit is None else itertools.islice(records, self._limit)

    def _format_of(self, path: str) -> str:
        return self._format or format_of(path) or "jsonl"

    def _read(self, path: str) -> Iterator[Raw]:
        kind = self._format_of(path)
        if kind == "hf":
            yield from _dataset(path)
            return
        name = "stdin" if path == STANDARD else os.path.basename(path)
        with open_input(path) as file:
            match kind:
                case "csv":
                    yield from _csv(file, name, ",")
                case "tsv":
                    yield from _csv(file, name, "\t")
                case "text":
                    yield from _text(file, name)
                case "parquet":
                    yield from _parquet(file, name, path)
                case _:
                    yield from _lines(file, name)


def is_pipe(path: str) -> bool:
    """A pipe, a socket or a device."""
    return _is_local(path) and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def _is_local(path: str) -> bool:
    return path != STANDARD and not is_remote(path) and not is_data_set(path)


def _lines(file: IO[bytes], name: str) -> Iterator[Raw]:
    """A record per line; blank lines are none."""
    number = 0
    readline = file.readline
    while line := readline(LONGEST_LINE + 1):  # with its end
        number += 1
        size = len(line)
        if number == 1:
            line = line.removeprefix(BOM)  # no part of the content: the line may come elsewhere in the next run
        if size > LONGEST_LINE and not line.endswith(b"\n"):
            digest = hashlib.blake2b(line, digest_size=16)
            while not line.endswith(b"\n") and (line := readline(1 << 20)):
                digest.update(line)
                size += len(line)
            place = f"{name}:{number}"
            error = InvalidRow(f"{place}: the line is longer than {LONGEST_LINE} bytes")
            yield Raw(place, size, digest.digest(), error)
        elif line := line.strip():
            yield Raw(f"{name}:{number}", size, line)


class _CsvLines:
    """The lines of a table, for a reader of CSV; it counts what it gives to one row."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.number = 0
        self.begin()

    def begin(self) -> None:
        """A row begins."""
        self.first = self.number + 1
        self.size = self._length = 0
        self._lines: list[str] = []

    def digest(self) -> bytes:
        """Of what the row was made of."""
        digest = hashlib.blake2b(digest_size=16)
        for line in self._lines:
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.digest()

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        """Raises csv.Error where the row becomes too long: the reader begins a new one after it."""
        line = self._text.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._lines.append(line)
        self._count(line)
        while not line.endswith(("\n", "\r")) and len(line) > LONGEST_LINE and (rest := self._text.readline(1 << 20)):
            self._count(rest)
            if rest.endswith(("\n", "\r")):
                break
        if self._length > LONGEST_LINE:
            raise csv.Error(f"it is longer than {LONGEST_LINE} characters; a quotation mark may lack its counterpart")
        return line

    def _count(self, text: str) -> None:
        self._length += len(text)
        self.size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _csv(file: IO[bytes], name: str, delimiter: str) -> Iterator[Raw]:
    """A record per row, with the first row's names."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    lines = _CsvLines(text)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = _csv_names(rows, name)
        while True:
            lines.begin()
            row: list[str] = []
            error = None
            try:
                if not (row := next(rows)):
                    continue  # a blank line
            except StopIteration:
                return
            except csv.Error as problem:
                error = f"the row is no CSV: {problem}"
            place = f"{name}:{lines.first}"
            if error is None and len(row) != len(names):
                error = f"the row has {len(row)} fields, and the first line {len(names)}"
            elif error is None and any(map(NOT_UTF8.search, row)):
                error = "the row is not UTF-8"
            if error is None:
                yield Raw(place, lines.size, dict(zip(names, row, strict=True)))
            else:
                yield Raw(place, lines.size, lines.digest(), InvalidRow(f"{place}: {error}"))
    finally:
        text.detach()


def _csv_names(rows: Iterator[list[str]], name: str) -> list[str]:
    """The first row that is not blank. Raises FileError where it cannot be one of names."""
    try:
        names = next((row for row in rows if row), [])
    except csv.Error as error:
        raise FileError(f"the input {name} is no CSV: {error}", advice="give its format") from error
    if any(map(NOT_UTF8.search, names)):
        raise FileError(f"the first line of the input {name} is not UTF-8", advice="save it as UTF-8")
    _refuse_twins(names, name)
    return names


def _refuse_twins(names: list[str], name: str) -> None:
    twins = sorted({each for each in names if names.count(each) > 1})
    if twins:
        raise FileError(
            f"the input {name} has several columns of the name {twins[0]!r}", advice="give each a name of its own"
        )


def _text(file: IO[bytes], name: str) -> Iterator[Raw]:
    """The whole file is one record."""
    data = file.read(LONGEST_LINE + 1)
    if len(data) > LONGEST_LINE:
        yield Raw(name, len(data), data, InvalidRow(f"{name}: the text is longer than {LONGEST_LINE} bytes"))
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        error = InvalidRow(f"{name}: the text is not UTF-8 ({problem.reason} at byte {problem.start})")
        yield Raw(name, len(data), data, error)
    else:
        yield Raw(name, len(data), {"text": text, "file": name})


def _parquet(file: IO[bytes], name: str, path: str) -> Iterator[Raw]:
    parquet = load("pyarrow.parquet", f"reading {name}")
    buffer_size = 8 << 20 if is_remote(path) else 1 << 20  # for each column
    with tempfile.TemporaryFile() as copy:
        if compression_of(path) or not file.seekable():  # it is read from its end, and to and fro
            shutil.copyfileobj(file, copy, 1 << 20)
            file = copy
        # Without a buffer, and with read-ahead, whole groups of rows are in memory at once.
        opened = parquet.ParquetFile(file, buffer_size=buffer_size, pre_buffer=False, page_checksum_verification=True)
        _refuse_twins(opened.schema_arrow.names, name)
        number = 0
        for batch in opened.iter_batches(batch_size=_rows_at_once(opened.metadata)):
            for fields, problem in _rows(batch):
                number += 1
                yield _record(f"{name}:{number}", fields, problem)


def _rows_at_once(metadata: Any) -> int:  # noqa: ANN401  # of pyarrow
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // max(1, longest)))


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:  # noqa: ANN401  # of pyarrow
    """The rows of a batch, and what is wrong with each."""
    problems: dict[int, str] = {}
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except Exception:  # one of them cannot be had: not UTF-8, a date of the year 12000, …
            columns.append([])
            for at, scalar in enumerate(column):
                try:
                    columns[-1].append(scalar.as_py())
                except Exception as error:
                    columns[-1].append(str(error))
                    problems[at] = f"the field {name!r} cannot be read: {error}"
    for at in range(batch.num_rows):
        row = {name: column[at] for name, column in zip(batch.schema.names, columns, strict=True)}
        yield row, problems.get(at)


def _record(place: str, fields: Mapping[str, Any], problem: str | None = None) -> Raw:
    """A record of values of any type."""
    try:
        data = plain(fields)
    except TypeError:
        data = {}
        for name, value in fields.items():
            try:
                data[name] = plain(value)
            except TypeError as error:
                data[name] = str(error)
                problem = f"the field {name!r} holds a {error}, which JSON does not know"
    return Raw(place, 0, data, InvalidRow(f"{place}: {problem}") if problem else None)


def _dataset(path: str) -> Iterator[Raw]:
    """A data set of Hugging Face: on the hub, or saved in a folder."""
    name, _, query = path.removeprefix(DATASET).partition("?")
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    unknown = options.keys() - {"split", "config", "revision"}
    if not name or unknown:
        raise ConfigError(f"the input {path!r}: allowed is hf:NAME, with ?split=, &config=, &revision=")
    datasets = load("datasets", f"reading {path}")
    split = options.get("split", "train")
    try:
        for number, fields in enumerate(_undecoded(_open_data_set(datasets, name, split, options)), 1):
            yield _record(f"{name}:{number}", fields)
    except (GeneratorExit, MemoryError, TrinferError):
        raise
    except Exception as error:  # the library and those below it raise whatever they like
        raise FileError(
            f"the data set {name} (split {split}) cannot be read: {error}",
            advice="check name, split and network; HF_TOKEN opens private ones",
        ) from error


def _open_data_set(datasets: Any, name: str, split: str, options: Mapping[str, str]) -> Any:  # noqa: ANN401  # theirs
    if os.path.exists(os.path.join(name, "dataset_dict.json")):
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise FileError(
                f"the data set {name} has no split {split!r}", advice=f"?split= takes one of {', '.join(splits)}"
            )
        return splits[split]
    if os.path.exists(os.path.join(name, "state.json")):
        rows = datasets.load_from_disk(name)
        if "split" in options and rows.split is not None and str(rows.split) != split:
            raise FileError(
                f"the data set {name} holds the split {rows.split}, and not {split}", advice="leave ?split= out"
            )
        return rows
    return datasets.load_dataset(
        name, options.get("config"), split=split, revision=options.get("revision"), streaming=True
    )


def _undecoded(rows: Any) -> Any:  # noqa: ANN401  # theirs
    """Images and the like as they are stored, and not as objects of other libraries: as bytes or paths."""
    if hasattr(rows, "to_iterable_dataset"):
        rows = rows.to_iterable_dataset()
    return rows.decode(False) if rows.features and hasattr(rows, "decode") else rows


def _shuffled(records: Iterable[Raw], order: random.Random) -> Iterator[Raw]:
    window: list[Raw] = []
    for record in records:
        if len(window) < SHUFFLE_ROWS:
            window.append(record)
            continue
        at = order.randrange(SHUFFLE_ROWS)
        window[at], record = record, window[at]
        yield record
    order.shuffle(window)
    yield from window
