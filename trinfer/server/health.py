"""Watches an engine that serves: gathers the signs for `trinfer.server.liveness`, and acts on the verdict."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import trio

from trinfer.errors import InferenceError, ServerError
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

SLOWEST = 5.0  # seconds between two looks, at most
LOOKS = 10  # per stall_timeout
NO_SUCH_ROUTE = frozenset({404, 405, 501})
# A server that answers so does answer: it asks for a key, or is busy.
ALIVE = frozenset({401, 403, 408, 425, 429})


class HealthWatch:
    """Watches the engine of one attempt.

    Args:
        name: of the server, for messages.
        in_flight, received: requests under way, and answers so far, beside those of the link.
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
        received: Callable[[], int],
        token_probe: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._name, self._config = name, config
        self._attempt, self._link = attempt, link
        self._in_flight, self._received = in_flight, received
        self._token_probe = token_probe
        self._judge = Judge(config.stall_timeout)
        self._has_counters = False
        self._no_metrics = False
        self._health_path: str | None = "/health"
        self._seen_received = -1
        self._idle_since = self._probed_at = self._asked_at = trio.current_time()
        self._last_probe = ""

    async def run(self) -> None:
        """Return when the engine is wedged or unhealthy: the attempt has failed then. Else run until cancelled."""
        stall = self._config.stall_timeout
        pause = min(SLOWEST, self._config.probe_interval_sec, (stall or SLOWEST * LOOKS) / LOOKS)
        while True:
            await trio.sleep(pause)
            verdict = self._judge.see(await self._look())
            if verdict is Verdict.WEDGED:
                self._attempt.fail(self._wedged())
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
            f"{self._name}: the engine is wedged: {self._in_flight()} requests under way, and for "
            f"{self._judge.silence:.0f} s {seen} (stall_timeout)",
            cause="it hangs, whatever its health page says; or one generation takes longer than stall_timeout, in an "
            "engine that shows no progress in /metrics",
            advice="raise stall_timeout if single generations may take that long; stack dumps of the engine (py-spy "
            "dump, NCCL_DEBUG=INFO in env) tell where it hangs",
        )

    async def _look(self) -> Signs:
        in_flight, received = self._in_flight(), self._received()
        counters = cpu = probe = None
        if not in_flight:
            probe = await self._probe_idle()
        else:
            self._idle_since = trio.current_time()
            if received == self._seen_received:  # nothing came by itself: look closer
                counters = await self._read_counters()
                if not self._has_counters:
                    cpu = await trio.to_thread.run_sync(self._cpu)
        self._seen_received = received
        # Taken before the looks above, which may last: what came meanwhile is progress of the next moment.
        return Signs(trio.current_time(), in_flight, received, counters, self._has_counters, cpu, probe)

    def _cpu(self) -> float | None:
        return cpu_seconds(pid for guarded in tuple(self._attempt.processes) for pid in guarded.tree())

    async def _read_counters(self) -> float | None:
        if self._no_metrics:
            return None
        try:
            status, body = await self._link.get("/metrics", timeout=PROBE_TIMEOUT)
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
            return False
        if status in NO_SUCH_ROUTE:
            self._health_path = None  # it has no such page, and its process is watched anyway
            return None
        self._last_probe = f"GET {self._health_path}: status {status}"
        return status < 400 or status in ALIVE

    async def _ask_for_a_token(self, route: str, payload: Mapping[str, Any]) -> bool:
        limit = self._config.stall_timeout or self._config.request_timeout
        try:
            await self._link.api.post_json(route, payload, timeout=min(limit, self._config.request_timeout))
        except InferenceError as error:
            self._last_probe = f"a request for one token failed: {error.message}"
            logger.warning("%s: %s", self._name, self._last_probe)
            return error.status is not None and error.status < 500
        return True
