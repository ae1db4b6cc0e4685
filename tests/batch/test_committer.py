"""Outcomes on their way to the disk."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import trio

from trinfer.batch.committer import CALL, ROW, VOID, Committer

if TYPE_CHECKING:
    from trinfer.durable.frames import Record


class Remembering:
    """Keeps what is told of the records, and none of them."""

    keeps_calls = True

    def __init__(self) -> None:
        self.groups: list[list[tuple[int, bytes]]] = []

    def commit(self, records: list[Record]) -> None:
        self.groups.append([(record.kind, record.key) for record in records])


async def test_what_was_committed_is_forgotten_before_more_comes():
    target = Remembering()
    committer = Committer(target, lambda error: None)
    row, call = b"row" * 1000, b"call" * 1000
    before = sys.getrefcount(row), sys.getrefcount(call)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        committer.hold(b"a" * 16, call)
        committer.put(VOID, b"a" * 16, b"code")
        committer.put(ROW, b"b" * 16, row)
        with trio.move_on_after(2):
            while (sys.getrefcount(row), sys.getrefcount(call)) != before:
                await trio.sleep(0.001)
        committer.close()
        assert target.groups == [[(CALL, b"a" * 16), (VOID, b"a" * 16), (ROW, b"b" * 16)]]
        assert (sys.getrefcount(row), sys.getrefcount(call)) == before
