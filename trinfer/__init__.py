"""trinfer: LLM inference servers under structured concurrency.

    async with VLLMServer(config, rank=0) as server:
        documents = prepare()                       # while the engine loads
        answer = await server.make_request({"messages": [...]})

This module is the whole public surface. Names are loaded on first use, so that ``trinfer --help`` does not pay for
trio, httpx and the engines.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trinfer._version import __version__

if TYPE_CHECKING:
    from trinfer.batch.items import Generate as Generate
    from trinfer.batch.runner import InferenceRunner as InferenceRunner
    from trinfer.config import InferenceConfig as InferenceConfig
    from trinfer.data.documents import Document as Document
    from trinfer.data.documents import Media as Media
    from trinfer.engines.create import create_server as create_server
    from trinfer.engines.custom import CustomServer as CustomServer
    from trinfer.engines.dummy import DummyServer as DummyServer
    from trinfer.engines.endpoint import EndpointServer as EndpointServer
    from trinfer.engines.llamacpp import LlamaCppServer as LlamaCppServer
    from trinfer.engines.sglang import SGLangServer as SGLangServer
    from trinfer.engines.transformers import TransformersServer as TransformersServer
    from trinfer.engines.vllm import VLLMServer as VLLMServer
    from trinfer.errors import AuthenticationError as AuthenticationError
    from trinfer.errors import BadRequestError as BadRequestError
    from trinfer.errors import ConfigError as ConfigError
    from trinfer.errors import ConnectionLost as ConnectionLost
    from trinfer.errors import ContextLengthError as ContextLengthError
    from trinfer.errors import FileError as FileError
    from trinfer.errors import InferenceError as InferenceError
    from trinfer.errors import NotFoundError as NotFoundError
    from trinfer.errors import ProtocolError as ProtocolError
    from trinfer.errors import RateLimitError as RateLimitError
    from trinfer.errors import RequestError as RequestError
    from trinfer.errors import RequestTimeout as RequestTimeout
    from trinfer.errors import RolloutError as RolloutError
    from trinfer.errors import RunStopped as RunStopped
    from trinfer.errors import ServerError as ServerError
    from trinfer.errors import StreamInterrupted as StreamInterrupted
    from trinfer.errors import StructuredOutputError as StructuredOutputError
    from trinfer.errors import TrinferError as TrinferError
    from trinfer.results import InferenceResult as InferenceResult
    from trinfer.server.base import InferenceServer as InferenceServer
    from trinfer.server.lifecycle import ServerState as ServerState

_HOME = {
    "InferenceConfig": "trinfer.config",
    "create_server": "trinfer.engines.create",
    "Document": "trinfer.data.documents",
    "Generate": "trinfer.batch.items",
    "Media": "trinfer.data.documents",
    "InferenceRunner": "trinfer.batch.runner",
    "CustomServer": "trinfer.engines.custom",
    "DummyServer": "trinfer.engines.dummy",
    "EndpointServer": "trinfer.engines.endpoint",
    "LlamaCppServer": "trinfer.engines.llamacpp",
    "SGLangServer": "trinfer.engines.sglang",
    "TransformersServer": "trinfer.engines.transformers",
    "VLLMServer": "trinfer.engines.vllm",
    "AuthenticationError": "trinfer.errors",
    "BadRequestError": "trinfer.errors",
    "ConfigError": "trinfer.errors",
    "ConnectionLost": "trinfer.errors",
    "ContextLengthError": "trinfer.errors",
    "FileError": "trinfer.errors",
    "InferenceError": "trinfer.errors",
    "NotFoundError": "trinfer.errors",
    "ProtocolError": "trinfer.errors",
    "RateLimitError": "trinfer.errors",
    "RequestError": "trinfer.errors",
    "RequestTimeout": "trinfer.errors",
    "RolloutError": "trinfer.errors",
    "RunStopped": "trinfer.errors",
    "ServerError": "trinfer.errors",
    "StreamInterrupted": "trinfer.errors",
    "StructuredOutputError": "trinfer.errors",
    "TrinferError": "trinfer.errors",
    "InferenceResult": "trinfer.results",
    "InferenceServer": "trinfer.server.base",
    "ServerState": "trinfer.server.lifecycle",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # the type of a lazily loaded name is told to checkers above
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'trinfer' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
