"""Hugging Face transformers: ``transformers serve``.

Checked against 5.19 and 5.23. It is given its model at the start, so that ready means loaded, and a model that cannot
be loaded is an error of the start; requests must then name it exactly so. Its ``/v1/models`` lists the hub's cache, not
what is loaded, and answers 500 while the cache's folder does not exist.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trinfer.engines.address import Address
from trinfer.engines.arguments import chosen_names, options
from trinfer.engines.limits import refuse_parallel_sizes
from trinfer.errors import ConfigError, ServerError
from trinfer.server.base import InferenceServer
from trinfer.server.hub import hub_cache

if TYPE_CHECKING:
    import trio

    from trinfer.config import InferenceConfig

__all__ = ["TransformersServer", "hub_cache", "transformers_command"]

RESERVED = {
    "model": "model_name_or_path",
    "force-model": "model_name_or_path",
    "host": "host",
    "port": "transport",
    "trust-remote-code": "trust_remote_code",
}

PROGRAM = "transformers"


def transformers_command(config: InferenceConfig, address: Address, model: str) -> list[str]:
    """The command line.

    Args:
        model: the name or path by which requests will call for the model.

    Raises:
        ConfigError: ``model_kwargs`` has what trinfer sets itself.
    """
    command = [config.executable or PROGRAM, "serve", model]
    command += ["--host", address.host, "--port", str(address.port)]
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    if "log-level" not in chosen_names(config.model_kwargs):
        command += ["--log-level", "warning"]
    return [*command, *options(config.model_kwargs, reserved=RESERVED)]


class TransformersServer(InferenceServer):
    """``transformers serve``, for models that no faster engine knows. It takes no ``model_max_context`` and no key."""

    engine_name: ClassVar[str] = "transformers"
    spans_nodes: ClassVar[bool] = False

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        refuse_parallel_sizes(config, "use vllm or sglang to spread a model over GPUs")
        if config.served_model_name is not None:
            raise ConfigError(
                f"InferenceConfig.served_model_name is {config.served_model_name!r}: allowed with server_type "
                "'transformers' is None, since it knows its model by model_name_or_path only"
            )
        super().__init__(config, rank)

    @property
    def program(self) -> str | None:
        return self.config.executable or PROGRAM

    async def start_server(self) -> trio.Process | None:
        try:
            hub_cache({**os.environ, **self.config.env}).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(
                f"the hub's cache folder cannot be made: {error}",
                advice="set HF_HOME to a folder that can be written",
            ) from error
        return await self.spawn(transformers_command(self.config, Address(self.host, self.port), self.model))

    async def monitor_health(self) -> None:
        await self.engine_exit()

    @property
    def model(self) -> str:
        # By its absolute path, so that "./name" and "name" are the same to requests.
        name = self.config.model_name_or_path
        return str(Path(name).resolve()) if Path(name).is_dir() else name
