"""What a server is asked for: requests, streams, generations, and the ways around them.

Rule: everything here works on the engine of the moment. Which one that is, and whether there is one, is the business of
the supervisor; what becomes of a request whose engine dies, that of `trinfer.server.in_flight`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from trinfer.errors import InferenceError, ServerError
from trinfer.results import InferenceResult
from trinfer.server.generation import StructuredModel, generation_payload, structured
from trinfer.server.in_flight import InFlight, ServerStream
from trinfer.server.lifecycle import Lifecycle, ServerState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trinfer.config import InferenceConfig
    from trinfer.http.api import ApiClient, JsonStream
    from trinfer.http.control import HttpxClient
    from trinfer.server.link import Link
    from trinfer.server.supervisor import Supervisor

__all__ = ["RequestSurface"]


class RequestSurface:
    """The part of `trinfer.InferenceServer` that sends requests."""

    config: InferenceConfig
    _lifecycle: Lifecycle
    _in_flight: InFlight
    _supervisor: Supervisor
    _has_own_requests: bool
    _home: trio.lowlevel.TrioToken | None  # the event loop in which it was entered

    @property
    def name(self) -> str:
        """For messages."""
        raise NotImplementedError

    @property
    def uds(self) -> str | None:
        """The engine's unix socket, if it listens on one."""
        raise NotImplementedError

    def get_base_url(self) -> str:
        """Base URL of the engine."""
        raise NotImplementedError

    def _api_key(self) -> str | None:
        return self.config.api_key

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Send one complete payload; subclasses may override it for engines with routes of their own."""
        return await self._api().post_json(self.route, payload, timeout=self.config.request_timeout)

    async def wait_ready(self) -> None:
        """Return once the engine answers and is known to be ours.

        Raises:
            ServerError: it failed, was stopped or drains; every waiter gets an error of its own with the same cause.
        """
        self._check_home()
        await self._lifecycle.wait_ready()

    @property
    def route(self) -> str:
        """Path of generation requests, by ``use_chat``."""
        return "/v1/chat/completions" if self.config.use_chat else "/v1/completions"

    @property
    def model(self) -> str:
        """Name of the model in requests: the configured one, else the first that the server offers."""
        return self.config.model or self._supervisor.found_model

    async def make_request(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Wait for readiness, send one request, and return the server's answer.

        The payload is not changed; the model's name and ``default_generation_params`` are filled in where it has none.
        ``request_timeout`` holds from the moment that the engine is ready.

        Raises:
            InferenceError: this request failed: the server refused it, it took too long, its connection broke, …
            ServerError: the engine failed or was stopped before it answered; with the log's last lines.

        Cancelled: the request's connection is closed, so that the engine stops generating.
        """
        in_flight = self._in_flight
        in_flight.count += 1
        in_flight.total += 1
        try:
            if self._lifecycle.state is not ServerState.READY:
                await self.wait_ready()
            complete = self._complete(payload)
            sent_in = self._lifecycle.attempt
            try:
                if self._has_own_requests:
                    return await in_flight.answer(partial(self._make_request, complete))
                # The short way for the usual case: each layer between costs on every request.
                return await self._api().post_json(self.route, complete, timeout=self.config.request_timeout)
            except InferenceError as error:
                return await in_flight.replay(error, sent_in, partial(self._send_again, self.route, complete), payload)
        finally:
            in_flight.count -= 1

    async def _send_again(self, path: str, complete: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._has_own_requests and path == self.route:
            return await self._in_flight.answer(partial(self._make_request, complete))
        return await self._api().post_json(path, complete, timeout=max(seconds, 0.001))

    async def request(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """POST to another route of the engine: embeddings, rerank, score, responses, tokenize, …

        Args:
            path: such as ``/v1/embeddings``.
            payload: the model's name is filled in; generation parameters are not.

        Raises, and when cancelled: as `make_request`.
        """
        self._in_flight.count += 1
        self._in_flight.total += 1
        try:
            await self._until_ready()
            complete = {"model": self.model, **payload} if self.model else dict(payload)
            sent_in = self._lifecycle.attempt
            try:
                return await self._api().post_json(path, complete, timeout=self.config.request_timeout)
            except InferenceError as error:
                again = partial(self._send_again, path, complete)
                return await self._in_flight.replay(error, sent_in, again, payload)
        finally:
            self._in_flight.count -= 1

    def stream_request(self, payload: Mapping[str, Any]) -> ServerStream:
        """Send one request, and iterate over its chunks as they come.

        ``async for chunk in server.stream_request(payload)``: chunks are the server's JSON objects, up to ``[DONE]``.
        Leaving the loop early closes the connection when the stream is dropped; ``async with`` closes it at once.

        Raises, in the loop: as `make_request`; errors after the first chunk say how many came. Cancelled: likewise.
        """
        begin = partial(self._open_stream, payload)
        return ServerStream(begin, self._in_flight, self._lifecycle, payload, self.config.request_timeout)

    async def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        response_model: StructuredModel[Any] | None = None,
        max_validation_retries: int = 2,
        **params: Any,  # noqa: ANN401  # generation parameters, whatever the server knows
    ) -> InferenceResult:
        """One generation, for a prompt or a list of messages.

        Args:
            prompt: a text, or messages (on the chat route only).
            response_model: a pydantic model. Its JSON schema is sent as ``response_format``, and the text is read into
                it, as ``result.parsed``.
            max_validation_retries: how often an answer that does not fit is asked for again.
            params: max_tokens, temperature, ….

        Raises:
            StructuredOutputError: no answer fitted the response_model.
            InferenceError, ServerError: as `make_request`. Cancelled: likewise.
        """
        payload = {**generation_payload(prompt, use_chat=self.config.use_chat), **params}
        if response_model is None:
            return InferenceResult.from_response(await self.make_request(payload))
        return await structured(self.make_request, payload, response_model, max_validation_retries)

    @property
    def openai_base_url(self) -> str:
        """URL for clients of the user's own, with ``/v1``; the key is `api_key`.

        Raises:
            ServerError: the engine is reached through a unix socket, or does not run.
        """
        if self.uds is not None:
            raise ServerError(
                f"{self.name} listens on a unix socket", advice='use transport="tcp" for clients of your own'
            )
        return f"{self.get_base_url()}/v1"

    @property
    def api_key(self) -> str | None:
        """The key that the engine or endpoint asks for; None without one."""
        return self._api_key()

    @property
    def http(self) -> HttpxClient:
        """An `httpx.AsyncClient` for everything else; its base URL is the engine's. Closed with the server."""
        return self._link().http

    async def _until_ready(self) -> None:
        if self._lifecycle.state is not ServerState.READY:
            await self.wait_ready()

    async def _open_stream(self, payload: Mapping[str, Any], timeout: float, accepted: bool) -> JsonStream:
        if not accepted:
            self._in_flight.total += 1
            await self._until_ready()
        elif self._lifecycle.state is not ServerState.READY:
            self._check_home()
            await self._lifecycle.wait_ready(accepted=True)
        return self._api().stream_json(self.route, self._complete(payload), timeout=timeout)

    def _check_home(self) -> None:
        """In another event loop, everything that is waited for here would wake nobody, and a request never end."""
        if self._home is not None and trio.lowlevel.current_trio_token() is not self._home:
            raise RuntimeError(
                f"{self.name} runs in another trio.run(), of another thread: "
                "send requests from there, with trio.from_thread.run() and its trio_token"
            )

    def _api(self) -> ApiClient:
        self._check_home()
        return self._link().api

    def _link(self) -> Link:
        if self._supervisor.link is None:
            raise self._lifecycle.down_error()
        return self._supervisor.link

    def _complete(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        complete: dict[str, Any] = {**self.config.default_generation_params, **payload}
        model = self.model
        if model:
            complete.setdefault("model", model)
        return complete

    def _token_probe(self) -> dict[str, Any]:
        """The smallest generation that there is."""
        return self._complete({**generation_payload("Hi", use_chat=self.config.use_chat), "max_tokens": 1})
