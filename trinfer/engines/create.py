"""From a config to the server that it describes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig, ServerType
    from trinfer.server.base import InferenceServer

__all__ = ["create_server"]

_CLASSES: dict[ServerType, tuple[str, str]] = {
    "vllm": ("trinfer.engines.vllm", "VLLMServer"),
    "sglang": ("trinfer.engines.sglang", "SGLangServer"),
    "llamacpp": ("trinfer.engines.llamacpp", "LlamaCppServer"),
    "transformers": ("trinfer.engines.transformers", "TransformersServer"),
    "custom": ("trinfer.engines.custom", "CustomServer"),
    "dummy": ("trinfer.engines.dummy", "DummyServer"),
    "endpoint": ("trinfer.engines.endpoint", "EndpointServer"),
}


def create_server(config: InferenceConfig, rank: int = 0) -> InferenceServer:
    """The server for ``config.server_type``; nothing is started yet.

    Args:
        config: what to run.
        rank: which of several servers this is.

    Raises:
        ConfigError: the engine cannot do what the config asks for.
    """
    module, name = _CLASSES[config.server_type]
    server: InferenceServer = getattr(import_module(module), name)(config, rank)
    return server
