"""Records of many files in many formats, one after the other, in bounded memory. Blocking: for a thread."""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs

from trinfer.data.extras import load
from trinfer.data.files import DATASET, STANDARD, expand, format_of, is_remote, open_input, size_of
from trinfer.data.records import InvalidRow, Raw
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["INPUT_FORMATS", "Inputs"]

INPUT_FORMATS = ("jsonl", "csv", "tsv", "text", "parquet", "hf")
LONGEST_LINE = 64 * 2**20  # bytes
PARQUET_ROWS = 1024
SHUFFLE_ROWS = 10_000
csv.field_size_limit(LONGEST_LINE)


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
        self._format = format
        self._limit, self._shuffle = limit, shuffle
        for path in self.paths:
            if _is_local(path) and (os.path.isfile(path) or not os.path.exists(path) or os.path.isdir(path)):
                with open_input(path):
                    pass  # what is missing is told before an engine starts; a pipe can be opened only once

    @property
    def total_bytes(self) -> int | None:
        """Of all inputs; None where one does not tell, or where not all of it is read."""
        sizes = [
            size_of(path) if self._format_of(path) in {"jsonl", "csv", "tsv", "text"} else None for path in self.paths
        ]
        return None if None in sizes or self._limit is not None else sum(size or 0 for size in sizes)

    def describe(self) -> list[dict[str, Any]]:
        """What the inputs are, for the manifest: names, sizes, times of change."""
        described = []
        for path in self.paths:
            entry: dict[str, Any] = {"path": path}
            if _is_local(path):
                status = os.stat(path)
                entry |= {"bytes": status.st_size, "changed": int(status.st_mtime)}
            described.append(entry)
        return described

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
                    yield from _parquet(file, name)
                case _:
                    yield from _lines(file, name)


def _is_local(path: str) -> bool:
    return path != STANDARD and not is_remote(path) and not path.startswith(DATASET)


def _lines(file: IO[bytes], name: str) -> Iterator[Raw]:
    """A record per line; blank lines are none."""
    number = 0
    readline = file.readline
    while line := readline(LONGEST_LINE):
        number += 1
        size = len(line)
        if size == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := readline(1 << 20)) and not rest.endswith(b"\n"):
                size += len(rest)
            place = f"{name}:{number}"
            error = InvalidRow(f"{place}: the line is longer than {LONGEST_LINE} bytes")
            yield Raw(place, size + len(rest), line[:4096], error)
        elif line := line.strip():
            yield Raw(f"{name}:{number}", size, line)


def _csv(file: IO[bytes], name: str, delimiter: str) -> Iterator[Raw]:
    """A record per row, with the first row's names."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, restkey="", strict=True)
    try:
        for row in rows:
            place = f"{name}:{rows.line_num}"
            size = sum(map(len, filter(None, row.values()))) + len(row)
            error = None
            if "" in row or None in row.values():
                error = InvalidRow(f"{place}: the row has not as many fields as the first line")
            elif any("\udc80" <= each <= "\udcff" for value in row.values() for each in value):
                error = InvalidRow(f"{place}: the row is not UTF-8")
            yield Raw(place, size, row, error)
    except csv.Error as error:
        raise FileError(f"the input {name} is no CSV in line {rows.line_num}: {error}") from error
    finally:
        text.detach()


def _text(file: IO[bytes], name: str) -> Iterator[Raw]:
    """The whole file is one record."""
    data = file.read(LONGEST_LINE + 1)
    error = None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        text = ""
        error = InvalidRow(f"{name}: the text is not UTF-8 ({problem.reason} at byte {problem.start})")
    if len(data) > LONGEST_LINE:
        error = InvalidRow(f"{name}: the text is longer than {LONGEST_LINE} bytes")
    yield Raw(name, len(data), {"text": text, "file": name}, error)


def _parquet(file: IO[bytes], name: str) -> Iterator[Raw]:
    parquet = load("pyarrow.parquet", f"reading {name}")
    if not file.seekable():
        file = io.BytesIO(file.read())  # standard input
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
        for fields in batch.to_pylist():
            number += 1
            yield Raw(f"{name}:{number}", 0, fields)


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
        if os.path.exists(os.path.join(name, "dataset_dict.json")):
            rows = datasets.load_from_disk(name)[split]
        elif os.path.exists(os.path.join(name, "state.json")):
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(
                name, options.get("config"), split=split, revision=options.get("revision"), streaming=True
            )
        for number, fields in enumerate(rows, 1):
            yield Raw(f"{name}:{number}", 0, fields)
    except (GeneratorExit, MemoryError):
        raise
    except Exception as error:  # the library and those below it raise whatever they like
        raise FileError(
            f"the data set {name} (split {split}) cannot be read: {error}",
            advice="check name, split and network; HF_TOKEN opens private ones",
        ) from error


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
