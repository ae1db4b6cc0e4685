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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import trio

from trinfer.errors import ConnectionLost, InferenceError, ServerError
from trinfer.http.api import ApiClient
from trinfer.http.control import ControlClient
from trinfer.http.origin import Origin
from trinfer.process.output import EngineLog
from trinfer.server.attempt import Attempt, PortTaken
from trinfer.server.diagnosis import diagnose, is_port_in_use
from trinfer.server.identity import new_marker
from trinfer.server.lifecycle import Lifecycle, ServerState
from trinfer.server.node import SINGLE, Node, find_node
from trinfer.server.readiness import Pace, accepts_connections, served_models, until_ready

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from trinfer.config import InferenceConfig

__all__ = ["InferenceServer"]

logger = logging.getLogger(__name__)

READINESS_PATH = "/v1/models"
PROBE_TIMEOUT = 5.0  # seconds for one look; SGLang is known to take one
PORT_CHANGES = 10  # new ports taken in one start before the start counts as failed
LAST_WORDS = 0.04  # seconds that the output of a dead engine may still take to arrive
BREAK_BEFORE_VERDICT = 1.0  # seconds between a broken connection and the news that the engine has died
CLEANUP_MARGIN = 10.0  # seconds beyond the grace period after which cleaning up is given up and reported
SHOWN_TAIL = 50


