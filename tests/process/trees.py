"""Owners and trees of real processes for the tests of the guard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.engine_configs import fake_command
from trinfer.process.spawn import marked_processes

ROOT = Path(__file__).parent.parent.parent

ALL_KINDS = (
    *("--children", "2", "--own-session", "--daemon", "--deaf-grandchild", "--respawning", "--stopped"),
    "--deaf",
    "--never-ready",
)

# An owner: prints the pids of its guard and the engine once it runs, then waits to be killed.
OWNER = """
import sys, trio
from functools import partial
from trinfer.process.spawn import run_guarded
async def main():
    async with trio.open_nursery() as nursery:
        guarded = await nursery.start(partial(
            run_guarded, sys.argv[3:], grace=float(sys.argv[2]), marker={"TRINFER_TEST_TREE": sys.argv[1]},
            on_output=lambda chunk: None))
        print(guarded.process.pid, guarded._inner_pid, guarded.engine_pid, flush=True)
trio.run(main)
"""


def start_owner(mark: str, grace: float, *kinds: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, mark, str(grace), *fake_command(*kinds, address=("--port", "1"))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def survivors(mark: str) -> list[int]:
    """Living processes of the tree, wherever they are now; zombies hold nothing and do not count."""
    alive = []
    for pid in marked_processes({"TRINFER_TEST_TREE": mark}):
        try:
            state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except OSError:
            continue
        if state != b"Z":
            alive.append(pid)
    return alive


def wait_gone(mark: str, seconds: float) -> float:
    """Seconds until the tree is gone; at most ``seconds``."""
    began = time.monotonic()
    while survivors(mark) and time.monotonic() - began < seconds:
        time.sleep(0.01)
    return time.monotonic() - began


def wait_for_tree(mark: str, processes: int, seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while len(survivors(mark)) < processes:
        assert time.monotonic() < give_up, "the tree did not grow"
        time.sleep(0.01)


def new_mark() -> str:
    return f"{os.getpid()}-{time.monotonic_ns()}"
