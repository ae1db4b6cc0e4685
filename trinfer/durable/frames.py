"""How the journal's bytes look: segments of frames, each frame one commit, each commit many records.

    segment  = head (magic, version, salt, checksum), then frames
    frame    = head (magic, salt, count, length and checksum of the bodies, checksum of head and table),
               table (kind, length, key of each record), bodies

Rules: each frame has a sync of its own, so that at most one frame of a segment can be torn, and only the last. The salt
ties frames to their segment: old blocks that a file system brings back after a crash are not taken for new ones. Heads
and tables have a checksum of their own, so that a million keys are read without the bodies.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "HEAD_BYTES",
    "KEY_BYTES",
    "LARGEST_BODY",
    "LARGEST_COUNT",
    "Corrupt",
    "Entry",
    "Frame",
    "Record",
    "encode_frame",
    "find_salt",
    "head_of",
    "new_head",
    "read_salt",
    "scan",
]

KEY_BYTES = 16
MAGIC = b"trj1"
SEGMENT = struct.Struct("<8sIII")
HEAD_BYTES = SEGMENT.size
SEGMENT_MAGIC = b"trinferJ"
VERSION = 2
HEAD = struct.Struct("<4sIIII")  # magic, salt, count, length of the bodies, checksum of the bodies
CHECK = struct.Struct("<I")  # checksum of head and table
ROW = struct.Struct("<BI16s")  # kind, length of the body, key
LARGEST_COUNT = 1 << 20  # records of a frame
LARGEST_BODY = (1 << 30) - 1  # bytes
CHUNK = 1 << 20
PIECE = 1 << 16  # bytes of a frame that are written at once


class Record(NamedTuple):
    """Something to remember: what kind, of what, and the bytes."""

    kind: int
    key: bytes
    body: bytes


class Entry(NamedTuple):
    """Where a record lies."""

    kind: int
    key: bytes
    offset: int
    length: int


class Corrupt(Exception):
    """Bytes that were on the disk have changed: at ``offset``, up to the next whole frame at ``resumes``."""

    def __init__(self, offset: int, resumes: int) -> None:
        super().__init__(f"damaged from byte {offset} to {resumes}")
        self.offset, self.resumes = offset, resumes


@dataclass(frozen=True)
class Frame:
    """One commit, as found in a segment."""

    offset: int
    end: int
    bodies: int
    length: int
    checksum: int
    table: bytes

    @property
    def count(self) -> int:
        """Records in it."""
        return len(self.table) // ROW.size

    @property
    def kinds(self) -> frozenset[int]:
        """Those of its records."""
        return frozenset(self.table[:: ROW.size])

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """Kind, length and key of each record, in the order of the bodies: for millions, where `entries` is slow."""
        return ROW.iter_unpack(self.table)

    def entries(self) -> Iterator[Entry]:
        offset = self.bodies
        for kind, length, key in ROW.iter_unpack(self.table):
            yield Entry(kind, key, offset, length)
            offset += length

    def read(self, fd: int) -> bytes:
        """The bodies, verified. Raises Corrupt, OSError."""
        data = os.pread(fd, self.length, self.bodies)
        if len(data) != self.length or zlib.crc32(data) != self.checksum:
            raise Corrupt(self.offset, self.end)
        return data


def new_head() -> tuple[bytes, int]:
    """Head of a new segment, and its salt."""
    salt = secrets.randbits(32)
    return head_of(salt), salt


def head_of(salt: int) -> bytes:
    """The head of a segment with this salt."""
    return SEGMENT.pack(SEGMENT_MAGIC, VERSION, salt, _head_check(VERSION, salt))


def _head_check(version: int, salt: int) -> int:
    return zlib.crc32(struct.pack("<8sII", SEGMENT_MAGIC, version, salt))


def read_salt(fd: int) -> int | None:
    """The salt of a segment; None where its head was never finished: it is short, or still as the disk had it.

    Raises:
        ValueError: this is no segment, or one of another version.
        Corrupt: its head is damaged. It must not be taken for an empty one.
    """
    data = os.pread(fd, SEGMENT.size, 0)
    if len(data) < SEGMENT.size:
        return None
    magic, version, salt, check = SEGMENT.unpack(data)
    if check != _head_check(version, salt):
        if magic != SEGMENT_MAGIC and find_salt(fd) is None:
            if not any(data):
                return None
            raise ValueError("it is no journal of trinfer")
        raise Corrupt(0, HEAD_BYTES)
    if version != VERSION:
        raise ValueError(f"its format is {version}; this trinfer reads {VERSION}")
    if magic != SEGMENT_MAGIC:
        raise Corrupt(0, HEAD_BYTES)
    return int(salt)


def find_salt(fd: int) -> int | None:
    """The salt of the first whole frame, for a segment whose head is damaged; None where there is none."""
    size = os.fstat(fd).st_size
    for at in _find(fd, MAGIC, 0, size):
        data = os.pread(fd, HEAD.size, at)
        if len(data) == HEAD.size:
            salt = int(HEAD.unpack(data)[1])
            if _frame_at(fd, salt, at, size) is not None:
                return salt
    return None


def encode_frame(records: Sequence[Record], salt: int) -> Iterator[bytes]:
    """One frame, in pieces: after a slow sync it has megabytes, of which no second copy is made.

    The bodies together must stay below 4 GiB, and the records must not be more than `LARGEST_COUNT`.
    """
    length = checksum = 0
    for record in records:
        length += len(record.body)
        checksum = zlib.crc32(record.body, checksum)
    pack = ROW.pack
    table = b"".join([pack(kind, len(body), key) for kind, key, body in records])
    head = HEAD.pack(MAGIC, salt, len(records), length, checksum)
    pieces = [head, CHECK.pack(zlib.crc32(table, zlib.crc32(head))), table]
    size = len(table)
    for record in records:
        pieces.append(record.body)
        size += len(record.body)
        if size >= PIECE:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


def scan(fd: int, salt: int, *, start: int = HEAD_BYTES, verify: bool) -> Iterator[Frame]:
    """Every whole frame of a segment, in order; ends at the end, or where the last frame is torn.

    Args:
        verify: check the bodies of all frames, too. Those of the last are checked in any case: a crash may leave its
            head and table, and whatever the disk held before in place of its bodies.

    Raises:
        Corrupt: a frame is damaged, and whole ones follow: that is no crash, something has changed the file.
    """
    size = os.fstat(fd).st_size
    offset = start
    frame = _frame_at(fd, salt, offset, size)
    while frame is not None:
        following = _frame_at(fd, salt, frame.end, size)
        if verify or following is None:
            try:
                frame.read(fd)
            except Corrupt:
                break
        yield frame
        offset, frame = frame.end, following
    resumes = _next_frame(fd, salt, offset + 1, size)
    if resumes is not None:
        raise Corrupt(offset, resumes)


def _frame_at(fd: int, salt: int, offset: int, size: int) -> Frame | None:
    fixed = HEAD.size + CHECK.size
    start = os.pread(fd, fixed, offset)
    if len(start) < fixed:
        return None
    magic, its_salt, count, length, checksum = HEAD.unpack_from(start)
    if magic != MAGIC or its_salt != salt or not 0 < count <= LARGEST_COUNT:
        return None
    bodies = offset + fixed + count * ROW.size
    if bodies + length > size:
        return None
    table = os.pread(fd, count * ROW.size, offset + fixed)
    if CHECK.unpack_from(start, HEAD.size)[0] != zlib.crc32(table, zlib.crc32(start[: HEAD.size])):
        return None
    return Frame(offset, bodies + length, bodies, length, checksum, table)


def _next_frame(fd: int, salt: int, offset: int, size: int) -> int | None:
    """Where the next whole frame begins; None where there is none."""
    places = _find(fd, MAGIC + struct.pack("<I", salt), offset, size)
    return next((at for at in places if _frame_at(fd, salt, at, size) is not None), None)


def _find(fd: int, mark: bytes, offset: int, size: int) -> Iterator[int]:
    """Every place of these bytes from here on."""
    while offset < size:
        chunk = os.pread(fd, CHUNK, offset)
        at = chunk.find(mark)
        while at >= 0:
            yield offset + at
            at = chunk.find(mark, at + 1)
        if len(chunk) < len(mark):
            return
        offset += len(chunk) - len(mark) + 1
