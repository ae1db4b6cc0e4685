"""Mistakes of users, of engines and of the machine: each is told for what it is, and costs no more than itself."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import trio

from tests.engine_configs import CHAT, fake_config, text_of
from trinfer import CustomServer, InferenceConfig, InferenceServer, ServerError, ServerState
from trinfer.process.addresses import runtime_dir
from trinfer.process.spawn import marked_processes
from trinfer.server import base
from trinfer.server.diagnosis import is_port_in_use
from trinfer.server.link import is_ours

ROOT = Path(__file__).parent.parent.parent


# -- spawn ----------------------------------------------------------------------------------------------------------


class Own(InferenceServer):
    engine_name = "own"
    # One for the whole class, as each test sets them anew.
    command: ClassVar[list] = []
    options: ClassVar[dict] = {}

    async def start_server(self):
        return await self.spawn(self.command, **self.options)

    async def monitor_health(self) -> None:
        await self.engine_exit()


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ([], {}, "empty command"),
        (["", "x"], {}, "the name of the program is empty"),
        (["sleep", 5], {}, "argument 1 is 5, a int"),
        (["sleep", "5"], {"env": {"A": 1}}, "environment variable 'A' is 1, a int"),
        (["sleep", "a\0b"], {}, "argument 1 holds a NUL byte"),
        (["sleep", "5"], {"cwd": "/no/such/folder"}, "its working directory '/no/such/folder' does not exist"),
        (["x" * 3_000_000], {}, "too long"),
        (["/etc/passwd"], {}, "not installed, not on PATH, or not executable"),
    ],
)
async def test_what_cannot_be_spawned_says_why(command, options, words):
    server = Own(InferenceConfig("custom", "m", model_kwargs={"server_command": ["x"]}, server_start_max_retries=3))
    server.command, server.options = command, options
    async with server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert words in str(caught.value)
    assert "ExceptionGroup" not in str(caught.value)
    assert len(server.crash_reports) == 1  # the same start would fail again


async def test_callbacks_that_fail_keep_no_others_from_being_called(caplog):
    released = []

    class Holding(CustomServer):
        async def start_server(self):
            self.release_with_attempt(lambda: released.append(1))
            self.release_with_attempt(lambda: {}["nothing"])
            return await super().start_server()

    async with Holding(fake_config()) as server:
        await server.wait_ready()
    assert released == [1]
    assert server.state is ServerState.STOPPED
    assert "release_with_attempt has failed" in caplog.text


# -- ports and addresses ----------------------------------------------------------------------------------------------


def test_only_our_own_port_in_use_counts():
    for line in (
        "OSError: [Errno 98] Address already in use",
        "ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', 31000): address already in use",
        "bind: Address already in use: 127.0.0.1:31000",
    ):
        assert is_port_in_use(line, 31000)
    for line in (
        "WARNING: metrics exporter is off: [Errno 98] Address already in use (port 9400)",
        "ERROR: exporter: [Errno 98] Address already in use (port 9400)",
        "WARNING: something: Address already in use",
        "cannot bind to 0.0.0.0:9400: Address already in use",
    ):
        assert not is_port_in_use(line, 31000)


async def test_a_warning_about_another_port_costs_nothing():
    words = "ERROR exporter is off: [Errno 98] Address already in use (port 9400)"
    async with CustomServer(fake_config("--print", words)) as server:
        await server.wait_ready()
        assert server.crash_reports == ()


@pytest.mark.parametrize(("owned", "expected"), [(True, True), (False, False), (None, True)])
def test_the_name_counts_only_where_nobody_can_be_asked(owned, expected):
    class Attempt:
        port = 31000

        def owns_port(self, *, own_pid):
            return owned

    assert is_ours(Attempt(), b'{"data": [{"id": "m"}]}', model="m", own_pid=1) is expected


async def test_an_address_that_is_not_this_machines():
    async with CustomServer(fake_config(host="192.0.2.1", transport="tcp")) as server:
        with pytest.raises(ServerError, match=r"this machine has no address 192\.0\.2\.1"):
            await server.wait_ready()


def test_the_runtime_folder_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", "here")
    assert runtime_dir() == tmp_path / "here"


# -- what the body does -----------------------------------------------------------------------------------------------


async def test_the_engine_loads_while_the_body_does_not_give_way():
    began = time.monotonic()
    async with CustomServer(fake_config("--ready-after", "0.8")) as server:
        time.sleep(0.8)  # as a body without a checkpoint does
        await server.wait_ready()
        assert time.monotonic() - began < 1.5


async def test_a_body_that_blocks_beyond_the_deadline_does_not_fail_the_engine():
    config = fake_config("--ready-after", "0.2", server_ready_max_attempts=1, server_ready_delay_sec=0.6)
    async with CustomServer(config) as server:
        time.sleep(1.5)  # see above
        await server.wait_ready()
        assert text_of(await server.make_request(CHAT)) == "echo: hello"


@contextlib.asynccontextmanager
async def all_threads_taken():
    """All threads that trio allows by default work for the user."""
    limiter = trio.to_thread.current_default_thread_limiter()
    done = threading.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(int(limiter.total_tokens) + 5):
            nursery.start_soon(trio.to_thread.run_sync, done.wait)
        try:
            with trio.fail_after(5):
                while limiter.available_tokens:
                    await trio.sleep(0.01)
            yield
        finally:
            done.set()


async def test_threads_of_the_user_do_not_keep_trinfers_from_working():
    async with CustomServer(fake_config("--ready-after", "0.5")) as server, all_threads_taken():
        with trio.fail_after(5):
            await server.wait_ready()


async def test_threads_of_the_user_that_keep_an_engine_from_starting_are_named():
    async with all_threads_taken():
        with trio.fail_after(10), pytest.raises(ServerError, match="spawning the engine took more") as caught:
            async with CustomServer(fake_config(server_start_timeout_sec=0.5)) as server:
                await server.wait_ready()
    assert "threads that trio allows by default are taken" in str(caught.value.cause)
    assert "limiter" in str(caught.value.advice)


async def test_threads_of_the_user_do_not_hide_a_wedge():
    config = fake_config("--wedge-after", "0", "--no-metrics", max_restarts=0, stall_timeout=0.5)
    async with CustomServer(config) as server:
        await server.wait_ready()
        async with all_threads_taken():
            with trio.fail_after(3), pytest.raises(ServerError, match="the engine is wedged"):
                await server.make_request(CHAT)


async def test_a_body_that_blocks_does_not_make_the_engine_look_wedged():
    config = fake_config("--latency", "0.6", "--no-metrics", max_restarts=1, stall_timeout=1.5)
    async with CustomServer(config) as server, trio.open_nursery() as nursery:
        await server.wait_ready()
        nursery.start_soon(server.make_request, CHAT)
        await trio.sleep(0.4)  # the watch has seen the request
        time.sleep(1.8)  # see above; the answer comes meanwhile
        await trio.sleep(0.3)
        assert server.crash_reports == ()


@pytest.fixture
def few_descriptors():
    """A call that takes all file descriptors, and one that gives them back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def take() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))

    def give_back() -> None:
        while taken:
            os.close(taken.pop())
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    yield take, give_back
    give_back()


