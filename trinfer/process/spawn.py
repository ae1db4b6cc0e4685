"""A guarded process in a nursery: its start, its output, its exit, and its end in every case.

Rule: one task, `run_guarded`, owns the process, and it does not return before the guard says that the whole tree is
gone. Everything that it opens is closed on every path. See `trinfer.process.guard` for the other side.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from trinfer.process import guard
from trinfer.process.identity import all_pids, start_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["EngineExit", "GuardedProcess", "SpawnError", "Survivor", "marked_processes", "run_guarded"]

GUARD = Path(guard.__file__)
CHUNK = 65536  # a pipe's capacity
MARGIN = 3.0  # seconds that a guard may take beyond grace and kill time before it counts as stuck itself
LAST_OUTPUT = 0.5  # seconds to wait for the end of output once the tree is gone
LOOKS = 0.02  # seconds between two looks for a guard whose pipe does not end
SWEEP = 5.0  # seconds to hunt for marked processes when the guard itself was killed
CLEAN_LOOKS = 2  # in a row, until nothing counts as left: a process within exec(2) shows no environment for a moment


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
        self._known: dict[int, int] = {}  # pids of the tree so far, and when each was started
        self._start_settled = trio.Event()  # there is a process, or there will be none
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
        if not self._inner_pid or self._gone.is_set():
            return []
        pids = guard.descendants(self._inner_pid)
        for pid in pids:
            if pid not in self._known and (started := start_time(pid)) is not None:
                self._known[pid] = started
        return pids

    def known(self) -> list[tuple[int, int]]:
        """Pid and start time of every process of the engine that was ever seen and still lives.

        An engine may overwrite the memory that holds its environment, and with it the marker, when it gives itself
        another name (setproctitle, as vLLM does): such processes are known by having been seen.
        """
        # `tree` may be run in another thread meanwhile, and find new ones.
        for pid, started in self._known.copy().items():
            if start_time(pid) != started and self._known.get(pid) == started:
                self._known.pop(pid, None)
        return list(self._known.copy().items())

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

    @trio.lowlevel.enable_ki_protection
    async def _deliver_cancel(self, process: trio.Process) -> None:
        """trio's way to end a process; it is cancelled when the guard has ended."""
        self.process = process
        self.stop()
        await trio.sleep(self._grace + guard.KILL_WAIT + MARGIN)
        self._kill_guard()

    def _is_inner_alive(self) -> bool:
        return bool(self._inner_pid) and start_time(self._inner_pid) is not None

    @trio.lowlevel.enable_ki_protection
    async def _watch_guard(self) -> None:
        """Outer has gone, so inner must soon; a stuck one (stopped, say) would keep its owner waiting for ever."""
        with self._stuck:
            await self.process.wait()
            await trio.sleep(self._grace + guard.KILL_WAIT + MARGIN)
            self._kill_guard()

    def _kill_guard(self) -> None:
        """The guard is stuck (stopped by SIGSTOP, say): what it owns is then found by the marker, or is known."""
        self.tree()  # seen now, before nobody owns it
        # Both of its own processes carry the marker too, also where the inner one has not told its pid yet.
        for pid in {*marked_processes(self._marker), *guard.descendants(self.process.pid), self._inner_pid} - {0}:
            _kill(pid)
        _kill(self.process.pid)

    async def _until_over(self, listening: trio.CancelScope) -> None:
        """End the listening when the guard is gone, also where the pipe does not end.

        Whatever this process forks between the making of the pipe and the start of the guard holds the pipe open: the
        pool of workers that prepares data while the engine loads, for instance.
        """
        await self._start_settled.wait()
        if hasattr(self, "process"):
            await self.process.wait()
            while not self._ended and self._error is None and self._is_inner_alive():  # noqa: ASYNC110
                await trio.sleep(LOOKS)  # a process that is not our child tells nobody
        await trio.sleep(LOOKS)  # what is in the pipe is heard
        listening.cancel()

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
        """The guard was killed: end all that carries the marker, was ever seen, or descends from it."""
        give_up = trio.current_time() + SWEEP
        clean = 0
        while clean < CLEAN_LOOKS:
            pids = set()
            for pid in self._left():  # killed as it is found: it may be about to fork and exit
                _kill(pid)
                pids.add(pid)
            clean = 0 if pids else clean + 1
            if pids and trio.current_time() > give_up:
                self._survivors.extend(Survivor(pid, "?", "") for pid in pids)
                return
            await trio.sleep(0.01)

    def _left(self) -> Iterator[int]:
        """What still lives of the engine, told without its guard."""
        for root in itertools.chain(_marked(self._marker), [pid for pid, _ in self.known()]):
            # Noted before it is killed: what it has forked is then nobody's child.
            for child in guard.descendants(root):
                if (started := start_time(child)) is not None:
                    self._known[child] = started
                    yield child
            yield root


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


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
    return list(_marked(marker))


