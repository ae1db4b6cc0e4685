"""Bytes to and from one server: plain sockets, unix sockets, TLS, with or without a proxy.

Rule: what goes wrong is an `OSError` (of which ssl.SSLError is one), whatever the kind; and closing never waits.

A plain transport talks to the socket itself, and waits by `trinfer.http.reactor`. trio's streams register each wait
with epoll, and make a checkpoint before and after each call, which costs most of a small request.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import trio

from trinfer.http.reactor import CHUNK, Reactor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trinfer.http.origin import Origin
    from trinfer.http.reactor import Feed

__all__ = ["Proxy", "TlsOptions", "Transport", "connect", "find_proxy", "is_local"]

CLOSED = "it was closed on our side"
MAX_PROXY_ANSWER = 64 * 1024
FULL_QUEUE, FULL_QUEUE_MOST = 0.001, 0.05  # seconds between two tries to get into a full queue
RECORD_HEAD = 5  # bytes of a TLS record before its content: type, version, length


class Transport(Protocol):
    """One connected socket.

    ``send_now`` sends what can be sent at once, and says whether that was all; ``send_rest`` sends the rest then.
    ``fill`` reads into ``feed`` until it needs no more; it gets empty bytes when the peer has ended, and raises or
    returns True then.
    """

    def send_now(self, data: bytes) -> bool: ...
    async def send_rest(self, data: bytes) -> None: ...
    async def fill(self, feed: Feed) -> None: ...
    def has_news(self) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class TlsOptions:
    """Whom to trust, and who we are.

    Attributes:
        ca_file: certificates to trust instead of the system's, in PEM.
        cert_file, key_file: our own certificate and its key, in PEM, for servers that ask for one.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """Raises OSError (ssl.SSLError is one) for files that cannot be used."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. ``authorization`` is the header's value, or None."""

    host: str
    port: int
    authorization: str | None = None


def is_local(origin: Origin) -> bool:
    """Whether an origin is on this machine by its name: a unix socket, or a loopback address."""
    return origin.uds is not None or origin.host in {"localhost", "::1"} or origin.host.startswith("127.")


def find_proxy(origin: Origin) -> Proxy | None:
    """The proxy for an origin, by ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``.

    Loopback addresses and unix sockets never go through one.

    Raises:
        ValueError: it names something else than an http proxy.
    """
    if is_local(origin):
        return None
    proxies = getproxies()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or proxy_bypass(f"{origin.host}:{origin.port}"):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"the environment names the proxy {parts.scheme}://{parts.hostname}; only http:// is known")
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(parts.hostname, parts.port or 80, authorization)


async def connect(
    origin: Origin, tls: ssl.SSLContext | None, proxy: Proxy | None = None, *, reactor: Reactor | None = None
) -> Transport:
    """Connect to an origin; ``reactor`` tells a plain transport when there is something to read.

    Raises:
        OSError: nobody listens there, the name is unknown, the certificate is not trusted, …

    Cancelled: nothing is left open.
    """
    if origin.uds is not None:
        stream = await _open_unix(origin.uds)
    else:
        stream = await _open_tcp(*((proxy.host, proxy.port) if proxy else (origin.host, origin.port)))
    if tls is None:
        return PlainTransport(stream, reactor or Reactor())
    try:
        if proxy is not None:
            await _tunnel(stream, origin, proxy)
        # https_compatible: a server that leaves without TLS's goodbye is no error; HTTP's framing tells the end.
        records = _Records(stream)
        secure = trio.SSLStream(records, tls, server_hostname=origin.host, https_compatible=True)
        await secure.do_handshake()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        stream.socket.close()
        raise _os_error(error) from error
    except BaseException:
        stream.socket.close()
        raise
    return TlsTransport(secure, records, stream)


async def _open_tcp(host: str, port: int) -> trio.SocketStream:
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as error:
        # "All attempts have failed", says trio; why the first of them did is what helps.
        if isinstance(error.__cause__, ExceptionGroup) and isinstance(first := error.__cause__.exceptions[0], OSError):
            raise first from None
        raise


async def _open_unix(path: str) -> trio.SocketStream:
    """Connect to a unix socket, and wait for a place in its queue.

    Where the queue is full, the connect fails, and nothing is under way: trio takes it for one that is, and would give
    back a socket that is not connected.
    """
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        pause = FULL_QUEUE
        while True:
            try:
                opened.connect(path)
            except BlockingIOError:
                await trio.sleep(pause)
                pause = min(2 * pause, FULL_QUEUE_MOST)
            else:
                await trio.lowlevel.checkpoint()
                return trio.SocketStream(trio.socket.from_stdlib_socket(opened))
    except BaseException:
        opened.close()
        raise


