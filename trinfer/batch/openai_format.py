"""The file format of OpenAI's batch API: requests in, responses out, line by line.

Source: https://platform.openai.com/docs/guides/batch and https://docs.vllm.ai/en/latest/features/batch (``vllm
run-batch`` reads and writes the same).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trinfer.batch.items import Generate, Item, Outcome, batch_id, batch_line, encode, request_id
from trinfer.batch.jobs import encoded
from trinfer.data.records import InvalidRow, Raw, record_id
from trinfer.errors import ProtocolError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trinfer.server.base import InferenceServer

__all__ = ["ROUTES", "BatchFileJob", "Routed"]

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/v1/responses",
)
REQUIRED = {"custom_id": str, "method": str, "url": str, "body": dict}


class BatchFileJob:
    """Each line is a request of its own; its answer goes out whole.

    Args:
        model: the only model that bodies may name; None for any.
    """

    rollouts = 1
    keeps_calls = False
    code = ""

    def __init__(self, model: str | None = None) -> None:
        self._model = model

    @staticmethod
    def read(response: Mapping[str, Any]) -> InferenceResult:
        """The answer as it is: embeddings and scores have no text."""
        try:
            return InferenceResult.from_response(response)
        except ProtocolError:
            return InferenceResult("", usage=_usage(response.get("usage")), raw=response)

    def prepare(self, raw: Raw, key: bytes, number: int) -> Item:
        item = Item(key, record_id(key, number), raw.place, raw.size)
        try:
            fields = raw.fields()
            if isinstance(fields.get("custom_id"), str):
                item.id = fields["custom_id"]
            item.value = self._request(fields, raw.place)
        except InvalidRow as error:
            item.error = error
        return item

    def _request(self, fields: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
        for name, kind in REQUIRED.items():
            if not isinstance(fields.get(name), kind):
                what = "missing" if name not in fields else f"no {'object' if kind is dict else 'text'}"
                raise InvalidRow(f"{place}: the field {name!r} is {what}")
        if fields["method"] != "POST":
            raise InvalidRow(f"{place}: the method {fields['method']!r} is not POST")
        url = fields["url"]
        if url not in ROUTES:
            raise InvalidRow(f"{place}: the url {url!r} is not known: allowed are {', '.join(ROUTES)}")
        body = dict(fields["body"])
        if body.pop("stream", None):
            raise InvalidRow(f"{place}: the body asks for a stream, which a batch has not")
        model = body.get("model")
        if model is None:
            body.pop("model", None)  # for the server to fill in
        elif self._model and model != self._model:
            raise InvalidRow(f"{place}: the model {model!r} is not the one that runs: {self._model!r}")
        return url, body

    async def rollout(self, item: Item, generate: Generate) -> Any:  # noqa: ANN401  # the server's answer
        url, body = item.value
        # The route travels with the payload, up to `Routed`, which sends it.
        return await generate({**body, ROUTE: url})

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        result = results[0]
        response = {"status_code": 200, "request_id": request_id(), "body": dict(result.raw)}
        line = {"id": batch_id(item), "custom_id": item.id, "response": response, "error": None}
        return Outcome(encoded(item, line))

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        return encode(batch_line(item, error))


ROUTE = "\0route"  # no JSON field that anybody uses


def _usage(usage: object) -> Mapping[str, Any]:
    """Counts by the names that completions use; the responses route has others."""
    if not isinstance(usage, dict):
        return {}
    other = {"prompt_tokens": usage.get("input_tokens"), "completion_tokens": usage.get("output_tokens")}
    return {**other, **usage}


class Routed:
    """A server as the batch sees it, which sends each request to its own route."""

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    async def wait_ready(self) -> None:
        await self._server.wait_ready()

    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        body = dict(payload)
        answer: dict[str, Any] = await self._server.request(body.pop(ROUTE), body)
        return answer
