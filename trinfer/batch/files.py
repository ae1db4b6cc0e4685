"""JSONL files: reading lines in a thread, writing them as they come.

Rules: blocking calls happen in threads. An output file has its name only when it is whole: until then it is
``NAME.partial``, so that nobody takes the half for the whole, and what was paid for is still there after a crash.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import trio

from trinfer.batch.rows import InvalidRow, PromptOptions, Row, parse_row
from trinfer.errors import TrinferError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FileError", "JsonlReader", "JsonlWriter"]

LONGEST_LINE = 64 * 2**20  # bytes
BATCH_BYTES = 1 * 2**20
BATCH_LINES = 256


class FileError(TrinferError):
    """An input or output file cannot be used: missing, a folder, no permission, full disk, …"""


def _sync_folder(folder: Path) -> None:
    """A new name is only certain once its folder is on the disk, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that know no such thing
            raise
    finally:
        os.close(fd)


class JsonlReader:
    """The rows of one JSONL file, or of standard input for ``-``.

    Raises:
        FileError: at construction, when it cannot be opened.
    """

    def __init__(self, path: str, options: PromptOptions) -> None:
        self._options = options
        self._name = "stdin" if path == "-" else os.path.basename(path)
        self._number = 0
        self.total_bytes: int | None = None
        try:
            self._file: IO[bytes] = os.fdopen(os.dup(0), "rb") if path == "-" else open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise FileError(
                f"the input {path} cannot be read: {error.strerror}",
                advice="give a JSONL file, or - for standard input",
            ) from error
        status = os.fstat(self._file.fileno())
        if stat.S_ISREG(status.st_mode):
            self.total_bytes = status.st_size

    async def read(self, rows: trio.MemorySendChannel[Row]) -> None:
        """Send every row; returns at the end of the file. Blank lines are skipped.

        Raises:
            FileError: reading failed.

        Cancelled: a read of a terminal or pipe is abandoned.
        """
        async with rows:
            while batch := await trio.to_thread.run_sync(self._read_batch, abandon_on_cancel=True):
                for row in batch:
                    await rows.send(row)

    def _read_batch(self) -> list[Row]:
        batch: list[Row] = []
        size = 0
        while size < BATCH_BYTES and len(batch) < BATCH_LINES:
            try:
                line = self._file.readline(LONGEST_LINE)
            except OSError as error:
                raise FileError(f"reading {self._name} failed: {error.strerror}") from error
            if not line:
                break
            self._number += 1
            place = f"{self._name}:{self._number}"
            size += len(line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                size += self._skip_line()
                batch.append(
                    Row(place, size, error=InvalidRow(f"{place}: the line is longer than {LONGEST_LINE} bytes"))
                )
            elif line.strip():
                batch.append(parse_row(line, place, self._options))
        return batch

    def _skip_line(self) -> int:
        skipped = 0
        while line := self._file.readline(BATCH_BYTES):
            skipped += len(line)
            if line.endswith(b"\n"):
                break
        return skipped

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


class JsonlWriter:
    """Writes lines to a file, or to standard output for ``-``.

    Args:
        path: the file; it must not exist unless ``overwrite``.
        source: the input, which is never overwritten.

    Raises:
        FileError: it exists, or cannot be written.
    """

    def __init__(self, path: str, *, overwrite: bool = False, source: str | None = None) -> None:
        self._path: Path | None = None
        self._fd = -1
        self.unfinished: Path | None = None
        try:
            if path == "-":
                self._fd = os.dup(1)
                return
            target = Path(path)
            if not target.name:
                raise FileError(f"the output {path!r} is a folder", advice="give the name of a file")
            if source not in {None, "-"} and target.exists() and target.samefile(str(source)):
                raise FileError(f"the output {path} is the input", advice="give another name")
            if target.exists() and not target.is_file() and not target.is_dir():
                self._fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)  # a pipe or device has no partial form
                return
            unfinished = target.with_name(target.name + ".partial")
            for existing in (target, unfinished):
                if existing.exists() and (existing.is_dir() or not overwrite):
                    what = "is a folder" if existing.is_dir() else "exists already"
                    raise FileError(
                        f"the output {existing} {what}",
                        cause="it is what an unfinished run has left" if existing == unfinished else None,
                        advice="give another name" if existing.is_dir() else "give another name, or --overwrite",
                    )
            self._fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._path, self.unfinished = target, unfinished
        except OSError as error:
            raise FileError(
                f"the output {path} cannot be written: {error.strerror}", advice="check the folder and its permissions"
            ) from error

    async def write(self, lines: Sequence[bytes]) -> None:
        """Write complete lines.

        Raises:
            FileError: the disk is full, …; what was written before is kept.
        """
        await trio.to_thread.run_sync(partial(self._write, b"".join(lines)))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise self._error("writing", error) from error

    async def finish(self) -> None:
        """All rows are written: bring them to the disk, and give the file its name.

        Raises:
            FileError: as `write`.
        """
        await trio.to_thread.run_sync(self._finish)

    def _finish(self) -> None:
        if self._path is None or self.unfinished is None:
            return
        try:
            os.fsync(self._fd)
            self.unfinished.replace(self._path)
            self.unfinished = None
            _sync_folder(self._path.parent)
        except OSError as error:
            raise self._error("finishing", error) from error

    def _error(self, doing: str, error: OSError) -> FileError:
        where = self.unfinished or "the output"
        return FileError(
            f"{doing} {where} failed: {error.strerror}",
            advice="make room, or write elsewhere; the rows written so far are kept" if self.unfinished else None,
        )

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            if self.unfinished is not None and os.fstat(self._fd).st_size == 0:
                self.unfinished.unlink(missing_ok=True)  # nothing to keep
                self.unfinished = None
            os.close(self._fd)
            self._fd = -1
