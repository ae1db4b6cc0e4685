"""The append-only journal of one shard of a run: what is in it has happened, what is not has not.

Rules: `append` returns when its records are on the disk, and then they are there for good. One process appends (see
`trinfer.durable.lock`). After a failure of the disk nothing more is appended: the next run looks at what is there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trinfer.durable.disk import Disk, advice_for
from trinfer.durable.frames import (
    HEAD_BYTES,
    LARGEST_COUNT,
    Corrupt,
    Frame,
    Record,
    encode_frame,
    new_head,
    read_salt,
    scan,
)
from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Journal", "Segment", "read_segments"]

SEGMENT_BYTES = 256 * 2**20
FRAME_BYTES = 256 * 2**20  # what is more is written as several frames
SUFFIX = ".journal"


@dataclass(frozen=True)
class Segment:
    """One file of a journal."""

    path: Path
    number: int

    def frames(self, *, verify: bool) -> Iterator[Frame]:
        """Every whole frame.

        Args:
            verify: check the bodies, too.

        Raises:
            FileError: it cannot be read, is no journal, or is damaged.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FileError(f"the journal {self.path} cannot be read: {error.strerror}") from error
        try:
            salt = read_salt(fd)
            if salt is not None:
                yield from scan(fd, salt, verify=verify)
        except Corrupt as damage:
            raise self._damaged(damage) from damage
        except OSError as error:
            raise FileError(f"reading the journal {self.path} failed: {error.strerror}") from error
        except ValueError as error:
            raise FileError(f"the journal {self.path} cannot be used: {error}") from error
        finally:
            os.close(fd)

    def read(self, frame: Frame) -> bytes:
        """The bodies of a frame, verified.

        Raises:
            FileError: it cannot be read, or is damaged.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return frame.read(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise FileError(f"reading the journal {self.path} failed: {error.strerror}") from error
        except Corrupt as damage:
            raise self._damaged(damage) from damage

    def read_one(self, offset: int, length: int) -> bytes:
        """One body; not verified by itself. Raises FileError."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(fd, length, offset)
            finally:
                os.close(fd)
        except OSError as error:
            raise FileError(f"reading the journal {self.path} failed: {error.strerror}") from error

    def _damaged(self, damage: Corrupt) -> FileError:
        return FileError(
            f"the journal {self.path} is damaged between bytes {damage.offset} and {damage.resumes}",
            cause="what was written there has changed since: a failing disk, or a program that edited the file",
            advice="run again with --repair: what was in the damaged part is generated anew, all else is kept",
        )


def read_segments(folder: Path) -> list[Segment]:
    """The segments of a journal, oldest first; empty where there are none."""
    numbers = []
    if folder.is_dir():
        for path in folder.iterdir():
            if path.suffix == SUFFIX and path.stem.isdigit():
                numbers.append((int(path.stem), path))  # noqa: PERF401  # to be sorted by number
    return [Segment(path, number) for number, path in sorted(numbers)]


class Journal:
    """Appends to the journal in a folder, which is made where there is none. Blocking; one thread at a time.

    Args:
        segment_bytes: a segment that has grown beyond this is closed, and another begun.

    Raises:
        FileError: the folder or its files cannot be used, or are damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        disk: Disk | None = None,
    ) -> None:
        self.folder = folder
        self._disk = disk or Disk()
        self._limit = segment_bytes
        self._fd = -1
        self._salt = 0
        self._size = 0
        self._failed = False
        self.segment = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            segments = read_segments(folder)
            self.segment = segments[-1].number if segments else 0
            if segments:
                self._take_up(segments[-1])
        except OSError as error:
            self.close()
            raise self._error(error, "opening") from error
        except BaseException:
            self.close()
            raise

    def _take_up(self, segment: Segment) -> None:
        """Go on at the end of the last segment; what a crash has left of a commit is cut off."""
        fd = self._disk.open(segment.path, os.O_RDWR)
        self._fd = fd
        end = HEAD_BYTES
        for frame in segment.frames(verify=True):
            end = frame.end
        salt = read_salt(fd)
        if salt is None:
            # Its head was never finished, so that nothing is in it.
            os.close(fd)
            self._fd = -1
            segment.path.unlink()
            self.segment = segment.number - 1
            return
        if end < os.fstat(fd).st_size:
            self._disk.truncate(fd, end)
            self._disk.sync(fd)
        os.lseek(fd, end, os.SEEK_SET)
        self._salt, self._size = salt, end

    def append(self, records: Sequence[Record]) -> int:
        """Write records, as one commit if they are not huge; they are on the disk when this returns.

        Returns:
            The bytes written.

        Raises:
            FileError: the disk is full, …. Whether the records are there is for the next run to find out; every later
                append of this one fails, too.
        """
        if not records:
            return 0
        if self._failed:
            raise FileError(f"the journal in {self.folder} has failed before", advice="run the same command again")
        try:
            written = sum(self._write_frame(part) for part in _parts(records))
        except OSError as error:
            self._failed = True
            raise self._error(error, "writing") from error
        except BaseException:
            self._failed = True
            raise
        return written

    def _write_frame(self, records: Sequence[Record]) -> int:
        if self._fd < 0 or self._size >= self._limit:
            self._begin_segment()
        written = 0
        for piece in encode_frame(records, self._salt):
            self._disk.write_all(self._fd, piece)
            written += len(piece)
        self._disk.sync(self._fd)
        self._size += written
        return written

    def _begin_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        head, salt = new_head()
        self.segment += 1
        path = self.folder / f"{self.segment:06d}{SUFFIX}"
        self._fd = self._disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._disk.write_all(self._fd, head)
        self._disk.sync(self._fd)
        self._disk.sync_folder(self.folder)
        self._salt, self._size = salt, len(head)

    def _error(self, error: OSError, doing: str) -> FileError:
        return FileError(
            f"{doing} the journal in {self.folder} failed: {error.strerror}",
            cause="what was finished before is on the disk, and is kept",
            advice=advice_for(error),
        )

    def close(self) -> None:
        """Idempotent. Nothing is left to write."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parts(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """The records in portions that a frame can take."""
    begin = size = 0
    for at, record in enumerate(records):
        if at > begin and (size + len(record.body) > FRAME_BYTES or at - begin == LARGEST_COUNT):
            yield records[begin:at]
            begin, size = at, 0
        size += len(record.body)
    yield records[begin:]