def _marked(marker: Mapping[str, str]) -> Iterator[int]:
    wanted = [f"{key}={value}".encode() for key, value in marker.items()]
    if not wanted:
        return
    for pid in all_pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environ = file.read().split(b"\0")
        except OSError:
            continue
        if all(entry in environ for entry in wanted):
            yield pid


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
        guards_ends = stack.enter_context(contextlib.ExitStack())
        try:
            guard_lifeline, lifeline = os.pipe()
            stack.callback(os.close, lifeline)
            guards_ends.callback(os.close, guard_lifeline)
            os.set_blocking(lifeline, False)
            status_out, status_in = os.pipe()
            guards_ends.callback(os.close, status_in)
            status = trio.lowlevel.FdStream(status_out)
            stack.callback(status.close)
            output_out, output_in = os.pipe()
            guards_ends.callback(os.close, output_in)
            output = trio.lowlevel.FdStream(output_out)
            stack.callback(output.close)
        except OSError as error:
            raise SpawnError(command[0], error.errno or errno.EIO) from error

        guarded = GuardedProcess(lifeline, marker, grace)
        start = partial(
            _run_process,
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
        failure: Exception | None = None
        pumping = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pump, output, on_output, pumping)
            try:
                guarded.process = await nursery.start(start)
            except Exception as error:  # of the system, or of Popen about what it was given
                failure = error
            finally:
                # The ends of the guard: while we hold them, we would not see that it has closed its own.
                guards_ends.close()
                guarded._start_settled.set()
                nursery.start_soon(_listen, status, guarded, pumping)
            if failure is None:
                nursery.start_soon(guarded._watch_guard)
                await guarded._spawned.wait()
                if guarded.engine_pid:
                    task_status.started(guarded)
        guarded._lifeline = None
        if failure is not None:
            number = failure.errno if isinstance(failure, OSError) else None
            raise SpawnError(command[0], number or errno.EINVAL, str(failure)) from failure
        if not guarded.engine_pid:
            raise SpawnError(command[0], guarded._error or 0)
        assert guarded.exit is not None
        return guarded.exit


@trio.lowlevel.enable_ki_protection
async def _run_process(*args: Any, task_status: trio.TaskStatus[trio.Process], **options: Any) -> None:  # noqa: ANN401  # trio's
    """`trio.run_process`, out of Ctrl-C's reach: an interrupt in the midst of it would lose the process."""
    await trio.run_process(*args, task_status=task_status, **options)


@trio.lowlevel.enable_ki_protection
async def _pump(output: trio.lowlevel.FdStream, on_output: Callable[[bytes], None], scope: trio.CancelScope) -> None:
    """Read whatever comes, for as long as anybody may write."""
    with scope:
        while chunk := await output.receive_some(CHUNK):
            on_output(chunk)


@trio.lowlevel.enable_ki_protection
async def _listen(status: trio.lowlevel.FdStream, guarded: GuardedProcess, pumping: trio.CancelScope) -> None:
    """Hear the guard out. Its end is certain: it is bounded itself, and `_deliver_cancel` bounds it from here."""
    with trio.CancelScope(shield=True):
        buffer = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guarded._until_over, nursery.cancel_scope)
            while chunk := await status.receive_some(4096):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    guarded._hear(line.decode("utf-8", "replace"))
            nursery.cancel_scope.cancel()
        await guarded._finish()
        # What survived everything may hold the pipe open for ever.
        pumping.deadline = trio.current_time() + LAST_OUTPUT
