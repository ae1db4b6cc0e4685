"""Engines that crash, hang or choke, with real processes: what callers see, and what is done about it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.engine_configs import CHAT, fake_config, text_of
from trinfer import (
    CustomServer,
    InferenceConfig,
    InferenceError,
    RequestError,
    RequestTimeout,
    ServerError,
    ServerState,
    StreamInterrupted,
)
from trinfer.process.identity import RUN_VARIABLE, run_id
from trinfer.process.spawn import marked_processes

if TYPE_CHECKING:
    from pathlib import Path

PATIENT = {"max_restarts": 3, "restart_backoff_sec": 0.05}


def ask(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def engine_pid(server: CustomServer) -> int:
    attempt = server._supervisor.attempt
    assert attempt is not None
    return attempt.processes[0].engine_pid


async def gather(server: CustomServer, count: int) -> dict[str, object]:
    outcomes: dict[str, object] = {}

    async def one(name: str) -> None:
        try:
            outcomes[name] = text_of(await server.make_request(ask(name)))
        except (ServerError, RequestError) as error:
            outcomes[name] = error

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, f"request-{number}")
    return outcomes


async def test_callers_of_an_engine_that_is_killed_see_a_slow_request():
    async with CustomServer(fake_config("--latency", "0.3", **PATIENT)) as server:
        await server.wait_ready()
        seen: list[ServerState] = []
        server.lifecycle.observers.append(lambda transition: seen.append(transition.after))
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(0.1)
                os.kill(engine_pid(server), signal.SIGKILL)

            nursery.start_soon(kill)
            outcomes = await gather(server, 20)
        assert outcomes == {f"request-{n}": f"echo: request-{n}" for n in range(20)}
        assert seen == [ServerState.RESTARTING, ServerState.READY]
        assert server.restarts == 1
        [crash] = server.crash_reports
        assert (crash.attempt, crash.phase, crash.returncode, crash.signal) == (1, "serving", -9, "SIGKILL")
        assert crash.diagnosis is not None
        assert crash.diagnosis.name == "killed"
        assert 0.05 < crash.uptime < 20


@pytest.mark.parametrize(
    ("pattern", "told"), [("|/usr/lib/collect %p\n", "|/usr/lib/collect %p"), ("/cores/core.%p\n", "")]
)
async def test_a_report_tells_where_the_core_is(tmp_path, monkeypatch, pattern, told):
    (tmp_path / "core_pattern").write_text(pattern)
    monkeypatch.setattr("trinfer.server.reports.CORE_PATTERN", tmp_path / "core_pattern")
    # A pipe gets a core whatever the limit says, a file does not.
    monkeypatch.setattr("trinfer.server.reports.resource.getrlimit", lambda _: (0, 0))
    config = fake_config("--crash-at", "ready:0", "--signal", "SIGSEGV", max_restarts=0)
    async with CustomServer(config) as server:
        with pytest.raises(ServerError):
            await server.make_request(CHAT)
        [crash] = server.crash_reports
        assert (crash.signal, crash.core) == ("SIGSEGV", told)


async def test_the_budget_holds_and_the_error_tells_the_history():
    config = fake_config("--crash-at", "request:1", max_restarts=2, restart_backoff_sec=0.0, max_replays=99)
    async with CustomServer(config) as server:
        with pytest.raises(ServerError, match="not started again: 2 restarts within 600 s") as caught:
            await server.make_request(CHAT)
        assert len(caught.value.history) == 3
        assert server.state is ServerState.FAILED
        assert len(server.crash_reports) == 3


async def test_restarts_fall_out_of_the_window():
    config = fake_config(max_restarts=1, restart_window=0.5, restart_backoff_sec=0.0)
    async with CustomServer(config) as server:
        for number in range(3):
            await server.wait_ready()
            await trio.sleep(0.6)
            os.kill(engine_pid(server), signal.SIGKILL)
            assert text_of(await server.make_request(CHAT)) == "echo: hello"
            assert server.restarts == number + 1


async def test_a_request_that_kills_engines_is_given_up_and_the_others_go_on():
    # Each engine dies of its third request; the poison is sent first, so that it is under way at each death.
    config = fake_config("--stall-at", "1", "30", "--crash-at", "request:3", max_replays=1, **PATIENT)
    outcome: list[object] = []
    async with CustomServer(config) as server, trio.open_nursery() as nursery:
        await server.wait_ready()

        async def poison() -> None:
            try:
                outcome.append(await server.make_request(ask("poison")))
            except ServerError as error:
                outcome.append(error)

        nursery.start_soon(poison)
        for _ in range(2):
            while server.requests_in_flight == 0 or server.state is not ServerState.READY:
                await trio.sleep(0.01)
            await trio.sleep(0.1)
            attempt = server.lifecycle.attempt
            os.kill(engine_pid(server), signal.SIGKILL)
            while server.lifecycle.attempt == attempt:
                await trio.sleep(0.01)
        with trio.fail_after(10):
            while not outcome:
                await trio.sleep(0.01)
        [error] = outcome
        assert isinstance(error, ServerError)
        assert "died 2 times while this request was under way" in error.message
        assert len(error.history) == 2
        await server.wait_ready()


async def test_without_restarts_a_crash_is_the_end_as_in_the_reference():
    async with CustomServer(fake_config("--crash-at", "request:1", max_restarts=0)) as server:
        with pytest.raises(ServerError, match="ended while serving"):
            await server.make_request(CHAT)
        assert server.state is ServerState.FAILED


async def test_the_callers_own_time_still_holds():
    async with CustomServer(fake_config("--ready-after", "0.5", "--latency", "5", **PATIENT)) as server:
        await server.wait_ready()
        with trio.move_on_after(0.5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.make_request, CHAT)
                await trio.sleep(0.1)
                os.kill(engine_pid(server), signal.SIGKILL)
        assert scope.cancelled_caught
        assert server.requests_in_flight == 0


async def test_request_timeout_covers_the_time_that_the_engine_is_down(tmp_path):
    starts = tmp_path / "starts"
    config = fake_config(
        *("--latency", "0.2", "--crash-at", "request:1", "--counter", str(starts), "--only-first", "1"),
        **PATIENT,
        request_timeout=0.6,
    )

    class Slow(CustomServer):
        async def start_server(self) -> trio.Process | None:
            if self.lifecycle.attempt > 1:
                await trio.sleep(3)
            return await super().start_server()

    async with Slow(config) as server:
        await server.wait_ready()
        began = trio.current_time()
        with pytest.raises(RequestTimeout, match="the engine was down meanwhile") as caught:
            await server.make_request(CHAT)
        assert 0.5 < trio.current_time() - began < 1.5
        assert caught.value.elapsed == pytest.approx(0.6, abs=0.3)


async def test_a_stream_that_has_yielded_says_how_far_it_came():
    async with CustomServer(fake_config("--reset-at", "1", **PATIENT)) as server:
        stream = server.stream_request(CHAT)
        chunks = [await stream.__anext__()]
        with pytest.raises(StreamInterrupted) as caught:
            chunks.extend([chunk async for chunk in stream])
        assert caught.value.received >= 1
        assert f"after {caught.value.received} events" in str(caught.value)


async def test_a_stream_that_has_yielded_says_how_far_it_came_also_when_the_engine_is_down_for_good():
    async with CustomServer(fake_config("--reset-at", "1", max_restarts=0)) as server:
        stream = server.stream_request(CHAT)
        chunks = [await stream.__anext__()]
        os.kill(engine_pid(server), signal.SIGKILL)
        with pytest.raises(ServerError, match="the engine ended while serving") as caught:
            chunks.extend([chunk async for chunk in stream])
        assert caught.value.received == len(chunks) >= 1
        with pytest.raises(ServerError) as caught:
            await server.make_request(CHAT)
        assert caught.value.received == 0


async def test_a_stream_that_has_yielded_nothing_is_sent_again(tmp_path):
    config = fake_config("--crash-at", "request:1", "--counter", str(tmp_path / "n"), "--only-first", "1", **PATIENT)
    async with CustomServer(config) as server:
        text = "".join([c["choices"][0]["delta"].get("content", "") async for c in server.stream_request(CHAT)])
        assert text == "echo: hello"
        assert server.restarts == 1


async def test_own_requests_of_a_subclass_are_sent_again():
    class Own(CustomServer):
        calls = 0

        async def _make_request(self, payload):
            self.calls += 1
            if self.calls == 1:
                await trio.sleep_forever()  # cannot notice by itself
            return {"call": self.calls}

    async with Own(fake_config(**PATIENT)) as server:
        await server.wait_ready()
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(0.1)
                os.kill(engine_pid(server), signal.SIGKILL)

            nursery.start_soon(kill)
            assert await server.make_request(CHAT) == {"call": 2}


# -- what is not tried again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "starts"),
    [
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error", 1),
        ("vllm: error: unrecognized arguments: --nonsense", 1),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 3),
        ("something that nobody knows", 3),
    ],
)
async def test_what_would_fail_again_is_not_started_again(line, starts, tmp_path):
    counter = tmp_path / "starts"
    config = fake_config(
        *("--print", line, "--crash-at", "before-bind", "--counter", str(counter)),
        server_start_max_retries=2,
        restart_backoff_max_sec=0.1,  # bounds the pause after a lack of memory, too
    )
    async with CustomServer(config) as server:
        with pytest.raises(ServerError):
            await server.wait_ready()
    assert counter.stat().st_size == starts


async def test_a_first_start_that_lacked_memory_is_tried_again_after_a_pause(tmp_path):
    line = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    for what, bound in ((line, 0.7), ("something that nobody knows", 0.0)):
        config = fake_config(
            *("--print", what, "--fail-starts", "1", "--counter", str(tmp_path / f"starts-{bound}")),
            server_start_max_retries=1,
            restart_backoff_max_sec=0.7,
        )
        async with CustomServer(config) as server:
            await server.wait_ready()
            [crash] = server.crash_reports
            between = time.time() - crash.at
            assert bound <= between < bound + 0.6


async def test_a_missing_program_is_not_looked_for_again():
    config = InferenceConfig(
        "custom", model_kwargs={"server_command": "/nonexistent/engine --port {port}"}, server_start_max_retries=5
    )
    async with CustomServer(config) as server:
        with pytest.raises(ServerError, match="could not be started") as caught:
            await server.wait_ready()
        assert len(server.crash_reports) == 1
        assert caught.value.advice is not None


# -- wedges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-metrics",), ("--silent-health",)], ids=["metrics", "none", "deaf"])
async def test_a_wedged_engine_with_good_health_is_found_and_replaced(options, tmp_path):
    config = fake_config(
        *("--wedge-after", "2", "--counter", str(tmp_path / "n"), "--only-first", "1", *options),
        **PATIENT,
        stall_timeout=1.0,
    )
    async with CustomServer(config) as server:
        await server.wait_ready()
        began = trio.current_time()
        outcomes = await gather(server, 8)
        assert outcomes == {f"request-{n}": f"echo: request-{n}" for n in range(8)}
        assert 1.0 <= trio.current_time() - began < 1.0 + 5.0
        [crash] = server.crash_reports
        assert "the engine is wedged: 6 requests under way" in crash.message


async def test_an_engine_that_answers_with_errors_only_is_replaced(tmp_path):
    config = fake_config(
        *("--status-from", "3", "500", "--counter", str(tmp_path / "n"), "--only-first", "1"),
        **PATIENT,
        stall_timeout=1.0,
        request_max_attempts=1,
    )
    async with CustomServer(config) as server:
        errors = 0

        async def ask_on() -> None:
            nonlocal errors
            while server.restarts == 0:
                with suppress(InferenceError):
                    await server.make_request(CHAT)
                    errors -= 1
                errors += 1

        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask_on)
            assert text_of(await server.make_request(CHAT)) == "echo: hello"
        [crash] = server.crash_reports
        assert "the engine answers with errors only" in crash.message
        assert errors >= 10


@pytest.mark.parametrize("options", [("--work",), ("--no-metrics", "--burn")], ids=["counters", "cpu"])
async def test_a_slow_engine_is_left_alone(options):
    config = fake_config("--latency", "3", *options, **PATIENT, stall_timeout=1.0)
    async with CustomServer(config) as server:
        assert text_of(await server.make_request(CHAT)) == "echo: hello"
        assert server.restarts == 0


async def test_a_stream_that_is_read_slowly_does_not_make_the_engine_look_wedged():
    async with CustomServer(fake_config(**PATIENT, stall_timeout=0.5)) as server:
        await server.wait_ready()
        link = server._supervisor.link
        assert link is not None
        async with server.stream_request(CHAT) as stream:
            await stream.__anext__()
            await trio.sleep(1.5)
            assert server.requests_in_flight == 1
            assert server.restarts == 0
            assert [chunk async for chunk in stream]
        assert (link.api.pool.unread, link.api.pool.in_use) == (0, 0)


async def test_a_stream_that_falls_silent_shows_a_wedge(tmp_path):
    config = fake_config("--wedge-after", "0", max_restarts=0, stall_timeout=0.5)
    async with CustomServer(config) as server:
        with trio.fail_after(5), pytest.raises(ServerError, match="the engine is wedged: 1 requests under way"):
            await server.stream_request(CHAT).__anext__()


async def test_an_idle_engine_whose_core_is_dead_is_replaced(tmp_path):
    config = fake_config(
        *("--sick-after", "0.3", "--counter", str(tmp_path / "n"), "--only-first", "1"),
        **PATIENT,
        probe_interval_sec=0.1,
    )
    async with CustomServer(config) as server:
        await server.wait_ready()
        with trio.fail_after(10):
            async for event in server.events():
                if event.after is ServerState.READY:
                    break
        [crash] = server.crash_reports
        assert "unhealthy: GET /health: status 503" in crash.message


async def test_probes_do_not_pile_up_and_none_comes_while_requests_are_under_way(tmp_path):
    probes = tmp_path / "probes"
    config = fake_config(
        "--probes-file", str(probes), "--latency", "1", **PATIENT, probe_interval_sec=0.1, stall_timeout=60.0
    )
    async with CustomServer(config) as server:
        await server.wait_ready()
        await trio.sleep(0.45)
        idle = probes.read_text().count("/health")
        assert 2 <= idle <= 5
        await gather(server, 3)
        lines = probes.read_text().splitlines()
        assert not [line for line in lines if line.startswith("/health") and not line.endswith(" 0")]


async def test_a_silent_health_page_gets_one_probe_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("trinfer.server.health.PROBE_TIMEOUT", 0.5)
    probes = tmp_path / "probes"
    config = fake_config("--probes-file", str(probes), "--silent-health", max_restarts=0, probe_interval_sec=0.05)
    async with CustomServer(config) as server:
        await server.wait_ready()
        with trio.fail_after(10):
            while server.state is ServerState.READY:
                await trio.sleep(0.02)
        assert server.failure is not None
        assert "no answer within 0.5 s" in server.failure.message
    assert probes.read_text().count("/health") == 3


async def test_an_idle_engine_is_asked_for_a_token_only_where_that_is_wanted(tmp_path):
    for wanted in (None, 0.2):
        config = fake_config("--wedge-after", "0", max_restarts=0, stall_timeout=0.5, idle_probe_sec=wanted)
        async with CustomServer(config) as server:
            await server.wait_ready()
            with trio.move_on_after(2.5 if wanted is None else 10):
                while server.state is ServerState.READY:
                    await trio.sleep(0.02)
            assert (server.failure is None) == (wanted is None)
            if server.failure is not None:
                assert "a request for one token failed" in server.failure.message


# -- starts ------------------------------------------------------------------------------------------------------------


def script(path: Path, code: str) -> InferenceConfig:
    path.write_text(code)
    return InferenceConfig(
        "custom",
        model_kwargs={"server_script": str(path)},
        server_start_max_retries=0,
        shutdown_grace_sec=0.5,
        server_ready_max_attempts=1,
        server_ready_delay_sec=1.0,
    )


async def test_a_start_that_gets_anywhere_is_given_more_time(tmp_path):
    config = script(
        tmp_path / "slow.py",
        "import time\nfor n in range(30):\n print(f'Loading safetensors checkpoint shards: {n}/30', flush=True)\n"
        " time.sleep(0.1)\nprint('Capturing CUDA graphs', flush=True)\ntime.sleep(60)",
    )
    async with CustomServer(config) as server:
        began = trio.current_time()
        with pytest.raises(ServerError, match="capture graphs"):
            await server.wait_ready()
        assert 3.5 < trio.current_time() - began < 6


async def test_a_start_that_repeats_itself_is_not(tmp_path):
    config = script(
        tmp_path / "waits.py",
        "import time\nwhile True:\n"
        " print(time.strftime('INFO %m-%d %H:%M:%S waiting for the other node, 3/8 are there'), flush=True)\n"
        " time.sleep(0.1)",
    )
    async with CustomServer(config) as server:
        began = trio.current_time()
        with pytest.raises(ServerError, match="not ready within"):
            await server.wait_ready()
        assert trio.current_time() - began < 2.5


async def test_a_start_without_a_sign_of_life_ends_early(tmp_path):
    config = script(tmp_path / "stuck.py", "import time\nprint('hello', flush=True)\ntime.sleep(60)")
    config = replace(config, server_ready_max_attempts=60, start_stall_timeout=1.0)
    async with CustomServer(config) as server:
        began = trio.current_time()
        with pytest.raises(ServerError, match="the start is stuck") as caught:
            await server.wait_ready()
        assert trio.current_time() - began < 5
        assert "hello" in caught.value.log_tail


async def test_phases_are_known_while_they_last(tmp_path):
    config = script(
        tmp_path / "phases.py",
        "import time\nprint('Downloading shards: 10%', flush=True)\ntime.sleep(0.5)\n"
        "print('Starting to load model', flush=True)\ntime.sleep(60)",
    )
    config = replace(config, server_ready_max_attempts=60)
    async with CustomServer(config) as server:
        phases = []
        with trio.fail_after(15):
            while "load weights" not in phases:
                if server.phase and server.phase not in phases:
                    phases.append(server.phase)
                await trio.sleep(0.01)
        assert phases == ["download", "load weights"]


# -- drain and events --------------------------------------------------------------------------------------------------


async def test_a_drain_finishes_what_is_under_way_and_refuses_the_rest():
    async with CustomServer(fake_config("--latency", "0.4")) as server:
        await server.wait_ready()
        outcomes: dict[str, object] = {}

        async def all_of_them() -> None:
            outcomes.update(await gather(server, 5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_of_them)
            await trio.sleep(0.1)
            assert server.requests_in_flight == 5
            nursery.start_soon(partial(server.drain, 10, "maintenance"))
            await trio.sleep(0.05)
            assert server.state is ServerState.DRAINING
            with pytest.raises(ServerError, match=r"takes no more requests, it drains \(maintenance\)"):
                await server.make_request(CHAT)
        assert outcomes == {f"request-{n}": f"echo: request-{n}" for n in range(5)}
        assert await server.drain(0)


async def test_a_probe_of_our_own_does_not_hold_up_a_drain(tmp_path):
    probes = tmp_path / "requests"
    config = fake_config(
        "--wedge-after", "0", "--aborted-file", str(probes), idle_probe_sec=0.1, probe_interval_sec=0.1
    )
    async with CustomServer(config) as server:
        await server.wait_ready()
        link = server._supervisor.link
        assert link is not None
        with trio.fail_after(5):
            while not link.api.pool.in_use:
                await trio.sleep(0.01)
        assert server.requests_in_flight == 0
        assert await server.drain(0)
    assert probes.read_text() == "1\n"


async def test_a_drain_gives_up_in_time_and_counts_streams():
    async with CustomServer(fake_config("--latency", "30")) as server:
        await server.wait_ready()
        async with trio.open_nursery() as nursery:
            stream = server.stream_request(CHAT)
            nursery.start_soon(stream.__anext__)
            await trio.sleep(0.1)
            began = trio.current_time()
            assert not await server.drain(0.3)
            assert trio.current_time() - began < 1
            nursery.cancel_scope.cancel()


async def test_a_drain_during_the_start_lets_those_who_wait_have_their_turn():
    async with CustomServer(fake_config("--ready-after", "0.5")) as server:
        outcomes: dict[str, object] = {}

        async def all_of_them() -> None:
            outcomes.update(await gather(server, 3))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_of_them)
            await trio.sleep(0.1)
            assert await server.drain(10)
        assert outcomes == {f"request-{n}": f"echo: request-{n}" for n in range(3)}
        with pytest.raises(ServerError, match="drains"):
            await server.wait_ready()


async def test_an_engine_that_dies_while_it_drains_is_not_started_again():
    async with CustomServer(fake_config("--latency", "5", **PATIENT)) as server:
        await server.wait_ready()
        async with trio.open_nursery() as nursery:

            async def request() -> None:
                with pytest.raises(ServerError, match="it was draining"):
                    await server.make_request(CHAT)

            nursery.start_soon(request)
            await trio.sleep(0.1)
            nursery.start_soon(server.drain, 10)
            await trio.sleep(0.1)
            os.kill(engine_pid(server), signal.SIGKILL)
        assert server.state is ServerState.FAILED


async def test_events_end_with_the_server():
    seen = []
    async with trio.open_nursery() as nursery:

        async def watch(server: CustomServer) -> None:
            seen.extend([(event.after.value, event.attempt) async for event in server.events()])

        server = CustomServer(fake_config(**PATIENT))
        nursery.start_soon(watch, server)
        await trio.testing.wait_all_tasks_blocked()
        async with server:
            await server.wait_ready()
            os.kill(engine_pid(server), signal.SIGKILL)
            await server.make_request(CHAT)
    assert seen == [("starting", 1), ("ready", 1), ("restarting", 2), ("ready", 2), ("stopped", 2)]


# -- clean ground ------------------------------------------------------------------------------------------------------


async def test_the_old_tree_is_gone_before_the_next_engine_starts():
    trees: list[list[int]] = []

    class Watched(CustomServer):
        async def start_server(self) -> trio.Process | None:
            trees.append(marked_processes({RUN_VARIABLE: run_id()}))
            return await super().start_server()

    options = ("--daemon", "--own-session", "--deaf-grandchild", "--respawning")
    async with Watched(fake_config(*options, **PATIENT, shutdown_grace_sec=0.5)) as server:
        for _ in range(2):
            await server.wait_ready()
            os.kill(engine_pid(server), signal.SIGKILL)
            await server.make_request(CHAT)
    assert trees == [[], [], []]


async def test_leaving_during_a_pause_before_a_restart_does_not_wait_for_it():
    config = fake_config("--crash-at", "request:1", max_restarts=9, restart_backoff_sec=60.0, max_replays=9)
    began = time.monotonic()
    with trio.move_on_after(3):
        async with CustomServer(config) as server:
            await server.make_request(CHAT)
    assert time.monotonic() - began < 6
    assert server.state is ServerState.STOPPED
