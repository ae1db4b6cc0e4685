"""Outcomes to the disk: many in one write and one sync, while work goes on.

Rules: outcomes are committed in the order in which they come, all of them, also when the run is cancelled. The answers
of an unfinished item are committed with the next group; most items are finished by then, and their answers never are.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import trio

from trinfer.batch.calls import encode_call
from trinfer.durable.frames import Record
from trinfer.errors import TrinferError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trinfer.data.writers import OutputFile
    from trinfer.durable.journal import Journal

__all__ = [
    "CALL",
    "FAILED",
    "REMOVED",
    "ROW",
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

PACE = 0.005  # seconds from one commit to the next, so that groups form
GROUP_BYTES = 8 * 2**20  # waiting for the disk; more holds the work up
GROUP_RECORDS = 4096


def failed_body(line: bytes | None, error: Mapping[str, Any]) -> bytes:
    """What is remembered of a failure: the line of output, if there is one, and that of the errors file."""
    return json.dumps({"line": None if line is None else line.decode(), "error": error}, default=str).encode()


def read_failed(body: bytes) -> tuple[bytes | None, bytes]:
    """The line of output, or None, and that of the errors file, with their newlines."""
    value = json.loads(body)
    line = value["line"]
    return None if line is None else line.encode(), json.dumps(value["error"]).encode() + b"\n"


class Target(Protocol):
    """Where groups of records go."""

    def commit(self, records: list[Record]) -> None: ...


class JournalTarget:
    """Durable: into the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def commit(self, records: list[Record]) -> None:
        self._journal.append(records)


class StreamTarget:
    """Not durable: lines to the output, and failures to the errors file if there is one."""

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
        self._calls: dict[bytes, list[tuple[bytes, Mapping[str, Any]]]] = {}
        self._bytes = 0
        self._wake = trio.Event()
        self._room = trio.Event()
        self._closed = self._broken = False

    async def put(self, kind: int, key: bytes, body: bytes) -> None:
        """Hand over the outcome of an item; waits only where the disk is behind."""
        self._calls.pop(key, None)
        if self._broken:
            return
        self._records.append(Record(kind, key, body))
        self._bytes += len(body)
        self._wake.set()
        while (self._bytes > GROUP_BYTES or len(self._records) > GROUP_RECORDS) and not self._broken:
            await self._room.wait()

    def hold(self, key: bytes, call: bytes, response: Mapping[str, Any]) -> None:
        """Hand over an answer within an unfinished item."""
        if not self._broken:
            self._calls.setdefault(key, []).append((call, response))
            self._wake.set()

    def close(self) -> None:
        """Nothing more comes: `run` commits what is there, and returns."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Commit until closed. Shielded: what has been paid for gets to the disk."""
        with trio.CancelScope(shield=True):
            while True:
                await self._wake.wait()
                if not self._closed:
                    await trio.sleep(PACE)
                self._wake = trio.Event()
                group = self._take()
                if group:
                    try:
                        await trio.to_thread.run_sync(self._target.commit, group)
                    except TrinferError as error:
                        self._broken = True
                        self._room.set()
                        self._on_failure(error)
                        return
                if self._closed and not self._records and not self._calls:
                    return
                if self._closed:
                    self._wake.set()

    def _take(self) -> list[Record]:
        group, self._records, self._bytes = self._records, [], 0
        for key, calls in self._calls.items():
            group += [Record(CALL, key, encode_call(call, response)) for call, response in calls]
        self._calls = {}
        self._room.set()
        self._room = trio.Event()
        return group
