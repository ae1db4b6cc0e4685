"""The connections of one origin: kept alive, reused last in first out, and never more than allowed.

Rule: a slot belongs to a request only inside `Pool.exchange`, or between `Pool.begin` and `Exchange.close`, and is
given back on every way out. Who waits for one is parked in trio's own lot, which a cancelled task leaves by itself;
first come, first served.
"""

from __future__ import annotations

import errno
import math
import time
from typing import TYPE_CHECKING

import trio

from trinfer.http.connection import BrokenConnection, Connection, HttpAnswer
from trinfer.http.reactor import Reactor
from trinfer.http.transport import Proxy, connect

if TYPE_CHECKING:
    import ssl

    from trinfer.http.origin import Origin

__all__ = ["SCARCE", "SWEEP_EVERY", "Exchange", "Pool", "PoolClosed"]

SCARCE = frozenset({errno.EMFILE, errno.ENFILE})
SWEEP_EVERY = 0.25  # seconds by which a swept time-out may be late


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
        self._free = max_connections
        self._waiting = trio.lowlevel.ParkingLot()
        self._max_connections = max_connections
        self._idle_timeout = idle_timeout
        self._connect_timeout = connect_timeout
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._opening = 0  # connections that are not there yet
        self._closed = trio.Event()
        self._reactor = Reactor()
        self.received = 0  # answers and pieces of streams so far: a sign of life of the server
        self.refused = 0  # answers among them that say that the server has failed (5xx)
        self.unread = 0  # answers that are coming piece by piece, and for whose next piece nobody waits now
        self._sweeping = False

    @property
    def in_use(self) -> int:
        """Slots taken right now."""
        return self._max_connections - self._free

    @property
    def idle(self) -> int:
        """Connections kept alive right now."""
        return len(self._idle)

    def take(self, deadline: float) -> Connection | None:
        """A slot and an idle connection, if both are at hand and `sweep` runs; to be given back by `give_back`.

        The quick way, without a cancel scope: the sweeper ends what is not answered by ``deadline`` (in trio's time).
        """
        if not self._sweeping or not self._free or not self._idle:
            return None
        connection = self._take_idle()
        if connection is not None:
            self._free -= 1
            connection.deadline = deadline
        return connection

    @trio.lowlevel.enable_ki_protection  # Ctrl-C is for the user's own tasks
    async def sweep(self) -> None:
        """Watch over all connections, until cancelled: a few times a second, end the exchanges of `take` that have run
        out of time; and tell the others when there is something to read.

        Without it everything works, but costs more.
        """
        self._sweeping = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reactor.run)
                while True:
                    await trio.sleep(SWEEP_EVERY)
                    now = trio.current_time()
                    for connection in [busy for busy in self._busy if busy.deadline <= now]:
                        connection.expire()
        finally:
            self._sweeping = False

    async def exchange(self, request: bytes, *, fresh: bool = False) -> HttpAnswer:
        """Send one request over any connection, and return its complete answer.

        A request that fails on a reused connection before any byte of its answer is sent once more on a fresh one:
        the server has closed it while it was idle.

        Args:
            fresh: on a new connection: that once has been used up.

        Raises:
            PoolClosed, BrokenConnection, MalformedAnswer, OSError: as in `Connection.exchange` and `connect`.

        Cancelled: the request's connection is closed, its slot is free.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait_for_slot()
        connection: Connection | None = None
        try:
            connection = None if fresh else self._take_idle()
            if connection is not None:
                try:
                    return await connection.exchange(request)
                except BrokenConnection as error:
                    if not error.untouched or self._closed.is_set():
                        raise
                    self._busy.discard(connection)
            connection = await self._connect()
            return await connection.exchange(request)
        finally:
            self.give_back(connection)

    async def begin(self, request: bytes) -> Exchange:
        """Send one request, and return its answer as it comes; `Exchange.close` must be called. Raises as `exchange`.

        Cancelled: as `exchange`.
        """
        if self._free:
            self._free -= 1
        else:
            await self._wait_for_slot()
        connection: Connection | None = None
        try:
            connection = self._take_idle()
            if connection is not None:
                try:
                    return Exchange(self, connection, await connection.begin(request))
                except BrokenConnection as error:
                    if not error.untouched or self._closed.is_set():
                        raise
                    self._busy.discard(connection)
            connection = await self._connect()
            return Exchange(self, connection, await connection.begin(request))
        except BaseException:
            self.give_back(connection)
            raise

    async def sleep(self, seconds: float) -> None:
        """A pause between two attempts, which ends early when the pool is closed."""
        with trio.move_on_after(seconds):
            await self._closed.wait()

    async def _wait_for_slot(self) -> None:
        # Whoever gives a slot back while others wait hands it over, so that nobody can come in between.
        await self._waiting.park()

    def give_back(self, connection: Connection | None) -> None:
        """The end of a request: its connection is kept if it is idle, and its slot goes to the next in line."""
        if connection is not None:
            self._busy.discard(connection)
            connection.deadline = math.inf
            if status := connection.answered:
                self.received += 1
                if status >= 500:
                    self.refused += 1
            if connection.is_idle and not self._closed.is_set():
                self._idle.append(connection)
            else:
                connection.close()
        if self._waiting:
            self._waiting.unpark()
        else:
            self._free += 1

    async def _connect(self) -> Connection:
        """A new connection, or one that has come free while file descriptors were short."""
        while True:
            try:
                return await self._open()
            except OSError as error:
                if error.errno not in SCARCE or not (self._busy or self._opening):
                    raise
            # The pool is larger than the process may be: it loses a slot, and who finishes next hands over another.
            self._max_connections -= 1
            try:
                await self._wait_for_slot()
            except BaseException:
                self._max_connections += 1
                raise
            connection = self._take_idle()
            if connection is not None:
                return connection

    async def _open(self) -> Connection:
        if self._closed.is_set():
            raise PoolClosed
        self._opening += 1
        try:
            with trio.move_on_after(self._connect_timeout):
                connection = Connection(await connect(self._origin, self._tls, self._proxy, reactor=self._reactor))
                self._busy.add(connection)
                return connection
        finally:
            self._opening -= 1
        raise TimeoutError(f"no connection within {self._connect_timeout:g} s")

    def _take_idle(self) -> Connection | None:
        idle = self._idle
        if not idle:
            return None
        oldest = time.monotonic() - self._idle_timeout
        while idle and idle[0].idle_since < oldest:
            idle.pop(0).close()
        while idle:
            connection = idle.pop()
            if connection.is_reusable:
                self._busy.add(connection)
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Close every connection: requests under way raise `BrokenConnection`, later ones `PoolClosed`. Idempotent."""
        self._closed.set()
        while self._idle:
            self._idle.pop().close()
        for connection in tuple(self._busy):
            connection.close()


class Exchange:
    """An answer whose body is still coming. It holds a slot and a connection until `close`."""

    def __init__(self, pool: Pool, connection: Connection, answer: HttpAnswer) -> None:
        self._pool: Pool | None = pool
        self._connection = connection
        self._is_read = False
        pool.unread += 1
        self.answer = answer

    @property
    def status(self) -> int:
        return self.answer.status

    async def read(self) -> bytes:
        """The next piece; empty at the end of the body. Raises as `Connection.read`."""
        if self._pool is not None:
            self._is_read = True
            self._pool.unread -= 1
        try:
            piece = await self._connection.read()
        finally:
            self._is_read = False
            if self._pool is not None:
                self._pool.unread += 1
        if self._pool is not None:
            self._pool.received += 1
        return piece

    def close(self) -> None:
        """Give slot and connection back; a body that is not complete closes the connection. Idempotent, never waits."""
        pool, self._pool = self._pool, None
        if pool is not None:
            if not self._is_read:
                pool.unread -= 1
            pool.give_back(self._connection)
