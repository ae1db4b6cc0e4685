"""How the journal's bytes look: segments of frames, each frame one commit, each commit many records.

    segment  = head of 16 bytes (magic, version, salt), then frames
    frame    = head (magic, salt, count, length and checksum of the bodies, checksum of head and table),
               table (kind, length, key of each record), bodies

Rules: a frame is written by one write and one sync, so that at most one frame of a segment can be torn, and only the
last. The salt ties frames to their segment: old blocks that a file system brings back after a crash are not taken for
new ones. Heads and tables have a checksum of their own, so that a million keys are read without the bodies.
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
    "Corrupt",
    "Entry",
    "Frame",
    "Record",
    "encode_frame",
    "new_head",
    "read_salt",
    "scan",
]

KEY_BYTES = 16
MAGIC = b"trj1"
SEGMENT = struct.Struct("<8sII")
HEAD_BYTES = SEGMENT.size
SEGMENT_MAGIC = b"trinferJ"
VERSION = 1
HEAD = struct.Struct("<4sIIII")  # magic, salt, count, length of the bodies, checksum of the bodies
CHECK = struct.Struct("<I")  # checksum of head and table
ROW = struct.Struct("<BI16s")  # kind, length of the body, key
LARGEST_COUNT = 1 << 20
CHUNK = 1 << 20


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
    return SEGMENT.pack(SEGMENT_MAGIC, VERSION, salt), salt


def read_salt(fd: int) -> int | None:
    """The salt of a segment; None where its head was never finished.

    Raises:
        ValueError: this is no segment, or one of a later version.
    """
    data = os.pread(fd, SEGMENT.size, 0)
    if len(data) < SEGMENT.size:
        return None
    magic, version, salt = SEGMENT.unpack(data)
    if magic != SEGMENT_MAGIC:
        raise ValueError("it is no journal of trinfer")
    if version != VERSION:
        raise ValueError(f"its format is {version}; this trinfer reads {VERSION}")
    return int(salt)


def encode_frame(records: Sequence[Record], salt: int) -> bytes:
    """One frame. The bodies together must stay below 4 GiB."""
    bodies = b"".join([record.body for record in records])
    pack = ROW.pack
    table = b"".join([pack(kind, len(body), key) for kind, key, body in records])
    head = HEAD.pack(MAGIC, salt, len(records), len(bodies), zlib.crc32(bodies))
    return b"".join((head, CHECK.pack(zlib.crc32(table, zlib.crc32(head))), table, bodies))


def scan(fd: int, salt: int, *, start: int = HEAD_BYTES, verify: bool) -> Iterator[Frame]:
    """Every whole frame of a segment, in order; ends at the end, or where the last frame is torn.

    Args:
        verify: check the bodies, too. A torn frame may have its head and lack bytes of its bodies.

    Raises:
        Corrupt: a frame is damaged, and whole ones follow: that is no crash, something has changed the file.
    """
    size = os.fstat(fd).st_size
    offset = start
    while offset < size:
        frame = _frame_at(fd, salt, offset, size)
        if frame is not None and verify:
            try:
                frame.read(fd)
            except Corrupt:
                frame = None
        if frame is None:
            resumes = _next_frame(fd, salt, offset + 1, size)
            if resumes is not None:
                raise Corrupt(offset, resumes)
            return
        yield frame
        offset = frame.end


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
    mark = MAGIC + struct.pack("<I", salt)
    while offset < size:
        chunk = os.pread(fd, CHUNK, offset)
        at = chunk.find(mark)
        while at >= 0:
            if _frame_at(fd, salt, offset + at, size) is not None:
                return offset + at
            at = chunk.find(mark, at + 1)
        if len(chunk) < len(mark):
            return None
        offset += len(chunk) - len(mark) + 1
    return None
