"""What is known of each key, for millions of keys in a few KiB of memory: a hash table in an unlinked file.

The table is read and written through the page cache, which belongs to the kernel and not to the process. It is a
derived thing, made anew from the journal by every run; its file has no name, so that nothing is left of it.

Rule: keys are digests, so that their first bytes are a hash already. One thread at a time.
"""

from __future__ import annotations

import os
import struct
import tempfile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

__all__ = ["Index", "Place"]

SLOT = struct.Struct("<16sIIQ")  # key, times seen if more than once, segment and state, offset and length
TAIL = struct.Struct("<IIQ")  # what follows the key
SIZE = SLOT.size
PROBE_BYTES = 8 * SIZE  # slots read at once; a probe rarely needs more
FULL = 0.6
EMPTY = bytes(16)


class Place(NamedTuple):
    """What the index knows of a key.

    Attributes:
        seen: how often it was met in the input.
        state: kind of the key's last record, 0 for none.
        segment: number of the segment that holds it.
        offset: of the record within; what it means is the caller's business.
    """

    seen: int
    state: int
    segment: int
    offset: int


NOTHING = Place(0, 0, 0, 0)


class Index:
    """A table of keys of 16 bytes.

    Args:
        folder: on whose disk the table lies.

    Raises:
        OSError: the disk is full, ….
    """

    def __init__(self, folder: Path, capacity: int = 1 << 12) -> None:
        self._folder = folder
        self._slots = capacity
        self._count = 0
        self._met = bytearray(-(-capacity // 8))  # a bit for each slot: most keys are met once, which needs no writing
        self._fd = self._open(capacity)

    def _open(self, slots: int) -> int:
        fd, name = tempfile.mkstemp(prefix=".index-", dir=self._folder)
        os.unlink(name)
        try:
            os.ftruncate(fd, slots * SIZE)
        except OSError:
            os.close(fd)
            raise
        return fd

    def __len__(self) -> int:
        return self._count

    def reserve(self, count: int) -> None:
        """Make room for so many keys at once: growing step by step takes half of the time. Raises OSError."""
        slots = self._slots
        while count >= slots * FULL:
            slots *= 2
        if slots > self._slots:
            self._grow(slots)

    def get(self, key: bytes) -> Place | None:
        """What is known of a key; None for nothing."""
        at, tail = self._find(self._fd, self._slots, key)
        return None if tail is None else self._place(at, tail)

    def record(self, key: bytes, state: int, segment: int, offset: int, *, keep: Container[int] = ()) -> int:
        """Remember a key's last record; returns its state before, 0 for none.

        Args:
            keep: states that stay as they are.

        Raises:
            OSError: the disk is full, ….
        """
        at, tail = self._find(self._fd, self._slots, key)
        times = before = 0
        if tail is None:
            at = self._room_for(key, at)
        else:
            times, where, _ = TAIL.unpack(tail)
            before = where >> 24
        if before not in keep:
            os.pwrite(self._fd, SLOT.pack(key, times, state << 24 | segment, offset), at * SIZE)
        return before

    def see(self, key: bytes) -> Place:
        """Count one occurrence in the input; returns what was known before. Raises OSError."""
        at, tail = self._find(self._fd, self._slots, key)
        if tail is None:
            at = self._room_for(key, at)
            os.pwrite(self._fd, SLOT.pack(key, 1, 0, 0), at * SIZE)
            self._met[at >> 3] |= 1 << (at & 7)
            return NOTHING
        found = self._place(at, tail)
        if found.seen:
            _, where, offset = TAIL.unpack(tail)
            os.pwrite(self._fd, SLOT.pack(key, found.seen + 1, where, offset), at * SIZE)
        else:
            self._met[at >> 3] |= 1 << (at & 7)
        return found

    def _place(self, at: int, tail: bytes) -> Place:
        times, where, offset = TAIL.unpack(tail)
        if not self._met[at >> 3] & 1 << (at & 7):
            times = 0
        elif not times:
            times = 1
        return Place(times, where >> 24, where & 0xFFFFFF, offset)

    def _room_for(self, key: bytes, at: int) -> int:
        """The slot for a new key, which would go to ``at``; the table grows where it gets full."""
        if self._count >= self._slots * FULL:
            self._grow(self._slots * 4)
            at, _ = self._find(self._fd, self._slots, key)
        self._count += 1
        return at

    @staticmethod
    def _find(fd: int, slots: int, key: bytes) -> tuple[int, bytes | None]:
        """The slot of a key with what follows the key in it, or the empty one where it would go."""
        at = int.from_bytes(key[:8], "little") & (slots - 1)
        while True:
            several = os.pread(fd, PROBE_BYTES, at * SIZE)  # fewer at the end of the table
            first = several[:16]
            if first == key:  # so it is, mostly
                return at, several[16:SIZE]
            if first == EMPTY:
                return at, None
            for offset in range(SIZE, len(several), SIZE):
                its_key = several[offset : offset + 16]
                if its_key == key:
                    return at + offset // SIZE, several[offset + 16 : offset + SIZE]
                if its_key == EMPTY:
                    return at + offset // SIZE, None
            at = (at + len(several) // SIZE) & (slots - 1)

    def _grow(self, slots: int) -> None:
        fd = self._open(slots)
        met = bytearray(-(-slots // 8))
        try:
            for start in range(0, self._slots, 4096):
                several = os.pread(self._fd, min(4096, self._slots - start) * SIZE, start * SIZE)
                for number, slot in enumerate(SLOT.iter_unpack(several), start):
                    key = slot[0]
                    if key != EMPTY:
                        at, _ = self._find(fd, slots, key)
                        os.pwrite(fd, SLOT.pack(*slot), at * SIZE)
                        if self._met[number >> 3] & 1 << (number & 7):
                            met[at >> 3] |= 1 << (at & 7)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._slots, self._met = fd, slots, met

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
