"""A server that runs already, here or elsewhere: nothing is started, nothing is stopped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import trio

from trinfer.errors import ConfigError
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["EndpointServer"]

KEY_VARIABLES = ("TRINFER_API_KEY", "OPENAI_API_KEY")


class EndpointServer(InferenceServer):
    """An OpenAI-compatible endpoint, by ``endpoint_url`` with or without ``/v1``.

    The key is ``api_key``, else what stands in ``TRINFER_API_KEY`` or ``OPENAI_API_KEY``.
    """

    engine_name: ClassVar[str] = "endpoint"
    spans_nodes: ClassVar[bool] = False
    is_local: ClassVar[bool] = False

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        if config.endpoint_url is None:
            raise ConfigError("InferenceConfig.endpoint_url is None: allowed is a URL such as http://host:8000/v1")
        super().__init__(config, rank)
        self._url = config.endpoint_url.rstrip("/").removesuffix("/v1")

    def get_base_url(self) -> str:
        return self._url

    async def start_server(self) -> trio.Process | None:
        return None

    async def monitor_health(self) -> None:
        # Nobody but its owner can say that an endpoint is dead: requests fail one by one, and are retried.
        await trio.sleep_forever()

    def _api_key(self) -> str | None:
        if self.config.api_key is not None:
            return self.config.api_key
        # From a file, keys come with a newline.
        return next((key for name in KEY_VARIABLES if (key := os.environ.get(name, "").strip())), None)
