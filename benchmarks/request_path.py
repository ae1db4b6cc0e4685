"""Requests per second, CPU per request, latency and memory of trinfer's request path beside other clients.

    python -m benchmarks.request_path                     the comparison
    python -m benchmarks.request_path --stream            streaming
    python -m benchmarks.request_path --soak 60           cancellations and resets, and what they leave

All clients ask one nginx on loopback, in turn, each in a process of its own; CPU is that of the client's process, JSON
encoding and decoding included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import nginx
from benchmarks.clients import ASYNCIO, CLIENTS, TRIO

ROOT = Path(__file__).parent.parent
IN_FLIGHT = (1, 8, 64, 512, 1000)
SLOW = ("httpx on trio", "openai SDK")


# -- one measurement, in a process of its own ----------------------------------------------------------------------


class Meter:
    """Collects latencies, and CPU between `begin` and `end`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.latencies: list[float] = []
        self.errors = 0
        self.running = True

    def begin(self) -> None:
        self.latencies.clear()
        self.began, self.cpu = time.perf_counter(), cpu()
        self.until = self.began + self.seconds

    def end(self) -> dict[str, float]:
        wall, used = time.perf_counter() - self.began, cpu() - self.cpu
        ordered = sorted(self.latencies)
        count = max(1, len(ordered))

        def rank(share: float) -> float:
            return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

        return {
            "requests": len(ordered),
            "per_second": len(ordered) / wall,
            "cpu_us": 1e6 * used / count,
            "p50_ms": rank(0.5),
            "p99_ms": rank(0.99),
            "p999_ms": rank(0.999),
            "rss_mib": peak_rss(),
            "errors": self.errors,
        }

    async def ask_on(self, send) -> None:
        while self.running:
            began = time.perf_counter()
            try:
                await send()
            except Exception:
                self.errors += 1
            now = time.perf_counter()
            self.latencies.append(now - began)
            if now > self.until:
                self.running = False


