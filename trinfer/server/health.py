"""Watches an engine that serves: gathers the signs for `trinfer.server.liveness`, and acts on the verdict."""

from __future__ import annotations

import errno
import logging
import math
from typing import TYPE_CHECKING, Any

import trio

from trinfer.errors import InferenceError, ServerError
from trinfer.process import threads
from trinfer.process.activity import cpu_seconds
from trinfer.server.link import PROBE_TIMEOUT
from trinfer.server.liveness import Judge, Signs, Verdict, progress_counters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trinfer.config import InferenceConfig
    from trinfer.server.attempt import Attempt
    from trinfer.server.link import Link

__all__ = ["HealthWatch"]

logger = logging.getLogger(__name__)

OFTEN = 1.0  # seconds between two looks at our own counts, at most
CLOSE = 1.5  # seconds between two looks at the engine's, at most
LOOKS = 10  # per stall_timeout
METRICS_TIMEOUT = 2.0  # seconds: with the pauses above, a wedge is known within five seconds of its time
LATE = 0.5  # seconds by which a wake-up tells that the event loop was blocked
CATCH_UP = 0.1  # seconds to read what has come meanwhile
LOOK = 2 * METRICS_TIMEOUT  # seconds that a look takes at most while requests are under way
NO_SUCH_ROUTE = frozenset({404, 405, 501})
# A server that answers so does answer: it asks for a key, or is busy.
ALIVE = frozenset({401, 403, 408, 425, 429})


