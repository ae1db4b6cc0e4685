"""A thousand requests to an engine that is killed all the time, whole or in part."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from contextlib import suppress

import trio

from tests.engine_configs import fake_config, text_of
from trinfer import CustomServer, ServerState

REQUESTS = 1000
AT_ONCE = 16
PERIOD = 2.0  # seconds between two kills
WORDS = 100  # at most; a word takes the engine 5 ms


async def test_every_request_is_answered_once_while_the_engine_and_its_descendants_are_killed():
    dice = random.Random(4)
    config = fake_config(
        *("--children", "3", "--needs-children", "--own-session", "--token-latency", "0.005"),
        max_restarts=10_000,
        max_replays=1000,
        restart_backoff_sec=0.0,
        stall_timeout=1.0,  # above the longest generation, half a second
        shutdown_grace_sec=0.5,
        request_timeout=300.0,
    )
    answers: Counter[tuple[int, str]] = Counter()
    kills: Counter[str] = Counter()
    todo = iter(range(REQUESTS))
    async with CustomServer(config) as server:

        async def ask() -> None:
            for number in todo:
                text = " ".join([f"request-{number}", *("w" for _ in range(dice.randrange(WORDS)))])
                answer = await server.make_request({"messages": [{"role": "user", "content": text}]})
                assert text_of(answer) == f"echo: {text}"
                answers[number, text] += 1

        async def kill() -> None:
            while True:
                await trio.sleep(PERIOD)
                attempt = server._supervisor.attempt
                if attempt is None or not attempt.processes:
                    kills["nothing to kill"] += 1
                    continue
                guarded = attempt.processes[0]
                tree = guarded.tree()
                victim = guarded.engine_pid if dice.random() < 0.5 else dice.choice(tree or [guarded.engine_pid])
                kills["engine" if victim == guarded.engine_pid else "descendant"] += 1
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)

        async with trio.open_nursery() as killing:
            killing.start_soon(kill)
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(ask)
            killing.cancel_scope.cancel()
        assert len(answers) == REQUESTS
        assert set(answers.values()) == {1}
        assert kills["engine"] + kills["descendant"] >= 5, kills
        assert server.restarts >= 5
        assert server.state is ServerState.READY
