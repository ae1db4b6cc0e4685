"""`InferenceServer`: the public surface of one server, and the owner of the nursery in which it lives.

Rules:
- Background tasks let no exception out of the nursery; they turn it into state (failed, with its cause) and wake the
  waiters. A bug of trinfer's own may come out, as itself.
- Leaving the block, in whatever way and phase, ends in `InferenceServer.__aexit__`, which waits shielded, but not for
  ever, until nothing of the server is left. The body's exception comes out as itself.
- The config is read, never written.
"""

from __future__ import annotations

import abc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import trio

from trinfer.http.origin import Origin
from trinfer.process.output import EngineLog
from trinfer.server.events import Events
from trinfer.server.health import HealthWatch
from trinfer.server.in_flight import InFlight
from trinfer.server.lifecycle import COMING, Lifecycle, ServerState, Transition
from trinfer.server.link import Link, local_origin
from trinfer.server.node import SINGLE, Node, find_node
from trinfer.server.registration import Registration
from trinfer.server.requests import RequestSurface
from trinfer.server.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from trinfer.config import InferenceConfig
    from trinfer.errors import ServerError
    from trinfer.server.attempt import Attempt
    from trinfer.server.reports import CrashReport

__all__ = ["InferenceServer"]

logger = logging.getLogger(__name__)

LAUNCH = 0.5  # seconds that entering waits for the engine to be executed, most often some 30 ms
CLEANUP_MARGIN = 10.0  # seconds beyond the grace period after which cleaning up is given up and reported
LOG_FLUSH = 5.0  # seconds for the last lines to reach the disk
DRAIN_LOOKS = 0.02  # seconds between two looks whether a drain is over


