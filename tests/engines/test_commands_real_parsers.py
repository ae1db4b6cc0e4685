"""Each generated command line, read by the parser of the engine itself (see `install_engines.sh`)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.engines import real
from trinfer.config import InferenceConfig
from trinfer.engines import sglang_launcher
from trinfer.engines.address import Address
from trinfer.engines.sglang import sglang_command
from trinfer.engines.transformers import transformers_command
from trinfer.engines.vllm import vllm_command
from trinfer.server.node import Node

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROBE = Path(__file__).with_name("parse_probe.py")
TCP = Address("127.0.0.1", 8123)
FIRST, SECOND = Node(0, 2, "10.0.0.1"), Node(1, 2, "10.0.0.1")


def config(kind, **fields):
    return InferenceConfig(kind, **{"model_name_or_path": "/models/x", "model_max_context": 777, **fields})


def parse(engine, lines):
    """What the engine's parser makes of each line: a dict, or the text of its error."""
    done = subprocess.run(
        [str(real.python_of(engine)), "-P", str(PROBE)],
        input=json.dumps({"engine": engine, "lines": lines}),
        env=real.environ(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    assert len(answers) == len(lines)
    return answers


def agrees(parsed, expected):
    assert isinstance(parsed, dict), parsed
    assert {key: parsed.get(key) for key in expected} == expected


def test_vllm():
    everything = config(
        "vllm",
        tp=2,
        pp=2,
        dp=2,
        trust_remote_code=True,
        served_model_name="m",
        model_kwargs={
            "gpu_memory_utilization": 0.5,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max-num-seqs": 4,
            "hf_overrides": {"a": 1},
            "compilation_config.mode": 3,
            "seed": None,
        },
    )
    lines = [
        vllm_command(config("vllm"), TCP),
        vllm_command(config("vllm"), Address("127.0.0.1", None, "/run/s.sock")),
        vllm_command(everything, TCP),
        vllm_command(config("vllm", tp=4, master_port=4242), TCP, FIRST),
        vllm_command(config("vllm", tp=4, model_kwargs={"api_server_count": 2}), Address("h"), SECOND),
        vllm_command(config("vllm", model_kwargs={"no_such_option": 1}), TCP),
    ]
    smallest, socket, full, first, second, wrong = parse("vllm", [line[1:] for line in lines])
    agrees(
        smallest,
        {
            "model_tag": "/models/x",
            "host": "127.0.0.1",
            "port": "8123",
            "max_model_len": "777",
            "disable_uvicorn_access_log": "True",
            "shutdown_timeout": "12",
            "trust_remote_code": "False",
            "uds": "None",
            "headless": "False",
        },
    )
    agrees(socket, {"uds": "/run/s.sock"})
    agrees(
        full,
        {
            "tensor_parallel_size": "2",
            "pipeline_parallel_size": "2",
            "data_parallel_size": "2",
            "trust_remote_code": "True",
            "served_model_name": "['m']",
            "gpu_memory_utilization": "0.5",
            "enforce_eager": "True",
            "enable_prefix_caching": "False",
            "max_num_seqs": "4",
            "hf_overrides": "{'a': 1}",
        },
    )
    agrees(first, {"nnodes": "2", "node_rank": "0", "master_addr": "10.0.0.1", "master_port": "4242"})
    agrees(first, {"headless": "False", "port": "8123"})
    agrees(second, {"nnodes": "2", "node_rank": "1", "headless": "True"})
    assert "unrecognized arguments: --no-such-option=1" in wrong


def test_sglang():
    everything = config(
        "sglang",
        tp=2,
        pp=2,
        dp=2,
        trust_remote_code=True,
        served_model_name="m",
        model_kwargs={"mem_fraction_static": 0.5, "disable_radix_cache": True, "log_level_http": "error"},
    )
    lines = [
        sglang_command(config("sglang"), TCP, nccl_port=9911),
        sglang_command(everything, TCP),
        sglang_command(config("sglang", tp=4), TCP, FIRST),
        sglang_command(config("sglang", tp=4), Address("h"), SECOND),
        sglang_command(config("sglang", model_kwargs={"no_such_option": 1}), TCP),
    ]
    smallest, full, first, second, wrong = parse("sglang", [line[2:] for line in lines])
    agrees(
        smallest,
        {
            "model_path": "/models/x",
            "host": "127.0.0.1",
            "port": "8123",
            "context_length": "777",
            "nccl_port": "9911",
            "log_level_http": "warning",
            "trust_remote_code": "False",
            "dist_init_addr": "None",
        },
    )
    agrees(
        full,
        {
            "tp_size": "2",
            "pp_size": "2",
            "dp_size": "2",
            "trust_remote_code": "True",
            "served_model_name": "m",
            "mem_fraction_static": "0.5",
            "disable_radix_cache": "True",
            "log_level_http": "error",
        },
    )
    agrees(first, {"nnodes": "2", "node_rank": "0", "dist_init_addr": "10.0.0.1:9810"})
    agrees(second, {"nnodes": "2", "node_rank": "1", "dist_init_addr": "10.0.0.1:9810"})
    assert "unrecognized arguments: --no-such-option=1" in wrong


def test_sglangs_launcher_reaches_sglangs_own_parser():
    """And not trinfer's modules of the same names, which lie beside the launcher."""
    done = subprocess.run(
        [str(real.python_of("sglang")), sglang_launcher.__file__, "--model-path", "/models/x", "--no-such-option"],
        env={**real.environ(), sglang_launcher.KEY_VARIABLE: "sk-secret"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-option" in done.stderr
    assert "sk-secret" not in done.stderr + done.stdout


def test_transformers():
    everything = config(
        "transformers", trust_remote_code=True, model_kwargs={"continuous_batching": True, "dtype": "x"}
    )
    wrong = config("transformers", model_kwargs={"no_such_option": 1})
    lines = [transformers_command(settings, TCP, "/models/x") for settings in (config("transformers"), everything)]
    lines.append(transformers_command(wrong, TCP, "/models/x"))
    smallest, full, refused = parse("transformers", [line[1:] for line in lines])
    agrees(
        smallest,
        {"force_model": "/models/x", "host": "127.0.0.1", "port": "8123", "trust_remote_code": "False"},
    )
    agrees(full, {"trust_remote_code": "True", "continuous_batching": "True", "dtype": "x"})
    assert "No such option" in refused