@pytest.mark.parametrize("idle_probe_sec", [None, 0.1])
async def test_the_owners_lack_of_descriptors_is_not_the_engines_fault(few_descriptors, idle_probe_sec):
    take, give_back = few_descriptors
    config = fake_config(probe_interval_sec=0.05, idle_probe_sec=idle_probe_sec, max_restarts=0)
    async with CustomServer(config) as server:
        await server.wait_ready()
        take()
        await trio.sleep(0.6)  # time for ten probes
        give_back()
        assert server.state is ServerState.READY
        await server.make_request(CHAT)


async def test_the_owners_lack_of_descriptors_while_the_engine_loads_is_waited_for(few_descriptors, caplog):
    take, give_back = few_descriptors
    async with CustomServer(fake_config("--ready-after", "0.2", transport="tcp")) as server:
        take()
        with trio.move_on_after(1):
            await server.wait_ready()
        assert server.state is ServerState.STARTING
        give_back()
        await server.wait_ready()
        await server.make_request(CHAT)
    assert caplog.text.count("could not be looked at: [Errno 24] Too many open files") == 1


async def test_a_full_disk_under_the_runtime_folder_is_named(small_disk, monkeypatch):
    run = small_disk / "run"
    (run / "ports").mkdir(mode=0o700, parents=True)
    run.chmod(0o700)
    subprocess.run(["mount", "-o", "remount,nr_inodes=4", str(small_disk)], check=True)
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(run))
    (run / "the-last-inode").touch()
    async with CustomServer(fake_config()) as server:
        with pytest.raises(ServerError, match=r"address could not be leased: .*No space left on device") as caught:
            await server.wait_ready()
        assert "TRINFER_RUNTIME_DIR" in caught.value.advice


