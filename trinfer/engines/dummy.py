"""The embedded engine: a real HTTP server in this process's trio loop, for tests and first steps."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, ClassVar

import trio

from trinfer.engines.dummy_app import DummyApp, DummyOptions
from trinfer.http.serving import serve_http
from trinfer.server.attempt import PortTaken
from trinfer.server.base import InferenceServer

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig

__all__ = ["DummyServer"]

BACKLOG = 4096


class DummyServer(InferenceServer):
    """Answers at once and always the same; see `trinfer.engines.dummy_app.DummyOptions` for ``model_kwargs``."""

    engine_name: ClassVar[str] = "dummy"
    supports_uds: ClassVar[bool] = True
    spans_nodes: ClassVar[bool] = False

    def __init__(self, config: InferenceConfig, rank: int = 0) -> None:
        self._options = DummyOptions.from_kwargs(config.model_kwargs)
        super().__init__(config, rank)

    @property
    def model(self) -> str:
        return self.config.model or "dummy"

    async def start_server(self) -> trio.Process | None:
        app = DummyApp(
            self.model,
            max_context=self.config.model_max_context,
            options=self._options,
            api_key=self.config.api_key,
        )
        listeners: list[trio.SocketListener]
        if self.uds is not None:
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            bound.bind(self.uds)  # no checkpoint on the way, on which it could be left open
            bound.listen(BACKLOG)
            bound.setblocking(False)
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(bound))]
        else:
            assert self.port is not None
            try:
                listeners = await trio.open_tcp_listeners(self.port, host=self.host, backlog=BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # Bound since it was leased, by a program that knows no leases: another port costs no start attempt.
                raise PortTaken(f"{self.name}: port {self.port} is in use") from error
        await self.start_task(serve_http, app, listeners)
        return None

    async def monitor_health(self) -> None:
        # Serving fails only by crashing, and a crashed task fails the server by itself.
        await trio.sleep_forever()