def peak_rss() -> float:
    """MiB. ru_maxrss would be inherited from the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def work(client: str, port: int, uds: str, in_flight: int, seconds: float) -> dict[str, float]:
    """Measure one client."""
    meter = Meter(seconds)

    async def on_trio() -> None:
        import trio

        async with TRIO[client](port, uds) as send:
            # Once for each, so that connections are there when the clock starts.
            async with trio.open_nursery() as nursery:
                for _ in range(in_flight):
                    nursery.start_soon(send)
            meter.begin()
            async with trio.open_nursery() as nursery:
                for _ in range(in_flight):
                    nursery.start_soon(meter.ask_on, send)

    async def on_asyncio() -> None:
        async with ASYNCIO[client](port, uds) as send:
            await asyncio.gather(*(send() for _ in range(in_flight)))
            meter.begin()
            await asyncio.gather(*(meter.ask_on(send) for _ in range(in_flight)))

    if client in TRIO:
        import trio

        trio.run(on_trio)
    else:
        asyncio.run(on_asyncio())
    return meter.end()


# -- the comparison ------------------------------------------------------------------------------------------------


def measure(server: nginx.Nginx, client: str, in_flight: int, seconds: float) -> dict[str, float]:
    arguments = ["--worker", client, "--port", server.port, "--uds", server.uds, "--in-flight", in_flight]
    command = [sys.executable, "-m", "benchmarks.request_path", *map(str, arguments), "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{client} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def compare(levels: list[int], clients: list[str], rounds: int, seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with nginx.running() as server:
        for in_flight in levels:
            runs: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
            for _ in range(rounds):  # in turn, so that a slow minute of the machine meets all
                for client in clients:
                    runs[client].append(measure(server, client, in_flight, seconds))
            for client, results in runs.items():
                medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
                rows.append({"client": client, "in_flight": in_flight, **medians})
            own = next((row for row in rows if row["client"] == "trinfer" and row["in_flight"] == in_flight), None)
            for row in rows:
                if row["in_flight"] == in_flight and own is not None:
                    row["cpu_ratio"] = row["cpu_us"] / own["cpu_us"]
                    show(row)
    return rows


def show(row: dict[str, object]) -> None:
    print(
        "{client:<24} {in_flight:>5} {per_second:>9.0f} {cpu_us:>9.1f} {cpu_ratio:>7.2f} {p50_ms:>8.2f} {p99_ms:>8.2f} "
        "{p999_ms:>8.2f} {rss_mib:>6.0f} {errors:>6.0f}".format(**row),
        flush=True,
    )


HEADER = (
    f"{'client':<24} {'alive':>5} {'req/s':>9} {'CPU us':>9} {'ratio':>7} {'p50 ms':>8} {'p99 ms':>8} {'p99.9 ms':>8} "
    f"{'MiB':>6} {'errors':>6}"
)


def markdown(rows: list[dict[str, object]], about: str) -> str:
    lines = [
        "# The request path",
        "",
        "Printed by `python -m benchmarks.request_path`. " + about,
        "",
        "CPU is that of the client's process for one request; the ratio is to trinfer in the same run.",
        "",
        "![CPU per request](request_path.svg)",
        "",
        "| client | in flight | requests/s | CPU us | ratio | p50 ms | p99 ms | p99.9 ms | peak RSS MiB | errors |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| {client} | {in_flight} | {per_second:.0f} | {cpu_us:.1f} | {cpu_ratio:.2f} | {p50_ms:.2f} | {p99_ms:.2f} | "
        "{p999_ms:.2f} | {rss_mib:.0f} | {errors:.0f} |".format(**row)
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def svg(rows: list[dict[str, object]]) -> str:
    """Bars of CPU per request at 64 in flight, or at the level that was measured; the axis is logarithmic."""
    import math

    level = 64 if any(row["in_flight"] == 64 for row in rows) else rows[0]["in_flight"]
    chosen = sorted((row for row in rows if row["in_flight"] == level), key=lambda row: row["cpu_us"])
    low, high = math.log10(10), math.log10(max(row["cpu_us"] for row in chosen) * 1.3)
    bars = []
    for number, row in enumerate(chosen):
        y = 40 + 30 * number
        width = 440 * (math.log10(row["cpu_us"]) - low) / (high - low)
        colour = "#2a6f97" if str(row["client"]).startswith("trinfer") else "#b0b7bd"
        bars.append(
            f'<text x="190" y="{y + 15}" text-anchor="end">{row["client"]}</text>'
            f'<rect x="200" y="{y}" width="{width:.0f}" height="20" fill="{colour}"/>'
            f'<text x="{206 + width:.0f}" y="{y + 15}">{row["cpu_us"]:.0f}</text>'
        )
    height = 50 + 30 * len(chosen)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" font-family="sans-serif" '
        'font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-weight="bold">'
        f"CPU microseconds per request, {level} in flight (logarithmic)</text>{''.join(bars)}</svg>\n"
    )


# -- streaming -----------------------------------------------------------------------------------------------------

DRIP = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
event = open(sys.argv[1], "rb").readline() + b"\\n"
while True:
    client, _ = server.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
    for _ in range(int(sys.argv[2])):
        client.sendall(b"%x\\r\\n%s\\r\\n" % (len(event), event))
    client.sendall(b"e\\r\\ndata: [DONE]\\n\\n\\r\\n0\\r\\n\\r\\n")
    client.close()
"""


def stream() -> None:
    """Chunks per second of client CPU: many in one segment, as nginx sends a file, and one write for each chunk."""
    import tempfile

    import trio

    from trinfer.http.api import ApiClient
    from trinfer.http.origin import Origin

    async def read(origin: Origin, path: str) -> tuple[int, float, float]:
        client = ApiClient(origin)
        count, began, used = 0, time.perf_counter(), cpu()
        async for _ in client.stream_json(path, {}, timeout=600):
            count += 1
        result = count, time.perf_counter() - began, cpu() - used
        client.close()
        return result

    with nginx.running() as server, tempfile.NamedTemporaryFile() as event:
        event.write(nginx.events(1))
        event.flush()
        drip = subprocess.Popen([sys.executable, "-c", DRIP, event.name, "50000"], stdout=subprocess.PIPE, text=True)
        port = int(drip.stdout.readline())
        for name, url, path in (
            ("many chunks a segment", server.url, "/stream"),
            ("one write for each chunk", f"http://127.0.0.1:{port}", "/x"),
        ):
            results = [trio.run(read, Origin.from_url(url), path) for _ in range(5)]
            rates = sorted(count / used for count, _, used in results)
            walls = sorted(count / wall for count, wall, _ in results)
            print(f"{name:<26} {rates[2]:>9.0f} chunks per second of CPU, {walls[2]:>9.0f} per second, median of 5")
        drip.kill()
        drip.wait()
        drip.stdout.close()


