"""Ends that do not want to end: pipes that others hold, processes without a name, guards that never say a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.process.trees import new_mark
from trinfer.process import guard, spawn
from trinfer.process.identity import start_time
from trinfer.process.spawn import SpawnError, run_guarded

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]


async def start(nursery: trio.Nursery, command: list[str], grace: float = 0.5) -> spawn.GuardedProcess:
    mark = {"TRINFER_TEST_TREE": new_mark()}
    run = partial(run_guarded, command, grace=grace, marker=mark, on_output=lambda _: None)
    return await nursery.start(run)


async def test_a_process_that_was_forked_during_the_start_does_not_hold_up_the_end(monkeypatch):
    """A pool of workers that prepares data inherits whatever pipes are open at that moment."""
    original, forked = spawn._run_process, []

    async def fork_first(*args, **options):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        forked.append(pid)
        await original(*args, **options)

    monkeypatch.setattr(spawn, "_run_process", fork_first)
    try:
        async with trio.open_nursery() as nursery:
            guarded = await start(nursery, SLEEP)
            began = trio.current_time()
            guarded.stop()
            outcome = await guarded.wait()
        assert trio.current_time() - began < 1.5
        assert outcome.returncode == -signal.SIGTERM
        assert not outcome.guard_lost
        async with trio.open_nursery() as nursery:  # cancelled, too
            await start(nursery, SLEEP)
            began = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 1.5
    finally:
        for pid in forked:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


async def test_processes_without_a_marker_go_with_a_lost_guard():
    """setproctitle writes over the environment in /proc: such processes are known by having been seen."""
    command = [
        *(sys.executable, "-I", "-S", "-c"),
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(1000)'], env={})\n"
        "os.execve(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(1000)'], {})\n",
    ]
    async with trio.open_nursery() as nursery:
        guarded = await start(nursery, command)
        with trio.fail_after(5):
            while len(tree := guarded.tree()) < 2 or any(_has_environment(pid) for pid in tree):
                await trio.sleep(0.02)
        assert spawn.marked_processes(guarded._marker) == sorted([guarded.process.pid, guarded._inner_pid])
        os.kill(guarded._inner_pid, signal.SIGSTOP)
        os.kill(guarded.process.pid, signal.SIGKILL)
        os.kill(guarded._inner_pid, signal.SIGKILL)
        with trio.fail_after(10):
            outcome = await guarded.wait()
        assert outcome.guard_lost
        assert outcome.survivors == ()
        assert [pid for pid in tree if start_time(pid) is not None] == []


CHAIN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    if os.fork(): os._exit(0)
    time.sleep(0.003)
"""


@pytest.mark.parametrize("attempt", range(5))
async def test_processes_that_fork_and_exit_all_the_time_go_with_a_lost_guard(attempt):
    """Whoever goes through a list of processes finds the parent gone, and the child not on the list."""
    async with trio.open_nursery() as nursery:
        guarded = await start(nursery, [sys.executable, "-I", "-S", "-c", CHAIN], grace=30)
        await trio.sleep(0.05)
        os.kill(guarded._inner_pid, signal.SIGSTOP)
        os.kill(guarded.process.pid, signal.SIGKILL)
        os.kill(guarded._inner_pid, signal.SIGKILL)
        with trio.fail_after(10):
            outcome = await guarded.wait()
        assert outcome.guard_lost
        assert outcome.survivors == ()
        for _ in range(3):
            assert spawn.marked_processes(guarded._marker) == []
            await trio.sleep(0.01)


