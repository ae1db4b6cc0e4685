"""The error tree: everything that trinfer raises on purpose, at a glance.

Rule: an error is written for the person who reads it at three in the morning. It says what failed, the likely
cause, what to do, and shows the engine's last log lines. Errors of lower layers are mapped at one border each
(`trinfer.http.api` for requests, `trinfer.server` for engines) and kept as ``__cause__``.

::

    TrinferError
    ├── ConfigError                a value that the user chose is not possible (also a ValueError)
    ├── FileError                  an input, an output or a run directory cannot be used
    ├── ServerError                the engine did not start, died, or was stopped
    ├── RunStopped                 rows fail, and the run's policy says that this is enough
    └── InferenceError             one request failed, the engine may be fine
        ├── RolloutError           the user's rollout function failed
        ├── StructuredOutputError  the answers did not fit the model that was asked for
        └── RequestError           … with what is known of the HTTP exchange
            ├── BadRequestError        400, 413, 422: final, the payload is at fault
            │   └── ContextLengthError     the prompt does not fit into the model's context
            ├── AuthenticationError    401, 403: final
            ├── NotFoundError          404: wrong model name or route
            ├── RateLimitError         429 after all retries
            ├── RequestTimeout         the request's time ran out
            ├── ConnectionLost         no connection, or it broke before the answer was complete
            │   └── StreamInterrupted      … after a part of it had been passed on
            └── ProtocolError          the answer is not HTTP, or not what was asked for
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "ConfigError",
    "ConnectionLost",
    "ContextLengthError",
    "FileError",
    "InferenceError",
    "NotFoundError",
    "ProtocolError",
    "RateLimitError",
    "RequestError",
    "RequestTimeout",
    "RolloutError",
    "RunStopped",
    "ServerError",
    "StreamInterrupted",
    "StructuredOutputError",
    "TrinferError",
]

SHOWN_LOG_LINES = 20


def _rebuild(cls: type[TrinferError], args: tuple[Any, ...], state: dict[str, Any]) -> TrinferError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class TrinferError(Exception):
    """Base of every error that trinfer raises on purpose.

    Attributes:
        message: what failed, in one sentence.
        cause: the likely reason, or None where nothing is known.
        advice: what the user can do about it, or None.
        log_tail: the engine's last lines of output, oldest first; empty where no engine is involved.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        advice: str | None = None,
        log_tail: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.advice = advice
        self.log_tail = tuple(log_tail)

    def __str__(self) -> str:
        parts = [self.message]
        if self.cause:
            parts.append(f"  likely cause: {self.cause}")
        if self.advice:
            parts.append(f"  what to do: {self.advice}")
        if self.log_tail:
            shown = self.log_tail[-SHOWN_LOG_LINES:]
            parts.append(f"  the engine's last {len(shown)} lines of output:")
            parts.extend(f"    | {line}" for line in shown)
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with positional arguments only and lose the rest: errors must survive
        # the way back from a worker process.
        return _rebuild, (type(self), self.args, dict(self.__dict__))

    def fresh(self) -> Self:
        """An equal error to raise once more.

        Several tasks that raise the *same* exception object share and grow its traceback and context, so each
        waiter gets a copy of its own, with the original as ``__cause__``.
        """
        copy = _rebuild(type(self), self.args, dict(self.__dict__))
        copy.__cause__ = self.__cause__ or self
        return copy  # type: ignore[return-value]  # _rebuild keeps the class, which mypy cannot see


class ConfigError(TrinferError, ValueError):
    """A value that the user chose is not possible; the message names the field, the value and the allowed range."""


class FileError(TrinferError):
    """An input, an output or a run directory cannot be used: missing, a full disk, a damaged journal, …"""


class ServerError(TrinferError):
    """The engine did not start, died, became unhealthy, or has been stopped.

    Attributes:
        server: which server this was, for instance ``"vllm rank 0"``; empty where unknown.
        returncode: the engine's exit code, negative for a signal; None where it did not exit.
        history: one line per failed start attempt or death, oldest first.
        received: for a stream that had yielded: how many chunks had come; else 0.
    """

    received: int = 0

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        advice: str | None = None,
        log_tail: Sequence[str] = (),
        server: str = "",
        returncode: int | None = None,
        history: Sequence[str] = (),
    ) -> None:
        super().__init__(message, cause=cause, advice=advice, log_tail=log_tail)
        self.server = server
        self.returncode = returncode
        self.history = tuple(history)

    def __str__(self) -> str:
        text = super().__str__()
        if len(self.history) > 1:
            text += "\n  what happened, in order:" + "".join(
                f"\n    {n}. {line}" for n, line in enumerate(self.history, 1)
            )
        return text


class InferenceError(TrinferError):
    """One request failed; the engine itself may be fine.

    Attributes:
        status: HTTP status of the last answer, or None where there was none.
        payload: the request as the user gave it. It may hold private text: it is never part of the message.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        advice: str | None = None,
        log_tail: Sequence[str] = (),
        status: int | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, cause=cause, advice=advice, log_tail=log_tail)
        self.status = status
        self.payload = payload


class RunStopped(TrinferError):
    """Rows fail, and the run's policy says that this is enough; what was finished before is kept."""


class RolloutError(InferenceError):
    """The user's rollout function failed for one document; its own error is the ``__cause__``."""


class StructuredOutputError(InferenceError):
    """The server answered, but not in the form that was asked for, however often it was asked again.

    Attributes:
        text: the last answer's text.
    """

    text: str = ""


class RequestError(InferenceError):
    """One HTTP exchange failed.

    Attributes:
        server_message: the server's own words, as found in the body of the answer.
        request_id: the server's id of the request (``x-request-id``), or None.
        attempts: how many times the request was sent.
        elapsed: seconds from the call to the failure, waiting between attempts included.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        advice: str | None = None,
        log_tail: Sequence[str] = (),
        status: int | None = None,
        payload: Mapping[str, Any] | None = None,
        server_message: str | None = None,
        request_id: str | None = None,
        attempts: int = 1,
        elapsed: float = 0.0,
    ) -> None:
        super().__init__(message, cause=cause, advice=advice, log_tail=log_tail, status=status, payload=payload)
        self.server_message = server_message
        self.request_id = request_id
        self.attempts = attempts
        self.elapsed = elapsed


class BadRequestError(RequestError):
    """The server refused the payload (400, 413, 422): the same request will always fail."""


class ContextLengthError(BadRequestError):
    """Prompt and requested tokens do not fit into the model's context."""


class AuthenticationError(RequestError):
    """The server refused the key (401, 403)."""


class NotFoundError(RequestError):
    """The server knows no such model or route (404)."""


class RateLimitError(RequestError):
    """The server asked to slow down (429), and still did after all retries."""


class RequestTimeout(RequestError):
    """The request's time ran out; its connection was closed, so that the engine stops generating."""


class ConnectionLost(RequestError):
    """No connection could be made, or it broke before the answer was complete."""


class StreamInterrupted(ConnectionLost):
    """A stream broke after some of it had been passed on, so that it cannot be sent again unnoticed.

    Attributes:
        received: how many chunks had come.
    """

    received: int = 0


class ProtocolError(RequestError):
    """The answer was not valid HTTP, or not what was asked for (a redirect, a body that is not JSON, …)."""
