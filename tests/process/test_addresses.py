"""Ports and sockets that no two processes take."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.trees import ROOT
from trinfer import ConfigError, ServerError
from trinfer.process import addresses
from trinfer.process.addresses import (
    ephemeral_range,
    lease_port,
    lease_socket,
    owns_listener,
    runtime_dir,
    tcp_listeners,
)


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory, monkeypatch):
    # Short, for the sockets in it.
    folder = Path(f"/tmp/tri-a{os.getpid()}")
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(folder))
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_leased_ports_are_different_and_outside_the_ephemeral_range():
    leases = [lease_port(host="127.0.0.1", rank=rank) for rank in range(50)]
    ports = {lease.port for lease in leases}
    assert len(ports) == 50
    assert not ports & set(ephemeral_range())
    for lease in leases:
        lease.release()
        lease.release()


def test_a_released_port_can_be_leased_again(monkeypatch):
    monkeypatch.setattr(addresses, "_candidates", lambda start, ephemeral: iter([23456]))
    first = lease_port(host="127.0.0.1")
    with pytest.raises(ServerError, match="no free port"):
        lease_port(host="127.0.0.1")
    first.release()
    lease_port(host="127.0.0.1").release()
    with pytest.raises(ServerError, match="no free port"):
        lease_port(host="127.0.0.1", avoid={23456})


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_somebody_listens_on_is_not_leased(monkeypatch, bound, reuse):
    with socket.socket() as server:
        if reuse:  # as vLLM does
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((bound, 0))
        server.listen()
        port = server.getsockname()[1]
        monkeypatch.setattr(addresses, "_candidates", lambda start, ephemeral: iter([port]))
        with pytest.raises(ServerError, match="no free port"):
            lease_port(host="127.0.0.1")


LEASER = """
import sys
from trinfer.process import addresses
addresses._candidates = lambda start, ephemeral: iter(range(24000, 24200))
leases = [addresses.lease_port(host="127.0.0.1") for _ in range(40)]
print(*[lease.port for lease in leases], flush=True)
sys.stdin.read()
"""


def test_processes_that_lease_at_the_same_time_get_different_ports():
    processes = [
        subprocess.Popen([sys.executable, "-c", LEASER], cwd=ROOT, stdin=-1, stdout=-1, text=True) for _ in range(4)
    ]
    ports: list[str] = []
    for process in processes:
        assert process.stdout is not None
        ports += process.stdout.readline().split()
    assert len(ports) == len(set(ports)) == 160
    processes[0].kill()  # the kernel gives its leases back
    processes[0].wait()
    lease = subprocess.run(
        [sys.executable, "-c", LEASER], cwd=ROOT, input="", stdout=-1, text=True, check=True
    ).stdout.split()
    assert len(set(lease) - set(ports[40:])) == 40
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_candidates_wrap_around_and_are_200():
    for start in (3000, 32767, 65535, 65535 * 2):
        ports = list(addresses._candidates(start, range(32768, 61000)))
        assert len(set(ports)) == 200
        assert all(3000 <= port <= 65535 and not 32768 <= port < 61000 for port in ports)
    assert len(list(addresses._candidates(5, range(1024, 65536)))) == 200


def test_the_runtime_folder_is_private(runtime: Path, monkeypatch):
    assert runtime_dir() == runtime
    assert runtime.stat().st_mode & 0o777 == 0o700
    runtime.chmod(0o755)
    with pytest.raises(ConfigError, match="not private"):
        runtime_dir()
    runtime.chmod(0o700)
    link = Path(f"{runtime}-link")
    link.symlink_to(runtime)
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(link))
    try:
        with pytest.raises(ConfigError, match="not private"):
            lease_socket()
    finally:
        link.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user needs root")
def test_the_folder_of_another_user_is_refused(runtime: Path):
    runtime.mkdir(mode=0o700)
    os.chown(runtime, 12345, -1)
    with pytest.raises(ConfigError, match="not private"):
        lease_port(host="127.0.0.1")


def test_sockets_have_folders_of_their_own_which_go_with_them():
    first, second = lease_socket(), lease_socket()
    assert first.path != second.path
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(first.path)
    assert Path(first.path).parent.stat().st_mode & 0o777 == 0o700
    for lease in (first, second):
        lease.release()
        lease.release()
        assert not Path(lease.path).parent.exists()


def test_folders_of_dead_owners_are_swept(runtime: Path):
    mine = lease_socket()
    code = (
        "import os; from trinfer.process.addresses import lease_socket;"
        "print(lease_socket().path, flush=True); os.abort()"
    )
    dead = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=-1, text=True, check=False).stdout.strip()
    assert Path(dead).parent.exists()
    other = lease_socket()
    assert not Path(dead).parent.exists()
    assert Path(mine.path).parent.exists()
    for lease in (mine, other):
        lease.release()


def test_a_path_that_is_too_long_for_a_socket_is_told(runtime: Path, monkeypatch):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(runtime / ("long" * 30)))
    with pytest.raises(ConfigError, match="too long"):
        lease_socket()
    assert list((runtime / ("long" * 30) / "sockets").glob("tmp*")) == []


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_who_listens(family):
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1" if family is socket.AF_INET else "::1", 0))
        port = server.getsockname()[1]
        assert owns_listener([os.getpid()], port) is None
        server.listen()
        assert tcp_listeners(port) == {os.stat(f"/proc/self/fd/{server.fileno()}").st_ino}
        assert owns_listener([os.getpid()], port) is True
        assert owns_listener([], port) is False
        code = (
            "import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1);"
            f"s.bind(('127.0.0.1', {port})); s.listen(); print(flush=True); sys.stdin.read()"
        )
        if family is socket.AF_INET6:
            return
        # Another program shares the port: then no answer can be trusted.
        other = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        assert owns_listener([os.getpid()], port) is False
        assert owns_listener([os.getpid(), other.pid], port) is True
        other.stdin.close()
        other.stdout.close()
        other.wait()


@pytest.mark.parametrize("folder", ["/proc/nothing/here", "/dev/null/x"])
def test_a_runtime_folder_that_cannot_be_made_is_an_error_of_the_config(monkeypatch, folder):
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", folder)
    with pytest.raises(ConfigError, match="cannot be made"):
        runtime_dir()
