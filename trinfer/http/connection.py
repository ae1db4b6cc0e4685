"""One connection, one exchange at a time: HTTP/1.1 over a socket, parsed by httptools (llhttp).

Rule: a connection is reused only after an answer that was complete, in order and alone. Whatever else happens
(malformed or contradictory answers, bytes that nobody asked for, time-outs, cancellation) closes it, so that an
answer can never reach another request.
"""

from __future__ import annotations

import enum
import math
import time
from typing import TYPE_CHECKING

import httptools

from trinfer.http.reactor import CHUNK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.http.transport import Transport

__all__ = ["BrokenConnection", "Connection", "HttpAnswer", "MalformedAnswer"]

MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 256 * 2**20
FRAMING = 64  # bytes around one byte of a chunked body: sizes and extensions; more is nothing that a server needs
MAX_INTERIM = 16  # 1xx answers before the real one


class BrokenConnection(Exception):
    """The connection ended early. ``untouched``: before a single byte of the answer."""

    def __init__(self, detail: str, *, untouched: bool) -> None:
        super().__init__(detail)
        self.untouched = untouched


class MalformedAnswer(Exception):
    """What came was not a proper HTTP answer to the request."""


class HttpAnswer:
    """An answer: its status, its body, and its headers, which are read only when somebody asks for them."""

    __slots__ = ("_raw_headers", "body", "status")

    def __init__(self, status: int, raw_headers: Mapping[bytes, bytes], body: bytes = b"") -> None:
        self.status = status
        self.body = body
        self._raw_headers = raw_headers

    @property
    def headers(self) -> dict[str, str]:
        """Names in lower case; of repeated ones, the last counts."""
        return {
            name.decode("latin-1").lower(): value.decode("latin-1").strip() for name, value in self._raw_headers.items()
        }


