"""Prepare data while the engine loads, then send many requests at once."""

import trio

from trinfer import DummyServer, InferenceConfig, InferenceError, InferenceResult


async def main() -> None:
    config = InferenceConfig("dummy", model_kwargs={"load_time": 0.5, "latency": 0.05})
    async with DummyServer(config) as server:
        print("state:", server.state.value)
        prompts = [f"Tell me about the number {number}." for number in range(20)]
        await trio.sleep(0.1)  # preparation that takes a while
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(ask, server, prompt)
        print("state:", server.state.value)
    print("state:", server.state.value)


async def ask(server: DummyServer, prompt: str) -> None:
    try:
        answer = await server.make_request({"messages": [{"role": "user", "content": prompt}], "max_tokens": 5})
    except InferenceError as error:
        print("failed:", error)
    else:
        print(prompt, "->", InferenceResult.from_response(answer).text)


trio.run(main)
