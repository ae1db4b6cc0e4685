"""What is known before a start, and that it ends the start."""

from __future__ import annotations

import os
import sys

import pytest
import trio

from tests.engine_configs import CHAT, fake_config
from trinfer import CustomServer, InferenceConfig, ServerError, VLLMServer
from trinfer.process import gpus
from trinfer.server import gpu_release, preflight
from trinfer.server.preflight import inspect_machine, thorough


def levels(findings, word: str) -> list[str]:
    return [found.level for found in findings if word in found.what]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("/nonexistent/model", ["error"]),
        ("./nonexistent", ["error"]),
        ("~/nonexistent-model", ["error"]),
        ("/", ["ok"]),
        ("Qwen/Qwen3-8B", []),
        ("gpt2", []),
        ("org/repo/file.gguf", ["warning"]),
        ("a name with spaces", ["warning"]),
    ],
)
def test_models(model, expected):
    findings = preflight.preflight(InferenceConfig("vllm", model))
    assert [found.level for found in findings if "model" in found.what or "neither" in found.what] == expected


def test_models_that_are_mere_names_are_not_looked_for():
    assert preflight.preflight(InferenceConfig("dummy", "/nonexistent")) == []
    assert preflight.preflight(fake_config()) == []


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("fields", "nodes", "expected"),
    [
        ({"tp": 2}, 1, ["ok"]),
        ({"tp": 2, "pp": 2}, 1, ["error"]),
        ({"tp": 2, "pp": 2}, 2, ["ok"]),
        ({"dp": 3}, 1, ["error"]),
        ({"tp": 2, "gpus": (0,)}, 1, ["error"]),
        ({"tp": 2, "gpus": (0, 1)}, 1, ["ok"]),
        ({"tp": 2, "env": {"CUDA_VISIBLE_DEVICES": "0"}}, 1, ["error"]),
        ({"tp": 1, "env": {"CUDA_VISIBLE_DEVICES": ""}}, 1, ["warning"]),
        ({"tp": 4, "model_kwargs": {"device": "cpu"}}, 1, []),
        ({"tp": 4, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}, 1, []),
    ],
)
def test_gpus_against_parallel_sizes(fields, nodes, expected):
    config = InferenceConfig("vllm", "m", **fields)
    assert levels(preflight.preflight(config, nodes=nodes), "GPUs") == expected


def test_without_a_driver_nothing_is_said_about_gpus(monkeypatch):
    monkeypatch.setattr(preflight, "gpu_count", lambda: None)
    assert levels(preflight.preflight(InferenceConfig("vllm", "m", tp=8)), "GPUs") == []


async def test_an_error_ends_the_start_before_anything_is_started():
    async with VLLMServer(InferenceConfig("vllm", "/nonexistent/model", server_start_max_retries=5)) as server:
        began = trio.current_time()
        with pytest.raises(ServerError, match="does not exist on this machine") as caught:
            await server.wait_ready()
        assert trio.current_time() - began < 0.5
        assert caught.value.advice == "check model_name_or_path"
        assert len(server.crash_reports) == 1


def test_everything_about_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = InferenceConfig("vllm", "org/name", server_log_folder=tmp_path / "logs" / "deep")
    findings = thorough(config, "a-program-that-is-not-there")
    assert levels(findings, "a-program-that-is-not-there") == ["error"]
    assert levels(findings, "will be downloaded") == ["warning"]
    assert len(levels(findings, "GiB free")) == 2
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    assert levels(thorough(config, sys.executable), "is in the cache") == ["ok"]
    assert levels(thorough(config, sys.executable), "the program") == ["ok"]


def test_offline_without_the_model(tmp_path):
    config = InferenceConfig("vllm", "org/name", env={"HF_HUB_OFFLINE": "1"})
    os.environ["HF_HOME"], before = str(tmp_path), os.environ.get("HF_HOME")
    try:
        assert levels(thorough(config, None), "HF_HUB_OFFLINE") == ["error"]
    finally:
        if before is None:
            del os.environ["HF_HOME"]
        else:
            os.environ["HF_HOME"] = before


def test_the_machine_has_limits():
    whats = " ".join(found.what for found in inspect_machine())
    assert "open files" in whats
    assert "/dev/shm" in whats


# -- the memory of GPUs between two engines ---------------------------------------------------------------------------


@pytest.fixture
def holding(tmp_path, monkeypatch):
    """An nvidia-smi that says what stands in a file."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/users 2>/dev/null || true\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu_release, "LOOKS", 0.02)
    assert gpus.has_nvidia_smi()
    return tmp_path / "users"


async def crash_holding(holding, server: CustomServer) -> None:
    await server.wait_ready()
    attempt = server.current_attempt
    assert attempt is not None
    assert attempt.known_pids
    holding.write_text("".join(f"{pid}, GPU-a, 4096\n" for pid in sorted(attempt.known_pids)))
    os.kill(attempt.processes[0].engine_pid, 9)


async def test_a_restart_waits_until_the_memory_is_free(holding):
    async with CustomServer(fake_config(max_restarts=1)) as server, trio.open_nursery() as nursery:
        await crash_holding(holding, server)

        async def free() -> None:
            await trio.sleep(1)
            holding.write_text("1, GPU-a, 100\n")  # somebody else's

        nursery.start_soon(free)
        began = trio.current_time()
        await server.make_request(CHAT)
        assert trio.current_time() - began >= 0.9


async def test_memory_that_is_never_free_is_an_error_that_names_who_holds_it(holding, monkeypatch):
    monkeypatch.setattr("trinfer.server.gpu_release.RELEASE_WAIT", 0.3)
    async with CustomServer(fake_config(max_restarts=1)) as server:
        await crash_holding(holding, server)
        with pytest.raises(ServerError, match=r"GPU memory is still held .*pid \d+ \(state gone\): 4096 MiB"):
            await server.make_request(CHAT)
