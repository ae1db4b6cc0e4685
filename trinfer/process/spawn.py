"""A guarded process in a nursery: its start, its output, its exit, and its end in every case.

Rule: one task, `run_guarded`, owns the process, and it does not return before the guard says that the whole tree is
gone. Everything that it opens is closed on every path. See `trinfer.process.guard` for the other side.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from trinfer.process import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["EngineExit", "GuardedProcess", "SpawnError", "Survivor", "marked_processes", "run_guarded"]

GUARD = Path(guard.__file__)
CHUNK = 65536  # a pipe's capacity
MARGIN = 3.0  # seconds that a guard may take beyond grace and kill time before it counts as stuck itself
LAST_OUTPUT = 0.5  # seconds to wait for the end of output once the tree is gone
SWEEP = 5.0  # seconds to hunt for marked processes when the guard itself was killed


class SpawnError(Exception):
    """The command could not be executed; ``errno`` says why, 0 where the guard itself failed."""

    def __init__(self, command: str, number: int, detail: str = "") -> None:
        super().__init__(detail or (os.strerror(number) if number else "the guard ended before it could start it"))
        self.command = command
        self.errno = number


@dataclass(frozen=True)
class Survivor:
    """A process that SIGKILL did not end; ``state`` is the letter in /proc/PID/stat, most often D."""

    pid: int
    state: str
    name: str


@dataclass(frozen=True)
class EngineExit:
    """How an engine ended.

    Attributes:
        returncode: its exit code, negative for a signal; None where nobody could tell.
        survivors: processes that nothing could end.
        guard_lost: the guard itself was killed, and the rest was found by the marker in its environment.
    """

    returncode: int | None
    survivors: tuple[Survivor, ...] = ()
    guard_lost: bool = False

    def describe(self) -> str:
        """In words: ``exit code 1``, ``killed by SIGKILL (signal 9)``."""
        if self.returncode is None:
            text = "exit code unknown, its guard was killed"
        elif self.returncode >= 0:
            text = f"exit code {self.returncode}"
        else:
            try:
                name = signal.Signals(-self.returncode).name
            except ValueError:
                name = "a signal"
            text = f"killed by {name} (signal {-self.returncode})"
        if self.survivors:
            text += "; survived SIGKILL: " + ", ".join(
                f"pid {left.pid} ({left.name}, state {left.state})" for left in self.survivors
            )
        return text


class GuardedProcess:
    """A running engine under guard.

    Attributes:
        process: the outer process of the guard; its returncode becomes that of the engine.
        engine_pid: the engine's main process.
        started_at: when it was executed, in seconds of trio's clock.
        exit: how it ended; set when its main process has exited, completed when the tree is gone.
    """

    def __init__(self, lifeline: int, marker: Mapping[str, str], grace: float) -> None:
        self._lifeline: int | None = lifeline
        self._marker = dict(marker)
        self._grace = grace
        self._inner_pid = 0
        self._spawned = trio.Event()
        self._engine_exited = trio.Event()
        self._gone = trio.Event()
        self._ended = False
        self._error: int | None = None
        self._survivors: list[Survivor] = []
        self._stuck = trio.CancelScope(shield=True)
        self.process: trio.Process  # not there yet when a start is cancelled half-way
        self.engine_pid = 0
        self.started_at = 0.0
        self.exit: EngineExit | None = None

    async def wait_engine(self) -> int | None:
        """Wait until the main process has exited (its descendants may still be going); its exit code."""
        await self._engine_exited.wait()
        return self.exit.returncode if self.exit else None

    async def wait(self) -> EngineExit:
        """Wait until the whole tree is gone, or what is left of it is known to be unkillable."""
        await self._gone.wait()
        assert self.exit is not None
        return self.exit

    def stop(self, *, now: bool = False) -> None:
        """Ask the guard to end the tree: SIGTERM, and SIGKILL after the grace period (``now``: at once).

        Idempotent, and does not wait; ``now`` may follow a stop with grace.
        """
        if self._lifeline is not None:
            with contextlib.suppress(OSError):  # the guard is gone already, or has more words than it can read
                os.write(self._lifeline, b"K" if now else b"T")

    def tree(self) -> list[int]:
        """Pids of all living processes of the engine, those of the guard excluded."""
        return guard.descendants(self._inner_pid) if self._inner_pid and not self._gone.is_set() else []

    # -- for run_guarded only -----------------------------------------------------------------------------------

    def _hear(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "spawned":
            inner, engine = rest.split()
            self._inner_pid, self.engine_pid = int(inner), int(engine)
            self.started_at = trio.current_time()
            self._spawned.set()
        elif word == "error":
            self._error = int(rest)
        elif word == "exited":
            self.exit = EngineExit(int(rest))
            self._engine_exited.set()
        elif word == "survivor":
            pid, state, name = (*rest.split(" ", 2), "")[:3]
            self._survivors.append(Survivor(int(pid), state, name))
        elif word == "ended":
            self._ended = True

    async def _deliver_cancel(self, process: trio.Process) -> None:
        """trio's way to end a process; it is cancelled when the guard has ended."""
        self.process = process
        self.stop()
        await trio.sleep(self._grace + guard.KILL_WAIT + MARGIN)
        self._kill_guard()

    async def _watch_guard(self) -> None:
        """Outer has gone, so inner must soon; a stuck one (stopped, say) would keep its owner waiting for ever."""
        with self._stuck:
            await self.process.wait()
            await trio.sleep(self._grace + guard.KILL_WAIT + MARGIN)
            self._kill_guard()

    def _kill_guard(self) -> None:
        """The guard is stuck (stopped by SIGSTOP, say): what it owns is then found by the marker."""
        for pid in (self.process.pid, self._inner_pid):
            if pid:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    async def _finish(self) -> None:
        """The status pipe has ended: both processes of the guard are gone."""
        lost = not self._ended and self._error is None
        if lost:
            await self._sweep()
        if hasattr(self, "process"):
            await self.process.wait()  # it has closed its files, and is about to be reaped
        returncode = self.exit.returncode if self.exit else None
        self.exit = EngineExit(returncode, tuple(self._survivors), guard_lost=lost)
        self._engine_exited.set()
        self._spawned.set()
        self._gone.set()
        self._stuck.cancel()

    async def _sweep(self) -> None:
        """The guard was killed: end all that carries the marker."""
        give_up = trio.current_time() + SWEEP
        while pids := marked_processes(self._marker):
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if trio.current_time() > give_up:
                self._survivors.extend(Survivor(pid, "?", "") for pid in pids)
                return
            await trio.sleep(0.01)


