"""Lines of JSON to a file, in the format that its name tells. Blocking: for a thread.

Rule: a file has its name only when it is whole. Until then a local file is ``NAME.partial``; a remote one appears when
its upload is complete, as object stores do it. Pipes, devices and standard output have no such thing, and get the lines
as they come.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import io
import os
import select
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from trinfer.data.extras import load
from trinfer.data.files import STANDARD, compression_of, format_of, is_remote, local_path
from trinfer.data.parquet import ParquetEncoder
from trinfer.durable.disk import Disk, advice_for
from trinfer.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "OUTPUT_FORMATS",
    "OutputFile",
    "check_format",
    "check_output",
    "check_writable",
    "is_stream",
    "output_format",
]

OUTPUT_FORMATS = ("jsonl", "parquet")
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


def check_format(path: str, format: str | None = None) -> None:  # noqa: A002  # the name of the option
    """Refuse a format that cannot be written, before an engine starts.

    Raises:
        ConfigError: it is not one that trinfer writes, or the library for it is not installed.
    """
    if output_format(path, format) == "parquet":
        if compression_of(path) is not None:  # readers would undo what nobody has done
            raise ConfigError(
                f"the output {path}: Parquet is compressed within; allowed is a name that ends with .parquet"
            )
        load("pyarrow.parquet", "writing Parquet")
    elif compression_of(path) == "zst":
        load("zstandard", "writing .zst")
    if is_remote(local_path(path)):
        fsspec = load("fsspec", f"writing {path}")
        try:
            fsspec.get_filesystem_class(path.partition("://")[0])
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the output {path} cannot be written: {error}") from error


def is_stream(path: str) -> bool:
    """Standard output, a pipe or a device: lines that are gone once they are written."""
    return path == STANDARD or (not is_remote(path) and os.path.exists(path) and not _is_plain(Path(path)))


def _is_plain(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def check_output(path: str, inputs: list[str]) -> None:
    """Refuse outputs that cannot be, before an engine starts.

    Raises:
        FileError: it is a folder, the input, or its folder is missing or cannot be written.
    """
    path = local_path(path)
    if path != STANDARD and path in inputs:
        raise FileError(f"the output {path} would overwrite the input", advice="give another name")
    if path == STANDARD or is_remote(path):
        return
    target = Path(path)
    try:
        if not target.name or target.is_dir():
            raise FileError(f"the output {path!r} is a folder", advice="give a file, or FOLDER/ for a folder of parts")
        for written in (target, Path(f"{os.path.realpath(path)}.partial")):
            if written.exists() and any(os.path.exists(each) and written.samefile(each) for each in inputs):
                raise FileError(f"the output {path} would overwrite the input {written}", advice="give another name")
    except OSError as error:  # a name that is too long, for instance
        raise FileError(
            f"the output {path} cannot be written: {error.strerror}",
            cause="it is written as NAME.partial at first",
            advice="give another name",
        ) from error
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileError(f"the output {path} cannot be written: its folder does not exist", advice="make it first")
    check_writable(path, target if is_stream(path) else folder)


def check_writable(path: str, place: Path) -> None:
    """Refuse an output whose folder, or pipe, cannot be written. Raises FileError."""
    if not os.access(place, os.W_OK):
        raise FileError(
            f"the output {path} cannot be written: {place} is not writable",
            cause="its rights do not allow it, or its disk is read-only",
            advice="make the folder writable, or choose another",
        )


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
        self._path = path = local_path(path)
        self._stack = contextlib.ExitStack()
        self._finished = self._begun = self._was_there = False
        self.partial: Path | None = None
        self._raw: IO[bytes] | None = None
        self._encoder: _Encoder | None = None
        kind = output_format(path, format)
        try:
            with self._mapped("opening"):
                self._raw = self._open()
                if kind == "parquet":
                    self._encoder = ParquetEncoder(self._raw, self.partial.parent if self.partial else None)
                else:
                    self._encoder = _LineEncoder(self._raw, compression_of(path))
        except BaseException:
            self.close()
            raise

    def _open(self) -> IO[bytes]:
        if self._path == STANDARD:
            return self._stream(os.dup(1))
        if is_remote(self._path):
            self._fsspec = load("fsspec", f"writing {self._path}")
            return cast("IO[bytes]", self._fsspec.open(self._path, "wb").open())
        if is_stream(self._path):
            # Without O_CREAT: it is there, and if it goes, a file must not take its place.
            return self._stream(os.open(self._path, os.O_WRONLY | os.O_CLOEXEC))
        # A link stays one: what it points to is replaced.
        self._target = Path(os.path.realpath(self._path))
        partial = Path(f"{self._target}.partial")
        self._was_there = partial.exists()
        fd = self._open_partial(partial)
        file = self._stack.enter_context(io.BufferedWriter(_DiskFile(fd, self._disk), 1 << 18))
        self.partial = partial
        with contextlib.suppress(OSError):  # what was private stays so
            os.fchmod(fd, stat.S_IMODE(self._target.stat().st_mode) & 0o777)
        return cast("IO[bytes]", file)

    def _stream(self, fd: int) -> IO[bytes]:
        return cast("IO[bytes]", self._stack.enter_context(_StreamFile(fd)))

    def _open_partial(self, partial: Path) -> int:
        """Open the file, for us alone: what two processes write into one is neither's output."""
        while True:
            # What an earlier run has left is given up only when there is something to write.
            fd = self._disk.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_ino == partial.stat().st_ino:
                    return fd
                os.close(fd)  # it has just got its name
            except FileNotFoundError:
                os.close(fd)
            except BlockingIOError as error:
                os.close(fd)
                raise FileError(
                    f"the output {self._path} is being written by another process",
                    advice="wait for it or stop it, or give another name",
                ) from error
            except OSError:  # a file system without locks
                return fd

    def write(self, lines: bytes) -> None:
        """Write whole lines.

        Raises:
            FileError: the disk is full, ….
        """
        assert self._encoder is not None
        with self._mapped("writing"):
            self._begin()
            self._encoder.write(lines)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            if self.partial is not None:
                assert self._raw is not None
                self._disk.truncate(self._raw.fileno(), 0)

    def flush(self) -> None:
        """Hand everything to the system, but for what a compressor holds back. Raises FileError."""
        assert self._raw is not None
        with self._mapped("writing"):
            self._raw.flush()

    def finish(self) -> None:
        """Bring everything to the disk, and give the file its name. Raises FileError."""
        assert self._raw is not None
        assert self._encoder is not None
        with self._mapped("finishing"):
            self._begin()
            self._encoder.finish()
            self._raw.flush()
            if self.partial is not None:
                self._disk.sync(self._raw.fileno())
                self._disk.replace(self.partial, self._target)
                self.partial = None  # it has its name, whatever becomes of the folder
                self._disk.sync_folder(self._target.parent)
            elif is_remote(self._path):
                self._raw.close()  # completes the upload
            self._finished = True

    def close(self, *, keep: bool = False) -> None:
        """Idempotent. What was not finished is removed, or kept as ``NAME.partial``."""
        if self._encoder is not None:
            # A full disk has been told by write; remote file systems have errors of their own.
            with contextlib.suppress(Exception):
                self._encoder.close()
        if self._raw is not None and is_remote(self._path) and not self._finished:
            self._discard(self._raw)
        with contextlib.suppress(OSError):
            self._stack.close()
        if self.partial is not None and (self._begun or not self._was_there):
            with contextlib.suppress(OSError):
                if not keep or self.partial.stat().st_size == 0:
                    self.partial.unlink(missing_ok=True)
                    self.partial = None

    def _discard(self, raw: IO[bytes]) -> None:
        """Give an upload up."""
        with contextlib.suppress(Exception):
            raw.discard()  # type: ignore[attr-defined]  # fsspec's
        if isinstance(raw, self._fsspec.spec.AbstractBufferedFile):
            raw.closed = True  # or it would be completed when its memory is freed
            return
        with contextlib.suppress(Exception):
            raw.close()
        with contextlib.suppress(Exception):  # file systems that show a file while it is written
            filesystem, name = self._fsspec.core.url_to_fs(self._path)
            filesystem.rm_file(name)

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
            raise FileError(
                f"{doing} the output {self._path} failed: {error or type(error).__name__}",
                advice="install the library that it names"
                if isinstance(error, ImportError)
                else "check the name, the network and your rights there, and run the same command again",
            ) from error

    def _error(self, error: OSError, doing: str) -> FileError:
        name = "standard output" if self._path == STANDARD else f"the output {self._path}"
        advice = advice_for(error)
        if error.errno == errno.EPIPE:  # nothing is kept of what goes there
            advice = "give it a reader that reads to the end; or write to a file, which a run can continue"
        return FileError(f"{doing} {name} failed: {error.strerror or error}", advice=advice)


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


class _StreamFile(_DiskFile):
    """A pipe, a device or standard output. It takes everything: who compresses does not look at how much was taken."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, Disk())
        self._at = 0

    def tell(self) -> int:
        return self._at  # what a pipe does not know, and Parquet asks for

    def write(self, data: Any) -> int:  # noqa: ANN401  # whatever holds bytes
        view = memoryview(data).cast("B")
        while view:
            try:
                view = view[super().write(view) :]
            except BlockingIOError:  # whoever shares it may have made it non-blocking
                select.select([], [self._fd], [])
        self._at += memoryview(data).nbytes
        return memoryview(data).nbytes


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
