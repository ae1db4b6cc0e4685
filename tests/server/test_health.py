"""The watch over an engine that serves, with time told by a clock of the test's own: how soon it knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from trinfer import ConnectionLost, InferenceConfig, ServerError
from trinfer.server.health import HealthWatch

STALL = 300.0


class Engine:
    """What a watch sees of an engine."""

    def __init__(self, *, answers_until: float, counts_until: float, metrics: str) -> None:
        self.answers_until, self.counts_until, self.metrics = answers_until, counts_until, metrics
        self.processes: tuple[Any, ...] = ()
        self.failure: ServerError | None = None
        self.failed_at = 0.0
        self.gets: list[float] = []
        self.told = 0.0  # up to when a page that hangs has told of progress

    def received(self) -> int:
        return int(min(trio.current_time() - self.began, self.answers_until) * 3)

    async def get(self, path: str, timeout: float) -> tuple[int, bytes]:
        assert path == "/metrics"
        now = trio.current_time() - self.began
        self.gets.append(now)
        if self.metrics == "hang" and now > self.counts_until:
            await trio.sleep(timeout)
            raise ConnectionLost("nothing came")
        self.told = min(now, self.counts_until)
        return 200, b"vllm:generation_tokens_total %d\n" % (min(now, self.counts_until) * 100)

    def fail(self, failure: ServerError) -> None:
        self.failure, self.failed_at = failure, trio.current_time() - self.began

    async def watch(self) -> None:
        self.began = trio.current_time()
        watch = HealthWatch(
            "vllm:0",
            InferenceConfig("vllm", "m", stall_timeout=STALL),
            self,
            SimpleNamespace(get=self.get, api=None),
            in_flight=lambda: 8,
            awaited=lambda: 8,
            received=self.received,
            refused=lambda: 0,
        )
        watch._has_counters = True
        await watch.run()


@pytest.mark.parametrize("metrics", ["stand still", "hang"])
@pytest.mark.parametrize(
    ("answers_until", "counts_until"), [(100.3, 100.3), (17.77, 99.99), (0.0, 60.01), (50.5, 0.0), (0.1, 101.49)]
)
async def test_a_wedge_is_known_within_five_seconds_of_its_time(
    metrics, answers_until, counts_until, autojump_clock: trio.testing.MockClock
):
    engine = Engine(answers_until=answers_until, counts_until=counts_until, metrics=metrics)
    await engine.watch()
    assert engine.failure is not None
    assert "is wedged" in engine.failure.message
    assert max(answers_until, engine.told) + STALL <= engine.failed_at + 1 / 3
    assert engine.failed_at <= max(answers_until, counts_until) + STALL + 5


async def test_an_engine_that_answers_is_not_asked_for_its_counters(autojump_clock: trio.testing.MockClock):
    engine = Engine(answers_until=3600.0, counts_until=0.0, metrics="hang")
    with trio.move_on_after(1000):
        await engine.watch()
    assert engine.failure is None
    assert engine.gets == []
