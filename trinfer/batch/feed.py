"""From records to items: keys, shards, and what an earlier session has done already. Blocking: for a thread."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from trinfer.batch.committer import FAILED
from trinfer.data.records import content_key, numbered, shard_of
from trinfer.durable.disk import advice_for
from trinfer.errors import FileError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from trinfer.batch.items import Item, Job
    from trinfer.batch.summary import Summary
    from trinfer.data.records import Raw
    from trinfer.durable.index import Index

__all__ = ["Feed"]

BATCH_BYTES = 1 * 2**20
BATCH_RECORDS = 256


class Feed:
    """The items of one shard that are still to be done.

    Args:
        index: of what is done, and of what was met. It counts equal records.
        done: states of the index in which nothing is left to do.
        recall: adds to an item what an earlier session has got for it.
    """

    def __init__(
        self,
        records: Iterable[Raw],
        job: Job,
        index: Index,
        *,
        done: Container[int] = (),
        recall: Callable[[Item], None] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._records = iter(records)
        self._job, self._index = job, index
        self._done, self._recall = done, recall
        self._rank, self._world_size = rank, world_size
        self.seen = 0
        self.skipped = 0
        self.skipped_bytes = 0
        self.skipped_failures = 0
        self._peeked: list[Item] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """No more of the index is touched, also by a thread that still reads and that nobody waits for."""
        with self._lock:
            self._closed = True

    def tell(self, summary: Summary) -> None:
        """Pass on what was skipped since the last time."""
        summary.skipped += self.skipped
        summary.bytes_read += self.skipped_bytes
        summary.failed_before += self.skipped_failures
        self.skipped = self.skipped_bytes = self.skipped_failures = 0

    def peek(self) -> bool:
        """Whether there is any item left; reads up to the first. Raises FileError."""
        self._peeked = self._peeked or self.next_batch()
        return bool(self._peeked)

    def next_batch(self) -> list[Item]:
        """Some items; none at the end.

        Raises:
            FileError: reading failed, or the index found no room.
        """
        try:
            return self._next_batch()
        except OSError as error:
            raise FileError(f"the index of rows failed: {error.strerror}", advice=advice_for(error)) from error

    def _next_batch(self) -> list[Item]:
        if self._peeked:
            batch, self._peeked = self._peeked, []
            return batch
        batch = []
        size = 0
        for raw in self._records:
            with self._lock:
                if self._closed:
                    return []
                item = self._item(raw)
            if item is not None:
                batch.append(item)
                size += item.size
                if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
                    break
        return batch

    def _item(self, raw: Raw) -> Item | None:
        key = content_key(raw.data)
        if self._world_size > 1 and shard_of(key, self._world_size) != self._rank:
            self.skipped_bytes += raw.size
            return None
        self.seen += 1
        known = self._index.see(key)
        number = known.seen
        if number:
            key = numbered(key, number)
            known = self._index.see(key)
        if known.state in self._done:
            self.skipped += 1
            self.skipped_failures += known.state == FAILED
            self.skipped_bytes += raw.size
            return None
        item = self._job.prepare(raw, key, number)
        if self._recall is not None:
            self._recall(item)
        return item
