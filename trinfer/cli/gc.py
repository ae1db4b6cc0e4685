"""``trinfer gc``: ends engines whose owner is gone, and nothing else.

Rule: a process is ended only if, at that very moment, its environment carries the mark of a run whose process (pid
and start time) does not live any more, or the ledger has seen it (by pid and start time) in such a run. It is held by a
pidfd from before the look to the signal, so that a pid that has been given to somebody else is never hit.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING

from trinfer.cli import exit_codes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from trinfer.process.identity import Tree

__all__ = ["add_parser", "execute"]

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
GONE = 5.0  # seconds after SIGKILL until what is left counts as unkillable
CLEAN_LOOKS = 2  # in a row: a process within exec(2) shows no environment for a moment


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Options of ``trinfer gc``."""
    parser = commands.add_parser(
        "gc",
        help="end engines whose owner is gone",
        description="Shows the processes of engines whose owner is gone, and what else they have left. With --yes, "
        "ends and removes it. Engines of living owners are never touched, nor are other programs.",
        allow_abbrev=False,
    )
    parser.add_argument("--yes", action="store_true", help="do it; without this, it is only shown")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from trinfer.process.identity import find_trees, is_alive
    from trinfer.process.ledger import entries

    orphans = [tree for tree in find_trees(_known()) if is_alive(tree.run) is False]
    stale = [(path, entry) for path, entry in entries() if is_alive(entry.run) is False]
    verb = "ending" if arguments.yes else "would end"
    for tree in orphans:
        owner = tree.run.partition("-")[0]
        print(f"{verb} {len(tree.pids)} processes of server {tree.server}, whose owner {owner} is gone:")
        for pid in sorted(tree.pids):
            print(f"  {pid} {_command(pid)}")
    survivors = _end(orphans) if arguments.yes else []
    for path, entry in stale:
        print(f"{'removing' if arguments.yes else 'would remove'} the ledger's entry of server {entry.server}")
        if arguments.yes and entry.server not in {tree.server for tree in survivors}:
            path.unlink(missing_ok=True)
    if not orphans and not stale:
        print("nothing to do")
    elif not arguments.yes:
        print("nothing was done: --yes does it")
    for tree in survivors:
        print(f"trinfer: of server {tree.server}, {tree.pids} cannot be ended (state D?)", file=sys.stderr)
    return exit_codes.ENGINE if survivors else exit_codes.OK


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()[:100]
    except OSError:
        return "(gone)"


def _end(orphans: Sequence[Tree]) -> list[Tree]:
    """SIGTERM, and SIGKILL for what is left after the grace period; returns what is left then."""
    wanted = {(tree.run, tree.server) for tree in orphans}
    give_up = time.monotonic() + GRACE
    _signal(orphans, signal.SIGTERM)
    while _left(wanted) and time.monotonic() < give_up:
        time.sleep(0.05)
    give_up = time.monotonic() + GONE
    clean = 0
    while clean < CLEAN_LOOKS:  # again and again: what is forked meanwhile is found by its environment, too
        left = _left(wanted)
        _signal(left, signal.SIGKILL)
        clean = 0 if left else clean + 1
        if left and time.monotonic() > give_up:
            return left
        time.sleep(0.02)
    return []


def _left(wanted: set[tuple[str, str]]) -> list[Tree]:
    from trinfer.process.identity import find_trees

    return [tree for tree in find_trees(_known()) if (tree.run, tree.server) in wanted]


def _known() -> list[tuple[str, str, list[tuple[int, int]]]]:
    """What the ledger says of processes that may have lost their environment."""
    from trinfer.process.ledger import entries, living

    return [(entry.run, entry.server, living(entry)) for _, entry in entries()]


def _signal(trees: Sequence[Tree], number: signal.Signals) -> None:
    from trinfer.process.identity import is_alive, read_marks, start_time

    seen = {(run, server, *process) for run, server, processes in _known() for process in processes}
    for tree in trees:
        for pid in tree.pids:
            with contextlib.suppress(OSError):  # it has gone meanwhile
                handle = os.pidfd_open(pid)
                try:
                    gone = bool(select.select([handle], [], [], 0)[0])
                    ours = read_marks(pid) == (tree.run, tree.server) or (
                        (tree.run, tree.server, pid, start_time(pid)) in seen
                    )
                    if not gone and ours and is_alive(tree.run) is False:
                        signal.pidfd_send_signal(handle, number)
                        signal.pidfd_send_signal(handle, signal.SIGCONT)
                finally:
                    os.close(handle)
