"""Reading zstd to its end: the library takes the end of a file for the end of the data, also in the midst of it.

What it reads is followed here from block to block (RFC 8878), which costs next to nothing: only lengths are looked at.
"""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["open_zstd"]

MAGIC = 0xFD2FB528
SKIPPABLE = 0x184D2A50  # and the fifteen after it
LARGEST_WINDOW = 2**31  # what `zstd --long=31` makes; the library's own limit is 128 MiB
RLE = 1


def open_zstd(file: IO[bytes], zstandard: Any) -> IO[bytes]:  # noqa: ANN401  # the module
    """What a file holds, of however many frames. Raises EOFError where it ends before its last frame does."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    # Not closed by the reader: who has opened the file closes it.
    reader = decompressor.stream_reader(_Followed(file), read_across_frames=True, closefd=False)
    return cast("IO[bytes]", io.BufferedReader(reader, 1 << 20))


class _Followed:
    """Passes on what is read from a file, and refuses an end within a frame."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._steps = self._frames()
        self._is_between = True
        self._held = b""
        self._wanted = next(self._steps)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if data:
            self._follow(data)
        elif not self._is_between:
            raise EOFError("the compressed data ends before its end mark")
        return data

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            self._is_between = False
            if self._wanted < 0:  # to be passed by
                step = min(-self._wanted, len(data) - at)
                self._wanted += step
                taken = b""
            else:
                step = min(self._wanted - len(self._held), len(data) - at)
                taken = self._held + data[at : at + step]
            at += step
            if len(taken) == self._wanted:
                self._held = b""
                self._wanted = self._steps.send(taken)
            else:
                self._held = taken

    def _frames(self) -> Generator[int, bytes, None]:
        """Yields how many bytes it wants to see, or to be passed by (as a negative number)."""
        while True:
            self._is_between = True
            magic = int.from_bytes((yield 4), "little")
            if magic & ~0xF == SKIPPABLE:
                if size := int.from_bytes((yield 4), "little"):
                    yield -size
                continue
            if magic != MAGIC:  # the library will say so
                yield -(2**62)
            (flags,) = yield 1
            single, checksum = flags >> 5 & 1, flags >> 2 & 1
            sizes = (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6] + (1 - single)
            if sizes:
                yield -sizes
            is_last = False
            while not is_last:
                head = int.from_bytes((yield 3), "little")
                is_last = bool(head & 1)
                if size := 1 if head >> 1 & 3 == RLE else head >> 3:
                    yield -size
            if checksum:
                yield -4
