"""The public names, pinned; and that importing trinfer costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import trinfer

NAMES = {
    "AuthenticationError",
    "BadRequestError",
    "ConfigError",
    "ConnectionLost",
    "ContextLengthError",
    "CustomServer",
    "Document",
    "DummyServer",
    "EndpointServer",
    "FileError",
    "Generate",
    "InferenceConfig",
    "InferenceError",
    "InferenceResult",
    "InferenceRunner",
    "InferenceServer",
    "LlamaCppServer",
    "Media",
    "NotFoundError",
    "ProtocolError",
    "RateLimitError",
    "RequestError",
    "RequestTimeout",
    "RolloutError",
    "RunStopped",
    "SGLangServer",
    "ServerError",
    "ServerState",
    "StreamInterrupted",
    "StructuredOutputError",
    "TransformersServer",
    "TrinferError",
    "VLLMServer",
    "__version__",
    "create_server",
}


def test_the_names():
    assert set(trinfer.__all__) == NAMES
    for name in NAMES:
        assert getattr(trinfer, name) is not None
        assert name in dir(trinfer)


def test_every_lazy_name_is_told_to_type_checkers():
    source = trinfer.__file__
    with open(source) as file:
        text = file.read()
    for name in NAMES - {"__version__"}:
        assert f"import {name} as {name}" in text


def test_importing_trinfer_loads_neither_trio_nor_httpx():
    code = "import sys, trinfer; print([m for m in ('trio', 'httpx', 'httptools', 'rich', 'ssl') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_create_server_makes_each_kind():
    from trinfer import InferenceConfig, create_server

    settings = {
        "vllm": (trinfer.VLLMServer, {"model_name_or_path": "m"}),
        "sglang": (trinfer.SGLangServer, {"model_name_or_path": "m"}),
        "llamacpp": (trinfer.LlamaCppServer, {"model_name_or_path": "m"}),
        "transformers": (trinfer.TransformersServer, {"model_name_or_path": "m"}),
        "custom": (trinfer.CustomServer, {"model_kwargs": {"server_script": "x.py"}}),
        "dummy": (trinfer.DummyServer, {}),
        "endpoint": (trinfer.EndpointServer, {"endpoint_url": "http://x/v1"}),
    }
    for kind, (cls, fields) in settings.items():
        server = create_server(InferenceConfig(kind, **fields), rank=2)
        assert type(server) is cls
        assert server.rank == 2
        assert server.state is trinfer.ServerState.STOPPED
