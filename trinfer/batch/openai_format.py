"""The file format of OpenAI's batch API: requests in, responses out, line by line.

Source: https://platform.openai.com/docs/guides/batch and https://docs.vllm.ai/en/latest/features/batch (``vllm
run-batch`` reads and writes the same).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from trinfer.batch.items import Generate, Item, Outcome, encode
from trinfer.data.records import InvalidRow, Raw, record_id
from trinfer.errors import ProtocolError, RequestError, TrinferError
from trinfer.results import InferenceResult

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    def __init__(self, model: str | None = None) -> None:
        self._model = model

    @staticmethod
    def read(response: Mapping[str, Any]) -> InferenceResult:
        """The answer as it is: embeddings and scores have no text."""
        try:
            return InferenceResult.from_response(response)
        except ProtocolError:
            usage = response.get("usage")
            return InferenceResult("", usage=usage if isinstance(usage, dict) else {}, raw=response)

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
        if self._model and body.get("model") not in {None, self._model}:
            raise InvalidRow(f"{place}: the model {body['model']!r} is not the one that runs: {self._model!r}")
        return url, body

    async def rollout(self, item: Item, generate: Generate) -> Any:  # noqa: ANN401  # the server's answer
        url, body = item.value
        # The route travels with the payload, up to `Routed`, which sends it.
        return await generate({ROUTE: url, **body})

    def finish(self, item: Item, results: list[Any]) -> Outcome:
        result = results[0]
        response = {"status_code": 200, "request_id": _request_id(), "body": dict(result.raw)}
        return Outcome(encode(_line(item, response, None)))

    def failed(self, item: Item, error: TrinferError) -> bytes | None:
        response = None
        if isinstance(error, RequestError) and error.status is not None:
            message = error.server_message or error.message
            body = {"error": {"message": message, "type": type(error).__name__, "param": None, "code": error.status}}
            request_id = error.request_id or _request_id()
            response = {"status_code": error.status, "request_id": request_id, "body": body}
        told = {"code": type(error).__name__, "message": error.message}
        return encode(_line(item, response, told))


ROUTE = "\0route"  # no JSON field that anybody uses


def _line(item: Item, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    """A line of output, or of the error file: both have the same form."""
    return {"id": f"batch_req_{item.key.hex()}", "custom_id": item.id, "response": response, "error": error}


def _request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class Routed:
    """A server as the batch sees it, which sends each request to its own route."""

    def __init__(self, server: Any) -> None:  # noqa: ANN401  # an InferenceServer
        self._server = server

    async def wait_ready(self) -> None:
        await self._server.wait_ready()

    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        body = dict(payload)
        answer: dict[str, Any] = await self._server.request(body.pop(ROUTE), body)
        return answer
