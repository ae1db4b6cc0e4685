"""Figures of supervision: how soon a crash is seen, how soon requests flow again, and what watching costs.

python -m benchmarks.supervision [--json FILE] [--markdown FILE] [--rounds N]
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trio

from benchmarks import nginx
from benchmarks.clients import PAYLOAD
from benchmarks.figures import Figures, arguments_for
from trinfer import CustomServer, InferenceConfig, ServerState

IN_FLIGHT = 64
SECONDS = 0.5  # of each measurement of CPU: many short pairs, since the machine's own pace changes by the minute

# Writes down when it can answer, on the clock that all processes share.
ENGINE = """
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def reply(self):
        body = b'{"data": [], "choices": []}'
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = reply
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
with open(sys.argv[1], "w") as file: file.write(repr(time.monotonic()))
server.serve_forever()
"""


async def crashes(figures: Figures, rounds: int) -> None:
    """Kill the engine, and see when that is known, and when the next request is answered."""
    seen: list[float] = []
    extra: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder, "stamp")
        config = InferenceConfig(
            "custom",
            model_kwargs={"server_command": [sys.executable, "-S", "-E", "-c", ENGINE, str(stamp), "{port}"]},
            max_restarts=10_000,
            restart_backoff_sec=0.0,
            shutdown_grace_sec=1.0,
        )
        async with CustomServer(config) as server:
            await server.wait_ready()
            offset = trio.current_time() - time.monotonic()
            died: list[float] = []

            def hear(transition: object) -> None:
                if server.state is ServerState.RESTARTING:
                    died.append(time.monotonic())

            server.lifecycle.observers.append(hear)
            for _ in range(rounds):
                await server.make_request(PAYLOAD)
                killed = time.monotonic()
                os.kill(server._supervisor.attempt.processes[0].engine_pid, signal.SIGKILL)
                while not died:
                    await trio.lowlevel.checkpoint()
                seen.append(1e3 * (died.pop() - killed))
                await server.make_request(PAYLOAD)
                flows = time.monotonic()
                spawned = server._supervisor.attempt.processes[0].started_at - offset
                extra.append(1e3 * ((flows - killed) - (float(stamp.read_text()) - spawned)))
    figures.add("a killed engine is known to be dead after", seen, "ms", "<= 50")
    figures.add("from the kill to an answer, less the engine's own start", extra, "ms", "<= 200")


class Nginx(CustomServer):
    """Requests go to nginx; what is watched is a process beside it, which sleeps."""

    port_of_nginx = 0

    def get_base_url(self) -> str:
        return f"http://127.0.0.1:{self.port_of_nginx}"

    async def is_ready(self) -> bool:
        return True


class Unwatched(Nginx):
    """The same, and nobody looks whether it gets anywhere."""

    def health_watch(self, attempt: object, link: object) -> None:
        return None


async def cpu_per_request(kind: type[Nginx]) -> float:
    config = InferenceConfig(
        "custom",
        "fixed",
        model_kwargs={"server_command": ["sleep", "{port}"]},
        stall_timeout=10.0,  # a look each second: five times as often as by default
        max_restarts=3 if kind is Nginx else 0,
    )
    async with kind(config) as server:
        await server.wait_ready()

        async def ask() -> None:
            nonlocal count
            while time.perf_counter() < until:
                await server.make_request(PAYLOAD)
                count += 1

        used = count = 0
        for _ in range(2):  # the first time warms up
            count, began, until = 0, resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() + SECONDS
            async with trio.open_nursery() as nursery:
                for _ in range(IN_FLIGHT):
                    nursery.start_soon(ask)
            ended = resource.getrusage(resource.RUSAGE_SELF)
            used = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
        return 1e6 * used / count


def overhead(figures: Figures, rounds: int) -> None:
    """CPU per request with and without supervision, in turn."""
    on: list[float] = []
    off: list[float] = []
    with nginx.running() as server:
        Nginx.port_of_nginx = server.port
        for number in range(8 * rounds):
            # Which one comes first changes, so that neither always gets the cooler machine.
            for kind, results in ((Nginx, on), (Unwatched, off))[:: 1 if number % 2 else -1]:
                results.append(trio.run(cpu_per_request, kind))
    figures.add("CPU per request, supervised", on, "us")
    figures.add("CPU per request, not supervised", off, "us")
    ratio = statistics.median(one / other for one, other in zip(on, off, strict=True))
    figures.add("supervision costs, of the CPU per request (median of pairs)", [100 * (ratio - 1)], "%", "<= 3")


def main() -> None:
    arguments = arguments_for("benchmarks.supervision", __doc__.splitlines()[0], rounds=9)
    figures = Figures()
    figures.head()
    trio.run(crashes, figures, arguments.rounds)
    overhead(figures, arguments.rounds)
    figures.save(arguments, "Supervision", "benchmarks.supervision")


if __name__ == "__main__":
    main()
