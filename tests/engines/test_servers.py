"""What the engines' servers do besides building a command line: nodes, leased ports, GPUs, keys; with stand-ins."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio

import trinfer
from trinfer import InferenceConfig, SGLangServer, VLLMServer, create_server
from trinfer.engines import sglang
from trinfer.engines.address import own_address
from trinfer.engines.keys import engine_key
from trinfer.process.addresses import lease_port

# Prints what it was given, and stays or ends well.
STAND_IN = """#!{python}
import json, os, sys, time
print("GIVEN " + json.dumps([sys.argv, dict(os.environ)]), flush=True)
time.sleep({stay})
"""


@pytest.fixture
def stand_in(tmp_path):
    def make(stay=0):
        program = tmp_path / f"engine-{stay}"
        program.write_text(STAND_IN.format(python=sys.executable, stay=stay))
        program.chmod(0o755)
        return str(program)

    return make


def given(server):
    """Arguments and environment that the stand-in has reported."""
    line = next((line for line in server.log.tail(200) if line.startswith("GIVEN ")), None)
    return json.loads(line.removeprefix("GIVEN ")) if line else None


async def until_given(server):
    with trio.fail_after(20):
        while (found := given(server)) is None:
            await trio.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"server_type": "vllm", "model_name_or_path": "m"}, "VLLMServer"),
        ({"server_type": "sglang", "model_name_or_path": "m"}, "SGLangServer"),
        ({"server_type": "llamacpp", "model_name_or_path": "m"}, "LlamaCppServer"),
        ({"server_type": "transformers", "model_name_or_path": "m"}, "TransformersServer"),
        ({"server_type": "custom", "model_kwargs": {"server_script": "s.py"}}, "CustomServer"),
        ({"server_type": "dummy"}, "DummyServer"),
        ({"server_type": "endpoint", "endpoint_url": "http://h:1"}, "EndpointServer"),
    ],
)
def test_create_server_knows_every_type(fields, name):
    config = InferenceConfig(**fields)
    server = create_server(config, rank=3)
    assert type(server) is getattr(trinfer, name)
    assert server.config is config
    assert server.rank == 3
    assert server.engine_name == config.server_type


@pytest.mark.parametrize("explicit", [None, "10.9.9.9"])
async def test_a_vllm_worker_node_announces_its_address(stand_in, monkeypatch, explicit):
    monkeypatch.setenv("DATATROVE_NODE_RANK", "1")
    monkeypatch.setenv("DATATROVE_NODE_IPS", "192.0.2.1,192.0.2.2")
    if explicit:
        monkeypatch.setenv("VLLM_HOST_IP", explicit)
    config = InferenceConfig("vllm", "m", tp=2, executable=stand_in(), shutdown_grace_sec=1)
    server = VLLMServer(config)
    async with server as nothing:
        assert nothing is None
    words, environ = given(server)
    assert words[words.index("--master-addr") + 1] == "192.0.2.1"
    assert "--headless" in words
    assert environ.get("VLLM_HOST_IP") == (explicit or await own_address("192.0.2.1"))


@pytest.mark.parametrize(
    ("model_kwargs", "is_private"),
    [
        ({}, True),
        ({"distributed_executor_backend": "mp", "kv_transfer_config": None}, True),
        ({"distributed_executor_backend": "ray"}, False),  # its workers on other nodes get the variable too
        ({"data-parallel-backend": "ray"}, False),
        ({"kv_transfer_config": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}}, False),
        ({"kv_transfer_config.kv_connector": "MooncakeStoreConnector"}, False),  # names of more than 36 characters
    ],
)
async def test_vllms_sockets_are_in_a_folder_that_goes_with_the_attempt(stand_in, model_kwargs, is_private):
    config = InferenceConfig("vllm", "m", executable=stand_in(60), model_kwargs=model_kwargs, shutdown_grace_sec=1)
    async with VLLMServer(config) as server:
        _, environ = await until_given(server)
        folder = environ.get("VLLM_RPC_BASE_PATH")
        assert (folder is not None) == is_private
        assert folder is None or Path(folder).stat().st_mode & 0o077 == 0
    assert folder is None or not Path(folder).exists()


@pytest.mark.parametrize("kind", ["too long", "not to be written"])
async def test_vllm_starts_also_where_it_can_have_no_folder_for_its_sockets(stand_in, tmp_path, monkeypatch, kind):
    folder = tmp_path / ("x" * 90 if kind == "too long" else "r")
    folder.mkdir(mode=0o700)
    (folder / "ports").mkdir()
    if kind != "too long":
        (folder / "sockets").write_text("")
    monkeypatch.setenv("TRINFER_RUNTIME_DIR", str(folder))
    config = InferenceConfig("vllm", "m", executable=stand_in(60), transport="tcp", shutdown_grace_sec=1)
    async with VLLMServer(config) as server:
        _, environ = await until_given(server)
    assert "VLLM_RPC_BASE_PATH" not in environ
    assert server.failure is None


async def test_two_sglang_engines_on_one_machine_get_ports_of_their_own(stand_in):
    config = InferenceConfig("sglang", "m", executable=stand_in(60), shutdown_grace_sec=1, gpus=(2, "GPU-77"))
    async with SGLangServer(config) as first, SGLangServer(config) as second:
        reports = [await until_given(first), await until_given(second)]
        own_ports = [first.port, second.port]
    ports = [words[words.index(option) + 1] for words, _ in reports for option in ("--port", "--nccl-port")]
    assert len(set(ports)) == 4
    assert [int(ports[0]), int(ports[2])] == own_ports
    assert {environ["CUDA_VISIBLE_DEVICES"] for _, environ in reports} == {"2,GPU-77"}


async def test_sglangs_second_port_is_given_back(stand_in, monkeypatch):
    released = []

    class Remembering:
        def __init__(self, **kwargs):
            self._lease = lease_port(**kwargs)
            self.port = self._lease.port

        def release(self):
            released.append(self.port)
            self._lease.release()

    monkeypatch.setattr(sglang, "lease_port", Remembering)
    async with SGLangServer(InferenceConfig("sglang", "m", executable=stand_in(60), shutdown_grace_sec=1)) as server:
        words, _ = await until_given(server)
        assert not released
    assert released == [int(words[words.index("--nccl-port") + 1])]


def test_client_and_engine_agree_on_the_key(monkeypatch):
    name = "VLLM_API_KEY"
    monkeypatch.delenv(name, raising=False)

    def key(**fields):
        return engine_key(InferenceConfig("vllm", "m", **fields), name)

    assert key() is None
    assert key(env={name: "of-config-env"}) == "of-config-env"
    monkeypatch.setenv(name, "of-shell")
    assert key() == "of-shell"
    assert key(env={name: "of-config-env"}) == "of-config-env"
    assert key(env={name: ""}) is None
    assert key(api_key="of-config", env={name: "of-config-env"}) == "of-config"


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "localhost", "no-such-host.invalid", "", "192.0.2.1 x"])
async def test_there_is_no_own_address_on_the_way_to_oneself_or_to_nowhere(peer):
    assert await own_address(peer) is None


async def test_own_address_is_one_of_this_machine():
    found = await own_address("192.0.2.1")
    if found is not None:  # else it has no route to the outside
        for listener in await trio.open_tcp_listeners(0, host=found):
            await listener.aclose()


async def test_a_script_is_started_as_the_reference_does(tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(STAND_IN.format(python="", stay=60).replace("flush=True", ""))
    config = InferenceConfig("custom", model_kwargs={"server_script": str(script), "max_len": 3}, shutdown_grace_sec=1)
    async with create_server(config) as server:
        # Without a flush of its own: its output is not kept back.
        words, _ = await until_given(server)
        assert words == [str(script), "--port", str(server.port), "--max_len=3"]


def test_the_programs_that_stand_alone_import_nothing_of_trinfer():
    folder = Path(trinfer.__file__).parent / "engines"
    for name in ("sglang_launcher.py", "llamacpp_runner.py"):
        assert "trinfer" not in "\n".join(
            line for line in (folder / name).read_text().splitlines() if line.startswith(("import", "from"))
        )
