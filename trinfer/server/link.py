"""The way to an engine: its address, the data plane and the control plane, for as long as one start attempt lasts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from trinfer.errors import InferenceError, ServerError
from trinfer.http.api import ApiClient, Timeouts
from trinfer.http.control import ControlClient, HttpxClient
from trinfer.http.origin import Origin
from trinfer.http.pool import SCARCE
from trinfer.http.retry import RetryPolicy
from trinfer.http.transport import TlsOptions
from trinfer.server.readiness import accepts_connections, served_models

if TYPE_CHECKING:
    from trinfer.config import InferenceConfig
    from trinfer.server.attempt import Attempt

__all__ = ["PROBE_TIMEOUT", "Link", "is_ours", "local_origin", "reachable"]

logger = logging.getLogger(__name__)

READINESS_PATH = "/v1/models"
PROBE_TIMEOUT = 5.0  # seconds for one look; SGLang is known to take one


class Link:
    """Clients for one origin. ``api`` carries requests, ``models`` asks whether anybody answers."""

    def __init__(self, origin: Origin, api_key: str | None, config: InferenceConfig) -> None:
        self.origin = origin
        self.last_look = ""  # what the last look for readiness found, in words
        self._told = False  # that we could not even look
        tls = TlsOptions(config.tls_ca_file, config.tls_cert_file, config.tls_key_file)
        try:
            self.api = ApiClient(
                origin,
                api_key=api_key,
                retry=RetryPolicy(max_attempts=config.request_max_attempts),
                timeouts=Timeouts(config.connect_timeout, config.stream_first_byte_timeout, config.stream_idle_timeout),
                tls=tls,
            )
        except (OSError, ValueError) as error:
            raise ServerError(
                f"the connection to {origin.url} cannot be set up: {error}",
                advice="check the API key, tls_ca_file, tls_cert_file, tls_key_file, and the environment's proxies",
            ) from error
        self._control = ControlClient(origin, api_key=api_key, tls=tls)

    @property
    def http(self) -> HttpxClient:
        """An httpx client for the same origin."""
        return self._control.open()

    async def models(self) -> tuple[int, bytes]:
        """Status and body of ``GET /v1/models``; status 0 where nothing answers."""
        # What a look has found stays until the next one has found something: most ends of a start fall into a look.
        if not self.last_look:
            self.last_look = f"GET {self.origin.url}{READINESS_PATH}: no complete answer yet"
        try:
            status, body = await self._control.get(READINESS_PATH, timeout=PROBE_TIMEOUT)
        except InferenceError as error:
            self.last_look = error.message
            return 0, b""
        self.last_look = f"GET {self.origin.url}{READINESS_PATH}: status {status}"
        return status, body

    async def get(self, path: str, *, timeout: float) -> tuple[int, bytes]:
        """Status and body of ``GET path``, on the control plane. Raises `InferenceError`."""
        return await self._control.get(path, timeout=timeout)

    def is_open(self) -> bool:
        """Whether somebody listens, told for the price of a refused connect."""
        try:
            listens = accepts_connections(self.origin.host, self.origin.port, self.origin.uds)
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            # A lack of our own, which may pass.
            self.last_look = f"{self.origin.url} could not be looked at: {error}"
            if not self._told:  # the deadline of a start may be far away
                self._told = True
                logger.warning("whether the engine is ready cannot be seen now: %s", self.last_look)
            return False
        if not listens:
            self.last_look = f"nothing listens at {self.origin.url}"
        return listens

    async def aclose(self) -> None:
        """Close every connection. Shielded, for a second at most."""
        self.api.close()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await self._control.aclose()


def local_origin(attempt: Attempt, host: str) -> Origin:
    """Where the engine of an attempt listens."""
    if attempt.uds is not None:
        return Origin.unix(attempt.uds)
    assert attempt.port is not None
    host = reachable(host)
    return Origin.from_url(f"http://[{host}]:{attempt.port}" if ":" in host else f"http://{host}:{attempt.port}")


def reachable(host: str) -> str:
    """Where a server that binds ``host`` can be reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def is_ours(attempt: Attempt, body: bytes, *, model: str, own_pid: int) -> bool | None:
    """Whether the server that gave ``body`` for ``/v1/models`` is the attempt's engine; None where it cannot be told.

    The proof is the listening socket, which belongs to a process of the attempt. Engines whose sockets belong to others
    (those in containers) have to say themselves when they are ready: they override `is_ready`.
    """
    if attempt.port is None:
        return True  # a socket in a private folder: nobody else knows of it
    owned = attempt.owns_port(own_pid=own_pid)
    if owned is not None:
        return owned
    # Nothing tells whose the socket is (no /proc, as on macOS, or processes of another user): the name has to do, and
    # a server that gives none, or was asked for none, too.
    names = served_models(body)
    return (bool(model) and model in names) or (not names or not model) or None
