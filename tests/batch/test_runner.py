"""The runner with servers that are plain objects: order, bounds, failures, cancellation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from trinfer import BadRequestError, ServerError
from trinfer.batch.files import FileError
from trinfer.batch.rows import PromptOptions, Row, parse_row
from trinfer.batch.runner import Summary, run_rows


class Rows:
    def __init__(self, count: int) -> None:
        self.count, self.read_so_far = count, 0

    async def read(self, rows: trio.MemorySendChannel[Row]) -> None:
        async with rows:
            for number in range(self.count):
                self.read_so_far += 1
                await rows.send(parse_row(b'{"id": %d, "prompt": "p"}' % number, f"f:{number}", PromptOptions()))


class Lines:
    def __init__(self, fail_after: int | None = None) -> None:
        self.ids: list[int] = []
        self.fail_after = fail_after

    async def write(self, lines) -> None:
        await trio.sleep(0.01)
        if self.fail_after is not None and len(self.ids) >= self.fail_after:
            raise FileError("the disk is full")
        self.ids += [json.loads(line)["id"] for line in lines]


class Server:
    def __init__(self, latency: float = 1.0) -> None:
        self.latency, self.running, self.most, self.answered = latency, 0, 0, 0

    async def wait_ready(self) -> None:
        await trio.sleep(5)

    async def make_request(self, payload) -> dict[str, Any]:
        await self.wait_ready() if self.answered == 0 else None
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.latency)
        finally:
            self.running -= 1
        self.answered += 1
        return {"choices": [{"message": {"content": "a"}}], "usage": {"completion_tokens": 2}}


async def run(server, reader, writer, summary=None, max_concurrent=10) -> Summary:
    summary = summary or Summary(trio.current_time())
    await run_rows(server, reader, writer, max_concurrent=max_concurrent, params={"max_tokens": 3}, summary=summary)
    return summary


async def test_every_row_once_with_bounded_concurrency_and_memory(autojump_clock: trio.testing.MockClock):
    server, reader, writer = Server(), Rows(500), Lines()
    summary = await run(server, reader, writer)
    assert sorted(writer.ids) == list(range(500))
    assert server.most == 10
    assert (summary.ok, summary.failed, summary.completion_tokens, summary.in_flight) == (500, 0, 1000, 0)
    assert summary.ready_after == 5


async def test_reading_overlaps_with_the_start_and_stops_at_the_bound(autojump_clock: trio.testing.MockClock):
    server, reader = Server(), Rows(10**9)
    with trio.move_on_after(4):  # the engine is not ready yet
        await run(server, reader, Lines())
    assert 10 <= reader.read_so_far <= 25


async def test_a_failed_row_does_not_stop_the_others(autojump_clock: trio.testing.MockClock):
    class Refusing(Server):
        async def make_request(self, payload):
            await super().make_request(payload)
            if self.answered % 5 == 0:
                raise BadRequestError("refused", status=400)
            return {"choices": [{"text": "a"}]}

    writer = Lines()
    summary = await run(Refusing(), Rows(50), writer)
    assert sorted(writer.ids) == list(range(50))
    assert (summary.ok, summary.failed, summary.failures) == (40, 10, {"BadRequestError": (10, "refused")})


@pytest.mark.parametrize("when", ["start", "later"])
async def test_a_failed_engine_stops_the_run_and_keeps_what_was_answered(when, autojump_clock: trio.testing.MockClock):
    class Dying(Server):
        async def wait_ready(self):
            await super().wait_ready()
            if when == "start":
                raise ServerError("dead")

        async def make_request(self, payload):
            if self.answered > 30:
                raise ServerError("dead")
            return await super().make_request(payload)

    server, writer = Dying(), Lines()
    with pytest.raises(ServerError, match="dead"):
        await run(server, Rows(500), writer)
    assert len(writer.ids) == server.answered


async def test_a_full_disk_stops_the_run(autojump_clock: trio.testing.MockClock):
    reader = Rows(10**9)
    with pytest.raises(FileError, match="full"), trio.fail_after(100):
        await run(Server(), reader, Lines(fail_after=20))
    assert reader.read_so_far < 200


async def test_a_cancelled_run_writes_what_was_answered(autojump_clock: trio.testing.MockClock):
    server, writer = Server(), Lines()
    with trio.move_on_after(20.5) as scope:
        await run(server, Rows(10**9), writer)
    assert scope.cancelled_caught
    assert len(writer.ids) == server.answered > 50
