"""One server, one request. The dummy engine needs no GPU and no model."""

import trio

from trinfer import DummyServer, InferenceConfig


async def main() -> None:
    config = InferenceConfig("dummy", default_generation_params={"max_tokens": 8})
    async with DummyServer(config) as server:
        answer = await server.make_request({"messages": [{"role": "user", "content": "Hello"}]})
        print(answer["choices"][0]["message"]["content"])


trio.run(main)
