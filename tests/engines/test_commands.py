"""The command lines and environments of the engines, as pure functions of the config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinfer.config import InferenceConfig
from trinfer.engines.address import Address
from trinfer.engines.custom import CustomServer, custom_command
from trinfer.engines.llamacpp import LlamaCppServer, llamacpp_command, llamacpp_environment, llamacpp_program
from trinfer.engines.sglang import sglang_command, sglang_environment
from trinfer.engines.transformers import TransformersServer, transformers_command
from trinfer.engines.vllm import vllm_command, vllm_environment
from trinfer.errors import ConfigError, ServerError
from trinfer.server.hub import hub_cache
from trinfer.server.node import Node

KEY = "sk-secret-1234"
TCP = Address("127.0.0.1", 8123)
UDS = Address("127.0.0.1", None, "/run/x/s.sock")
FIRST = Node(0, 2, "10.0.0.1")
SECOND = Node(1, 2, "10.0.0.1")


def config(kind, **fields):
    fields.setdefault("model_name_or_path", "org/model")
    return InferenceConfig(kind, **fields)


def after(words, option):
    return words[words.index(option) + 1]


class TestVLLM:
    def test_smallest(self):
        words = vllm_command(config("vllm"), TCP)
        assert words[:3] == ["vllm", "serve", "org/model"]
        assert after(words, "--host") == "127.0.0.1"
        assert after(words, "--port") == "8123"
        assert after(words, "--max-model-len") == "8192"
        assert "--disable-uvicorn-access-log" in words
        for absent in ("--trust-remote-code", "--tensor-parallel-size", "--nnodes", "--served-model-name", "--uds"):
            assert absent not in words

    def test_on_a_unix_socket(self):
        words = vllm_command(config("vllm"), UDS)
        assert after(words, "--uds") == "/run/x/s.sock"
        assert not {"--host", "--port"} & set(words)

    def test_everything(self):
        words = vllm_command(
            config(
                "vllm",
                tp=2,
                pp=3,
                dp=4,
                trust_remote_code=True,
                served_model_name="m",
                executable="/opt/vllm",
                model_max_context=99,
                model_kwargs={"max_num_seqs": 8, "enforce_eager": True},
            ),
            TCP,
        )
        assert words[0] == "/opt/vllm"
        assert after(words, "--tensor-parallel-size") == "2"
        assert after(words, "--pipeline-parallel-size") == "3"
        assert after(words, "--data-parallel-size") == "4"
        assert after(words, "--served-model-name") == "m"
        assert after(words, "--max-model-len") == "99"
        assert {"--trust-remote-code", "--max-num-seqs=8", "--enforce-eager"} <= set(words)

    @pytest.mark.parametrize(("grace", "seconds"), [(15, 12), (4.5, 1), (3, None), (0, None)])
    def test_the_engines_shutdown_fits_into_the_grace_period(self, grace, seconds):
        words = vllm_command(config("vllm", shutdown_grace_sec=grace), TCP)
        expected = [] if seconds is None else [f"--shutdown-timeout={seconds}"]
        assert [word for word in words if word.startswith("--shutdown-timeout")] == expected

    def test_the_users_word_wins_over_our_defaults(self):
        given_kwargs = {"shutdown_timeout": 1, "disable_uvicorn_access_log": False}
        words = vllm_command(config("vllm", model_kwargs=given_kwargs), TCP)
        assert [word for word in words if "shutdown-timeout" in word] == ["--shutdown-timeout=1"]
        assert [word for word in words if "access-log" in word] == ["--no-disable-uvicorn-access-log"]

    def test_two_nodes(self):
        settings = config("vllm", tp=8, master_port=4242, model_kwargs={"api_server_count": 2})
        first, second = vllm_command(settings, TCP, FIRST), vllm_command(settings, Address("h"), SECOND)
        for words, rank in ((first, "0"), (second, "1")):
            assert after(words, "--nnodes") == "2"
            assert after(words, "--node-rank") == rank
            assert after(words, "--master-addr") == "10.0.0.1"
            assert after(words, "--master-port") == "4242"
        assert "--headless" not in first
        assert "--headless" in second
        assert "--port" in first
        assert not {"--port", "--host", "--uds"} & set(second)
        assert "--api-server-count=2" in first
        assert "--api-server-count=2" not in second  # refused together with --headless

    def test_nodes_that_cannot_share_are_refused(self):
        with pytest.raises(ConfigError, match="tp x pp x dp is 3, which 2 nodes cannot share"):
            vllm_command(config("vllm", tp=3), TCP, FIRST)
        with pytest.raises(ConfigError, match="address of the engine's first node"):
            vllm_command(config("vllm", tp=2), TCP, Node(0, 2, None))

    def test_environment(self):
        assert vllm_environment(config("vllm")) == {}
        assert vllm_environment(config("vllm", api_key=KEY)) == {"VLLM_API_KEY": KEY}
        assert vllm_environment(config("vllm"), host_ip="10.0.0.2") == {"VLLM_HOST_IP": "10.0.0.2"}
        assert vllm_environment(config("vllm", env={"VLLM_HOST_IP": "1.2.3.4"}), host_ip="10.0.0.2") == {}
        assert vllm_environment(config("vllm"), sockets="/run/x") == {"VLLM_RPC_BASE_PATH": "/run/x"}
        assert vllm_environment(config("vllm", env={"VLLM_RPC_BASE_PATH": "/mine"}), sockets="/run/x") == {}


class TestSGLang:
    def test_one_node(self):
        words = sglang_command(config("sglang", tp=2), TCP, nccl_port=9911)
        assert words[0] == sys.executable
        assert Path(words[1]).name == "sglang_launcher.py"
        assert after(words, "--model-path") == "org/model"
        assert after(words, "--context-length") == "8192"
        assert after(words, "--nccl-port") == "9911"
        assert after(words, "--tp-size") == "2"
        # The reference's fixed localhost:9810 makes two engines on one machine collide.
        assert not {"--dist-init-addr", "--trust-remote-code", "--nnodes"} & set(words)

    def test_the_users_nccl_port_wins(self):
        words = sglang_command(config("sglang", model_kwargs={"nccl_port": 7}), TCP, nccl_port=9911)
        assert [word for word in words if "nccl-port" in word] == ["--nccl-port=7"]

    @pytest.mark.parametrize(("host", "expected"), [("10.0.0.1", "10.0.0.1:9810"), ("fd00::1", "[fd00::1]:9810")])
    def test_two_nodes(self, host, expected):
        words = sglang_command(config("sglang", tp=2), Address("h"), Node(1, 2, host))
        assert after(words, "--nnodes") == "2"
        assert after(words, "--node-rank") == "1"
        assert after(words, "--dist-init-addr") == expected
        assert not {"--port", "--host", "--nccl-port"} & set(words)

    def test_environment(self):
        assert sglang_environment(config("sglang")) == {}
        assert sglang_environment(config("sglang", api_key=KEY)) == {"TRINFER_ENGINE_API_KEY": KEY}


class TestLlamaCpp:
    def command(self, cpus=2, **fields):
        return llamacpp_command(config("llamacpp", **fields), TCP, ["llama-server"], cpus=cpus)

    def test_every_slot_gets_the_whole_context(self):
        words = self.command(model_max_context=100)
        assert (after(words, "--ctx-size"), after(words, "--parallel")) == ("400", "4")
        words = self.command(model_max_context=100, model_kwargs={"parallel": 2})
        assert (after(words, "--ctx-size"), after(words, "--parallel")) == ("200", "2")
        assert [word for word in words if word.startswith("--parallel")] == ["--parallel"]

    def test_options_and_values_are_words_of_their_own(self):
        # llama-server says "invalid argument" to --n-gpu-layers=99.
        words = self.command(model_kwargs={"n_gpu_layers": 99, "flash_attn": "on", "temp": -1.5, "mmap": False})
        assert words[-7:] == ["--n-gpu-layers", "99", "--flash-attn", "on", "--temp", "-1.5", "--no-mmap"]

    def test_none_is_as_if_it_were_not_there(self):
        assert self.command(model_kwargs={"parallel": None, "threads": None}) == self.command()

    @pytest.mark.parametrize("slots", [0, -1, "4", 1.5, True])
    def test_slots_are_a_number(self, slots):
        with pytest.raises(ConfigError, match="'parallel'"):
            self.command(model_kwargs={"parallel": slots})

    @pytest.mark.parametrize(("cpus", "threads"), [(1, "1"), (2, "1"), (3, "1"), (64, "32")])
    def test_threads_leave_cpus_free(self, cpus, threads):
        assert after(self.command(cpus=cpus), "--threads") == threads

    def test_the_model_and_its_name(self):
        words = self.command(model_name_or_path="/m/x.gguf", served_model_name="x")
        assert (after(words, "--model"), after(words, "--alias")) == ("/m/x.gguf", "x")
        assert after(self.command(model_name_or_path="/m/x.gguf"), "--alias") == "/m/x.gguf"
        assert after(self.command(model_name_or_path="org/name:Q4_K_M"), "--hf-repo") == "org/name:Q4_K_M"
        assert "--hf-repo" not in self.command(model_name_or_path="models/x.gguf")

    def test_program(self, tmp_path, monkeypatch):
        assert llamacpp_program(config("llamacpp", executable="/x/llama-server")) == ["/x/llama-server"]
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert llamacpp_program(config("llamacpp", env={"PATH": str(tmp_path)})) == [str(program)]
        monkeypatch.setenv("PATH", "/nowhere")
        assert Path(llamacpp_program(config("llamacpp"))[-1]).name == "llamacpp_runner.py"
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ServerError, match="not installed") as caught:
            llamacpp_program(config("llamacpp"))
        assert "pip install" in str(caught.value.advice)

    def test_parallel_sizes_are_refused(self):
        with pytest.raises(ConfigError, match=r"InferenceConfig\.tp is 2"):
            LlamaCppServer(config("llamacpp", tp=2))

    def test_environment(self):
        assert llamacpp_environment(config("llamacpp", api_key=KEY)) == {"LLAMA_API_KEY": KEY}


class TestTransformers:
    def test_the_model_is_loaded_at_the_start(self):
        words = transformers_command(config("transformers"), TCP, "/abs/model")
        assert words[:3] == ["transformers", "serve", "/abs/model"]
        assert (after(words, "--host"), after(words, "--port")) == ("127.0.0.1", "8123")
        assert after(words, "--log-level") == "warning"
        assert "--trust-remote-code" not in words

    def test_a_folder_goes_by_its_absolute_path(self, tmp_path, monkeypatch):
        (tmp_path / "m").mkdir()
        monkeypatch.chdir(tmp_path)
        assert TransformersServer(config("transformers", model_name_or_path="m")).model == str(tmp_path / "m")
        assert TransformersServer(config("transformers", model_name_or_path="org/m")).model == "org/m"

    @pytest.mark.parametrize("fields", [{"served_model_name": "x"}, {"pp": 2}])
    def test_what_it_cannot_do_is_refused(self, fields):
        with pytest.raises(ConfigError):
            TransformersServer(config("transformers", **fields))

    @pytest.mark.parametrize(
        ("environ", "folder"),
        [
            ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
            ({"HUGGINGFACE_HUB_CACHE": "/a"}, "/a"),
            ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
            ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
            ({}, str(Path.home() / ".cache/huggingface/hub")),
        ],
    )
    def test_hub_cache(self, environ, folder):
        assert str(hub_cache(environ)) == folder


class TestCustom:
    def custom(self, **kwargs):
        return config("custom", model_kwargs=kwargs)

    def test_the_references_script(self):
        words = custom_command(self.custom(server_script="serve.py", max_batch=3, fast=True, slow=False), TCP)
        assert words == [sys.executable, "serve.py", "--port", "8123", "--max_batch=3", "--fast", "--no-slow"]

    def test_an_interpreter_of_its_own(self):
        settings = config("custom", executable="/venv/bin/python", model_kwargs={"server_script": "s.py"})
        assert custom_command(settings, TCP)[:2] == ["/venv/bin/python", "s.py"]

    def test_a_program_of_its_own(self):
        assert custom_command(config("custom", executable="/x/serve"), TCP) == ["/x/serve", "--port", "8123"]

    def test_a_template(self):
        template = 'engine -m {model} \'two words\' --listen {host}:{port} --json {} {"a":{"b":1}}'
        assert custom_command(self.custom(server_command=template), TCP) == [
            *("engine", "-m", "org/model", "two words", "--listen", "127.0.0.1:8123", "--json", "{}", "{a:{b:1}}"),
        ]

    def test_a_list_needs_no_quoting_and_values_are_not_read_again(self):
        settings = config(
            "custom", model_name_or_path="{port} x", model_kwargs={"server_command": ["e", "{model}", "{uds}"]}
        )
        assert custom_command(settings, UDS) == ["e", "{port} x", "/run/x/s.sock"]

    @pytest.mark.parametrize(
        "template",
        ["", "e 'x", "e {prot} {port}", "e", "e {port} {uds}", 7, [], ["e", 1, "{port}"], [""] * 0, {"a": 1}],
    )
    def test_bad_templates_are_refused_when_the_server_is_made(self, template):
        with pytest.raises(ConfigError, match="server_command"):
            CustomServer(self.custom(server_command=template))

    @pytest.mark.parametrize("script", ["", 3, ["a.py"]])
    def test_bad_scripts_are_refused_when_the_server_is_made(self, script):
        with pytest.raises(ConfigError, match="server_script"):
            CustomServer(self.custom(server_script=script))

    def test_script_and_command_together_are_refused(self):
        with pytest.raises(ConfigError, match="server_script and server_command"):
            CustomServer(self.custom(server_script="a.py", server_command="b {port}"))

    @pytest.mark.parametrize(("template", "transport"), [("e {uds}", "tcp"), ("e {port}", "uds")])
    def test_a_template_that_cannot_do_the_transport_is_refused(self, template, transport):
        with pytest.raises(ConfigError, match="transport"):
            CustomServer(config("custom", transport=transport, model_kwargs={"server_command": template}))

    def test_the_placeholder_decides_about_the_socket(self):
        assert CustomServer(self.custom(server_command="e {uds}")).can_serve_uds
        assert not CustomServer(self.custom(server_command="e {port}")).can_serve_uds


def every_command(settings, node):
    kind = settings.server_type
    if kind == "vllm":
        return vllm_command(settings, TCP, node), vllm_environment(settings)
    if kind == "sglang":
        return sglang_command(settings, TCP, node), sglang_environment(settings)
    if kind == "llamacpp":
        return llamacpp_command(settings, TCP, ["llama-server"]), llamacpp_environment(settings)
    return transformers_command(settings, TCP, settings.model), {}


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp", "transformers"])
def test_what_trinfer_sets_is_refused_in_model_kwargs(kind):
    for key in ("port", "host", "model", "trust_remote_code"):
        if kind == "llamacpp" and key == "trust_remote_code":
            continue
        with pytest.raises(ConfigError, match=key) as caught:
            every_command(config(kind, model_kwargs={key: 1}), Node())
        assert str(caught.value.advice).startswith("use ")


names = st.from_regex(r"[a-z]{3,8}(_[a-z]{3,8}){0,2}", fullmatch=True)


@given(
    kind=st.sampled_from(["vllm", "sglang", "llamacpp", "transformers"]),
    kwargs=st.dictionaries(names, st.integers() | st.booleans() | st.none(), max_size=3),
    sizes=st.tuples(*[st.integers(1, 8)] * 3),
    grace=st.floats(0, 100),
    node=st.sampled_from([Node(), FIRST, SECOND]),
)
def test_no_command_line_holds_the_key_or_changes_the_config(kind, kwargs, sizes, grace, node):
    tp, pp, dp = sizes
    fields = {"tp": tp, "pp": pp, "dp": dp, "model_kwargs": kwargs, "shutdown_grace_sec": grace}
    settings = config(kind, api_key=KEY, **fields)
    before = settings.describe()
    try:
        words, environment = every_command(settings, node)
    except ConfigError:
        return
    assert settings.describe() == before
    assert all(isinstance(word, str) for word in words)
    assert not any(KEY in word for word in words)
    assert kind == "transformers" or KEY in environment.values()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert len(options) == len(set(options))  # no option twice
