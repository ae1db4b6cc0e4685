"""What the dummy engine says: the same every time, adding up, and in OpenAI's forms whatever it is asked."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trinfer import ConfigError, DummyServer, InferenceConfig
from trinfer.engines.dummy_app import DummyApp, DummyOptions
from trinfer.http.serving import HttpRequest, HttpResponse


def app(*, context: int = 8192, api_key: str | None = None, **options: Any) -> DummyApp:
    return DummyApp("dummy", max_context=context, options=DummyOptions(**options), api_key=api_key)


async def ask(engine: DummyApp, payload: Any, path: str = "/v1/completions") -> HttpResponse:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return await engine(HttpRequest("POST", path, {}, body))


async def events(response: HttpResponse) -> list[Any]:
    assert response.stream is not None
    lines = b"".join([piece async for piece in response.stream]).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: HttpResponse) -> str:
    error = json.loads(response.body)["error"]
    assert error["code"] == response.status
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


PROMPTS = st.one_of(
    st.text(),
    st.lists(st.text(), min_size=1, max_size=3),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=5), min_size=1, max_size=3),
)


@given(prompt=PROMPTS, max_tokens=st.none() | st.integers(1, 40), n=st.none() | st.integers(1, 3), chat=st.booleans())
async def test_answers_are_the_same_every_time_add_up_and_stream_alike(prompt, max_tokens, n, chat):
    payload: dict[str, Any] = {"max_tokens": max_tokens, "n": n}
    if chat:
        payload["messages"] = [{"role": "user", "content": str(prompt)}]
        prompts = 1
    else:
        payload["prompt"] = prompt
        prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    path = "/v1/chat/completions" if chat else "/v1/completions"
    whole = json.loads((await ask(app(), payload, path)).body)
    again = json.loads((await ask(app(), payload, path)).body)
    assert whole["choices"] == again["choices"]
    assert [choice["index"] for choice in whole["choices"]] == list(range(prompts * (n or 1)))

    texts = [choice["message"]["content"] if chat else choice["text"] for choice in whole["choices"]]
    usage = whole["usage"]
    assert usage["completion_tokens"] == sum(len(text.split()) for text in texts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for text, choice in zip(texts, whole["choices"], strict=True):
        limit = max_tokens or 16
        assert len(text.split()) <= limit
        if choice["finish_reason"] == "length":
            assert len(text.split()) == limit
        else:
            assert choice["finish_reason"] == "stop"

    streaming = {**payload, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = await events(await ask(app(), streaming, path))
    assert (last["choices"], last["usage"]) == ([], usage)
    streamed = [""] * len(texts)
    reasons: list[Any] = [None] * len(texts)
    for piece in pieces:
        [choice] = piece["choices"]
        assert reasons[choice["index"]] is None, "something comes after the end"
        streamed[choice["index"]] += choice["delta"].get("content", "") if chat else choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert streamed == texts
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | KEYS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"]
GOOD = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}


@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
)
async def test_no_payload_is_too_strange(changes, path):
    response = await ask(app(), {**GOOD, **changes}, path)
    if response.stream is not None:
        await events(response)
    elif response.status != 200:
        assert response.status in {400, 404}
        assert error_of(response)


@given(body=st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode()))
async def test_no_body_is_too_strange(body):
    response = await ask(app(), body)
    assert response.status in {400, 404}
    assert error_of(response)


async def test_bodies_that_break_parsers():
    for body in (b"[" * 100_000, b'{"n": %s}' % (b"9" * 5000), b"\xff", b"", b"null"):
        assert (await ask(app(), body)).status == 400


@pytest.mark.parametrize(
    ("payload", "status", "message"),
    [
        ({}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": ["a", 1]}, 400, "prompt"),
        ({"prompt": "x", "model": "other"}, 404, "The model `other` does not exist"),
        ({"prompt": "x", "model": None}, 200, ""),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "x", "n": 129}, 400, "n must be"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream must be"),
        ({"prompt": "x", "stream": True, "stream_options": 5}, 400, "stream_options"),
        ({"prompt": "x", "stream_options": {}}, 400, "stream_options"),
        ({"prompt": "a b c", "max_tokens": 97}, 200, ""),
        (
            {"prompt": "a b c", "max_tokens": 98},
            400,
            "This model's maximum context length is 100 tokens. However, you requested 101 tokens "
            "(3 in the messages, 98 in the completion). Please reduce the length of the messages or completion.",
        ),
    ],
)
async def test_refusals_are_in_the_words_of_engines(payload, status, message):
    response = await ask(app(context=100), payload)
    assert response.status == status
    if status != 200:
        assert message in error_of(response)


async def test_parts_of_a_message():
    async def reply(content: Any) -> HttpResponse:
        return await ask(app(), {"messages": [{"role": "user", "content": content}]}, "/v1/chat/completions")

    text = {"type": "text", "text": "what is this"}
    assert (await reply([text])).body == (await reply("what is this")).body
    assert (await reply([text, {"type": "image_url", "image_url": {"url": "data:"}}])).status == 200
    assert (await reply(None)).status == 200  # a message that only calls tools
    for bad in ([1], ["text"], [{}], 5, {"type": "text"}):
        assert (await reply(bad)).status == 400


async def get(engine: DummyApp, path: str, **headers: str) -> HttpResponse:
    return await engine(HttpRequest("GET", path, headers))


async def test_routes_and_keys():
    engine = app(api_key="k3y")
    assert (await get(engine, "/health")).status == 200
    assert (await get(engine, "/v1/models")).status == 401
    good = {"authorization": "Bearer k3y"}
    assert json.loads((await get(engine, "/v1/models?x=1", **good)).body)["data"][0]["id"] == "dummy"
    assert json.loads((await get(engine, "/v1/models/dummy", **good)).body)["id"] == "dummy"
    assert (await get(engine, "/v1/models/other", **good)).status == 404
    assert (await get(engine, "/v1/completions", **good)).status == 404


async def test_latency_is_what_was_ordered(autojump_clock):
    engine = app(latency=10, token_latency=2, min_tokens=5)
    began = trio.current_time()
    await ask(engine, {"prompt": "x", "max_tokens": 5})
    assert trio.current_time() - began == pytest.approx(10 + 4 * 2)
    began = trio.current_time()
    response = await ask(engine, {"prompt": "x", "max_tokens": 5, "stream": True})
    assert trio.current_time() == began
    assert response.stream is not None
    times = [
        trio.current_time() - began
        async for piece in response.stream
        if b"DONE" not in piece and json.loads(piece[6:])["choices"][0]["text"]
    ]
    assert times == pytest.approx([10, 12, 14, 16, 18])


async def test_the_queue_and_its_end(autojump_clock):
    engine = app(latency=10, max_concurrency=2, queue_limit=3)
    done: list[tuple[float, int]] = []

    async def one(number: int) -> None:
        await trio.sleep(number / 100)  # in this order
        response = await ask(engine, {"prompt": "x"})
        done.append((round(trio.current_time() - began), response.status))
        if response.status == 429:
            assert int(response.headers["Retry-After"]) >= 1

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(7):
            nursery.start_soon(one, number)
    assert done == [(0, 429), (0, 429), (10, 200), (10, 200), (20, 200), (20, 200), (30, 200)]


async def test_a_stream_given_up_leaves_its_slot_to_the_next(autojump_clock):
    engine = app(latency=1, token_latency=1, max_concurrency=1, queue_limit=0)
    for _ in range(3):
        response = await ask(engine, {"prompt": "x", "stream": True})
        assert response.status == 200
        assert response.stream is not None
        await anext(response.stream)
        assert (await ask(engine, {"prompt": "x"})).status == 429
        await response.stream.aclose()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"nonsense": 1, "latency": 1}, ["nonsense", "latency", "min_tokens"]),
        ({"latency": float("nan")}, ["latency", "0", "86400"]),
        ({"token-latency": -1}, ["token-latency", "3600"]),
        ({"max_concurrency": True}, ["max_concurrency"]),
        ({"error_status": 399}, ["error_status", "400", "599"]),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(kwargs, words):
    with pytest.raises(ConfigError) as caught:
        DummyOptions.from_kwargs(kwargs)
    assert all(word in str(caught.value) for word in words)


def test_options_may_be_written_with_dashes():
    assert DummyOptions.from_kwargs({"token-latency": 2, "max_concurrency": 3}) == DummyOptions(
        token_latency=2, max_concurrency=3
    )


# The client stops at the last event, and leaves its own generators to the garbage collector.
@pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning")
async def test_the_official_client_on_trio():
    async with DummyServer(InferenceConfig("dummy", transport="tcp", api_key="k3y")) as server:
        await server.wait_ready()
        async with openai.AsyncOpenAI(base_url=f"{server.get_base_url()}/v1", api_key="k3y", max_retries=0) as client:
            assert (await client.models.retrieve("dummy")).id == "dummy"
            whole = await client.chat.completions.create(
                model="dummy", messages=[{"role": "user", "content": "hello"}], n=2, max_tokens=5
            )
            stream = await client.chat.completions.create(
                model="dummy", messages=[{"role": "user", "content": "hello"}], n=2, max_tokens=5, stream=True
            )
            texts, reasons = ["", ""], ["", ""]
            async with stream:
                async for chunk in stream:
                    [choice] = chunk.choices
                    texts[choice.index] += choice.delta.content or ""
                    reasons[choice.index] = choice.finish_reason
            assert texts == [choice.message.content for choice in whole.choices]
            assert reasons == [choice.finish_reason for choice in whole.choices]
            batch = await client.completions.create(model="dummy", prompt=[[1, 2], [3]], max_tokens=5)
            assert len(batch.choices) == 2
            with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens"):
                await client.completions.create(model="dummy", prompt="x", max_tokens=8192)
