"""The dummy engine, asked by trinfer and by the official client."""

from __future__ import annotations

import re
from functools import partial

import openai
import pytest
import trio

from tests.engine_configs import CHAT, text_of
from trinfer import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    DummyServer,
    EndpointServer,
    InferenceConfig,
    NotFoundError,
    RateLimitError,
    RequestError,
    ServerError,
)


def dummy(**settings) -> DummyServer:
    options = {key: settings.pop(key) for key in list(settings) if not hasattr(InferenceConfig("dummy"), key)}
    return DummyServer(InferenceConfig("dummy", model_kwargs=options, **settings))


@pytest.mark.parametrize("transport", ["tcp", "uds", "auto"])
async def test_chat_and_completions(transport):
    async with dummy(transport=transport) as server:
        answer = await server.make_request({**CHAT, "max_tokens": 5})
        assert len(text_of(answer).split()) == answer["usage"]["completion_tokens"] == 5
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 5
        assert answer["choices"][0]["finish_reason"] == "length"
        assert text_of(await server.make_request({**CHAT, "max_tokens": 5})) == text_of(answer)
    async with dummy(transport=transport, use_chat=False) as server:
        for prompt, count in (("a b", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2], [3]], 3)):
            answer = await server.make_request({"prompt": prompt, "n": 2})
            assert len(answer["choices"]) == 2 * count
            assert all(choice["text"] for choice in answer["choices"])


async def test_the_official_client():
    async with dummy(transport="tcp", api_key="k3y") as server:
        await server.wait_ready()
        base = f"{server.get_base_url()}/v1"

        def ask() -> None:
            with openai.OpenAI(base_url=base, api_key="k3y", max_retries=0) as client:
                assert [model.id for model in client.models.list()] == ["dummy"]
                messages = [{"role": "user", "content": "hello"}]
                create = partial(client.chat.completions.create, model="dummy", messages=messages, max_tokens=4)
                whole = create()
                assert whole.choices[0].message.role == "assistant"
                assert whole.usage.completion_tokens == 4
                chunks = list(create(stream=True, stream_options={"include_usage": True}))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                assert text == whole.choices[0].message.content
                assert chunks[-1].usage == whole.usage
                plain = client.completions.create(model="dummy", prompt="hello", max_tokens=4)
                streamed = client.completions.create(model="dummy", prompt="hello", max_tokens=4, stream=True)
                assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
                with pytest.raises(openai.NotFoundError):
                    client.chat.completions.create(model="another", messages=messages)
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(model="dummy", messages=[])
            wrong = openai.OpenAI(base_url=base, api_key="wrong", max_retries=0)
            with wrong, pytest.raises(openai.AuthenticationError):
                wrong.models.list()

        await trio.to_thread.run_sync(ask)


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ({"messages": []}, BadRequestError),
        ({"messages": "x"}, BadRequestError),
        ({"messages": [{"content": "x"}]}, BadRequestError),
        ({"messages": [{"role": "user", "content": 5}]}, BadRequestError),
        ({**CHAT, "max_tokens": 0}, BadRequestError),
        ({**CHAT, "n": 0}, BadRequestError),
        ({**CHAT, "model": "another"}, NotFoundError),
        ({**CHAT, "max_tokens": 9000}, ContextLengthError),
    ],
)
async def test_bad_requests_are_refused_as_engines_do(payload, kind):
    async with dummy() as server:
        with pytest.raises(kind):
            await server.make_request(payload)


async def test_load_time_latency_and_concurrency():
    async with dummy(load_time=0.3, latency=0.1, token_latency=0.02, max_concurrency=2) as server:
        began = trio.current_time()
        await server.wait_ready()
        assert trio.current_time() - began >= 0.25
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(server.make_request, {**CHAT, "max_tokens": 3})
        assert 2 * 0.14 * 0.95 <= trio.current_time() - began < 2


async def test_a_full_queue_says_so():
    async with dummy(latency=0.5, max_concurrency=1, queue_limit=1, request_max_attempts=1) as server:
        await server.wait_ready()
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                await server.make_request(CHAT)
                outcomes.append("answered")
            except RateLimitError:
                outcomes.append("refused")

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
    assert sorted(set(outcomes)) == ["answered", "refused"]