class InferenceServer(abc.ABC):
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
        self._nursery_manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._run_scope = trio.CancelScope()
        self._ended = trio.Event()
        self._attempt: Attempt | None = None
        self._api: ApiClient | None = None
        self._control: ControlClient | None = None
        self._in_flight: set[trio.CancelScope] = set()
        self._nudge = trio.Event()
        self._found_model = ""

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
        return self._origin().url

    async def is_ready(self) -> bool:
        """Whether ``GET /v1/models`` is answered with 200, right now, within 5 seconds."""
        status, body = await self._look_at_models()
        if status == 200:
            self._remember_model(body)
        return status == 200

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Send one complete payload; subclasses may override it for engines with routes of their own."""
        if self._api is None:
            raise self._lifecycle.down_error()
        path = "/v1/chat/completions" if self.config.use_chat else "/v1/completions"
        return await self._api.post_json(path, payload, timeout=self.config.request_timeout)

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
        return self._attempt.port if self._attempt else None

    @property
    def uds(self) -> str | None:
        """Unix socket path leased for the current start attempt; None for a port, and while nothing runs."""
        return self._attempt.uds if self._attempt else None

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

    @property
    def model(self) -> str:
        """Name of the model in requests: the configured one, else the first that the server offers."""
        return self.config.model or self._found_model

    async def wait_ready(self) -> None:
        """Return once the engine answers and is known to be ours.

        Raises:
            ServerError: it failed, or was stopped; every waiter gets an error of its own with the same cause.
        """
        await self._lifecycle.wait_ready()

    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for readiness, send one request, and return the server's answer.

        The payload is not changed; the model's name and ``default_generation_params`` are filled in where it has none.
        ``request_timeout`` holds from the moment that the engine is ready.

        Raises:
            InferenceError: this request failed: the server refused it, it took too long, its connection broke, …
            ServerError: the engine failed or was stopped before it answered; with the log's last lines.

        Cancelled: the request's connection is closed, so that the engine stops generating.
        """
        if self._lifecycle.state is not ServerState.READY:
            await self.wait_ready()
        complete: dict[str, Any] = {**self.config.default_generation_params, **payload}
        if self.model:
            complete.setdefault("model", self.model)
        with trio.CancelScope() as scope:
            self._in_flight.add(scope)
            try:
                return await self._make_request(complete)
            except ConnectionLost:
                # Most often the engine's death, of which the monitor is about to tell.
                with trio.move_on_after(BREAK_BEFORE_VERDICT if self.is_local else 0):
                    await self._lifecycle.down.wait()
                if self._lifecycle.state is not ServerState.READY:
                    raise self._lifecycle.down_error() from None
                raise
            except InferenceError as error:
                error.payload = payload
                raise
            finally:
                self._in_flight.discard(scope)
        raise self._lifecycle.down_error()

    async def server_cleanup(self) -> None:
        """Stop the engine and wait until nothing of it is left; idempotent.

        Leaving the block calls it. A subclass that holds more than `spawn` and `start_task` know of may extend it; it
        runs shielded there, for the grace period and some seconds at most.
        """
        self._run_scope.cancel()
        if self._nursery is not None:
            await self._ended.wait()
        self._lifecycle.stop("left")

    # -- the block ------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._nursery is not None:
            raise RuntimeError(f"{self.name} has been entered already: one block at a time")
        self.node = find_node(
            os.environ, multi_node=self.config.multi_node, spans_nodes=self.spans_nodes and self.is_local
        )
        self.log = EngineLog(self._log_path(), max_bytes=self.config.server_log_max_bytes)
        self._run_scope, self._ended = trio.CancelScope(), trio.Event()
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
                    if self._attempt is not None:
                        self._attempt.stop_now()
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
        self._nursery_manager = self._nursery = None
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
                raise _only(rest) from error
            if error is None:
                raise
        if interrupt is not None:
            raise interrupt from error

    # -- the background -------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _live(self) -> None:
        """The whole life between entering and leaving: start attempts one after the other, then the end."""
        try:
            async with trio.open_nursery() as log_nursery:
                await log_nursery.start(self.log.run)
                with self._run_scope:
                    await self._start_until_it_holds()
                with trio.CancelScope(shield=True):
                    await self.log.aclose()
                log_nursery.cancel_scope.cancel()
        finally:
            self._interrupt_requests()
            self._ended.set()

    async def _start_until_it_holds(self) -> None:
        history: list[str] = []
        ports: set[int] = set()
        while True:
            attempt = self._new_attempt()
            final: ServerError | None = None
            again = False

            async def body(attempt: Attempt = attempt) -> None:
                nonlocal final, again
                failure = await self._run_attempt(attempt, ports)
                if failure is None:
                    return  # a worker node's engine that ended well
                if isinstance(failure, PortTaken) and len(ports) <= PORT_CHANGES:
                    logger.info("%s: %s; taking another port", self.name, failure.message)
                    again = True
                    return
                history.append(failure.message)
                again = self._may_retry(failure, len(history))
                if not again:
                    final = self._explain(failure, history)
                    # Told before the clean-up, which may take the grace period: nobody waits for it.
                    self._lifecycle.fail(final)
                    self._interrupt_requests()

            try:
                await attempt.run(body)
            finally:
                await self._close_clients()
            if not again:
                self._attempt = None
                return
            logger.warning("%s: start failed, trying again: %s", self.name, history[-1] if history else "port")
            self._lifecycle.retry()

    def _may_retry(self, failure: ServerError, failures: int) -> bool:
        if self.state is ServerState.READY or self.node.is_worker or getattr(failure, "is_final", False):
            return False
        return failures <= self.config.server_start_max_retries

    def _new_attempt(self) -> Attempt:
        env = {**os.environ, **self.config.env}
        if self.config.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.config.gpus))
        self._attempt = Attempt(log=self.log, env=env, marker=new_marker(), grace=self.config.shutdown_grace_sec)
        return self._attempt

    async def _run_attempt(self, attempt: Attempt, ports: set[int]) -> ServerError | None:
        """Start the engine and watch over it; returns why it failed, None for a worker's engine that ended well."""
        stop_listening: Callable[[], None] | None = None
        try:
            if self.is_local and not self.node.is_worker:
                attempt.lease_address(host=self.host, rank=self.rank, uds=self._wants_uds(), avoid=ports)
                if attempt.port is not None:
                    ports.add(attempt.port)
            stop_listening = self.log.listen(partial(self._hear, attempt))
            with trio.move_on_after(self.config.server_start_timeout_sec) as spawning:
                await self.start_server()
            if spawning.cancelled_caught:
                return ServerError(
                    f"{self.name}: spawning the engine took more than "
                    f"{self.config.server_start_timeout_sec:g} s (server_start_timeout_sec)"
                )
            attempt.start_soon(partial(self._watch_health, attempt))
            if not self.node.is_worker:
                self._open_clients()
                attempt.start_soon(partial(self._watch_start, attempt))
            failure = await attempt.verdict()
        except ServerError as error:
            failure = error
        except Exception as error:
            logger.debug("%s: starting failed", self.name, exc_info=True)
            failure = ServerError(f"{self.name}: starting failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            if stop_listening is not None:
                stop_listening()
        if self.node.is_worker and failure.returncode == 0:
            return None
        return failure

    @trio.lowlevel.enable_ki_protection
    async def _watch_health(self, attempt: Attempt) -> None:
        """Turn the end of `monitor_health` into the attempt's verdict."""
        cause: Exception | None = None
        try:
            await self.monitor_health()
        except ServerError as error:
            attempt.fail(error)
            return
        except Exception as error:
            cause = error
        await attempt.drained(LAST_WORDS)
        failure = self._describe_end(attempt, cause)
        failure.__cause__ = cause
        attempt.fail(failure)

    def _describe_end(self, attempt: Attempt, cause: Exception | None) -> ServerError:
        when = "while serving" if self.state is ServerState.READY else "before it was ready"
        for guarded in attempt.processes:
            if guarded.exit is not None:
                returncode = guarded.exit.returncode
                if self.state is ServerState.STARTING and any(map(is_port_in_use, self.log.tail(SHOWN_TAIL))):
                    return PortTaken("the engine's port was in use", server=self.name, returncode=returncode)
                return ServerError(
                    f"{self.name}: the engine ended {when}: {guarded.exit.describe()}", returncode=returncode
                )
        if cause is not None:
            return ServerError(f"{self.name}: the engine is unhealthy: {type(cause).__name__}: {cause}")
        return ServerError(f"{self.name}: the engine became unhealthy {when}")

    @trio.lowlevel.enable_ki_protection
    async def _watch_start(self, attempt: Attempt) -> None:
        """Wait until the engine answers, or its time is up."""
        limit = self.config.ready_deadline_sec
        try:
            with trio.move_on_after(limit) as deadline:
                pace = Pace(self.config.server_ready_delay_sec)
                await until_ready(partial(self._look, attempt), pace=pace, nudge=self._new_nudge)
        except ServerError as error:
            attempt.fail(error)
        except Exception as error:
            failure = ServerError(f"{self.name}: is_ready() failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            attempt.fail(failure)
        else:
            if deadline.cancelled_caught:
                attempt.fail(
                    ServerError(
                        f"{self.name}: the engine was not ready within {limit:g} s",
                        advice="raise server_ready_max_attempts or server_ready_delay_sec if it was still loading",
                    )
                )
            else:
                self._lifecycle.ready()

    async def _look(self, attempt: Attempt) -> bool:
        """One look: does it answer, and is it ours?

        Raises:
            PortTaken: it answers, but somebody else does.
        """
        overridden = type(self).is_ready is not InferenceServer.is_ready
        if not self.is_local or overridden:
            return await self.is_ready()
        if not accepts_connections(_reachable(self.host), attempt.port, attempt.uds):
            return False
        status, body = await self._look_at_models()
        if status != 200:
            return False
        self._remember_model(body)
        if attempt.port is None:
            return True  # a socket in a private folder: nobody else knows of it
        owned = await trio.to_thread.run_sync(partial(attempt.owns_port, own_pid=os.getpid()))
        if owned or self.config.model in served_models(body):
            return True
        if owned is None:
            return not served_models(body) or not self.config.model
        raise PortTaken(f"another program answers on port {attempt.port}", server=self.name)

    async def _look_at_models(self) -> tuple[int, bytes]:
        """``GET /v1/models``; status 0 where nothing answers."""
        if self._control is None:
            return 0, b""
        try:
            return await self._control.get(READINESS_PATH, timeout=PROBE_TIMEOUT)
        except InferenceError:
            return 0, b""

    def _hear(self, attempt: Attempt, text: str) -> None:
        """Listen to the engine's output while it starts."""
        self._nudge.set()
        if self.state is ServerState.STARTING and attempt.port is not None and is_port_in_use(text):
            attempt.fail(PortTaken(f"port {attempt.port} is in use, says the engine", server=self.name))

    def _new_nudge(self) -> trio.Event:
        self._nudge = trio.Event()
        return self._nudge

    # -- small things ---------------------------------------------------------------------------------------------

    def _wants_uds(self) -> bool:
        wanted = self.config.transport
        if wanted == "uds" and not self.can_serve_uds:
            raise ServerError(
                f"{self.name} cannot serve on a unix socket",
                advice='use transport="auto" or "tcp"',
            )
        return wanted == "uds" or (wanted == "auto" and self.can_serve_uds)

    def _current(self) -> Attempt:
        if self._attempt is None:
            raise RuntimeError(f"{self.name} does not run: this is for use inside start_server and monitor_health")
        return self._attempt

    def _origin(self) -> Origin:
        if self._attempt is None or (self.port is None and self.uds is None):
            raise self._lifecycle.down_error()
        if self.uds is not None:
            return Origin.unix(self.uds)
        assert self.port is not None
        host = _reachable(self.host)
        return Origin.from_url(f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}")

    def _api_key(self) -> str | None:
        return self.config.api_key

    def _open_clients(self) -> None:
        # A subclass may tell its own URL.
        own_url = type(self).get_base_url is not InferenceServer.get_base_url
        origin = Origin.from_url(self.get_base_url()) if own_url else self._origin()
        self._api = ApiClient(origin, api_key=self._api_key())
        self._control = ControlClient(origin, api_key=self._api_key())

    async def _close_clients(self) -> None:
        api, control, self._api, self._control = self._api, self._control, None, None
        if api is not None:
            api.close()
        if control is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await control.aclose()

    def _interrupt_requests(self) -> None:
        """Requests in flight get nothing from an engine that is down; `make_request` tells them why."""
        for scope in tuple(self._in_flight):
            scope.cancel()

    def _remember_model(self, body: bytes) -> None:
        if not self._found_model:
            self._found_model = next(iter(served_models(body)), "")

    def _log_path(self) -> Path | None:
        if self.config.server_log_folder is None:
            return None
        node = f"_node_{self.node.rank}" if self.node.count > 1 else ""
        return Path(self.config.server_log_folder) / f"server_rank_{self.rank}{node}.log"

    def _explain(self, failure: ServerError, history: Sequence[str]) -> ServerError:
        """The failure with all that is known: diagnosis, the engine's last words, the attempts before."""
        tail = failure.log_tail or self.log.tail(SHOWN_TAIL)
        diagnosis = None if failure.cause else diagnose(tail, self.engine_name)
        explained = ServerError(
            failure.message,
            cause=diagnosis.cause if diagnosis else failure.cause,
            advice=diagnosis.advice if diagnosis else failure.advice,
            log_tail=tail,
            server=self.name,
            returncode=failure.returncode,
            history=history,
        )
        explained.__cause__ = failure.__cause__
        return explained


def _reachable(host: str) -> str:
    """Where a server that binds ``host`` can be reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception of nested groups of one; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
