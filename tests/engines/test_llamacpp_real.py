"""A real llama.cpp engine on a tiny random model, made on the spot: start, requests, refusals, end."""

from __future__ import annotations

import dataclasses
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import trio

from tests import models
from trinfer import (
    BadRequestError,
    ContextLengthError,
    InferenceConfig,
    InferenceResult,
    LlamaCppServer,
    ServerError,
    ServerState,
    create_server,
)
from trinfer.engines import llamacpp_runner
from trinfer.process.addresses import lease_port

pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed: pip install 'trinfer[test]'")
pytestmark = pytest.mark.engine

CONTEXT = 512
LLAMA_SERVER = shutil.which("llama-server")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'trinfer[test]'")
    return models.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def config(model, monkeypatch):
    # A llama-server of this machine would be taken instead of the package, with other words in its log.
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    return InferenceConfig(
        "llamacpp",
        str(model),
        model_max_context=CONTEXT,
        served_model_name="tiny",
        default_generation_params={"max_tokens": 8, "temperature": 0, "seed": 1},
        request_timeout=60,
        server_ready_max_attempts=60,
        server_ready_delay_sec=1,
        server_start_max_retries=0,
        shutdown_grace_sec=5,
        model_kwargs={"threads": 1},
    )


def changed(config, **fields):
    return dataclasses.replace(config, **fields)


async def test_completions_and_chat(config):
    async with create_server(config) as server:
        assert isinstance(server, LlamaCppServer)
        chat = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        assert server.state is ServerState.READY
    async with LlamaCppServer(changed(config, use_chat=False)) as server:
        first = await server.make_request({"prompt": "Hello"})
        again = await server.make_request({"prompt": "Hello"})
        short = await server.make_request({"prompt": "Hello", "max_tokens": 2})
    assert server.state is ServerState.STOPPED
    assert chat["model"] == first["model"] == "tiny"
    assert 1 <= InferenceResult.from_response(chat).completion_tokens <= 8
    assert InferenceResult.from_response(first).text == InferenceResult.from_response(again).text
    assert InferenceResult.from_response(short).completion_tokens <= 2


async def test_more_requests_than_slots_are_all_answered(config):
    answers = []
    async with LlamaCppServer(changed(config, use_chat=False)) as server:
        async with trio.open_nursery() as nursery:
            for number in range(12):

                async def ask(number=number):
                    answers.append(await server.make_request({"prompt": f"Number {number}"}))

                nursery.start_soon(ask)
        with trio.fail_after(10):  # llama.cpp writes its log in a thread of its own, when it finds the time
            while "n_slots = 4, n_ctx_slot = 512" not in "\n".join(server.log.tail(200)):
                await trio.sleep(0.05)
    assert len(answers) == 12


async def test_one_request_may_use_the_whole_context_and_no_more(config):
    config = changed(config, use_chat=False)
    async with LlamaCppServer(config) as server:
        fits = await server.make_request({"prompt": "x" * (CONTEXT - 30)})
        with pytest.raises(BadRequestError) as caught:
            await server.make_request({"prompt": "x" * (CONTEXT + 30)})
    assert InferenceResult.from_response(fits).prompt_tokens > CONTEXT - 40
    assert isinstance(caught.value, ContextLengthError), caught.value
    assert caught.value.status == 400


async def test_the_key_is_asked_for_and_stands_in_no_command_line(config):
    secret = "sk-llama-secret"
    async with LlamaCppServer(changed(config, api_key=secret, use_chat=False)) as server:
        await server.make_request({"prompt": "Hello"})
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                try:
                    with open(f"/proc/{pid}/cmdline") as line:
                        assert secret not in line.read()
                except OSError:
                    continue
        stranger = InferenceConfig(
            "endpoint", endpoint_url=server.get_base_url(), server_start_max_retries=0, api_key="wrong"
        )
        async with create_server(stranger) as endpoint:
            with pytest.raises(ServerError, match="refuses the API key") as caught:
                await endpoint.wait_ready()
    assert "api_key" in str(caught.value.advice)
    assert secret not in "\n".join(server.log.tail(200))


async def test_a_key_from_the_shell_is_known_to_the_client_too(config, monkeypatch):
    monkeypatch.setenv("LLAMA_API_KEY", "sk-of-the-shell")
    async with LlamaCppServer(config) as server:
        await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})


@pytest.mark.parametrize("path", ["/nowhere/x.gguf", "nowhere/x.gguf", "x.gguf"])
async def test_a_wrong_path_is_told_before_anything_is_started(config, path):
    async with LlamaCppServer(changed(config, model_name_or_path=path)) as server:
        with pytest.raises(ServerError, match=rf"the model {re.escape(path)} does not exist on this machine"):
            await server.wait_ready()
        assert server.log.tail() == ()


async def test_a_wrong_name_is_told_at_once(config):
    began = trio.current_time()
    async with LlamaCppServer(changed(config, model_name_or_path="org/name-GGUF:Q4_K_M")) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert trio.current_time() - began < 10
    assert caught.value.returncode == 1
    assert "no such model" in str(caught.value.cause)
    assert "org/name-GGUF:Q4_K_M" in "\n".join(caught.value.log_tail)


