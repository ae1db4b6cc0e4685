"""What goes through a run: one record on its way from the input to its outcome, and the jobs that are done with it."""

from __future__ import annotations

import inspect
import json
import math
import os
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trinfer.data.values import plain, told
from trinfer.encoding import make_encoder
from trinfer.errors import RequestError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from trinfer.batch.calls import Call
    from trinfer.batch.summary import Summary
    from trinfer.data.records import InvalidRow, Raw

__all__ = [
    "Generate",
    "Generator",
    "Item",
    "Job",
    "Outcome",
    "Progress",
    "batch_id",
    "batch_line",
    "describe_error",
    "encode",
    "error_line",
    "generation",
    "request_id",
]


class Item:
    """One record of the input.

    Attributes:
        key: 16 bytes that stand for its content, and for its number among equal ones.
        id: its own id, or one made of the key.
        place: file and line, for messages.
        size: bytes of the input, for progress.
        value: what the job has made of the record.
        error: why it cannot be worked on; None where it can.
        calls: answers that were got for it, also by a run before this one, as `trinfer.batch.calls` keeps them.
        call: the only answer that was got for it, where there is one.
    """

    __slots__ = ("call", "calls", "error", "id", "key", "place", "size", "value")

    def __init__(self, key: bytes, id: Any, place: str, size: int) -> None:  # noqa: A002, ANN401  # the user's id
        self.key, self.id, self.place, self.size = key, id, place, size
        self.value: Any = None
        self.error: InvalidRow | None = None
        self.calls: dict[bytes, bytes] | None = None
        self.call: Call | None = None

    def forget_calls(self) -> None:
        """Have all of them asked for again."""
        self.calls = self.call = None


class Outcome(NamedTuple):
    """What a job has made of an item.

    Attributes:
        line: a line of output, with its newline; None for an item that is to be left out.
        results: the generations, for the statistics.
    """

    line: bytes | None
    results: tuple[InferenceResult, ...] = ()


class Generate(Protocol):
    """Sends the requests of one rollout."""

    def __call__(self, payload: Mapping[str, Any]) -> Awaitable[InferenceResult]: ...


class Generator(Protocol):
    """What the batch needs of a server, or of many."""

    async def wait_ready(self) -> None: ...
    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]: ...


class Progress(Protocol):
    """Who wants to see how far the run is."""

    def update(self, summary: Summary) -> None: ...


class Job(Protocol):
    """What is done with each record.

    Attributes:
        rollouts: how often for each.
        keeps_calls: answers of unfinished items are kept over a crash: they have several, and each was paid for.
        code: stands for the user's code, which may fail with an answer; empty where there is none.
    """

    rollouts: int
    keeps_calls: bool
    code: str

    def read(self, response: Mapping[str, Any], /) -> InferenceResult:
        """Make a result of a server's answer. Raises InferenceError for one that is none."""
        ...

    def prepare(self, raw: Raw, key: bytes, number: int) -> Item:
        """Look into a record; what is wrong with it is told in the item, and never raised. Called in a thread."""
        ...

    def rollout(self, item: Item, generate: Generate) -> Awaitable[Any]:
        """Work on an item once.

        Raises:
            InferenceError: it failed; the policy decides what that means.
        """
        ...

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        """Put the rollouts' results together. Raises TrinferError, where they cannot be written."""
        ...

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        """The line of output for an item that failed; None for no line."""
        ...


def generation(result: InferenceResult) -> dict[str, Any]:
    """A generation as a row of the output tells it."""
    shown: dict[str, Any] = {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": dict(result.usage),
    }
    if result.reasoning is not None:
        shown["reasoning"] = result.reasoning
    if result.tool_calls:
        shown["tool_calls"] = list(result.tool_calls)
    if result.logprobs is not None:
        shown["logprobs"] = result.logprobs
    return shown


def _value(value: object) -> object:
    """A JSON value for a value of another type. Nothing is guessed: a text in its place would be found too late."""
    if isinstance(value, InferenceResult):
        return generation(value)
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)  # their order is another in each process
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if inspect.iscoroutine(value):
        value.close()  # which would be told as "never awaited", too
        raise TypeError("a coroutine is no result: an `await` is missing")
    try:
        return plain(value)
    except TypeError:
        raise TypeError(f"there is a {type(value).__qualname__} in it: {told(value)[:100]}") from None


# ASCII: lone surrogates, which JSON may hold and UTF-8 may not, come out as they went in.
_encode = make_encoder(json.JSONEncoder(default=_value, allow_nan=False))


def encode(output: object) -> bytes:
    """One line of JSON, with its newline.

    What is no number (NaN, infinity) is null: JSON has no word for it, and readers refuse those that Python uses.

    Raises:
        TypeError, ValueError, RecursionError: it cannot be written.
    """
    try:
        text = _encode(output)
    except ValueError:
        text = _encode(_finite(output))
    return text.encode() + b"\n"


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case InferenceResult():
            return _finite(generation(value))
        case dict():
            return {name: _finite(each) for name, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def describe_error(error: TrinferError) -> dict[str, Any]:
    """An error as a row of the output tells it."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
    if isinstance(error, RequestError):
        described["status"] = error.status
    return described


def request_id() -> str:
    """An id for a request to which the server has given none."""
    return f"req_{uuid.uuid4().hex}"


def batch_id(item: Item) -> str:
    """The id of a line in a file of OpenAI's batch API."""
    return f"batch_req_{item.key.hex()}"


def batch_line(item: Item, error: TrinferError) -> dict[str, Any]:
    """A failure as OpenAI's batch API tells it: an answer that is an error, or an error where there was no answer."""
    response = told = None
    # An answer that cannot be read comes with a status of 200: that is no answer with an error.
    if isinstance(error, RequestError) and error.status is not None and error.status >= 400:
        message, kind = error.server_message or error.message, type(error).__name__
        body = {"error": {"message": message, "type": kind, "param": None, "code": error.status}}
        response = {"status_code": error.status, "request_id": error.request_id or request_id(), "body": body}
    else:
        told = {"code": type(error).__name__, "message": error.message}
    custom_id = item.id if isinstance(item.id, str) else json.dumps(item.id)
    return {"id": batch_id(item), "custom_id": custom_id, "response": response, "error": told}


def error_line(item: Item, error: TrinferError) -> dict[str, Any]:
    """A failure in the form of an error file of OpenAI's batch API, with the place of the row."""
    return {**batch_line(item, error), "place": item.place}
