"""Who owns a process, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trinfer.process.identity import (
    RUN_VARIABLE,
    SERVER_VARIABLE,
    find_trees,
    is_alive,
    new_marker,
    read_marks,
    run_id,
    start_time,
)


def test_a_run_lives_as_long_as_its_process():
    process = subprocess.Popen(["sleep", "60"])
    run = f"{process.pid}-{start_time(process.pid)}"
    assert is_alive(run) is True
    # The pid alone says nothing: it may be somebody else's by now.
    assert is_alive(f"{process.pid}-{(start_time(process.pid) or 0) + 1}") is False
    process.send_signal(signal.SIGSTOP)
    assert is_alive(run) is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(run) is False  # a zombie runs nothing
    process.wait()
    assert is_alive(run) is False


def test_what_cannot_be_told():
    assert is_alive(run_id()) is True
    for run in ("", "x", "12", "12-", "-3", "12-0", "a-b", "12-3x"):
        assert is_alive(run) is None


def test_trees_are_found_by_the_environment_of_their_processes():
    marker = new_marker()
    children = [
        subprocess.Popen(["sleep", "60"], env={**os.environ, **marker}),
        subprocess.Popen(["sleep", "60"], env={**os.environ, **marker}, start_new_session=True),
        subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_VARIABLE: "half a mark"}),
    ]
    try:
        give_up = time.monotonic() + 5
        # Popen returns in the midst of exec(2), and a process shows no environment until its end.
        while not all(Path(f"/proc/{child.pid}/environ").read_bytes() for child in children):
            assert time.monotonic() < give_up
            time.sleep(0.001)
        trees = {tree.server: tree for tree in find_trees()}
        tree = trees[marker[SERVER_VARIABLE]]
        assert tree.run == run_id()
        assert sorted(tree.pids) == sorted(child.pid for child in children[:2])
        assert read_marks(children[2].pid) is None
        assert "half a mark" not in {tree.run for tree in trees.values()}
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert marker[SERVER_VARIABLE] not in {tree.server for tree in find_trees()}


def test_a_name_with_spaces_and_parentheses_confuses_nobody(tmp_path):
    program = tmp_path / "a) R (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([str(program), "-S", "-c", "import time; time.sleep(60)"])
    try:
        assert start_time(process.pid)
        assert is_alive(f"{process.pid}-{start_time(process.pid)}") is True
    finally:
        process.kill()
        process.wait()
