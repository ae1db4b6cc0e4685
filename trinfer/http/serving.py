"""A small HTTP/1.1 server inside the trio loop: for engines that are trinfer's own.

Rules: no thread, and no task that outlives `serve_http`. Requests of one connection are answered in order. A client
that goes away cancels its handler, as it must be with generations: nobody is left to read them. A client that closes
only its sending side counts as gone: the two look the same. What a client or a handler does wrong costs that client its
connection, never the server.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import os
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httptools
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

__all__ = ["HttpRequest", "HttpResponse", "json_response", "serve_http"]

logger = logging.getLogger(__name__)

CHUNK = 65536
MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 2**20
READ_AHEAD = 16  # requests of one client that may wait for the one before
LINGER = 2.0  # seconds for a client to read why it was refused
IDLE_TIMEOUT = 120.0  # seconds that a client may keep a connection without asking anything
SPARE = 4  # file descriptors that are kept for the time when there are no others
SCARCE = frozenset({errno.EMFILE, errno.ENFILE})
RETRY_ACCEPT = 0.1  # seconds
TELL_AGAIN = 60.0  # seconds between two warnings that connections cannot be accepted


@dataclass
class HttpRequest:
    """A complete request; header names in lower case."""

    method: str = "GET"
    target: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    keep_alive: bool = True
    version: str = "1.1"

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass
class HttpResponse:
    """An answer: a complete body, or a stream of chunks."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: AsyncGenerator[bytes, None] | None = None


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> HttpResponse:  # noqa: ANN401
    """An answer in JSON; any value that JSON can hold."""
    return HttpResponse(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class _BadRequest(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Parser:
    """Collects the requests of one connection; after the first one that is wrong it takes no more."""

    def __init__(self) -> None:
        self._body: list[bytes] = []
        self._begin()
        self.expects_continue = False
        self.ready: collections.deque[HttpRequest] = collections.deque()
        self.refusal: _BadRequest | None = None  # what to say when everything before it has been answered

    def _begin(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self.on_message_begin()

    def feed(self, data: bytes) -> None:
        if self.refusal is not None:
            return
        try:
            self._feed(data)
        except _BadRequest as error:
            self.refusal = error
            self.expects_continue = False

    def _feed(self, data: bytes) -> None:
        if not self._in_body:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES + CHUNK:
                raise _BadRequest(431, "the headers are too long")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._parser.get_method() == b"CONNECT":
                raise _BadRequest(400, "this is no proxy") from upgrade
            # Some clients offer HTTP/2 with every request. The offer may be ignored, but the parser stops at it, before
            # the body: it gets the same request again, without the offer.
            head = self._head_without_upgrade()
            self._begin()
            self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, _BadRequest):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError as error:
            raise _BadRequest(400, f"this is not HTTP/1.1: {error}") from error

    def _head_without_upgrade(self) -> bytes:
        version = self._parser.get_http_version().encode()
        lines = [self._parser.get_method() + b" " + self._url + b" HTTP/" + version]
        for name, value in self._current.headers.items():
            kept = value
            if name == "connection":
                options = [option.strip() for option in value.split(",")]
                kept = ", ".join(option for option in options if option.lower() != "upgrade")
            if name != "upgrade":
                lines.append(f"{name}: {kept}".encode("latin-1"))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        self._current, self._url, self._body = HttpRequest(), b"", []
        self._header_bytes = self._size = 0
        self._in_body = self._has_headers = False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_headers:
            return  # a trailer: nobody here has asked for one
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        before = self._current.headers.get(key)
        self._current.headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        self._in_body = self._has_headers = True
        request = self._current
        request.version = self._parser.get_http_version()
        if request.version not in {"1.0", "1.1"}:
            raise _BadRequest(505, f"HTTP/{request.version} is not spoken here")
        if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
            raise _BadRequest(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        expected = request.headers.get("expect", "").lower()
        self.expects_continue = expected == "100-continue" and request.version == "1.1"

    def on_chunk_header(self) -> None:
        self._in_body = False  # the last chunk has no body: from here on trailers count as headers

    def on_body(self, body: bytes) -> None:
        self._in_body = True
        self._header_bytes = 0
        self._size += len(body)
        if self._size > MAX_BODY_BYTES:
            raise _BadRequest(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # see _feed
        request = self._current
        request.method = self._parser.get_method().decode("latin-1")
        request.target = self._url.decode("latin-1")
        request.body = b"".join(self._body)
        request.keep_alive = self._parser.should_keep_alive()
        self._in_body = self.expects_continue = False
        self._body = []
        self.ready.append(request)


async def serve_http(
    handler: Callable[[HttpRequest], Awaitable[HttpResponse]],
    listeners: Sequence[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; the listeners are closed then, and so is every connection.

    Args:
        handler: answers one request. What it raises becomes status 500 and a line in the log.
        listeners: from `trio.open_tcp_listeners`, or around a bound unix socket.
    """
    spare = _Spare()
    try:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(_accept, listener, handler, nursery, spare)
            task_status.started()
    finally:
        spare.close()
        for listener in listeners:
            listener.socket.close()


class _Spare:
    """File descriptors for when there are no others left.

    The clients of this server may live in the same process, and each of their connections takes two of its file
    descriptors. They would take the last one, and wait for ever for a server that cannot accept anybody.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._told_at = -TELL_AGAIN
        self.refilled = trio.Event()
        self.refill()

    def refill(self) -> None:
        """Take as many as are allowed, and can be had now."""
        with contextlib.suppress(OSError):
            while len(self._fds) < SPARE:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        self.refilled.set()
        self.refilled = trio.Event()

    def spend(self) -> bool:
        """Make room for one file descriptor, for whoever takes it before anything else happens."""
        if self._fds:
            os.close(self._fds.pop())
            return True
        return False

    def close(self) -> None:
        while self.spend():
            pass

    def tell(self, error: OSError) -> None:
        """Say that connections cannot be accepted, but not all the time."""
        now = trio.current_time()
        if now - self._told_at >= TELL_AGAIN:
            self._told_at = now
            logger.warning("connections are accepted late: %s", error)


async def _accept(
    listener: trio.SocketListener,
    handler: Callable[[HttpRequest], Awaitable[HttpResponse]],
    nursery: trio.Nursery,
    spare: _Spare,
) -> None:
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:  # out of file descriptors, most often
            spare.tell(error)
            if error.errno in SCARCE:
                # accept(2) complains also while nobody waits.
                await trio.lowlevel.wait_readable(listener.socket)
                if spare.spend():
                    # With somebody in the queue, this takes the file descriptor before another task can.
                    with contextlib.suppress(OSError):
                        stream = await listener.accept()
                        nursery.start_soon(_converse, stream, handler, spare)
                        continue
                    spare.refill()
            with trio.move_on_after(RETRY_ACCEPT):
                await spare.refilled.wait()
            continue
        nursery.start_soon(_converse, stream, handler)


async def _converse(
    stream: trio.SocketStream,
    handler: Callable[[HttpRequest], Awaitable[HttpResponse]],
    spare: _Spare | None = None,
) -> None:
    """All requests of one connection; one alone where it was accepted with a ``spare`` file descriptor."""
    parser = _Parser()
    try:
        while True:
            while not parser.ready and parser.refusal is None:
                if parser.expects_continue:
                    parser.expects_continue = False
                    await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                with trio.move_on_after(IDLE_TIMEOUT):
                    data = await stream.receive_some(CHUNK)
                    if not data:
                        return
                    parser.feed(bytes(data))
                    continue
                return
            if not parser.ready:
                assert parser.refusal is not None
                await _refuse(stream, parser.refusal)
                return
            request = parser.ready.popleft()
            if spare is not None:
                request.keep_alive = False
            if not await _answer(stream, parser, request, handler) or not request.keep_alive:
                return
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    finally:
        stream.socket.close()
        if spare is not None:
            spare.refill()


async def _refuse(stream: trio.SocketStream, refusal: _BadRequest) -> None:
    """Say what was wrong, as the last words of the connection."""
    response = json_response({"error": {"message": str(refusal), "code": refusal.status}}, refusal.status)
    await stream.send_all(_head(response, HttpRequest(keep_alive=False)) + response.body)
    # Closing with unread bytes resets the connection, and takes the answer from a client that is still sending.
    await stream.send_eof()
    with trio.move_on_after(LINGER):
        while await stream.receive_some(CHUNK):
            pass


async def _answer(
    stream: trio.SocketStream,
    parser: _Parser,
    request: HttpRequest,
    handler: Callable[[HttpRequest], Awaitable[HttpResponse]],
) -> bool:
    """Answer one request while listening for the client's end; False when the connection is of no more use."""
    alive = False

    async def respond() -> None:
        nonlocal alive
        alive = await _respond(stream, request, handler)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        await _read_ahead(stream, parser)
        nursery.cancel_scope.cancel()  # the client is gone
    return alive


async def _read_ahead(stream: trio.SocketStream, parser: _Parser) -> None:
    """Take in what the client sends before it has its answer, within bounds; return when it has gone."""
    try:
        while len(parser.ready) < READ_AHEAD:
            data = await stream.receive_some(CHUNK)
            if not data:
                return
            parser.feed(bytes(data))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    await trio.sleep_forever()


async def _respond(
    stream: trio.SocketStream, request: HttpRequest, handler: Callable[[HttpRequest], Awaitable[HttpResponse]]
) -> bool:
    """Have the request handled, and send what comes of it; True when all was sent.

    Nothing that a handler does wrong may end the server: it costs its own client the answer.
    """
    try:
        response = await handler(request)
        head = _head(response, request)
    except Exception:
        logger.exception("a request failed: %s %s", request.method, request.path)
        response = json_response({"error": {"message": "internal error", "code": 500}}, 500)
        head = _head(response, request)
    try:
        await _send(stream, head, response, request)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    except Exception:
        # The status is on its way already: only breaking off tells the client.
        logger.exception("an answer broke off: %s %s", request.method, request.path)
        return False
    return True


def _has_body(response: HttpResponse) -> bool:
    return response.status >= 200 and response.status not in {204, 304}


def _head(response: HttpResponse, request: HttpRequest) -> bytes:
    """Status line and headers; ``request.keep_alive`` becomes what the connection can do after this answer."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {response.status} {phrase}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header of the answer has a line break")
    if _has_body(response):
        if response.stream is None:
            lines.append(f"Content-Length: {len(response.body)}")
        elif request.version == "1.0":
            request.keep_alive = False  # HTTP/1.0 has no chunks: the end of the connection is the end of the answer
        else:
            lines.append("Transfer-Encoding: chunked")
    if not request.keep_alive:
        lines.append("Connection: close")
    elif request.version == "1.0":
        lines.append("Connection: keep-alive")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _send(stream: trio.SocketStream, head: bytes, response: HttpResponse, request: HttpRequest) -> None:
    silent = request.method == "HEAD" or not _has_body(response)
    if response.stream is None:
        await stream.send_all(head if silent else head + response.body)
        return
    chunked = request.version != "1.0"
    async with contextlib.aclosing(response.stream) as chunks:
        await stream.send_all(head)
        if silent:
            return
        async for chunk in chunks:
            if chunk:
                await stream.send_all(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk)
    if chunked:
        await stream.send_all(b"0\r\n\r\n")
