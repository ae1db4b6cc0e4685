"""Taking damage out of a journal: what is whole is copied to a fresh segment, which takes the old one's name.

What was in the damaged parts counts as never done. Blocking; reads everything, so that nothing is left to be found.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trinfer.durable.disk import advice_for, unfinished
from trinfer.durable.frames import HEAD_BYTES, Corrupt, find_salt, head_of, read_salt, scan
from trinfer.durable.journal import read_segments
from trinfer.errors import FileError

if TYPE_CHECKING:
    from pathlib import Path

    from trinfer.durable.disk import Disk

__all__ = ["mend"]

CHUNK = 1 << 20


def mend(folder: Path, disk: Disk) -> int:
    """Repair the journal in a folder; returns how many damaged parts there were. Nobody may be writing to it.

    Raises:
        FileError: it cannot be read or written, or holds something else.
    """
    count = 0
    for segment in read_segments(folder):
        try:
            count += _mend(segment.path, disk)
        except OSError as error:
            raise FileError(
                f"repairing the journal {segment.path} failed: {error.strerror}", advice=advice_for(error)
            ) from error
        except ValueError as error:
            raise FileError(f"the journal {segment.path} cannot be repaired: {error}") from error
    return count


def _mend(path: Path, disk: Disk) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            salt, damaged = read_salt(fd), 0
        except Corrupt:
            salt, damaged = find_salt(fd), 1
            if salt is None:  # nothing whole follows its head
                disk.remove(path)
                return damaged
        if salt is None:
            return 0  # a crash in the moment of its beginning: the journal itself deals with that
        whole: list[tuple[int, int]] = []
        start = HEAD_BYTES
        while True:
            try:
                for frame in scan(fd, salt, start=start, verify=True):
                    whole.append((frame.offset, frame.end))  # noqa: PERF401  # what came before damage counts
                break
            except Corrupt as damage:
                damaged += 1
                start = damage.resumes
        if damaged:
            with unfinished(path, disk) as copy:
                disk.write_all(copy, head_of(salt))
                for begin, end in whole:
                    for at in range(begin, end, CHUNK):
                        disk.write_all(copy, os.pread(fd, min(CHUNK, end - at), at))
        return damaged
    finally:
        os.close(fd)
