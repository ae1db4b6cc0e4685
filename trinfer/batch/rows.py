"""Rows: from one line of input to a request, and from an answer to one line of output.

Rule: a row's own fields are the user's, and come out as they went in. trinfer adds ``id`` (where there is none) and
either ``generation`` or ``error``; fields of these two names in the input are replaced.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trinfer.errors import RequestError, TrinferError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.results import InferenceResult

__all__ = ["InvalidRow", "PromptOptions", "Row", "encode", "failed", "finished", "parse_row"]

MESSAGES = "messages"
PROMPT_FIELDS = (MESSAGES, "prompt", "text")


class InvalidRow(TrinferError):
    """A line of input that cannot become a request; the message names file and line."""


@dataclass(frozen=True)
class PromptOptions:
    """How a row becomes a request.

    Attributes:
        use_chat: make ``messages`` (True) or a ``prompt`` (False).
        prompt_field: the field that holds the prompt; by default the first of messages, prompt and text.
        system_prompt: put before the messages of rows that have no system message of their own.
    """

    use_chat: bool = True
    prompt_field: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of input.

    Attributes:
        place: file and line, for messages; the id of rows that have none.
        size: bytes of the line, for progress.
        fields: what the line holds; empty where it is not valid.
        payload: the request; None where it is not valid.
        error: why it is not valid; None where it is.
    """

    place: str
    size: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    payload: Mapping[str, Any] | None = None
    error: InvalidRow | None = None

    @property
    def id(self) -> Any:  # noqa: ANN401  # the user's id, of whatever type
        return self.fields["id"] if self.fields.get("id") is not None else self.place


def parse_row(line: bytes, place: str, options: PromptOptions) -> Row:
    """Read one line; what is wrong with it is told in the row, and never raised."""
    fields: dict[str, Any] = {}
    try:
        fields = _read_object(line, place)
        return Row(place, len(line), fields, _payload(fields, place, options))
    except InvalidRow as error:
        return Row(place, len(line), fields, None, error)


def _read_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidRow(f"{place}: the line is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"{place}: the line is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRow(f"{place}: the line is a JSON {type(value).__name__}, not an object")
    return value


def _payload(fields: Mapping[str, Any], place: str, options: PromptOptions) -> dict[str, Any]:
    wanted = (options.prompt_field,) if options.prompt_field else PROMPT_FIELDS
    name = next((name for name in wanted if fields.get(name) is not None), None)
    if name is None:
        raise InvalidRow(f"{place}: the row has no field {' or '.join(map(repr, wanted))}")
    prompt = fields[name]
    if isinstance(prompt, list):
        if not options.use_chat:
            raise InvalidRow(f"{place}: the field {name!r} holds messages, which need the chat route")
        if not prompt or not all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in prompt):
            raise InvalidRow(f"{place}: the field {name!r} is no list of messages with roles")
        messages = prompt
    elif isinstance(prompt, str) and name != MESSAGES:
        if not options.use_chat:
            return {"prompt": prompt}
        messages = [{"role": "user", "content": prompt}]
    else:
        kinds = "no list of messages with roles" if name == MESSAGES else "neither a text nor a list of messages"
        raise InvalidRow(f"{place}: the field {name!r} is {kinds}")
    if options.system_prompt is not None and messages[0]["role"] not in {"system", "developer"}:
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    return {"messages": messages}


def finished(row: Row, result: InferenceResult) -> dict[str, Any]:
    """The output row of a generation."""
    generation: dict[str, Any] = {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": dict(result.usage),
    }
    if result.reasoning is not None:
        generation["reasoning"] = result.reasoning
    if result.tool_calls:
        generation["tool_calls"] = list(result.tool_calls)
    if result.logprobs is not None:
        generation["logprobs"] = result.logprobs
    return {**_own_fields(row), "id": row.id, "generation": generation}


def failed(row: Row, error: TrinferError) -> dict[str, Any]:
    """The output row of a failure."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
    if isinstance(error, RequestError):
        described["status"] = error.status
    return {**_own_fields(row), "id": row.id, "error": described}


def _own_fields(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.fields.items() if key not in {"generation", "error"}}


def encode(output: Mapping[str, Any]) -> bytes:
    """One line of JSON, with its newline."""
    # ASCII: lone surrogates, which JSON may hold and UTF-8 may not, come out as they went in.
    return json.dumps(output).encode() + b"\n"
