"""The fixtures for users' tests, in a test-suite of a user's own."""

from __future__ import annotations

import os
import re
import signal

import pytest

from trinfer import ServerError, ServerState
from trinfer.testing.faults import OUT_OF_MEMORY, Faults

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


async def test_a_healthy_engine(fake_engine, trinfer_server):
    async with trinfer_server(fake_engine()) as server:
        answer = await server.make_request(CHAT)
        assert answer["choices"][0]["message"]["content"] == "echo: hello"


async def test_a_crash_that_a_restart_heals(fake_engine, trinfer_server):
    async with trinfer_server(fake_engine(crash_at_request=2, only_first=1)) as server:
        for _ in range(4):
            await server.make_request(CHAT)
        assert server.restarts == 1


async def test_a_start_that_fails_with_a_diagnosis(fake_engine, trinfer_server):
    config = fake_engine(prints=(OUT_OF_MEMORY,), dies_at_start=True, config={"server_start_max_retries": 0})
    async with trinfer_server(config) as server:
        with pytest.raises(ServerError, match="memory"):
            await server.wait_ready()
        assert server.state is ServerState.FAILED


FAULTS = [
    {"slow_start": 0.2},
    {"wedge_after": 1, "only_first": 1},
    {"sick_after": 0.0, "only_first": 1, "latency": 0.1},
    {"port_stolen": 1},
    {"statuses": {1: 429, 2: 503}, "retry_after": "0"},
    {"stalls": {1: 0.3}},
    {"reset_at": 1},
    {"orphan": True, "deaf": True},
    {"bad_utf8": True},
    {"crash_after": 0.3, "signal": "SIGSEGV", "only_first": 1, "token_latency": 0.2},
    {"more": ("--flood", "100000")},
]


@pytest.mark.parametrize("faults", FAULTS, ids=lambda faults: next(iter(faults)))
async def test_every_fault_is_survived(fake_engine, trinfer_server, faults):
    config = fake_engine(**faults, config={"probe_interval_sec": 0.1, "stall_timeout": 1.0})
    async with trinfer_server(config) as server:
        for _ in range(3):
            answer = await server.make_request(CHAT)
            assert answer["choices"][0]["message"]["content"] == "echo: hello"


def test_unknown_faults_are_refused(fake_engine):
    with pytest.raises(TypeError, match="melt_down"):
        fake_engine(melt_down=True)


def test_every_option_is_one_that_the_engine_knows():
    from trinfer.testing.fake_engine import parse

    everything = Faults(
        **{k: v for faults in FAULTS for k, v in faults.items()}, prints=("a",), exit_code=3, crash_at_request=5
    )
    options = parse([word.replace("{port}", "1") for word in everything.command("/tmp/counter")[4:]])
    assert options.crash_at == "request:5"
    assert options.status_at == [["1", "429"], ["2", "503"]]
    assert options.deaf_grandchild


def test_in_a_suite_of_a_users_own(pytester: pytest.Pytester):
    pytester.makeini("[pytest]\ntrio_mode = true\n")
    pytester.makepyfile(
        """
        import os, subprocess

        async def test_good(fake_engine, trinfer_server):
            async with trinfer_server(fake_engine()) as server:
                await server.wait_ready()

        async def test_leaves_a_process(fake_engine, trinfer_server):
            server = trinfer_server(fake_engine())
            subprocess.Popen(["sleep", "20"], env={**os.environ, **server.marker})
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore")
    result.assert_outcomes(passed=2, errors=1)
    left = re.search(r"processes of a server are left: \[(\d+)\]", result.stdout.str())
    assert left is not None
    os.kill(int(left[1]), signal.SIGKILL)


def test_a_process_that_is_just_being_executed_is_found_all_the_same(pytester: pytest.Pytester):
    """Within exec(2), a process shows no environment: the first look does not see it."""
    pytester.makeini("[pytest]\ntrio_mode = true\n")
    pytester.makepyfile(
        """
        import os, subprocess
        from trinfer.process import identity

        async def test_leaves_a_process(fake_engine, trinfer_server):
            server = trinfer_server(fake_engine())
            subprocess.Popen(["sleep", "20"], env={**os.environ, **server.marker})

        find_trees, looks = identity.find_trees, []
        def too_early():
            looks.append(1)
            return [] if len(looks) == 1 else find_trees()
        identity.find_trees = too_early
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore")
    result.assert_outcomes(passed=1, errors=1)
    left = re.search(r"processes of a server are left: \[(\d+)\]", result.stdout.str())
    assert left is not None
    os.kill(int(left[1]), signal.SIGKILL)
