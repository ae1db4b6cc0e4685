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
import time
from typing import TYPE_CHECKING, Self

from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["RunLock", "one_at_a_time", "start_time"]

FOLDER = "owners"
PATIENCE = 0.25  # seconds
BEGINNING = ".beginning"
BEGINS_WITHIN = 60.0  # seconds: a manifest is written at once, but a large run may have to be thrown away first
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
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # a run that came to nothing has just been removed
                continue
            try:
                if holder := _take_lock(fd):
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
        self._tell(agreed=False)

    def _tell(self, *, agreed: bool) -> None:
        mine = {"pid": os.getpid(), "start": start_time(os.getpid()), "host": socket.gethostname(), "agreed": agreed}
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(mine).encode(), 0)

    def agree(self) -> None:
        """From now on the run is this one's, too: others leave it as it is noted. Raises OSError."""
        self._tell(agreed=True)

    def refuse_everybody(self) -> None:
        """Be the only one who works in the run directory. Raises FileError."""
        self._refuse(lambda name: name != self._name)

    def is_alone(self) -> bool:
        """Whether nobody else has agreed on the run, at this moment: not those who are about to. Raises OSError."""
        try:
            self._refuse(lambda name: name != self._name and self._has_agreed(name), patience=0.0)
        except FileError:
            return False
        return True

    def _has_agreed(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ValueError, AttributeError):
            return bool(json.loads((self._folder / name).read_bytes()).get("agreed", True))
        return False

    def _refuse_other_shardings(self) -> None:
        self._refuse(lambda name: not name.endswith(self._suffix))

    def _refuse(self, which: Callable[[str], bool], patience: float = PATIENCE) -> None:
        for path in self._folder.iterdir():
            if not which(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if holder := _take_lock(fd, patience):
                        raise self._taken(holder, f" as shard {path.name.replace('-of-', ' of ')}")
                    # Its holder has ended. Somebody else may have removed it meanwhile, and a third one made it anew.
                    if os.fstat(fd).st_ino == path.stat().st_ino:
                        path.unlink()
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


@contextlib.contextmanager
def one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Begin a run, or give one up, while no other shard of it does: what one has read, another must not write anew.

    Raises:
        FileError: somebody else takes very long. OSError: the folder cannot be written.
    """
    path = run_dir / BEGINNING
    fd = _take_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def _take_file(path: Path) -> int:
    """Make a file, or wait for whoever has made it to remove it; returns its locked descriptor."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _take_lock(fd, BEGINS_WITHIN):
                raise FileError(
                    f"the run directory {path.parent} is in use: another process is about to begin, and does not",
                    advice=f"stop that process (`fuser {path}` tells which it is), and run the same command again",
                )
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _take_lock(fd: int, patience: float = PATIENCE) -> str:
    """Lock a file; returns who holds it, in words, and nothing where that worked.

    Whoever starts looks whether files are held, and holds them himself for a moment: that is waited for.
    """
    give_up = time.monotonic() + patience
    while True:
        is_ours = _lock(fd)
        # Where there are locks, only the lock itself is a leave: its holder may end between two looks at it.
        if is_ours or not (holder := _holder(fd, knows=is_ours is not None)):
            return ""
        if time.monotonic() >= give_up:
            return holder
        time.sleep(0.01)


def _lock(fd: int) -> bool | None:
    """Lock a file; whether that worked. None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        raise
    return True


def _holder(fd: int, *, knows: bool) -> str:
    """Who holds a lock, in words; empty for nobody: a holder that has ended, where locks do not tell.

    Args:
        knows: whether the lock has told that somebody holds it.
    """
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        pid, start, host = int(owner["pid"]), owner["start"], owner["host"]
    except (ValueError, KeyError, TypeError):
        return "another process" if knows else ""
    if not knows and host == socket.gethostname() and start_time(pid) != start:
        return ""
    return f"process {pid} on {host}"
