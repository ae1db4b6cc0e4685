"""What is known before a start, and that it ends the start."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

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
        assert levels(preflight.preflight(config), "HF_HUB_OFFLINE") == ["error"]
        elsewhere = [
            replace(config, server_type="llamacpp"),
            replace(config, model_kwargs={"download-dir": "/models"}),
            replace(config, env={**config.env, "VLLM_USE_MODELSCOPE": "1"}),
            replace(config, model_name_or_path="s3://bucket/org/name"),
        ]
        for other in elsewhere:
            assert levels(preflight.preflight(other), "HF_HUB_OFFLINE") == []
    finally:
        if before is None:
            del os.environ["HF_HOME"]
        else:
            os.environ["HF_HOME"] = before


def test_the_machine_has_limits():
    whats = " ".join(found.what for found in inspect_machine())
    assert "open files" in whats
    assert "/dev/shm" in whats


@pytest.mark.parametrize("text", ["exit 9", "exec sleep 60"])
def test_an_nvidia_smi_that_fails_or_hangs_is_told(tmp_path, monkeypatch, text):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "TIMEOUT", 0.3)
    assert levels(inspect_machine(), "nvidia-smi is there, but it fails or does not answer") == ["warning"]


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


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
DEVICES = "0, GPU-a, NVIDIA X, 8000, 100, 570.1\n1, GPU-b, NVIDIA X, 8000, 7000, 570.1\n"
SHORT = ("--print", OUT_OF_MEMORY, "--crash-at", "before-bind")


async def test_a_lack_of_memory_names_who_else_holds_it(holding, monkeypatch):
    monkeypatch.setattr("trinfer.server.gpu_release.RELEASE_WAIT", 0.3)
    # Little is nobody's fault, and a GPU that is not ours is not asked about.
    holding.write_text(f"{DEVICES}4711, GPU-a, 7000\n4712, GPU-a, 30\n4713, GPU-b, 7000\n")
    async with CustomServer(fake_config(*SHORT, gpus=(0,))) as server:
        with pytest.raises(ServerError) as caught:
            await server.wait_ready()
    assert "others hold GPU memory: pid 4711 (state gone): 7000 MiB" in str(caught.value)
    assert "4712" not in str(caught.value)
    assert "4713" not in str(caught.value)


async def test_the_next_start_waits_for_others_to_leave_but_not_for_ever(holding, tmp_path, monkeypatch):
    holding.write_text(f"{DEVICES}4711, GPU-a, 7000\n")
    options = (*SHORT, "--only-first", "1", "--counter", str(tmp_path / "starts"))
    patience = {"server_start_max_retries": 1, "restart_backoff_max_sec": 0.05}
    async with CustomServer(fake_config(*options, **patience)) as server, trio.open_nursery() as nursery:

        async def leave() -> None:
            await trio.sleep(1.5)
            holding.write_text(DEVICES)

        nursery.start_soon(leave)
        began = trio.current_time()
        await server.wait_ready()
        assert 1.4 <= trio.current_time() - began < 10
    holding.write_text(f"{DEVICES}4711, GPU-a, 7000\n")
    monkeypatch.setattr("trinfer.server.gpu_release.RELEASE_WAIT", 0.3)
    (tmp_path / "starts").unlink()
    async with CustomServer(fake_config(*options, **patience)) as server:
        with trio.fail_after(10):
            await server.wait_ready()  # there may be room enough for two


async def test_an_nvidia_smi_that_hangs_in_the_driver_does_not_hold_up_a_restart(monkeypatch):
    # Nothing that a test can start survives SIGKILL as that one does.
    monkeypatch.setattr("trinfer.server.gpu_release.has_nvidia_smi", lambda: True)
    monkeypatch.setattr("trinfer.server.gpu_release.gpu_users", lambda: time.sleep(0.8))
    monkeypatch.setattr("trinfer.server.gpu_release.LOOK", 0.2)
    began = trio.current_time()
    assert await gpu_release.until_released({1}) == []
    assert trio.current_time() - began < 0.7
    await trio.sleep(0.8)  # for the thread that was left behind
