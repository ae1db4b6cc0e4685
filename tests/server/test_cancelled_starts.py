"""A start that is cancelled at any moment leaves nothing, and only the cancellation comes out."""

from __future__ import annotations

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine_configs import fake_config
from trinfer import CustomServer, ServerState
from trinfer.process.identity import RUN_VARIABLE, run_id
from trinfer.process.spawn import marked_processes

AT_ONCE = 4
START = st.tuples(st.floats(0, 0.15), st.sampled_from(["never", "quick", "tree"]))


@settings(max_examples=settings.default.max_examples // AT_ONCE)
@given(st.lists(START, min_size=AT_ONCE, max_size=AT_ONCE))
async def test_starts_cancelled_at_random_moments(starts):
    async def start(moment, kind):
        options = {"never": ["--never-ready"], "quick": [], "tree": ["--daemon", "--own-session", "--respawning"]}[kind]
        server = CustomServer(fake_config(*options))
        with trio.move_on_after(moment) as scope:
            async with server:
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert server.state is ServerState.STOPPED

    async with trio.open_nursery() as nursery:
        for moment, kind in starts:
            nursery.start_soon(start, moment, kind)
    assert marked_processes({RUN_VARIABLE: run_id()}) == []
