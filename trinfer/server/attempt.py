"""One start attempt: everything that one try to run an engine owns, in one nursery.

Rule: whatever an attempt starts (guarded processes, tasks, leased addresses) lives in its nursery, so that the end of
the nursery is the end of all of it, and the next attempt begins on clean ground. Tasks of an attempt never let an
exception out: they turn it into the attempt's verdict, which the owner of the attempt waits for.
"""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from trinfer.errors import ServerError
from trinfer.process.addresses import PortLease, SocketLease, lease_port, lease_socket, owns_listener
from trinfer.process.spawn import EngineExit, GuardedProcess, SpawnError, run_guarded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from trinfer.process.output import EngineLog

__all__ = ["Attempt", "FinalFailure", "PortTaken"]

logger = logging.getLogger(__name__)


class PortTaken(ServerError):
    """Somebody else has the port that was leased for the engine: another port, at once, is the cure."""


class FinalFailure(ServerError):
    """The start has failed, and the same start would fail again."""


class Attempt:
    """The engine's processes, tasks and address during one start attempt.

    Use: ``async with Attempt(...) as attempt``; leaving the block stops everything, shielded and bounded by the grace
    period, whatever the reason.
    """

    def __init__(self, *, log: EngineLog, env: Mapping[str, str], marker: Mapping[str, str], grace: float) -> None:
        self._log = log
        self._env = dict(env)
        self._marker = dict(marker)
        self._grace = grace
        self._nursery: trio.Nursery | None = None
        self._verdict: ServerError | None = None
        self._decided = trio.Event()
        self.began = trio.current_time()
        self.known_pids: set[int] = set()
        self.processes: list[GuardedProcess] = []
        self.port: int | None = None
        self.uds: str | None = None
        self._lease: PortLease | SocketLease | None = None
        self._releases: list[Callable[[], None]] = []

    # -- address ------------------------------------------------------------------------------------------------

    def lease_address(self, *, host: str, rank: int, uds: bool, avoid: Collection[int] = ()) -> None:
        """Take a socket path or a port that no other trinfer process will take while the attempt lasts.

        Raises:
            ServerError: there is none, or its lock cannot be made.
        """
        try:
            if uds:
                socket_lease = lease_socket()
                self._lease, self.uds = socket_lease, socket_lease.path
            else:
                port_lease = lease_port(host=host, rank=rank, avoid=avoid)
                self._lease, self.port = port_lease, port_lease.port
        except OSError as error:
            raise ServerError(
                f"the engine's address could not be leased: {error}",
                cause="this process is short of file descriptors, or the disk with the runtime folder is full",
                advice="look at ulimit -n and `df -h -i`, or name another folder in TRINFER_RUNTIME_DIR",
            ) from error

    def on_end(self, release: Callable[[], None]) -> None:
        """Have ``release`` called when everything of the attempt has ended."""
        self._releases.append(release)

    def _release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        while self._releases:
            try:
                self._releases.pop()()
            except Exception:  # one mistake shall not keep the others from being released
                logger.exception("a callback of release_with_attempt has failed")

    def owns_port(self, *, own_pid: int) -> bool | None:
        """Whether all who listen on the port belong to this attempt; None where that cannot be told."""
        if self.port is None:
            return None
        pids = {own_pid}
        for guarded in self.processes:
            pids.update(guarded.tree())
        return owns_listener(pids, self.port)

    # -- verdict ------------------------------------------------------------------------------------------------

    def fail(self, failure: ServerError) -> None:
        """The attempt has failed; the first failure is the verdict."""
        if self._verdict is None:
            self._verdict = failure
            self._decided.set()

    async def verdict(self) -> ServerError:
        """Wait until the attempt has failed, and return why."""
        await self._decided.wait()
        assert self._verdict is not None
        return self._verdict

    # -- what an attempt runs -------------------------------------------------------------------------------------

    async def spawn(self, command: Sequence[str], *, env: Mapping[str, str] | None, cwd: str | None) -> GuardedProcess:
        """Start a guarded, logged process.

        Raises:
            ServerError: it could not be executed.

        Cancelled: the process is gone, or never was.
        """
        assert self._nursery is not None
        _check(command, env or {})
        try:
            guarded: GuardedProcess = await self._nursery.start(
                partial(self._run_process, list(command), {**self._env, **(env or {})}, cwd)
            )
        except SpawnError as error:
            raise _not_started(str(command[0]), error, cwd) from error
        self.processes.append(guarded)
        return guarded

    @trio.lowlevel.enable_ki_protection
    async def _run_process(
        self,
        command: list[str],
        env: Mapping[str, str],
        cwd: str | None,
        *,
        task_status: trio.TaskStatus[GuardedProcess],
    ) -> None:
        outcome: EngineExit = await run_guarded(
            command,
            env=env,
            cwd=cwd,
            grace=self._grace,
            marker=self._marker,
            on_output=self._log.feed,
            task_status=task_status,
        )
        for survivor in outcome.survivors:
            logger.error(
                "process %d (%s, state %s) of the engine survived SIGKILL and still holds what it held",
                survivor.pid,
                survivor.name,
                survivor.state,
            )

    async def start_task(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:  # noqa: ANN401
        """``nursery.start(async_fn, *args)`` in the attempt's nursery; a later crash of the task fails the attempt.

        The types are those of trio's own `trio.Nursery.start`.
        """
        assert self._nursery is not None
        return await self._nursery.start(partial(self._run_task, async_fn, args))

    def start_soon(self, async_fn: Callable[[], Awaitable[None]]) -> None:
        """Run a task of the server itself, which handles its own errors."""
        assert self._nursery is not None
        self._nursery.start_soon(async_fn)

    async def _run_task(
        self,
        async_fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        *,
        task_status: trio.TaskStatus[Any],
    ) -> None:
        status = _Started(task_status)
        try:
            await async_fn(*args, task_status=status)
        except Exception as error:
            if not status.happened:
                raise
            failure = ServerError(f"a task of the server failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self.fail(failure)

    async def exited(self) -> int | None:
        """Wait until one of the engine's processes has exited, and return its exit code (negative: a signal)."""
        if not self.processes:
            raise RuntimeError("engine_exit() needs a process: call it after `await self.spawn(...)`")
        if len(self.processes) == 1:
            return await self.processes[0].wait_engine()
        returncode: int | None = None

        async def wait_for(guarded: GuardedProcess) -> None:
            nonlocal returncode
            returncode = await guarded.wait_engine()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for guarded in self.processes:
                nursery.start_soon(wait_for, guarded)
        return returncode

    async def drained(self, seconds: float) -> None:
        """Give the last words of an engine that has exited the time to arrive, but not longer."""
        with trio.move_on_after(seconds):
            for guarded in self.processes:
                await guarded.wait()

    def known_processes(self) -> list[tuple[int, int]]:
        """Pid and start time of every process of the attempt that lives now.

        Takes tenths of a second for engines with thousands of threads; may be run in a thread itself.
        """
        self.remember_processes()
        return [each for guarded in tuple(self.processes) for each in guarded.known()]

    def remember_processes(self) -> None:
        """Note the pids of now, for a look at what they hold when they are gone."""
        for guarded in tuple(self.processes):
            self.known_pids.update(guarded.tree())

    def stop_now(self) -> None:
        """No more grace: SIGKILL for all that is left."""
        for guarded in self.processes:
            guarded.stop(now=True)

    # -- the block ------------------------------------------------------------------------------------------------

    async def run(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run ``body`` with the attempt's nursery open, then stop all that the attempt has started.

        Whatever happens, nothing of the attempt is left when this returns or raises.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await body()
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._release()


# What is wrong with the program itself; the same start would fail again.
NO_PROGRAM = {errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.ELOOP, errno.EPERM}
SCARCE = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC}


def _not_started(program: str, error: SpawnError, cwd: str | None) -> ServerError:
    what = f"the engine's program {program!r} could not be started: {error}"
    if error.errno in SCARCE:
        return ServerError(
            what,
            cause="this process or the machine is short of file descriptors, processes or memory",
            advice="look at ulimit -a, the limits of the cgroup, and what else runs here",
        )
    if cwd is not None and error.errno in NO_PROGRAM and not os.path.isdir(cwd):
        return FinalFailure(what, cause=f"its working directory {cwd!r} does not exist", advice="make it first")
    if error.errno == errno.E2BIG:
        return FinalFailure(what, cause="command and environment are too long", advice="put long values into files")
    if error.errno in NO_PROGRAM:
        return FinalFailure(
            what,
            cause="it is not installed, not on PATH, or not executable",
            advice="install the engine, or set InferenceConfig.executable to its program",
        )
    return ServerError(what)


def _check(command: Sequence[str], env: Mapping[str, str]) -> None:
    """What could not be executed is told before it is tried.

    Raises:
        FinalFailure: the command or the environment holds something else than texts.
    """
    if not command:
        raise FinalFailure("spawn() was called with an empty command", advice="give a program and its arguments")
    if command[0] in {"", b""}:
        raise FinalFailure("spawn(): the name of the program is empty", advice="give a program and its arguments")
    words: list[tuple[str, object]] = [(f"argument {number}", word) for number, word in enumerate(command)]
    for name, value in env.items():
        words += [(f"the name of environment variable {name!r}", name), (f"environment variable {name!r}", value)]
    for where, word in words:
        if not isinstance(word, str | bytes | os.PathLike):
            raise FinalFailure(
                f"spawn(): {where} is {word!r}, a {type(word).__name__}",
                advice="give texts: str(self.port), for instance",
            )
        if "\0" in os.fsdecode(word):
            raise FinalFailure(f"spawn(): {where} holds a NUL byte: {word!r}")


class _Started:
    """A task status that remembers whether the task has reported."""

    def __init__(self, inner: trio.TaskStatus[Any]) -> None:
        self._inner = inner
        self.happened = False

    def started(self, value: Any = None) -> None:  # noqa: ANN401  # as trio.TaskStatus
        self.happened = True
        self._inner.started(value)
