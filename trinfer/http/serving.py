"""A small HTTP/1.1 server inside the trio loop: for engines that are trinfer's own.

Rules: no thread, and no task that outlives `serve_http`. Requests of one connection are answered in order. A client
that goes away cancels its handler, as it must be with generations: nobody is left to read them.
"""

from __future__ import annotations

import contextlib
import json
import logging
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
IDLE_TIMEOUT = 120.0  # seconds that a client may keep a connection without asking anything


@dataclass
class HttpRequest:
    """A complete request; header names in lower case."""

    method: str = "GET"
    target: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    keep_alive: bool = True

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
    """Collects the requests of one connection."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._current = HttpRequest()
        self._url = b""
        self._body: list[bytes] = []
        self._header_bytes = self._size = 0
        self._in_body = False
        self.expects_continue = False
        self.ready: list[HttpRequest] = []

    def feed(self, data: bytes) -> None:
        if not self._in_body:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES + CHUNK:
                raise _BadRequest(431, "the headers are too long")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            raise _BadRequest(400, "no other protocol is spoken here") from error
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, _BadRequest):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError as error:
            raise _BadRequest(400, f"this is not HTTP/1.1: {error}") from error

    def on_message_begin(self) -> None:
        self._current, self._url, self._body = HttpRequest(), b"", []
        self._header_bytes = self._size = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._current.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        self._in_body = True
        self.expects_continue = self._current.headers.get("expect", "").lower() == "100-continue"

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > MAX_BODY_BYTES:
            raise _BadRequest(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = self._current
        request.method = self._parser.get_method().decode("latin-1")
        request.target = self._url.decode("latin-1")
        request.body = b"".join(self._body)
        request.keep_alive = self._parser.should_keep_alive()
        self._in_body = self.expects_continue = False
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
    try:
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(_accept, listener, handler, nursery)
            task_status.started()
    finally:
        for listener in listeners:
            listener.socket.close()


async def _accept(
    listener: trio.SocketListener, handler: Callable[[HttpRequest], Awaitable[HttpResponse]], nursery: trio.Nursery
) -> None:
    while True:
        try:
            stream = await listener.accept()
        except OSError as error:  # out of file descriptors, most often: some will be given back
            logger.warning("cannot accept a connection: %s", error)
            await trio.sleep(0.1)
            continue
        nursery.start_soon(_converse, stream, handler)


async def _converse(stream: trio.SocketStream, handler: Callable[[HttpRequest], Awaitable[HttpResponse]]) -> None:
    """All requests of one connection."""
    parser = _Parser()
    try:
        while True:
            while not parser.ready:
                with trio.move_on_after(IDLE_TIMEOUT):
                    data = await stream.receive_some(CHUNK)
                    if not data:
                        return
                    parser.feed(bytes(data))
                    if parser.expects_continue:
                        parser.expects_continue = False
                        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
                    continue
                return
            request = parser.ready.pop(0)
            if not await _answer(stream, parser, request, handler) or not request.keep_alive:
                return
    except _BadRequest as error:
        response = json_response({"error": {"message": str(error), "code": error.status}}, error.status)
        try:
            await stream.send_all(_head(response, len(response.body), keep_alive=False) + response.body)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    finally:
        stream.socket.close()


async def _answer(
    stream: trio.SocketStream,
    parser: _Parser,
    request: HttpRequest,
    handler: Callable[[HttpRequest], Awaitable[HttpResponse]],
) -> bool:
    """Answer one request while listening for the client's end; False when the connection is of no more use."""
    alive = False
    refused: _BadRequest | None = None

    async def respond() -> None:
        nonlocal alive
        try:
            response = await handler(request)
        except Exception:
            logger.exception("a request failed: %s %s", request.method, request.path)
            response = json_response({"error": {"message": "internal error", "code": 500}}, 500)
        try:
            await _send(stream, response, request)
            alive = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(respond)
        try:
            # A client that asks the next thing before it has its answer is read ahead, within bounds.
            while len(parser.ready) < READ_AHEAD and (data := await stream.receive_some(CHUNK)):
                parser.feed(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except _BadRequest as error:
            refused = error
        if len(parser.ready) < READ_AHEAD:  # it is gone, or talks nonsense
            nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused
    return alive


def _head(response: HttpResponse, length: int | None, *, keep_alive: bool) -> bytes:
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {response.status} {phrase}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    lines.append("Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}")
    if not keep_alive:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _send(stream: trio.SocketStream, response: HttpResponse, request: HttpRequest) -> None:
    keep_alive = request.keep_alive
    if response.stream is None:
        body = b"" if request.method == "HEAD" else response.body
        await stream.send_all(_head(response, len(response.body), keep_alive=keep_alive) + body)
        return
    await stream.send_all(_head(response, None, keep_alive=keep_alive))
    async with contextlib.aclosing(response.stream) as chunks:
        async for chunk in chunks:
            if chunk:
                await stream.send_all(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    await stream.send_all(b"0\r\n\r\n")
