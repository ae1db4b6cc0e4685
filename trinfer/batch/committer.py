"""Outcomes to the disk: many with one sync, while work goes on.

Rules: outcomes are committed in the order in which they come, all of them, also when the run is cancelled. The answers
of an unfinished item are committed with the next group; most items are finished by then, and their answers never are.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, Protocol

import trio

from trinfer.durable.frames import Record
from trinfer.errors import TrinferError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trinfer.batch.calls import Call
    from trinfer.data.writers import OutputFile
    from trinfer.durable.journal import Journal

__all__ = [
    "CALL",
    "FAILED",
    "REMOVED",
    "ROW",
    "VOID",
    "Committer",
    "JournalTarget",
    "StreamTarget",
    "failed_body",
    "read_failed",
]

# Kinds of records, in the journal for good: their numbers never change.
ROW = 1  # a line of output
REMOVED = 2  # nothing to put out
FAILED = 3  # see `failed_body`
CALL = 4  # see `trinfer.batch.calls`
VOID = 5  # the answers so far have made the code fail that the body names; they count for another code only

# Seconds from one commit to the next, so that groups form: more where many outcomes come, since each trip to the
# thread and the disk takes time from all of them.
PACE, SLOWEST_PACE = 0.002, 0.01
LARGE_GROUP, SMALL_GROUP = 8, 4  # records, above which the pace slows down, and below which it quickens
GROUP_BYTES = 2 * 2**20  # waiting for the disk; more holds the work up, and less memory is taken
GROUP_RECORDS = 2048


def failed_body(line: bytes | None, error: Mapping[str, Any]) -> bytes:
    """What is remembered of a failure: the line of output, if there is one, and that of the errors file."""
    return json.dumps({"line": None if line is None else line.decode(), "error": error}, default=str).encode()


def read_failed(body: bytes) -> tuple[bytes | None, bytes]:
    """The line of output, or None, and that of the errors file, with their newlines."""
    value = json.loads(body)
    line = value["line"]
    return None if line is None else line.encode(), json.dumps(value["error"]).encode() + b"\n"


class Target(Protocol):
    """Where groups of records go.

    Attributes:
        keeps_calls: whether answers of unfinished items are of any use to it.
    """

    @property
    def keeps_calls(self) -> bool: ...

    def commit(self, records: list[Record]) -> None: ...


class JournalTarget:
    """Durable: into the journal."""

    keeps_calls = True

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def commit(self, records: list[Record]) -> None:
        self._journal.append(records)


class StreamTarget:
    """Not durable: lines to the output, and failures to the errors file if there is one."""

    keeps_calls = False

    def __init__(self, output: OutputFile, errors: OutputFile | None = None) -> None:
        self._output, self._errors = output, errors

    def commit(self, records: list[Record]) -> None:
        lines: list[bytes] = []
        failures: list[bytes] = []
        for record in records:
            if record.kind == ROW:
                lines.append(record.body)
            elif record.kind == FAILED:
                line, error = read_failed(record.body)
                failures.append(error)
                if line is not None:
                    lines.append(line)
        self._output.write(b"".join(lines))
        self._output.flush()
        if self._errors is not None and failures:
            self._errors.write(b"".join(failures))


class Committer:
    """Collects records, and commits them in a thread.

    Args:
        on_failure: told when the disk has failed; nothing is committed any more.
    """

    def __init__(self, target: Target, on_failure: Callable[[TrinferError], None]) -> None:
        self._target, self._on_failure = target, on_failure
        self._records: list[Record] = []
        self._calls: dict[bytes, list[bytes | Call]] = {}
        self._bytes = 0
        self._wake = trio.Event()
        self._room = trio.Event()
        self._closed = self._broken = False
        # A thread of its own: rollouts may have all of trio's at work, for as long as they like.
        self._thread = trio.CapacityLimiter(1)

    def put(self, kind: int, key: bytes, body: bytes) -> None:
        """Hand over the outcome of an item. Whoever does waits for `room` afterwards, where the disk is behind."""
        if kind in {ROW, REMOVED}:
            self._calls.pop(key, None)  # nobody will ask again
        if self._broken:
            return
        self._records.append(Record(kind, key, body))
        self._bytes += len(body)
        self._wake.set()

    @property
    def is_behind(self) -> bool:
        """Whether more waits for the disk than should."""
        return (self._bytes > GROUP_BYTES or len(self._records) > GROUP_RECORDS) and not self._broken

    async def room(self) -> None:
        """Wait until the disk has caught up. Cancelled: what was put is committed all the same."""
        while self.is_behind:
            await self._room.wait()

    def hold(self, key: bytes, body: bytes | Call) -> None:
        """Hand over an answer within an unfinished item; see `trinfer.batch.calls`."""
        if not self._broken:
            self._calls.setdefault(key, []).append(body)
            self._wake.set()

    def close(self) -> None:
        """Nothing more comes: `run` commits what is there, and returns."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Commit until closed. Shielded: what has been paid for gets to the disk."""
        pace = PACE
        with trio.CancelScope(shield=True):
            while True:
                await self._wake.wait()
                if not self._closed:
                    await trio.sleep(pace)
                self._wake = trio.Event()
                group = self._take()
                if len(group) > LARGE_GROUP:
                    pace = min(SLOWEST_PACE, 1.5 * pace)
                elif len(group) < SMALL_GROUP:
                    pace = max(PACE, pace / 1.5)
                if group:
                    try:
                        await trio.to_thread.run_sync(self._target.commit, group, limiter=self._thread)
                    except TrinferError as error:
                        self._broken = True
                        self._room.set()
                        self._on_failure(error)
                        return
                del group  # or it would be kept while the next one grows
                if self._closed and not self._records and not self._calls:
                    return
                if self._closed:
                    self._wake.set()

    def _take(self) -> list[Record]:
        group: list[Record] = []
        for key, calls in self._calls.items():
            for call in calls:
                # What a server of the user's own has given may be no JSON: it is not kept.
                with contextlib.suppress(TypeError, ValueError, RecursionError):
                    group.append(Record(CALL, key, call if isinstance(call, bytes) else call.body()))
        group += self._records  # after the answers that they may be about
        self._calls, self._records, self._bytes = {}, [], 0
        self._room.set()
        self._room = trio.Event()
        return group
