"""ps, gc, logs and doctor, as programs, with real engines, living and orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from tests.engine_configs import CHAT, fake_command, fake_config
from trinfer import CustomServer, InferenceConfig
from trinfer.process.identity import SERVER_VARIABLE, find_trees, pid_space, run_id, start_time
from trinfer.process.ledger import Entry, Ledger, entries
from trinfer.process.output import EngineLog

ROOT = Path(__file__).parent.parent.parent

# An owner that starts an engine with a guard, says who they are, and waits to be killed.
OWNER = """
import sys, trio
from tests.engine_configs import fake_config
from trinfer import CustomServer
async def main():
    config = fake_config(*sys.argv[2:], server_log_folder=sys.argv[1] or None)
    async with CustomServer(config) as server:
        await server.wait_ready()
        guarded = server.current_attempt.processes[0]
        print(guarded.process.pid, guarded._inner_pid, guarded.engine_pid, *server.marker.values(), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def trinfer(*arguments: object, **kwargs) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "trinfer", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **kwargs,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def own_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(tmp_path / "run"))


def own_server(out: str, server: str) -> dict:
    return next(entry for entry in json.loads(out) if entry["server"] == server)


async def ask(*arguments: object) -> tuple[int, str, str]:
    return await trio.to_thread.run_sync(lambda: trinfer(*arguments))


async def test_ps_shows_a_running_engine_and_forgets_it(tmp_path, monkeypatch):
    monkeypatch.setattr("trinfer.server.registration.EVERY", 0.05)
    async with CustomServer(fake_config(server_log_folder=tmp_path), rank=3) as server:
        await server.wait_ready()
        await server.make_request(CHAT)
        await trio.sleep(0.2)
        code, out, _ = await ask("ps", "--json")
        assert code == 0
        entry = own_server(out, server.marker[SERVER_VARIABLE])
        assert (entry["engine"], entry["rank"], entry["model"], entry["state"]) == ("custom", 3, "fake", "ready")
        assert entry["requests"] == 1
        assert entry["owner_pid"] == os.getpid()
        assert entry["owner_alive"] is True
        assert entry["address"] == f"port {server.port}"
        assert server.current_attempt is not None
        assert server.current_attempt.processes[0].engine_pid in entry["pids"]
        code, out, _ = await ask("ps")
        assert "custom:3" in out
        assert f"port {server.port}" in out
    _, out, _ = await ask("ps", "--json")
    assert not [entry for entry in json.loads(out) if entry["owner_pid"] == os.getpid()]


async def test_ps_counts_processes_that_have_lost_their_environment(monkeypatch):
    """As those of vLLM, which give themselves names and hold the GPUs."""
    monkeypatch.setattr("trinfer.server.registration.EVERY", 0.05)
    command = ["env", "-i", *fake_command()]
    config = InferenceConfig("custom", "fake", model_kwargs={"server_command": command}, shutdown_grace_sec=1.0)
    async with CustomServer(config) as server:
        await server.wait_ready()
        await trio.sleep(0.2)
        _, out, _ = await ask("ps", "--json")
        assert server.current_attempt is not None
        assert server.current_attempt.processes[0].engine_pid in own_server(out, server.marker[SERVER_VARIABLE])["pids"]