async def _tunnel(stream: trio.SocketStream, origin: Origin, proxy: Proxy) -> None:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    await stream.send_all(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = await stream.receive_some(4096)
        if not more or len(answer) > MAX_PROXY_ANSWER:
            raise ConnectionRefusedError(f"the proxy {proxy.host}:{proxy.port} gave no proper answer")
        answer += more
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["200"]:
        raise ConnectionRefusedError(f"the proxy {proxy.host}:{proxy.port} refused: {status[:80]}")


class PlainTransport:
    """A socket without TLS."""

    __slots__ = ("_fd", "_poll", "_reactor", "_recv", "_send", "_sent", "_socket", "_watched")

    def __init__(self, stream: trio.SocketStream, reactor: Reactor) -> None:
        # The socket is taken over from trio, which leaves it non-blocking.
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)
        self._fd = self._socket.fileno()
        self._recv, self._send = self._socket.recv, self._socket.send
        self._sent = 0
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._reactor = reactor
        self._watched = reactor.watch(self._fd, self._recv)

    def send_now(self, data: bytes) -> bool:
        try:
            self._sent = self._send(data)
        except BlockingIOError:
            self._sent = 0
        return self._sent == len(data)

    async def send_rest(self, data: bytes) -> None:
        view = memoryview(data)
        while self._sent < len(data):
            await self._wait(trio.lowlevel.wait_writable)
            with contextlib.suppress(BlockingIOError):
                self._sent += self._send(view[self._sent :])

    async def fill(self, feed: Feed) -> None:
        watched = self._watched
        if watched is not None and not watched.is_lost and await watched.fill(feed):
            return
        if self._socket.fileno() < 0:
            raise ConnectionAbortedError(CLOSED)
        await trio.lowlevel.checkpoint()
        while True:
            try:
                data = self._recv(CHUNK)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            if feed(data):
                return

    async def _wait(self, wait: Callable[[int], Awaitable[None]]) -> None:
        try:
            await wait(self._fd)
        except trio.ClosedResourceError:
            raise ConnectionAbortedError(CLOSED) from None

    def has_news(self) -> bool:
        # Asked of the kernel: what the reactor knows may be some milliseconds old.
        return bool(self._poll.poll(0))

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._reactor.forget(self._fd)
            trio.lowlevel.notify_closing(self._fd)
            self._socket.close()


class _Records(trio.abc.Stream):
    """Hands on what a socket receives by single TLS records, and so knows what nobody has read yet.

    A stream that is given more than it needs keeps the rest where nobody can see it: an answer that nobody asked for
    would wait there for the next request.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = b""
        self._missing = 0  # bytes of the record that was handed on in part

    @property
    def is_empty(self) -> bool:
        return not self._rest and not self._missing

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._rest:
            await trio.lowlevel.checkpoint()
        else:
            self._rest = bytes(await self._stream.receive_some(CHUNK))
        while not self._missing and 0 < len(self._rest) < RECORD_HEAD:
            more = bytes(await self._stream.receive_some(CHUNK))
            if not more:
                break
            self._rest += more
        rest = self._rest
        if not self._missing:
            is_whole = len(rest) >= RECORD_HEAD
            self._missing = RECORD_HEAD + int.from_bytes(rest[3:RECORD_HEAD], "big") if is_whole else len(rest)
        record, self._rest = rest[: self._missing], rest[self._missing :]
        self._missing -= len(record)
        return record

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class TlsTransport:
    """A socket with TLS, by trio's own stream."""

    __slots__ = ("_poll", "_records", "_secure", "_stream")

    def __init__(self, secure: trio.SSLStream[_Records], records: _Records, stream: trio.SocketStream) -> None:
        self._secure = secure
        self._records = records
        self._stream = stream
        self._poll = select.poll()
        self._poll.register(stream.socket.fileno(), select.POLLIN)

    def send_now(self, data: bytes) -> bool:
        return False

    async def send_rest(self, data: bytes) -> None:
        try:
            await self._secure.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _os_error(error) from error

    async def fill(self, feed: Feed) -> None:
        done = False
        while not done:
            try:
                data = bytes(await self._secure.receive_some(CHUNK))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise _os_error(error) from error
            done = feed(data)

    def has_news(self) -> bool:
        # Session tickets of TLS 1.3 come when they like, and are no news of HTTP; but telling them apart would need a
        # read. A connection more, now and then, is the price.
        return not self._records.is_empty or self._secure.pending() > 0 or bool(self._poll.poll(0))

    def close(self) -> None:
        self._stream.socket.close()


def _os_error(error: BaseException) -> OSError:
    """What trio hides behind its own errors."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause
    return ConnectionResetError(os.strerror(104) if cause is None else str(cause))
