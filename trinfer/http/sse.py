"""Server-sent events: bytes in, the data of events out. Pure, so that any split of any bytes can be tested.

Follows the event stream format of the WHATWG HTML standard as far as inference servers use it: ``data`` fields,
comments, CRLF, LF or CR line ends, several data lines for one event. Other fields (event, id, retry) are skipped.
"""

from __future__ import annotations

__all__ = ["EventTooLong", "SseParser"]

MAX_EVENT_BYTES = 64 * 2**20


class EventTooLong(ValueError):
    """An event is longer than `MAX_EVENT_BYTES`."""


class SseParser:
    """Feed it chunks; each call returns the data of the events that are complete now."""

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended yet
        self._pieces: list[bytes] = []  # what has come of it since
        self._waiting = 0  # bytes of them
        self._data: list[bytes] = []
        self._size = 0
        self._begun = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Raises `EventTooLong`."""
        if not self._begun:
            chunk = self._rest + chunk
            if len(chunk) < 3 and b"\xef\xbb\xbf".startswith(chunk):
                self._rest = chunk  # it may be half a byte order mark
                return []
            self._rest, self._begun = b"", True
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if b"\n" not in chunk and b"\r" not in chunk and not self._rest.endswith(b"\r"):
            # Joined when the line ends: a long one would be copied again and again.
            self._pieces.append(chunk)
            self._waiting += len(chunk)
            self._check(len(self._rest) + self._waiting)
            return []
        if self._pieces:
            chunk = b"".join((*self._pieces, chunk))
            self._pieces, self._waiting = [], 0
        text = self._rest + chunk if self._rest else chunk
        if b"\r" in text:
            # A CR at the very end may be the first half of a CRLF: it is kept back.
            held = b"\r" if text.endswith(b"\r") else b""
            text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *lines, self._rest = text.split(b"\n")
        self._check(len(self._rest))
        if not lines:
            return []
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._size += len(line)
            elif not line:
                if self._data:
                    events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data, self._size = [], 0
            elif line == b"data":
                self._data.append(b"")
        return events

    def finish(self) -> list[bytes]:
        """The data of a last event that lacks the empty line at its end, or a part of it.

        The standard throws it away. But servers forget the line, and a stream that breaks off must not look complete.
        """
        return self.feed(b"\n\n")

    def _check(self, waiting: int) -> None:
        if waiting + self._size > MAX_EVENT_BYTES:
            raise EventTooLong(f"an event is longer than {MAX_EVENT_BYTES} bytes")
