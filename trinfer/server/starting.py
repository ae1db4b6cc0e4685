"""Watches one start attempt until the engine answers, gets stuck, or runs out of time.

Rules: only an engine that is known to be ours is ready. The deadline moves on while the engine gets anywhere; a start
without any sign of life ends early.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from trinfer.errors import ServerError
from trinfer.process import threads
from trinfer.process.activity import cpu_seconds, io_bytes
from trinfer.server.attempt import PortTaken
from trinfer.server.diagnosis import is_port_in_use
from trinfer.server.link import is_ours
from trinfer.server.progress import StartProgress
from trinfer.server.readiness import Pace, served_models, until_ready

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig
    from trinfer.process.output import EngineLog
    from trinfer.server.attempt import Attempt
    from trinfer.server.link import Link

__all__ = ["StartWatch", "Starter"]

logger = logging.getLogger(__name__)

KEY_REFUSED = frozenset({401, 403})
NO_SUCH_ROUTE = frozenset({404, 405})
EXTENSION = 60.0  # seconds without progress after which a start that is over its deadline is given up
LATE = 0.5  # seconds by which a wake-up tells that the event loop was blocked
SECOND_LOOK = 2.0  # seconds that a start gets then
LOOKS = 20  # for signs of life, per start_stall_timeout


class Starter(Protocol):
    """What has to be known of the server."""

    config: InferenceConfig
    log: EngineLog

    @property
    def name(self) -> str: ...
    @property
    def is_local(self) -> bool: ...
    async def is_ready(self) -> bool: ...
    def has_own_readiness(self) -> bool: ...


class StartWatch:
    """The start of one attempt.

    Attributes:
        progress: what the engine is doing.
        found_model: the first model that it offers.
    """

    def __init__(self, server: Starter, attempt: Attempt) -> None:
        self._server = server
        self._attempt = attempt
        self._nudge = trio.Event()
        self._stop_listening = server.log.listen(self._hear)
        self.progress = StartProgress()
        self.found_model = ""

    def close(self) -> None:
        """Listen no more: decoding all output is for the time of the start. Idempotent."""
        self._stop_listening()

    def _hear(self, text: str) -> None:
        self._nudge.set()
        phase = self.progress.hear(text)
        if phase is not None:
            logger.info("%s: %s, %.0f s after the start", self._server.name, phase.name, phase.began)
        attempt = self._attempt
        if attempt.port is not None and is_port_in_use(text, attempt.port):
            attempt.fail(PortTaken(f"{self._server.name}: port {attempt.port} is in use, says the engine"))

    async def wait(self, link: Link) -> None:
        """Return once the engine is ready.

        Raises:
            ServerError: it will not be. PortTaken: somebody else has its port.
        """
        failure: ServerError | None = None

        async def give_up() -> None:
            nonlocal failure
            failure = await self._until_too_late(link)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            refusal = await self._until_ready(link)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if refusal is not None:
            raise refusal
        self.close()

    async def _until_ready(self, link: Link) -> ServerError | None:
        """Return once the engine is ready, or why it will not be."""
        pace = Pace(self._server.config.server_ready_delay_sec)
        try:
            await until_ready(partial(self._look, link), pace=pace, nudge=self._new_nudge)
        except ServerError as error:
            return error
        except Exception as error:
            failure = ServerError(f"{self._server.name}: is_ready() failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        return None

    async def _until_too_late(self, link: Link) -> ServerError:
        """Return the failure once the start is over its deadline without progress, or shows no sign of life."""
        config, name, progress = self._server.config, self._server.name, self.progress
        began = trio.current_time()
        deadline = began + config.ready_deadline_sec
        extension = min(EXTENSION, config.ready_deadline_sec)
        stall = config.start_stall_timeout if self._attempt.processes else None
        alive_at, life = began, await self._life()
        while True:
            now = trio.current_time()
            if progress.moved_at is not None:
                deadline = max(deadline, progress.moved_at + extension)
            if now >= deadline:
                return ServerError(
                    f"{name}: the engine was not ready within {round(now - began, 1):g} s{self._where(link)}",
                    advice="raise server_ready_max_attempts or server_ready_delay_sec if it was still loading",
                )
            wake = deadline
            if stall is not None:
                before, life = life, await self._life()
                alive_at = max(alive_at, progress.heard_at, now if life != before else 0.0)
                if now - alive_at >= stall:
                    return ServerError(
                        f"{name}: the start is stuck: for {now - alive_at:.0f} s the engine has printed nothing, used "
                        f"no CPU and read nothing{self._where(link)}",
                        cause="it waits for something that does not come: a lock, a file system, another node",
                        advice="look where it hangs (py-spy dump); raise start_stall_timeout if it may wait so long",
                    )
                wake = min(wake, now + stall / LOOKS)
            await trio.sleep_until(wake)
            if trio.current_time() - wake > LATE:
                # The event loop was blocked, and nobody could look at the engine: it shall not pay for that.
                deadline, alive_at = max(deadline, trio.current_time() + SECOND_LOOK), trio.current_time()

    async def _life(self) -> tuple[float | None, int | None]:
        """CPU and I/O of the engine's processes, in a thread, since it reads a good part of /proc."""

        def read() -> tuple[float | None, int | None]:
            pids = [pid for guarded in tuple(self._attempt.processes) for pid in guarded.tree()]
            return cpu_seconds(pids), io_bytes(pids)

        return await threads.run_sync(read)

    def _where(self, link: Link) -> str:
        known = [text for text in (self.progress.describe(), link.last_look) if text]
        return f" ({'; '.join(known)})" if known else ""

    async def _look(self, link: Link) -> bool:
        """One look: does it answer, and is it ours?

        Raises:
            PortTaken: it answers, but somebody else does.
        """
        server, attempt = self._server, self._attempt
        if server.has_own_readiness():
            return await server.is_ready()
        if server.is_local and not link.is_open():
            return False
        status, body = await link.models()
        if status in KEY_REFUSED and await self._is_certainly_ours():
            raise ServerError(
                f"{server.name}: the server answers, but refuses the API key (status {status})",
                cause="no key was sent, or a wrong one",
                advice="set api_key in the config, or TRINFER_API_KEY or OPENAI_API_KEY for an endpoint",
            )
        if status in NO_SUCH_ROUTE and not server.is_local:
            return True  # not every endpoint lists its models; a wrong URL shows with the first request
        if 300 <= status < 400 and not server.is_local:
            raise ServerError(
                f"{server.name}: the server redirects elsewhere (status {status})",
                cause="the URL is not the final one: http where the server wants https, for instance",
                advice="give the final URL as endpoint_url: requests with keys are not sent elsewhere",
            )
        if status != 200:
            return False
        self.found_model = next(iter(served_models(body)), "")
        if not server.is_local:
            return True
        # In a thread, since it reads a good part of /proc.
        ours = await threads.run_sync(partial(is_ours, attempt, body, model=server.config.model, own_pid=os.getpid()))
        if ours is False:
            raise PortTaken(f"{server.name}: another program answers on port {attempt.port}")
        return bool(ours)

    async def _is_certainly_ours(self) -> bool:
        if not self._server.is_local or self._attempt.port is None:
            return True
        owned = await threads.run_sync(partial(self._attempt.owns_port, own_pid=os.getpid()))
        return owned is True

    def _new_nudge(self) -> trio.Event:
        self._nudge = trio.Event()
        return self._nudge
