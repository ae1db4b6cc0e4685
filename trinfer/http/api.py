"""JSON requests to an OpenAI-compatible server, tried again where that is safe and useful, whole or streamed.

Rule: nothing but the `RequestError` tree comes out, with all that is known (status, the server's words, its id of the
request, attempts, time), and never the key. No slot of the pool is held between two attempts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import trio

from trinfer._version import __version__
from trinfer.encoding import decode_json, make_encoder
from trinfer.errors import BadRequestError, ConnectionLost, ProtocolError, RequestError
from trinfer.http.connection import BrokenConnection, MalformedAnswer
from trinfer.http.failures import LOWER_ERRORS, error_for_answer, error_for_exception, error_in_stream, timed_out
from trinfer.http.pool import SWEEP_EVERY, Exchange, Pool
from trinfer.http.retry import RetryPolicy
from trinfer.http.sse import EventTooLong, SseParser
from trinfer.http.transport import TlsOptions, find_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from trinfer.http.connection import HttpAnswer
    from trinfer.http.origin import Origin

__all__ = ["ApiClient", "JsonStream", "Timeouts"]

ERROR_BODY = 1 * 2**20  # bytes of an error's body that are read from a stream
SWEPT = 40 * SWEEP_EVERY  # seconds; shorter time-outs have a scope of their own, which is exact
HEADS = 64  # paths whose heads are kept ready; few are ever used
FINISH = 1.0  # seconds for the end of a stream after its last event, so that the connection can be kept


# Compact; and NaN, which is no JSON, is refused before anything is sent.
_encode = make_encoder(json.JSONEncoder(allow_nan=False, separators=(",", ":"), ensure_ascii=False))


# Whatever else would end the line of the request, and begin something of its own.
_PATH = re.compile(r"/[!-~]*")


@dataclass(frozen=True)
class Timeouts:
    """Time-outs beside the total, which each request brings along; None waits as long as that allows.

    Attributes:
        connect: seconds for a new connection, TLS included.
        first_byte: seconds from a streamed request to its first event.
        idle: seconds between two pieces of a stream.
    """

    connect: float = 30.0
    first_byte: float | None = None
    idle: float | None = None


class ApiClient:
    """JSON requests to one origin through a keep-alive pool.

    Args:
        origin: the server.
        api_key: sent as ``Authorization: Bearer``.
        max_connections: how many requests may be under way at once; more wait.
        retry: when a request is sent again.
        timeouts: beside the total.
        tls: for https origins.

    Raises:
        OSError: a file named in ``tls`` cannot be used. ValueError: the environment names an unusable proxy, or the key
            cannot stand in a header.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        api_key: str | None = None,
        max_connections: int = 4096,
        retry: RetryPolicy | None = None,
        timeouts: Timeouts | None = None,
        tls: TlsOptions | None = None,
    ) -> None:
        self._origin = origin
        self._retry = retry or RetryPolicy()
        self._timeouts = timeouts or Timeouts()
        proxy = find_proxy(origin)
        self._pool = Pool(
            origin,
            (tls or TlsOptions()).context() if origin.is_tls else None,
            proxy=proxy,
            max_connections=max_connections,
            connect_timeout=self._timeouts.connect,
        )
        # To a proxy, plain requests name the whole URL (RFC 9112, 3.2.2); through a tunnel, they do not.
        self._prefix = origin.url if proxy is not None and not origin.is_tls else origin.base_path
        lines = [
            f"Host: {origin.authority}",
            f"User-Agent: trinfer/{__version__}",
            "Accept: application/json",
            "Content-Type: application/json",
        ]
        if api_key:
            if not re.fullmatch("[!-~]+", api_key):
                raise ValueError("the API key has spaces, control characters or letters beyond ASCII")
            lines.append(f"Authorization: Bearer {api_key}")
        if proxy is not None and proxy.authorization and not origin.is_tls:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        headers = "".join(f"{line}\r\n" for line in lines)
        self._headers = f" HTTP/1.1\r\n{headers}Content-Length: "
        self._heads: dict[str, bytes] = {}

    @property
    def pool(self) -> Pool:
        """The connections, for a look at their numbers."""
        return self._pool

    async def post_json(self, path: str, payload: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Send a payload, and return the JSON object of the answer.

        Args:
            path: such as ``/v1/chat/completions``; the origin's base path is put before it.
            payload: not changed.
            timeout: seconds for everything: connecting, all attempts and the pauses between them.

        Raises:
            RequestError: one of its subclasses, or itself for other statuses (500, 503, …).

        Cancelled: the connection is closed, so that the server stops working on the request.
        """
        request = self._request(path, payload)
        began = trio.current_time()
        first: HttpAnswer | BrokenConnection | None = None
        fresh = False
        if timeout >= SWEPT and (connection := self._pool.take(began + timeout)) is not None:
            try:
                first = await connection.exchange(request)
            except BrokenConnection as error:
                if connection.expired:
                    raise self._complete(self._too_late(path, timeout), payload, 1, began) from None
                # One that the server had closed while it was idle does not count as an attempt.
                first = None if error.untouched else error
                fresh = error.untouched
            except MalformedAnswer as error:
                raise self._complete(error_for_exception(error, self._where(path)), payload, 1, began) from error
            finally:
                self._pool.give_back(connection)
            if first is not None and not isinstance(first, BrokenConnection) and first.status == 200:
                return self._read(first, path, payload, 1, began)
        return await self._persist(request, path, payload, began, timeout, first, fresh)

    async def _persist(
        self,
        request: bytes,
        path: str,
        payload: Mapping[str, Any],
        began: float,
        timeout: float,
        first: HttpAnswer | BrokenConnection | None,
        fresh: bool,
    ) -> dict[str, Any]:
        """As many attempts as the policy allows; ``first`` is the outcome of one that was made already.

        ``fresh``: the one more sending that a stale connection allows is this one.
        """
        attempts = 0
        failure: RequestError | None = None
        with trio.CancelScope(deadline=began + timeout):
            while True:
                attempts += 1
                try:
                    if isinstance(first, BrokenConnection):
                        raise first
                    answer = first or await self._pool.exchange(request, fresh=fresh)
                except LOWER_ERRORS as error:
                    failure = error_for_exception(error, self._where(path))
                    failure.__cause__ = error
                    pause = None if isinstance(failure, ProtocolError) else self._retry.pause(attempts, None)
                else:
                    if answer.status == 200:
                        return self._read(answer, path, payload, attempts, began)
                    failure = error_for_answer(answer, self._where(path))
                    pause = self._retry.pause(attempts, answer.status, answer.headers.get("retry-after"))
                if pause is None or trio.current_time() + pause >= began + timeout:
                    raise self._complete(failure, payload, attempts, began)
                first, fresh = None, False
                await self._pool.sleep(pause)
        late = self._too_late(path, timeout)
        late.__cause__ = failure
        raise self._complete(late, payload, attempts, began)

    def _too_late(self, path: str, timeout: float) -> RequestError:
        return timed_out(self._where(path), "request_timeout", timeout)

    def stream_json(self, path: str, payload: Mapping[str, Any], *, timeout: float) -> JsonStream:
        """Send a payload, and iterate over the events of the answer. Nothing is sent before the first step.

        Args: as `post_json`; ``timeout`` is the total, from the first step to the last event.
        """
        return JsonStream(self, path, payload, timeout)

    async def sweep(self) -> None:
        """Watch over the time of requests, until cancelled; to be run in a nursery beside them.

        Without it, each request has a cancel scope of its own, which costs some 10 microseconds.
        """
        await self._pool.sweep()

    def _request(self, path: str, payload: Mapping[str, Any]) -> bytes:
        head = self._heads.get(path)
        if head is None:
            if not _PATH.fullmatch(path):
                raise BadRequestError(
                    f"the path {path[:200]!r} cannot be asked for",
                    advice="it begins with a slash, and has no spaces, control characters or letters beyond ASCII",
                    payload=payload,
                    attempts=0,
                )
            if len(self._heads) >= HEADS:
                self._heads.clear()
            head = self._heads[path] = f"POST {self._prefix}{path}{self._headers}".encode("latin-1")
        try:
            body = _encode(payload).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequestError(
                f"the payload for {self._where(path)} cannot be written as JSON: {error}",
                advice="use plain dicts, lists, texts, finite numbers, booleans and None",
                payload=payload,
                attempts=0,
            ) from error
        return b"%b%d\r\n\r\n%b" % (head, len(body), body)

    def _where(self, path: str) -> str:
        # A socket of our own has a long name that tells nobody anything.
        return f"POST {path}" if self._origin.uds is not None else f"POST {self._origin.url}{path}"

    @staticmethod
    def _complete(error: RequestError, payload: Mapping[str, Any], attempts: int, began: float) -> RequestError:
        error.payload, error.attempts, error.elapsed = payload, attempts, trio.current_time() - began
        return error

    def _read(
        self, answer: HttpAnswer, path: str, payload: Mapping[str, Any], attempts: int, began: float
    ) -> dict[str, Any]:
        try:
            value = decode_json(answer.body.decode())
        except (ValueError, RecursionError) as error:
            what = f"{self._where(path)}: the answer is not JSON: {answer.body[:80]!r}"
            raise self._complete(ProtocolError(what, status=200), payload, attempts, began) from error
        if not isinstance(value, dict):
            what = f"{self._where(path)}: the answer is JSON, but no object"
            raise self._complete(ProtocolError(what, status=200), payload, attempts, began)
        return value

    def close(self) -> None:
        """Close every connection: requests under way, and later ones, raise `ConnectionLost`. Idempotent."""
        self._pool.close()


class JsonStream:
    """The events of one streamed answer, as an async iterator.

    Leaving the loop early closes the connection once the stream is dropped; ``async with`` or `close` do it at once.

    Attributes:
        received: events so far.
    """

    def __init__(self, client: ApiClient, path: str, payload: Mapping[str, Any], timeout: float) -> None:
        self._client, self._path, self._payload = client, path, payload
        self._timeout = timeout
        self._exchange: Exchange | None = None
        self._token: trio.lowlevel.TrioToken | None = None  # of the run that the exchange belongs to
        self._first_by = math.inf  # trio's time by which the first event must have come
        self._parser = SseParser()
        self._events: list[bytes] = []  # read, not given yet; in reverse
        self._began = self._deadline = 0.0
        self._attempts = 0
        self._over = False
        self.received = 0

    @property
    def at_hand(self) -> bool:
        """Whether the next step has its event already, and so neither waits nor checks for cancellation."""
        return bool(self._events) and self._events[-1] != b"[DONE]"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """The next event.

        Raises:
            StopAsyncIteration: the stream is complete.
            RequestError: it could not begin, broke off, took too long, or holds an error; the message says how far it
                came. After the first event, nothing is tried again.

        Cancelled: the connection is closed.
        """
        # Not a checkpoint while events are at hand: many come in one piece.
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            await self._advance()
        return await self._next_event()

    async def _next_event(self) -> dict[str, Any]:
        data = self._events.pop()
        if data == b"[DONE]":
            await self._finish()
            raise StopAsyncIteration
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._fail(ProtocolError(f"{self._where}: an event is not JSON: {data[:80]!r}")) from error
        if not isinstance(event, dict):
            raise self._fail(ProtocolError(f"{self._where}: an event is no JSON object: {data[:80]!r}"))
        if "error" in event or event.get("object") == "error":
            failure = error_in_stream(event, self._where)
            if failure is not None:
                raise self._fail(failure)
        self.received += 1
        return event

    async def _advance(self) -> None:
        """Get the next piece, or find out that there is none."""
        now = trio.current_time()
        timeouts = self._client._timeouts
        if self._exchange is None:
            self._began, self._deadline = now, now + self._timeout
            with self._mapped(), trio.move_on_at(self._deadline):
                await self._begin()
                return
            raise self._fail(timed_out(self._where, "request_timeout", self._timeout))
        is_first = self.received == 0
        name = "stream_first_byte_timeout" if is_first else "stream_idle_timeout"
        pause = timeouts.first_byte if is_first else timeouts.idle
        limit = math.inf if pause is None else self._first_by if is_first else now + pause
        with self._mapped():
            with trio.move_on_at(min(self._deadline, limit)):
                piece = await self._exchange.read()
                if piece:
                    self._events = self._parser.feed(piece)[::-1]
                else:
                    self._events = self._last_events()[::-1]
                return
        if pause is None or self._deadline <= limit:
            raise self._fail(timed_out(self._where, "request_timeout", self._timeout))
        raise self._fail(timed_out(self._where, name, pause))

    def _last_events(self) -> list[bytes]:
        """What is left at the end of a body that is complete as HTTP, but without [DONE].

        Raises:
            ConnectionLost: the last event is not whole: the server ends its answers by closing, and has died.
            ProtocolError: there was no event at all.
        """
        rest = self._parser.finish()
        self.close()
        if not rest and not self.received:
            raise self._fail(ProtocolError(f"{self._where}: the stream has ended without a single event"))
        for data in rest:
            try:
                data == b"[DONE]" or decode_json(data.decode())
            except (ValueError, RecursionError) as error:
                what = f"{self._where}: the stream broke off in the middle of an event: {data[:80]!r}"
                raise self._fail(ConnectionLost(what, cause="the server has died, or a proxy has cut it")) from error
        return rest

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        """Errors of lower layers as requests' errors; whatever happens, the exchange is over."""
        try:
            yield
        except LOWER_ERRORS as error:
            raise self._fail(error_for_exception(error, self._where)) from error
        except EventTooLong as error:
            raise self._fail(ProtocolError(f"{self._where}: {error}")) from error
        except BaseException:
            self.close()
            raise

    async def _begin(self) -> None:
        """Send the request, as often as it may be sent, until an answer with status 200 begins."""
        client = self._client
        request = client._request(self._path, {**self._payload, "stream": True})
        first_byte = client._timeouts.first_byte
        while True:
            self._attempts += 1
            retry_after = None
            try:
                exchange = await self._send(request, first_byte)
            except LOWER_ERRORS as error:
                failure = error_for_exception(error, self._where)
                failure.__cause__ = error
                status = None
                final = isinstance(failure, ProtocolError)
            else:
                if exchange.status == 200:
                    if self._over:  # closed by another task meanwhile
                        exchange.close()
                        return
                    self._exchange, self._token = exchange, trio.lowlevel.current_trio_token()
                    self._check_kind(exchange)
                    return
                answer = await _read_error(exchange)
                failure, status, final = error_for_answer(answer, self._where), answer.status, False
                retry_after = answer.headers.get("retry-after")
            pause = None if final else client._retry.pause(self._attempts, status, retry_after)
            if pause is None or trio.current_time() + pause >= self._deadline:
                raise self._fail(failure)
            await client._pool.sleep(pause)

    async def _send(self, request: bytes, first_byte: float | None) -> Exchange:
        """One attempt, which has the time of a first byte for itself."""
        if first_byte is None:
            return await self._client._pool.begin(request)
        self._first_by = trio.current_time() + first_byte
        with trio.move_on_at(self._first_by):
            return await self._client._pool.begin(request)
        raise self._fail(timed_out(self._where, "stream_first_byte_timeout", first_byte))

    def _check_kind(self, exchange: Exchange) -> None:
        kind = exchange.answer.headers.get("content-type", "text/event-stream")
        if not kind.lower().startswith("text/event-stream"):
            raise self._fail(ProtocolError(f"{self._where}: the answer is no event stream, but {kind[:80]!r}"))

    async def _finish(self) -> None:
        """After the last event comes only the end of the body, in the same piece most often."""
        self._over = True
        try:
            if self._exchange is not None:
                with trio.move_on_after(FINISH):
                    with contextlib.suppress(*LOWER_ERRORS):  # everything that was asked for is there
                        await self._exchange.read()
        finally:
            self.close()

    def _fail(self, error: RequestError) -> RequestError:
        self.close()
        if self.received:
            error.message += f" (after {self.received} events)"
            error.args = (error.message,)
        return self._client._complete(error, self._payload, self._attempts, self._began)

    @property
    def _where(self) -> str:
        return self._client._where(self._path)

    def close(self) -> None:
        """End the stream; one that is not complete closes its connection. Idempotent, and does not wait."""
        self._over = True
        self._events = []
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._exchange is None or self._token is None:
            return
        # The garbage collector runs in any thread, and may do so in another run of trio's.
        try:
            is_here = trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            is_here = False
        if is_here:
            self.close()
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._exchange.close)


async def _read_error(exchange: Exchange) -> HttpAnswer:
    """The whole of an answer that is no stream, within bounds."""
    body = b""
    try:
        while len(body) < ERROR_BODY and (piece := await exchange.read()):
            body += piece
    except LOWER_ERRORS:
        pass  # its status says enough
    finally:
        exchange.close()
    exchange.answer.body = body
    return exchange.answer
