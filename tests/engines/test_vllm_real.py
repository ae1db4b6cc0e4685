"""A real vLLM (a CPU build, see `install_engines.sh`) on a tiny model: four processes, a unix socket, a key, an end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import httpx
import pytest
import trio

from tests.engines import real
from trinfer import InferenceConfig, InferenceError, InferenceResult, ServerError, ServerState, VLLMServer
from trinfer.engines.address import own_address
from trinfer.process.addresses import lease_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KEY = "sk-vllm-secret"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return real.make_hugging_face_model("vllm", tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def config(model):
    return {
        "model_name_or_path": str(model),
        "model_max_context": 512,
        "served_model_name": "tiny",
        "executable": str(real.python_of("vllm").with_name("vllm")),
        "env": {**real.environ(), "VLLM_CPU_KVCACHE_SPACE": "1"},
        # A small KV cache: to fill that of a gibibyte takes a third of the start.
        "model_kwargs": {
            "enforce_eager": True,
            "dtype": "float32",
            "max_num_seqs": 4,
            "num_gpu_blocks_override": 64,
        },
        "default_generation_params": {"max_tokens": 8, "temperature": 0},
        "request_timeout": 120,
        "server_ready_max_attempts": 240,
        "server_ready_delay_sec": 1,
        "server_start_max_retries": 0,
        "shutdown_grace_sec": 20,
    }


@pytest.fixture(autouse=True)
def nothing_in_shared_folders():
    """Sockets, shared memory and semaphores of vLLM's processes, which are killed here, are gone in the end."""
    before = shared_files()
    yield
    give_up = time.monotonic() + 1
    while left := shared_files() - before:
        assert time.monotonic() < give_up, left
        time.sleep(0.02)


def shared_files():
    sockets = {f"/tmp/{name}" for name in os.listdir("/tmp") if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4,12}){4}", name)}
    return sockets | {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}


async def test_vllm_serves_on_a_unix_socket_and_the_death_of_its_core_is_mended_as_often_as_allowed(config):
    # In one test, since each start takes half a minute; that a healthy one ends well, the test of two nodes shows.
    async with VLLMServer(InferenceConfig("vllm", api_key=KEY, **config, max_restarts=1)) as server:
        await server.wait_ready()
        assert server.uds is not None
        assert server.port is None
        assert server.get_base_url().startswith("http+unix://")
        socket = server.uds

        chat = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        assert chat["model"] == "tiny"
        assert 1 <= InferenceResult.from_response(chat).completion_tokens <= 8

        # Cancelled requests leave the engine in order: it aborts them, and serves the next.
        with trio.move_on_after(0.5) as scope:
            await server.make_request({"messages": [{"role": "user", "content": "?"}], "max_tokens": 480})
        again = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        assert InferenceResult.from_response(again).completion_tokens >= 1
        assert scope.cancel_called

        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=socket)) as stranger:
            refused = await stranger.get("http://localhost/v1/models")
            assert refused.status_code == 401

        tree = tree_of(server)
        assert len(tree) >= 3  # API server, engine core, worker
        for pid in tree:
            with open(f"/proc/{pid}/cmdline") as line:
                assert KEY not in line.read()

        kill_core(server)
        with trio.fail_after(120):
            while server.state is ServerState.READY:
                await trio.sleep(0.05)
            assert server.state is ServerState.RESTARTING
            # Asked while the engine is down: a slow request, and no failure.
            answer = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        assert InferenceResult.from_response(answer).completion_tokens >= 1
        assert server.restarts == 1
        tree += tree_of(server)
        kill_core(server)
        with pytest.raises(ServerError, match="the engine ended while serving"):
            await ask_for_ever(server)
    assert server.state is ServerState.STOPPED
    assert not any(os.path.exists(f"/proc/{pid}") for pid in tree)
    assert not os.path.exists(socket)


async def test_a_start_that_fails_is_explained(config):
    config["model_max_context"] = 99_999
    async with VLLMServer(InferenceConfig("vllm", transport="tcp", **config)) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert caught.value.returncode == 1
    assert "longer than the model allows" in str(caught.value.cause)
    assert caught.value.advice == "lower model_max_context to 2048"


async def test_leaving_while_it_loads_leaves_nothing(config):
    """vLLM ignores SIGTERM while its engine core starts, and its processes outlive it: the guard has to end them."""
    config["shutdown_grace_sec"] = 2
    async with VLLMServer(InferenceConfig("vllm", **config)) as server:
        with trio.fail_after(120):
            while len(tree := tree_of(server)) < 2:  # the engine core has been started
                await trio.sleep(0.05)
        began = trio.current_time()
    assert trio.current_time() - began < 2 + 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in tree)


def kill_core(server):
    (core,) = [pid for pid in tree_of(server) if "EngineCore" in title_of(pid)]
    os.kill(core, signal.SIGKILL)


async def test_two_nodes_are_one_engine(config, monkeypatch):
    """Both on this machine: half of the model's tensors on each."""
    address = await own_address("192.0.2.1") or "127.0.0.1"
    lease = lease_port(host="127.0.0.1")
    config.update(tp=2, master_port=lease.port, shutdown_grace_sec=5)
    config["env"]["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    settings = InferenceConfig("vllm", **config)
    monkeypatch.setenv("DATATROVE_NODE_IPS", f"{address},{address}")
    async with trio.open_nursery() as nursery:
        worker = VLLMServer(settings)

        async def run_worker():
            async with worker:
                pass

        monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
        nursery.start_soon(run_worker)
        with trio.fail_after(20):
            while not tree_of(worker):
                await trio.sleep(0.01)
        monkeypatch.setenv("DATATROVE_NODE_RANK", "0")
        async with VLLMServer(settings) as head:
            answer = await head.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
            tree = tree_of(head) + tree_of(worker)
            assert sum("Worker" in title_of(pid) for pid in tree) == 2
            socket = head.uds
            assert socket is not None
            began = trio.current_time()
        assert trio.current_time() - began < 25
        assert head.state is ServerState.STOPPED
        assert not os.path.exists(socket)
        # vLLM's headless node does not notice that its head has gone.
        nursery.cancel_scope.cancel()
    lease.release()
    assert InferenceResult.from_response(answer).completion_tokens >= 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in tree)


async def ask_for_ever(server):
    with trio.fail_after(60):
        while True:  # until the engine is known to be down, requests fail one by one
            with contextlib.suppress(InferenceError):
                await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
            await trio.sleep(0.1)


def tree_of(server):
    attempt = server._supervisor.attempt
    return [pid for guarded in attempt.processes for pid in guarded.tree()] if attempt else []


def title_of(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as line:
            return line.read()
    except OSError:
        return ""
