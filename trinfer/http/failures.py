"""The one border where what goes wrong with a request becomes a typed error."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

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
from trinfer.http.pool import SCARCE, PoolClosed

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LOWER_ERRORS", "error_for_answer", "error_for_exception", "error_in_stream", "server_message", "timed_out"]

SHOWN = 500  # characters of a server's message

#: What the layers below raise.
LOWER_ERRORS = (BrokenConnection, MalformedAnswer, PoolClosed, OSError)

# How engines say that a prompt does not fit: vLLM, SGLang, llama.cpp, OpenAI.
_CONTEXT_LENGTH = re.compile(
    r"maximum context length|context_length_exceeded|longer than the (?:maximum )?(?:model|context)"
    r"|exceeds? the (?:available |model'?s? )?(?:maximum )?context|exceed_context_size|context (?:size|length|window)"
    r"|maximum (?:allowed|model) length",
    re.IGNORECASE,
)


def server_message(body: bytes) -> str | None:
    """The server's own words in an error's body, in the forms that engines use; None where there are none."""
    try:
        page: Any = json.loads(body)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace").strip()
        return text[:SHOWN] or None
    return _words(page)


def _words(page: Any) -> str | None:  # noqa: ANN401  # any JSON
    for key in ("error", "message", "detail", "error_message"):
        if isinstance(page, dict) and page.get(key):
            inner = page[key]
            page = inner.get("message") or inner if isinstance(inner, dict) else inner
            break
    if not page:
        return None
    return (page if isinstance(page, str) else json.dumps(page))[:SHOWN]


def error_for_answer(answer: HttpAnswer, where: str) -> RequestError:
    """For an answer whose status is not 200."""
    said = server_message(answer.body)
    error = _error_for_status(answer.status, said, where)
    if 300 <= answer.status < 400:
        error.cause = f"the server redirects to {answer.headers.get('location', 'another place')!r}"
    error.request_id = answer.headers.get("x-request-id")
    return error


def _error_for_status(status: int, said: str | None, where: str) -> RequestError:
    kind: type[RequestError] = RequestError
    cause = advice = None
    if 300 <= status < 400:
        kind = ProtocolError
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
    text = f"{where}: status {status}" + (f": {said}" if said else "")
    return kind(text, cause=cause, advice=advice, status=status, server_message=said)


def error_in_stream(event: Mapping[str, Any], where: str) -> RequestError | None:
    """For an event that is an error object; None for all others."""
    inner = event.get("error")
    if not inner and event.get("object") != "error":
        return None
    holder = inner if isinstance(inner, dict) else event
    code = holder.get("code")
    return _error_for_status(code if isinstance(code, int) and 400 <= code < 600 else 500, _words(event), where)


def error_for_exception(error: BaseException, where: str) -> RequestError:
    """For what the layers below raise."""
    if isinstance(error, MalformedAnswer):
        return ProtocolError(
            f"{where}: the answer is not proper HTTP: {error}",
            cause="another kind of server answers there, or a proxy has cut the answer",
        )
    if isinstance(error, PoolClosed):
        return ConnectionLost(f"{where}: the client has been closed")
    if isinstance(error, OSError) and error.errno in SCARCE:
        return ConnectionLost(
            f"{where}: no connection: {error}",
            cause="this process or the machine has no file descriptors left",
            advice="raise `ulimit -n`, or send fewer requests at a time",
        )
    what = "the connection broke" if isinstance(error, BrokenConnection) else "no connection"
    return ConnectionLost(f"{where}: {what}: {error}", cause="the server has died, restarts, or cannot be reached")


def timed_out(where: str, what: str, seconds: float) -> RequestTimeout:
    """For a request whose time ran out; ``what`` names the time-out."""
    return RequestTimeout(
        f"{where}: no complete answer within {seconds:g} s ({what})"
        if what == "request_timeout"
        else f"{where}: nothing came for {seconds:g} s ({what})",
        cause="the server is overloaded or stuck, or the generation is longer than the time allows",
        advice=f"raise {what}, lower max_tokens, or send fewer requests at a time",
    )
