"""Streams, other routes, generations and clients of the user's own, against real servers."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest
import trio
import trio.testing

from tests.engine_configs import CHAT, fake_config, text_of
from trinfer import (
    BadRequestError,
    ConnectionLost,
    CustomServer,
    DummyServer,
    InferenceConfig,
    NotFoundError,
    ServerError,
    StructuredOutputError,
)


def dummy(**settings) -> DummyServer:
    return DummyServer(InferenceConfig("dummy", **settings))


def text(chunks: list[dict]) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


@pytest.mark.parametrize("transport", ["tcp", "uds"])
async def test_a_stream_gives_what_the_whole_answer_gives(transport):
    payload = {**CHAT, "max_tokens": 12}
    async with dummy(transport=transport) as server:
        usage = {"stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in server.stream_request({**payload, **usage})]
        whole = await server.make_request(payload)
        assert text(chunks) == text_of(whole)
        assert chunks[-1]["usage"] == whole["usage"]
        assert "stream" not in payload


async def test_a_stream_of_completions():
    async with dummy(use_chat=False) as server:
        chunks = [chunk async for chunk in server.stream_request({"prompt": "hello", "max_tokens": 5})]
        whole = await server.make_request({"prompt": "hello", "max_tokens": 5})
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(whole)


async def test_leaving_a_stream_early_frees_the_engine():
    # One slot and no queue: a stream that went on in the engine would have the next request refused.
    options = {"token_latency": 5, "max_concurrency": 1, "queue_limit": 0}
    async with dummy(model_kwargs=options, request_max_attempts=1) as server:
        for _ in range(3):
            async for chunk in server.stream_request(CHAT):
                assert chunk["choices"]
                break
            await trio.sleep(0.05)
            async with server.stream_request(CHAT) as stream:
                await stream.__anext__()
            await trio.sleep(0.05)
        with trio.move_on_after(0.1):
            async for _ in server.stream_request(CHAT):
                pass
        await trio.sleep(0.05)
        async for _ in server.stream_request(CHAT):
            break


async def test_a_refused_stream_is_the_same_error_as_a_refused_request():
    async with dummy() as server:
        with pytest.raises(BadRequestError) as caught:
            async for _ in server.stream_request({"messages": []}):
                pass
        assert caught.value.payload == {"messages": []}


async def test_an_engine_that_dies_ends_its_streams_with_its_failure():
    # 200 words in one answer; the engine is killed by the second request.
    async with CustomServer(fake_config("--crash-at", "request:2", "--latency", "0.05")) as server:
        await server.wait_ready()
        seen = []

        async def listen() -> None:
            while True:
                seen.extend([chunk async for chunk in server.stream_request(CHAT)])

        with trio.fail_after(10), pytest.raises((ServerError, ConnectionLost)):
            await listen()
        assert text(seen) == "echo: hello"  # of the first request


async def test_streams_end_when_the_server_stops():
    async with trio.open_nursery() as nursery, dummy(model_kwargs={"token_latency": 30}) as server:

        async def listen() -> None:
            with pytest.raises(ServerError, match="stopped"):
                async for _ in server.stream_request(CHAT):
                    pass

        nursery.start_soon(listen)
        await server.wait_ready()
        await trio.sleep(0.1)


async def test_two_tasks_cannot_wait_for_the_same_stream():
    async with dummy(model_kwargs={"token_latency": 0.05}) as server:
        for begun in (False, True):
            stream = server.stream_request({**CHAT, "max_tokens": 3})
            if begun:
                await anext(stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read_to_the_end, stream)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await anext(stream)
            assert server.requests_in_flight == 0
        pool = server._link().api.pool
        assert pool.in_use == 0


async def _read_to_the_end(stream):
    chunks = [chunk async for chunk in stream]
    assert chunks[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize("when", ["before the first step", "while it waits for the engine", "while it waits"])
async def test_a_closed_stream_is_at_its_end(when):
    load = 0.3 if when == "while it waits for the engine" else 0
    async with dummy(model_kwargs={"latency": 30, "token_latency": 30, "load_time": load}) as server:
        stream = server.stream_request(CHAT)
        seen = []

        async def read() -> None:
            seen.extend([chunk async for chunk in stream])
            seen.append("end")

        async with trio.open_nursery() as nursery:
            if when == "before the first step":
                stream.close()
            nursery.start_soon(read)
            if when == "while it waits":
                await server.wait_ready()
            await trio.sleep(0.1)
            stream.close()
        assert seen == ["end"]
        assert server.requests_in_flight == 0
        if not load:
            assert server._link().api.pool.in_use == 0


async def test_other_routes():
    async with dummy(default_generation_params={"temperature": 0.5}) as server:
        answer = await server.request("/v1/completions", {"prompt": "x"})
        assert answer["object"] == "text_completion"
        with pytest.raises(NotFoundError, match="/v1/embeddings"):
            await server.request("/v1/embeddings", {"input": "x"})


async def test_generate():
    async with dummy() as server:
        result = await server.generate("hello", max_tokens=3)
        assert len(result.text.split()) == result.completion_tokens == 3
        assert result.finish_reason == "length"
        again = await server.generate([{"role": "user", "content": "hello"}], max_tokens=3)
        assert again.text == result.text
    async with dummy(use_chat=False) as server:
        assert (await server.generate("hello", max_tokens=3)).text
        with pytest.raises(BadRequestError, match="chat route"):
            await server.generate([{"role": "user", "content": "hello"}])


class City(pydantic.BaseModel):
    name: str
    people: int


class FormServer(DummyServer):
    """Answers with the texts that it is given, and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        super().__init__(InferenceConfig("dummy"))
        self.texts, self.asked = list(texts), []

    async def _make_request(self, payload):
        self.asked.append(payload)
        return {"choices": [{"message": {"content": self.texts.pop(0)}, "finish_reason": "stop"}]}


