"""What a test may not leave behind: processes, file descriptors, threads, sockets of the runtime folder.

Every process that a test starts inherits `VARIABLE` with the session's value, and keeps it when it daemonises, so that
survivors are found wherever they are. A leak has a second to end by itself: closing is often asynchronous.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "TRINFER_TEST_SESSION"
PATIENCE = 1.0


@dataclass
class Snapshot:
    processes: dict[int, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    threads: dict[int, str] = field(default_factory=dict)
    sockets: set[str] = field(default_factory=set)


def processes() -> dict[int, str]:
    """Pid and command of every other process that carries the session's mark, and of every child, zombies too."""
    mark = f"{VARIABLE}={os.environ[VARIABLE]}".encode()
    found: dict[int, str] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
            child = int(stat[1]) == os.getpid()
            if child or mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(name)] = f"{stat[0].decode()} {command[:150] or '(zombie)'}"
        except (OSError, IndexError):
            continue
    return found


def open_files() -> dict[str, str]:
    found: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the descriptor of the listing itself
            continue
    return found


def threads() -> dict[int, str]:
    # trio keeps finished worker threads for ten seconds, to use them again: they are its own, and end by themselves.
    return {
        thread.ident or 0: thread.name
        for thread in threading.enumerate()
        if not thread.name.startswith(("Trio thread", "trio.to_thread")) and thread.is_alive()
    }


def sockets() -> set[str]:
    folder = Path(os.environ["TRINFER_RUNTIME_DIR"], "sockets")
    return {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()


def snapshot() -> Snapshot:
    return Snapshot(processes(), open_files(), threads(), sockets())


def differences(before: Snapshot) -> list[str]:
    after = snapshot()
    found = [f"process {pid}: {what}" for pid, what in after.processes.items() if pid not in before.processes]
    found += [f"file descriptor {fd}: {target}" for fd, target in after.files.items() if before.files.get(fd) != target]
    found += [f"thread {name}" for ident, name in after.threads.items() if ident not in before.threads]
    found += [f"socket folder {name}" for name in after.sockets - before.sockets]
    return found


def leaks_since(before: Snapshot) -> list[str]:
    """What is there now and was not before, and does not go within `PATIENCE`."""
    give_up = time.monotonic() + PATIENCE
    while found := differences(before):
        if time.monotonic() > give_up:
            return found
        gc.collect()
        time.sleep(0.02)
    return []
