"""The control plane: readiness probes and metrics pages, through httpx.

Rule: this is the only module that knows httpx, so that its successor can replace it in one place. Requests that users
pay for do not come this way: httpx costs milliseconds each under trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import trio

from trinfer.errors import ConnectionLost, ProtocolError, RequestTimeout
from trinfer.http.transport import TlsOptions, is_local

if TYPE_CHECKING:
    from trinfer.http.origin import Origin

__all__ = ["ControlClient", "HttpxClient"]

MAX_PAGE_BYTES = 64 * 2**20

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
            local = is_local(self._origin)
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

        Cancelled: the connection is closed.
        """
        base = self._origin
        body = bytearray()
        opened = _Opened()
        try:
            # httpx counts the time between two pieces, and takes in whatever comes.
            with trio.move_on_after(timeout) as scope:
                async with self.open().stream("GET", path, timeout=timeout, extensions={"trace": opened}) as answer:
                    async for piece in answer.aiter_bytes():
                        body += piece
                        if len(body) > MAX_PAGE_BYTES:
                            scope.cancel()  # httpx's generators end well only if it is they that are interrupted
                    if len(body) <= MAX_PAGE_BYTES:
                        return answer.status_code, bytes(body)
        except httpx.TimeoutException:
            pass
        except (httpx.TransportError, OSError) as error:  # at its first use, httpx reads files
            raise ConnectionLost(f"GET {base.url}{path}: {_reason(error)}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ProtocolError(f"GET {base.url}{path}: {error}") from error
        finally:
            opened.close()
        if len(body) > MAX_PAGE_BYTES:
            raise ProtocolError(f"GET {base.url}{path}: the page is longer than {MAX_PAGE_BYTES} bytes")
        raise RequestTimeout(f"GET {base.url}{path}: no answer within {timeout:g} s")

    async def aclose(self) -> None:
        """Close its connections. Idempotent."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


class _Opened:
    """The connections that httpx has opened for one request, seen through its trace extension.

    httpx itself leaves the socket of a TLS handshake that is cancelled to the garbage collector (httpcore 1.0.9,
    ``TrioStream.start_tls``): until then the server keeps a connection that nobody uses.
    """

    def __init__(self) -> None:
        self._sockets: list[trio.socket.SocketType] = []

    async def __call__(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".connect_unix_socket.complete")):
            self._sockets.append(info["return_value"].get_extra_info("socket"))

    def close(self) -> None:
        for each in self._sockets:
            each.close()


def _reason(error: BaseException) -> str:
    """What has happened, in words: those of the layers below, where httpx has none of its own."""
    reason: BaseException | None = error
    while reason is not None:
        if str(reason):
            return str(reason)
        reason = reason.__cause__ or reason.__context__
    return type(error).__name__
