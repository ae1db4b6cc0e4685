"""One JSON request to an OpenAI-compatible server, and the one border where what goes wrong becomes a typed error.

Rule: nothing but the `RequestError` tree comes out, with all that is known (status, the server's words, its id of the
request, attempts, time), and never the key.
"""

from __future__ import annotations

import json
import re
import ssl
from typing import TYPE_CHECKING, Any

import trio

from trinfer._version import __version__
from trinfer.errors import (
    AuthenticationError,
    BadRequestError,
    ConnectionLost,
    ContextLengthError,
    NotFoundError,
    ProtocolError,
    RateLimitError,
    RequestError,
    RequestTimeout,
)
from trinfer.http.connection import BrokenConnection, HttpAnswer, MalformedAnswer
from trinfer.http.pool import Pool, PoolClosed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.http.origin import Origin

__all__ = ["ApiClient", "error_for", "server_message"]

SHOWN = 500  # characters of a server's message

# How engines say that a prompt does not fit: vLLM, SGLang, llama.cpp, OpenAI.
_CONTEXT_LENGTH = re.compile(
    r"maximum context length|context_length_exceeded|longer than the (?:maximum )?(?:model|context)"
    r"|exceeds? the (?:available |model'?s? )?(?:maximum )?context|exceed_context_size|context (?:size|length|window)"
    r"|maximum (?:allowed|model) length",
    re.IGNORECASE,
)


class ApiClient:
    """JSON requests to one origin through a keep-alive pool.

    Args:
        origin: the server.
        api_key: sent as ``Authorization: Bearer``.
        max_connections: how many requests may be under way at once; more wait.
    """

    def __init__(self, origin: Origin, *, api_key: str | None = None, max_connections: int = 4096) -> None:
        tls = ssl.create_default_context() if origin.is_tls else None
        self._origin = origin
        self._pool = Pool(origin, tls, max_connections=max_connections)
        lines = [
            f"Host: {origin.authority}",
            f"User-Agent: trinfer/{__version__}",
            "Accept: application/json",
            "Content-Type: application/json",
        ]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "".join(f"{line}\r\n" for line in lines).encode("latin-1")

    @property
    def pool(self) -> Pool:
        """The connections, for a look at their numbers."""
        return self._pool

    async def post_json(self, path: str, payload: Mapping[str, Any], *, timeout: float) -> dict[str, Any]:
        """Send a payload, and return the JSON object of the answer.

        Args:
            path: such as ``/v1/chat/completions``; the origin's base path is put before it.
            payload: not changed.
            timeout: seconds for everything, from connecting to the last byte.

        Raises:
            RequestError: one of its subclasses, or itself for other statuses (500, 503, …).

        Cancelled: the connection is closed, so that the server stops working on the request.
        """
        began = trio.current_time()
        where = f"POST {self._origin.url}{path}"
        try:
            # Compact, and checked before anything is sent: NaN is no JSON, and lone surrogates are no text.
            body = json.dumps(payload, allow_nan=False, separators=(",", ":"), ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequestError(
                f"the payload for {where} cannot be written as JSON: {error}",
                advice="use plain dicts, lists, texts, finite numbers, booleans and None",
                payload=payload,
                attempts=0,
            ) from error
        request = b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
            f"{self._origin.base_path}{path}".encode("ascii", "strict"),
            self._headers,
            len(body),
            body,
        )
        with trio.move_on_after(timeout):
            answer = await self._exchange(request, where, began, payload)
            if answer.status != 200:
                raise error_for(answer, where, payload=payload, elapsed=trio.current_time() - began)
            return _read_object(answer, where, payload, trio.current_time() - began)
        raise RequestTimeout(
            f"{where}: no complete answer within {timeout:g} s (request_timeout)",
            cause="the server is overloaded or stuck, or the generation is longer than the time allows",
            advice="raise request_timeout, lower max_tokens, or send fewer requests at a time",
            payload=payload,
            elapsed=trio.current_time() - began,
        )

    async def _exchange(self, request: bytes, where: str, began: float, payload: Mapping[str, Any]) -> HttpAnswer:
        try:
            return await self._pool.exchange(request)
        except MalformedAnswer as error:
            raise ProtocolError(
                f"{where}: the answer is not proper HTTP: {error}",
                cause="another kind of server answers there, or a proxy has cut the answer",
                payload=payload,
                elapsed=trio.current_time() - began,
            ) from error
        except PoolClosed as error:
            raise ConnectionLost(f"{where}: the client has been closed", payload=payload) from error
        except (BrokenConnection, OSError) as error:
            what = "the connection broke" if isinstance(error, BrokenConnection) else "no connection"
            raise ConnectionLost(
                f"{where}: {what}: {error}",
                cause="the server has died, restarts, or cannot be reached",
                payload=payload,
                elapsed=trio.current_time() - began,
            ) from error

    def close(self) -> None:
        """Close every idle connection; later requests raise `ConnectionLost`. Idempotent, and does not wait."""
        self._pool.close()


def _read_object(answer: HttpAnswer, where: str, payload: Mapping[str, Any], elapsed: float) -> dict[str, Any]:
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"{where}: the answer is not JSON: {answer.body[:80]!r}",
            status=answer.status,
            payload=payload,
            elapsed=elapsed,
        ) from error
    if not isinstance(value, dict):
        raise ProtocolError(
            f"{where}: the answer is JSON, but no object", status=answer.status, payload=payload, elapsed=elapsed
        )
    return value


def server_message(body: bytes) -> str | None:
    """The server's own words in an error's body, in the forms that engines use; None where there are none."""
    try:
        page: Any = json.loads(body)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
        return text[:SHOWN] or None
    for key in ("error", "message", "detail", "error_message"):
        if isinstance(page, dict) and page.get(key):
            inner = page[key]
            page = inner.get("message") or inner if isinstance(inner, dict) else inner
            break
    if not page:
        return None
    return (page if isinstance(page, str) else json.dumps(page))[:SHOWN]


def error_for(answer: HttpAnswer, where: str, *, payload: Mapping[str, Any], elapsed: float) -> RequestError:
    """The typed error for an answer whose status is not 200."""
    status, said = answer.status, server_message(answer.body)
    kind: type[RequestError] = RequestError
    cause = advice = None
    if 300 <= status < 400:
        kind, cause = ProtocolError, f"the server redirects to {answer.headers.get('location', 'another place')!r}"
        advice = "give the final URL as endpoint_url: requests with keys are not sent elsewhere"
    elif status in {400, 413, 422}:
        kind = BadRequestError
        if said and _CONTEXT_LENGTH.search(said):
            kind, cause = ContextLengthError, "prompt and max_tokens do not fit into the model's context"
            advice = "shorten the prompt, lower max_tokens, or raise model_max_context"
    elif status in {401, 403}:
        kind, cause = AuthenticationError, "the API key is missing, wrong, or not allowed to do this"
        advice = "set api_key, or the environment variable TRINFER_API_KEY"
    elif status == 404:
        kind, cause = NotFoundError, "the server has no such model or route"
        advice = "check the model's name and the URL; /v1/models lists what it serves"
    elif status == 429:
        kind, cause, advice = RateLimitError, "the server asks to slow down", "send fewer requests at a time"
    return kind(
        f"{where}: status {status}" + (f": {said}" if said else ""),
        cause=cause,
        advice=advice,
        status=status,
        payload=payload,
        server_message=said,
        request_id=answer.headers.get("x-request-id"),
        elapsed=elapsed,
    )
