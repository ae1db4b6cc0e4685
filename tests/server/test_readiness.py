from __future__ import annotations

import socket

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trinfer.server.readiness import FASTEST, Pace, accepts_connections, served_models, until_ready


@given(st.floats(0.001, 60), st.lists(st.floats(0, 1e5), min_size=2))
def test_the_pace_slows_down_and_keeps_its_bounds(slowest, times):
    intervals = [Pace(slowest).interval(elapsed) for elapsed in sorted(times)]
    assert intervals == sorted(intervals)
    assert all(min(FASTEST, slowest) <= interval <= slowest for interval in intervals)


async def test_readiness_is_found_within_one_percent_of_the_load_time(autojump_clock: trio.testing.MockClock):
    for ready_at in (0.2, 1, 3, 60, 600):
        began = trio.current_time()

        async def look(ready: float = began + ready_at) -> bool:
            return trio.current_time() >= ready

        await until_ready(look, pace=Pace(5), nudge=trio.Event)
        late = trio.current_time() - began - ready_at
        assert 0 <= late <= max(0.011, ready_at * 0.0101)


async def test_output_of_the_engine_brings_the_next_look_forward(autojump_clock: trio.testing.MockClock):
    looks: list[float] = []
    sign = trio.Event()

    async def look() -> bool:
        looks.append(trio.current_time())
        return len(looks) == 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: until_ready(look, pace=_Slow(10), nudge=lambda: sign))
        await trio.sleep(3)
        sign.set()
    assert looks[1] - looks[0] == pytest.approx(3)


async def test_a_flood_of_output_does_not_make_a_flood_of_looks(autojump_clock: trio.testing.MockClock):
    looks = 0
    always = trio.Event()
    always.set()

    async def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    with trio.move_on_after(100):
        await until_ready(look, pace=_Slow(10), nudge=lambda: always)
    assert looks <= 101


class _Slow(Pace):
    """The same interval from the beginning."""

    def __init__(self, interval: float) -> None:
        super().__init__(interval)
        self._interval = interval

    def interval(self, elapsed: float) -> float:
        return self._interval


def test_a_look_at_the_address(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert not accepts_connections("127.0.0.1", port, None)  # bound, but nobody listens
        server.listen()
        assert accepts_connections("127.0.0.1", port, None)
    assert not accepts_connections("127.0.0.1", port, None)
    path = str(tmp_path / "s")
    assert not accepts_connections("localhost", 80, path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert accepts_connections("localhost", 80, path)
    assert not accepts_connections("localhost", 80, path)  # the file is there, its server is not


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"data": [{"id": "a", "root": "/models/a"}, {"id": "b"}]}', ("a", "/models/a", "b")),
        (b'{"data": []}', ()),
        (b'{"data": [1, {"id": 2}]}', ()),
        (b"[]", ()),
        (b"<html>", ()),
        (b"\xff", ()),
    ],
)
def test_names_of_the_models(body, names):
    assert served_models(body) == names
