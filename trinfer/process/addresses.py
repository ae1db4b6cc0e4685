"""Addresses for engines: ports and unix sockets that no two trinfer processes choose at the same time.

Rules:
- A port is leased by a lock on a file, held for as long as the engine may use it: between looking at a free port and
  an engine's bind lie minutes of loading. The kernel drops the lock when the holder dies, however it dies.
- Lock files are left in place. To unlink one that another process has just opened would give two owners to a port.
- Ports lie outside the kernel's ephemeral range, where any outgoing connection could take them, if that is possible.
- Files lie in one folder per user and host, which must be private.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trinfer.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = [
    "PortLease",
    "SocketLease",
    "lease_port",
    "lease_socket",
    "owns_listener",
    "runtime_dir",
    "tcp_listeners",
]

RUNTIME_VARIABLE = "TRINFER_RUNTIME_DIR"
SCANNED = 200  # ports looked at before giving up, as in datatrove
LOWEST, HIGHEST = 3000, 65535
LONGEST_SOCKET_PATH = 103  # sun_path holds 108 bytes on Linux, 104 elsewhere, with the final NUL
LISTEN = "0A"  # the state in /proc/net/tcp, see proc(5)


def runtime_dir() -> Path:
    """The user's private folder for locks and sockets: ``/tmp/trinfer-UID``, or ``TRINFER_RUNTIME_DIR``.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others have access to it.
    """
    # Absolute: engines may work in another folder. Checked below.
    path = Path(os.environ.get(RUNTIME_VARIABLE) or f"/tmp/trinfer-{os.getuid()}").absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"the runtime folder {path} cannot be made: {error.strerror}",
            advice=f"name another one in the environment variable {RUNTIME_VARIABLE}",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"the folder {path} is not private: it must be a folder of this user with mode 0700",
            cause="somebody else has made it, or its mode was changed",
            advice=f"remove it, or name another one in the environment variable {RUNTIME_VARIABLE}",
        )
    return path


# -- ports ----------------------------------------------------------------------------------------------------------


class PortLease:
    """A port that is ours until `release`, or until this process ends."""

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock = lock

    def release(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def lease_port(*, host: str, rank: int = 0, avoid: Collection[int] = ()) -> PortLease:
    """Lease a free port: from a random one, shifted by rank, up to 200 are looked at.

    Args:
        host: address that the engine will bind.
        rank: servers of neighbouring ranks begin at neighbouring ports.
        avoid: ports that have just turned out to be taken.

    Raises:
        ServerError: none of 200 was free.
        ConfigError: the runtime folder is not private.
    """
    locks = runtime_dir() / "ports"
    locks.mkdir(mode=0o700, exist_ok=True)
    for port in _candidates(random.randrange(LOWEST, HIGHEST) + rank, ephemeral_range()):  # no secret
        if port in avoid:
            continue
        lock = _try_lock(locks / f"{port}.lock")
        if lock is None:
            continue
        is_free = False
        try:
            is_free = _is_free(host, port)
        finally:
            if not is_free:
                os.close(lock)
        if is_free:
            return PortLease(port, lock)
    raise ServerError(
        f"no free port was found: {SCANNED} were tried",
        cause="other programs hold them, or many engines are starting at once",
        advice='look with `ss -tln`, or use transport="uds" where the engine can serve on a unix socket',
    )


def ephemeral_range() -> range:
    """Ports that the kernel gives to outgoing connections; empty where that cannot be read."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        return range(0)
    return range(low, high + 1)


def _candidates(start: int, ephemeral: range) -> Iterator[int]:
    """Up to `SCANNED` ports, those outside the ephemeral range unless next to nothing is left outside."""
    allowed = [port for port in range(LOWEST, HIGHEST + 1) if port not in ephemeral]
    if len(allowed) < SCANNED:
        allowed = list(range(LOWEST, HIGHEST + 1))
    for step in range(SCANNED):
        yield allowed[(start + step) % len(allowed)]


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_free(host: str, port: int) -> bool:
    """Whether the port can be bound on the host, and on all addresses, where some engines bind anyway.

    Without SO_REUSEPORT: engines that set it would share the port with each other, and nobody would notice.
    """
    for address in dict.fromkeys((host, "0.0.0.0")):  # bound for a moment, never listened on
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections that have just been closed do not keep an engine from binding, so they must not keep us.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except socket.gaierror:  # a name that cannot be resolved here: the engine will say so better
                continue
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise ConfigError(
                        f"this machine has no address {address}: allowed as host are its own addresses",
                        advice="set InferenceConfig.host to 127.0.0.1, 0.0.0.0, or an address that `ip addr` shows",
                    ) from error
                return False
    return True


# -- unix sockets -----------------------------------------------------------------------------------------------------


class SocketLease:
    """A path for a unix socket in a folder of its own, which `release` removes with all that is in it."""

    def __init__(self, folder: Path, name: str, lock: int) -> None:
        self.path = str(folder / name)
        self._folder = folder
        self._lock = lock

    def release(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def lease_socket(name: str = "engine.sock") -> SocketLease:
    """A path for a unix socket that only this user can reach. Folders of dead owners are swept by the way.

    Args:
        name: of the socket, in its folder.

    Raises:
        ConfigError: the runtime folder is not private, or its path is too long for a socket.
    """
    sockets = runtime_dir() / "sockets"
    sockets.mkdir(mode=0o700, exist_ok=True)
    # New folders are locked before a sweep can see them unlocked: whoever makes or sweeps holds the parent's lock.
    with _locked(sockets / ".lock"):
        _sweep(sockets)
        folder = Path(tempfile.mkdtemp(dir=sockets))
        lock = _try_lock(folder / "owner.lock")
    assert lock is not None
    lease = SocketLease(folder, name, lock)
    if len(os.fsencode(lease.path)) > LONGEST_SOCKET_PATH:
        lease.release()
        raise ConfigError(
            f"the path {lease.path} is too long for a unix socket: allowed are {LONGEST_SOCKET_PATH} bytes",
            advice=f"name a folder with a shorter path in {RUNTIME_VARIABLE}, or use transport='tcp'",
        )
    return lease


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # held for microseconds
        yield
    finally:
        os.close(fd)


def _sweep(sockets: Path) -> None:
    for folder in sockets.iterdir():
        if not folder.is_dir():
            continue
        lock = _try_lock(folder / "owner.lock")
        if lock is not None:  # nobody holds it: its owner is dead
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


# -- who listens ------------------------------------------------------------------------------------------------------


def tcp_listeners(port: int) -> set[int]:
    """Inodes of the sockets that listen on a port, in this network namespace; empty without /proc."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(int(fields[9]))
    return inodes


def owns_listener(pids: Collection[int], port: int) -> bool | None:
    """Whether every socket that listens on the port belongs to one of the processes.

    One that does not is enough for False: engines that set SO_REUSEPORT share a port, and each connection goes to a
    random one of them. None where nobody listens, or this cannot be told (no /proc, processes of another user).
    """
    wanted = tcp_listeners(port)
    if not wanted:
        return None
    unreadable = False
    for pid in pids:
        try:
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(fd.path)
                    if target.startswith("socket:["):
                        wanted.discard(int(target[8:-1]))
        except PermissionError:
            unreadable = True
        except OSError:  # it has gone
            continue
        if not wanted:
            return True
    return None if unreadable else False
