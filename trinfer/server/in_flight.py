"""Requests under way, and how they end when their engine does.

Rule: nobody waits for an answer of an engine that is known to be down; what the requester gets then is the engine's
failure, not the broken connection that follows from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeVar

import trio

from trinfer.errors import ConnectionLost, InferenceError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from trinfer.http.api import JsonStream
    from trinfer.server.lifecycle import Lifecycle

__all__ = ["InFlight", "ServerStream"]

T = TypeVar("T")

BREAK_BEFORE_VERDICT = 1.0  # seconds between a broken connection and the news that the engine has died


class InFlight:
    """All requests of one server that wait for an answer."""

    def __init__(self, lifecycle: Lifecycle, is_local: bool) -> None:
        self._lifecycle = lifecycle
        self._patience = BREAK_BEFORE_VERDICT if is_local else 0.0
        self._scopes: set[trio.CancelScope] = set()

    def __len__(self) -> int:
        return len(self._scopes)

    async def answered_by_link(self, send: Callable[[], Awaitable[T]], payload: Mapping[str, Any]) -> T:
        """As `answered`, for requests through the link, whose connections are closed when the engine is down.

        That spares each request a cancel scope of its own, which is a good part of what a small one costs.
        """
        try:
            return await send()
        except InferenceError as error:
            raise await self.verdict(error, payload) from error.__cause__

    async def verdict(self, error: InferenceError, payload: Mapping[str, Any]) -> TrinferError:
        """What the requester is told: the request's own error, or that of the engine which has died meanwhile."""
        if isinstance(error, ConnectionLost):
            # Most often the engine's death, of which the monitor is about to tell.
            with trio.move_on_after(self._patience):
                await self._lifecycle.down.wait()
            if self._lifecycle.down.is_set():
                return self._lifecycle.down_error()
        error.payload = payload
        return error

    async def answered(self, send: Callable[[], Awaitable[T]], payload: Mapping[str, Any]) -> T:
        """Wait for an answer, but no longer than the engine lives.

        Raises:
            ServerError: the engine failed or was stopped. InferenceError: what ``send`` raises, with the payload.
        """
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                return await self.answered_by_link(send, payload)
            finally:
                self._scopes.discard(scope)
        raise self._lifecycle.down_error()

    def interrupt(self) -> None:
        """The engine is down: end the waiting of those who do not wait through the link."""
        for scope in tuple(self._scopes):
            scope.cancel()


class ServerStream:
    """The chunks of one streamed request; see `InferenceServer.stream_request`."""

    def __init__(
        self, begin: Callable[[], Awaitable[JsonStream]], in_flight: InFlight, payload: Mapping[str, Any]
    ) -> None:
        self._begin = begin
        self._in_flight = in_flight
        self._payload = payload
        self._stream: JsonStream | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """The next chunk. Cancelled: the connection is closed."""
        stream = self._stream
        if stream is None:
            stream = self._stream = await self._begin()
        elif stream.at_hand:
            return await stream.__anext__()
        return await self._in_flight.answered_by_link(stream.__anext__, self._payload)

    def close(self) -> None:
        """End the stream; one that is not complete closes its connection. Idempotent, and does not wait."""
        if self._stream is not None:
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