def guard_program() -> str:
    """Path of the guard, compiled where Python keeps it so: compiling it at each start takes longer than all the rest.

    The compiled file is used only if it is that of the source as it is now, by the rule of the import system itself
    (the header described in PEP 552).
    """
    cached = importlib.util.cache_from_source(str(GUARD))
    try:
        with open(cached, "rb") as file:
            magic, flags, mtime, size = struct.unpack("<4sIII", file.read(16))
        source = GUARD.stat()
    except (OSError, struct.error):
        return str(GUARD)
    fresh = (importlib.util.MAGIC_NUMBER, 0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF)
    return cached if (magic, flags, mtime, size) == fresh else str(GUARD)


def marked_processes(marker: Mapping[str, str]) -> list[int]:
    """Pids of living processes whose environment at their start held all of ``marker``.

    Reads /proc; finds nothing where there is none, and only processes of this user (or all, for root).
    """
    wanted = [f"{key}={value}".encode() for key, value in marker.items()]
    found: list[int] = []
    if not wanted or not os.path.isdir("/proc"):
        return found
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environ = file.read().split(b"\0")
        except OSError:
            continue
        if all(entry in environ for entry in wanted):
            found.append(int(name))
    return found


async def run_guarded(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    grace: float,
    marker: Mapping[str, str],
    on_output: Callable[[bytes], None],
    task_status: trio.TaskStatus[GuardedProcess] = trio.TASK_STATUS_IGNORED,
) -> EngineExit:
    """Run a command under guard until its whole tree is gone; meant for ``nursery.start``.

    Args:
        command: program and arguments. Standard input is /dev/null, and both outputs go into one pipe, in order.
        env: its whole environment, this process's own by default.
        cwd: its working directory.
        grace: seconds between SIGTERM and SIGKILL.
        marker: environment variables by which its processes can be recognised.
        on_output: called with each chunk of output, for as long as anything comes.

    Raises:
        SpawnError: it could not be executed; raised before the task has started.

    Cancelled: the tree is ended, shielded, within the grace period and some seconds, and nothing is left.
    """
    with contextlib.ExitStack() as stack:
        guard_lifeline, lifeline = os.pipe()
        stack.callback(os.close, lifeline)
        os.set_blocking(lifeline, False)
        status_out, status_in = os.pipe()
        status = trio.lowlevel.FdStream(status_out)
        stack.callback(status.close)
        output_out, output_in = os.pipe()
        output = trio.lowlevel.FdStream(output_out)
        stack.callback(output.close)
        guards_ends = stack.enter_context(contextlib.ExitStack())
        for fd in (guard_lifeline, status_in, output_in):
            guards_ends.callback(os.close, fd)

        guarded = GuardedProcess(lifeline, marker, grace)
        start = partial(
            trio.run_process,
            [
                *(sys.executable, "-I", "-S", guard_program()),
                *("--owner", str(os.getpid()), "--lifeline", str(guard_lifeline)),
                *("--status", str(status_in), "--grace", str(grace), "--", *command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output_in,
            stderr=subprocess.STDOUT,
            check=False,
            pass_fds=(guard_lifeline, status_in),
            start_new_session=True,
            env={**(os.environ if env is None else env), **marker},
            cwd=cwd,
            deliver_cancel=guarded._deliver_cancel,
        )
        failure: OSError | None = None
        pumping = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump, output, on_output, pumping)
            try:
                guarded.process = await nursery.start(start)
            except OSError as error:
                failure = error
            finally:
                # The ends of the guard: while we hold them, we would not see that it has closed its own.
                guards_ends.close()
                nursery.start_soon(_listen, status, guarded, pumping)
            if failure is None:
                nursery.start_soon(guarded._watch_guard)
                await guarded._spawned.wait()
                if guarded.engine_pid:
                    task_status.started(guarded)
        guarded._lifeline = None
        if failure is not None:
            raise SpawnError(command[0], failure.errno or errno.EIO, str(failure)) from failure
        if not guarded.engine_pid:
            raise SpawnError(command[0], guarded._error or 0)
        assert guarded.exit is not None
        return guarded.exit


async def _pump(output: trio.lowlevel.FdStream, on_output: Callable[[bytes], None], scope: trio.CancelScope) -> None:
    """Read whatever comes, for as long as anybody may write."""
    with scope:
        while chunk := await output.receive_some(CHUNK):
            on_output(chunk)


async def _listen(status: trio.lowlevel.FdStream, guarded: GuardedProcess, pumping: trio.CancelScope) -> None:
    """Hear the guard out. Its end is certain: it is bounded itself, and `_deliver_cancel` bounds it from here."""
    with trio.CancelScope(shield=True):
        buffer = b""
        while chunk := await status.receive_some(4096):
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                guarded._hear(line.decode("utf-8", "replace"))
        await guarded._finish()
        # What survived everything may hold the pipe open for ever.
        pumping.deadline = trio.current_time() + LAST_OUTPUT
