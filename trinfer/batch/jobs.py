"""Jobs: one generation per row, and the user's own rollouts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from trinfer.batch.items import Generate, Item, Outcome, describe_error, encode, generation
from trinfer.batch.rollouts import rollout_error
from trinfer.data.documents import Document
from trinfer.data.records import InvalidRow, Raw, record_id
from trinfer.durable.frames import LARGEST_BODY
from trinfer.errors import RolloutError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from trinfer.batch.prompts import Prompts

    RolloutFunction = Callable[..., Awaitable[Any]]

__all__ = ["GenerationJob", "RolloutJob", "encoded"]

RESULTS = {"generation", "generations", "error"}


class GenerationJob:
    """One request for each row; ``rollouts`` times.

    A row's own fields are the user's, and come out as they went in. trinfer adds ``id`` (where there is none) and
    ``generation``, ``generations`` or ``error``; fields of these names in the input are replaced.
    """

    read = staticmethod(InferenceResult.from_response)
    code = ""

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

    def rollout(self, item: Item, generate: Generate) -> Awaitable[InferenceResult]:
        return generate(item.value[1])

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        output = self._own_fields(item)
        if self.rollouts == 1:
            output["generation"] = generation(results[0])
        else:
            output["generations"] = [generation(result) for result in results]
        return Outcome(encoded(item, output))

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


def encoded(item: Item, output: Mapping[str, Any]) -> bytes:
    """A line of output.

    Raises:
        RolloutError: it cannot be written as JSON (nested too deeply, a dict that holds itself, …), or is huge.
    """
    try:
        line = encode(output)
    except (ValueError, TypeError, RecursionError) as error:
        raise RolloutError(
            f"{item.place}: the row cannot be written as JSON: {error}",
            advice="return generations, dicts, lists, texts, numbers, booleans and None, and nest them not too deeply",
        ) from error
    except Exception as error:  # of an object that cannot be told
        raise rollout_error(item, error) from error
    if len(line) > LARGEST_BODY:
        raise RolloutError(
            f"{item.place}: the row has {len(line)} bytes, and at most {LARGEST_BODY} can be kept",
            advice="return less, such as the path of a file that the rollout has written",
        )
    return line


class RolloutJob:
    """The user's function, ``rollouts`` times for each document; its results go to the document's metadata.

    Args:
        context: passed on to the function, as keywords.
        text_field: where records of the input have their text.
        code: stands for the function's code.
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
        code: str = "",
    ) -> None:
        self._function, self.rollouts, self.code = function, rollouts, code
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

    def rollout(self, item: Item, generate: Generate) -> Awaitable[Any]:
        result = self._function(item.value, generate, **self.context)
        if not inspect.isawaitable(result):
            raise TypeError(f"the rollout function gives a {type(result).__name__}: it must be `async def`, and return")
        return result

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        told = [result for result in results if result is not None]
        if not told:
            return Outcome(None)
        document: Document = item.value
        try:  # the rollout may have put anything in the place of its parts
            document.metadata[self._metadata_key] = told
            fields = document.to_dict()
        except Exception as error:
            raise rollout_error(item, error) from error
        return Outcome(encoded(item, fields))

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        return None