async def test_structured_output_is_asked_for_again_until_it_fits():
    good = json.dumps({"name": "Oslo", "people": 700_000})
    async with FormServer("no json", '{"name": "Oslo"}', good) as server:
        result = await server.generate("a city", response_model=City)
        assert result.parsed == City(name="Oslo", people=700_000)
        assert result.text == good
        form = server.asked[0]["response_format"]
        assert form["type"] == "json_schema"
        assert form["json_schema"]["schema"] == City.model_json_schema()
        assert len(server.asked) == 3
    async with FormServer(*["no json"] * 2) as server:
        with pytest.raises(StructuredOutputError, match="no answer of 2 fitted City") as caught:
            await server.generate("a city", response_model=City, max_validation_retries=1)
        assert caught.value.text == "no json"
        assert isinstance(caught.value.__cause__, pydantic.ValidationError)


async def test_clients_of_the_users_own():
    async with dummy(transport="tcp", api_key="k3y") as server:
        with pytest.raises(ServerError, match="not been started"):
            _ = DummyServer(server.config).http
        await server.wait_ready()
        answer = await server.http.get("/health", headers={})
        assert answer.json() == {"status": "ok"}
        assert server.api_key == "k3y"

        def ask(url: str, key: str) -> list[str]:
            with openai.OpenAI(base_url=url, api_key=key) as client:
                return [model.id for model in client.models.list()]

        names = await trio.to_thread.run_sync(ask, server.openai_base_url, server.api_key)
        assert names == ["dummy"]
    async with dummy(transport="uds") as server:
        with pytest.raises(ServerError, match="unix socket"):
            _ = server.openai_base_url
        await server.wait_ready()
        with pytest.raises(ServerError, match="unix socket"):
            _ = server.openai_base_url
        assert (await server.http.get("/health")).status_code == 200


async def test_files_for_tls_that_are_not_there_are_an_error_of_the_start():
    from trinfer import EndpointServer

    config = InferenceConfig(
        "endpoint", endpoint_url="https://x.invalid", tls_ca_file="/no/such.pem", server_start_max_retries=0
    )
    async with EndpointServer(config) as server:
        with pytest.raises(ServerError, match="No such file") as caught:
            await server.wait_ready()
        assert "tls_ca_file" in (caught.value.advice or "")