def _has_environment(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return False


HOLDS_SHARED_MEMORY = """
import multiprocessing, signal, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=1_000_000)
lock = multiprocessing.get_context("spawn").Lock()
print(memory.name, "sem." + lock._semlock.name.lstrip("/"), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("lost", ["nothing", "the inner guard"])
async def test_shared_memory_of_a_killed_engine_is_removed(lost):
    """vLLM's processes talk through some of it; after enough crashes, the machine would have no memory left."""
    said: list[bytes] = []
    async with trio.open_nursery() as nursery:
        run = partial(
            run_guarded,
            [sys.executable, "-c", HOLDS_SHARED_MEMORY],
            grace=0.2,
            marker={"TRINFER_TEST_TREE": new_mark()},
            on_output=said.append,
        )
        guarded = await nursery.start(run)
        with trio.fail_after(10):
            while b"\n" not in b"".join(said):
                await trio.sleep(0.01)
        held = set(b"".join(said).decode().split())
        assert held <= set(os.listdir("/dev/shm"))
        began = trio.current_time()
        if lost == "nothing":
            guarded.stop()
        else:
            os.kill(guarded._inner_pid, signal.SIGKILL)
        await guarded.wait()
    assert trio.current_time() - began < 0.2 + guard.TRACKER_WAIT
    # By their names: other tests hold some of their own meanwhile, in another process.
    assert not held & set(os.listdir("/dev/shm"))


async def test_a_process_that_calls_itself_a_tracker_gains_little():
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(1000)"
    )
    said: list[bytes] = []
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-I", "-S", "-c", code, guard.TRACKER.decode()]
        mark = {"TRINFER_TEST_TREE": new_mark()}
        guarded = await nursery.start(partial(run_guarded, command, grace=0.1, marker=mark, on_output=said.append))
        with trio.fail_after(10):
            while not said:
                await trio.sleep(0.01)
        began = trio.current_time()
        guarded.stop()
        await guarded.wait()
    assert trio.current_time() - began < 0.1 + guard.TRACKER_WAIT + 0.2


def test_no_command_line_is_read_whose_process_may_hang_in_the_kernel(monkeypatch):
    """Such a process may hold the lock of its memory, and who reads hangs with it, before anything was killed."""
    read: list[str] = []

    def reads(path, *args, **options):
        read.append(path)
        return open(path, *args, **options)

    monkeypatch.setattr(guard, "open", reads, raising=False)
    code = "import sys, threading, time\nif {threads}: threading.Thread(target=time.sleep, args=(99,)).start()\n"
    code += "print(flush=True); time.sleep(99)"
    found = []
    for threads in (False, True):
        command = [sys.executable, "-I", "-S", "-c", code.format(threads=threads), guard.TRACKER.decode()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.read(1)
            found.append((guard._is_tracker(process.pid), f"/proc/{process.pid}/cmdline" in read))
            process.kill()
    assert found == [(True, True), (False, False)]


async def test_a_guard_that_never_says_a_word_is_got_rid_of(monkeypatch, tmp_path):
    program = tmp_path / "guard.py"
    program.write_text("import os, time\nos.fork()\ntime.sleep(1000)\n")
    monkeypatch.setattr(spawn, "guard_program", lambda: str(program))
    monkeypatch.setattr(spawn, "MARGIN", 0.1)
    monkeypatch.setattr(guard, "KILL_WAIT", 0.1)
    mark = {"TRINFER_TEST_TREE": new_mark()}
    began = trio.current_time()
    with trio.move_on_after(0.5) as scope:
        await run_guarded(SLEEP, grace=0.1, marker=mark, on_output=lambda _: None)
    assert scope.cancelled_caught
    assert trio.current_time() - began < 3
    assert spawn.marked_processes(mark) == []


@pytest.mark.parametrize("which", [1, 2, 3])
async def test_too_few_descriptors_leave_none_behind(monkeypatch, which):
    original, made = os.pipe, []

    def pipe():
        if len(made) == which - 1:
            raise OSError(24, "Too many open files")
        made.append(1)
        return original()

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(SpawnError, match="Too many open files"):
        await run_guarded(SLEEP, grace=0.1, marker={}, on_output=lambda _: None)
    # What is left open is found by the check around every test.


async def test_what_popen_does_not_take_is_a_spawn_error():
    with pytest.raises(SpawnError, match="null byte"):
        await run_guarded(["a\0b"], grace=0.1, marker={}, on_output=lambda _: None)
