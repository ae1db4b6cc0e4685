"""The control plane: readiness probes and metrics pages, through httpx.

Rule: this is the only module that knows httpx, so that its successor can replace it in one place. Requests that users
pay for do not come this way: httpx costs milliseconds each under trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from trinfer.errors import ConnectionLost, ProtocolError, RequestTimeout
from trinfer.http.transport import TlsOptions

if TYPE_CHECKING:
    from trinfer.http.origin import Origin

__all__ = ["ControlClient", "HttpxClient"]

HttpxClient = httpx.AsyncClient


class ControlClient:
    """GET requests to one origin. Made lazily: a client costs milliseconds, and many servers never need a second look.

    ``tls`` is for https origins. Proxies of the environment are used for endpoints elsewhere, never for local engines.
    """

    def __init__(self, origin: Origin, *, api_key: str | None = None, tls: TlsOptions | None = None) -> None:
        self._origin = origin
        self._tls = tls
        self._api_key = api_key
        self._client: httpx.AsyncClient | None = None

    def open(self) -> HttpxClient:
        """The client itself, for requests of the user's own; its base URL is the origin."""
        if self._client is None:
            local = self._origin.uds is not None or self._origin.host in {"127.0.0.1", "::1", "localhost"}
            # No keep-alive: probes are rare, and servers that write an answer in two pieces (as http.server does)
            # take 40 ms longer on a connection that is not fresh, by Nagle's algorithm and delayed acknowledgements.
            limits = httpx.Limits(max_keepalive_connections=0)
            origin = self._origin
            self._client = httpx.AsyncClient(
                base_url=f"{origin.scheme}://{origin.authority}{origin.base_path}/",
                limits=limits,
                verify=(self._tls or TlsOptions()).context() if origin.is_tls else False,
                transport=httpx.AsyncHTTPTransport(uds=self._origin.uds, verify=False, limits=limits)
                if local and not self._origin.is_tls  # without TLS there is no trust store to load
                else None,
                trust_env=not local,
                headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            )
        return self._client

    async def get(self, path: str, *, timeout: float) -> tuple[int, bytes]:
        """Status and body of ``GET path``.

        Raises:
            RequestTimeout, ConnectionLost, ProtocolError: as their names say; nothing of httpx comes out.

        Cancelled: httpx closes the connection.
        """
        base = self._origin
        try:
            answer = await self.open().get(path, timeout=timeout)
        except httpx.TimeoutException as error:
            raise RequestTimeout(f"GET {base.url}{path}: no answer within {timeout:g} s") from error
        except httpx.TransportError as error:
            raise ConnectionLost(f"GET {base.url}{path}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ProtocolError(f"GET {base.url}{path}: {error}") from error
        return answer.status_code, answer.content

    async def aclose(self) -> None:
        """Close its connections. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
