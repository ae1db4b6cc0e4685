"""An engine of one's own in fifteen lines: any program that serves /v1/models and /v1/chat/completions."""

import sys

import trio

from trinfer import InferenceConfig, InferenceServer
from trinfer.testing import fake_engine


class MyServer(InferenceServer):
    async def start_server(self) -> trio.Process:
        command = [sys.executable, fake_engine.__file__, "--port", str(self.port)]
        return await self.spawn(command, env={"MY_ENGINE_THREADS": "1"})

    async def monitor_health(self) -> None:
        await self.engine_exit()


async def main() -> None:
    config = InferenceConfig("custom", "my-model", executable="unused: start_server decides")
    async with MyServer(config) as server:
        answer = await server.make_request({"messages": [{"role": "user", "content": "Hello"}]})
        print(answer["choices"][0]["message"]["content"])


trio.run(main)
