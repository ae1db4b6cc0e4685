"""A start that is cancelled at any moment leaves nothing, and only the cancellation comes out."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.engine_configs import fake_config
from trinfer import CustomServer, ServerState
from trinfer.process.identity import RUN_VARIABLE, run_id
from trinfer.process.spawn import marked_processes


@given(st.floats(0, 0.15), st.sampled_from(["never", "quick", "tree"]))
async def test_a_start_cancelled_at_a_random_moment(moment, kind):
    options = {"never": ["--never-ready"], "quick": [], "tree": ["--daemon", "--own-session", "--respawning"]}[kind]
    server = CustomServer(fake_config(*options))
    with trio.move_on_after(moment) as scope:
        async with server:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert server.state is ServerState.STOPPED
    assert marked_processes({RUN_VARIABLE: run_id()}) == []
