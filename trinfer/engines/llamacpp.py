"""llama.cpp: ``llama-server`` where it is installed, else the same C++ server inside the Python package xllamacpp.

Both answer 503 while the model loads, and read their key from the environment (``LLAMA_API_KEY``).
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines import llamacpp_runner
from trinfer.engines.address import Address
from trinfer.engines.arguments import options
from trinfer.errors import ServerError
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["LlamaCppServer", "llamacpp_command", "llamacpp_environment"]

RESERVED = {
    "model": "model_name_or_path",
    "m": "model_name_or_path",
    "alias": "served_model_name",
    "host": "host",
    "port": "transport",
    "ctx-size": "model_max_context",
    "c": "model_max_context",
    "api-key": "api_key",
}


def llamacpp_command(config: InferenceConfig, address: Address) -> list[str]:
    """The command line of ``llama-server``, or of our runner for xllamacpp.

    Raises:
        ServerError: neither is installed.
    """
    program = config.executable or shutil.which("llama-server")
    if program is not None:
        command = [program]
    elif importlib.util.find_spec("xllamacpp") is not None:
        command = [sys.executable, str(Path(llamacpp_runner.__file__))]
    else:
        raise ServerError(
            "llama.cpp is not installed: there is neither llama-server on PATH nor the package xllamacpp",
            advice="install it: pip install 'trinfer[llamacpp]'",
        )
    command += ["--model", config.model_name_or_path, "--alias", config.model]
    command += ["--host", address.host, "--port", str(address.port), "--ctx-size", str(config.model_max_context)]
    return [*command, *options(config.model_kwargs, reserved=RESERVED)]


def llamacpp_environment(config: InferenceConfig) -> dict[str, str]:
    """What does not belong in a command line."""
    return {"LLAMA_API_KEY": config.api_key} if config.api_key else {}


class LlamaCppServer(InferenceServer):
    """A llama.cpp engine for one GGUF file."""

    engine_name: ClassVar[str] = "llamacpp"
    spans_nodes: ClassVar[bool] = False

    async def start_server(self) -> trio.Process | None:
        command = llamacpp_command(self.config, Address(self.host, self.port))
        return await self.spawn(command, env=llamacpp_environment(self.config))

    async def monitor_health(self) -> None:
        await self.engine_exit()
