"""Figures of one engine's life: start, readiness, exit, kill -9, output.

python -m benchmarks.lifecycle [--json FILE] [--rounds N]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import trio

from benchmarks.figures import Figures, arguments_for
from trinfer import CustomServer, InferenceConfig
from trinfer.process.output import EngineLog
from trinfer.process.spawn import marked_processes, run_guarded
from trinfer.testing import fake_engine

ROOT = Path(__file__).parent.parent
CHAT = {"messages": [{"role": "user", "content": "hello"}]}

# Writes down, on the clock that all processes share, when it answers 200 for the first time. The time is taken after
# bind() and before the first answer can be given.
STAMPED = """
import http.server, sys, time
ready_after, stamp, port = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def reply(self):
        loading = MODE == "503" and time.monotonic() - began < ready_after
        body = b"{}" if loading else b'{"data": [], "choices": []}'
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(503 if loading else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = reply
if MODE == "bind": time.sleep(ready_after)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
with open(stamp, "w") as file: file.write(repr(time.monotonic() if MODE == "bind" else began + ready_after))
server.serve_forever()
"""

OWNER = """
import sys, trio
from functools import partial
from trinfer.process.spawn import run_guarded
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run_guarded, sys.argv[2:], grace=1.0, marker={"TRINFER_BENCH": sys.argv[1]},
                                    on_output=lambda chunk: None))
        print(flush=True)
trio.run(main)
"""


def fake(*options: str, port: int = 1) -> list[str]:
    return [sys.executable, "-S", "-E", fake_engine.__file__, "--port", str(port), *options]


async def start_overhead(figures: Figures, rounds: int) -> None:
    """A start with and without the guard, in turn: until the program's first byte of output."""
    command = ["sh", "-c", "echo x; sleep 60"]
    bare, guarded = [], []
    for _ in range(rounds * 3):
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE, check=False))
            await process.stdout.receive_some(1)
            bare.append(1e3 * (time.perf_counter() - began))
            nursery.cancel_scope.cancel()
        await process.stdout.aclose()
        said = trio.Event()
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            run = partial(run_guarded, command, grace=1.0, marker={}, on_output=lambda chunk, said=said: said.set())
            await nursery.start(run)
            await said.wait()
            guarded.append(1e3 * (time.perf_counter() - began))
            nursery.cancel_scope.cancel()
    figures.add("start without guard", bare, "ms")
    figures.add("start with guard", guarded, "ms")
    figures.add("the guard adds", [g - b for g, b in zip(guarded, bare, strict=True)], "ms", "< 40")


async def guard_memory(figures: Figures) -> None:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(run_guarded, ["sleep", "60"], grace=1.0, marker={}, on_output=lambda chunk: None)
        )
        await trio.sleep(0.2)
        pss = []
        for pid in (process.process.pid, process._inner_pid):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss.append(next(int(line.split()[1]) / 1024 for line in rollup.splitlines() if line.startswith("Pss:")))
        nursery.cancel_scope.cancel()
    figures.add("memory of each process of the guard (PSS)", pss, "MiB", "< 10")


async def detection_lag(figures: Figures, rounds: int) -> None:
    """From the engine's first possible 200 to the moment in which make_request may proceed."""
    every: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder, "stamp")
        for mode in ("bind", "503"):
            script = Path(folder, f"{mode}.py")
            script.write_text(f"MODE = {mode!r}\n" + STAMPED)
            for ready_after in (0.2, 1.0, 3.0):
                lags = []
                for _ in range(rounds):
                    command = [sys.executable, str(script), str(ready_after), str(stamp), "{port}"]
                    config = InferenceConfig("custom", model_kwargs={"server_command": command}, shutdown_grace_sec=1.0)
                    async with CustomServer(config) as server:
                        await server.wait_ready()
                        lags.append(1e3 * (time.monotonic() - float(stamp.read_text())))
                every += lags
                when = "binds" if mode == "bind" else "answers 200 instead of 503"
                figures.add(f"detection lag, engine {when} after {ready_after} s", lags, "ms")
    figures.add("detection lag, all", every, "ms", "median <= 30, worst <= 150")