async def test_a_look_at_the_engine_that_fails_is_not_the_last_one(caplog):
    class Fragile(CustomServer):
        looks = 0

        def health_watch(self, attempt, link):
            watch = super().health_watch(attempt, link)
            look = watch._look

            async def fail_at_first():
                self.looks += 1
                if self.looks <= 3:
                    raise RuntimeError("can't start new thread")
                return await look()

            watch._look = fail_at_first
            return watch

    async with Fragile(fake_config("--wedge-after", "0", max_restarts=0, stall_timeout=0.5)) as server:
        with trio.fail_after(5), pytest.raises(ServerError, match="the engine is wedged"):
            await server.make_request(CHAT)
    assert caplog.text.count("looking whether it is healthy has failed") == 1


async def test_an_entry_in_the_ledger_that_cannot_be_made_ends_no_engine(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trinfer.server.registration.EVERY", 0.05)
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    async with CustomServer(fake_config(server_log_folder="logs")) as server:
        await server.wait_ready()
        shutil.rmtree(folder)  # a relative path has no absolute form any more
        await trio.sleep(0.1)
        await server.make_request(CHAT)
        monkeypatch.setattr("trinfer.server.registration.pid_space", lambda: {}["nothing"])
        await trio.sleep(0.3)
        await server.make_request(CHAT)
    assert caplog.text.count("the ledger's entry could not be brought up to date") == 1


async def test_dropped_events_leave_nothing_behind():
    server = CustomServer(fake_config())
    before = len(server.lifecycle.observers)
    kept = server.events()
    for _ in range(100):
        server.events()  # as somebody does who looks for news once a second
    gc.collect()
    assert len(server.lifecycle.observers) == before + 1
    async with server:
        pass
    assert [event.after async for event in kept] == [ServerState.STARTING, ServerState.STOPPED]
    assert len(server.lifecycle.observers) == before


async def test_events_of_a_life_that_is_over_end_at_once():
    async with CustomServer(fake_config()) as server:
        await server.wait_ready()
    with trio.fail_after(1):
        assert [event async for event in server.events()] == []


async def test_a_log_on_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    """A pipe that nobody reads stands for a network disk that has gone."""
    monkeypatch.setattr(base, "LOG_FLUSH", 0.3)
    log = tmp_path / "server_rank_0.log"
    os.mkfifo(log)
    try:
        async with CustomServer(fake_config(server_log_folder=str(tmp_path))) as server:
            await server.wait_ready()
            began = trio.current_time()
        assert trio.current_time() - began < 2
    finally:
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go
        time.sleep(0.1)
        os.close(reader)


async def test_a_body_that_changes_the_working_directory_takes_the_log_nowhere_else(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    with contextlib.chdir(tmp_path):
        async with CustomServer(fake_config(server_log_folder="logs")) as server:
            await server.wait_ready()
            os.chdir("elsewhere")
            server.log.feed(b"last words\n")
        assert "last words" in (tmp_path / "logs" / "server_rank_0.log").read_text()
        assert not list((tmp_path / "elsewhere").iterdir())


async def test_an_engine_that_goes_into_the_background_is_told_to_stay():
    command = ["sh", "-c", "setsid sleep 60 --port {port} & exit 0"]
    async with CustomServer(
        InferenceConfig("custom", "m", model_kwargs={"server_command": command}, server_start_max_retries=0)
    ) as server:
        with pytest.raises(ServerError, match="exit code 0") as caught:
            await server.wait_ready()
        assert "background" in str(caught.value.cause)
        assert "foreground" in str(caught.value.advice)


async def test_an_engine_of_ones_own_is_told_its_key_by_the_environment_alone():
    show = 'echo "key: $TRINFER_API_KEY, port {port}"; exit 1'
    command = ["sh", "-c", show]
    config = InferenceConfig(
        "custom", "m", model_kwargs={"server_command": command}, api_key="s3cret", server_start_max_retries=0
    )
    async with CustomServer(config) as server:
        with pytest.raises(ServerError):
            await server.wait_ready()
        assert server.log.tail()[0].startswith("key: s3cret, port ")


@pytest.mark.parametrize("is_ready", [True, False])
async def test_requests_from_another_event_loop_are_refused_and_do_not_hang(is_ready):
    async def ask(server: InferenceServer, how: str) -> None:
        with trio.fail_after(5):
            if how == "stream":
                async for _ in server.stream_request(CHAT):
                    pass
            else:
                await {
                    "chat": lambda: server.make_request(CHAT),
                    "other": lambda: server.request("/v1/embeddings", {}),
                    "wait": server.wait_ready,
                }[how]()

    def elsewhere(server: InferenceServer, how: str) -> None:
        trio.run(ask, server, how)

    async with CustomServer(fake_config() if is_ready else fake_config("--never-ready")) as server:
        if is_ready:
            await server.make_request(CHAT)
        for how in ["chat", "stream", "other", *([] if is_ready else ["wait"])]:
            with pytest.raises(RuntimeError, match=r"runs in another trio.run\(\)"):
                await trio.to_thread.run_sync(elsewhere, server, how)
        assert server.requests_in_flight == 0
        if is_ready:  # the right way

            def from_here() -> str:
                return text_of(trio.from_thread.run(server.make_request, CHAT))

            assert await trio.to_thread.run_sync(from_here)


# -- draining ---------------------------------------------------------------------------------------------------------


async def test_a_drain_in_the_moment_of_a_crash_loses_nothing():
    config = fake_config("--latency", "0.3", max_restarts=3)
    answers = []
    async with CustomServer(config) as server:
        await server.wait_ready()
        events = server.events()

        async def ask() -> None:
            answers.append(text_of(await server.make_request(CHAT)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.sleep(0.1)
            os.kill(server.current_attempt.processes[0].engine_pid, signal.SIGKILL)
            async for event in events:
                if event.after is ServerState.RESTARTING:
                    break
            assert await server.drain(20)
    assert answers == ["echo: hello"] * 5


@pytest.mark.parametrize("when", ["loading", "streaming"])
async def test_a_drain_waits_for_streams(when):
    async with CustomServer(fake_config("--ready-after", "0.4", "--latency", "0.2")) as server:
        if when == "streaming":
            await server.wait_ready()
        chunks = []

        async def ask() -> None:
            chunks.extend([chunk async for chunk in server.stream_request(CHAT)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.1)
            assert server.requests_in_flight == 1
            assert await server.drain(10)
            assert chunks
        assert server.requests_in_flight == 0


async def test_streams_that_are_dropped_are_not_counted_any_more():
    async with CustomServer(fake_config()) as server:
        await server.wait_ready()
        stream = server.stream_request(CHAT)
        await anext(stream)
        assert server.requests_in_flight == 1
        del stream
        assert server.requests_in_flight == 0
        async with server.stream_request(CHAT) as stream:
            await anext(stream)
        assert server.requests_in_flight == 0


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import signal, sys, trio
from tests.engine_configs import fake_config
from trinfer import CustomServer
from trinfer.process import output, spawn

def arm(owner, name):
    original = getattr(owner, name)
    def interrupted(*args, **options):
        if armed:
            armed.clear()
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)
    setattr(owner, name, interrupted)

armed = []
arm(*{"stop": (spawn.GuardedProcess, "stop"), "hear": (spawn.GuardedProcess, "_hear"),
      "feed": (output.EngineLog, "feed")}[sys.argv[1]])

async def main():
    async with CustomServer(fake_config("--chatter", "100000")) as server:
        await server.wait_ready()
        armed.append(True)
        if sys.argv[1] == "feed":
            await trio.sleep_forever()

try:
    trio.run(main)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""


@pytest.mark.parametrize("where", ["stop", "hear", "feed"])
def test_ctrl_c_in_the_midst_of_the_background_comes_out_as_itself(where):
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, where],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stat = Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()
    mark = {"TRINFER_RUN_ID": f"{process.pid}-{stat[19].decode()}"}
    out, err = process.communicate(timeout=15)
    assert (out, err) == ("KeyboardInterrupt\n", "")
    assert marked_processes(mark) == []
