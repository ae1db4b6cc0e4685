"""One server, with a real engine process: what its users rely on."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.engine_configs import CHAT, fake_command, fake_config, text_of
from trinfer import (
    BadRequestError,
    CustomServer,
    InferenceConfig,
    InferenceError,
    InferenceServer,
    RequestTimeout,
    ServerError,
    ServerState,
)
from trinfer.process.identity import RUN_VARIABLE, run_id
from trinfer.process.spawn import marked_processes

TREE = ("--children", "1", "--own-session", "--daemon", "--deaf-grandchild", "--respawning", "--stopped")


def processes_of_this_run() -> list[int]:
    return marked_processes({RUN_VARIABLE: run_id()})


async def until(condition, seconds: float = 5.0) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


# -- the block ------------------------------------------------------------------------------------------------------


async def test_entering_returns_at_once_and_requests_wait_for_the_engine():
    async with CustomServer(fake_config("--ready-after", "0.3")) as server:
        assert server.state is ServerState.STARTING
        began = trio.current_time()
        answer = await server.make_request(CHAT)
        assert trio.current_time() - began >= 0.25
        assert text_of(answer) == "echo: hello"
        assert server.state is ServerState.READY
        assert await server.is_ready()
    assert server.state is ServerState.STOPPED
    with pytest.raises(ServerError, match="has been stopped"):
        await server.make_request(CHAT)


async def test_completions_without_chat_and_default_parameters():
    config = fake_config(use_chat=False, default_generation_params={"max_tokens": 2})
    async with CustomServer(config) as server:
        payload = {"prompt": "one two three"}
        answer = await server.make_request(payload)
        assert text_of(answer) == "echo: one"
        assert payload == {"prompt": "one two three"}
        assert text_of(await server.make_request({**payload, "max_tokens": 3})) == "echo: one two"


@pytest.mark.parametrize("phase", ["spawning", "loading", "ready", "failing"])
@pytest.mark.parametrize("way", ["return", "exception", "cancel", "deadline"])
async def test_nothing_is_left_however_and_whenever_the_block_ends(way, phase):
    options = {"loading": ("--never-ready",), "failing": ("--crash-at", "before-bind")}.get(phase, ())
    server = CustomServer(fake_config(*options, *TREE))
    wrong = ValueError("the body's own")
    caught: BaseException | None = None
    with trio.CancelScope() as scope:
        try:
            async with server:
                if phase == "ready":
                    await server.wait_ready()
                elif phase == "loading":
                    await until(lambda: len(processes_of_this_run()) >= 8)
                elif phase == "failing":
                    with pytest.raises(ServerError):
                        await server.wait_ready()
                if way == "exception":
                    raise wrong
                if way == "cancel":
                    scope.cancel()
                if way == "deadline":
                    scope.deadline = trio.current_time() + 0.02
                if way in {"cancel", "deadline"}:
                    await trio.sleep_forever()
        except ValueError as error:
            caught = error
    assert (caught is wrong) == (way == "exception")
    assert scope.cancelled_caught == (way in {"cancel", "deadline"})
    assert server.state is ServerState.STOPPED
    assert processes_of_this_run() == []


async def cancelled_body(scope: trio.CancelScope) -> None:
    async with CustomServer(fake_config()):
        scope.cancel()
        raise ValueError("mine")


async def test_a_cancelled_scope_around_a_body_that_raises_keeps_the_exception():
    with trio.CancelScope() as scope:
        with pytest.raises(ValueError, match="mine"):
            await cancelled_body(scope)
        assert processes_of_this_run() == []


async def test_a_cancelled_scope_before_the_block():
    with trio.CancelScope() as scope:
        scope.cancel()
        server = CustomServer(fake_config())
        async with server:
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert server.state is ServerState.STOPPED


async def test_a_server_can_be_entered_again_but_not_twice_at_a_time():
    server = CustomServer(fake_config())
    for _ in range(2):
        async with server:
            await server.wait_ready()
            with pytest.raises(RuntimeError, match="entered already"):
                async with server:
                    pass
    assert server.state is ServerState.STOPPED


async def test_cleanup_can_be_called_early():
    async with CustomServer(fake_config(*TREE)) as server:
        await server.wait_ready()
        await server.server_cleanup()
        assert server.state is ServerState.STOPPED
        assert processes_of_this_run() == []
        await server.server_cleanup()


async def test_many_servers_side_by_side():
    async with trio.open_nursery() as nursery:

        async def one(rank: int) -> None:
            async with CustomServer(fake_config(), rank) as server:
                payload = {"messages": [{"role": "user", "content": f"rank {rank}"}]}
                assert text_of(await server.make_request(payload)) == f"echo: rank {rank}"
                ports.add(server.port)

        ports: set[int | None] = set()
        for rank in range(6):
            nursery.start_soon(one, rank)
    assert len(ports) == 6


# -- failures -------------------------------------------------------------------------------------------------------


async def test_a_failed_start_tells_why_and_what_to_do():
    config = fake_config("--print", "torch.OutOfMemoryError: CUDA out of memory.", "--crash-at", "before-bind")
    async with CustomServer(config) as server:
        with pytest.raises(ServerError) as caught:
            await server.make_request(CHAT)
        assert server.state is ServerState.FAILED
    error = caught.value
    assert error.returncode == 1
    assert "exit code 1" in error.message
    assert "GPU's memory" in (error.cause or "")
    assert error.advice
    assert "torch.OutOfMemoryError: CUDA out of memory." in error.log_tail
    assert server.failure is not None


@pytest.mark.parametrize(("way", "returncode"), [(("--exit-code", "7"), 7), (("--signal", "SIGSEGV"), -11)])
async def test_an_engine_that_dies_while_serving_fails_its_requests_with_its_last_words(way, returncode):
    config = fake_config("--crash-at", "request:2", "--print", "some words", *way)
    async with CustomServer(config) as server:
        await server.make_request(CHAT)
        with pytest.raises(ServerError) as caught:
            await server.make_request(CHAT)
        assert "while serving" in caught.value.message
        assert caught.value.returncode == returncode
        assert "some words" in caught.value.log_tail
        with pytest.raises(ServerError):  # and so will all that follow
            await server.make_request(CHAT)


async def test_a_dead_engine_whose_child_keeps_the_connection_open_fails_requests_at_once():
    async with CustomServer(fake_config("--latency", "30", "--crash-at", "ready:0.3")) as server:
        with trio.fail_after(5), pytest.raises(ServerError):
            await server.make_request(CHAT)


async def test_starts_are_tried_again(tmp_path: Path):
    counter = str(tmp_path / "starts")
    config = fake_config("--fail-starts", "2", "--counter", counter, server_start_max_retries=2)
    async with CustomServer(config) as server:
        await server.make_request(CHAT)
    assert Path(counter).stat().st_size == 3


async def test_after_the_last_retry_the_history_is_told(tmp_path: Path):
    counter = str(tmp_path / "starts")
    config = fake_config("--fail-starts", "9", "--counter", counter, server_start_max_retries=1)
    async with CustomServer(config) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert len(caught.value.history) == 2
    assert Path(counter).stat().st_size == 2


async def test_a_port_in_use_costs_no_start_attempt(tmp_path: Path):
    config = fake_config("--port-in-use", "3", "--counter", str(tmp_path / "starts"))
    async with CustomServer(config) as server:
        await server.make_request(CHAT)


async def test_a_line_about_memory_does_not_end_a_serving_engine():
    config = fake_config("--print-at-request", "1", "RuntimeError: CUDA out of memory, says a prompt")
    async with CustomServer(config) as server:
        for _ in range(3):
            await server.make_request(CHAT)
        assert server.state is ServerState.READY


def seconds_waited(error: ServerError) -> float:
    found = re.search(r"not ready within ([0-9.]+) s", error.message)
    assert found is not None
    return float(found[1])


async def test_an_engine_that_is_never_ready_runs_into_its_deadline():
    config = fake_config("--never-ready", *TREE, server_ready_max_attempts=2, server_ready_delay_sec=0.2)
    async with CustomServer(config) as server:
        with pytest.raises(ServerError, match="not ready within") as caught:
            await server.wait_ready()
    # It tells how long it has waited in truth, which is more on a busy machine.
    assert 0.4 <= seconds_waited(caught.value) < 5


async def test_a_missing_program_is_named():
    config = InferenceConfig("custom", executable="/no/such/engine", server_start_max_retries=0)
    async with CustomServer(config) as server:
        with pytest.raises(ServerError, match="/no/such/engine") as caught:
            await server.wait_ready()
    assert "not installed" in (caught.value.cause or "")


class ThievesServer(CustomServer):
    """On its first start, another program takes the port before the engine does, and answers there."""

    thief: subprocess.Popen[bytes] | None = None

    async def start_server(self) -> trio.Process | None:
        if self.thief is not None:
            return await super().start_server()
        command = [word.replace("{port}", str(self.port)) for word in fake_command("--model", "another")]
        self.thief = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return await self.spawn([sys.executable, "-c", "import time; time.sleep(60)"])


async def test_somebody_else_on_the_port_is_not_taken_for_the_engine():
    server = ThievesServer(fake_config())
    try:
        async with server:
            assert text_of(await server.make_request(CHAT)) == "echo: hello"
    finally:
        assert server.thief is not None
        server.thief.kill()
        server.thief.wait()


# -- requests -------------------------------------------------------------------------------------------------------


async def test_a_cancelled_request_closes_its_connection_so_that_the_engine_stops(tmp_path: Path):
    aborted = tmp_path / "aborted"
    async with CustomServer(fake_config("--latency", "20", "--aborted-file", str(aborted))) as server:
        await server.wait_ready()
        with trio.move_on_after(0.2):
            await server.make_request(CHAT)
        await until(aborted.exists)


async def test_the_request_timeout_always_holds():
    async with CustomServer(fake_config("--latency", "20", request_timeout=0.2)) as server:
        with pytest.raises(RequestTimeout, match=r"within 0\.2 s") as caught:
            await server.make_request(CHAT)
        assert caught.value.payload == CHAT
        assert server.state is ServerState.READY


async def test_a_refused_request_tells_status_and_the_servers_words():
    async with CustomServer(fake_config("--status-at", "1", "422")) as server:
        with pytest.raises(BadRequestError) as caught:
            await server.make_request(CHAT)
        assert isinstance(caught.value, InferenceError)
        assert caught.value.status == 422
        assert caught.value.server_message == "status 422 to order"
        assert caught.value.payload == CHAT
        await server.make_request(CHAT)


async def test_a_payload_that_is_no_json_never_reaches_the_engine():
    async with CustomServer(fake_config("--crash-at", "request:1")) as server:
        for wrong in ({"messages": {1, 2}}, {"temperature": float("nan")}, {"prompt": "\ud800"}):
            with pytest.raises(BadRequestError, match="cannot be written as JSON"):
                await server.make_request(wrong)


async def test_requests_of_other_tasks_end_when_the_block_does():
    async with trio.open_nursery() as nursery, CustomServer(fake_config("--latency", "20")) as server:

        async def ask() -> None:
            with pytest.raises(ServerError, match="stopped"):
                await server.make_request(CHAT)

        await server.wait_ready()
        nursery.start_soon(ask)
        await trio.sleep(0.1)


# -- subclasses -----------------------------------------------------------------------------------------------------


class MyServer(InferenceServer):
    async def start_server(self) -> trio.Process | None:
        command = [word.replace("{port}", str(self.port)) for word in fake_command()]
        return await self.spawn(command, env={"MINE": "1"})

    async def monitor_health(self) -> None:
        await self.engine_exit()


async def test_a_subclass_of_fifteen_lines():
    async with MyServer(fake_config()) as server:
        assert text_of(await server.make_request(CHAT)) == "echo: hello"
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.get_base_url())


class PickyServer(MyServer):
    looks = 0

    async def is_ready(self) -> bool:
        self.looks += 1
        return self.looks > 3 and await super().is_ready()

    async def _make_request(self, payload):
        return {"mine": await super()._make_request(payload)}


async def test_a_subclass_may_decide_what_ready_and_a_request_mean():
    async with PickyServer(fake_config()) as server:
        assert text_of((await server.make_request(CHAT))["mine"]) == "echo: hello"
        assert server.looks >= 4


class BrokenServer(MyServer):
    def __init__(self, where: str) -> None:
        super().__init__(fake_config())
        self._where = where

    async def start_server(self):
        if self._where == "start_server":
            raise KeyError("a bug in start_server")
        return await super().start_server()

    async def monitor_health(self):
        if self._where == "monitor_health":
            raise KeyError("a bug in monitor_health")
        if self._where == "monitor returns":
            await self.wait_ready()
            return
        await super().monitor_health()

    async def is_ready(self):
        if self._where == "is_ready":
            raise KeyError("a bug in is_ready")
        return await super().is_ready()


async def use(server: InferenceServer) -> None:
    await server.wait_ready()
    await server.make_request(CHAT)
    await trio.sleep(1)
    await server.make_request(CHAT)


@pytest.mark.parametrize("where", ["start_server", "monitor_health", "is_ready", "monitor returns"])
async def test_bugs_of_a_subclass_become_the_servers_failure(where):
    async with BrokenServer(where) as server:
        with pytest.raises(ServerError) as caught:
            await use(server)
        if where != "monitor returns":
            assert f"a bug in {where}" in caught.value.message
            assert isinstance(caught.value.__cause__, KeyError)
        assert server.state is ServerState.FAILED


async def test_a_request_under_way_gets_the_cause_of_the_failure_too():
    class LaterBroken(CustomServer):
        async def monitor_health(self):
            await self.wait_ready()
            await trio.sleep(0.3)
            raise KeyError("a bug")

    async with LaterBroken(fake_config("--latency", "5")) as server:
        with pytest.raises(ServerError, match="a bug") as caught:
            await server.make_request(CHAT)
    assert isinstance(caught.value.__cause__, KeyError)


class SlowSpawnServer(MyServer):
    async def start_server(self):
        await trio.sleep_forever()


async def test_spawning_has_its_own_deadline():
    async with SlowSpawnServer(fake_config(server_start_timeout_sec=0.1)) as server:
        with pytest.raises(ServerError, match="server_start_timeout_sec"):
            await server.wait_ready()


# -- logs, environment, nodes ------------------------------------------------------------------------------------------


async def test_the_log_file_is_private_and_not_truncated_by_a_restart(tmp_path: Path):
    folder = tmp_path / "logs"
    config = fake_config("--print", "once more", server_log_folder=str(folder))
    for _ in range(2):
        async with CustomServer(config, rank=3) as server:
            await server.wait_ready()
    log = folder / "server_rank_3.log"
    assert log.read_text().count("once more") == 2
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def test_gpus_and_environment_reach_the_engine():
    code = "import os; print('SEEN', os.environ['CUDA_VISIBLE_DEVICES'], os.environ['MINE'], flush=True)"
    config = InferenceConfig(
        "custom",
        model_kwargs={"server_command": [sys.executable, "-c", code, "{port}"]},
        gpus=(3, "GPU-abc"),
        env={"MINE": "yes"},
        server_start_max_retries=0,
    )
    async with CustomServer(config) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert "SEEN 3,GPU-abc yes" in caught.value.log_tail


async def test_a_worker_node_runs_until_its_engine_has_ended_and_yields_none(monkeypatch):
    monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
    config = InferenceConfig("custom", model_kwargs={"server_command": ["sh", "-c", "sleep 0.3", "{port}"]})
    began = trio.current_time()
    async with CustomServer(config) as server:
        assert server is None
        assert 0.25 <= trio.current_time() - began < 5


async def test_a_worker_node_whose_engine_fails_says_so(monkeypatch):
    monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
    config = InferenceConfig(
        "custom", model_kwargs={"server_command": ["sh", "-c", "echo lost peer; exit 3", "{port}"]}
    )
    with pytest.raises(ServerError, match="exit code 3") as caught:
        async with CustomServer(config):
            pytest.fail("the body must not run")
    assert "lost peer" in caught.value.log_tail


async def test_a_worker_node_that_is_cancelled_cleans_up(monkeypatch):
    monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
    with trio.move_on_after(0.5) as scope:
        async with CustomServer(fake_config("--never-ready", *TREE, address=("--port", "1{port}"))):
            pytest.fail("the body must not run")
    assert scope.cancelled_caught
    assert processes_of_this_run() == []


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, trio
from tests.engine_configs import *
from trinfer import CustomServer
def ignores_sigterm(server):
    for guarded in server.current_attempt.processes:
        with open(f"/proc/{guarded.engine_pid}/status") as status:
            ignored = next(line.split()[1] for line in status if line.startswith("SigIgn"))
        return bool(int(ignored, 16) & 1 << 14)
    return False
async def main():
    async with CustomServer(fake_config(*sys.argv[2:])) as server:
        if sys.argv[1] == "ready":
            await server.wait_ready()
        while "--deaf" in sys.argv and not ignores_sigterm(server):  # else it may be gone before the second Ctrl-C
            await trio.sleep(0.01)
        print("here", flush=True)
        await trio.sleep_forever()
try:
    trio.run(main)
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
    sys.exit(9)
"""


@pytest.mark.parametrize("phase", ["starting", "ready"])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing_and_comes_out_as_itself(phase, times):
    options = ["--never-ready"] if phase == "starting" else []
    deaf = ["--deaf"] if times == 2 else []
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase, *options, *deaf, *TREE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    mark = {RUN_VARIABLE: f"{process.pid}-{_start_time(process.pid)}"}
    process.send_signal(signal.SIGINT)
    if times == 2:
        import time

        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (out, err, process.returncode) == ("KeyboardInterrupt\n", "", 9)
    assert marked_processes(mark) == []


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def test_the_identity_of_a_run_is_this_process():
    assert run_id() == f"{os.getpid()}-{_start_time(os.getpid())}"


async def test_requests_are_answered_while_the_engine_floods_its_output():
    async with CustomServer(fake_config("--chatter", "200000000")) as server:
        await server.wait_ready()
        seen, began, slowest = server.log.bytes_seen, trio.current_time(), 0.0
        while trio.current_time() - began < 1.5:
            start = trio.current_time()
            assert text_of(await server.make_request(CHAT)) == "echo: hello"
            slowest = max(slowest, trio.current_time() - start)
        assert server.log.bytes_seen - seen > 20_000_000
        assert slowest < 1
