"""The connections of one origin: kept alive, reused last in first out, and never more than allowed.

Rule: a slot belongs to a request only inside `Pool.exchange`, or between `Pool.begin` and `Exchange.close`, and is
given back on every way out. There is no queue of requests that a cancelled one could stay in; waiting is trio's own
semaphore, first come, first served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from trinfer.http.connection import BrokenConnection, Connection, HttpAnswer
from trinfer.http.transport import Proxy, connect

if TYPE_CHECKING:
    import ssl

    from trinfer.http.origin import Origin

__all__ = ["Exchange", "Pool", "PoolClosed"]


class PoolClosed(Exception):
    """The pool was closed; no more requests."""


class Pool:
    """Up to ``max_connections`` to one origin.

    Args:
        tls: for https origins.
        proxy: connect through it.
        max_connections: requests that may be under way at once.
        idle_timeout: seconds after which an idle connection is not used any more.
        connect_timeout: seconds for a new connection, TLS included.
    """

    def __init__(
        self,
        origin: Origin,
        tls: ssl.SSLContext | None = None,
        *,
        proxy: Proxy | None = None,
        max_connections: int = 4096,
        idle_timeout: float = 60.0,
        connect_timeout: float = 30.0,
    ) -> None:
        self._origin = origin
        self._tls = tls
        self._proxy = proxy
        self._slots = trio.Semaphore(max_connections)
        self._max_connections = max_connections
        self._idle_timeout = idle_timeout
        self._connect_timeout = connect_timeout
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
        """Send one request over any connection, and return its complete answer.

        A request that fails on a reused connection before any byte of its answer is sent once more on a fresh one:
        the server has closed it while it was idle.

        Raises:
            PoolClosed, BrokenConnection, MalformedAnswer, OSError: as in `Connection.exchange` and `connect`.

        Cancelled: the request's connection is closed, its slot is free.
        """
        await self._take_slot()
        try:
            connection = self._take_idle()
            if connection is not None:
                try:
                    answer = await connection.exchange(request)
                except BrokenConnection as error:
                    if not error.untouched:
                        raise
                else:
                    self._keep(connection)
                    return answer
            connection = await self._connect()
            answer = await connection.exchange(request)
            self._keep(connection)
            return answer
        finally:
            self._slots.release()

    async def begin(self, request: bytes) -> Exchange:
        """Send one request, and return its answer as it comes; `Exchange.close` must be called. Raises as `exchange`.

        Cancelled: as `exchange`.
        """
        await self._take_slot()
        try:
            connection = self._take_idle()
            if connection is not None:
                try:
                    return Exchange(self, connection, await connection.begin(request))
                except BrokenConnection as error:
                    if not error.untouched:
                        raise
            connection = await self._connect()
            return Exchange(self, connection, await connection.begin(request))
        except BaseException:
            self._slots.release()
            raise

    async def _take_slot(self) -> None:
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()

    async def _connect(self) -> Connection:
        if self._closed:
            raise PoolClosed
        with trio.move_on_after(self._connect_timeout):
            return Connection(await connect(self._origin, self._tls, self._proxy))
        raise TimeoutError(f"no connection within {self._connect_timeout:g} s")

    def _take_idle(self) -> Connection | None:
        idle = self._idle
        if not idle:
            return None
        oldest = trio.current_time() - self._idle_timeout
        while idle and idle[0].idle_since < oldest:
            idle.pop(0).close()
        while idle:
            connection = idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    def _keep(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        elif connection.is_idle:
            self._idle.append(connection)

    def _give_back(self, connection: Connection) -> None:
        """The end of an `Exchange`."""
        if connection.is_idle:
            self._keep(connection)
        else:
            connection.close()
        self._slots.release()

    def close(self) -> None:
        """Close every idle connection, and those in use once they are done. Idempotent."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class Exchange:
    """An answer whose body is still coming. It holds a slot and a connection until `close`."""

    def __init__(self, pool: Pool, connection: Connection, answer: HttpAnswer) -> None:
        self._pool: Pool | None = pool
        self._connection = connection
        self.status = answer.status
        self.headers = answer.headers

    async def read(self) -> bytes:
        """The next piece; empty at the end of the body. Raises as `Connection.read`."""
        return await self._connection.read()

    def close(self) -> None:
        """Give slot and connection back; a body that is not complete closes the connection. Idempotent, never waits."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._give_back(self._connection)