async def time_to_gone(figures: Figures, rounds: int) -> None:
    """From the engine's own exit, or the stop, until the whole tree is gone."""
    own, deaf = [], []
    tree = "sleep 60 & setsid sleep 60 & (setsid sleep 60 &) ; sleep 0.2; exit 3"
    for _ in range(rounds):
        async with trio.open_nursery() as nursery:
            run = partial(run_guarded, ["sh", "-c", tree], grace=5.0, marker={}, on_output=lambda chunk: None)
            process = await nursery.start(run)
            await process.wait_engine()
            began = time.perf_counter()
            await process.wait()
            own.append(1e3 * (time.perf_counter() - began))
    grace = 0.5
    for _ in range(rounds):
        async with trio.open_nursery() as nursery:
            command = fake("--deaf-grandchild", "--never-ready")
            run = partial(run_guarded, command, grace=grace, marker={}, on_output=lambda chunk: None)
            process = await nursery.start(run)
            while len(process.tree()) < 3:  # noqa: ASYNC110  # other processes set no event
                await trio.sleep(0.01)
            await trio.sleep(0.2)  # until the grandchild ignores signals
            process.stop()
            began = time.perf_counter()
            await process.wait()
            deaf.append(1e3 * (time.perf_counter() - began - grace))
    figures.add("tree gone after the engine's own exit", own, "ms", "<= 100")
    figures.add(f"deaf grandchild gone after the grace period ({grace} s)", deaf, "ms", "<= 200")


def owner_killed(figures: Figures, rounds: int) -> None:
    """kill -9 of the owner of a tree with daemons, deaf, stopped and respawning processes."""
    times, survivors = [], []
    kinds = ("--children", "2", "--own-session", "--daemon", "--deaf-grandchild", "--respawning", "--stopped", "--deaf")
    for number in range(rounds):
        mark = {"TRINFER_BENCH": f"{os.getpid()}-{number}"}
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, mark["TRINFER_BENCH"], *fake(*kinds, "--never-ready")],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        owner.stdout.readline()
        while len(marked_processes(mark)) < 11:
            time.sleep(0.01)
        time.sleep(0.2)
        owner.kill()
        began = time.monotonic()
        while marked_processes(mark) and time.monotonic() - began < 3:
            time.sleep(0.005)
        times.append(1e3 * (time.monotonic() - began))
        survivors.append(float(len(marked_processes(mark))))
        owner.stdout.close()
        owner.wait()
    figures.add("owner killed with -9: tree of 11, one deaf, gone after", times, "ms", "<= 3000 (grace 1 s)")
    figures.add("owner killed with -9: survivors after 3 s", survivors, "", "0")


async def flood(figures: Figures) -> None:
    """Output at full speed through a real pipe into ring and file, while a task measures how late the loop is."""
    size = 600_000_000
    rates, late = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            log = EngineLog(Path(folder, "log"), max_bytes=100 * 2**20)
            async with trio.open_nursery() as nursery:
                await nursery.start(log.run)
                scope = trio.CancelScope()

                async def ticker(scope: trio.CancelScope = scope) -> None:
                    with scope:
                        while True:
                            began = time.perf_counter()
                            await trio.sleep(0.001)
                            late.append(1e3 * (time.perf_counter() - began - 0.001))

                began = time.perf_counter()
                nursery.start_soon(ticker)
                words = "flood of words in a line that is neither long nor short"
                command = ["sh", "-c", f"yes '{words}' | head -c {size}"]
                await run_guarded(command, grace=1.0, marker={}, on_output=log.feed)
                rates.append(log.bytes_seen / 1e6 / (time.perf_counter() - began))
                scope.cancel()
                await log.aclose()
    late.sort()
    figures.add("flood of output, read at", rates, "MB/s", ">= 100")
    figures.add("lateness of a 1 ms timer during the flood, p50", [late[len(late) // 2]], "ms")
    figures.add("lateness of a 1 ms timer during the flood, p99", [late[len(late) * 99 // 100]], "ms")


def main() -> None:
    arguments = arguments_for("benchmarks.lifecycle", __doc__.splitlines()[0], rounds=5)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    figures = Figures()
    figures.head()
    trio.run(start_overhead, figures, arguments.rounds)
    trio.run(guard_memory, figures)
    trio.run(detection_lag, figures, arguments.rounds)
    trio.run(time_to_gone, figures, arguments.rounds)
    owner_killed(figures, arguments.rounds)
    trio.run(flood, figures)
    figures.save(arguments, "The life of an engine", "benchmarks.lifecycle")


if __name__ == "__main__":
    main()
