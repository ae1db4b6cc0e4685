"""Hugging Face transformers: ``transformers serve``.

It loads models on request, and its ``/v1/models`` lists the hub's cache, not what is loaded; it answers 500 while the
cache folder does not exist (seen with 5.23). Requests must name the model by the configured name or path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines.address import Address
from trinfer.engines.arguments import options
from trinfer.errors import ServerError
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["TransformersServer", "transformers_command"]

RESERVED = {
    "host": "host",
    "port": "transport",
    "trust-remote-code": "trust_remote_code",
}


def transformers_command(config: InferenceConfig, address: Address) -> list[str]:
    """The command line. The model comes with each request."""
    command = [config.executable or "transformers", "serve", "--host", address.host, "--port", str(address.port)]
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    if "log-level" not in {key.replace("_", "-") for key in config.model_kwargs}:
        command += ["--log-level", "warning"]
    return [*command, *options(config.model_kwargs, reserved=RESERVED)]


class TransformersServer(InferenceServer):
    """``transformers serve``, for models that no faster engine knows."""

    engine_name: ClassVar[str] = "transformers"
    spans_nodes: ClassVar[bool] = False

    async def start_server(self) -> trio.Process | None:
        environ = {**os.environ, **self.config.env}
        home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        try:
            Path(environ.get("HF_HUB_CACHE") or home / "hub").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(
                f"the hub's cache folder cannot be made: {error}",
                advice="set HF_HOME to a folder that can be written",
            ) from error
        return await self.spawn(transformers_command(self.config, Address(self.host, self.port)))

    async def monitor_health(self) -> None:
        await self.engine_exit()

    @property
    def model(self) -> str:
        # A path must be absolute: the server resolves it in its own working directory.
        name = self.config.model_name_or_path
        return str(Path(name).resolve()) if Path(name).is_dir() else name
