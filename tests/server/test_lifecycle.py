"""States, readiness and failure, without any process."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trinfer import ServerError, ServerState
from trinfer.server.lifecycle import ALLOWED, Lifecycle, Transition


async def test_every_edge_that_is_not_allowed_is_refused():
    paths = {
        ServerState.STOPPED: [],
        ServerState.STARTING: ["start"],
        ServerState.READY: ["start", "ready"],
        ServerState.FAILED: ["start", "fail"],
    }
    moves = {ServerState.STARTING: "start", ServerState.READY: "ready", ServerState.FAILED: "fail"}

    def do(lifecycle: Lifecycle, move: str) -> None:
        lifecycle.fail(ServerError("it broke")) if move == "fail" else getattr(lifecycle, move)()

    for state, path in paths.items():
        for target, move in moves.items():
            lifecycle = Lifecycle("test")
            for step in path:
                do(lifecycle, step)
            assert lifecycle.state is state
            if target in ALLOWED[state]:
                do(lifecycle, move)
                assert lifecycle.state is target
            else:
                with pytest.raises(AssertionError, match="no way from"):
                    do(lifecycle, move)


async def test_every_waiter_gets_an_error_of_its_own_with_the_same_cause():
    lifecycle = Lifecycle("test")
    lifecycle.start()
    errors: list[ServerError] = []

    async def wait() -> None:
        with pytest.raises(ServerError) as caught:
            await lifecycle.wait_ready()
        errors.append(caught.value)

    cause = OSError("no such engine")
    failure = ServerError("it broke", advice="mend it", log_tail=["last words"], returncode=3)
    failure.__cause__ = cause
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        lifecycle.fail(failure)
    await wait()  # and so does one that comes late
    assert len({id(error) for error in errors}) == 4
    for error in errors:
        assert str(error) == str(failure)
        assert (error.returncode, error.log_tail, error.__cause__) == (3, ("last words",), cause)


async def test_waiters_go_from_one_attempt_to_the_next(autojump_clock: trio.testing.MockClock):
    lifecycle = Lifecycle("test")
    lifecycle.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lifecycle.wait_ready)
        await trio.sleep(1)
        lifecycle.retry()
        await trio.sleep(1)
        lifecycle.retry()
        await trio.sleep(1)
        lifecycle.ready()


async def test_stopping_wakes_waiters():
    lifecycle = Lifecycle("test")
    lifecycle.start()
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(ServerError, match="has been stopped"):
                await lifecycle.wait_ready()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        lifecycle.stop("left")
        lifecycle.stop("left again")
    assert lifecycle.is_down


async def test_before_the_start_the_error_says_how_to_start():
    with pytest.raises(ServerError, match="has not been started"):
        await Lifecycle("test").wait_ready()


async def test_observers_see_every_transition_and_the_failure_is_kept():
    lifecycle = Lifecycle("test")
    seen: list[Transition] = []
    lifecycle.observers.append(seen.append)
    lifecycle.start()
    lifecycle.ready()
    lifecycle.fail(ServerError("it broke"))
    lifecycle.stop("left")
    assert [(t.before, t.after) for t in seen] == [
        (ServerState.STOPPED, ServerState.STARTING),
        (ServerState.STARTING, ServerState.READY),
        (ServerState.READY, ServerState.FAILED),
        (ServerState.FAILED, ServerState.STOPPED),
    ]
    assert seen[2].reason == "it broke"
    assert lifecycle.failure is not None
    lifecycle.start()  # a second life
    assert lifecycle.failure is None
    assert not lifecycle.is_down


async def test_an_observer_that_raises_harms_nobody(caplog):
    lifecycle = Lifecycle("test")
    seen: list[Transition] = []

    def fail(transition: Transition) -> None:
        raise ValueError("watching went wrong")

    lifecycle.observers.extend([fail, seen.append])
    lifecycle.start()
    lifecycle.ready()
    lifecycle.stop("left")
    assert len(seen) == 3
    assert caplog.text.count("an observer of its states has failed") == 3


async def test_an_observer_may_begin_a_drain_and_the_others_hear_of_it_in_order():
    lifecycle = Lifecycle("test")
    seen: list[ServerState] = []

    def drain(transition: Transition) -> None:
        if transition.after is ServerState.READY:
            lifecycle.drain("enough")

    lifecycle.observers.extend([drain, lambda transition: seen.append(transition.after)])
    lifecycle.start()
    lifecycle.ready()
    assert lifecycle.state is ServerState.DRAINING
    assert seen == [ServerState.STARTING, ServerState.READY, ServerState.DRAINING]


async def test_observers_of_a_second_life_see_nothing_of_the_first():
    lifecycle = Lifecycle("test")
    lifecycle.start()
    lifecycle.fail(ServerError("it broke"))
    lifecycle.stop("left")
    seen: list[tuple[object, bool]] = []
    lifecycle.observers.append(lambda _: seen.append((lifecycle.failure, lifecycle.is_down)))
    lifecycle.start()
    assert seen == [(None, False)]
