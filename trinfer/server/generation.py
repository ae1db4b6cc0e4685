"""Generations on top of requests: payloads from prompts, and answers in a form that was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trinfer.errors import BadRequestError, StructuredOutputError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

__all__ = ["StructuredModel", "generation_payload", "structured"]

M = TypeVar("M", covariant=True)

SHOWN = 200  # characters of an answer that does not fit


class StructuredModel(Protocol[M]):
    """What is needed of a pydantic model (version 2); trinfer does not depend on it."""

    __name__: str

    def model_json_schema(self) -> dict[str, Any]: ...
    def model_validate_json(self, json_data: str) -> M: ...


def generation_payload(prompt: str | Sequence[Mapping[str, Any]], *, use_chat: bool) -> dict[str, Any]:
    """The payload for a prompt or messages.

    Raises:
        BadRequestError: messages without the chat route.
    """
    if isinstance(prompt, str):
        return {"messages": [{"role": "user", "content": prompt}]} if use_chat else {"prompt": prompt}
    if not use_chat:
        raise BadRequestError("messages need the chat route", advice="set use_chat=True, or give a text", attempts=0)
    return {"messages": list(prompt)}


async def structured(
    ask: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    payload: dict[str, Any],
    model: StructuredModel[Any],
    retries: int,
) -> InferenceResult:
    """Ask until an answer fits the model, ``retries`` more times at most.

    Raises:
        StructuredOutputError: none did. What ``ask`` raises comes out.
    """
    schema = {"name": model.__name__, "schema": model.model_json_schema(), "strict": True}
    payload = {"response_format": {"type": "json_schema", "json_schema": schema}, **payload}
    for attempt in range(retries + 1):
        result = InferenceResult.from_response(await ask(payload))
        try:
            return replace(result, parsed=model.model_validate_json(result.text))
        except ValueError as error:  # pydantic's ValidationError is one
            if attempt == retries:
                failure = StructuredOutputError(
                    f"no answer of {retries + 1} fitted {model.__name__}; the last was {result.text[:SHOWN]!r}",
                    cause="the answer was cut off"
                    if result.finish_reason == "length"
                    else "the server does not enforce the schema, or the model does not follow it",
                    advice="raise max_tokens"
                    if result.finish_reason == "length"
                    else "check that the engine supports response_format with json_schema",
                    payload=payload,
                )
                failure.text = result.text
                raise failure from error
    raise AssertionError("unreachable: the last attempt returns or raises")
