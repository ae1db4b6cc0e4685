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

from trinfer.errors import InferenceError, ServerError
from trinfer.http.origin import Origin
from trinfer.process.output import EngineLog
from trinfer.results import InferenceResult
from trinfer.server.generation import StructuredModel, generation_payload, structured
from trinfer.server.in_flight import InFlight, ServerStream
from trinfer.server.lifecycle import Lifecycle, ServerState, Transition
from trinfer.server.link import Link, local_origin
from trinfer.server.node import SINGLE, Node, find_node
from trinfer.server.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from trinfer.config import InferenceConfig
    from trinfer.http.api import JsonStream
    from trinfer.http.control import HttpxClient
    from trinfer.server.attempt import Attempt

__all__ = ["InferenceServer"]

logger = logging.getLogger(__name__)

CLEANUP_MARGIN = 10.0  # seconds beyond the grace period after which cleaning up is given up and reported
LOG_FLUSH = 5.0  # seconds for the last lines to reach the disk


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
        self._lifecycle.observers.append(self._on_transition)
        self._in_flight = InFlight(self._lifecycle, self.is_local)
        self._supervisor = Supervisor(self, self._lifecycle)
        self._has_own_requests = type(self)._make_request is not InferenceServer._make_request
        self._nursery_manager: Any = None
        self._nursery: trio.Nursery | None = None
        self._run_scope = trio.CancelScope()
        self._ended = trio.Event()

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

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Send one complete payload; subclasses may override it for engines with routes of their own."""
        return await self._link().api.post_json(self.route, payload, timeout=self.config.request_timeout)

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

    @property
    def route(self) -> str:
        """Path of generation requests, by ``use_chat``."""
        return "/v1/chat/completions" if self.config.use_chat else "/v1/completions"

    @property
    def model(self) -> str:
        """Name of the model in requests: the configured one, else the first that the server offers."""
        return self.config.model or self._supervisor.found_model

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
        complete = self._complete(payload)
        if not self._has_own_requests:
            # The short way for the usual case: each layer between costs on every request.
            link = self._link()
            try:
                return await link.api.post_json(self.route, complete, timeout=self.config.request_timeout)
            except InferenceError as error:
                raise await self._in_flight.verdict(error, payload) from error.__cause__
        return await self._in_flight.answered(partial(self._make_request, complete), payload)

    async def request(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """POST to another route of the engine: embeddings, rerank, score, responses, tokenize, …

        Args:
            path: such as ``/v1/embeddings``.
            payload: the model's name is filled in; generation parameters are not.

        Raises, and when cancelled: as `make_request`.
        """
        await self._until_ready()
        api = self._link().api
        complete = {"model": self.model, **payload} if self.model else dict(payload)
        send = partial(api.post_json, path, complete, timeout=self.config.request_timeout)
        return await self._in_flight.answered_by_link(send, payload)

    def stream_request(self, payload: Mapping[str, Any]) -> ServerStream:
        """Send one request, and iterate over its chunks as they come.

        ``async for chunk in server.stream_request(payload)``: chunks are the server's JSON objects, up to ``[DONE]``.
        Leaving the loop early closes the connection when the stream is dropped; ``async with`` closes it at once.

        Raises, in the loop: as `make_request`; errors after the first chunk say how many came. Cancelled: likewise.
        """
        return ServerStream(partial(self._open_stream, payload), self._in_flight, payload)

    async def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        response_model: StructuredModel[Any] | None = None,
        max_validation_retries: int = 2,
        **params: Any,  # noqa: ANN401  # generation parameters, whatever the server knows
    ) -> InferenceResult:
        """One generation, for a prompt or a list of messages.

        Args:
            prompt: a text, or messages (on the chat route only).
            response_model: a pydantic model. Its JSON schema is sent as ``response_format``, and the text is read into
                it, as ``result.parsed``.
            max_validation_retries: how often an answer that does not fit is asked for again.
            params: max_tokens, temperature, ….

        Raises:
            StructuredOutputError: no answer fitted the response_model.
            InferenceError, ServerError: as `make_request`. Cancelled: likewise.
        """
        payload = {**generation_payload(prompt, use_chat=self.config.use_chat), **params}
        if response_model is None:
            return InferenceResult.from_response(await self.make_request(payload))
        return await structured(self.make_request, payload, response_model, max_validation_retries)

    @property
    def openai_base_url(self) -> str:
        """URL for clients of the user's own, with ``/v1``; the key is `api_key`.

        Raises:
            ServerError: the engine is reached through a unix socket, or does not run.
        """
        if self.uds is not None:
            raise ServerError(
                f"{self.name} listens on a unix socket", advice='use transport="tcp" for clients of your own'
            )
        return f"{self.get_base_url()}/v1"

    @property
    def api_key(self) -> str | None:
        """The key that the engine or endpoint asks for; None without one."""
        return self._api_key()

    @property
    def http(self) -> HttpxClient:
        """An `httpx.AsyncClient` for everything else; its base URL is the engine's. Closed with the server."""
        return self._link().http

    async def _until_ready(self) -> None:
        if self._lifecycle.state is not ServerState.READY:
            await self.wait_ready()

    async def _open_stream(self, payload: Mapping[str, Any]) -> JsonStream:
        await self._until_ready()
        return self._link().api.stream_json(self.route, self._complete(payload), timeout=self.config.request_timeout)

    def _link(self) -> Link:
        if self._supervisor.link is None:
            raise self._lifecycle.down_error()
        return self._supervisor.link

    def _complete(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        complete: dict[str, Any] = {**self.config.default_generation_params, **payload}
        if self.model:
            complete.setdefault("model", self.model)
        return complete

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
        """The whole life between entering and leaving."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.log.run)
                with self._run_scope:
                    await self._supervisor.run()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + LOG_FLUSH):
                    await self.log.aclose()
                nursery.cancel_scope.cancel()
        finally:
            self._ended.set()

    def _on_transition(self, transition: Transition) -> None:
        if transition.after is ServerState.FAILED:
            self._cut_requests()

    def _cut_requests(self) -> None:
        """Requests in flight get nothing from a server that is down; `make_request` tells them why."""
        if self._supervisor.link is not None:
            self._supervisor.link.api.close()
        self._in_flight.interrupt()

    def has_own_readiness(self) -> bool:
        """Whether a subclass decides itself what ready means."""
        return type(self).is_ready is not InferenceServer.is_ready

    def open_link(self) -> Link:
        """Clients for the current attempt; a subclass's own `get_base_url` wins."""
        if type(self).get_base_url is not InferenceServer.get_base_url:
            origin = Origin.from_url(self.get_base_url())
        else:
            origin = local_origin(self._current(), self.host)
        return Link(origin, self._api_key(), self.config)

    def _api_key(self) -> str | None:
        return self.config.api_key

    def _current(self) -> Attempt:
        if self._supervisor.attempt is None:
            raise RuntimeError(f"{self.name} does not run: this is for use inside start_server and monitor_health")
        return self._supervisor.attempt

    def _log_path(self) -> Path | None:
        if self.config.server_log_folder is None:
            return None
        node = f"_node_{self.node.rank}" if self.node.count > 1 else ""
        return Path(self.config.server_log_folder) / f"server_rank_{self.rank}{node}.log"


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception of nested groups of one; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