class InferenceServer(RequestSurface, abc.ABC):
    """One inference server, alive inside its ``async with`` block.

    ``async with VLLMServer(config, rank=0) as server`` starts the engine in the background and returns at once, so
    that data can be prepared while it loads. When the block ends, by return, exception, cancellation or Ctrl-C,
    nothing of the engine is left.

    On a worker node of a multi-node engine (see `trinfer.server.node`) entering the block runs until the engine on
    this node has ended, and then yields None.

    A subclass implements `start_server` and `monitor_health`:

    .. code-block:: python

        class MyServer(InferenceServer):
            async def start_server(self):
                return await self.spawn(["my-engine", "--port", str(self.port)])

            async def monitor_health(self):
                await self.engine_exit()

    Attributes:
        config: the config, as given.
        rank: which of several servers this is: shifts its port, names its log file.
        log: the engine's output.
        node: which node of the engine this process is; set when the block is entered.
    """

    #: Name for messages, log files and the diagnosis catalogue.
    engine_name: ClassVar[str] = "custom"
    #: The engine can serve on a unix socket.
    supports_uds: ClassVar[bool] = False
    #: The engine can span nodes; then SLURM's and torchrun's variables are asked too.
    spans_nodes: ClassVar[bool] = True
    #: The engine runs here, and needs an address of its own.
    is_local: ClassVar[bool] = True

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"rank is {rank!r}: allowed is an integer >= 0")
        self.config = config
        self.rank = rank
        self.node: Node = SINGLE
        self.log = EngineLog(None, max_bytes=config.server_log_max_bytes)
        self._lifecycle = Lifecycle(self.name)
        self._lifecycle.observers.append(self._on_transition)
        self._registration = Registration(self)
        if self.is_local:  # an endpoint is somebody else's
            self._lifecycle.observers.append(self._registration.hear)
        self._in_flight = InFlight(self._lifecycle, config, is_local=self.is_local)
        self._supervisor = Supervisor(self, self._lifecycle)
        self._has_own_requests = type(self)._make_request is not RequestSurface._make_request
        self._nursery_manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._run_scope = trio.CancelScope()
        self._ended = trio.Event()
        self._home: trio.lowlevel.TrioToken | None = None

    # -- to be implemented by subclasses --------------------------------------------------------------------------

    @abc.abstractmethod
    async def start_server(self) -> trio.Process | None:
        """Start the engine, and return its process, or None where there is none.

        Called once per start attempt, with `port` or `uds` freshly leased. Use `spawn` for processes and `start_task`
        for tasks: they are stopped with the attempt. May raise `ServerError`; any other exception fails the attempt
        too. It has ``server_start_timeout_sec`` seconds.
        """

    @abc.abstractmethod
    async def monitor_health(self) -> None:
        """Run until the engine is unhealthy, then return or raise. It is cancelled when the server stops."""

    def get_base_url(self) -> str:
        """Base URL of the engine, without ``/v1``; ``http+unix://`` and the quoted path for a unix socket."""
        attempt = self._supervisor.attempt
        if attempt is None or (attempt.port is None and attempt.uds is None):
            raise self._lifecycle.down_error()
        return local_origin(attempt, self.host).url

    async def is_ready(self) -> bool:
        """Whether ``GET /v1/models`` is answered with 200, right now, within 5 seconds."""
        link = self._supervisor.link
        return link is not None and (await link.models())[0] == 200

    # -- helpers for subclasses -----------------------------------------------------------------------------------

    async def spawn(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
    ) -> trio.Process:
        """Start a process under guard, in the server's nursery: its output is logged, and it cannot be orphaned.

        Args:
            command: program and arguments; no shell.
            env: variables on top of the inherited environment and ``config.env``.
            cwd: its working directory.

        Returns:
            The guard's process; its returncode will be that of the engine.

        Raises:
            ServerError: it cannot be executed.
        """
        guarded = await self._current().spawn(command, env=env, cwd=None if cwd is None else str(cwd))
        return guarded.process

    async def start_task(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:  # noqa: ANN401
        """Start a task in the server's nursery, as `trio.Nursery.start` does, and return what it reports.

        The task ends with the start attempt; when it crashes, the server fails.
        """
        return await self._current().start_task(async_fn, *args)

    async def engine_exit(self) -> int | None:
        """Wait until a process started by `spawn` has exited; its exit code, negative for a signal."""
        return await self._current().exited()

    def release_with_attempt(self, release: Callable[[], None]) -> None:
        """Have ``release`` called when the current start attempt has ended, for leases and files of its own."""
        self._current().on_end(release)

    @property
    def program(self) -> str | None:
        """The engine's program, for checks before a start; None where there is none, or it is not known.

        Raises:
            ServerError: it is not installed.
        """
        return self.config.executable

    @property
    def can_serve_uds(self) -> bool:
        """Whether the engine, as configured, can serve on a unix socket."""
        return self.supports_uds

    @property
    def host(self) -> str:
        """Address that the engine binds."""
        return self.config.host

    @property
    def port(self) -> int | None:
        """Port leased for the current start attempt; None for a unix socket, and while nothing runs."""
        return self._supervisor.attempt.port if self._supervisor.attempt else None

    @property
    def uds(self) -> str | None:
        """Unix socket path leased for the current start attempt; None for a port, and while nothing runs."""
        return self._supervisor.attempt.uds if self._supervisor.attempt else None

    # -- public surface -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For messages: engine and rank."""
        return f"{self.engine_name} rank {self.rank}"

    @property
    def state(self) -> ServerState:
        """Where the server is in its life."""
        return self._lifecycle.state

    @property
    def failure(self) -> ServerError | None:
        """Why the server failed, also after its block has ended; None unless it did."""
        return self._lifecycle.failure

    @property
    def lifecycle(self) -> Lifecycle:
        """States and their observers."""
        return self._lifecycle

    def events(self) -> Events:
        """``async for event in server.events()``: each change of state, with reason and time, until it is stopped."""
        return Events(self._lifecycle)

    @property
    def crash_reports(self) -> Sequence[CrashReport]:
        """One for each start attempt of this life that has failed, oldest first; the last hundred."""
        return tuple(self._supervisor.reports)

    @property
    def restarts(self) -> int:
        """How often the engine was started again in this life, after it had been ready."""
        return self._supervisor.restarts

    @property
    def phase(self) -> str:
        """What a starting engine is doing, as far as its output tells: "load weights", say; else empty."""
        start = self._supervisor.start
        return start.progress.phase if start is not None and self._lifecycle.state in COMING else ""

    async def drain(self, timeout: float, reason: str = "asked to") -> bool:
        """Take no more requests, and wait until those under way have been answered.

        New requests raise `ServerError` from now on; those that wait for the engine to be ready still get their turn.
        A drained server is left to be stopped: it does not take up work again.

        Args:
            timeout: seconds to wait.
            reason: for messages.

        Returns:
            Whether all have been answered. Cancelled: it goes on to refuse new ones.
        """
        self._lifecycle.drain(reason)
        give_up = trio.current_time() + timeout
        while True:
            if not self.requests_in_flight:
                return True
            if self._lifecycle.is_down or trio.current_time() >= give_up:
                return False
            await trio.sleep(DRAIN_LOOKS)

    @property
    def requests_accepted(self) -> int:
        """Requests so far, those that wait or failed included."""
        return self._in_flight.total

    @property
    def marker(self) -> Mapping[str, str]:
        """Environment variables by which the processes of this server can be recognised."""
        return self._supervisor.marker

    @property
    def current_attempt(self) -> Attempt | None:
        """The start attempt that runs now. Not for users: what it holds ends with it."""
        return self._supervisor.attempt

    @property
    def requests_in_flight(self) -> int:
        """Requests that were accepted and are not answered yet, streams included."""
        return self._in_flight.count  # and not what is in the pool: a probe of our own is nobody's request

    async def server_cleanup(self) -> None:
        """Stop the engine and wait until nothing of it is left; idempotent.

        Leaving the block calls it. A subclass that holds more than `spawn` and `start_task` know of may extend it; it
        runs shielded there, for the grace period and some seconds at most.
        """
        self._lifecycle.leave()
        self._cut_requests()
        self._run_scope.cancel()
        if self._nursery is not None:
            await self._ended.wait()
        self._lifecycle.stop("left")

    # -- the block ------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._nursery is not None:
            raise RuntimeError(f"{self.name} has been entered already: one block at a time")
        self._home = trio.lowlevel.current_trio_token()
        self.node = find_node(
            os.environ, multi_node=self.config.multi_node, spans_nodes=self.spans_nodes and self.is_local
        )
        self.log = EngineLog(self._log_path(), max_bytes=self.config.server_log_max_bytes)
        self._run_scope, self._ended = trio.CancelScope(), trio.Event()
        self._supervisor = Supervisor(self, self._lifecycle)
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        try:
            self._lifecycle.start()
            self._nursery.start_soon(self._live)
            if self.node.is_worker:
                await self._ended.wait()
                await self._leave(None)
                if self.failure is not None:
                    raise self.failure.fresh()
                # A worker node has no server to talk to. The reference yields None there; the type stays simple for
                # the many users who have one node only.
                return cast("Self", None)
            # The engine is executed before the body begins, which may not give way for a while: a body that prepares
            # data without a checkpoint would keep it from loading meanwhile.
            with trio.move_on_after(LAUNCH):
                await self._supervisor.launched.wait()
        except BaseException as error:
            if self._nursery is not None:
                await self._leave(error)
            raise
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._nursery is not None:  # a worker node has left already
            await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        """Stop everything, and close the nursery; raises what must come out besides the body's own ``error``."""
        assert self._nursery is not None
        interrupt: KeyboardInterrupt | None = None
        bound = self.config.shutdown_grace_sec + CLEANUP_MARGIN
        with trio.CancelScope(shield=True, deadline=trio.current_time() + bound) as shield:
            while True:
                try:
                    await self.server_cleanup()
                except KeyboardInterrupt as again:
                    # Ctrl-C during the clean-up: no more grace, but the clean-up is still done.
                    interrupt = again
                    if self._supervisor.attempt is not None:
                        self._supervisor.attempt.stop_now()
                except Exception:
                    logger.exception("%s: cleaning up failed", self.name)
                    break
                else:
                    break
        if shield.cancelled_caught:
            logger.error("%s: cleaning up took more than %.0f s and was given up", self.name, bound)
        self._run_scope.cancel()
        self._lifecycle.stop("left")
        manager, nursery = self._nursery_manager, self._nursery
        self._nursery_manager = self._nursery = self._home = None
        nursery.cancel_scope.cancel()
        try:
            # The body's exception is not passed on: the nursery would wrap it into an ExceptionGroup.
            await manager.__aexit__(None, None, None)
        except trio.Cancelled:
            if error is None:
                raise
        except BaseExceptionGroup as group:
            rest = group.split(trio.Cancelled)[1]
            if rest is not None:
                interrupted = rest.subgroup(KeyboardInterrupt)
                raise _only(rest) if interrupted is None else KeyboardInterrupt() from error
            if error is None:
                raise
        if interrupt is not None:
            raise interrupt from error

    # -- the background -------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _live(self) -> None:
        """The whole life between entering and leaving."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.log.run)
                if self.is_local:
                    nursery.start_soon(self._registration.run)
                with self._run_scope:
                    await self._supervisor.run()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + LOG_FLUSH):
                    await self.log.aclose()
                nursery.cancel_scope.cancel()
        finally:
            self._ended.set()

    def _on_transition(self, transition: Transition) -> None:
        if transition.after in {ServerState.FAILED, ServerState.RESTARTING}:
            self._cut_requests()

    def _cut_requests(self) -> None:
        """Requests in flight get nothing from an engine that is down; `InFlight.replay` sees what becomes of them."""
        if self._supervisor.link is not None:
            self._supervisor.link.api.close()
        self._in_flight.interrupt()

    def has_own_readiness(self) -> bool:
        """Whether a subclass decides itself what ready means."""
        return type(self).is_ready is not InferenceServer.is_ready

    def health_watch(self, attempt: Attempt, link: Link) -> HealthWatch | None:
        """Who watches whether the engine of an attempt gets anywhere; None for engines that are no processes."""
        if not attempt.processes:
            return None
        in_flight, pool = self._in_flight, link.api.pool
        return HealthWatch(
            self.name,
            self.config,
            attempt,
            link,
            in_flight=lambda: pool.in_use + in_flight.own,
            awaited=lambda: pool.in_use - pool.unread + in_flight.own,
            received=lambda: pool.received + in_flight.answered,
            refused=lambda: pool.refused,
            token_probe=(self.route, self._token_probe()),
        )

    def open_link(self) -> Link:
        """Clients for the current attempt; a subclass's own `get_base_url` wins."""
        if type(self).get_base_url is not InferenceServer.get_base_url:
            origin = Origin.from_url(self.get_base_url())
        else:
            origin = local_origin(self._current(), self.host)
        return Link(origin, self._api_key(), self.config)

    def _current(self) -> Attempt:
        if self._supervisor.attempt is None:
            raise RuntimeError(f"{self.name} does not run: this is for use inside start_server and monitor_health")
        return self._supervisor.attempt

    def _log_path(self) -> Path | None:
        if self.config.server_log_folder is None:
            return None
        node = f"_node_{self.node.rank}" if self.node.count > 1 else ""
        path = Path(self.config.server_log_folder) / f"server_rank_{self.rank}{node}.log"
        try:
            return path.absolute()  # the body may change the working directory
        except FileNotFoundError:  # it has been removed: the log says so when it is written
            return path


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception of nested groups of one; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
