"""Lines of JSON to a file, in the format that its name tells. Blocking: for a thread.

Rule: a file has its name only when it is whole. Until then a local file is ``NAME.partial``; a remote one appears when
its upload is complete. Pipes, devices and standard output have no such thing, and get the lines as they come.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from trinfer.data.extras import load
from trinfer.data.files import STANDARD, compression_of, format_of, is_remote
from trinfer.durable.disk import Disk, advice_for
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OUTPUT_FORMATS", "OutputFile", "check_output", "is_stream", "output_format"]

OUTPUT_FORMATS = ("jsonl", "parquet")
PARQUET_ROWS = 8192
COMPRESSION_LEVEL = {"gz": 6, "zst": 3}


def output_format(path: str, format: str | None = None) -> str:  # noqa: A002  # the name of the option
    """The format of an output.

    Raises:
        ConfigError: it is not one that trinfer writes.
    """
    found = format or format_of(path) or "jsonl"
    if found not in OUTPUT_FORMATS:
        raise ConfigError(f"the output {path} would be {found}: allowed are {', '.join(OUTPUT_FORMATS)}")
    return found


def is_stream(path: str) -> bool:
    """Standard output, a pipe or a device: lines that are gone once they are written."""
    return path == STANDARD or (not is_remote(path) and Path(path).exists() and not _is_plain(Path(path)))


def _is_plain(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def check_output(path: str, inputs: list[str]) -> None:
    """Refuse outputs that cannot be, before an engine starts.

    Raises:
        FileError: it is a folder, the input, or its folder is missing.
    """
    if path == STANDARD or is_remote(path):
        return
    target = Path(path)
    if not target.name or target.is_dir():
        raise FileError(f"the output {path!r} is a folder", advice="give a file, or FOLDER/ for a folder of parts")
    for written in (target, Path(f"{os.path.realpath(path)}.partial")):
        if written.exists() and any(os.path.exists(each) and written.samefile(each) for each in inputs):
            raise FileError(f"the output {path} would overwrite the input {written}", advice="give another name")
    if not target.parent.is_dir():
        raise FileError(f"the output {path} cannot be written: its folder does not exist", advice="make it first")


class _Encoder(Protocol):
    """From lines of JSON to the bytes of a format."""

    def write(self, lines: bytes) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class OutputFile:
    """One output file.

    Args:
        path: a file, a remote path, or ``-`` for standard output.
        format: "jsonl" or "parquet"; by default what the name tells.

    Raises:
        FileError: it cannot be written. ConfigError: its format cannot.
    """

    def __init__(self, path: str, *, format: str | None = None, disk: Disk | None = None) -> None:  # noqa: A002
        self._disk = disk or Disk()
        self._path = path
        self._stack = contextlib.ExitStack()
        self._finished = self._begun = self._was_there = False
        self.partial: Path | None = None
        kind = output_format(path, format)
        try:
            self._raw = self._open()
            compression = compression_of(path)
            self._encoder: _Encoder
            if kind == "parquet":
                self._encoder = _ParquetEncoder(self._raw)
            else:
                self._encoder = _LineEncoder(self._raw, compression)
        except OSError as error:
            self.close()
            raise self._error(error, "opening") from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> IO[bytes]:
        if self._path == STANDARD:
            return self._stack.enter_context(os.fdopen(os.dup(1), "wb", buffering=0))
        if is_remote(self._path):
            fsspec = load("fsspec", f"writing {self._path}")
            return cast("IO[bytes]", fsspec.open(self._path, "wb").open())
        if is_stream(self._path):
            return self._stack.enter_context(open(self._path, "wb", buffering=0))
        # A link stays one: what it points to is replaced.
        self._target = Path(os.path.realpath(self._path))
        self.partial = Path(f"{self._target}.partial")
        self._was_there = self.partial.exists()
        # What an earlier run has left is given up only when there is something to write.
        fd = self._disk.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        return cast("IO[bytes]", self._stack.enter_context(io.BufferedWriter(_DiskFile(fd, self._disk), 1 << 18)))

    def write(self, lines: bytes) -> None:
        """Write whole lines.

        Raises:
            FileError: the disk is full, ….
        """
        with self._mapped("writing"):
            self._begin()
            self._encoder.write(lines)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            if self.partial is not None:
                self._disk.truncate(self._raw.fileno(), 0)

    def flush(self) -> None:
        """Hand everything to the system. Raises FileError."""
        with self._mapped("writing"):
            self._raw.flush()

    def finish(self) -> None:
        """Bring everything to the disk, and give the file its name. Raises FileError."""
        with self._mapped("finishing"):
            self._begin()
            self._encoder.finish()
            self._raw.flush()
            if self.partial is not None:
                self._disk.sync(self._raw.fileno())
                self._disk.replace(self.partial, self._target)
                self._disk.sync_folder(self._target.parent)
            elif is_remote(self._path):
                self._raw.close()  # completes the upload
            self.partial = None
            self._finished = True

    def close(self, *, keep: bool = False) -> None:
        """Idempotent. What was not finished is removed, or kept as ``NAME.partial``."""
        if hasattr(self, "_encoder"):
            with contextlib.suppress(OSError, ValueError, FileError):
                self._encoder.close()
        with contextlib.suppress(OSError):
            if not self._finished and is_remote(self._path) and hasattr(self._raw, "discard"):
                self._raw.discard()
        with contextlib.suppress(OSError):  # a full disk has been told by write
            self._stack.close()
        if self.partial is not None and (self._begun or not self._was_there):
            with contextlib.suppress(OSError):
                if not keep or self.partial.stat().st_size == 0:
                    self.partial.unlink(missing_ok=True)
                    self.partial = None

    @contextlib.contextmanager
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(error, doing) from error
        except (FileError, ConfigError):
            raise
        except Exception as error:
            if not is_remote(self._path):
                raise
            raise FileError(f"{doing} the output {self._path} failed: {error}") from error

    def _error(self, error: OSError, doing: str) -> FileError:
        name = "standard output" if self._path == STANDARD else f"the output {self._path}"
        return FileError(f"{doing} {name} failed: {error.strerror or error}", advice=advice_for(error))


class _DiskFile(io.RawIOBase):
    """A descriptor whose writes go through a `Disk`."""

    def __init__(self, fd: int, disk: Disk) -> None:
        self._fd, self._disk = fd, disk

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:  # noqa: ANN401  # whatever holds bytes
        return self._disk.write(self._fd, memoryview(data))

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


class _LineEncoder:
    """JSONL, compressed or not."""

    def __init__(self, raw: IO[bytes], compression: str | None) -> None:
        self._raw = raw
        self._file: Any = None
        if compression == "gz":
            # No name and no time: the same rows give the same bytes.
            self._file = gzip.GzipFile("", "wb", COMPRESSION_LEVEL["gz"], raw, mtime=0)
        elif compression == "zst":
            zstandard = load("zstandard", "writing .zst")
            compressor = zstandard.ZstdCompressor(COMPRESSION_LEVEL["zst"], write_checksum=True)
            self._file = compressor.stream_writer(raw, closefd=False)

    def write(self, lines: bytes) -> None:
        if self._file is not None:
            self._file.write(lines)
            return
        view = memoryview(lines)
        while view:
            view = view[self._raw.write(view) :]

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()  # what is kept of an unfinished file is readable to its end


class _ParquetEncoder:
    """Parquet. Its columns are known only when all rows are: until then, rows wait in an unnamed file.

    A field that has values of types that do not go together becomes a column of JSON texts.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._pyarrow = load("pyarrow", "writing Parquet")
        self._parquet = load("pyarrow.parquet", "writing Parquet")
        self._raw = raw
        self._rows = tempfile.TemporaryFile()  # noqa: SIM115  # as long-lived as the encoder
        self._tail: list[bytes] = []
        self._types: dict[str, Any] = {}  # None for columns of JSON

    def write(self, lines: bytes) -> None:
        self._rows.write(lines)
        self._tail += lines.splitlines()
        if len(self._tail) >= PARQUET_ROWS:
            self._learn()

    def _learn(self) -> None:
        """See which types the fields of the last rows have."""
        columns: dict[str, list[Any]] = {}
        for row in map(json.loads, self._tail):
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        self._tail = []
        for name, values in columns.items():
            self._types[name] = self._common(name, values)

    def _common(self, name: str, values: list[Any]) -> Any:  # noqa: ANN401  # a type of pyarrow
        pyarrow = self._pyarrow
        if name in self._types and self._types[name] is None:
            return None
        try:
            found = pyarrow.array(values).type
            if name not in self._types:
                return found
            schemas = [pyarrow.schema([("x", each)]) for each in (self._types[name], found)]
            return pyarrow.unify_schemas(schemas, promote_options="permissive").field("x").type
        except (pyarrow.ArrowException, OverflowError, TypeError):
            return None

    def finish(self) -> None:
        self._learn()
        pyarrow = self._pyarrow
        texts = {name for name, type_ in self._types.items() if type_ is None or _is_empty_struct(type_)}
        schema = pyarrow.schema([(n, pyarrow.string() if n in texts else t) for n, t in self._types.items()])
        self._rows.seek(0)
        with self._parquet.ParquetWriter(self._raw, schema, compression="zstd") as writer:
            while rows := self._rows.readlines(8 << 20):
                parsed = [json.loads(row) for row in rows]
                columns = []
                for name, type_ in zip(schema.names, schema.types, strict=True):
                    values = [row.get(name) for row in parsed]
                    if name in texts:
                        values = [None if value is None else json.dumps(value) for value in values]
                    columns.append(pyarrow.array(values, type=type_))
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    def close(self) -> None:
        self._rows.close()


def _is_empty_struct(type_: Any) -> bool:  # noqa: ANN401  # a type of pyarrow
    """Parquet knows no objects without fields."""
    text = str(type_)
    return "struct<>" in text
