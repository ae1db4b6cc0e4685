"""Jobs: one generation per row, and the user's own rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trinfer.batch.items import Generate, Item, Outcome, describe_error, encode
from trinfer.data.documents import Document
from trinfer.data.records import InvalidRow, Raw, record_id
from trinfer.errors import RolloutError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from trinfer.batch.prompts import Prompts

    RolloutFunction = Callable[..., Awaitable[Any]]

__all__ = ["GenerationJob", "RolloutJob"]

RESULTS = {"generation", "generations", "error"}


class GenerationJob:
    """One request for each row; ``rollouts`` times.

    A row's own fields are the user's, and come out as they went in. trinfer adds ``id`` (where there is none) and
    ``generation``, ``generations`` or ``error``; fields of these names in the input are replaced.
    """

    read = staticmethod(InferenceResult.from_response)

    def __init__(self, prompts: Prompts, rollouts: int = 1) -> None:
        self._prompts = prompts
        self.rollouts = rollouts
        self.keeps_calls = rollouts > 1

    def prepare(self, raw: Raw, key: bytes, number: int) -> Item:
        fields: dict[str, Any] = {}
        payload = None
        error = None
        try:
            fields = raw.fields()
            payload = self._prompts.payload(fields, raw.place)
        except InvalidRow as problem:
            error = problem
        own = fields.get("id")
        item = Item(key, record_id(key, number) if own is None else own, raw.place, raw.size)
        item.value, item.error = (fields, payload), error
        return item

    async def rollout(self, item: Item, generate: Generate) -> InferenceResult:
        return await generate(item.value[1])

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        output = self._own_fields(item)
        if self.rollouts == 1:
            output["generation"] = generation(results[0])
        else:
            output["generations"] = [generation(result) for result in results]
        return Outcome(_encoded(item, output))

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        try:
            return encode({**self._own_fields(item), "error": describe_error(error)})
        except (ValueError, TypeError, RecursionError):  # its own fields are what failed
            return encode({"id": item.id, "error": describe_error(error)})

    @staticmethod
    def _own_fields(item: Item) -> dict[str, Any]:
        output = {name: value for name, value in item.value[0].items() if name not in RESULTS}
        output["id"] = item.id
        return output


def _encoded(item: Item, output: Mapping[str, Any]) -> bytes:
    """A line of output.

    Raises:
        RolloutError: it cannot be written as JSON: nested too deeply, a dict that holds itself, ….
    """
    try:
        return encode(output)
    except (ValueError, TypeError, RecursionError) as error:
        raise RolloutError(
            f"{item.place}: the row cannot be written as JSON: {error}",
            advice="return plain dicts, lists, texts, numbers, booleans and None, and do not nest them too deeply",
        ) from error


def generation(result: InferenceResult) -> dict[str, Any]:
    """A generation as a row of the output tells it."""
    told: dict[str, Any] = {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": dict(result.usage),
    }
    if result.reasoning is not None:
        told["reasoning"] = result.reasoning
    if result.tool_calls:
        told["tool_calls"] = list(result.tool_calls)
    if result.logprobs is not None:
        told["logprobs"] = result.logprobs
    return told


class RolloutJob:
    """The user's function, ``rollouts`` times for each document; its results go to the document's metadata.

    Args:
        context: passed on to the function, as keywords.
        text_field: where records of the input have their text.
    """

    keeps_calls = True
    read = staticmethod(InferenceResult.from_response)

    def __init__(
        self,
        function: RolloutFunction,
        rollouts: int = 1,
        *,
        metadata_key: str = "rollout_results",
        context: Mapping[str, Any] | None = None,
        text_field: str = "text",
    ) -> None:
        self._function, self.rollouts = function, rollouts
        self._metadata_key, self._text_field = metadata_key, text_field
        self.context: Mapping[str, Any] = context or {}

    def prepare(self, raw: Raw, key: bytes, number: int) -> Item:
        name = record_id(key, number)
        item = Item(key, name, raw.place, raw.size)
        try:
            document = Document.from_fields(raw.fields(), name, self._text_field)
            item.id, item.value = document.id, document
        except InvalidRow as error:
            item.error = error
        except ValueError as error:
            item.error = InvalidRow(f"{raw.place}: {error}")
        return item

    async def rollout(self, item: Item, generate: Generate) -> Any:  # noqa: ANN401  # the user's
        return await self._function(item.value, generate, **self.context)

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        told = [_as_json(result) for result in results if result is not None]
        if not told:
            return Outcome(None)
        document: Document = item.value
        document.metadata[self._metadata_key] = told
        return Outcome(_encoded(item, document.to_dict()))

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        return None


def _as_json(result: Any) -> Any:  # noqa: ANN401  # a JSON value or an InferenceResult
    return generation(result) if isinstance(result, InferenceResult) else result
