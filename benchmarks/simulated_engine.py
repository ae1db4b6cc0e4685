"""An engine of known capacity: continuous batching over some slots, with service times by length, and no model.

It knows at any time how many of its slots are busy, which a real engine does not tell so exactly.

python -m benchmarks.simulated_engine PORT [--slots N] [--seconds-per-token S]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import deque
from dataclasses import dataclass, field

import trio

from trinfer.http.serving import HttpRequest, HttpResponse, json_response, serve_http


@dataclass
class Slots:
    """The slots, first come first served, and the integral of how many are busy."""

    count: int
    busy: int = 0
    waiting: deque[trio.Event] = field(default_factory=deque)
    integral: float = 0.0  # slot-seconds
    since: float = field(default_factory=time.monotonic)
    first_request: float | None = None
    # Time and integral when the slots were full for the first time, when the last request came, and at the last answer.
    full: tuple[float, float] | None = None
    last_arrival: tuple[float, float] | None = None
    last_answer: tuple[float, float] | None = None
    served: int = 0

    def tick(self) -> tuple[float, float]:
        now = time.monotonic()
        self.integral += self.busy * (now - self.since)
        self.since = now
        return now, self.integral

    async def serve(self, seconds: float) -> None:
        """Wait for a slot, and hold it for so long."""
        self.last_arrival = self.tick()
        if self.first_request is None:
            self.first_request = self.since
        if self.busy >= self.count:
            turn = trio.Event()
            self.waiting.append(turn)
            try:
                await turn.wait()  # the slot is handed over, and stays busy
            except trio.Cancelled:
                if turn.is_set():
                    self._free()
                else:
                    self.waiting.remove(turn)
                raise
        else:
            self.busy += 1
            if self.busy == self.count and self.full is None:
                self.full = self.tick()
        try:
            await trio.sleep(seconds)
        finally:
            self.last_answer = self.tick()
            self._free()
        self.served += 1

    def _free(self) -> None:
        if self.waiting:
            self.waiting.popleft().set()
        else:
            self.busy -= 1


def tokens_of(body: bytes) -> int:
    """How long the answer is: between 10 and 90 tokens, by what is asked."""
    return 10 + hashlib.blake2b(body, digest_size=2).digest()[0] % 81


async def main(port: int, slots: Slots, seconds_per_token: float) -> None:
    async def handle(request: HttpRequest) -> HttpResponse:
        if request.path == "/v1/models":
            return json_response({"object": "list", "data": [{"id": "simulated", "object": "model"}]})
        if request.path == "/slots":
            slots.tick()
            return json_response({name: value for name, value in vars(slots).items() if name != "waiting"})
        if request.path == "/metrics":
            text = (
                f"vllm:num_requests_running {slots.busy}\nvllm:num_requests_waiting {len(slots.waiting)}\n"
                f"vllm:generation_tokens_total {slots.served}\n"
            )
            return HttpResponse(200, text.encode(), {"Content-Type": "text/plain"})
        tokens = tokens_of(request.body)
        await slots.serve(tokens * seconds_per_token)
        message = {"role": "assistant", "content": "word " * tokens}
        return json_response(
            {
                "id": "chatcmpl-simulated",
                "object": "chat.completion",
                "created": 1700000000,
                "model": "simulated",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 250, "completion_tokens": tokens, "total_tokens": 250 + tokens},
            }
        )

    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1", backlog=4096)
    print(json.dumps({"port": listeners[0].socket.getsockname()[1]}), flush=True)
    await serve_http(handle, listeners)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated_engine", description=__doc__)
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--seconds-per-token", type=float, default=0.005)
    arguments = parser.parse_args()
    trio.run(main, arguments.port, Slots(arguments.slots), arguments.seconds_per_token)
