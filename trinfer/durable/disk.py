"""The system calls that change a disk, in one place: every one of them can fail, and tests make them fail.

Rule: what has failed once is not tried again on the same descriptor. After a failed fsync the kernel may have dropped
the pages and call the next one good (https://wiki.postgresql.org/wiki/Fsync_Errors), so that only a fresh look at the
file, by the next run, tells what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Disk", "advice_for", "unfinished", "write_file"]

PRIVATE = 0o600


class Disk:
    """Thin names for the calls of `os`; all may raise OSError."""

    def open(self, path: Path, flags: int, mode: int = PRIVATE) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write_all(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        """Write everything: a disk that is nearly full takes a part."""
        view = memoryview(data)
        while view:
            view = view[self.write(fd, view) :]

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        """Bring what was written to the disk, with what is needed to find it again."""
        os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)

    def sync_folder(self, folder: Path) -> None:
        """A new name is certain only once its folder is on the disk, too."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that know no such thing
                raise
        finally:
            os.close(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def remove(self, path: Path) -> None:
        os.unlink(path)
        self.sync_folder(path.parent)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)


def write_file(path: Path, data: bytes, disk: Disk | None = None, mode: int = PRIVATE) -> None:
    """Write a small file whole or not at all, and bring it to the disk. Raises OSError."""
    disk = disk or Disk()
    with unfinished(path, disk, mode) as fd:
        disk.write_all(fd, data)


@contextlib.contextmanager
def unfinished(path: Path, disk: Disk, mode: int = PRIVATE) -> Iterator[int]:
    """A descriptor to write a file through, which gets its name at the end, and is gone if there is no end."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    fd = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            yield fd
            disk.sync(fd)
        finally:
            os.close(fd)
        disk.replace(temporary, path)
        disk.sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def advice_for(error: OSError) -> str:
    """What a user can do about a failure of the disk."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room (the disk or your quota is full), and run the same command again"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the folder writable, or choose another, and run the same command again"
        case errno.EIO:
            return "check the disk (dmesg, smartctl); what was finished before is kept; run the same command again"
        case _:
            return "run the same command again once the cause is removed; what was finished is kept"