@pytest.mark.skipif(os.getuid() != 0, reason="a pid namespace of its own needs root")
def test_servers_of_another_container_are_left_alone(own_runtime):
    entry = Entry("abc", run_id(), "vllm", 0, "m", "ready", "", "", 1.0, space=pid_space())
    ledger = Ledger()
    ledger.write(entry)
    container = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable]
    done = subprocess.run(
        [*container, "-m", "trinfer", "gc", "--yes"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "nothing to do" in done.stdout
    subprocess.run([*container, "-c", "from trinfer.process.ledger import Ledger; Ledger().sweep()"], check=True)
    assert [found for _, found in entries()] == [entry]
    ledger.remove()


class Orphan:
    """An engine whose owner and guard were killed."""

    def __init__(self, *options: str) -> None:
        self.owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, "", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.owner.stdout is not None
        words = self.owner.stdout.readline().split()
        self.guard, self.engine = list(map(int, words[:2])), int(words[2])
        self.run, self.server = words[3:]

    def die(self) -> None:
        assert self.owner.stdout is not None
        # All at once, as when a control group is killed half: the guard has no time to clean up.
        for pid in self.guard:
            os.kill(pid, signal.SIGSTOP)
        self.owner.kill()
        for pid in self.guard:
            os.kill(pid, signal.SIGKILL)
        self.owner.wait()
        self.owner.stdout.close()

    def pids(self) -> list[int]:
        return next((tree.pids for tree in find_trees() if tree.server == self.server), [])


def test_gc_ends_orphans_and_nothing_else():
    orphan, healthy = Orphan("--daemon", "--own-session", "--respawning"), Orphan()
    # A process that says it is of the same server, but of a run that lives: this one.
    run = f"{os.getpid()}-{start_time(os.getpid())}"
    bystander = subprocess.Popen(
        ["sleep", "60"], env={**os.environ, "TRINFER_RUN_ID": run, "TRINFER_SERVER_ID": orphan.server}
    )
    try:
        code, out, _ = trinfer("gc")
        assert code == 0
        assert orphan.server not in out
        orphan.die()
        assert orphan.engine in orphan.pids()
        _, out, _ = trinfer("ps", "--json")
        entries = [entry for entry in json.loads(out) if entry["server"] == orphan.server]
        assert [entry["owner_alive"] for entry in entries] == [False]
        _, out, _ = trinfer("ps")
        assert f"{orphan.owner.pid} (gone)" in out

        code, out, _ = trinfer("gc")  # only shows
        assert code == 0
        assert f"whose owner {orphan.owner.pid} is gone" in out
        assert "nothing was done" in out
        assert Path(f"/proc/{orphan.engine}").exists()

        code, out, _ = trinfer("gc", "--yes")
        assert code == 0
        assert orphan.run not in {tree.run for tree in find_trees()}
        assert bystander.poll() is None
        assert healthy.owner.poll() is None
        assert healthy.engine in healthy.pids()
        _, out, _ = trinfer("gc")
        assert orphan.server not in out.replace(f"server {healthy.server}", "")
    finally:
        bystander.kill()
        bystander.wait()
        healthy.owner.terminate()
        healthy.owner.wait()
        healthy.owner.stdout.close()
        give_up = time.monotonic() + 5
        while healthy.pids() and time.monotonic() < give_up:
            time.sleep(0.02)


def test_logs(tmp_path):
    code, _, err = trinfer("logs", "nobody")
    assert code == 2
    assert "no server that runs here" in err
    folder = tmp_path / "logs"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), "--print", "one", "--print", "two", "--print-at-request", "1", "x"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    server = owner.stdout.readline().split()[4]
    try:
        for name in (server, server[:6], "custom:0"):
            code, out, _ = trinfer("logs", "-n", "3", name)
            assert code == 0
            assert out.splitlines() == ["one", "two", "Application startup complete."]
        follower = subprocess.Popen(
            [sys.executable, "-m", "trinfer", "logs", "-f", "-n", "1", server],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follower.stdout is not None
        assert follower.stdout.readline() == "Application startup complete.\n"
        log = next(folder.iterdir())
        with log.open("a") as file:
            file.write("added\n")
        assert follower.stdout.readline() == "added\n"
        log.rename(log.with_name(log.name + ".1"))
        log.write_text("after the rotation\n")
        assert follower.stdout.readline() == "after the rotation\n"
    finally:
        owner.terminate()
        owner.wait()
        owner.stdout.close()
    # Killed by SIGTERM, it has not taken its entry along; that its owner is gone is known all the same.
    assert follower.wait(10) == 0
    follower.stdout.close()


def test_nothing_is_missed_while_a_log_is_rotated_and_at_its_end(tmp_path):
    path = tmp_path / "engine.log"
    log = EngineLog(path, max_bytes=4096)
    ledger = Ledger()
    ledger.write(Entry("abc", run_id(), "vllm", 0, "m", "ready", "", str(path), 1.0))
    log._write(path, b"begin\n")
    follower = subprocess.Popen(
        [sys.executable, "-m", "trinfer", "logs", "-f", "abc"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    assert follower.stdout.readline() == "begin\n"
    number = 0
    for _ in range(3):
        written = []
        for _ in range(11):  # three files are full before anybody can look
            lines = [f"line {number + each} {'.' * 90}\n" for each in range(10)]
            number += 10
            log._write(path, "".join(lines).encode())
            written += lines
        assert [follower.stdout.readline() for _ in written] == written
    log._write(path, b"the end\n")
    ledger.remove()
    assert follower.stdout.readlines() == ["the end\n"]
    assert follower.wait(10) == 0
    assert path.with_name("engine.log.3").exists()
    follower.stdout.close()


def test_logs_of_a_server_that_keeps_none():
    owner = subprocess.Popen([sys.executable, "-c", OWNER, ""], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    server = owner.stdout.readline().split()[4]
    code, _, err = trinfer("logs", server)
    owner.terminate()
    owner.wait()
    owner.stdout.close()
    assert code == 2
    assert "keeps no log" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 0, "open files"),
        (("--engine", "dummy"), 0, "[ok]"),
        (("--engine", "vllm", "--model", "/nonexistent"), 3, "does not exist on this machine"),
        (("--engine", "llamacpp", "--model", "nope.gguf"), 3, "does not exist on this machine"),
        (("--engine", "vllm", "--model", "m", "--executable", "/nonexistent/vllm"), 3, "is not on PATH"),
        (("--engine", "vllm"), 2, ""),
        (("--engine", "vllm", "--model", "m", "--tp", "0"), 2, ""),
        (("--engine", "nonsense"), 2, ""),
        (("--model", "m"), 2, ""),
        (("--tp", "8"), 2, ""),
    ],
)
def test_doctor(arguments, code, words):
    got, out, err = trinfer("doctor", *arguments)
    assert got == code, err
    assert words in out
    if code == 3:
        _, out, _ = trinfer("doctor", *arguments, "--json")
        assert [found for found in json.loads(out)["findings"] if found["level"] == "error"]


def test_a_runtime_folder_that_is_not_private_is_an_error_of_the_user(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    for command in ("ps", "gc"):
        code, _, err = trinfer(command)
        assert code == 2
        assert "is not private" in err
