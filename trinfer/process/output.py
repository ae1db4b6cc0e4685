"""What an engine says: kept for error messages and for the user's file, at any rate, and never in its way.

Rule: the pipe of an engine is emptied whatever happens. A full pipe stops the engine, so a slow or full disk costs log
lines (they are counted, and the file says how many), not the run. Memory is bounded for lines of any length, and no
work is done per line while output floods in.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

import trio

from trinfer.process import threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["EngineLog"]

logger = logging.getLogger(__name__)

BUFFER = 16 * 2**20  # bytes that may wait for the disk
LISTENED = 256 * 1024  # bytes of a line without end that are passed to listeners before it is cut


class EngineLog:
    """The output of one server: a ring of the last lines, and a file that is rotated by size.

    Args:
        path: the file, mode 0600, appended to; None keeps the ring only. Folders are made with mode 0700.
        max_bytes: size at which the file becomes ``PATH.1``, and so on up to ``keep``.
        ring_lines: how many last lines are kept in memory, each cut at ``max_line`` bytes.
    """

    def __init__(
        self, path: Path | None, *, max_bytes: int, keep: int = 3, ring_lines: int = 200, max_line: int = 4096
    ) -> None:
        self.path = path
        self._max_bytes, self._keep = max_bytes, keep
        self._ring: deque[bytes] = deque(maxlen=ring_lines)
        self._ring_lines = ring_lines
        self._max_line = max_line
        self._partial = b""  # the line that has not ended yet, cut at max_line
        self._cut = 0  # bytes of that line that were dropped
        self._returned = False  # it has gone back to its beginning (carriage return): what comes next replaces it
        self._listeners: list[_Listener] = []
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._lost = 0
        self._news = trio.Event()
        self._closed = False
        self._closing = trio.Event()
        self._flushed = trio.Event()
        self._trouble = ""
        self.bytes_seen = 0

    # -- in -------------------------------------------------------------------------------------------------------

    def feed(self, chunk: bytes) -> None:
        """Take a chunk of output; never blocks, never raises."""
        self.bytes_seen += len(chunk)
        if self.path is not None and not self._closed:
            if self._waiting_bytes + len(chunk) > BUFFER:
                self._lost += len(chunk)
            else:
                self._waiting.append(chunk)
                self._waiting_bytes += len(chunk)
                self._news.set()
        # From the right, and no more lines than the ring can hold: a flood costs one search per kept line.
        lines = chunk.rsplit(b"\n", self._ring_lines)
        if len(lines) > 1:
            self._grow(lines[0])
            self._end_line()
            for line in lines[1:-1]:
                self._ring.append(self._shorten(line))
        self._grow(lines[-1])
        for listener in tuple(self._listeners):
            listener.hear(chunk)

    def _grow(self, piece: bytes) -> None:
        """More of the line that has not ended yet. Of a progress bar, only the last state counts."""
        # What stands before the last newline of the first piece belongs to lines that the ring would drop anyway.
        before, newline, piece = piece.rpartition(b"\n")
        if newline:
            self._ring.append(self._shorten(before.rpartition(b"\n")[2]))
            self._partial, self._cut, self._returned = b"", 0, False
        text = piece.rstrip(b"\r")
        if text:
            text, restarted = text[text.rfind(b"\r") + 1 :], b"\r" in text
            if restarted or self._returned:
                self._partial, self._cut = b"", 0
            room = self._max_line - len(self._partial)
            self._partial += text[:room]
            self._cut += max(0, len(text) - room)
            self._returned = piece.endswith(b"\r")
        elif piece:
            self._returned = True

    def _end_line(self) -> None:
        self._ring.append(self._mark_cut(self._partial, self._cut))
        self._partial, self._cut, self._returned = b"", 0, False

    def _shorten(self, line: bytes) -> bytes:
        if b"\r" in line:
            line = line.rstrip(b"\r").rpartition(b"\r")[2]
        return self._mark_cut(line[: self._max_line], len(line) - self._max_line)

    @staticmethod
    def _mark_cut(line: bytes, cut: int) -> bytes:
        return line + b" ... [%d more bytes]" % cut if cut > 0 else line

    def begin(self, title: str) -> None:
        """A new process writes from now on: the ring forgets the one before, and the file says ``title``."""
        self._ring.clear()
        self._partial, self._cut, self._returned = b"", 0, False
        if self.path is not None and not self._closed:
            line = f"[trinfer: {title}]\n".encode()
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            self._news.set()

    # -- out ------------------------------------------------------------------------------------------------------

    def tail(self, lines: int = 50) -> tuple[str, ...]:
        """The last lines, oldest first, undecodable bytes replaced, an unfinished line included."""
        kept = list(self._ring)
        if self._partial:
            kept.append(self._mark_cut(self._partial, self._cut))
        return tuple(line.decode("utf-8", "replace") for line in kept[-lines:] if line.strip())

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Have ``listener`` called with complete lines as they come, several at once; returns what ends it.

        Costs decoding of all output: for the time of a start, not for the life of an engine.
        """
        entry = _Listener(listener)
        self._listeners.append(entry)

        def remove() -> None:
            if entry in self._listeners:
                self._listeners.remove(entry)

        return remove

    # -- file -----------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write to the file what `feed` brings, in a thread, until `aclose`.

        Trouble with the disk is logged once, noted in the file when it is over, and never raised.
        Cancelled: what was not written yet is lost; call `aclose` first.
        """
        task_status.started()
        try:
            while self.path is not None and not (self._closed and not self._waiting):
                await self._news.wait()
                self._news = trio.Event()
                if self._closed:
                    self._news.set()
                chunks, self._waiting = self._waiting, []
                size, self._waiting_bytes = self._waiting_bytes, 0
                lost, self._lost = self._lost, 0
                if lost:
                    chunks.append(
                        b"\n[trinfer: %d bytes of output were dropped, the disk was too slow or full]\n" % lost
                    )
                if not chunks:
                    continue
                try:
                    # A disk that hangs is not waited for when the server is left; the thread that hangs there with it
                    # is the last that is started.
                    write = partial(self._write, self.path, b"".join(chunks))
                    await threads.run_sync(write, abandon_on_cancel=True)
                    self._trouble = ""
                except OSError as error:
                    self._lost += size
                    if str(error) != self._trouble:
                        self._trouble = str(error)
                        logger.warning("the engine's output cannot be written to %s: %s", self.path, error)
                    with trio.move_on_after(1):  # do not hammer a full disk
                        await self._closing.wait()
                    if self._closed:
                        return
        finally:
            self._flushed.set()

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = self._open(path)
        try:
            if os.fstat(fd).st_size + len(data) > self._max_bytes and os.fstat(fd).st_size:
                os.close(fd)
                fd = -1
                self._rotate(path)
                fd = self._open(path)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            if fd >= 0:
                os.close(fd)

    @staticmethod
    def _open(path: Path) -> int:
        # O_NOFOLLOW: in a folder that others can write to, nobody shall lead us elsewhere.
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _rotate(self, path: Path) -> None:
        for number in range(self._keep, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)

    async def aclose(self) -> None:
        """Write what is left; returns once it is on its way to the disk. Idempotent. Bound it by a cancel scope."""
        self._closed = True
        self._closing.set()
        self._news.set()
        if self.path is not None:
            await self._flushed.wait()


class _Listener:
    """Cuts a stream of bytes into complete lines of text for one listener."""

    def __init__(self, listener: Callable[[str], None]) -> None:
        self._listener = listener
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""

    def hear(self, chunk: bytes) -> None:
        text = self._partial + self._decoder.decode(chunk).replace("\r", "\n")
        complete, newline, self._partial = text.rpartition("\n")
        if not newline and len(self._partial) > LISTENED:
            complete, self._partial = self._partial, ""
        if complete:
            self._listener(complete)
