"""The connections of one origin: kept alive, reused last in first out, and never more than allowed.

Rule: a slot belongs to a task only inside `Pool.exchange`, and is given back on every way out of it. There is no
queue of requests that a cancelled one could stay in; waiting is trio's own semaphore, first come, first served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trinfer.http.connection import BrokenConnection, Connection, HttpAnswer, open_connection

if TYPE_CHECKING:
    import ssl

    from trinfer.http.origin import Origin

__all__ = ["Pool", "PoolClosed"]


class PoolClosed(Exception):
    """The pool was closed; no more requests."""


class Pool:
    """Up to ``max_connections`` to one origin; those that idle longer than ``idle_timeout`` seconds are closed."""

    def __init__(
        self,
        origin: Origin,
        tls: ssl.SSLContext | None = None,
        *,
        max_connections: int = 4096,
        idle_timeout: float = 60,
    ) -> None:
        self._origin = origin
        self._tls = tls
        self._slots = trio.Semaphore(max_connections)
        self._max_connections = max_connections
        self._idle_timeout = idle_timeout
        self._idle: list[Connection] = []
        self._closed = False

    @property
    def in_use(self) -> int:
        """Slots taken right now."""
        return self._max_connections - self._slots.value

    @property
    def idle(self) -> int:
        """Connections kept alive right now."""
        return len(self._idle)

    async def exchange(self, request: bytes) -> HttpAnswer:
        """Send one request over any connection.

        A request that fails on a reused connection before any byte of its answer is sent once more on a fresh one:
        the server has closed it while it was idle.

        Raises:
            PoolClosed, BrokenConnection, MalformedAnswer, OSError: as in `Connection.exchange` and `open_connection`.

        Cancelled: the request's connection is closed, its slot is free.
        """
        async with self._slots:
            reused = self._take_idle()
            if reused is not None:
                try:
                    return await self._exchange_on(reused, request)
                except BrokenConnection as error:
                    if not error.untouched:
                        raise
            if self._closed:
                raise PoolClosed
            return await self._exchange_on(await open_connection(self._origin, self._tls), request)

    async def _exchange_on(self, connection: Connection, request: bytes) -> HttpAnswer:
        answer = await connection.exchange(request)
        if not connection.is_closed:
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)
        return answer

    def _take_idle(self) -> Connection | None:
        oldest = trio.current_time() - self._idle_timeout
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).close()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close every idle connection, and those in use once they are done. Idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
