"""The clients that are compared: each sends a payload of about 1 KB as JSON, and decodes the JSON of the answer.

Each entry of `CLIENTS` is an asynchronous context manager that yields an asynchronous function ``send()``; the ones of
`TRIO` run under trio, the others under asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

PAYLOAD = {
    "model": "fixed",
    "messages": [{"role": "user", "content": "w" * 900}],
    "max_tokens": 100,
    "temperature": 0.7,
}
PATH = "/v1/chat/completions"
Send = Callable[[], Awaitable[object]]


@contextlib.asynccontextmanager
async def trinfer_tcp(port: int, uds: str) -> AsyncIterator[Send]:
    """trinfer's whole path: an EndpointServer's make_request, with its checks, errors and time-out."""
    from trinfer import EndpointServer, InferenceConfig

    config = InferenceConfig("endpoint", "fixed", endpoint_url=f"http://127.0.0.1:{port}")
    async with EndpointServer(config) as server:
        await server.wait_ready()
        yield lambda: server.make_request(PAYLOAD)


@contextlib.asynccontextmanager
async def trinfer_uds(port: int, uds: str) -> AsyncIterator[Send]:
    """The same through a unix socket."""
    from trinfer import EndpointServer, InferenceConfig

    class UnixServer(EndpointServer):
        def get_base_url(self) -> str:
            from trinfer.http.origin import Origin

            return Origin.unix(uds).url

    config = InferenceConfig("endpoint", "fixed", endpoint_url=f"http://127.0.0.1:{port}")
    async with UnixServer(config) as server:
        await server.wait_ready()
        yield lambda: server.make_request(PAYLOAD)


@contextlib.asynccontextmanager
async def bare_trio(port: int, uds: str) -> AsyncIterator[Send]:
    """The least that can be done with trio's streams: httptools, a list of connections, no time-out, no errors."""
    import httptools
    import trio

    idle: list[trio.SocketStream] = []

    class Answer:
        def __init__(self) -> None:
            self.body: list[bytes] = []
            self.done = False

        def on_body(self, data: bytes) -> None:
            self.body.append(data)

        def on_message_complete(self) -> None:
            self.done = True

    async def send() -> object:
        body = json.dumps(PAYLOAD).encode()
        stream = idle.pop() if idle else await trio.open_tcp_stream("127.0.0.1", port)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await stream.send_all(head.encode() + body)
        answer = Answer()
        parser = httptools.HttpResponseParser(answer)
        while not answer.done:
            parser.feed_data(await stream.receive_some(65536))
        idle.append(stream)
        return json.loads(b"".join(answer.body))

    yield send
    for stream in idle:
        await stream.aclose()


@contextlib.asynccontextmanager
async def httpx_trio(port: int, uds: str) -> AsyncIterator[Send]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=600) as client:

        async def send() -> object:
            return (await client.post(PATH, json=PAYLOAD)).json()

        yield send


@contextlib.asynccontextmanager
async def httpx2_trio(port: int, uds: str) -> AsyncIterator[Send]:
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=600) as client:

        async def send() -> object:
            return (await client.post(PATH, json=PAYLOAD)).json()

        yield send


@contextlib.asynccontextmanager
async def raw_post(port: int, uds: str) -> AsyncIterator[Send]:
    """What datatrove's ``_raw_post`` does: a connection for each request, read to its end."""

    async def send() -> object:
        body = json.dumps(PAYLOAD).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            answer = await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
        assert status == 200
        return json.loads(answer)

    yield send


@contextlib.asynccontextmanager
async def aiohttp_client(port: int, uds: str) -> AsyncIterator[Send]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:

        async def send() -> object:
            async with session.post(PATH, json=PAYLOAD) as answer:
                return await answer.json()

        yield send


@contextlib.asynccontextmanager
async def openai_sdk(port: int, uds: str) -> AsyncIterator[Send]:
    import openai

    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as client:
        yield lambda: client.chat.completions.create(**PAYLOAD)


TRIO = {
    "trinfer": trinfer_tcp,
    "trinfer uds": trinfer_uds,
    "bare trio + httptools": bare_trio,
    "httpx on trio": httpx_trio,
    "httpx2 on trio": httpx2_trio,
}
ASYNCIO = {
    "datatrove _raw_post": raw_post,
    "aiohttp": aiohttp_client,
    "openai SDK": openai_sdk,
}
CLIENTS = {**TRIO, **ASYNCIO}
