"""Who owns a process: names by which a server's processes can be recognised, long after their owner has gone.

Rules:
- The names are derived, not stored: a run is the process that runs it (its pid and start time), so that there is no
  global state. Every process of an engine inherits them through its environment.
- A pid alone is nobody: pids are used again. Whoever acts on one looks at its start time too.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "RUN_VARIABLE",
    "SERVER_VARIABLE",
    "Tree",
    "all_pids",
    "find_trees",
    "is_alive",
    "new_marker",
    "pid_space",
    "run_id",
    "start_time",
]

RUN_VARIABLE = "TRINFER_RUN_ID"
SERVER_VARIABLE = "TRINFER_SERVER_ID"
LISTINGS = 20  # of /proc in one look, at most


def start_time(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None if there is none, or only its corpse (a zombie).

    Source: proc(5), field 22 of /proc/PID/stat.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
            fields = stat.read().rpartition(b")")[2].split()
        return None if fields[0] in {b"Z", b"X"} else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def all_pids() -> Iterator[int]:
    """Every other process of this host, also those that come while this goes on; none where there is no /proc.

    A process that forks and exits while a list of pids is gone through stands on the list, and its child does not:
    whoever looks for a tree would find nobody. So lists are taken until one has nobody new (on a machine that forks all
    the time: some more).
    """
    seen = {os.getpid()}
    for _ in range(LISTINGS):
        try:
            new = {int(name) for name in os.listdir("/proc") if name.isdigit()} - seen
        except OSError:
            return
        if not new:
            return
        seen |= new
        yield from sorted(new)


def run_id() -> str:
    """Id of this process, unique on this host since its boot: ``PID-STARTTIME``; 0 for the time where /proc is not."""
    return f"{os.getpid()}-{start_time(os.getpid()) or 0}"


def pid_space() -> str:
    """Where pids mean what they mean here: this host, and on it this pid namespace (containers have their own)."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{os.uname().nodename} {namespace}"


def is_alive(run: str) -> bool | None:
    """Whether the process of a run id still lives; None where that cannot be told."""
    pid, dash, started = run.partition("-")
    if not (dash and pid.isdigit() and started.isdigit()) or started == "0":
        return None
    return start_time(int(pid)) == int(started)


def new_marker() -> dict[str, str]:
    """Environment variables that mark the processes of one server."""
    return {RUN_VARIABLE: run_id(), SERVER_VARIABLE: secrets.token_hex(6)}


@dataclass
class Tree:
    """The living processes of one server; ``run`` is the id of its owner."""

    run: str
    server: str
    pids: list[int] = field(default_factory=list)


def find_trees(known: Iterable[tuple[str, str, Iterable[tuple[int, int]]]] = ()) -> list[Tree]:
    """Every server of this user on this host, as the environments of its processes tell.

    Args:
        known: run, server, and pids with start times of processes that were seen before: some lose their environment
            when they give themselves another name.

    Processes of other pid namespaces (containers) are left out: their owners cannot be looked up from here. Empty
    where there is no /proc.
    """
    trees: dict[tuple[str, str], Tree] = {}
    if not os.path.isdir("/proc/self"):
        return []
    ours = os.readlink("/proc/self/ns/pid")
    for pid in all_pids():
        marks = read_marks(pid)
        if marks is None:
            continue
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid() or os.readlink(f"/proc/{pid}/ns/pid") != ours:
                continue
        except OSError:
            continue
        trees.setdefault(marks, Tree(*marks)).pids.append(pid)
    for run, server, processes in known:
        for pid, started in processes:
            if start_time(pid) == started:
                tree = trees.setdefault((run, server), Tree(run, server))
                if pid not in tree.pids:
                    tree.pids.append(pid)
    return list(trees.values())


def read_marks(pid: int) -> tuple[str, str] | None:
    """Run and server that a process belongs to; None if it is none of trinfer's, or cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            pairs = (entry.partition(b"=") for entry in file.read().split(b"\0"))
            environ = {key: value for key, _, value in pairs}
    except OSError:
        return None
    run, server = environ.get(RUN_VARIABLE.encode()), environ.get(SERVER_VARIABLE.encode())
    return None if not run or not server else (run.decode("utf-8", "replace"), server.decode("utf-8", "replace"))