async def test_a_broken_file_is_told(config, model, tmp_path):
    broken = tmp_path / "half.gguf"
    broken.write_bytes(model.read_bytes()[:200_000])
    async with LlamaCppServer(changed(config, model_name_or_path=str(broken))) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert "incomplete or corrupt" in str(caught.value.cause)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [({"no_such_option": 1}, "--no-such-option=1"), ({"n_batch": "many"}, "--n-batch=many")],
)
async def test_an_unknown_option_is_told(config, kwargs, word):
    async with LlamaCppServer(changed(config, model_kwargs=kwargs)) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert word in str(caught.value.advice)


async def test_more_options_reach_llama_cpp(config):
    kwargs = {"threads": 1, "parallel": 2, "ubatch_size": 64, "n_batch": 128, "warmup": False, "metrics": True}
    async with LlamaCppServer(changed(config, model_kwargs=kwargs)) as server:
        await server.wait_ready()
        log = "\n".join(server.log.tail(200))
    assert "n_slots = 2, n_ctx_slot = 512" in log


async def test_a_killed_engine_is_an_error_with_its_last_words(config):
    config = changed(config, use_chat=False, model_max_context=2000, max_restarts=0)
    async with LlamaCppServer(config) as server:
        await server.wait_ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_soon, server)
            with pytest.raises(ServerError) as caught:
                # ignore_eos: it would be busy for a while.
                await server.make_request({"prompt": "Hello", "max_tokens": 1900, "ignore_eos": True})
    assert caught.value.returncode == -signal.SIGKILL
    assert caught.value.log_tail
    assert "SIGKILL" in str(caught.value.cause)


async def test_a_killed_engine_is_started_again_and_answers_what_was_under_way(config):
    config = changed(config, use_chat=False, model_max_context=2000)
    async with LlamaCppServer(config) as server:
        await server.wait_ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_soon, server)
            answer = await server.make_request({"prompt": "Hello", "max_tokens": 1900, "ignore_eos": True})
        assert InferenceResult.from_response(answer).completion_tokens == 1900
        assert server.restarts == 1


async def kill_soon(server):
    await trio.sleep(0.05)
    for guarded in server._supervisor.attempt.processes:
        os.kill(guarded.engine_pid, signal.SIGKILL)


class Runner:
    """The runner as a bare process, to look at it without the server's patience."""

    def __init__(self, model, *, context=CONTEXT):
        self.lease = lease_port(host="127.0.0.1")
        words = ["--model", model, "--alias", "tiny", "--host", "127.0.0.1", "--port", self.lease.port]
        words += ["--ctx-size", context, "--threads", 1]
        self.process = subprocess.Popen(
            [sys.executable, "-P", llamacpp_runner.__file__, *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.lease.release()

    def status(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.lease.port, timeout=5)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def until(self, *wanted):
        give_up = time.monotonic() + 30
        while (status := self.status()) not in wanted:
            assert time.monotonic() < give_up
        return status


def test_it_answers_503_while_it_loads(model):
    # A context of many tokens takes a moment to allocate; on a busy machine a single try might still look too late.
    for _ in range(5):
        with Runner(model, context=2**18) as runner:
            first = runner.until(503, 200)
            assert runner.until(200) == 200
        if first == 503:
            return
    pytest.fail("503 was never seen")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["loading", "serving"])
def test_a_signal_ends_it_at_once(model, number, moment):
    with Runner(model) as runner:
        if moment == "serving":
            runner.until(200)
        else:
            time.sleep(0.05)
        began = time.monotonic()
        runner.process.send_signal(number)
        # In its very first moments Python itself still handles SIGINT, and ends with 1 or -2 by its own choice.
        assert runner.process.wait(10) in {-number, 1}
        assert time.monotonic() - began < 2


@pytest.mark.skipif(LLAMA_SERVER is None, reason="llama-server, ten minutes to build, is not on PATH")
async def test_llama_server_itself(config):
    """All else here is tested with the package, which has the same server."""
    kwargs = {"parallel": 2, "threads": 1, "n_gpu_layers": 0, "warmup": False}
    config = changed(config, executable=LLAMA_SERVER, model_kwargs=kwargs, api_key="sk-llama-secret")
    async with LlamaCppServer(config) as server:
        chat = await server.make_request({"messages": [{"role": "user", "content": "Hello?"}]})
        chunks = [chunk async for chunk in server.stream_request({"messages": [{"role": "user", "content": "Hello?"}]})]
        with pytest.raises(ContextLengthError):
            await server.make_request({"messages": [{"role": "user", "content": "x" * (CONTEXT + 30)}]})
    assert chat["model"] == "tiny"
    assert len(chunks) > 1
    with pytest.raises(ServerError) as caught:
        async with LlamaCppServer(changed(config, model_kwargs={"no_such_option": True})) as server:
            await server.wait_ready()
    assert "--no-such-option" in str(caught.value.advice)