async def test_injected_errors_depend_on_the_request_only():
    async with dummy(error_rate=0.5, error_status=418) as server:
        outcomes = []
        for number in [*range(40), *range(40)]:
            try:
                await server.make_request({"messages": [{"role": "user", "content": str(number)}]})
                outcomes.append(True)
            except RequestError as error:
                outcomes.append(error.status != 418)
    assert outcomes[:40] == outcomes[40:]
    assert 5 < sum(outcomes[:40]) < 35


async def test_a_client_that_goes_away_frees_its_slot():
    async with dummy(latency=30, max_concurrency=1, queue_limit=0, request_max_attempts=1) as server:
        await server.wait_ready()
        for _ in range(3):
            # Would the one before still hold the only slot, this would be refused with 429.
            with trio.move_on_after(0.1) as scope:
                await server.make_request(CHAT)
            assert scope.cancelled_caught
            await trio.sleep(0.05)


class Robbed(DummyServer):
    """Its first port is taken by somebody else between lease and bind."""

    thieves: list[trio.SocketListener]
    ports: list[int]

    async def start_server(self) -> trio.Process | None:
        assert self.port is not None
        self.ports.append(self.port)
        if not self.thieves:
            self.thieves += await trio.open_tcp_listeners(self.port, host=self.host)
        return await super().start_server()


async def test_a_port_taken_after_its_lease_costs_no_start_attempt():
    server = Robbed(InferenceConfig("dummy", transport="tcp", server_start_max_retries=0))
    server.thieves, server.ports = [], []
    async with server:
        assert text_of(await server.make_request(CHAT))
        assert len(set(server.ports)) == 2
        assert server.port == server.ports[1]
    for thief in server.thieves:
        await thief.aclose()


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"latency": -1},
        {"latency": "1"},
        {"error_rate": 2},
        {"max_concurrency": 1.5},
        {"error_status": 200},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DummyServer(InferenceConfig("dummy", model_kwargs=options))


# -- the endpoint server, with the dummy as its endpoint ------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_an_endpoint_with_or_without_v1(suffix):
    async with dummy(transport="tcp", served_model_name="found") as behind:
        await behind.wait_ready()
        config = InferenceConfig("endpoint", endpoint_url=behind.get_base_url() + suffix)
        async with EndpointServer(config) as server:
            answer = await server.make_request(CHAT)  # the model's name is that of the endpoint
            assert answer["model"] == "found"
            assert server.model == "found"
        assert await behind.is_ready()  # it was not stopped


async def test_the_key_of_an_endpoint_comes_from_the_environment(monkeypatch):
    async with dummy(transport="tcp", api_key="right") as behind:
        await behind.wait_ready()
        config = InferenceConfig("endpoint", endpoint_url=behind.get_base_url())
        for variable in ("TRINFER_API_KEY", "OPENAI_API_KEY"):
            with monkeypatch.context() as patch:
                patch.setenv(variable, "right")
                async with EndpointServer(config) as server:
                    await server.make_request(CHAT)
        async with EndpointServer(config) as server:
            with pytest.raises((ServerError, AuthenticationError), match="key"):
                await server.make_request(CHAT)


async def test_an_endpoint_that_is_not_there():
    config = InferenceConfig(
        "endpoint",
        endpoint_url="http://127.0.0.1:1/v1",
        server_ready_max_attempts=1,
        server_ready_delay_sec=0.3,
    )
    async with EndpointServer(config) as server:
        with pytest.raises(ServerError, match="not ready within") as caught:
            await server.make_request(CHAT)
        # How long it has waited in truth, which is more on a busy machine.
        found = re.search(r"not ready within ([0-9.]+) s", caught.value.message)
        assert found is not None
        assert 0.3 <= float(found[1]) < 5
        assert "127.0.0.1:1" in caught.value.message  # what was tried, and how it failed
        assert len(caught.value.history) == 1  # there is nothing to start again
