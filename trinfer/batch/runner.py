"""Reader, workers, writer: one generation per row, many at a time, in bounded memory.

Rules: a row that fails is an output row like any other; only a failed engine or file stops the run. What has been
answered is written, also when the run is stopped or cancelled; stopping lets the requests under way be answered.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import trio

from trinfer.batch.rows import Row, encode, failed, finished
from trinfer.errors import InferenceError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Generator", "Progress", "RowReader", "RowWriter", "Summary", "run_rows"]

WRITE_BATCH = 512  # rows


class Generator(Protocol):
    """What the batch needs of a server, or of many."""

    async def wait_ready(self) -> None: ...
    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]: ...


class RowReader(Protocol):
    """Where rows come from."""

    async def read(self, rows: trio.MemorySendChannel[Row]) -> None: ...


class RowWriter(Protocol):
    """Where lines go to."""

    async def write(self, lines: Sequence[bytes]) -> None: ...


class Progress(Protocol):
    """Who wants to see how far the run is."""

    def update(self, summary: Summary) -> None: ...


@dataclass
class Summary:
    """How far a run is, and in the end what it was.

    Attributes:
        ok, failed: rows.
        bytes_read: of the input, by rows that are done.
        prompt_tokens, completion_tokens: as the server counted them.
        in_flight: requests under way.
        finish_reasons: how often each occurred.
        failures: per type of error, how often, and the message of the first.
        ready_after: seconds from the start of the run until the engine was ready; None before.
        began: seconds of trio's clock.
        engine: what the engine is doing, in a word or two.
        is_complete: every row of the input has its outcome.
    """

    began: float = 0.0
    ready_after: float | None = None
    ok: int = 0
    failed: int = 0
    bytes_read: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    engine: str = "starting"
    is_complete: bool = False
    finish_reasons: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return self.ok + self.failed

    def add_result(self, row: Row, result: InferenceResult) -> None:
        self.ok += 1
        self.bytes_read += row.size
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.finish_reasons[result.finish_reason or "none"] += 1

    def add_failure(self, row: Row, error: TrinferError) -> None:
        self.failed += 1
        self.bytes_read += row.size
        kind = type(error).__name__
        count, first = self.failures.get(kind, (0, error.message))
        self.failures[kind] = (count + 1, first)


async def run_rows(
    server: Generator,
    reader: RowReader,
    writer: RowWriter,
    *,
    max_concurrent: int,
    params: Mapping[str, Any],
    summary: Summary,
    progress: Progress | None = None,
    stop: trio.Event | None = None,
) -> None:
    """Send every row's request, and write every row's outcome, in the order in which they are done.

    Args:
        max_concurrent: requests under way at once, >= 1.
        params: generation parameters of every request.
        summary: filled as the run goes on.
        stop: when it is set, no more rows are begun, and those under way are finished.

    Raises:
        ServerError: the engine failed. TrinferError of the reader or writer: a file failed.

    Cancelled: requests under way are dropped; what was answered is written.
    """
    run = _Run(server, writer, params, summary, progress, trio.Event() if stop is None else stop)
    await run.all(reader, max_concurrent)


class _Run:
    def __init__(
        self,
        server: Generator,
        writer: RowWriter,
        params: Mapping[str, Any],
        summary: Summary,
        progress: Progress | None,
        stop: trio.Event,
    ) -> None:
        self._server, self._writer, self._params = server, writer, params
        self._summary, self._progress = summary, progress
        self._stopping = stop
        self._failure: TrinferError | None = None
        self._scope = trio.CancelScope()

    def _stop(self, failure: TrinferError) -> None:
        """The first failure stops the run; those that follow from it are not told."""
        if self._failure is None:
            self._failure = failure
        self._scope.cancel()

    async def all(self, reader: RowReader, max_concurrent: int) -> None:
        # As many rows wait as are under way: enough to keep every worker busy, and no more memory than that.
        send_rows, rows = trio.open_memory_channel[Row](max_concurrent)
        send_lines, lines = trio.open_memory_channel[bytes](max_concurrent)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, lines)
            async with send_lines:
                with self._scope:
                    async with trio.open_nursery() as work, rows:
                        work.start_soon(self._await_engine)
                        for _ in range(max_concurrent):
                            work.start_soon(self._work, rows.clone(), send_lines)
                        await self._read(reader, send_rows)
        if self._failure is not None:
            raise self._failure

    async def _read(self, reader: RowReader, rows: trio.MemorySendChannel[Row]) -> None:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self._stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            try:
                await reader.read(rows)
            except TrinferError as error:
                self._stop(error)
            else:
                self._summary.is_complete = True
            nursery.cancel_scope.cancel()

    async def _await_engine(self) -> None:
        """Only to know when it was ready; rows are read and requests prepared meanwhile."""
        try:
            await self._server.wait_ready()
        except TrinferError as error:
            self._stop(error)
        else:
            self._summary.ready_after = trio.current_time() - self._summary.began

    async def _work(self, rows: trio.MemoryReceiveChannel[Row], lines: trio.MemorySendChannel[bytes]) -> None:
        summary = self._summary
        async with rows:
            async for row in rows:
                if self._stopping.is_set():
                    summary.is_complete = False
                    return
                try:
                    output = await self._generate(row)
                except TrinferError as error:
                    self._stop(error)
                    return
                # Shielded: what has been paid for gets to the writer, which is there until the channel closes.
                with trio.CancelScope(shield=True):
                    await lines.send(encode(output))
                if self._progress is not None:
                    self._progress.update(summary)

    async def _generate(self, row: Row) -> dict[str, Any]:
        """The output row; raises what concerns more than this row."""
        summary = self._summary
        if row.payload is None:
            assert row.error is not None
            summary.add_failure(row, row.error)
            return failed(row, row.error)
        summary.in_flight += 1
        try:
            result = InferenceResult.from_response(await self._server.make_request({**self._params, **row.payload}))
        except InferenceError as error:
            summary.add_failure(row, error)
            return failed(row, error)
        finally:
            summary.in_flight -= 1
        summary.add_result(row, result)
        return finished(row, result)

    async def _write(self, lines: trio.MemoryReceiveChannel[bytes]) -> None:
        """Write until the last worker has gone; shielded, so that a cancelled run keeps what it has."""
        with trio.CancelScope(shield=True):
            async with lines:
                async for line in lines:
                    batch = [line]
                    while len(batch) < WRITE_BATCH:
                        try:
                            batch.append(lines.receive_nowait())
                        except (trio.WouldBlock, trio.EndOfChannel):
                            break
                    try:
                        await self._writer.write(batch)
                    except TrinferError as error:
                        self._stop(error)
                        return