class _Framing(enum.Enum):
    """What tells the end of a body."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"


class _State(enum.Enum):
    """What a connection may be used for."""

    IDLE = "idle"
    BUSY = "busy"
    CLOSED = "closed"


# By names of the module: CPython 3.11 takes 70 ns to find a member in its class, and a request asks ten times.
_NONE, _LENGTH, _CHUNKED, _UNTIL_CLOSE = _Framing
_IDLE, _BUSY, _CLOSED = _State


class _Reader:
    """Callbacks of the parser for one answer, and the checks that the parser leaves to us."""

    __slots__ = (
        "_framing_bytes",
        "_header_bytes",
        "_interim",
        "_size",
        "body",
        "complete",
        "framing",
        "headers",
        "in_body",
        "keep_alive",
        "on_header",
        "parser",
        "status",
        "touched",
    )

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        # Called by the parser for each header (and trailer, which nobody reads): too often for a function in Python.
        self.on_header = self.headers.__setitem__
        self.parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self.status = 0
        self.framing = _NONE
        self.in_body = False
        self.complete = False
        self.keep_alive = False
        self.touched = False
        self.body: list[bytes] = []  # pieces that nobody has taken yet
        self._header_bytes = 0
        self._framing_bytes = 0  # what came of a chunked answer, less its body
        self._size = 0
        self._interim = 0

    def feed_whole(self, data: bytes) -> bool:
        """Take a piece, empty at the end of the connection; True when the answer is complete. Raises as `feed`."""
        self.feed(data)
        return self.complete

    def feed_head(self, data: bytes) -> bool:
        """Likewise; True when status and headers are."""
        self.feed(data)
        return self.in_body

    def feed_piece(self, data: bytes) -> bool:
        """Likewise; True when there is something of the body, or it is at its end."""
        self.feed(data)
        return bool(self.body) or self.complete

    def feed(self, data: bytes) -> None:
        """Raises `MalformedAnswer`, and `BrokenConnection` when the connection has ended too early."""
        if not data:
            self._end()
            return
        self.touched = True
        parser = self.parser
        if parser is None:
            raise BrokenConnection("it was closed on our side", untouched=False)
        if not self.in_body:
            self._header_bytes += len(data)  # with what came of the body in the same piece
            if self._header_bytes > MAX_HEADER_BYTES + CHUNK:
                raise MalformedAnswer(f"its headers are longer than {MAX_HEADER_BYTES} bytes")
        try:
            parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            raise cause if isinstance(cause, MalformedAnswer) else MalformedAnswer(str(error)) from error
        except httptools.HttpParserUpgrade as error:
            raise MalformedAnswer("it switches to another protocol") from error
        except httptools.HttpParserError as error:
            what = "more bytes follow the answer" if self.complete else f"it is not valid HTTP/1.1 ({error})"
            raise MalformedAnswer(what) from error
        if self.framing is _CHUNKED:
            self._framing_bytes += len(data)
            if self._framing_bytes > 2 * MAX_HEADER_BYTES + FRAMING * self._size:  # the headers are in it, too
                raise MalformedAnswer(f"its chunk sizes and trailers are longer than {MAX_HEADER_BYTES} bytes")

    def _end(self) -> None:
        if self.in_body and self.framing is _UNTIL_CLOSE:
            self.complete = True
        if not self.complete:
            when = "in the middle of the answer" if self.touched else "before the answer"
            raise BrokenConnection(f"it was closed {when}", untouched=not self.touched)

    def release(self) -> None:
        """The parser refers to the reader: left alone, each pair would wait for the garbage collector."""
        self.parser = None

    def take_body(self) -> bytes:
        """The body so far; what is taken is gone."""
        pieces, self.body = self.body, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # -- called by the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            raise MalformedAnswer("more bytes follow the answer")
        self.headers.clear()  # those of an interim answer

    def on_headers_complete(self) -> None:
        assert self.parser is not None
        self.status = self.parser.get_status_code()
        if self.status < 200:
            self._check_interim()
            return
        if self._header_bytes > MAX_HEADER_BYTES:  # counted with what came of the body: now exactly
            size = sum(len(name) + len(value) for name, value in self.headers.items())
            if size > MAX_HEADER_BYTES:
                raise MalformedAnswer(f"its headers are longer than {MAX_HEADER_BYTES} bytes")
        lengths: list[bytes] = []
        codings: list[bytes] = []
        for name, value in self.headers.items():
            # Both names have a length of their own among the usual headers, and that is quicker to compare.
            if len(name) == 14 and name.lower() == b"content-length":
                lengths.append(value.strip())
            elif len(name) == 17 and name.lower() == b"transfer-encoding":
                codings.append(value.strip())
        self._find_framing(lengths, codings)
        self.keep_alive = self.framing is not _UNTIL_CLOSE and self.parser.should_keep_alive()
        self.in_body = True

    def _check_interim(self) -> None:
        if self.status == 101:
            raise MalformedAnswer("it switches to another protocol")
        if self.status < 100:
            raise MalformedAnswer(f"its status {self.status:03} is none")
        self._interim += 1
        if self._interim > MAX_INTERIM:
            raise MalformedAnswer("too many interim answers")

    def _find_framing(self, lengths: list[bytes], codings: list[bytes]) -> None:
        # llhttp refuses most contradictions itself (of equal names, only the last comes here).
        if codings:
            if lengths:
                raise MalformedAnswer("it has both a length and a transfer coding")
            if len(codings) > 1 or codings[0].lower() != b"chunked":
                raise MalformedAnswer(f"its transfer coding {b', '.join(codings)!r} is unknown")
            self.framing = _CHUNKED
        elif lengths:
            if len(lengths) > 1 or not lengths[0].isdigit():
                raise MalformedAnswer("its length is no number, or there are several")
            if int(lengths[0]) > MAX_BODY_BYTES:
                raise MalformedAnswer(f"its body is longer than {MAX_BODY_BYTES} bytes")
            self.framing = _LENGTH
        elif self.status not in {204, 304}:
            self.framing = _UNTIL_CLOSE

    def on_body(self, data: bytes) -> None:
        if not self.in_body:  # it would stand before the body of the real answer
            raise MalformedAnswer("an interim answer has a body")
        self._size += len(data)
        self._framing_bytes -= len(data)
        if self._size > MAX_BODY_BYTES:
            raise MalformedAnswer(f"its body is longer than {MAX_BODY_BYTES} bytes")
        self.body.append(data)

    def on_message_complete(self) -> None:
        if self.in_body:  # an interim answer has none
            self.complete = True


class Connection:
    """A connection to one origin; not for several tasks at a time.

    `exchange` is a whole answer at once; `begin` and `read` give it piece by piece. On any error, and when cancelled,
    the connection is closed.
    """

    __slots__ = ("_is_refused", "_reader", "_state", "_transport", "deadline", "expired", "idle_since")

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._state = _IDLE
        self._reader = _Reader()
        self._is_refused = False  # before it was sent in full
        self.idle_since = 0.0
        self.deadline = math.inf  # in trio's time; enforced by `Pool.sweep`
        self.expired = False

    @property
    def is_reusable(self) -> bool:
        """Idle, and nothing has come since: an end or unasked bytes make it worthless."""
        return self._state is _IDLE and not self._transport.has_news()

    def expire(self) -> None:
        """Its request has run out of time: the task that waits gets `BrokenConnection`, and finds ``expired`` set."""
        self.expired = True
        self.close()

    @property
    def answered(self) -> int:
        """Status of the answer to the last request; 0 where that is not complete."""
        return self._reader.status if self._reader.complete else 0

    @property
    def is_idle(self) -> bool:
        return self._state is _IDLE

    def close(self) -> None:
        """Close at once, without a checkpoint, so that no cancellation can get in the way. Idempotent.

        A task that waits for an answer gets `BrokenConnection`.
        """
        if self._state is not _CLOSED:
            self._state = _CLOSED
            self._reader.release()
            self._transport.close()

    async def exchange(self, request: bytes) -> HttpAnswer:
        """Send one request, and return its complete answer.

        Raises:
            BrokenConnection: it ended before the answer was complete.
            MalformedAnswer: the answer is not proper HTTP.
        """
        reader = self._start()
        try:
            if not self._transport.send_now(request):
                await self._send_rest(request)
            await self._transport.fill(reader.feed_whole)
            self._finish(reader)
            return HttpAnswer(reader.status, reader.headers, reader.take_body())
        except OSError as error:
            raise BrokenConnection(_detail(error), untouched=not reader.touched) from error
        finally:
            if self._state is _BUSY:
                self.close()

    async def begin(self, request: bytes) -> HttpAnswer:
        """Send one request, and return status and headers; `read` gives the body. Raises as `exchange`."""
        reader = self._start()
        try:
            if not self._transport.send_now(request):
                await self._send_rest(request)
            await self._transport.fill(reader.feed_head)
        except OSError as error:
            self.close()
            raise BrokenConnection(_detail(error), untouched=not reader.touched) from error
        except BaseException:
            self.close()
            raise
        return HttpAnswer(reader.status, reader.headers)

    async def read(self) -> bytes:
        """The next piece of the body; empty at its end, when the connection is idle or closed. Raises as `exchange`."""
        reader = self._reader
        try:
            if not reader.body and not reader.complete:
                await self._transport.fill(reader.feed_piece)
        except OSError as error:
            self.close()
            raise BrokenConnection(_detail(error), untouched=False) from error
        except BaseException:
            self.close()
            raise
        piece = reader.take_body()
        if not piece and self._state is _BUSY:
            self._finish(reader)
            if self._state is _BUSY:
                self.close()
        return piece

    async def _send_rest(self, request: bytes) -> None:
        """A server that refuses a large request may answer and hang up before it has read it: its answer counts.

        Then this returns, and the answer is there to be read; if there is none, reading it says so.
        """
        try:
            await self._transport.send_rest(request)
        except (BrokenPipeError, ConnectionResetError):
            self._is_refused = True

    def _start(self) -> _Reader:
        assert self._state is _IDLE, self._state
        self._state = _BUSY
        self._reader = reader = _Reader()
        return reader

    def _finish(self, reader: _Reader) -> None:
        reader.release()
        if reader.keep_alive and self._state is _BUSY and not self._is_refused:
            self._state = _IDLE
            self.idle_since = time.monotonic()


def _detail(error: OSError) -> str:
    return error.strerror or str(error) or "it was reset"
