"""How workers wait: for items, and for their turn to send.

Both do what trio's memory channel and capacity limiter do, without a turn of the scheduler where there is nothing to
wait for: every request has some of its own. Whoever loops over these has to yield elsewhere.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Collection

    from trinfer.batch.items import Item

__all__ = ["Handover", "Turns"]


class Handover:
    """Items on their way from one reader to many workers, a batch at a time.

    Args:
        room: so many items may wait before the reader has to.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._items: deque[Item] = deque()
        self._workers = trio.lowlevel.ParkingLot()
        self._reader = trio.lowlevel.ParkingLot()
        self._closed = False

    async def give(self, batch: Collection[Item]) -> None:
        """Hand over a batch, once there is room. Cancelled: none of it."""
        while len(self._items) >= self._room:
            await self._reader.park()
        self._items.extend(batch)
        self._workers.unpark(count=len(batch))

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._workers.unpark_all()

    async def take(self) -> Item | None:
        """The next item; None when there is none and nothing more comes. Cancelled: takes none."""
        while (item := self.take_now()) is None and not self._closed:
            await self._workers.park()
        return item

    def take_now(self) -> Item | None:
        """The next item if one waits."""
        if not self._items:
            return None
        item = self._items.popleft()
        if len(self._items) < self._room:
            self._reader.unpark()
        return item


class Turns:
    """So many at once, first come, first served."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting = trio.lowlevel.ParkingLot()

    def take_now(self) -> bool:
        """Take a turn if one is free; it has to be given back."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """Wait for a turn, where none was free; it has to be given back. Cancelled: takes none."""
        await self._waiting.park()  # whoever gives a turn back hands it over

    def give_back(self) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._free += 1
