"""Requests under way, and what becomes of them when their engine dies.

Rules: nobody waits for an answer of an engine that is known to be dead. Who asks sees a slow request, not a failure,
as long as the engine is started again: its request is sent to the successor, a few times at most, since it may be what
kills engines. Where the engine is down for good, the requester gets the engine's failure, not the broken connection
that follows from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

from trinfer.errors import ConnectionLost, InferenceError, RequestTimeout, ServerError, StreamInterrupted, TrinferError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from trinfer.config import InferenceConfig
    from trinfer.http.api import JsonStream
    from trinfer.server.lifecycle import Lifecycle

__all__ = ["InFlight", "ServerStream"]

T = TypeVar("T")

BREAK_BEFORE_VERDICT = 1.0  # seconds between a broken connection and the news that the engine has died


class InFlight:
    """All requests of one server that wait for an answer.

    Attributes:
        count: requests that have been accepted and not answered yet, those that wait for readiness included.
        total: requests that were accepted so far.
        answered: requests that a subclass has answered in its own way.
    """

    def __init__(self, lifecycle: Lifecycle, config: InferenceConfig, *, is_local: bool) -> None:
        self._lifecycle = lifecycle
        self._most = config.max_replays
        self._timeout = config.request_timeout
        self._patience = BREAK_BEFORE_VERDICT if is_local else 0.0
        self._scopes: set[trio.CancelScope] = set()
        self.count = 0
        self.total = 0
        self.answered = 0

    @property
    def own(self) -> int:
        """Requests under way that a subclass sends in its own way."""
        return len(self._scopes)

    async def replay(
        self, error: InferenceError, sent_in: int, send: Callable[[float], Awaitable[T]], payload: Mapping[str, Any]
    ) -> T:
        """Send a request again, after ``error``, if the engine to which it was sent has died; else raise the error.

        Args:
            error: of the first sending.
            sent_in: number of the start attempt whose engine got it.
            send: sends it to the engine of now, within the seconds that it is given.
            payload: as the user gave it, for errors.

        Raises:
            InferenceError: the request's own fault, or its time (request_timeout) has run out.
            ServerError: the engine has failed for good, or has died under this request more than max_replays times.
        """
        began = trio.current_time() - getattr(error, "elapsed", 0.0)
        deadline = began + self._timeout
        deaths: list[str] = []
        while True:
            await self._blame_the_engine(error, sent_in, payload)
            deaths.append(error.message)
            if len(deaths) > self._most:
                raise ServerError(
                    f"the engine has died {len(deaths)} times while this request was under way",
                    cause="the request itself may be what ends the engine, or the engine dies too often",
                    advice="look at the engine's last output; raise max_replays if the request is innocent",
                    history=deaths,
                ) from error
            with trio.move_on_at(deadline):
                await self._lifecycle.wait_ready(accepted=True)
                sent_in = self._lifecycle.attempt
                try:
                    return await send(deadline - trio.current_time())
                except InferenceError as again:
                    error = again
                    continue
            late = RequestTimeout(
                f"no complete answer within {self._timeout:g} s (request_timeout); the engine was down meanwhile",
                cause="the engine has died and takes its time to come back",
                advice="raise request_timeout",
                payload=payload,
            )
            late.elapsed = trio.current_time() - began
            raise late from error

    async def _blame_the_engine(self, error: InferenceError, sent_in: int, payload: Mapping[str, Any]) -> None:
        """Return if the engine has died and another is coming; else raise what the requester shall get."""
        if await self.has_died(error, sent_in):
            if not self._lifecycle.is_down:
                return
            down = self._lifecycle.down_error()
            # Why the server is down says more than that this connection has gone.
            down.__cause__ = down.__cause__ or error
            raise down
        error.payload = payload
        raise error

    async def has_died(self, error: InferenceError, sent_in: int) -> bool:
        """Whether the engine of start attempt ``sent_in`` has died, as far as ``error`` makes one think so."""
        lifecycle = self._lifecycle
        # A dying engine may still say that it has an internal error, in the moment before it exits.
        if not isinstance(error, ConnectionLost) and (error.status is None or error.status < 500):
            return False
        if lifecycle.attempt == sent_in and not lifecycle.over.is_set():
            # It may be dead already, and the monitor is about to tell.
            with trio.move_on_after(self._patience):
                await lifecycle.over.wait()
        return lifecycle.attempt != sent_in or lifecycle.over.is_set()

    async def answer(self, send: Callable[[], Awaitable[T]]) -> T:
        """Wait for an answer that does not come through the link, but no longer than the engine lives.

        Raises:
            ConnectionLost: the engine has died. Else what ``send`` raises.
        """
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                result = await send()
            finally:
                self._scopes.discard(scope)
            self.answered += 1
            return result
        raise ConnectionLost("the engine ended before it answered")

    def interrupt(self) -> None:
        """The engine is down: end the waiting of those who do not wait through the link."""
        for scope in tuple(self._scopes):
            scope.cancel()


class ServerStream:
    """The chunks of one streamed request; see `InferenceServer.stream_request`."""

    def __init__(
        self,
        begin: Callable[[float, bool], Awaitable[JsonStream]],
        in_flight: InFlight,
        lifecycle: Lifecycle,
        payload: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self._begin = begin
        self._in_flight = in_flight
        self._lifecycle = lifecycle
        self._payload = payload
        self._timeout = timeout
        self._sent_in = 0
        self._stream: JsonStream | None = None
        self._is_counted = False
        self._is_awaited = False
        self._is_closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """The next chunk. Cancelled: the connection is closed.

        Raises:
            trio.BusyResourceError: another task waits for it already.
        """
        if self._is_awaited:
            raise trio.BusyResourceError("another task waits for the next chunk of this stream")
        if self._is_closed:
            raise StopAsyncIteration
        if not self._is_counted and self._stream is None:
            self._is_counted = True
            self._in_flight.count += 1
        self._is_awaited = True
        try:
            return await self._next()
        except BaseException:  # the end of the stream, too
            self._uncount()
            raise
        finally:
            self._is_awaited = False

    async def _next(self) -> dict[str, Any]:
        stream = self._stream
        if stream is not None and stream.at_hand:
            return await stream.__anext__()
        try:
            if stream is None:
                return await self._first(self._timeout, accepted=False)
            return await stream.__anext__()
        except InferenceError as error:
            if self._is_closed:  # by another task
                raise StopAsyncIteration from error
            if self._stream is not None and self._stream.received:
                raise await self._too_late(error, self._stream.received) from error
            return await self._in_flight.replay(error, self._sent_in, self._first, self._payload)

    async def _first(self, timeout: float, *, accepted: bool = True) -> dict[str, Any]:
        if self._stream is not None:
            self._stream.close()
        self._stream = await self._begin(timeout, accepted)
        if self._is_closed:  # while it waited
            raise StopAsyncIteration
        self._sent_in = self._lifecycle.attempt
        return await self._stream.__anext__()

    async def _too_late(self, error: InferenceError, received: int) -> TrinferError:
        """What is raised when some of the stream has been passed on already, so that it cannot be sent again."""
        error.payload = self._payload
        if await self._in_flight.has_died(error, self._sent_in) and self._lifecycle.is_down:
            down = self._lifecycle.down_error()
            down.received = received
            return down
        if not isinstance(error, ConnectionLost):
            return error
        interrupted = StreamInterrupted(error.message, cause=error.cause, payload=self._payload)
        interrupted.attempts, interrupted.elapsed, interrupted.received = error.attempts, error.elapsed, received
        return interrupted

    def close(self) -> None:
        """End the stream; one that is not complete closes its connection. Idempotent, and does not wait.

        A task that waits for the next chunk finds the end of the stream.
        """
        self._is_closed = True
        self._uncount()
        if self._stream is not None:
            self._stream.close()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._in_flight.count -= 1

    def __del__(self) -> None:
        self._uncount()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