# -- soak ----------------------------------------------------------------------------------------------------------


def soak(seconds: float) -> int:
    """5 % of requests cancelled, 5 % of connections cut by the server; memory and descriptors must stay flat."""
    import trio

    from trinfer.errors import ConnectionLost
    from trinfer.http.api import ApiClient
    from trinfer.http.origin import Origin
    from trinfer.http.retry import NO_RETRIES

    samples: list[tuple[float, int]] = []
    counts = {"answered": 0, "cancelled": 0, "cut": 0}

    async def ask(client: ApiClient, until: float, chance: random.Random) -> None:
        while trio.current_time() < until:
            kind = chance.random()
            with trio.move_on_after(chance.uniform(0, 0.002) if kind < 0.05 else 60) as scope:
                try:
                    await client.post_json("/reset" if kind > 0.95 else "/x", {"x": "y" * 900}, timeout=30)
                    counts["answered"] += 1
                except ConnectionLost:
                    counts["cut"] += 1
            counts["cancelled"] += scope.cancelled_caught

    async def sample(until: float) -> None:
        while trio.current_time() < until:
            await trio.sleep(seconds / 20)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))))

    async def main(url: str) -> None:
        client = ApiClient(Origin.from_url(url), retry=NO_RETRIES)
        until = trio.current_time() + seconds
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sample, until)
            for number in range(64):
                nursery.start_soon(ask, client, until, random.Random(number))
        assert client.pool.in_use == 0, "a slot was lost"
        client.close()

    with nginx.running() as server:
        trio.run(main, server.url)
    # The first fifth warms up: pools of objects, code, the first connections.
    kept = samples[4:]
    memory = [rss for rss, _ in kept]
    files = [count for _, count in kept]
    growth = 100 * (statistics.mean(memory[-4:]) / statistics.mean(memory[:4]) - 1)
    print(f"{counts['answered']} answered, {counts['cancelled']} cancelled, {counts['cut']} cut in {seconds:g} s")
    print(f"RSS {memory[0]:.1f} -> {memory[-1]:.1f} MiB ({growth:+.1f} %), descriptors {min(files)} to {max(files)}")
    return 0 if growth <= 5 and max(files) <= 64 + 30 else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.request_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--in-flight", type=int, nargs="+", default=list(IN_FLIGHT), metavar="N", help="requests at once")
    add("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS), metavar="CLIENT", help=", ".join(CLIENTS))
    add("--seconds", type=float, default=3.0, help="for each measurement (default: %(default)g)")
    add("--rounds", type=int, default=3, help="of which the median counts (default: %(default)s)")
    add("--out", metavar="FOLDER", help="write request_path.md, .json and .svg there")
    add("--stream", action="store_true", help="measure streaming instead")
    add("--soak", type=float, metavar="SECONDS", help="run cancellations and resets instead")
    for hidden in ("--worker", "--uds"):
        add(hidden, help=argparse.SUPPRESS)
    add("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        in_flight = arguments.in_flight[0]
        print(json.dumps(work(arguments.worker, arguments.port, arguments.uds, in_flight, arguments.seconds)))
        return 0
    if arguments.stream:
        stream()
        return 0
    if arguments.soak:
        return soak(arguments.soak)
    print(HEADER)
    rows = compare(arguments.in_flight, arguments.clients, arguments.rounds, arguments.seconds)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        about = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {versions()}."
        (folder / "request_path.md").write_text(markdown(rows, about))
        (folder / "request_path.svg").write_text(svg(rows))
        (folder / "request_path.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(
        f"{name} {version(name)}" for name in ("trio", "httptools", "httpx", "httpx2", "aiohttp", "openai")
    )


if __name__ == "__main__":
    sys.exit(main())