class HealthWatch:
    """Watches the engine of one attempt.

    Args:
        name: of the server, for messages.
        in_flight: requests under way.
        awaited: those of them for whose next sign somebody waits. A stream that is not read now says nothing of its
            engine: it may be our side that is slow.
        received: answers and pieces of answers so far.
        refused: those of them that are errors of the engine.
        token_probe: route and payload of a request for one token, or None where there is none.
    """

    def __init__(
        self,
        name: str,
        config: InferenceConfig,
        attempt: Attempt,
        link: Link,
        *,
        in_flight: Callable[[], int],
        awaited: Callable[[], int],
        received: Callable[[], int],
        refused: Callable[[], int],
        token_probe: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._name, self._config = name, config
        self._attempt, self._link = attempt, link
        self._in_flight, self._awaited = in_flight, awaited
        self._received, self._refused = received, refused
        self._token_probe = token_probe
        self._judge = Judge(config.stall_timeout)
        self._has_counters = False
        self._no_metrics = False
        self._health_path: str | None = "/health"
        self._seen_received = -1
        self._idle_since = self._probed_at = self._asked_at = self._looked_at = trio.current_time()
        self._close = CLOSE
        self._soon = math.inf
        self._last_probe = ""
        self._blocked = 0.0  # seconds so far in which the event loop stood still
        self._troubled = False

    async def run(self) -> None:
        """Return when the engine is wedged or unhealthy: the attempt has failed then. Else run until cancelled."""
        stall = self._config.stall_timeout
        pause = min(OFTEN, self._config.probe_interval_sec, (stall or OFTEN * LOOKS) / LOOKS)
        self._close = min(CLOSE, (stall or CLOSE * LOOKS) / LOOKS)
        # A verdict is spoken after a close look only.
        self._soon = (stall or math.inf) - 2 * pause
        while True:
            wake = trio.current_time() + pause
            await trio.sleep_until(wake)
            late = trio.current_time() - wake
            if late > LATE:
                # Nobody could read what the engine has sent meanwhile: it shall not pay for that.
                self._blocked += late
                await trio.sleep(CATCH_UP)
            try:
                signs = await self._look()
            except Exception:
                # What cannot be seen now may be seen later; an engine is not left unwatched for that.
                if not self._troubled:
                    logger.exception("%s: looking whether it is healthy has failed; it is tried again", self._name)
                self._troubled = True
                continue
            self._troubled = False
            verdict = self._judge.see(signs)
            if verdict is Verdict.WEDGED:
                self._attempt.fail(self._wedged())
                return
            if verdict is Verdict.USELESS:
                self._attempt.fail(self._useless())
                return
            if verdict is Verdict.UNHEALTHY:
                self._attempt.fail(
                    ServerError(
                        f"{self._name}: the engine is unhealthy: {self._last_probe}",
                        cause="its process lives, but what does the work behind it has died or hangs",
                    )
                )
                return

    def _wedged(self) -> ServerError:
        seen = "no byte came, and no counter in /metrics moved" if self._has_counters else "no byte came"
        return ServerError(
            f"{self._name}: the engine is wedged: {self._awaited()} requests under way, and for "
            f"{self._judge.silence:.0f} s {seen} (stall_timeout)",
            cause="it hangs, whatever its health page says; or one generation takes longer than stall_timeout, in an "
            "engine that shows no progress in /metrics",
            advice="raise stall_timeout if single generations may take that long; stack dumps of the engine (py-spy "
            "dump, NCCL_DEBUG=INFO in env) tell where it hangs",
        )

    def _useless(self) -> ServerError:
        return ServerError(
            f"{self._name}: the engine answers with errors only: {self._judge.refusals} with status 5xx since the last "
            f"good answer, for {self._config.stall_timeout:g} s (stall_timeout)",
            cause="something behind its API has failed; or every request is one that it cannot deal with",
            advice="look at the engine's last output; if the requests are at fault, another start will not help",
        )

    async def _look(self) -> Signs:
        began = trio.current_time()
        in_flight, awaited = self._in_flight(), self._awaited()
        received, refused = self._received(), self._refused()
        counters = cpu = probe = None
        if not in_flight:
            probe = await self._probe_idle()
        else:
            self._idle_since = trio.current_time()
            is_time = began - self._looked_at >= self._close or self._judge.silence >= self._soon
            if awaited and received == self._seen_received and is_time:  # nothing came by itself: look closer
                self._looked_at = began
                counters = await self._read_counters()
                if not self._has_counters:
                    cpu = await threads.run_sync(self._cpu)
            self._blocked += max(0.0, trio.current_time() - began - LOOK)
        self._seen_received = received
        # Taken before the looks above, which may last: what came meanwhile is progress of the next moment.
        at = trio.current_time() - self._blocked
        return Signs(at, awaited, received, counters, self._has_counters, cpu, probe, refused)

    def _cpu(self) -> float | None:
        return cpu_seconds(pid for guarded in tuple(self._attempt.processes) for pid in guarded.tree())

    async def _read_counters(self) -> float | None:
        if self._no_metrics:
            return None
        try:
            status, body = await self._link.get("/metrics", timeout=METRICS_TIMEOUT)
        except InferenceError:
            return None
        if status in NO_SUCH_ROUTE:
            self._no_metrics = True
        counters = progress_counters(body) if status == 200 else None
        self._has_counters |= counters is not None
        return counters

    async def _probe_idle(self) -> bool | None:
        now = trio.current_time()
        wanted = self._config.idle_probe_sec
        if wanted is not None and now - self._idle_since >= wanted and now - self._asked_at >= wanted:
            self._asked_at = now
            if self._token_probe is not None:
                return await self._ask_for_a_token(*self._token_probe)
        if self._health_path is None or now - self._probed_at < self._config.probe_interval_sec:
            return None
        self._probed_at = now
        try:
            status, _ = await self._link.get(self._health_path, timeout=PROBE_TIMEOUT)
        except InferenceError as error:
            self._last_probe = error.message
            return None if _is_our_own_lack(error) else False
        if status in NO_SUCH_ROUTE:
            self._health_path = None  # it has no such page, and its process is watched anyway
            return None
        self._last_probe = f"GET {self._health_path}: status {status}"
        return status < 400 or status in ALIVE

    async def _ask_for_a_token(self, route: str, payload: Mapping[str, Any]) -> bool | None:
        limit = self._config.stall_timeout or self._config.request_timeout
        try:
            await self._link.api.post_json(route, payload, timeout=min(limit, self._config.request_timeout))
        except InferenceError as error:
            if _is_our_own_lack(error):
                return None
            self._last_probe = f"a request for one token failed: {error.message}"
            logger.warning("%s: %s", self._name, self._last_probe)
            return error.status is not None and error.status < 500
        return True


def _is_our_own_lack(error: BaseException | None) -> bool:
    """Whether a probe has failed because this process is short of file descriptors: that says nothing of the engine."""
    while error is not None:
        if isinstance(error, BaseExceptionGroup):
            return any(map(_is_our_own_lack, error.exceptions))
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            return True
        error = error.__cause__ or error.__context__  # httpcore gives the second only
    return False
