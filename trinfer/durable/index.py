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

SLOT = struct.Struct("<16sIIQ")  # key, times seen, segment and state, offset and length
SIZE = SLOT.size
PROBE = 8  # slots read at once; a probe rarely needs more
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

    def get(self, key: bytes) -> Place | None:
        """What is known of a key; None for nothing."""
        _, found = self._find(self._fd, self._slots, key)
        return found

    def record(self, key: bytes, state: int, segment: int, offset: int, *, keep: Container[int] = ()) -> int:
        """Remember a key's last record; returns its state before, 0 for none.

        Args:
            keep: states that stay as they are.

        Raises:
            OSError: the disk is full, ….
        """
        at, found = self._slot(key)
        if found.state not in keep:
            self._put(at, key, found.seen, state, segment, offset)
        return found.state

    def see(self, key: bytes) -> Place:
        """Count one occurrence in the input; returns what was known before. Raises OSError."""
        at, found = self._slot(key)
        self._put(at, key, found.seen + 1, found.state, found.segment, found.offset)
        return found

    def _slot(self, key: bytes) -> tuple[int, Place]:
        """Where a key is or shall be; there is room for it."""
        at, found = self._find(self._fd, self._slots, key)
        if found is not None:
            return at, found
        if self._count >= self._slots * FULL:
            self._grow()
            at, _ = self._find(self._fd, self._slots, key)
        self._count += 1
        return at, NOTHING

    def _put(self, at: int, key: bytes, seen: int, state: int, segment: int, offset: int) -> None:
        os.pwrite(self._fd, SLOT.pack(key, seen, state << 24 | segment, offset), at * SIZE)

    @staticmethod
    def _find(fd: int, slots: int, key: bytes) -> tuple[int, Place | None]:
        """The slot of a key, or the empty one where it would go."""
        at = int.from_bytes(key[:8], "little") & (slots - 1)
        while True:
            several = os.pread(fd, min(PROBE, slots - at) * SIZE, at * SIZE)
            for offset in range(0, len(several), SIZE):
                its_key = several[offset : offset + 16]
                if its_key == key:
                    _, seen, where, position = SLOT.unpack_from(several, offset)
                    return at + offset // SIZE, Place(seen, where >> 24, where & 0xFFFFFF, position)
                if its_key == EMPTY:
                    return at + offset // SIZE, None
            at = (at + len(several) // SIZE) & (slots - 1)

    def _grow(self) -> None:
        slots = self._slots * 4
        fd = self._open(slots)
        try:
            for start in range(0, self._slots, 4096):
                for slot in SLOT.iter_unpack(os.pread(self._fd, min(4096, self._slots - start) * SIZE, start * SIZE)):
                    key = slot[0]
                    if key != EMPTY:
                        at, _ = self._find(fd, slots, key)
                        os.pwrite(fd, SLOT.pack(*slot), at * SIZE)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._slots = fd, slots

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
