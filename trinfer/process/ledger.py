"""The ledger: one small file for each server that runs on this host, so that others can see it.

Rules: it is a help, never a need. No server fails because its entry cannot be written. A process is ended because of an
entry only if its start time is the one that the entry names, and its owner's is not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from trinfer.errors import ConfigError
from trinfer.process.addresses import runtime_dir
from trinfer.process.identity import is_alive, pid_space, start_time

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Entry", "Ledger", "entries", "living"]

logger = logging.getLogger(__name__)


@dataclass
class Entry:
    """One server.

    Attributes:
        server: its id, which its processes carry in their environment.
        run: id of its owner, ``PID-STARTTIME``.
        engine, rank, model, state: as in `trinfer.InferenceServer`.
        address: URL or socket path; empty while there is none.
        log: file with the engine's output; empty without one.
        started_at: when the server was entered, in seconds since the epoch.
        restarts, requests: so far; requests are written down every few seconds.
        processes: pid and start time of each of the engine's processes, as seen now and then.
        space: where its pids mean something, see `trinfer.process.identity.pid_space`; empty where nobody has told.
    """

    server: str
    run: str
    engine: str
    rank: int
    model: str
    state: str
    address: str
    log: str
    started_at: float
    restarts: int = 0
    requests: int = 0
    processes: list[list[int]] = field(default_factory=list)
    space: str = ""


# What a damaged or strange file may hold instead ends no command.
KINDS: dict[str, Any] = {
    **dict.fromkeys(("server", "run", "engine", "model", "state", "address", "log", "space"), str),
    **dict.fromkeys(("rank", "restarts", "requests"), int),
    "started_at": (int, float),
    "processes": list,
}


def _folder() -> Path:
    folder = runtime_dir() / "ledger"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Ledger:
    """The entry of one server; trouble with the disk is logged once."""

    def __init__(self) -> None:
        self._troubled = False
        self._written: Path | None = None

    def write(self, entry: Entry) -> None:
        """Make or replace the entry."""
        try:
            path = _folder() / f"{entry.server}.json"
            unfinished = path.with_suffix(f".{os.getpid()}")
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                data = json.dumps(asdict(entry)).encode()
                if os.write(fd, data) < len(data):  # the last block of a disk: half an entry is none
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
            unfinished.replace(path)
            self._written = path
        except (OSError, ConfigError) as error:
            if not self._troubled:
                self._troubled = True
                logger.warning("`trinfer ps` will not show this server: %s", error)
            with contextlib.suppress(OSError, NameError):
                unfinished.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove entries of owners that have gone, and of whose engines nothing is left."""
        with contextlib.suppress(OSError, ConfigError):
            for path, entry in entries():
                if is_alive(entry.run) is False and not living(entry):
                    path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Idempotent."""
        path, self._written = self._written, None
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def living(entry: Entry) -> list[tuple[int, int]]:
    """Pid and start time of those of an entry's processes that still live."""
    pairs = [(each[0], each[1]) for each in entry.processes if isinstance(each, list) and len(each) == 2]
    return [(pid, started) for pid, started in pairs if isinstance(pid, int) and start_time(pid) == started]


def entries() -> list[tuple[Path, Entry]]:
    """All entries with their files; damaged files are left out.

    So are those of other containers and hosts, which may share the folder: whether their owners live cannot be told
    from here.

    Raises:
        ConfigError: the runtime folder is not private.
    """
    found: list[tuple[Path, Entry]] = []
    names = {field.name for field in fields(Entry)}
    here = pid_space()
    for path in sorted(_folder().glob("*.json")):
        try:
            data: Any = json.loads(path.read_bytes())
            entry = Entry(**{key: value for key, value in data.items() if key in names})
            if not all(isinstance(getattr(entry, name), kind) for name, kind in KINDS.items()):
                continue
            if entry.space in {"", here}:
                found.append((path, entry))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found
