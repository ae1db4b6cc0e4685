"""What goes through a run: one record on its way from the input to its outcome, and the jobs that are done with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trinfer.errors import RequestError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from trinfer.batch.summary import Summary
    from trinfer.data.records import InvalidRow, Raw
    from trinfer.results import InferenceResult

__all__ = ["Generate", "Generator", "Item", "Job", "Outcome", "Progress", "describe_error", "encode", "error_line"]

# The default of json.dumps is to make an encoder anew for each call that has an option.
_ENCODER = json.JSONEncoder(default=str)


class Item:
    """One record of the input.

    Attributes:
        key: 16 bytes that stand for its content, and for its number among equal ones.
        id: its own id, or one made of the key.
        place: file and line, for messages.
        size: bytes of the input, for progress.
        value: what the job has made of the record.
        error: why it cannot be worked on; None where it can.
        calls: answers that a run before this one had got for it, by `trinfer.batch.calls.call_key`.
    """

    __slots__ = ("calls", "error", "id", "key", "place", "size", "value")

    def __init__(self, key: bytes, id: Any, place: str, size: int) -> None:  # noqa: A002, ANN401  # the user's id
        self.key, self.id, self.place, self.size = key, id, place, size
        self.value: Any = None
        self.error: InvalidRow | None = None
        self.calls: dict[bytes, dict[str, Any]] | None = None


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
    """

    rollouts: int
    keeps_calls: bool

    def read(self, response: Mapping[str, Any], /) -> InferenceResult:
        """Make a result of a server's answer. Raises InferenceError for one that is none."""
        ...

    def prepare(self, raw: Raw, key: bytes, number: int) -> Item:
        """Look into a record; what is wrong with it is told in the item, and never raised. Called in a thread."""
        ...

    async def rollout(self, item: Item, generate: Generate) -> Any:  # noqa: ANN401  # the job's own
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


def encode(output: Any) -> bytes:  # noqa: ANN401  # a JSON value
    """One line of JSON, with its newline."""
    # ASCII: lone surrogates, which JSON may hold and UTF-8 may not, come out as they went in.
    return _ENCODER.encode(output).encode() + b"\n"


def describe_error(error: TrinferError) -> dict[str, Any]:
    """An error as a row of the output tells it."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
    if isinstance(error, RequestError):
        described["status"] = error.status
    return described


def error_line(item: Item, error: TrinferError) -> dict[str, Any]:
    """A failure in the form of an error file of OpenAI's batch API, with the place of the row."""
    response = None
    if isinstance(error, RequestError) and error.status is not None:
        body = {"error": {"message": error.server_message or error.message, "type": type(error).__name__}}
        response = {"status_code": error.status, "request_id": error.request_id or "", "body": body}
    return {
        "id": f"batch_req_{item.key.hex()}",
        "custom_id": item.id if isinstance(item.id, str) else json.dumps(item.id),
        "response": response,
        "error": {"code": type(error).__name__, "message": error.message},
        "place": item.place,
    }
