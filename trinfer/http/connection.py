"""One connection, one exchange at a time: HTTP/1.1 over a trio stream, parsed by httptools (llhttp).

Rule: a connection is reused only after an answer that was complete, in order and alone. Whatever else happens
(malformed or contradictory answers, bytes that nobody asked for, time-outs, cancellation) closes it, so that an
answer can never reach another request.
"""

from __future__ import annotations

import enum
import select
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httptools
import trio

if TYPE_CHECKING:
    from trinfer.http.origin import Origin

__all__ = ["BrokenConnection", "Connection", "HttpAnswer", "MalformedAnswer", "open_connection"]

CHUNK = 65536
MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 2**20
MAX_INTERIM = 16  # 1xx answers before the real one


class BrokenConnection(Exception):
    """The connection ended early. ``untouched``: before a single byte of the answer."""

    def __init__(self, detail: str, *, untouched: bool) -> None:
        super().__init__(detail)
        self.untouched = untouched


class MalformedAnswer(Exception):
    """What came was not a proper HTTP answer to the request."""


@dataclass
class HttpAnswer:
    """A complete answer. Header names are in lower case; of repeated ones, the values are joined by commas."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _State(enum.Enum):
    IDLE = "idle"
    BUSY = "busy"
    CLOSED = "closed"


class _Framing(enum.Enum):
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"
    NONE = "none"


class _Reader:
    """Callbacks of the parser for one answer, and the checks that the parser leaves to us."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.answer = HttpAnswer(0)
        self.framing = _Framing.NONE
        self.in_body = False
        self.complete = False
        self.keep_alive = False
        self._header_bytes = 0
        self._lengths: list[bytes] = []
        self._body: list[bytes] = []
        self._size = 0
        self._interim = 0

    def feed(self, data: bytes) -> None:
        """Raises `MalformedAnswer`."""
        if not self.in_body:
            # Counted here too: llhttp holds partial header lines back, without a limit of its own.
            self._header_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            raise cause if isinstance(cause, MalformedAnswer) else MalformedAnswer(str(error)) from error
        except httptools.HttpParserUpgrade as error:
            raise MalformedAnswer("it switches to another protocol") from error
        except httptools.HttpParserError as error:
            what = "more bytes follow the answer" if self.complete else f"it is not valid HTTP/1.1 ({error})"
            raise MalformedAnswer(what) from error
        if not self.in_body and self._header_bytes > MAX_HEADER_BYTES + CHUNK:
            raise MalformedAnswer(f"its headers are longer than {MAX_HEADER_BYTES} bytes")

    def end(self) -> bool:
        """The connection has ended: True when that completes the answer."""
        if self.in_body and self.framing is _Framing.UNTIL_CLOSE:
            self._finish()
        return self.complete

    # -- called by the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            raise MalformedAnswer("more bytes follow the answer")
        self.answer = HttpAnswer(0)
        self._lengths = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_body:
            return  # a trailer: nothing that we need stands there
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip()
        if key == "content-length":
            self._lengths.append(value.strip())
        headers = self.answer.headers
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
        if sum(map(len, headers)) + sum(map(len, headers.values())) > MAX_HEADER_BYTES:
            raise MalformedAnswer(f"its headers are longer than {MAX_HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        answer = self.answer
        answer.status = self.parser.get_status_code()
        if 100 <= answer.status < 200:
            if answer.status == 101:
                raise MalformedAnswer("it switches to another protocol")
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise MalformedAnswer("too many interim answers")
            return
        coding = answer.headers.get("transfer-encoding", "").lower()
        if len(set(self._lengths)) > 1 or (self._lengths and not self._lengths[0].isdigit()):
            raise MalformedAnswer("its lengths contradict each other")
        if coding and self._lengths:
            raise MalformedAnswer("it has both a length and a transfer coding")
        if coding and coding != "chunked":
            raise MalformedAnswer(f"its transfer coding {coding!r} is unknown")
        if answer.status in {204, 304}:
            self.framing = _Framing.NONE
        elif coding:
            self.framing = _Framing.CHUNKED
        elif self._lengths:
            self.framing = _Framing.LENGTH
            if int(self._lengths[0]) > MAX_BODY_BYTES:
                raise MalformedAnswer(f"its body is longer than {MAX_BODY_BYTES} bytes")
        else:
            self.framing = _Framing.UNTIL_CLOSE
        self.keep_alive = self.framing is not _Framing.UNTIL_CLOSE and self.parser.should_keep_alive()
        self.in_body = True

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_BODY_BYTES:
            raise MalformedAnswer(f"its body is longer than {MAX_BODY_BYTES} bytes")
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self.in_body:  # an interim answer has none
            self._finish()

    def _finish(self) -> None:
        self.answer.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self.complete = True


class Connection:
    """A connection to one origin. Made by `open_connection`; not for several tasks at a time."""

    def __init__(self, stream: trio.abc.Stream, socket: trio.socket.SocketType) -> None:
        self._stream = stream
        self._socket = socket
        self._state = _State.IDLE
        self._poll = select.poll()
        self._poll.register(socket.fileno(), select.POLLIN)
        self.exchanges = 0
        self.idle_since = 0.0

    @property
    def is_reusable(self) -> bool:
        """Idle, and nothing has come since: an end or unasked bytes make it worthless."""
        return self._state is _State.IDLE and not self._poll.poll(0)

    @property
    def is_closed(self) -> bool:
        return self._state is _State.CLOSED

    def close(self) -> None:
        """Close at once, without a checkpoint, so that no cancellation can get in the way. Idempotent."""
        if self._state is not _State.CLOSED:
            self._state = _State.CLOSED
            self._socket.close()

    async def exchange(self, request: bytes) -> HttpAnswer:
        """Send one request, and return its complete answer.

        Raises:
            BrokenConnection: it ended before the answer was complete.
            MalformedAnswer: the answer is not proper HTTP.

        On any error, and when cancelled, the connection is closed.
        """
        assert self._state is _State.IDLE, self._state
        self._state = _State.BUSY
        touched = False
        try:
            await self._stream.send_all(request)
            reader = _Reader()
            while not reader.complete:
                data = await self._stream.receive_some(CHUNK)
                if not data:
                    if reader.end():
                        break
                    raise BrokenConnection(
                        "it was closed in the middle of the answer" if touched else "it was closed before the answer",
                        untouched=not touched,
                    )
                touched = True
                reader.feed(bytes(data))
            self.exchanges += 1
            if reader.keep_alive:
                self._state = _State.IDLE
                self.idle_since = trio.current_time()
            return reader.answer
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            detail = str(error.__cause__ or error) or "it was reset"
            raise BrokenConnection(detail, untouched=not touched) from error
        finally:
            if self._state is _State.BUSY:
                self.close()


async def open_connection(origin: Origin, tls: ssl.SSLContext | None) -> Connection:
    """Connect.

    Raises:
        OSError: nobody listens there, the name is unknown, …; ssl.SSLError is one.

    Cancelled: nothing is left open.
    """
    stream: trio.SocketStream
    if origin.uds is not None:
        stream = await trio.open_unix_socket(origin.uds)
    else:
        stream = await trio.open_tcp_stream(origin.host, origin.port)
    if tls is None:
        return Connection(stream, stream.socket)
    # https_compatible: a server that leaves without TLS's goodbye is not an error of ours; framing tells the end.
    secure = trio.SSLStream(stream, tls, server_hostname=origin.host, https_compatible=True)
    try:
        await secure.do_handshake()
    except trio.BrokenResourceError as error:
        stream.socket.close()
        if isinstance(error.__cause__, ssl.SSLError):
            raise error.__cause__ from error
        raise ConnectionResetError("the connection broke during the TLS handshake") from error
    except BaseException:
        stream.socket.close()
        raise
    return Connection(secure, stream.socket)
