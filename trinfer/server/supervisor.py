"""Brings an engine up, over as many start attempts as it may take, and watches over it.

Rules:
- Nothing that goes wrong here comes out as an exception: it becomes the server's failure, with its explanation.
- Who waits is told before the clean-up, which may take the grace period; a next attempt begins only after it.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from trinfer.errors import ServerError, TrinferError
from trinfer.server.attempt import Attempt, PortTaken
from trinfer.server.diagnosis import diagnose, is_port_in_use
from trinfer.server.identity import new_marker
from trinfer.server.lifecycle import ServerState
from trinfer.server.link import Link, is_ours
from trinfer.server.readiness import Pace, served_models, until_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trinfer.config import InferenceConfig
    from trinfer.process.output import EngineLog
    from trinfer.server.lifecycle import Lifecycle
    from trinfer.server.node import Node

__all__ = ["Supervised", "Supervisor"]

logger = logging.getLogger(__name__)

PORT_CHANGES = 10  # new ports taken in one start before the start counts as failed
LAST_WORDS = 0.04  # seconds that the output of a dead engine may still take to arrive
SHOWN_TAIL = 50  # lines
READ_TAIL = 200  # lines that are searched for a cause
KEY_REFUSED = frozenset({401, 403})
NO_SUCH_ROUTE = frozenset({404, 405})


class Supervised(Protocol):
    """What a supervisor needs to know of its server."""

    config: InferenceConfig
    rank: int
    log: EngineLog
    node: Node

    @property
    def name(self) -> str: ...
    @property
    def engine_name(self) -> str: ...
    @property
    def is_local(self) -> bool: ...
    @property
    def can_serve_uds(self) -> bool: ...
    async def start_server(self) -> trio.Process | None: ...
    async def monitor_health(self) -> None: ...
    async def is_ready(self) -> bool: ...
    def has_own_readiness(self) -> bool: ...
    def open_link(self) -> Link: ...


class Supervisor:
    """One life of one server: its attempts, one after the other.

    Attributes:
        attempt: the current one; None before the first and after the last.
        link: the way to its engine, once it has been spawned.
        found_model: the first model that it offers, where the config names none.
    """

    def __init__(self, server: Supervised, lifecycle: Lifecycle) -> None:
        self._server = server
        self._lifecycle = lifecycle
        self._nudge = trio.Event()
        self._ports: set[int] = set()
        self.attempt: Attempt | None = None
        self.link: Link | None = None
        self.found_model = ""

    async def run(self) -> None:
        """Return when the engine has failed for good, or (on a worker node) has ended well.

        Cancelled: the engine is stopped, and nothing of it is left.
        """
        history: list[str] = []
        try:
            while await self._attempt_once(history):
                self._lifecycle.retry()
        finally:
            self.attempt = None

    async def _attempt_once(self, history: list[str]) -> bool:
        """One attempt, from its lease to its clean-up; True if another shall follow."""
        server = self._server
        env = {**os.environ, **server.config.env}
        if server.config.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, server.config.gpus))
        attempt = Attempt(log=server.log, env=env, marker=new_marker(), grace=server.config.shutdown_grace_sec)
        again = False

        async def body() -> None:
            nonlocal again
            failure = await self._start_and_watch(attempt)
            if failure is None:
                return  # a worker node's engine that ended well
            if isinstance(failure, PortTaken) and len(self._ports) <= PORT_CHANGES:
                logger.info("%s: %s; taking another port", server.name, failure.message)
                again = True
                return
            history.append(failure.message)
            if self._may_retry(len(history)):
                logger.warning("%s: starting again after: %s", server.name, failure.message)
                again = True
                return
            self._lifecycle.fail(self._explain(failure, history))

        self.attempt = attempt
        server.log.begin(f"start attempt {len(history) + 1} of {server.name}")
        try:
            await attempt.run(body)
        finally:
            link, self.link = self.link, None
            if link is not None:
                await link.aclose()
        return again

    def _may_retry(self, failures: int) -> bool:
        if self._lifecycle.state is ServerState.READY or self._server.node.is_worker or not self._server.is_local:
            return False
        return failures <= self._server.config.server_start_max_retries

    async def _start_and_watch(self, attempt: Attempt) -> ServerError | None:
        """Start the engine and watch over it; returns why it failed, None for a worker's engine that ended well."""
        server = self._server
        serves = not server.node.is_worker
        stop_listening = server.log.listen(partial(self._hear, attempt))
        try:
            if server.is_local and serves:
                attempt.lease_address(
                    host=server.config.host, rank=server.rank, uds=self._wants_uds(), avoid=self._ports
                )
                if attempt.port is not None:
                    self._ports.add(attempt.port)
            limit = server.config.server_start_timeout_sec
            with trio.move_on_after(limit) as spawning:
                await server.start_server()
            if spawning.cancelled_caught:
                return ServerError(
                    f"{server.name}: spawning the engine took more than {limit:g} s (server_start_timeout_sec)"
                )
            attempt.start_soon(partial(self._watch_health, attempt))
            if serves:
                self.link = server.open_link()
                attempt.start_soon(self.link.api.sweep)
                attempt.start_soon(partial(self._watch_start, attempt, stop_listening))
            failure = await attempt.verdict()
        except ServerError as error:
            failure = error
        except TrinferError as error:
            failure = ServerError(f"{server.name}: {error.message}", cause=error.cause, advice=error.advice)
            failure.__cause__ = error
        except Exception as error:
            failure = ServerError(f"{server.name}: starting failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        finally:
            stop_listening()
        return None if server.node.is_worker and failure.returncode == 0 else failure

    def _wants_uds(self) -> bool:
        wanted, able = self._server.config.transport, self._server.can_serve_uds
        if wanted == "uds" and not able:
            raise ServerError(
                f"{self._server.name} cannot serve on a unix socket", advice='use transport="auto" or "tcp"'
            )
        return able and wanted != "tcp"

    @trio.lowlevel.enable_ki_protection
    async def _watch_health(self, attempt: Attempt) -> None:
        """Turn the end of `monitor_health` into the attempt's verdict."""
        cause: Exception | None = None
        try:
            await self._server.monitor_health()
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
        name, ready = self._server.name, self._lifecycle.state is ServerState.READY
        when = "while serving" if ready else "before it was ready"
        for guarded in attempt.processes:
            if guarded.exit is not None:
                if (
                    not ready
                    and attempt.port is not None
                    and any(map(is_port_in_use, self._server.log.tail(SHOWN_TAIL)))
                ):
                    return PortTaken(f"{name}: port {attempt.port} is in use", returncode=guarded.exit.returncode)
                return ServerError(
                    f"{name}: the engine ended {when}: {guarded.exit.describe()}", returncode=guarded.exit.returncode
                )
        if cause is not None:
            return ServerError(f"{name}: the engine is unhealthy: {type(cause).__name__}: {cause}")
        return ServerError(f"{name}: the engine became unhealthy {when}")

    @trio.lowlevel.enable_ki_protection
    async def _watch_start(self, attempt: Attempt, stop_listening: Callable[[], None]) -> None:
        """Wait until the engine answers, or its time is up."""
        config, name = self._server.config, self._server.name
        try:
            with trio.move_on_after(config.ready_deadline_sec) as deadline:
                await until_ready(
                    partial(self._look, attempt), pace=Pace(config.server_ready_delay_sec), nudge=self._new_nudge
                )
        except ServerError as error:
            attempt.fail(error)
        except Exception as error:
            failure = ServerError(f"{name}: is_ready() failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            attempt.fail(failure)
        else:
            if deadline.cancelled_caught:
                attempt.fail(
                    ServerError(
                        f"{name}: the engine was not ready within {config.ready_deadline_sec:g} s{self._last_look()}",
                        advice="raise server_ready_max_attempts or server_ready_delay_sec if it was still loading",
                    )
                )
            else:
                stop_listening()  # decoding all output is for the time of the start
                self._lifecycle.ready()

    async def _look(self, attempt: Attempt) -> bool:
        """One look: does it answer, and is it ours?

        Raises:
            PortTaken: it answers, but somebody else does.
        """
        server, link = self._server, self.link
        assert link is not None
        if server.has_own_readiness():
            return await server.is_ready()
        if server.is_local and not link.is_open():
            return False
        status, body = await link.models()
        if status in KEY_REFUSED and await self._is_certainly_ours(attempt):
            raise ServerError(
                f"{server.name}: the server answers, but refuses the API key (status {status})",
                cause="no key was sent, or a wrong one",
                advice="set api_key in the config, or TRINFER_API_KEY or OPENAI_API_KEY for an endpoint",
            )
        if status in NO_SUCH_ROUTE and not server.is_local:
            return True  # not every endpoint lists its models; a wrong URL shows with the first request
        if status != 200:
            return False
        self.found_model = next(iter(served_models(body)), "")
        if not server.is_local:
            return True
        # In a thread, since it reads a good part of /proc.
        ours = await trio.to_thread.run_sync(
            partial(is_ours, attempt, body, model=server.config.model, own_pid=os.getpid())
        )
        if ours is False:
            raise PortTaken(f"{server.name}: another program answers on port {attempt.port}")
        return bool(ours)

    async def _is_certainly_ours(self, attempt: Attempt) -> bool:
        if not self._server.is_local or attempt.port is None:
            return True
        owned = await trio.to_thread.run_sync(partial(attempt.owns_port, own_pid=os.getpid()))
        return owned is True

    def _last_look(self) -> str:
        return f" ({self.link.last_look})" if self.link is not None and self.link.last_look else ""

    def _hear(self, attempt: Attempt, text: str) -> None:
        """Listen to the engine's output while it starts."""
        self._nudge.set()
        if attempt.port is not None and is_port_in_use(text):
            attempt.fail(PortTaken(f"{self._server.name}: port {attempt.port} is in use, says the engine"))

    def _new_nudge(self) -> trio.Event:
        self._nudge = trio.Event()
        return self._nudge

    def _explain(self, failure: ServerError, history: Sequence[str]) -> ServerError:
        """The failure with all that is known: diagnosis, the engine's last words, the attempts before."""
        server = self._server
        tail = failure.log_tail or server.log.tail(SHOWN_TAIL)
        # Engines of several processes repeat a failure in each, with a traceback: its cause may stand far up.
        lines = failure.log_tail or server.log.tail(READ_TAIL)
        diagnosis = None if failure.cause else diagnose(lines, server.engine_name, returncode=failure.returncode)
        explained = ServerError(
            failure.message,
            cause=diagnosis.cause if diagnosis else failure.cause,
            advice=diagnosis.advice if diagnosis else failure.advice,
            log_tail=tail,
            server=server.name,
            returncode=failure.returncode,
            history=history,
        )
        explained.__cause__ = failure.__cause__
        return explained
