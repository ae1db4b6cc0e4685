"""Who works in a run directory: one process per shard, and all with the same number of shards.

The lock is an advisory one of the kernel (flock), which ends with its holder in any way that a process can end, also
on another host of a shared file system. Who holds it stands in the file, for the message. Where the file system has no
such locks, the holder's pid and start time decide on the same host, and another host's word is taken for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from typing import TYPE_CHECKING, Self

from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["RunLock", "start_time"]

FOLDER = "owners"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def start_time(pid: int) -> str:
    """When a process was started, in the kernel's words; empty where it is gone or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


class RunLock:
    """The right to work on one shard of a run directory; a context manager.

    Raises:
        FileError: somebody else has it, or works on the run with another number of shards; or the folder cannot be
            written.
    """

    def __init__(self, run_dir: Path, rank: int = 0, world_size: int = 1) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / FOLDER
        self._name = f"{rank:05d}-of-{world_size:05d}"
        self._suffix = self._name[5:]
        self._fd = -1

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._take()
            self._refuse_other_shardings()
        except OSError as error:
            self.release()
            raise FileError(
                f"the run directory {self._run_dir} cannot be used: {error.strerror}",
                advice="make it writable, or choose another with --run-dir",
            ) from error
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def _take(self) -> None:
        path = self._folder / self._name
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not _lock(fd) and (holder := _holder(fd)):
                    raise self._taken(holder)
                # A holder that ended removed its file: what we have locked may be no longer the one with the name.
                if os.fstat(fd).st_ino != path.stat().st_ino:
                    raise FileNotFoundError
            except FileNotFoundError:
                os.close(fd)
                continue
            except BaseException:
                os.close(fd)
                raise
            self._fd = fd
            break
        mine = {"pid": os.getpid(), "start": start_time(os.getpid()), "host": socket.gethostname()}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(mine).encode(), 0)

    def refuse_everybody(self) -> None:
        """Be the only one who works in the run directory. Raises FileError."""
        self._refuse(lambda name: name != self._name)

    def _refuse_other_shardings(self) -> None:
        self._refuse(lambda name: not name.endswith(self._suffix))

    def _refuse(self, which: Callable[[str], bool]) -> None:
        for path in self._folder.iterdir():
            if not which(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if not _lock(fd) and (holder := _holder(fd)):
                        raise self._taken(holder, f" as shard {path.name.replace('-of-', ' of ')}")
                    path.unlink()  # its holder has ended
                finally:
                    os.close(fd)

    def _taken(self, holder: str, how: str = "") -> FileError:
        return FileError(
            f"the run directory {self._run_dir} is in use by {holder}{how}",
            advice="wait for that process or stop it; if it is not a trinfer of yours, choose another --run-dir",
        )

    def release(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                (self._folder / self._name).unlink()
            os.close(self._fd)
            self._fd = -1


def _lock(fd: int) -> bool:
    """Lock a file; whether that worked. Where there are no locks, it never does."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES} | NO_LOCKS:
            return False
        raise
    return True


def _holder(fd: int) -> str:
    """Who holds a lock, in words; empty for nobody: a holder that has ended, where locks do not tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        knows = error.errno not in NO_LOCKS
    else:
        fcntl.flock(fd, fcntl.LOCK_UN)
        return ""
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        pid, start, host = int(owner["pid"]), owner["start"], owner["host"]
    except (ValueError, KeyError, TypeError):
        return "another process" if knows else ""
    if not knows and host == socket.gethostname() and start_time(pid) != start:
        return ""
    return f"process {pid} on {host}"
